"""The config of a study: what it may hold, what it says of what it may not, and the cells that it stands for."""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from structcot.errors import ConfigError
from structcot.study.cells import Cell, Stage, content_hash, stage_keys
from structcot.study.config import StudyConfig, read_study
from structcot.study.grid import make_grid
from tests.study_site import StudySite, make_study_site
from tests.tiny_run import DONE, ROOT, WRONG, Site

VARIANTS = 'variants=[{name="clean"},{kind="digits"}]'
SETTINGS = 'settings=[{name="small",overrides=["tuning.lora_r=4"]},{name="large",overrides=["tuning.lora_r=8"]}]'


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudySite:
    monkeypatch.chdir(tmp_path)
    return make_study_site(tmp_path / "site")


def read(study: StudySite, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> StudyConfig:
    monkeypatch.chdir(study.directory)
    return read_study(Path("study.toml"), overrides)


def cells_of(study: StudySite, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> dict[str, Cell]:
    return {cell.name: cell for cell in make_grid(read(study, monkeypatch, *overrides))}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budgte=1"], r"study.toml: unknown key budgte; did you mean budget\?"),
        (['variants=[{name="clean",fracton=[0.5]}]'], r"study.toml: variants.0: unknown key fracton \(did you mean fractions\?\)"),
        (['settings=[{name="a",overides=[]}]'], r"study.toml: settings.0: unknown key overides \(did you mean overrides\?\)"),
        (['reference="claen"'], r'study.toml: reference: got "claen", which is no variant \(did you mean clean\?\)'),
        (['reference="digits-50"'], r'reference: "digits-50" is a perturbation; all are compared with demonstrations as they are'),
        (['variants=[{name="clean"},{name="clean"}]'], r'variants: two are called "clean"'),
        (['variants=[{name="clean"},{kind="digits"},{kind="digits",mode="paper"}]'], r'variants: two are called "digits-100"'),
        (['variants=[{name="clean"},{name="base"}]'], r'variants: "base" is the model before training'),
        (["variants=[]"], r"variants: got \[\]"),
        (['variants=[{train="demos.jsonl"}]'], r"variants.0: .*name: is missing; give the variant a name"),
        (['variants=[{name="clean",fractions=[0.5]}]'], r"variants.0: .*fractions: belongs to a perturbation"),
        (['variants=[{name="clean"},{kind="digits",fractions=[0.5,0.5]}]'], r"variants.1: .*fractions: one is there twice"),
        (['variants=[{name="clean"},{kind="digits",fractions=[1.5]}]'], r"variants.digits-150: --fraction: got 1.5"),
        (['variants=[{name="clean"},{kind="digit"}]'], r'variants.digit-100: --kind: got "digit" \(did you mean "digits"\?\)'),
        (
            ['variants=[{name="clean"},{kind="digits",settings=["scop=both"]}]'],
            r'variants.digits-100: "scop": digits takes no such setting',
        ),
        (['variants=[{name="clean"},{kind="digits",settings=["then=shufle:0.5"]}]'], r'variants.digits-100: --kind: got "shufle"'),
        (['variants=[{name="clean",seeds=[1,1]}]'], r"variants.clean.seeds: 1 is there twice"),
        (["seeds=[0,1,0]"], r"study.toml: seeds: 0 is there twice"),
        (["seeds=[-1]"], r"seeds: got \[-1\]; use numbers from 0"),
        (["seeds=[]"], r"seeds: got \[\]"),
        (['settings=[{name="a"},{name="a"}]'], r'settings: two are called "a"'),
        (['model_name_or_path=""'], r"model_name_or_path: is missing"),
        (['model_name_or_path="none"'], r'model_name_or_path: "none" is no directory and no hub id'),
        (['settings=[{name="a",model_name_or_path="none"}]'], r'settings.a.model_name_or_path: "none" is no directory'),
        (['data.train="none.jsonl"'], r'data.train: "none.jsonl" is no file, neither from here nor from '),
        (['data.train=["a.jsonl","b.jsonl"]'], r"data.train: got \[.*valid string"),
        (['variants=[{name="clean"},{name="b",train="none.jsonl"}]'], r'variants.1.train: "none.jsonl" is no file'),
        (['variants=[{name="clean"},{kind="wrong-answer",settings=["pool=none.jsonl"]}]'], r'variants.1.pool: "none.jsonl" is no file'),
        (['train.config="none.toml"'], r'train.config: "none.toml" is no file'),
        (['base={train="demos.jsonl",confg="none.toml"}'], r"unknown key base.confg; did you mean base.config\?"),
        (['base={train="none.jsonl"}'], r'base.train: "none.jsonl" is no file'),
        (['train.overrides=["train.max_step=4"]'], r"train: train.toml: unknown key train.max_step; did you mean train.max_steps\?"),
        (['train.overrides=["train.learning_rate=-1"]'], r"train: train.toml: train.learning_rate: got -1; allowed is > 0"),
        (['train.overrides=["seed=1"]'], r"train: seed is set by the study; leave it out"),
        (['train.overrides=["data.eval_fraction=0.1"]'], r"train: data.eval_fraction is set by the study"),
        (
            ['settings=[{name="a",overrides=["tuning.lora_rank=4"]}]'],
            r"settings.a: train.toml: unknown key tuning.lora_rank; here it is called",
        ),
        (['base={train="demos.jsonl",overrides=["train.max_steps=0"]}'], r"base: .*train.max_steps: got 0"),
        (['eval.overrides=["sampling.max_tokens=4"]'], r"eval: overrides: unknown key sampling.max_tokens"),
        (['eval.overrides=["adapter=x"]'], r"eval: adapter is set by the study"),
        (['eval.overrides=["tasks=math50"]'], r'eval: tasks: "math50" is no benchmark \(did you mean math500\?\)'),
        (["data.problems=0"], r"eval: tasks: are missing; name some by overrides"),
        (['eval.overrides=["engine=openai","server.url=http://x","server.model=m"]'], r"eval: engine: a study serves no models"),
        (['train.overrides=["train.batch_tokens=100"]'], r"train: train.batch_tokens: gives longer demonstrations more steps"),
        (['budget="tokens"'], r'train: train.max_steps: budget = "tokens" scales the epochs'),
        (
            ['variants=[{name="clean"},{name="b-clean"}]', 'settings=[{name="a-b"},{name="a"}]'],
            r'settings: two cells would be called "a-b-clean-s0"',
        ),
    ],
)
def test_a_mistake_is_named_before_anything_runs(
    overrides: list[str], message: str, study: StudySite, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=message):
        cells_of(study, monkeypatch, *overrides)
    assert not (study.directory / "out").exists()


