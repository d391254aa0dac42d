"""The config of a study: every key, its type, its range and its default. Checked as strictly as that of a run, before anything runs.

Files that a study names are looked for from the current directory, and where they are not found there, from the parent of the directory
that the study file lies in: `studies/smoke.toml` finds `configs/tiny.toml` from anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w
from pydantic import ConfigDict, Field, field_validator, model_validator

from structcot.config import Section, nearest
from structcot.config_file import checked, lay_over, read_values
from structcot.errors import ConfigError
from structcot.fetch import HUB_ID, SMOLLM2
from structcot.perturb.spec import Spec, make_spec, parse_spec

NAME = r"^[\w.-]+$"
BASE = "base"
# Settings of `structcot perturb` that belong to its run and not to a perturbation.
OF_THE_RUN = ("field", "jobs", "then")
POOL = "pool"
"""The setting of wrong-answer that names a file."""
Seed = int


class StudyData(Section):
    """`[data]`: the demonstrations, of which the first `limit` are used (0: all).

    Of these the last `held_out` are never trained on and give the held-out losses. The last `problems` of the rest are not trained on
    either: their questions and reference answers are the task "problems".
    """

    train: str = Field(min_length=1)
    limit: int = Field(default=0, ge=0)
    held_out: int = Field(default=0, ge=0)
    problems: int = Field(default=0, ge=0)

    @field_validator("train", mode="before")
    @classmethod
    def _one_file(cls, value: Any) -> Any:
        return value[0] if isinstance(value, list) and len(value) == 1 else value


class Part(Section):
    """`[eval]`, and of `[train]` a part: a config file, or none, and overrides that beat it. What the study sets beats both."""

    config: str = ""
    overrides: list[str] = Field(default=[])


class Training(Part):
    """`[train]`: one training is `processes` ranks on this machine, started by torchrun where there are several. The result is the same."""

    processes: int = Field(default=1, ge=1)


class StudyBase(Training):
    """`[base]`: how the model that every cell starts from is trained first, and on what."""

    train: str = Field(min_length=1)


class VariantTable(Section):
    """One of `[[variants]]`: a perturbation at some fractions, another file of demonstrations, or the demonstrations as they are."""

    name: str = Field(default="", pattern=r"^[\w.-]*$")
    kind: str = ""
    fractions: list[float] = Field(default=[1.0], min_length=1)
    mode: Literal["clean", "paper"] = "clean"
    settings: list[str] = Field(default=[])
    train: str = ""
    seeds: list[Seed] = Field(default=[])

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if not (self.name or self.kind):
            raise ValueError("name: is missing; give the variant a name, or a kind of perturbation")
        if not self.kind and (given := self.model_fields_set & {"fractions", "mode", "settings"}):
            raise ValueError(f"{min(given)}: belongs to a perturbation; name one by kind, or leave it out")
        if len(set(self.fractions)) < len(self.fractions):
            raise ValueError("fractions: one is there twice; give each once")
        return self

    @property
    def label(self) -> str:
        """The name of the variant, without its fraction."""
        return self.name or self.kind

    @property
    def names(self) -> dict[str, float]:
        """The fraction of each variant that this table stands for, by name: 0 for demonstrations that are not perturbed."""
        return {f"{self.label}-{100 * fraction:g}": fraction for fraction in self.fractions} if self.kind else {self.label: 0.0}


class SettingTable(Section):
    """One of `[[settings]]`: a way to train, by overrides of the training config or by another model."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    name: str = Field(min_length=1, pattern=NAME)
    overrides: list[str] = Field(default=[])
    model_name_or_path: str = ""


