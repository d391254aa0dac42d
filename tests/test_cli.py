"""The command line: what answers at once, what each exit status means, and that a module is started like its command."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from structcot import __version__, cli
from tests.tiny_run import DONE, FAILED, TINY_CONFIG, WRONG, Site, files_of, read_jsonl

CALLBACKS = {command.name or command.callback.__name__: command.callback for command in cli.app.registered_commands if command.callback}
COMMANDS = sorted(CALLBACKS)
HEAVY = ("torch", "transformers", "peft", "datasets", "numpy", "safetensors", "huggingface_hub", "matplotlib")

SHOW_HELP = f"""
import contextlib, io, sys, time
from structcot import cli
for arguments in [["--help"], ["--version"], *([command, "--help"] for command in {COMMANDS!r})]:
    sys.argv = ["structcot", *arguments]
    out = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out):
        cli.main()
    assert out.getvalue(), arguments
print(time.process_time(), *(name for name in {HEAVY!r} if name in sys.modules))
"""


def test_help_of_every_command_answers_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", SHOW_HELP], capture_output=True, text=True, check=True)
    seconds, *imported = done.stdout.split()
    assert imported == []
    assert float(seconds) < 1.0 + 0.1 * len(COMMANDS)  # of processor time, so that a busy machine does not count


def test_commands_of_the_training_spine_are_there() -> None:
    assert {"fetch", "prepare", "train", "export"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_is_for(command: str, site: Site) -> None:
    outcome = site.run(command, "--help")
    assert outcome.status == DONE
    assert f"Usage: structcot {command} " in outcome.out
    assert CALLBACKS[command].__doc__.split(".")[0].split()[:5] == outcome.out.split("\n\n")[1].split()[:5]
    listed = site.run("--help").out
    assert f"\n  {command} " in listed


@pytest.mark.parametrize("command", COMMANDS)
def test_module_is_started_like_its_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], site: Site
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{command}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"structcot.{command}", run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().out == site.run(command, "--help").out


def test_version_is_that_of_the_package(site: Site) -> None:
    outcome = site.run("--version")
    assert (outcome.status, outcome.out) == (DONE, f"{__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Usage: structcot"),
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument 'CONFIG'"),
        (["train", "--fast", "x.toml"], "No such option: --fast"),
        (["export"], "Missing argument 'RUN'"),
        (["export", "run", "--merge=yes"], "merge"),
        (["fetch", "countdown", "--num-records", "none"], "Invalid value for '--num-records'"),
        (["fetch", "countdown", "--num-records", "0"], "Invalid value for '--num-records'"),
    ],
)
def test_wrong_usage_ends_with_status_2(arguments: list[str], words: str, site: Site) -> None:
    outcome = site.run(*arguments)
    assert outcome.status == WRONG
    assert words in outcome.out + outcome.err
    assert "Traceback" not in outcome.err


def test_users_mistake_ends_in_one_message_on_standard_error(site: Site, tmp_path: Path) -> None:
    outcome = site.run("train", str(tmp_path / "none.toml"))
    assert outcome.status == WRONG
    assert outcome.out == ""
    assert outcome.err.startswith("structcot: ")
    assert outcome.err.count("\n") == 1


def test_failure_to_write_ends_with_status_1(site: Site, tmp_path: Path) -> None:
    arguments = ["prepare", str(TINY_CONFIG), *site.overrides(tmp_path / "run")]
    outcome = site.run(*arguments, "--json", "/dev/full")
    assert (outcome.status, "No space left" in outcome.message) == (FAILED, True)


def test_a_file_of_facts_without_a_directory_is_refused_before_anything_runs(site: Site, tmp_path: Path) -> None:
    outcome = site.run("prepare", str(TINY_CONFIG), *site.overrides(tmp_path / "run"), "--json", str(tmp_path / "none" / "facts.json"))
    assert outcome.status == WRONG
    assert f"--json: {tmp_path / 'none'} is no directory" in outcome.message
    assert not (tmp_path / "run").exists()


def test_prepare_writes_data_and_trains_nothing(site: Site, finished_run: Path, tmp_path: Path) -> None:
    arguments = [str(TINY_CONFIG), *site.overrides(tmp_path / "run"), "--json", str(tmp_path / "facts.json")]
    outcome = site.run("prepare", *arguments)
    assert outcome.status == DONE, outcome.err
    files = files_of(tmp_path / "run")
    assert set(files) == {".lock", "config.toml", "data/plan.json", "data/proof.json", "data/rejected.jsonl"}
    for name in ("plan.json", "proof.json", "rejected.jsonl"):
        assert files[f"data/{name}"] == (finished_run / "data" / name).read_bytes()
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts == json.loads(files["data/plan.json"])
    shown = dict(line.split() for line in outcome.out.splitlines())
    assert {name: shown[name] for name in ("samples", "tokens", "steps", "hash")} == {
        name: str(facts[name]) for name in ("samples", "tokens", "steps", "hash")
    }


def test_train_goes_on_where_prepare_has_been(site: Site, finished_run: Path, tmp_path: Path) -> None:
    arguments = [str(TINY_CONFIG), *site.overrides(tmp_path / "run")]
    assert site.run("prepare", *arguments).status == DONE
    before = files_of(tmp_path / "run" / "data")
    assert site.run("train", *arguments).status == DONE
    assert files_of(tmp_path / "run" / "data") == before


def test_fetch_says_in_json_what_it_has_put_where(site: Site, tmp_path: Path) -> None:
    arguments = ["countdown", "--to", str(tmp_path / "data"), "--num-records", "3", "--json", str(tmp_path / "facts.json")]
    outcome = site.run("fetch", *arguments)
    assert outcome.status == DONE, outcome.err
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts == {"name": "countdown", "path": outcome.out.strip()}
    assert len(read_jsonl(Path(facts["path"]))) == 3
