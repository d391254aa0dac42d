"""A server of chat completions on a free local port that does as it is told: one behaviour a request, the last one for all that follow."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

Behaviour = Callable[["Exchange"], None]
WORDS_OF_AN_ERROR = "ERROR-TEXT-THAT-IS-NO-ANSWER"


class Exchange(BaseHTTPRequestHandler):
    """One request, `body` its JSON, and ways to answer it."""

    server: FaultyServer  # pyright: ignore[reportIncompatibleVariableOverride]
    body: dict[str, Any]

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.next_behaviour(self)(self)

    def do_GET(self) -> None:
        self.server.stray_requests.append(dict(self.headers))
        self.send(200, b"{}")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def send(self, status: int, body: bytes, *, length: int | None = None, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body) if length is None else length), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def system(self) -> str:
        return self.body["messages"][0]["content"]

    def user(self) -> str:
        return self.body["messages"][-1]["content"]


class FaultyServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, *script: Behaviour):
        super().__init__(("127.0.0.1", 0), Exchange)
        self.script = list(script)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.stray_requests: list[dict[str, str]] = []
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def next_behaviour(self, exchange: Exchange) -> Behaviour:
        with self._lock:
            number = min(len(self.requests), len(self.script) - 1)
            self.requests.append(exchange.body)
            self.headers.append(dict(exchange.headers))
            self.paths.append(exchange.path)
            return self.script[number]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what many tests want."""

    def __enter__(self) -> FaultyServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()


def completion(content: Any, finish_reason: str | None = "stop", **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 5}} | more


def says(content: Any, finish_reason: str | None = "stop", **more: Any) -> Behaviour:
    return sends(json.dumps(completion(content, finish_reason, **more)).encode())


def sends(body: bytes) -> Behaviour:
    return lambda exchange: exchange.send(200, body)


def refuses(status: int, words: str = WORDS_OF_AN_ERROR, **headers: str) -> Behaviour:
    body = json.dumps({"error": {"message": words}}).encode()
    return lambda exchange: exchange.send(status, body, headers={name.replace("_", "-"): value for name, value in headers.items()})


def hangs_up(exchange: Exchange) -> None:
    exchange.close_connection = True
    exchange.connection.close()


def cuts_short(exchange: Exchange) -> None:
    """The body stops before its announced end, though what is there is JSON of a whole answer."""
    body = json.dumps(completion(WORDS_OF_AN_ERROR)).encode()
    exchange.send(200, body, length=len(body) + 10)
    hangs_up(exchange)


def cuts_a_chunk_short(exchange: Exchange) -> None:
    body = json.dumps(completion(WORDS_OF_AN_ERROR)).encode()
    exchange.protocol_version = "HTTP/1.1"
    exchange.send_response(200)
    exchange.send_header("Transfer-Encoding", "chunked")
    exchange.end_headers()
    exchange.wfile.write(f"{len(body):x}\r\n".encode() + body + b"\r\nff\r\n")
    hangs_up(exchange)


def speaks_no_http(exchange: Exchange) -> None:
    exchange.wfile.write(WORDS_OF_AN_ERROR.encode() + b"\r\n\r\n")
    hangs_up(exchange)


def late(seconds: float) -> Behaviour:
    def wait(exchange: Exchange) -> None:
        time.sleep(seconds)
        says(WORDS_OF_AN_ERROR)(exchange)

    return wait


def drips(seconds: float) -> Behaviour:
    """Never silent for long, and never done."""

    def drip(exchange: Exchange) -> None:
        exchange.send(200, b" ", length=1000)
        for _ in range(100):
            exchange.wfile.write(b" ")
            exchange.wfile.flush()
            time.sleep(seconds)

    return drip


def echoes(cut: Callable[[str], Sequence[int]], change: Callable[[str], str] = str) -> Behaviour:
    """Repeat the user's text with separator lines at cut(text), as a model may: white space beside them is its own."""

    def echo(exchange: Exchange) -> None:
        text = exchange.user()
        says(with_separators(text, cut(text), separator_in(exchange.system()), change))(exchange)

    return echo


def with_separators(text: str, cuts: Sequence[int], separator: str, change: Callable[[str], str] = str) -> str:
    places = [0, *sorted(cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(places)]
    return change(f"\n{separator}\n".join(piece.strip() for piece in pieces))


def separator_in(prompt: str) -> str:
    match = re.search(r"<<<CUT( \d+)?>>>", prompt)
    assert match, prompt
    return match[0]
