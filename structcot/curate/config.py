"""The config of a curation: every key, its type, its range and its default. Checked as strictly as that of a run, before anything runs.

No key holds a secret: what a server wants is read from the environment variable that the config names, when it is asked.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import tomli_w
from pydantic import Field, field_validator, model_validator

from structcot.config import Section
from structcot.config_file import checked, lay_over, read_values
from structcot.errors import ConfigError

NAME = r"^[\w.-]+$"
Range = tuple[float, float]


class SourceConfig(Section):
    """One of `[[sources]]`: problems with what is needed to check an answer, from a file or a data set of the hub.

    `question` and `answer` name the fields where they are none of the known. `where` keeps the rows whose fields have one of the values
    listed, `difficulty` the problems that the label, in the field `difficulty_field` or by `[difficulty]`, puts between two numbers, both
    included.
    """

    name: str = Field(min_length=1, pattern=NAME)
    path: str = Field(min_length=1)
    split: str = "train"
    question: str = ""
    answer: str = ""
    where: dict[str, list[str | int | bool]] = Field(default={})
    difficulty: list[float] = Field(default=[], max_length=2)
    difficulty_field: str = ""
    limit: int = Field(default=0, ge=0)
    prompt: str = ""

    @model_validator(mode="after")
    def _range_is_one(self) -> Self:
        if self.difficulty and (len(self.difficulty) != 2 or self.difficulty[0] > self.difficulty[1]):
            raise ValueError(f"difficulty: got {self.difficulty}; give the least and the greatest, as in [4, 9]")
        if self.prompt and "{question}" not in self.prompt:
            raise ValueError("prompt: has no {question}, where the question is put")
        return self


class ServerConfig(Section):
    """A model behind a server that answers as the OpenAI API does, how it is asked, and what it may cost.

    `key` names the environment variable that holds the key. A minute sees at most `requests_per_minute` requests, an hour of ours at most
    what `concurrency` allows; 0 is without a limit. Prices are in dollars for a million tokens; with `max_dollars` asking ends before more
    is spent, and the same command goes on once the limit is raised.
    """

    url: str = Field(min_length=1)
    model: str = Field(min_length=1)
    key: str = "OPENAI_API_KEY"
    concurrency: int = Field(default=16, ge=1, le=4096)
    timeout_seconds: float = Field(default=3600.0, gt=0.0)
    max_retries: int = Field(default=8, ge=0)
    requests_per_minute: int = Field(default=0, ge=0)
    prompt_dollars: float = Field(default=0.0, ge=0.0)
    completion_dollars: float = Field(default=0.0, ge=0.0)
    max_dollars: float = Field(default=0.0, ge=0.0)
    max_tokens: int = Field(default=16384, ge=1)
    temperature: float = Field(default=0.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _limit_has_a_price(self) -> Self:
        if self.max_dollars and not (self.prompt_dollars or self.completion_dollars):
            raise ValueError("max_dollars: needs prompt_dollars and completion_dollars, the prices of a million tokens")
        return self


class TeacherConfig(ServerConfig):
    """`[teacher]`: the model whose chains of thought are taken, `samples` for each problem, under a system message or the server's own."""

    samples: int = Field(default=1, ge=1, le=1000)
    system_prompt: str = ""


class DuplicatesConfig(Section):
    """`[duplicates]`: problems that are the same but for some words fall, all but the first.

    Two problems that share s of their runs of `words` words (Jaccard) are found with the probability 1 - (1 - s^hashes)^buckets: by the
    defaults 0.62 at s = 0.5, and 0.98 at 0.66. With `same_numbers` they must have the same numbers, too. With 0 buckets none are sought.
    """

    words: int = Field(default=3, ge=1, le=20)
    buckets: int = Field(default=30, ge=0, le=500)
    hashes: int = Field(default=5, ge=1, le=50)
    same_numbers: bool = True


class ContaminationConfig(Section):
    """`[contamination]`: problems of these benchmarks fall, by name or as files, wherever they stand in a text; of none with an empty list.

    A text holds a problem if it has `share` of its runs of `words` words, or all of it word by word where it is shorter.
    """

    benchmarks: list[str] = Field(default=["aime24", "amc23", "math500", "olympiadbench", "gsm8k", "livecodebench"])
    data_dir: str = ""
    words: int = Field(default=8, ge=2, le=50)
    share: float = Field(default=0.5, gt=0.0, le=1.0)


class CheckConfig(Section):
    """`[check]`: an answer counts where all of `graders` call it right; code where it passes its tests, in a sandbox."""

    graders: list[Literal["math", "exact", "paper"]] = Field(default=["math", "paper"], min_length=1)
    limit_seconds: float = Field(default=10.0, gt=0.0)
    sandbox: Literal["auto", "bubblewrap", "landlock", "none"] = "auto"
    timeout_seconds: float = Field(default=6.0, gt=0.0)
    memory_gib: float = Field(default=4.0, gt=0.0)