class StudyConfig(Section):
    """A whole study."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    title: str = Field(min_length=1)
    model_name_or_path: str = ""
    output_dir: str = Field(default="runs/study", min_length=1)
    seeds: list[Seed] = Field(default=[0], min_length=1)
    reference: str = "clean"
    budget: Literal["samples", "tokens"] = "samples"
    data: StudyData
    base: StudyBase | None = None
    train: Training = Training()
    eval: Part = Part()
    variants: list[VariantTable] = Field(min_length=1)
    settings: list[SettingTable] = Field(default=[])

    @field_validator("output_dir")
    @classmethod
    def _home_is_a_place(cls, value: str) -> str:
        return os.path.expanduser(value)

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        names = [name for variant in self.variants for name in variant.names]
        plain = [variant.label for variant in self.variants if not variant.kind]
        if twice := _twice(names):
            raise ValueError(f'variants: two are called "{twice}"; give each a name of its own')
        if BASE in names:
            raise ValueError(f'variants: "{BASE}" is the model before training, which every study has; take another name')
        if self.reference not in names:
            raise ValueError(f'reference: got "{self.reference}", which is no variant{nearest(self.reference, names)}')
        if self.reference not in plain:
            raise ValueError(f'reference: "{self.reference}" is a perturbation; all are compared with demonstrations as they are')
        if twice := _twice([setting.name for setting in self.settings]):
            raise ValueError(f'settings: two are called "{twice}"; give each a name of its own')
        for key, seeds in [("seeds", self.seeds), *((f"variants.{one.label}.seeds", one.seeds) for one in self.variants)]:
            if (twice := _twice(seeds)) is not None:
                raise ValueError(f"{key}: {twice} is there twice; give each once")
            if not all(0 <= seed < 2**32 for seed in seeds):
                raise ValueError(f"{key}: got {seeds}; use numbers from 0 to {2**32 - 1}")
        if not self.model_name_or_path and not (self.settings and all(setting.model_name_or_path for setting in self.settings)):
            raise ValueError("model_name_or_path: is missing; set it in the file or as model_name_or_path=... on the command line")
        return self

    def to_toml(self) -> str:
        """The whole config with every default written out; loads back to an equal config."""
        values = self.model_dump(mode="json", exclude_none=True)
        for variant in values["variants"]:
            if not variant["kind"]:
                variant |= dict.fromkeys(("fractions", "mode", "settings"))
        values["variants"] = [{key: value for key, value in one.items() if value is not None} for one in values["variants"]]
        return tomli_w.dumps(values)


def read_study(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read the config of a study, lay `key=value` overrides over it and check it.

    Raises:
        ConfigError: naming the file, the dotted key, what was found and what is allowed.
    """
    values = {"title": path.stem, "data": {}, **lay_over(read_values(path), overrides)}
    for key, table in (("variants", VariantTable), ("settings", SettingTable)):
        entries = values.get(key)
        for number, entry in enumerate(entries if isinstance(entries, list) else ()):
            _need_known_keys(entry, table, f"{path}: {key}.{number}")
    config = checked(StudyConfig, values, origin=str(path))
    _need_model(config.model_name_or_path, f"{path}: model_name_or_path")
    for setting in config.settings:
        _need_model(setting.model_name_or_path, f"{path}: settings.{setting.name}.model_name_or_path")
    for table in config.variants:
        for name, fraction in table.names.items() if table.kind else ():
            try:
                specs_of(table, fraction)
            except ConfigError as error:
                raise ConfigError(f"{path}: variants.{name}: {error}") from error
    return _with_found_files(config, path)


def specs_of(variant: VariantTable, fraction: float) -> tuple[Spec, ...]:
    """The perturbations of a variant, in the order in which `structcot perturb` makes them.

    Raises:
        ConfigError: naming the setting that is wrong.
    """
    own = [setting for setting in variant.settings if setting.partition("=")[0].strip() not in OF_THE_RUN]
    more = [setting.partition("=")[2].strip() for setting in variant.settings if setting.partition("=")[0].strip() == "then"]
    return (make_spec(variant.kind, fraction, variant.mode, own), *(parse_spec(text, variant.mode) for text in more))


def _need_model(name: str, where: str) -> None:
    if name and name != SMOLLM2 and not HUB_ID.fullmatch(name) and not Path(name).expanduser().is_dir():
        raise ConfigError(f'{where}: "{name}" is no directory and no hub id; give a directory, owner/name, or {SMOLLM2}')


def _need_known_keys(entry: Any, table: type[Section], where: str) -> None:
    for key in entry if isinstance(entry, dict) else ():
        if key not in table.model_fields:
            raise ConfigError(f"{where}: unknown key {key}{nearest(key, list(table.model_fields))}; valid: {' '.join(table.model_fields)}")


def _with_found_files(config: StudyConfig, path: Path) -> StudyConfig:
    """The config with the paths at which its files are."""

    def resolved(part: Mapping[str, Any], prefix: str, keys: Sequence[str]) -> dict[str, Any]:
        named = [key for key in keys if part.get(key)]
        return {**part, **{key: _found(part[key], f"{path}: {prefix}.{key}", path.resolve().parent.parent) for key in named}}

    values = config.model_dump(exclude_unset=True)
    for name, keys in (("data", ("train",)), ("base", ("train", "config")), ("train", ("config",)), ("eval", ("config",))):
        if values.get(name):
            values[name] = resolved(values[name], name, keys)
    values["variants"] = [resolved(one, f"variants.{number}", ("train",)) for number, one in enumerate(values["variants"])]
    for number, variant in enumerate(values["variants"]):
        for place, setting in enumerate(variant.get("settings", ())):
            key, _, file = (part.strip() for part in setting.partition("="))
            if key == POOL:
                variant["settings"][place] = f"{POOL}={_found(file, f'{path}: variants.{number}.{POOL}', path.resolve().parent.parent)}"
    return checked(StudyConfig, values, origin=str(path))


def _found(name: str, where: str, beside: Path) -> str:
    for place in (Path(name).expanduser(), beside / name):
        if place.is_file():
            return str(place)
    raise ConfigError(f'{where}: "{name}" is no file, neither from here nor from {beside}; give the path of one')


def _twice(values: Sequence[Any]) -> Any:
    """The first value that is there a second time, else None."""
    return next((value for number, value in enumerate(values) if value in values[:number]), None)
