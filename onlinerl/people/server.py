"""The page at which people compare two answers, and what it asks for: a small HTTP server of the standard library beside the queue.

The page itself holds nothing secret and is given to anyone. Everything else needs the token as `Authorization: Bearer`, a header that no
other site can make a browser send. There are no cookies, and no file comes from elsewhere. The server keeps nothing but who has which
question for the moment: it may be killed and started again at any time.
"""

from __future__ import annotations

import hmac
import json
import re
import socket
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

from onlinerl.errors import OnlineRLError
from onlinerl.people.agreement import agreement
from onlinerl.people.queue import CHOICES, Answer, Question, Queue

LEASE_S = 300.0
"""For so long nobody else gets a question that somebody has before them."""
LONGEST_BODY = 1 << 16
IDLE_S = 30
"""After so long without a word a connection is closed."""
NAME = re.compile(r"[\w.@-]{1,40}")
SUBMISSION = re.compile(r"[\w-]{8,64}")
FILES = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css"), "/page.js": ("page.js", "text/javascript")}
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_REFUSED = {
    "unknown": (HTTPStatus.NOT_FOUND, "there is no such question"),
    "answered": (HTTPStatus.CONFLICT, "you have answered this one already"),
    "closed": (HTTPStatus.CONFLICT, "others were faster"),
    "taken": (HTTPStatus.CONFLICT, "the run has it already"),
}


