"""The grid of a study: every cell with its stages, made from the config alone. Nothing of the demonstrations is read here.

What is trained on lies in OUTPUT/data (structcot.study.sources); a cell has OUTPUT/cells/NAME to itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from structcot.config import Config
from structcot.errors import ConfigError
from structcot.model_files import SIDE_FILES, TOKENIZER_FILES, weight_files
from structcot.perturb.spec import spec_text
from structcot.study.cells import Cell, Stage
from structcot.study.config import BASE, POOL, Part, SettingTable, StudyConfig, VariantTable, specs_of
from structcot.study.resolved import evaluation_config, evaluation_facts, need_budget, task_files, training_config, training_facts
from structcot.study.sources import places_of

REPORT_SUFFIXES = (".jsonl", ".records.jsonl", ".report.json", ".report.html")


def make_grid(config: StudyConfig) -> tuple[Cell, ...]:
    """Every cell in the order in which they are started: bases, all variants with their first seeds, reference ahead, then the next seeds.

    Raises:
        ConfigError: naming the key of the study under which a config, a benchmark or a name is wrong.
    """
    settings = [(setting, _base_cell(config, setting)) for setting in config.settings or [None]]
    rounds: list[list[Cell]] = [[] for _ in range(max(len(table.seeds or config.seeds) for table in config.variants))]
    for table in sorted(config.variants, key=lambda table: config.reference not in table.names):
        for name, fraction in table.names.items():
            for setting, base in settings:
                for number, seed in enumerate(table.seeds or config.seeds):
                    rounds[number].append(_trained_cell(config, table, (name, fraction), setting, base, seed))
    cells = [*{base.name: base for _, base in settings}.values(), *chain.from_iterable(rounds)]
    names = [cell.name for cell in cells]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ConfigError(f'settings: two cells would be called "{name}"; give a setting or a variant another name')
    return tuple(cells)


def find_cell(cells: tuple[Cell, ...], name: str) -> Cell:
    """Find the cell of a name, or of a number in the order of the grid, from 0.

    Raises:
        ConfigError: if there is none.
    """
    found = next((cell for number, cell in enumerate(cells) if name in (cell.name, str(number))), None)
    if found is None:
        raise ConfigError(
            f'--cell: got "{name}"; use a number from 0 to {len(cells) - 1}, or one of {", ".join(cell.name for cell in cells)}'
        )
    return found


def _base_cell(config: StudyConfig, setting: SettingTable | None) -> Cell:
    """The cell of the model before training: one for each setting with a model of its own, one for all others."""
    own = setting is not None and setting.model_name_or_path
    name, seed = f"{setting.name}-{BASE}" if setting and own else BASE, config.seeds[0]
    directory, places, model = Path(config.output_dir) / "cells" / name, places_of(config), _model_of(config, setting)
    stages, subject = [], {"model_name_or_path": model}
    if config.base is not None:
        part = Part(config=config.base.config, overrides=config.base.overrides)
        train = training_config(part, (), _training_values(config, directory, model, places.base, seed), "base")
        stages = [_training(train, directory, (places.base, *_model_files(model)), config.base.processes)]
        if train.tuning.method == "lora":
            arguments = ("export", str(directory / "run"), "--merge")
            stages += [Stage(name="merge", arguments=arguments, results=("run/model/certificate.json",), outputs=("run/model",), facts={})]
        subject = {"model_name_or_path": str(directory / "run" / "model")}
    stages.append(_evaluation(config, directory, subject, seed, () if config.base else _model_files(model)))
    label = setting.name if setting and own else ""
    return Cell(name=name, variant=BASE, kind="", fraction=0.0, setting=label, seed=seed, directory=directory, stages=tuple(stages))


def _trained_cell(
    config: StudyConfig, table: VariantTable, variant: tuple[str, float], setting: SettingTable | None, base: Cell, seed: int
) -> Cell:
    (name, fraction), places = variant, places_of(config)
    label = f"{setting.name}-{name}-s{seed}" if setting else f"{name}-s{seed}"
    directory = Path(config.output_dir) / "cells" / label
    model = str(base.directory / "run" / "model") if config.base else _model_of(config, setting)
    own = () if table.kind else (_data_of(config, table),)
    data = own[0] if own else directory / "data.jsonl"
    where = f"settings.{setting.name}" if setting and setting.overrides else "train"
    values = _training_values(config, directory, model, data, seed)
    train = training_config(config.train, setting.overrides if setting else (), values, where)
    need_budget(train, config.budget, where)
    stages = list(_perturbations(config, table, fraction, seed, directory))
    if config.budget == "tokens" and name != config.reference:
        stages += _counts(config, train, directory, own, _model_of(config, setting))
    files = (*own, places.demonstrations, *(() if config.base else _model_files(model)))
    stages.append(_training(train, directory, files, config.train.processes, config.budget))
    what = {"adapter": "adapter"} if train.tuning.method == "lora" else {"model_name_or_path": "model"}
    subject = {"model_name_or_path": model, **{key: str(directory / "run" / part) for key, part in what.items()}}
    stages.append(_evaluation(config, directory, subject, seed, ()))
    return Cell(
        name=label,
        variant=name,
        kind=table.kind,
        fraction=fraction,
        setting=setting.name if setting else "",
        seed=seed,
        directory=directory,
        stages=tuple(stages),
        needs=base.name if config.base else "",
        held_out=places.held_out_of_variant(table.label) if table.train and not table.kind and config.data.held_out else None,
    )


def _perturbations(config: StudyConfig, table: VariantTable, fraction: float, seed: int, directory: Path) -> Iterator[Stage]:
    """The commands that perturb the demonstrations, and the held-out ones in the same way.

    Wrong answers that come from the demonstrations themselves have no like among a few that are held out; from a pool they do.
    """
    if not table.kind:
        return
    places, settings = places_of(config), [setting.partition("=") for setting in table.settings]
    pool = [Path(value.strip()) for key, _, value in settings if key.strip() == POOL]
    sources = {"data": _data_of(config, table)}
    if config.data.held_out and not table.train and (table.kind != "wrong-answer" or pool):
        sources["held_out"] = places.held_out
    own = [setting for setting in table.settings if setting.partition("=")[0].strip() not in ("jobs", POOL)]  # the file's content counts
    facts = {"specs": [spec_text(spec) for spec in specs_of(table, fraction)], "settings": own, "seed": seed}
    for name, source in sources.items():
        how = ("--kind", table.kind, "--fraction", f"{fraction:g}", "--seed", str(seed), "--mode", table.mode)
        yield Stage(
            name=name,
            arguments=("perturb", str(source), str(directory / f"{name}.jsonl"), *table.settings, *how),
            results=tuple(name + suffix for suffix in (".jsonl", ".report.json", ".report.html")),
            outputs=tuple(name + suffix for suffix in REPORT_SUFFIXES),
            facts=facts,
            files=(source, *pool),
        )


def _counts(config: StudyConfig, train: Config, directory: Path, own: tuple[Path, ...], model: str) -> Iterator[Stage]:
    """The commands that count the tokens of a cell's demonstrations, and of the reference's.

    They count with the model that nothing has trained yet, whose tokenizer the trained base has too.
    """
    reference = _data_of(config, next(table for table in config.variants if config.reference in table.names))
    for name, data in (("count", Path(train.data.train[0].path)), ("count_reference", reference)):
        values = {"train": [train.data.train[0].model_copy(update={"path": str(data)})], "eval": []}
        changes = {"model_name_or_path": model, "output_dir": str(directory / name), "data": train.data.model_copy(update=values)}
        yield Stage(
            name=name,
            arguments=("prepare", str(directory / f"{name}.toml")),
            results=(f"{name}/data/plan.json",),
            outputs=(name, f"{name}.toml"),
            config=train.model_copy(update=changes),
            facts={"config": training_facts(train), "model": _name_of(model)},
            files=(*(own if name == "count" else (reference,)), *_model_files(model)),
        )


def _training(config: Config, directory: Path, files: tuple[Path, ...], processes: int, budget: str = "") -> Stage:
    what = "adapter" if config.tuning.method == "lora" else "model"
    return Stage(
        name="train",
        arguments=("train", str(directory / "train.toml")),
        results=(f"run/{what}/certificate.json", "run/metrics.jsonl", "run/report.html"),
        outputs=("run", "train.toml"),
        config=config,
        facts={"config": training_facts(config), "model": _name_of(config.model_name_or_path), "budget": budget},
        files=(*files, *(Path(source.path) for source in config.data.eval)),
        processes=processes,
    )


def _evaluation(config: StudyConfig, directory: Path, subject: Mapping[str, str], seed: int, files: tuple[Path, ...]) -> Stage:
    problems = places_of(config).problems if config.data.problems else None
    values = {"adapter": "", **subject, "output_dir": str(directory / "eval"), "seed": seed}
    resolved = evaluation_config(config.eval, values, problems, "eval")
    return Stage(
        name="eval",
        arguments=("eval", str(directory / "eval.toml")),
        results=("eval/results.json", "eval/report.html"),
        outputs=("eval", "eval.toml"),
        config=resolved,
        facts={"config": evaluation_facts(resolved), "model": _name_of(subject["model_name_or_path"])},
        files=(*files, *task_files(resolved), *([problems] if problems else [])),
    )


def _training_values(config: StudyConfig, directory: Path, model: str, data: Path, seed: int) -> dict[str, Any]:
    """What the study sets of a training config, by dotted key."""
    return {
        "model_name_or_path": model,
        "output_dir": str(directory / "run"),
        "seed": seed,
        "data.train": [str(data)],
        "data.eval": [str(places_of(config).held_out)] if config.data.held_out else [],
    }


def _model_of(config: StudyConfig, setting: SettingTable | None) -> str:
    """The model that nothing of the study has trained."""
    return (setting.model_name_or_path if setting else "") or config.model_name_or_path


def _model_files(model: str) -> tuple[Path, ...]:
    """The files of a model directory that decide what it says; none of a model that is named and not a directory."""
    directory = Path(model).expanduser()
    if not directory.is_dir():
        return ()
    small = (directory / name for name in (*SIDE_FILES, *TOKENIZER_FILES))
    return (*(path for path in small if path.is_file()), *weight_files(directory))


def _name_of(model: str) -> str:
    """A model that is fetched, by its name; "" of a directory, whose files count, and of a base that is trained first."""
    return "" if Path(model).expanduser().is_dir() or model.endswith("/run/model") else model


def _data_of(config: StudyConfig, table: VariantTable) -> Path:
    """The demonstrations of a variant before they are perturbed."""
    return places_of(config).of_variant(table.label) if table.train else places_of(config).demonstrations
