"""The page of `structcot view` in a real browser: rows appear, a trace opens, keys and search answer, and nothing is complained about."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from structcot.view import write_view

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
PATIENCE_SECONDS = 60.0
HOSTILE = '</script><img src=x onerror="document.title=1"><!-- \x07'
# The browser reads from handle 3 and writes to handle 4; both are first put out of the way of each other.
TAKE_HANDLES = """
import fcntl, os, sys
told, said = (fcntl.fcntl(int(handle), fcntl.F_DUPFD, 10) for handle in sys.argv[1:3])
os.dup2(told, 3)
os.dup2(said, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
COMPLAINTS = ("Runtime.exceptionThrown", "Log.entryAdded")


class Browser:
    """A headless browser that is told what to do over a pipe, in the DevTools protocol."""

    def __init__(self, program: str, profile: Path) -> None:
        told, self.tell = os.pipe()
        self.hear, said = os.pipe()
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        command = [sys.executable, "-c", TAKE_HANDLES, str(told), str(said), program, *flags, "about:blank"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, pass_fds=(told, said), stdin=quiet, stdout=quiet, stderr=quiet)
        os.close(told)
        os.close(said)
        self.received, self.number, self.session, self.events = b"", 0, "", list[dict[str, Any]]()
        page = next(target for target in self.call("Target.getTargets")["targetInfos"] if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        os.write(self.tell, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.next_message()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def next_message(self) -> dict[str, Any]:
        while b"\0" not in self.received:
            assert select.select([self.hear], [], [], PATIENCE_SECONDS)[0], "the browser is silent"
            piece = os.read(self.hear, 1 << 20)
            assert piece, "the browser has ended"
            self.received += piece
        message, self.received = self.received.split(b"\0", 1)
        return json.loads(message)

    def visit(self, page: Path, place: str = "") -> None:
        for address in ("data:text/html,", page.as_uri() + place):
            self.events.clear()
            self.call("Page.navigate", url=address)
            while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
                self.events.append(self.next_message())

    def value(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, script: str) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not self.value(script):
            assert time.monotonic() < end, f"never came true: {script}"
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        for key in keys:
            code = {"Enter": 13, "Escape": 27}.get(key)
            details = {"key": key} | ({"windowsVirtualKeyCode": code} if code else {"text": key})
            self.call("Input.dispatchKeyEvent", type="keyDown", **details)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    @property
    def complaints(self) -> list[dict[str, Any]]:
        spoken = [event for event in self.events if event.get("method") == "Runtime.consoleAPICalled"]
        return [event for event in self.events if event.get("method") in COMPLAINTS] + spoken

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE_SECONDS)
        os.close(self.tell)
        os.close(self.hear)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)} is found")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.end()


def thought(number: int) -> list[tuple[str, str]]:
    """The steps of a thought with their types; only the third of the page is another one."""
    if number == 3:
        return [(HOSTILE, "deduction")]
    pieces = [f"First I look at case {number}.\n\n", f"Wait, that is wrong for {number}.\n\n", f"So the needle is {number}.\n\n"]
    return list(zip(pieces, ("initializing", "backtracking", "conclusion"), strict=True))


def as_record(steps: list[tuple[str, str]], end: str) -> dict[str, Any]:
    """A record of the steps; their types are its own, since the words that tell types are another matter."""
    ends = list(accumulate(len(text) for text, _ in steps))
    listed = [{"start": end - len(text), "end": end, "type": kind} for end, (text, kind) in zip(ends, steps, strict=True)]
    return {"response": f"<think>{''.join(text for text, _ in steps)}{end}", "steps": listed}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 300 traces; the third is hostile, every tenth is never closed."""
    folder = tmp_path_factory.mktemp("one")
    records = []
    for number in range(1, 301):
        end = "" if number % 10 == 0 else f"</think>Answer {number}"
        named = {"id": number, "question": f"Question {number}?", "correct": number % 2 == 0}
        records.append(named | as_record(thought(number), end))
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + "broken\n")
    write_view(str(folder / "in.jsonl"), folder / "page.html")
    return folder / "page.html"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page that compares a thought of four steps with one in which one has moved, one has other digits and one is new."""
    folder = tmp_path_factory.mktemp("two")
    texts = {"in": ["Alpha.", "Beta is 12.", "Gamma.", "Delta."], "other": ["Delta.", "Alpha.", "Beta is 99.", "Gamma.", "Omega is new."]}
    for name, steps in texts.items():
        record = {"id": 1} | as_record([(step, "deduction") for step in steps], "</think>")
        (folder / f"{name}.jsonl").write_text(json.dumps(record))
    write_view(str(folder / "in.jsonl"), folder / "page.html", compare=str(folder / "other.jsonl"))
    return folder / "page.html"