class _Refused(Exception):
    """What is said to a request that is not done."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class Desk:
    """Who is shown which question, and what the page is told.

    Args:
        queue: of the run.
    """

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._leases: dict[str, dict[str, float]] = {}
        """Question -> person -> since when."""
        self._lock = threading.Lock()

    def state(self, annotator: str, holding: str | None = None) -> dict[str, Any]:
        """What this person is to compare next, and how things stand.

        Args:
            annotator: the person's name.
            holding: the question that is before them, which stays there while it is open.
        """
        with self._lock:
            self._queue.look()
            opened = self._queue.open()
            question = self._next(annotator, holding, opened)
            own, everything = self._queue.by(annotator), self._queue.questions()
            answers = [self._queue.answers(one.id) for one in everything]
            agreed = agreement(answers)
            return {
                "question": None if question is None else self._shown(question),
                "open": len(opened),
                "waiting": sum(self._queue.status(one.id) == "waiting" for one in opened),
                "answered": sum(map(bool, answers)),
                "mine": len(own),
                "undo": own[-1].submission if own and self._queue.status(own[-1].question) != "taken" else None,
                "agreement": {"share": agreed.share, "kappa": agreed.kappa, "answers": agreed.answers},
            }

    def _next(self, annotator: str, holding: str | None, opened: list[Question]) -> Question | None:
        now = time.monotonic()
        free = [one for one in opened if self._free(one, annotator, now)]
        chosen = next((one for one in free if one.id == holding), free[0] if free else None)
        held = {one: since for one, leases in self._leases.items() if (since := leases.pop(annotator, None)) is not None}
        if chosen is not None:
            self._leases.setdefault(chosen.id, {})[annotator] = held.get(chosen.id, now)
        return chosen

    def _free(self, question: Question, annotator: str, now: float) -> bool:
        said = {answer.annotator for answer in self._queue.answers(question.id)}
        others = {who for who, since in self._leases.get(question.id, {}).items() if who != annotator and now - since < LEASE_S}
        return annotator not in said and len(said | others) < question.needed

    def _shown(self, question: Question) -> dict[str, Any]:
        """Of a question what a person may know: not who has written what."""
        messages = [{"role": role, "content": content} for role, content in question.messages]
        return {
            "id": question.id,
            "messages": messages or [{"role": "", "content": question.prompt}],
            "left": question.left,
            "right": question.right,
            "strength": question.strength,
            "late": self._queue.status(question.id) == "late",
        }

    def answer(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """Keep an answer.

        Raises:
            _Refused: if it is none, or comes too late.
        """
        annotator, submission = _name(said.get("annotator")), _submission(said.get("submission"))
        choice, strength, seconds = said.get("choice"), said.get("strength"), said.get("seconds")
        if choice not in CHOICES or strength not in (None, "clear", "slight") or not isinstance(said.get("question"), str):
            raise _Refused(HTTPStatus.BAD_REQUEST, "this is no answer")
        if not (isinstance(seconds, int | float) and 0 <= seconds < 1e6):
            seconds = None
        answer = Answer(
            question=said["question"],
            annotator=annotator,
            choice=choice,
            strength=strength if choice in ("left", "right") else None,
            submission=submission,
            at=time.time(),
            seconds=seconds,
        )
        outcome = self._queue.answer(answer)
        if outcome in _REFUSED:
            raise _Refused(*_REFUSED[outcome])
        return self.state(annotator)

    def undo(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """Take an answer back; the question is before that person again.

        Raises:
            _Refused: if there is none, or the run has it.
        """
        annotator, submission = _name(said.get("annotator")), _submission(said.get("submission"))
        outcome = self._queue.undo(annotator, submission)
        if outcome in _REFUSED:
            raise _Refused(*_REFUSED[outcome])
        answer = self._queue.answer_of(submission)
        return self.state(annotator, None if answer is None else answer.question)


def _name(said: object) -> str:
    if not isinstance(said, str) or not NAME.fullmatch(said):
        raise _Refused(HTTPStatus.BAD_REQUEST, "give a name of letters, digits and . _ @ -, at most 40 of them")
    return said


def _submission(said: object) -> str:
    if not isinstance(said, str) or not SUBMISSION.fullmatch(said):
        raise _Refused(HTTPStatus.BAD_REQUEST, "this is no submission")
    return said


class Server(ThreadingHTTPServer):
    """Serves the page until it is shut down.

    Args:
        address: host and port; 0 takes a free one.
        queue: of the run.
        token: that every request but those for the page itself must carry.

    Raises:
        OSError: if the address cannot be had.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], queue: Queue, token: str) -> None:
        self.desk, self._token = Desk(queue), token.encode()
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def knows(self, authorization: str | None) -> bool:
        """Whether a header holds the token; how long that takes says nothing of it."""
        return hmac.compare_digest((authorization or "").encode("utf-8", "replace"), b"Bearer " + self._token)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = IDLE_S
    server_version, sys_version = "onlinerl", ""

    def do_GET(self) -> None:
        """The page, or its state."""
        url = urlsplit(self.path)
        if url.path in FILES:
            name, kind = FILES[url.path]
            self._send(
                HTTPStatus.OK, resources.files(__package__).joinpath("page", name).read_bytes(), f"{kind}; charset=utf-8"
            )
            return
        self._answered("GET", url.path, {key: values[-1] for key, values in parse_qs(url.query).items()})

    def do_POST(self) -> None:
        """An answer, or one that is taken back."""
        self._answered("POST", urlsplit(self.path).path, None)

    def _answered(self, method: str, path: str, query: Mapping[str, str] | None) -> None:
        try:
            if not self.server.knows(self.headers.get("Authorization")):
                raise _Refused(
                    HTTPStatus.UNAUTHORIZED, "the token is missing or wrong: open the link that `onlinerl people` printed"
                )
            found = self._done(method, path, query)
            self._json(HTTPStatus.OK, found)
        except _Refused as refused:
            self._json(refused.status, {"error": refused.why})
        except OnlineRLError as error:
            self._json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)})

    def _done(self, method: str, path: str, query: Mapping[str, str] | None) -> dict[str, Any]:
        desk = self.server.desk
        if (method, path) == ("GET", "/api/state"):
            return desk.state(_name((query or {}).get("annotator")), (query or {}).get("holding"))
        if (method, path) == ("POST", "/api/answer"):
            return desk.answer(self._body())
        if (method, path) == ("POST", "/api/undo"):
            return desk.undo(self._body())
        raise _Refused(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _body(self) -> Mapping[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LONGEST_BODY:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "this is too long")
        try:
            said = json.loads(self.rfile.read(int(length)))
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise _Refused(HTTPStatus.BAD_REQUEST, "this is no JSON object")
        return said

    def _json(self, status: HTTPStatus, said: Mapping[str, Any]) -> None:
        self._send(status, json.dumps(said).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing is said of requests: what was answered is in the queue."""
