"""The sample store: what it holds, what its key depends on, and that no interruption leaves anything behind."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from structcot.config import DataConfig, DataSource
from structcot.data import store as store_module
from structcot.data.records import read_records
from structcot.data.render import IGNORE, render_records
from structcot.data.store import SampleStore, build_store, default_cache_dir, open_store
from structcot.errors import ConfigError, DataError, Interrupted
from tests.chat_tokenizers import CHATML_DEFAULT_SYSTEM, data_config, tiny_tokenizer

TINY = tiny_tokenizer()


def write_data(path: Path, count: int = 20, start: int = 0) -> Path:
    rows = [
        {"prompt": f"Question {number}?", "completion": f"<think>{'hm ' * (number % 7)}</think>{number}"}
        for number in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Workplace:
    """A model directory, a data file and a cache."""

    def __init__(self, root: Path) -> None:
        self.data, self.model, self.cache = write_data(root / "a.jsonl"), root / "model", root / "cache"
        TINY.save_pretrained(self.model)

    def build(self, *sources: DataSource, config: DataConfig | None = None, tokenizer=TINY, should_stop=lambda: False) -> SampleStore:
        sources = sources or (DataSource(path=str(self.data)),)
        return build_store(sources, config or data_config(), tokenizer, self.model, self.cache, should_stop)

    def left_in_cache(self) -> list[str]:
        return sorted(path.name for path in self.cache.iterdir() if path.name != "lock") if self.cache.exists() else []


@pytest.fixture
def place(tmp_path) -> Workplace:
    return Workplace(tmp_path)


def test_holds_what_was_rendered(place, tmp_path):
    other = DataSource(path=str(write_data(tmp_path / "b.jsonl", count=5, start=100)), name="other", weight=2.0)
    sources = [DataSource(path=str(place.data)), other]
    store = place.build(*sources)
    records = [record for source in sources for record in read_records(source, "auto", "")]
    samples = render_records(records, TINY, data_config())
    assert len(store) == len(samples) == 25
    for index, expected in enumerate(samples):
        found = store.sample(index)
        assert (found.source, found.origin, found.truncated, found.merged_start) == (expected.source, expected.origin, False, False)
        for name in ("tokens_T", "labels_T", "kinds_T"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
            assert getattr(found, name).dtype == getattr(expected, name).dtype
        assert store.supervised_S[index] == np.count_nonzero(expected.labels_T != IGNORE)
        assert store.lengths_S[index] == len(expected.tokens_T)
    assert isinstance(store.tokens_N, np.memmap)
    assert store.origins_S.tolist() == [0] * 20 + [1] * 5
    assert store.origin_names == (str(place.data), "other")
    counts = store.counts
    assert (counts.samples, counts.tokens, counts.supervised_tokens) == (
        25,
        len(store.tokens_N),
        np.count_nonzero(store.labels_N != IGNORE),
    )
    assert (counts.bad, counts.dropped, counts.duplicates, counts.without_system) == (0, 0, 0, 25)
    assert counts.largest_token == store.tokens_N.max()
    assert store.file_sha256[f"{place.data}:train"] == hashlib.sha256(place.data.read_bytes()).hexdigest()
    assert store.sha256["template"] == hashlib.sha256(TINY.chat_template.encode()).hexdigest()


def test_chunks_do_not_show(place, monkeypatch):
    whole = place.build().labels_N.tolist()
    for name, size in (("CHUNK_RECORDS", 3), ("CHUNK_CHARACTERS", 10)):
        monkeypatch.setattr(store_module, name, size)
        shutil.rmtree(place.cache)
        assert place.build().labels_N.tolist() == whole


def test_rejected_counts_and_flags(place):
    rows = [
        {"prompt": "Q", "completion": "A"},
        {"prompt": "Q", "completion": "A"},
        {"prompt": "Q"},
        {"prompt": "Q", "completion": "<|im_end|>"},
        {"prompt": "Q", "completion": "A" * 500},
        {"prompt": "Q", "completion": "\n\nA"},
    ]
    place.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dropped = place.build(config=data_config(max_length=100, overlong="drop"))
    for store in (dropped, open_store(dropped.directory)):
        assert store is not None
        assert [(rejected.source, rejected.dropped) for rejected in store.rejected] == [
            (f"{place.data}:3", False),
            (f"{place.data}:4", False),
            (f"{place.data}:5", True),
        ]
        assert store.rejected[2].tokens is not None
        assert (store.counts.bad, store.counts.dropped, store.counts.duplicates, store.counts.merged_start) == (2, 1, 1, 1)
        assert [store.sample(index).merged_start for index in range(3)] == [False, False, True]
    truncated = place.build(config=data_config(max_length=100, overlong="truncate"))
    assert truncated.counts.truncated == 1
    assert [truncated.sample(index).truncated for index in range(4)] == [False, False, True, False]


def test_nothing_usable_is_still_a_store(place):
    place.data.write_text("{}\n")
    store = place.build()
    assert len(store) == 0
    assert store.rejected[0].source == f"{place.data}:1"
    assert len(place.build().rejected) == 1


def test_second_build_reads_no_record(place, monkeypatch):
    first = place.build()
    monkeypatch.setattr(store_module, "render_records", None)
    second = place.build()
    assert second.key == first.key == first.directory.name
    assert second.sources_S == first.sources_S


def test_key_changes_with_each_ingredient(place, tmp_path, monkeypatch):
    source = DataSource(path=str(place.data))
    keys = {"as it is": place.build(source).key}

    def differs(what: str, *args, **options) -> None:
        keys[what] = place.build(*(args or (source,)), **options).key

    options = {
        "max_length": 99,
        "overlong": "drop",
        "train_on": "all",
        "system_prompt": "S",
        "control_tokens": "text",
        "format": "prompt-completion",
    }
    for name, value in options.items():
        differs(name, config=data_config(**{name: value}))
    differs("label", DataSource(path=str(place.data), name="mine"))
    differs("path", DataSource(path=str(shutil.copy(place.data, tmp_path / "copy.jsonl"))))
    differs("order", source, DataSource(path=str(tmp_path / "copy.jsonl")))
    differs("template", tokenizer=tiny_tokenizer(CHATML_DEFAULT_SYSTEM))
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "RENDER_VERSION", -1)
        differs("render version")
    for package in ("tokenizers", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(store_module.importlib.metadata, "version", lambda name, package=package: "0" if name == package else "1")
            differs(package)
    file = place.model / "tokenizer_config.json"
    text = file.read_text()
    file.write_text(text + "\n")
    differs("tokenizer file")
    file.write_text(text)
    data = place.data.read_bytes()
    place.data.write_bytes(data.replace(b"Question 7", b"Question 8"))
    differs("one byte of the data")
    place.data.write_bytes(data)
    assert len(set(keys.values())) == len(keys), keys


def test_key_changes_with_nothing_else(place):
    key = place.build().key
    os.utime(place.data, (0, 0))
    (place.model / "model.safetensors").write_bytes(b"weights")
    assert place.build().key == key
    assert place.build(config=data_config(eval_fraction=0.1, on_bad_record="skip")).key == key
    assert place.build(DataSource(path=str(place.data), weight=3.0)).key == key


@pytest.mark.parametrize("damage", ["short", "shorter text", "missing", "index", "no index"])
def test_damaged_store_is_built_again(place, damage):
    first = place.build()
    expected = np.array(first.labels_N)
    file = first.directory / {"short": "labels.npy", "shorter text": "sources.json", "missing": "sources.json"}.get(damage, "index.json")
    if damage in ("missing", "no index"):
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-10])
    assert open_store(first.directory) is None
    again = place.build()
    assert again.key == first.key
    np.testing.assert_array_equal(again.labels_N, expected)
    assert place.left_in_cache() == [first.key]


def test_stop_leaves_nothing(place, monkeypatch):
    monkeypatch.setattr(store_module, "CHUNK_RECORDS", 5)
    answers = iter([False, False, True])
    with pytest.raises(Interrupted, match="before there was anything to resume; the same command starts again"):
        place.build(should_stop=lambda: next(answers))
    assert place.left_in_cache() == []
    assert len(place.build()) == 20


def test_error_leaves_nothing(place, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"")
    with pytest.raises(DataError, match="holds no records"):
        place.build(DataSource(path=str(place.data)), DataSource(path=str(empty)))
    assert place.left_in_cache() == []


def build_slowly(place: Workplace, started) -> None:
    def never() -> bool:
        started.set()
        time.sleep(60)
        return False

    place.build(should_stop=never)


def test_killed_build_leaves_nothing_to_be_taken_for_a_store(place):
    context = multiprocessing.get_context("forkserver")
    started = context.Event()
    child = context.Process(target=build_slowly, args=(place, started))
    child.start()
    assert started.wait(60)
    (unfinished,) = place.left_in_cache()
    assert unfinished.startswith(".unfinished-")
    running = place.build(DataSource(path=str(place.data), name="while another build runs"))
    assert unfinished in place.left_in_cache(), "a build that runs is left alone"
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    store = place.build()
    assert sorted((running.key, store.key)) == place.left_in_cache()


def build_and_report(place: Workplace, barrier, results) -> None:
    def together() -> bool:
        barrier.wait(60)
        return False

    store = place.build(should_stop=together)
    results.put((store.key, int(store.labels_N.sum()), len(store.rejected)))


def test_two_processes_build_at_once(place):
    context = multiprocessing.get_context("forkserver")
    barrier, results = context.Barrier(2), context.Queue()
    children = [context.Process(target=build_and_report, args=(place, barrier, results)) for _ in range(2)]
    for child in children:
        child.start()
    found = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert found[0] == found[1]
    assert place.left_in_cache() == [found[0][0]]


def test_cache_that_cannot_be_written(place, tmp_path):
    (tmp_path / "file").write_text("")
    place.cache = tmp_path / "file" / "cache"
    with pytest.raises(ConfigError, match=r"file/cache: the prepared samples cannot be kept there: .*; set XDG_CACHE_HOME"):
        place.build()


def test_full_disk(place, monkeypatch):
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.StoreWriter, "add", full)
    with pytest.raises(ConfigError, match="No space left on device; set XDG_CACHE_HOME"):
        place.build()
    assert place.left_in_cache() == []


def test_default_cache_dir(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/structcot/samples")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache/structcot/samples"
