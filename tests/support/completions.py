"""A small OpenAI-compatible server on a port of this machine that does what a test tells it to: what goes wrong cannot be had from a real
one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol, TypeVar

Answer = tuple[int, Any, dict[str, str]]
"""Status, body (a text, or what becomes JSON), headers."""


class Server:
    """Answers like vLLM, unless `instead` says otherwise."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[tuple[str, Any, dict[str, str]]] = []
        """Path, body and headers of each request."""
        self.instead: Callable[[str, Any], Answer | None] = lambda path, body: None
        self.models = [{"id": "policy", "max_model_len": 256}]
        self.choice: dict[str, Any] = {}
        """What a completion says differently."""
        self.version = "0"
        self.refuses_reset = False

    def count(self, path: str) -> int:
        return sum(each == path for each, *_ in self.asked)

    def answer(self, path: str, body: Any, headers: dict[str, str]) -> Answer:
        self.asked.append((path, body, headers))
        return self.instead(path, body) or (200, self.usual(path, body), {})

    def usual(self, path: str, body: Any) -> Any:
        if path == "/v1/models":
            return {"data": self.models}
        if path == "/v1/completions":
            return {"choices": [{**self._completion(body), **self.choice}]}
        if path == "/collective_rpc":
            return {
                "results": {"onlinerl_pid": ["7"], "onlinerl_received": [{"a": "1"}, {"a": "2", "b": "3"}]}.get(
                    body["method"], [None]
                )
            }
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return {"success": True}
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/reset_prefix_cache":
            return {"success": not self.refuses_reset}
        raise AssertionError(path)

    @staticmethod
    def _completion(body: Any) -> dict[str, Any]:
        tokens = [(body["seed"] + i) % 50 for i in range(body["max_tokens"])]
        scores = [None, *({str(token): {"logprob": -float(token)}} for token in body["prompt"][1:])]
        return {
            "text": " ".join(map(str, tokens)),
            "finish_reason": "length",
            "token_ids": tokens,
            "logprobs": {"tokens": [f"token_id:{t}" for t in tokens], "token_logprobs": [-0.5] * len(tokens)},
            "prompt_logprobs": scores if "prompt_logprobs" in body else None,
        }


class Answering(Protocol):
    """What `serving` needs of a server."""

    url: str

    def answer(self, path: str, body: Any, headers: dict[str, str]) -> Answer: ...


S = TypeVar("S", bound=Answering)


@contextmanager
def serving() -> Iterator[Server]:
    """A server, until the end of the block."""
    with listening(Server()) as server:
        yield server


HANG_UP, HALF = 0, 1
"""In place of a status: the connection is closed without an answer, or in the middle of it."""


@contextmanager
def listening(server: S) -> Iterator[S]:
    """This server, until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply(None)

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: Any) -> None:
            status, said, headers = server.answer(self.path, body, dict(self.headers))
            data = (said if isinstance(said, str) else json.dumps(said)).encode()
            if status == HANG_UP:
                self.close_connection = True
                return
            if status == HALF:
                self.close_connection = True
                headers = {"Content-Length": str(2 * len(data))}
            self.send_response(200 if status == HALF else status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            with suppress(ConnectionError):  # nobody waits for it any more
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *args: Any) -> None: ...

    class Http(ThreadingHTTPServer):
        request_queue_size = 128  # a connection that finds no room waits for a second

    http = Http(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    http.block_on_close = False  # one that hangs is left to itself
    server.url = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def slowly(seconds: float) -> Callable[[str, Any], None]:
    """Answers as usual, but late."""

    def wait(path: str, body: Any) -> None:
        if path == "/v1/completions":
            time.sleep(seconds)

    return wait
