"""What runs a candidate inside the sandbox: it takes the candidate and then one test at a time, and says what came out.

A message is its length in 8 bytes and text. It first says `READY`. Then comes the name of the function to call ("" for a candidate that
reads standard input), the candidate, and the input of each test; to the last two the answer is a letter, see `LOADED` and the rest, and
what it is about.
What is expected never comes here, so whatever a candidate does to this process, the best that it can say is what it computed.

Candidates run as the grader of LiveCodeBench runs them: after the same imports, with the same limit on recursion; one that reads standard
input is made a function, of which only the imports stand outside, and one that is called keeps its state from test to test.
Standard library only.
"""

from __future__ import annotations

import ast
import builtins
import io
import json
import operator
import os
import struct
import sys
import threading
from types import TracebackType
from typing import Any, BinaryIO, cast

# The letters of messages: all is imported; the candidate is loaded; does not compile; wrote this text; returned this JSON value; raised
# this.
READY, LOADED, UNCOMPILED, WROTE, RETURNED, RAISED = "ilcwre"
RECURSION_LIMIT = 50000
_MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools", "functools"),
    *("operator", "io", "sys", "json"),
)
_PREAMBLE = "\n".join([f"from {name} import *" for name in (*_MODULES, "builtins", "typing")] + [f"import {name}" for name in _MODULES])
_LENGTH = struct.Struct("<Q")
_SHOWN = 300


class Outcome:
    """What a block raised, which is kept and goes no further: a candidate may raise anything, and `error` is what it says."""

    error: BaseException | None = None

    def __enter__(self) -> Outcome:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        self.error = error
        return True

    def describe(self) -> str:
        """The type of what was raised and its message, which may itself fail to be made."""
        text = ""
        with Outcome():
            text = str(self.error)
        name = type(self.error).__name__
        return f"{name}: {text}"[:_SHOWN] if text else name


class Input(io.StringIO):
    """Standard input as text, whose lines may end in a carriage return as well, and as bytes by `buffer`."""

    def __init__(self, text: str):
        super().__init__(text, newline=None)
        self._bytes = io.BytesIO(text.encode("utf-8", "surrogatepass"))

    @property
    def buffer(self) -> Any:
        """The same as bytes, read apart from the text."""
        return self._bytes

    def readlines(self, hint: int = -1) -> list[str]:
        """The lines without their ends, and an empty one after the last: so it is in LiveCodeBench's grader, on which programs differ."""
        return self.read().split("\n")

    def fileno(self) -> int:
        """The number of the real standard input, which is empty."""
        return 0


class Output(io.StringIO):
    """Standard output as text; bytes written to `buffer` take their place in it."""

    @property
    def buffer(self) -> Any:
        """A file for bytes."""
        return OutputBytes(self)

    def close(self) -> None:
        """Stay open, so that what was written can be read."""


class OutputBytes(io.RawIOBase):
    """What takes bytes for a text."""

    def __init__(self, text: io.StringIO):
        super().__init__()
        self._text = text

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: Any) -> int:
        """Append the text that the bytes are."""
        self._text.write(bytes(data).decode("utf-8", "replace"))
        return len(data)


def main() -> None:
    """Serve the one who grades until there is no more to be asked."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    sys.setrecursionlimit(RECURSION_LIMIT)
    # What takes time to import is there before the clock of the candidate starts.
    exec(_PREAMBLE, {})
    _send(answers, READY, "")
    entry_point = _receive(requests) or ""
    # They stay the same objects, since a candidate may import them by name before the first test.
    files = Input(""), Output()
    if not entry_point:
        builtins.open = lambda *_, **__: Input(files[0].getvalue())
        sys.stdin, sys.stdout = files
    candidate, letter, about = _load(_receive(requests) or "", entry_point)
    _send(answers, letter, about)
    while (test := _receive(requests)) is not None:
        _send(answers, *(_call(candidate, test) if entry_point else _read_and_write(candidate, test, *files)))


def _receive(requests: BinaryIO) -> str | None:
    header = requests.read(_LENGTH.size)
    return requests.read(_LENGTH.unpack(header)[0]).decode("utf-8", "surrogatepass") if header else None


def _send(answers: BinaryIO, letter: str, about: str) -> None:
    data = (letter + about).encode("utf-8", "surrogatepass")
    answers.write(_LENGTH.pack(len(data)) + data)
    answers.flush()


def _load(text: str, entry_point: str) -> tuple[Any, str, str]:
    """Make what the tests will call, and the answer."""
    module = type(sys)("candidate" if entry_point else "__main__")
    sys.modules[module.__name__] = module
    exec(_PREAMBLE, module.__dict__)
    code = None
    with Outcome() as compiling:
        code = compile(text if entry_point else _as_function(text), "<program>", "exec")
    if code is None:
        return None, UNCOMPILED, compiling.describe()
    with Outcome() as loading:
        exec(code, module.__dict__)
        if not entry_point:
            return module.__dict__[_FUNCTION], LOADED, ""
        holder = module.__dict__["Solution"]() if "class Solution" in text else module
        return getattr(holder, entry_point), LOADED, ""
    return None, RAISED, loading.describe()


_FUNCTION = "candidate_as_a_function"


def _as_function(text: str) -> ast.Module:
    tree = ast.parse(text)
    imports = [statement for statement in tree.body if isinstance(statement, ast.Import | ast.ImportFrom)]
    rest = [statement for statement in tree.body if not isinstance(statement, ast.Import | ast.ImportFrom)]
    shell = cast(ast.FunctionDef, ast.parse(f"def {_FUNCTION}(): pass").body[0])
    shell.body = rest or shell.body
    return ast.fix_missing_locations(ast.Module(body=[*imports, shell], type_ignores=[]))


def _read_and_write(candidate: Any, text: str, stdin: Input, stdout: Output) -> tuple[str, str]:
    """Run a candidate that reads standard input, and its threads; leaving by sys.exit is an end like any other."""
    stdin.__init__(text)
    stdout.__init__()
    sys.stdin, sys.stdout = stdin, stdout
    with Outcome() as running:
        candidate()
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    if running.error and not isinstance(running.error, SystemExit):
        return RAISED, running.describe()
    return WROTE, stdout.getvalue()


def _call(candidate: Any, text: str) -> tuple[str, str]:
    """Call a candidate with the arguments of a test, a JSON value a line."""
    arguments = [json.loads(line) for line in text.split("\n")]
    with Outcome() as running:
        value = candidate(*arguments)
        return RETURNED, json.dumps(plain(list(value) if isinstance(value, tuple) else value))
    return RAISED, running.describe()


def plain(value: Any) -> Any:
    """Say by JSON what a value equals: a number, text, list or dictionary, or else by something that equals no expected value."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return operator.index(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [plain(item) for item in list.__iter__(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in dict.keys(value)):
        return {key: plain(item) for key, item in dict.items(value)}
    for kind in (int, float):
        with Outcome():
            number = cast(Any, kind)(value)
            if value == number:
                return number
    return {"not JSON": repr(value)[:_SHOWN]}


if __name__ == "__main__":
    main()