def test_the_command_ends_a_mistake_with_status_2(study: StudySite, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(study.directory)
    outcome = site.run("study", "study.toml", "budgte=1")
    assert outcome.status == WRONG
    assert outcome.message.startswith("study.toml: unknown key budgte")
    assert site.run("study", "study.toml", "--cell", "none").status == WRONG
    for option in ("--slurm", "--json"):
        refused = site.run("study", "study.toml", "--dry-run", option, "none/file")
        assert (refused.status, refused.message.split(":")[0]) == (WRONG, option)
    assert site.run("study", "study.toml", "--dry-run").status == DONE


def test_the_resolved_config_loads_back_to_an_equal_one(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ('base={train="demos.jsonl"}', VARIANTS, SETTINGS, 'data.train=["demos.jsonl"]')
    config = read(study, monkeypatch, *overrides)
    assert config.title == "study"
    Path("resolved.toml").write_text(config.to_toml())
    again = read_study(Path("resolved.toml"))
    assert again == config
    assert again.to_toml() == config.to_toml()


def test_files_are_found_from_here_or_beside_the_directory_of_studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_study_site(tmp_path / "project")
    (tmp_path / "project" / "studies").mkdir()
    (site.directory / "study.toml").rename(site.directory / "studies" / "study.toml")
    monkeypatch.chdir(tmp_path)
    overrides = (f"model_name_or_path={site.directory / 'model'}",)
    config = read_study(Path("project/studies/study.toml"), overrides)
    assert config.train.config == str(site.directory / "train.toml")
    assert config.data.train == str(site.directory / "demos.jsonl")
    Path("train.toml").write_text("")
    assert read_study(Path("project/studies/study.toml"), overrides).train.config == "train.toml"


def test_the_smoke_study_needs_three_keys_alone(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(study.directory)
    needed = ("model_name_or_path=model", "data.train=demos.jsonl", "output_dir=out")
    cells = make_grid(read_study(ROOT / "studies" / "smoke.toml", needed))
    assert [cell.name for cell in cells] == ["base", "clean-s0", "shuffle-100-s0"]
    with pytest.raises(ConfigError, match="model_name_or_path: is missing"):
        read_study(ROOT / "studies" / "smoke.toml", needed[1:])


def test_a_cell_knows_what_it_is(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = 'variants=[{kind="digits",name="noise",fractions=[0.125],seeds=[7]},{name="clean"}]'
    cells = cells_of(study, monkeypatch, variants, SETTINGS, "seeds=[0,1]")
    assert list(cells) == [
        "base",
        *("small-clean-s0", "large-clean-s0", "small-noise-12.5-s7", "large-noise-12.5-s7"),
        *("small-clean-s1", "large-clean-s1"),
    ]
    cell = cells["large-noise-12.5-s7"]
    assert (cell.variant, cell.kind, cell.fraction, cell.setting, cell.seed) == ("noise-12.5", "digits", 0.125, "large", 7)
    assert cell.directory == Path("out/cells/large-noise-12.5-s7")
    assert "--seed 7" in cell.commands[0]
    assert (cells["base"].setting, cells["base"].seed, cells["base"].commands) == ("", 0, ("structcot eval out/cells/base/eval.toml",))
    assert (cells["small-clean-s1"].kind, cells["small-clean-s1"].fraction) == ("", 0.0)


def test_held_out_demonstrations_are_perturbed_like_the_others_but_for_wrong_answers_without_a_pool(
    study: StudySite, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = '{kind="wrong-answer"},{kind="wrong-answer",name="pooled",settings=["pool=demos.jsonl"]}'
    cells = cells_of(study, monkeypatch, f'variants=[{{name="clean"}},{{kind="insert",mode="paper",settings=["level=sentence"]}},{wrong}]')
    stages = {cell.variant: [stage.name for stage in cell.stages] for cell in cells.values()}
    assert stages["insert-100"] == stages["pooled-100"] == ["data", "held_out", "train", "eval"]
    assert stages["wrong-answer-100"] == ["data", "train", "eval"]
    data, held_out = cells["insert-100-s0"].commands[:2]
    assert held_out == data.replace("demonstrations.jsonl", "held_out.jsonl").replace("data.jsonl", "held_out.jsonl")
    assert "level=sentence --kind insert --fraction 1 --seed 0 --mode paper" in data


def test_a_config_of_a_whole_run_serves_as_training_config(study: StudySite, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(study.directory / "whole.toml").write_text(
        'model_name_or_path = "a/b"\noutput_dir = "elsewhere"\nseed = 9\n[data]\ntrain = ["x.jsonl"]\neval_fraction = 0.5\n'
    )
    cell = cells_of(study, monkeypatch, 'train.config="whole.toml"')["clean-s0"]
    config = next(stage.config for stage in cell.stages if stage.name == "train")
    values = tomllib.loads(config.to_toml() if config else "")
    assert (values["model_name_or_path"], values["output_dir"], values["seed"]) == ("model", "out/cells/clean-s0/run", 0)
    assert values["data"]["eval_fraction"] == 0.0


@given(
    chains=st.lists(
        st.lists(st.tuples(st.sampled_from(("data", "train", "eval")), st.integers(0, 2)), min_size=1, max_size=3), min_size=1, max_size=4
    )
)
def test_keys_are_equal_where_all_that_decides_up_to_a_stage_is(chains: list[list[tuple[str, int]]]) -> None:
    cells = [
        Cell(
            name=str(number),
            variant="v",
            kind="",
            fraction=0.0,
            setting="",
            seed=0,
            directory=Path("none"),
            stages=tuple(
                Stage(name=f"{name}{place}", arguments=(str(number),), results=(), outputs=(), facts={"fact": fact})
                for place, (name, fact) in enumerate(chain)
            ),
        )
        for number, chain in enumerate(chains)
    ]
    keys = stage_keys(cells)
    prefixes = {tuple(chain[: end + 1]) for chain in chains for end in range(len(chain))}
    assert len({key for of_cell in keys.values() for key in of_cell.values()}) == len(prefixes)


def test_a_large_file_is_hashed_by_spots_that_see_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("structcot.study.cells.MAX_WHOLE_BYTES", 1000)
    path, hashes = tmp_path / "weights", Counter[str]()
    for content in (b"a" * 5000, b"a" * 5001, b"b" * 5000, b"a" * 5000):
        path.write_bytes(content)
        hashes[content_hash(path)] += 1
    assert sorted(hashes.values()) == [1, 1, 2]
