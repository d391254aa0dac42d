"""`report.html`: one page that shows what a run trains on and how it goes.

Written from the files of the run directory alone, at any time: before the first step, while steps are appended, after the end. What is not
there yet is said on the page; what cannot be read is named there. The page asks nothing of a network and carries its own style and script.
Everything that came out of a file is escaped before it becomes markup, and the page's policy lets no script run but its own.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from structcot.errors import ConfigError
from structcot.files import write_text
from structcot.page import json_for_script, page_asset, page_head, safe_text
from structcot.report_charts import Chart, Series, draw_bars, draw_lines, number
from structcot.report_files import RunFiles, column, known, number_in, read_run
from structcot.report_live import live_charts
from structcot.report_proof import proof_section

LOSS_CURVES = (
    ("train/loss", "all trained tokens", "s-whole"),
    ("loss/thought", "thought", "s-thought"),
    ("loss/solution", "solution", "s-solution"),
    ("loss/end", "end of turn", "s-end"),
    ("eval/loss", "held out", "s-eval"),
)
SOURCE_PREFIX = "loss/source/"
MAX_SOURCES = 8
MAX_EPOCH_MARKS = 20
MAX_REASONS = 20


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` in one piece and return its path. Readers see the old page or the new one, never half of one.

    Raises:
        ConfigError: if `run_dir` is no directory.
        OSError: if it cannot be written to.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: is no directory; give the output_dir of a run")
    page = render_report(read_run(run_dir))
    path = run_dir / "report.html"
    # A lone surrogate, which JSON can hold and UTF-8 cannot, comes out as its escape.
    write_text(path, page.encode("utf-8", errors="backslashreplace").decode("utf-8"))
    return path


def render_report(run: RunFiles) -> str:
    """Lay out the whole page as text."""
    charts = _curves(run)
    lengths = _length_chart(run.plan)
    readouts = {chart.key: chart.readout for chart in [*charts, lengths] if chart.readout["x"]}
    style, script = page_asset("report.css"), page_asset("report.js")
    data = json_for_script(readouts)
    sections = [
        _headline(run),
        _section("curves", "Curves", f'<div class="charts">{"".join(chart.html for chart in charts)}</div>'),
        _section("data", "Data", f'<div class="pair">{_plan_table(run.plan)}{lengths.html}</div>'),
        _section("proof", "Data proof", proof_section(run.proof)),
        _section("rejected", "Rejected records", _rejected_table(run.rejected)),
        _section("certificate", "Adapter certificate", _certificate_table(run.certificate)) if run.certificate else "",
        _section("config", "Config", _config_text(run.config_text)),
        _section("manifest", "Manifest", _value_table(_flatten(run.manifest)) or _empty("manifest.json is not there or not whole yet.")),
    ]
    return (
        page_head(f"{run.name} - structcot run report", style, script)
        + f"<body><header><h1>{safe_text(run.name)}</h1></header><main>\n"
        + "\n".join(sections)
        + f'\n</main><script type="application/json" id="chart-data">{data}</script><script>{script}</script></body></html>\n'
    )


def _headline(run: RunFiles) -> str:
    cards = [*_identity_cards(run), *_progress_cards(run), *_speed_cards(run)]
    items = "".join(f'<div><dt>{name}</dt><dd>{value}</dd><dd class="detail">{detail}</dd></div>' for name, value, detail in cards)
    notes = "".join(f"<li>{safe_text(note)}</li>" for note in run.notes)
    return _section("summary", "Summary", f'<dl class="cards">{items}</dl>' + (f'<ul class="notes">{notes}</ul>' if notes else ""))


def _identity_cards(run: RunFiles) -> Iterator[tuple[str, str, str]]:
    """Say what is trained and how; each card is a name, a value and a detail, as markup."""
    tuning = run.config.get("tuning")
    tuning = tuning if isinstance(tuning, dict) else {}
    model = str(run.config.get("model_name_or_path", "unknown")).rstrip("/")
    folder, _, name = model.rpartition("/")
    yield "Model", safe_text(name), safe_text(folder)
    if tuning.get("method") == "full":
        yield "Method", "full fine-tuning", "every weight is trained"
    elif tuning.get("method") == "lora":
        targets = tuning.get("lora_target_modules", "")
        rank, alpha = (number_in(tuning, key) or math.nan for key in ("lora_r", "lora_alpha"))
        yield "Method", f"LoRA, rank {number(rank)}", safe_text(f"alpha {number(alpha)}, {_spoken(targets)}")
    tokens, supervised = number_in(run.plan, "tokens"), number_in(run.plan, "supervised_tokens")
    if tokens and supervised is not None:
        yield "Trained on", f"{100 * supervised / tokens:.1f} %", f"{supervised:,.0f} of {tokens:,.0f} tokens of the data"


def _progress_cards(run: RunFiles) -> Iterator[tuple[str, str, str]]:
    """Say how far the run is, and what the loss did."""
    num_done, num_planned = run.num_steps, number_in(run.plan, "steps")
    if num_planned and num_planned > 0:
        bar = f'<progress max="{num_planned:.0f}" value="{num_done}" aria-label="steps done"></progress>'
        yield "Steps", f"{num_done:,} of {num_planned:,.0f}", bar
    else:
        yield "Steps", f"{num_done:,}", "no plan yet"
    losses = [(row["step"], value) for row in run.metrics if (value := number_in(row, "train/loss")) is not None]
    if len(losses) == 1:
        yield "Loss", number(losses[0][1]), f"step {losses[0][0]:,}"
    elif losses:
        (first_step, first), (last_step, last) = losses[0], losses[-1]
        change = f"{100 * (last / first - 1):+.1f} %, ".replace("-", "\u2212") if first > 0 and math.isfinite(last - first) else ""
        yield "Loss", f"{number(first)} \u2192 {number(last)}", f"{change}step {first_step:,} to step {last_step:,}"


def _speed_cards(run: RunFiles) -> Iterator[tuple[str, str, str]]:
    """Say how fast it goes, how long it took and will take, and what memory it needs. Medians keep a slow first step from counting."""
    rates, supervised = known(run.metrics, "perf/tokens_per_second"), known(run.metrics, "perf/supervised_tokens_per_second")
    if rates:
        detail = f"{number(statistics.median(supervised))} of them trained on; median step" if supervised else "median step"
        yield "Tokens per second", number(statistics.median(rates)), detail
    seconds, waits = known(run.metrics, "time/step_seconds"), known(run.metrics, "time/data_seconds")
    if seconds:
        num_left = int(number_in(run.plan, "steps") or 0) - run.num_steps
        details = [f"{100 * sum(waits) / sum(seconds):.1f} % of it waiting for data"] if waits and sum(seconds) > 0 else []
        details += [f"about {_duration(num_left * statistics.median(seconds))} to go"] if num_left > 0 else []
        yield "Time", _duration(sum(seconds)), "; ".join(details)
    peaks, mfu = known(run.metrics, "memory/peak_gib"), known(run.metrics, "perf/mfu_4n")
    if peaks:
        yield "Peak memory", f"{number(max(peaks))} GiB", f"MFU {100 * statistics.median(mfu):.1f} %, by 4N" if any(mfu) else ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"


def _curves(run: RunFiles) -> list[Chart]:
    rows, steps = run.metrics, [row["step"] for row in run.metrics]
    train = run.config.get("train")
    limit = number_in(train, "max_grad_norm") if isinstance(train, dict) else None
    epochs = _epoch_marks(run)
    losses = [Series(name=name, style=style, values=column(rows, key), is_smoothed=key != "eval/loss") for key, name, style in LOSS_CURVES]
    rate = Series(name="learning rate", style="s-whole", values=column(rows, "train/learning_rate"), is_smoothed=False)
    norm = Series(name="gradient norm", style="s-whole", values=column(rows, "train/grad_norm"))
    speeds = [
        Series(name="all", style="s-whole", values=column(rows, "perf/tokens_per_second")),
        Series(name="trained on", style="s-thought", values=column(rows, "perf/supervised_tokens_per_second")),
    ]
    clipping = f"clipped at {number(limit)}" if limit else ""
    charts = [
        draw_lines("loss", "Loss", steps, losses, marks=epochs, note="dashed: ends of epochs" if epochs else ""),
        draw_lines("learning-rate", "Learning rate", steps, [rate], scale="zero"),
        draw_lines("gradient-norm", "Gradient norm", steps, [norm], scale="log-if-wide", note=clipping),
        draw_lines("tokens-per-second", "Tokens per second", steps, speeds, scale="zero"),
    ]
    num_steps = Counter({key: count for key, count in Counter(chain.from_iterable(rows)).items() if key.startswith(SOURCE_PREFIX)})
    keys = sorted(key for key, _ in num_steps.most_common(MAX_SOURCES))
    if keys:
        names = [key.removeprefix(SOURCE_PREFIX) for key in keys]
        sources = [Series(name=names[index], style=f"s-{index}", values=column(rows, key)) for index, key in enumerate(keys)]
        note = f"the {MAX_SOURCES} of {len(num_steps):,} sources with the most steps" if len(num_steps) > MAX_SOURCES else ""
        charts.append(draw_lines("source-loss", "Loss by source", steps, sources, marks=epochs, note=note))
    return charts + live_charts(rows, steps)


def _epoch_marks(run: RunFiles) -> list[int]:
    """Find the last steps of the epochs that are over; none where there would be more lines than curve."""
    gap = number_in(run.plan, "steps_per_epoch")
    if not gap or not gap >= 1 or not run.metrics:
        return []
    num_epochs = int(run.metrics[-1]["step"] / gap)
    return [round(gap * epoch) for epoch in range(1, num_epochs + 1)] if num_epochs <= MAX_EPOCH_MARKS else []


def _length_chart(plan: Mapping[str, Any]) -> Chart:
    histogram = plan.get("length_histogram")
    histogram = histogram if isinstance(histogram, dict) else {}
    edges, counts = _numbers(histogram.get("edges_tokens")), _numbers(histogram.get("samples"))
    return draw_bars("lengths", "Lengths of the samples", edges, counts, "tokens")


def _numbers(values: object) -> list[float]:
    """Take a list of numbers as it is, and anything else as an empty one."""
    return values if isinstance(values, list) and all(isinstance(value, int | float) for value in values) else []


def _plan_table(plan: Mapping[str, Any]) -> str:
    rows = _flatten({key.replace("_", " "): value for key, value in plan.items() if key != "length_histogram"})
    return _value_table(rows) or _empty("data/plan.json is not there or not whole yet.")


def _rejected_table(rejected: Sequence[Mapping[str, Any]]) -> str:
    """Count what each reason cost, the commonest first, in records and tokens, and name the first record of each."""
    if not rejected:
        return _empty("No record is listed in data/rejected.jsonl.")
    counts = Counter(str(record.get("reason", "no reason given")) for record in rejected)
    rows = []
    for reason, count in counts.most_common(MAX_REASONS):
        group = [record for record in rejected if str(record.get("reason", "no reason given")) == reason]
        tokens = sum(known(group, "tokens"))
        cells = (safe_text(reason), f"{count:,}", f"{tokens:,.0f}", safe_text(group[0].get("source", "")))
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    rest = counts.total() - sum(count for _, count in counts.most_common(MAX_REASONS))
    more = f"<p>{rest:,} more records for {len(counts) - MAX_REASONS:,} rarer reasons.</p>" if rest else ""
    head = "<tr><th>Reason</th><th>Records</th><th>Tokens</th><th>The first one</th></tr>"
    table = f'<table class="counts"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Rejected records">{table}</div>{more}'


def _certificate_table(certificate: Mapping[str, Any]) -> str:
    """List every fact of the certificate; the facts called `passed`, at any depth, make its verdict."""
    facts = list(_flatten(certificate))
    verdicts = [value is True for key, value in facts if key.rsplit(".", 1)[-1] == "passed"]
    if not verdicts:
        verdict = "The certificate states no verdict."
    else:
        verdict = '<strong class="good">Passed.</strong>' if all(verdicts) else '<strong class="bad">Failed.</strong>'
    return f"<p>{verdict}</p>{_value_table(facts)}"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value_table(facts: Iterable[tuple[str, Any]]) -> str:
    """Lay facts out in two columns; empty text where there is no fact."""
    rows = "".join(f'<tr><th scope="row">{safe_text(key)}</th><td>{safe_text(_spoken(value))}</td></tr>' for key, value in facts)
    return f'<table class="facts"><tbody>{rows}</tbody></table>' if rows else ""


def _spoken(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(_spoken, value))
    return "none" if value is None else str(value)


def _config_text(text: str) -> str:
    if not text:
        return _empty("config.toml is not there or not whole yet.")
    return f'<details><summary>config.toml, as resolved</summary><pre tabindex="0">{safe_text(text)}</pre></details>'


def _section(key: str, title: str, body: str) -> str:
    return f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>{body}</section>'


def _empty(text: str) -> str:
    return f'<p class="empty">{text}</p>'
