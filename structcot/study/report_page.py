"""The report of a study as a page of its own, without a script; what models and people wrote is shown as text and is nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from structcot.eval.report_page import points
from structcot.eval.report_samples import cut
from structcot.page import page_asset, page_head, safe_text
from structcot.study.report_figures import ending_shares
from structcot.study.report_intervals import difference_rows, draw_rows, matched_rows
from structcot.study.report_order import (
    BETTER,
    MEAN,
    NOISE,
    WORSE,
    Facts,
    all_tasks,
    headline_task,
    in_order,
    label_of,
    paper_rows,
    settings_in,
    settled,
)
from structcot.study.report_plots import dose_panels, draw_panels, proxy_numbers, proxy_panels, shade
from structcot.study.report_tables import (
    Table,
    checks_table,
    curves_table,
    heat_grid,
    losses_table,
    matched_table,
    missing_table,
    outputs_of,
    outputs_table,
    results_table,
    setting_rows,
    trained_table,
    unmatched_paper_rows,
)

QUESTION_CHARACTERS = 1000
OUTPUT_START_CHARACTERS, OUTPUT_END_CHARACTERS = 1500, 1500
ENDING_WORDS = {"finished": "finished", "truncated": "cut off", "looping": "cut off in a loop", "refused": "refused"}
# Columns of these heads hold words, which stand on the left.
WORD_HEADS = {"Verdict": "words", "Verdict of structure": "words", "Why": "words long"}
VERDICTS = {WORSE: "worse", BETTER: "better", NOISE: "noise"}
INTERVAL_NOTE = "points of accuracy with 95 % intervals; hollow dots are within noise"


def render_page(facts: Facts) -> str:
    """Lay out the whole page as text; a section without a body is left out."""
    style = page_asset("report.css") + page_asset("eval/report.css") + page_asset("study/report.css")
    sections = [
        _section("conclusions", "Conclusions", _conclusions(facts)),
        _section("results", "Results", _results(facts)),
        _section("dose", "Accuracy by how much is changed", _dose(facts)),
        _section("differences", "Differences from the reference", _differences(facts)),
        _section("matched", "Structure against content at the same edit distance", _matched(facts)),
        _section("checks", "What the perturbations did", _checks(facts)),
        _section("outputs", "What the models write", _outputs(facts)),
        _section("losses", "The cheap proxy: losses", _losses(facts)),
        _section("examples", "Examples", _examples(facts)),
        _section("missing", "Missing cells", table_html(missing_table(facts))),
        _section("warnings", "Warnings", _list(facts["warnings"], "notes")),
        _section("paper", "The paper", _list((facts.get("paper") or {}).get("sentences", ()))),
        _section("training", "Training", table_html(trained_table(facts, headline_task(facts)))),
        _section("settings", "Settings", _settings(facts)),
    ]
    return (
        page_head(f"{facts['title']} - structcot study", style)
        + f"<body><header><h1>{safe_text(facts['title'])}</h1></header><main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main></body></html>\n"
    )


def table_html(table: Table, extra: Sequence[tuple[str, Sequence[str]]] = ()) -> str:
    """Write a table, with columns of finished markup behind the names (`extra`: head and cells); nothing where it has no row."""
    if not table.rows:
        return ""
    first = len(table.heads) - table.num_paper
    classes = [_classes(head, index >= first) for index, head in enumerate(table.heads)]
    heads = [f'<th scope="col"{named}>{safe_text(head)}</th>' for head, named in zip(table.heads, classes, strict=True)]
    heads[table.num_names : table.num_names] = [f'<th scope="col">{head}</th>' for head, _ in extra]
    over = ""
    if table.num_paper:
        title = f'<th colspan="{table.num_paper}" scope="colgroup" class="paper">The paper</th>'
        over = f'<tr><td colspan="{first + len(extra)}"></td>{title}</tr>'
    rows = []
    for number, row in enumerate(table.rows):
        cells = [f"<td{named}>{_cell(text)}</td>" for text, named in zip(row, classes, strict=True)]
        cells[0] = f'<th scope="row">{safe_text(row[0])}</th>'
        cells[table.num_names : table.num_names] = [f"<td>{cells_of[number]}</td>" for _, cells_of in extra]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    body = f"<thead>{over}<tr>{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody>"
    label = safe_text(table.label)
    note = f'<p class="note">{safe_text(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f'<table class="results names-{table.num_names}">{body}</table></div>{note}'
    )


def _classes(head: str, is_paper: bool) -> str:
    names = [*(["paper"] if is_paper else []), *([WORD_HEADS[head]] if head in WORD_HEADS else [])]
    return f' class="{" ".join(names)}"' if names else ""


def _cell(text: str) -> str:
    """A verdict gets its colour beside its word."""
    return f'<span class="verdict {VERDICTS[text]}">{text}</span>' if text in VERDICTS else safe_text(text)


def _conclusions(facts: Facts) -> str:
    return _list(facts["conclusions"])


def _results(facts: Facts) -> str:
    """The table of the headline, those of single tasks to open below it, and what the paper has beyond."""
    first, *rest = all_tasks(facts) or [""]
    body = table_html(results_table(facts, first))
    for task in rest:
        body += _details(f"{task} alone", table_html(results_table(facts, task)))
    left = unmatched_paper_rows(facts) if body and paper_rows(facts) else []
    return body + (f'<p class="note">Rows of the paper with no variant here: {safe_text(", ".join(left))}.</p>' if left else "")


def _dose(facts: Facts) -> str:
    blocks = []
    tasks = all_tasks(facts)
    for number, setting in enumerate(dict.fromkeys(curve["setting"] for curve in facts["curves"])):
        for place, task in enumerate(tasks):
            panels = dose_panels(facts, setting, task, f"dose-{number}-{place}")
            curves = [curve for curve in facts["curves"] if (curve["setting"], curve["task"]) == (setting, task)]
            if not panels:
                continue
            title = ", ".join(filter(None, (setting, task)))
            numbers = _details("The numbers", table_html(curves_table(curves, f"Curves: {title}")))
            block = f'<div class="dose">{draw_panels(panels)}{numbers}</div>'
            blocks.append(f"<h3>{safe_text(title)}</h3>{block}" if place == 0 else _details(title, block))
    return "".join(blocks)


def _differences(facts: Facts) -> str:
    """Intervals for the headline in each setting, and a map of all where there is more than one column."""
    task = headline_task(facts)
    blocks = []
    for index, setting in enumerate(settings_in(in_order(facts), facts)):
        rows = difference_rows(facts, setting, task)
        if rows:
            heading = f"<h3>{safe_text(setting)}</h3>" if len(facts["settings"]) > 1 and setting else ""
            title = "Less the reference" if task != MEAN else "Less the reference, mean of all tasks"
            blocks.append(heading + draw_rows(f"differences-{index}", title, INTERVAL_NOTE, rows))
    heads, rows = heat_grid(facts)
    return "".join(blocks) + (_heat(heads, rows) if len(heads) > 1 else "")


def _heat(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Facts | None]]]) -> str:
    largest = max((abs(cell["value"]) for _, cells in rows for cell in cells if cell), default=0.0)
    body = []
    for name, cells in rows:
        shaded = (
            f'<td class="{shade(cell, largest)}">{points(cell["value"])} <small>{settled(cell)}</small></td>' if cell else "<td>\u2013</td>"
            for cell in cells
        )
        body.append(f'<tr><th scope="row">{safe_text(name)}</th>{"".join(shaded)}</tr>')
    head = "".join(f'<th scope="col">{safe_text(text)}</th>' for text in heads)
    return (
        '<h3>All differences</h3><div class="scroll" tabindex="0" role="region" aria-label="Map of differences"><table class="heat"><thead>'
        f'<tr><th scope="col">Variant</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
        '<p class="note">Points of accuracy; the deeper the shade, the larger the difference. The words say what its interval carries.</p>'
    )


def _matched(facts: Facts) -> str:
    rows = matched_rows(facts, headline_task(facts))
    note = "points of accuracy, structure less content; left of 0 structure costs more; hollow dots are within noise"
    plot = draw_rows("matched", "Structure less content", note, rows) if rows else ""
    return plot + (_details("The numbers", table_html(matched_table(facts))) if plot else table_html(matched_table(facts)))


def _checks(facts: Facts) -> str:
    return table_html(checks_table(facts, headline_task(facts)))


def _outputs(facts: Facts) -> str:
    blocks = []
    key = "".join(f'<span class="key"><i class="square {ending}"></i>{words}</span>' for ending, words in ENDING_WORDS.items())
    for task in facts["tasks"]:
        variants = outputs_of(facts, task)
        if variants:
            outputs = [variant["outputs"][task] for variant in variants]
            extra = [("Endings", [_stack(one) for one in outputs])]
            extra += [
                (head, _meters([one.get(name) for one in outputs]))
                for head, name in (("Length", "tokens_median"), ("Keywords", "keywords"))
            ]
            block = f'<p class="legend">{key}</p>{table_html(outputs_table(facts, task), extra)}'
            heading = f"<h3>{safe_text(task)}</h3>" if len(facts["tasks"]) > 1 else ""
            blocks.append(_details(task, block) if blocks else heading + block)
    return "".join(blocks)


def _stack(outputs: Facts) -> str:
    widths = "".join(f'<i class="{ending}" style="width:{100 * share:.4g}%"></i>' for ending, share in ending_shares(outputs).items())
    return f'<span class="stack" aria-hidden="true">{widths}</span>'


def _meters(values: Sequence[float | None]) -> list[str]:
    largest = max((value for value in values if value is not None), default=0) or 1
    return [f'<span class="meter" aria-hidden="true"><i style="width:{100 * (value or 0) / largest:.4g}%"></i></span>' for value in values]


def _losses(facts: Facts) -> str:
    """Two clouds of numbered points, with the table that says who they are."""
    task = headline_task(facts)
    table, panels = losses_table(facts, task), proxy_panels(facts, task)
    numbers = {label_of(variant, facts): text for variant, text in proxy_numbers(facts, task)}
    extra = [("Point", [numbers.get(row[0], "\u2013") for row in table.rows])] if panels else []
    return (draw_panels(panels) if panels else "") + table_html(table, extra)


def _examples(facts: Facts) -> str:
    blocks = []
    for variant in in_order(facts):
        entries = "".join(map(_example, variant["examples"]))
        blocks += [_details(label_of(variant, facts), entries)] if entries else []
    return "".join(blocks)


def _example(example: Facts) -> str:
    verdict = "right" if example["correct"] else "not right"
    said = f"{example['task']}, {example['problem_id']}: {verdict}, {example['ending']}; the answer is {example['gold']}"
    question = cut(str(example["question"]), QUESTION_CHARACTERS // 2, QUESTION_CHARACTERS // 2)
    output = cut(str(example["output"]), OUTPUT_START_CHARACTERS, OUTPUT_END_CHARACTERS)
    kind, sign = ("right", "+") if example["correct"] else ("wrong", "\u2212")
    return (
        f'<div class="example"><h4><i class="sign {kind}" aria-hidden="true">{sign}</i> {safe_text(said)}</h4>'
        f'<p>{safe_text(question)}</p><pre tabindex="0">{safe_text(output)}</pre></div>'
    )


def _settings(facts: Facts) -> str:
    rows = "".join(f'<tr><th scope="row">{name}</th><td>{safe_text(value)}</td></tr>' for name, value in setting_rows(facts))
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _list(sentences: Iterable[Any], style: str = "sentences") -> str:
    items = "".join(f"<li>{safe_text(sentence)}</li>" for sentence in sentences)
    return f'<ul class="{style}">{items}</ul>' if items else ""


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{safe_text(summary)}</summary>{body}</details>" if body else ""


def _section(key: str, title: str, body: str) -> str:
    """Wrap a section; nothing where it has no body."""
    return f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>{body}</section>' if body else ""
