"""The report of a study as Markdown for a repository: conclusions, tables, and links to the drawings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from structcot.study.report_order import Facts, all_tasks, headline_task
from structcot.study.report_tables import (
    Table,
    checks_table,
    losses_table,
    matched_table,
    missing_table,
    outputs_table,
    results_table,
    setting_rows,
    trained_table,
)

Figures = Iterable[tuple[str, str]]


def render_markdown(facts: Facts, figures: Figures) -> str:
    """Write the report; `figures` are titles and paths relative to it."""
    task = headline_task(facts)
    blocks = [f"# {_plain(facts['title'])}", *_items("Conclusions", facts["conclusions"])]
    blocks += _tables("Results", [results_table(facts, one) for one in all_tasks(facts)])
    for title, path in figures:
        blocks.append(f"![{_plain(title)}]({path})")
    blocks += _tables("Structure against content at the same edit distance", [matched_table(facts)])
    blocks += _tables("What the perturbations did", [checks_table(facts, task)])
    blocks += _tables("What the models write", [outputs_table(facts, one) for one in facts["tasks"]])
    blocks += _tables("The cheap proxy: losses", [losses_table(facts, task)])
    blocks += _tables("Missing cells", [missing_table(facts)])
    blocks += _items("Warnings", facts["warnings"])
    blocks += _items("The paper", (facts.get("paper") or {}).get("sentences", ()))
    blocks += _tables("Training", [trained_table(facts, task)])
    blocks += ["## Settings", "\n".join(f"- {_plain(name)}: {_plain(value)}" for name, value in setting_rows(facts))]
    return "\n\n".join(blocks) + "\n"


def _items(title: str, sentences: Iterable[str]) -> list[str]:
    items = [f"- {_plain(sentence)}" for sentence in sentences]
    return [f"## {title}", "\n".join(items)] if items else []


def _tables(title: str, tables: Sequence[Table]) -> list[str]:
    """Tables that have rows under one title, each with its label where there are several."""
    filled = [table for table in tables if table.rows]
    blocks = [f"## {title}"] if filled else []
    for table in filled:
        blocks += [f"### {_plain(table.label)}"] if len(filled) > 1 else []
        blocks += ["\n".join(_rows(table)), *([_plain(table.note)] if table.note else [])]
    return blocks


def _rows(table: Table) -> Iterable[str]:
    """A column of the paper says so in its head, since Markdown has no heads over heads."""
    first = len(table.heads) - table.num_paper
    heads = [head if index < first else f"Paper: {head[0].lower()}{head[1:]}" for index, head in enumerate(table.heads)]
    yield _row(map(_plain, heads))
    yield _row(["---"] * table.num_names + ["---:"] * (len(heads) - table.num_names))
    for row in table.rows:
        yield _row(map(_plain, row))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Keep a text from ending a cell or a line, or from becoming markup."""
    line = " ".join(str(text).split())
    return "".join(f"\\{sign}" if sign in "|*_`[]<>\\#" else sign for sign in line)
