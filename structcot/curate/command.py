"""`structcot curate`: the stages one after the other, each on what the one before has kept.

Deduplication and decontamination look at problems alone, and come before the teacher: nothing is paid for that would fall afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from structcot.config import DataSource
from structcot.console import say
from structcot.curate import check, contamination, mix, selection
from structcot.curate.config import CurateConfig, read_curate
from structcot.curate.difficulty import ASKS as LABEL_ASKS
from structcot.curate.difficulty import label
from structcot.curate.duplicates import deduplicate, need_datatrove
from structcot.curate.funnel import write_funnel
from structcot.curate.prompts import collect
from structcot.curate.reformat import ASKS as COPY_ASKS
from structcot.curate.reformat import reformat
from structcot.curate.shards import write_card, write_shards
from structcot.curate.stages import Done, Record, Stage, StageFiles, run_stage
from structcot.curate.teacher import sample, server_facts
from structcot.data.rows import source_sha256
from structcot.errors import ConfigError
from structcot.files import write_json, write_text
from structcot.rundir import locked

STAGES, CONFIG, FACTS = "stages", "curate.toml", "curate.json"
Work = Callable[[Iterator[Record], StageFiles], None]


def curate(path: Path, overrides: Sequence[str] = (), *, until: str = "") -> dict[str, Any]:
    """Run what is left of a curation, as far as the stage `until` if one is named; returns what came of every stage.

    Raises:
        ConfigError: naming the file, key or option that is wrong.
        StructcotError: if a stage fails, or money or patience with a server is spent; the same call goes on.
    """
    config = read_curate(path, overrides)
    if config.duplicates.buckets:
        need_datatrove()
    output_dir = Path(config.output_dir)
    with locked(output_dir):
        write_text(output_dir / CONFIG, config.to_toml())
        stages = stages_of(config)
        if until and until not in (names := [stage.name for stage in stages]):
            raise ConfigError(f'--until: got "{until}"; use one of {", ".join(names)}')
        done: list[Done] = []
        for number, stage in enumerate(stages, 1):
            done.append(run_stage(stage, output_dir / STAGES / f"{number}-{stage.name}", done[-1] if done else None))
            say(f"{stage.name:14} read {done[-1].num_read:>9,}  kept {done[-1].num_kept:>9,}")
            if stage.name == until:
                break
        write_funnel(output_dir, config.title, done)
        if not until or until == stages[-1].name:
            write_shards(config, done[-1])
            write_card(config, done)
        facts = {"stages": [_facts_of(one) for one in done]}
        write_json(output_dir / FACTS, facts)
    return facts


def stages_of(config: CurateConfig) -> list[Stage]:
    """The stages of a curation in their order, each with the settings that decide its result."""
    sources = [{**source.model_dump(mode="json"), "sha256": _source_sha256(source.path, source.split)} for source in config.sources]
    stages = [Stage(name="prompts", facts={"sources": sources}, work=lambda _, files: collect(config.sources, files))]
    if config.duplicates.buckets:
        work: Work = partial(deduplicate, config.duplicates, config.scale)
        stages.append(Stage(name="deduplicate", facts=config.duplicates.model_dump(mode="json"), work=work))
    if config.contamination.benchmarks:
        benchmarks = contamination.load_benchmarks(config.contamination)
        work = partial(contamination.decontaminate, benchmarks)
        stages.append(Stage(name="decontaminate", facts=contamination.facts_of(benchmarks), work=work))
    if config.difficulty is not None:
        ranges = {source.name: source.difficulty for source in config.sources}
        facts = {**server_facts(config.difficulty), "asks": LABEL_ASKS, "ranges": ranges, "seed": config.seed}
        stages.append(Stage(name="difficulty", facts=facts, work=partial(label, config, config.difficulty)))
    prompts = {source.name: source.prompt for source in config.sources}
    asked = {"samples": config.teacher.samples, "system_prompt": config.teacher.system_prompt, "prompts": prompts, "seed": config.seed}
    stages.append(Stage(name="sample", facts={**server_facts(config.teacher), **asked}, work=partial(sample, config)))
    stages.append(Stage(name="check", facts=check.facts_of(config.check), work=partial(check.check, config.check)))
    server = config.reformat.server
    how = {"kept_words": config.reformat.kept_words, "untagged": config.reformat.untagged}
    facts = {**how, "server": {**server_facts(server), "asks": COPY_ASKS} if server else {}}
    stages.append(Stage(name="reformat", facts=facts, work=partial(reformat, config.reformat, config.seed)))
    stages.append(Stage(name="select", facts=config.select.model_dump(mode="json"), work=partial(selection.select, config.select)))
    facts = {**config.mix.model_dump(mode="json"), "system_prompt": config.output.system_prompt, "seed": config.seed}
    stages.append(Stage(name="mix", facts={**facts, "teacher": config.teacher.model}, work=partial(mix.mix, config)))
    return stages


def _source_sha256(path: str, split: str) -> str:
    return source_sha256(DataSource(path=path, split=split), "sources.path")


def _facts_of(done: Done) -> dict[str, Any]:
    return {"stage": done.name, "read": done.num_read, "kept": done.num_kept, "rejected": dict(done.rejected)}