class ReformatConfig(Section):
    """`[reformat]`: how an answer comes into the tags of thought and solution.

    By rule, where it has `<think>`. Without tags, by the model of `server`, whose text is taken only if it keeps `kept_words` of the words,
    in their order; without a server `untagged` says whether the last paragraph counts as the solution of what stands before it.
    """

    kept_words: float = Field(default=0.9, gt=0.0, le=1.0)
    untagged: Literal["reject", "last-paragraph"] = "reject"
    server: ServerConfig | None = None

    @model_validator(mode="after")
    def _untagged_by_one_way(self) -> Self:
        if self.server is not None and self.untagged != "reject":
            raise ValueError(f'untagged: "{self.untagged}" and a server that copies exclude each other; leave one out')
        return self


class SelectConfig(Section):
    """`[select]`: how many right answers of each problem are kept, and which: the shortest, or those that step back and check most."""

    per_problem: int = Field(default=1, ge=1)
    prefer: Literal["shortest", "most-structured"] = "shortest"
    max_tokens: int = Field(default=0, ge=0)


class MixConfig(Section):
    """`[mix]`: how many demonstrations there are in the end (0: all), and the shares of sources and of difficulties.

    Shares are relative; what a source lacks of its share is not made up for by others. `difficulty` has as keys lower bounds: {1 = 1.0,
    5 = 2.0} takes twice as many from 5 on as below.
    """

    total: int = Field(default=0, ge=0)
    sources: dict[str, float] = Field(default={})
    difficulty: dict[str, float] = Field(default={})

    @field_validator("difficulty", "sources")
    @classmethod
    def _shares_are_positive(cls, value: dict[str, float]) -> dict[str, float]:
        if any(share < 0 for share in value.values()) or (value and not any(value.values())):
            raise ValueError(f"got {value}; give shares from 0 on, one of them above 0")
        return value


class OutputConfig(Section):
    """`[output]`: the demonstrations as files, `shard_records` in each. "sky-t1" is the system message of the paper's data, "" is none."""

    system_prompt: str = "sky-t1"
    shard_records: int = Field(default=10_000, ge=1)


class ScaleConfig(Section):
    """`[scale]`: where near duplicates are sought: processes here, a SLURM cluster, or Ray. `slurm` is what datatrove's executor takes."""

    executor: Literal["local", "slurm", "ray"] = "local"
    tasks: int = Field(default=0, ge=0)
    workers: int = Field(default=0, ge=0)
    slurm: dict[str, str | int | bool] = Field(default={})


class CurateConfig(Section):
    """A whole curation."""

    title: str = Field(min_length=1)
    output_dir: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    sources: list[SourceConfig] = Field(min_length=1)
    duplicates: DuplicatesConfig = DuplicatesConfig()
    contamination: ContaminationConfig = ContaminationConfig()
    difficulty: ServerConfig | None = None
    teacher: TeacherConfig
    check: CheckConfig = CheckConfig()
    reformat: ReformatConfig = ReformatConfig()
    select: SelectConfig = SelectConfig()
    mix: MixConfig = MixConfig()
    output: OutputConfig = OutputConfig()
    scale: ScaleConfig = ScaleConfig()

    @field_validator("output_dir")
    @classmethod
    def _home_is_a_place(cls, value: str) -> str:
        return os.path.expanduser(value)

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources: {', '.join(names)}: two have the same name; give each its own")
        if unknown := set(self.mix.sources) - set(names):
            raise ValueError(f"mix.sources: {min(unknown)} is no source; there are {', '.join(names)}")
        if self.difficulty is None and (asked := [one.name for one in self.sources if one.difficulty and not one.difficulty_field]):
            raise ValueError(f"sources.{asked[0]}.difficulty: needs difficulty_field, or a model that labels, in [difficulty]")
        return self

    def to_toml(self, *leave_out: str) -> str:
        """The whole config with every default written out, but for the keys named; all of it loads back to an equal config."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True, exclude=set(leave_out)))


def read_curate(path: Path, overrides: Sequence[str] = ()) -> CurateConfig:
    """Read the config of a curation, lay `key=value` overrides over it and check it.

    Raises:
        ConfigError: naming the file, the dotted key, what was found and what is allowed.
    """
    values = {"title": path.stem, **lay_over(read_values(path), overrides)}
    config = checked(CurateConfig, values, origin=str(path))
    if config.check.graders and len(set(config.check.graders)) < len(config.check.graders):
        raise ConfigError(f"{path}: check.graders: {', '.join(config.check.graders)}: one is there twice")
    return config