def test_only_the_rows_in_view_are_in_the_page_and_nothing_is_complained_about(browser: Browser, page: Path) -> None:
    browser.visit(page)
    assert browser.value("document.getElementById('count').textContent") == "300 traces"
    assert 3 <= browser.value("document.querySelectorAll('.row .strip').length") < 40
    assert "Question 1?" in browser.value("document.querySelector('.row').textContent")
    assert browser.value("document.getElementById('unusable').textContent").startswith("1 line without a trace")
    browser.value("document.getElementById('list').scrollTop = 1e6")
    browser.wait_for("document.getElementById('rows').textContent.includes('Question 300?')")
    assert browser.value("document.querySelectorAll('.row').length") < 40
    assert browser.complaints == []


def test_the_address_opens_a_trace_with_its_steps_question_and_solution(browser: Browser, page: Path) -> None:
    browser.visit(page, "#trace=7")
    text = browser.value("document.getElementById('detail').textContent")
    assert "Question 7?" in text
    assert browser.value("document.querySelector('.solution').textContent") == "Answer 7"
    steps = browser.value("[...document.querySelectorAll('.step')].map((step) => step.querySelector('.text').textContent)")
    assert steps == [text.strip() for text, _ in thought(7)]
    names = browser.value("[...document.querySelectorAll('.step b')].map((name) => name.textContent)")
    assert names == ["initializing", "backtracking", "conclusion"]
    assert browser.complaints == []


def test_a_hostile_text_is_shown_as_text(browser: Browser, page: Path) -> None:
    browser.visit(page, "#trace=3")
    assert HOSTILE[:-1] + "\u2407" in browser.value("document.getElementById('detail').textContent")
    assert browser.value("document.querySelectorAll('img').length") == 0
    assert browser.value("document.title") == "in.jsonl - structcot view"
    assert browser.complaints == []


def test_keys_walk_open_and_close(browser: Browser, page: Path) -> None:
    browser.visit(page)
    browser.press("j", "j", "k", "j", "Enter")
    assert browser.value("location.hash") == "#trace=2"
    browser.press("j", "]", "]")
    assert browser.value("location.hash") == "#trace=3"
    browser.press("k", "]", "]")
    assert browser.value("document.activeElement.textContent").endswith("Wait, that is wrong for 2.")
    browser.press("Escape")
    assert browser.value("document.getElementById('detail').hidden")
    assert browser.value("document.activeElement.id") == "list"
    browser.press("?")
    assert browser.value("document.getElementById('keys').open")


def test_a_search_counts_and_marks_its_hits(browser: Browser, page: Path) -> None:
    browser.visit(page)
    browser.press("/")
    browser.call("Input.insertText", text="NEEDLE is 12")
    browser.wait_for("document.getElementById('count').textContent === '11 of 300 traces, 11 hits'")
    browser.press("Enter", "j", "j", "Enter", "n")
    assert browser.value("location.hash") == "#trace=120"
    assert browser.value("document.querySelector('mark.here').textContent") == "needle is 12"


def test_filters_leave_the_traces_that_fit(browser: Browser, page: Path) -> None:
    browser.visit(page)
    for control, value, expected in [("state", "unfinished", "30"), ("grade", "0", "0"), ("grade", "1", "30"), ("least", "99", "0")]:
        browser.value(f"{{ const it = document.getElementById('{control}'); it.value = '{value}'; it.dispatchEvent(new Event('input')); }}")
        assert browser.value("document.getElementById('count').textContent") == f"{expected} of 300 traces"
    browser.visit(page)
    browser.value("[...document.querySelectorAll('.type')].find((it) => it.textContent.startsWith('backtracking')).click()")
    assert browser.value("document.getElementById('count').textContent") == "299 of 300 traces"


def test_a_comparison_names_what_became_of_each_step_and_lights_its_partner(browser: Browser, pair: Path) -> None:
    browser.visit(pair, "#trace=1")
    kinds = "[...document.querySelectorAll('.column:nth-child({}) .step .kind')].map((kind) => kind.textContent)"
    here = ["kept, there step 2", "changed, there step 3", "kept, there step 4", "moved, there step 1"]
    assert browser.value(kinds.format(1)) == here
    assert browser.value(kinds.format(2))[0] == "moved, there step 4"
    assert browser.value(kinds.format(2))[4] == "inserted"
    assert browser.value("document.querySelector('.links .k-moved').getAttribute('d').split('M').length - 1") == 1
    browser.press("]", "]", "]", "]")
    lit = browser.value("[...document.querySelectorAll('.step.lit .text')].map((text) => text.textContent)")
    assert lit == ["Delta.", "Delta."]
    browser.press("Enter")
    assert browser.complaints == []
