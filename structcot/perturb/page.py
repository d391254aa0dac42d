"""The manipulation report as a page: what was asked, what was done, and histograms over the records. Self-contained, no script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from structcot.page import page_asset, page_head
from structcot.report_charts import draw_bars, number

TITLES = {
    "steps_moved": ("Steps that moved", "share of the steps that are left"),
    "kendall_tau": ("Order of the steps", "Kendall's tau: 1 as before, 0 as at random, -1 reversed"),
    "tokens_after_per_token_before": ("Length", "tokens after per token before"),
    "edit_distance_per_word": ("Edit distance", "words inserted, deleted or replaced, per word"),
    "keywords_left": ("Keywords left", "keywords after per keyword before"),
}


def render_page(facts: Mapping[str, Any]) -> str:
    """Lay out the report as one page of HTML."""
    charts = [
        _chart(f"realised-{index}", _realised_title(facts, index), "share of what could change", stage["histogram"])
        for index, stage in enumerate(facts["stages"])
    ]
    charts += [_chart(name, *TITLES[name], one) for name, one in facts["histograms"].items() if name in TITLES]
    return (
        page_head(f"Perturbation report: {facts['output']}", page_asset("report.css"))
        + f"<body><header><h1>{escape(str(facts['output']))}</h1></header><main>\n"
        f'<section id="summary"><h2>Summary</h2><dl class="cards">{"".join(_cards(facts))}</dl></section>\n'
        f'<section><h2>What was done</h2><div class="scroll">{_stage_table(facts)}</div></section>\n'
        f'<section><h2>Records</h2><div class="charts">{"".join(charts)}</div></section>\n'
        f"<section><h2>Records left as they are</h2>{_reason_table(facts)}</section>\n"
        "</main></body></html>\n"
    )


def _cards(facts: Mapping[str, Any]) -> Iterator[str]:
    left_out = sum(facts["left_out"].values())
    yield _card(
        "Records", f"{facts['records']:,}", f"{facts['changed']:,} changed, {facts['unchanged']:,} as they were, {left_out:,} left out"
    )
    yield _card(
        "Tokens", _share(facts["tokens_after_per_token_before"]), f"{facts['tokens_before']:,} before, {facts['tokens_after']:,} after"
    )
    yield _card("Edit distance", _share(facts["edit_distance_per_word"]), f"{facts['edit_distance']:,} words, by Levenshtein")
    yield _card("Keywords left", _share(facts["keywords_left"]), f"{facts['keywords_before']:,} before, {facts['keywords_after']:,} after")
    yield _card("Answers kept", _share(facts["answers_kept"]), f"of {facts['had_answer']:,} records with a final answer")


def _card(name: str, value: str, detail: str) -> str:
    return f'<div><dt>{name}</dt><dd>{value}</dd><dd class="detail">{detail}</dd></div>'


def _stage_table(facts: Mapping[str, Any]) -> str:
    rows = []
    for stage in facts["stages"]:
        steps = (
            f"{stage['steps_before']:,} to {stage['steps_after']:,}, {stage['steps_foreign']:,} from elsewhere"
            if stage["steps_before"]
            else "not touched"
        )
        tau = "" if stage["kendall_tau"] is None else f"{stage['kendall_tau']:.3f}"
        cells = [
            stage["settings"].replace(",", ", "),
            f"{stage['asked_fraction']:g}",
            _share(stage["realised_fraction"]),
            f"{stage['changed']:,} of {stage['units']:,}",
            steps,
            tau,
        ]
        rows.append("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>")
    heads = ("perturbation", "asked", "done", "units", "steps", "mean tau")
    return f'<table class="counts"><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr>{"".join(rows)}</table>'


def _reason_table(facts: Mapping[str, Any]) -> str:
    listed = [("left out", reason, count) for reason, count in facts["left_out"].items()]
    listed += [("not usable", reason, count) for reason, count in facts["unusable"].items()]
    listed += [(stage["kind"], reason, count) for stage in facts["stages"] for reason, count in stage["not_applied"].items()]
    if not listed:
        return '<p class="empty">None.</p>'
    rows = "".join(f"<tr><td>{escape(kind)}</td><td>{count:,}</td><td>{escape(reason)}</td></tr>" for kind, reason, count in listed)
    return f"<table><tr><th>perturbation</th><th>records</th><th>why</th></tr>{rows}</table>"


def _realised_title(facts: Mapping[str, Any], index: int) -> str:
    stage = facts["stages"][index]
    return f"Done, of {number(stage['asked_fraction'])} asked: {stage['kind']}"


def _chart(key: str, title: str, unit: str, histogram: Mapping[str, Any]) -> str:
    return draw_bars(key, title, histogram["edges"], histogram["counts"], unit, note=unit).html


def _share(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f}\u00a0%"
