"""Is the final answer right? Extracts it from the response and compares it with the prompt's reference answer symbolically.

Library: math-verify (Hugging Face). Reference answers may be plain ("72"), LaTeX, boxed, or whole GSM8K solutions ("... #### 72").
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import Field, PrivateAttr

from onlinerl.errors import OracleError
from onlinerl.oracles import _verdicts
from onlinerl.protocols.keys import Seconds
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Cost, Failure, Query, Verdict

_START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 5.0


class MathVerifier(Oracle):
    """Scores 1 for the right answer, 0 for a wrong one or none. A response that cannot be compared is not judged, and counts towards
    `max_failed_labels`."""

    call_timeout_s: Seconds = 3600.0  # each comparison has a deadline of its own
    max_concurrent: Literal[1] = 1  # there is one process that compares
    timeout_s: Seconds = 5.0
    """Longest comparison of one response with the reference answer, in seconds. One that takes longer is tried once more, in a fresh process."""
    uncomparable_score: float | None = None
    """Score of a response that has taken too long twice, such as a tower of powers, for those who are sure that the machine is never too busy.
    None: it is not judged. One at which the process dies that compares is never judged."""

    preference_temperature: float = Field(0.2, gt=0)
    """As for every oracle. Right beats wrong by one point and is not a matter of taste: 0.2 makes that a probability of 0.993, where 1
    would say 0.73."""

    _worker: subprocess.Popen[bytes] | None = PrivateAttr(None)
    _turn: Any = PrivateAttr(default_factory=threading.Lock)
    _calls: int = PrivateAttr(0)

    def open(self) -> None:
        """Start the process that compares. Idempotent; `judge` calls it too.

        Raises:
            OracleError: if the process does not start.
        """
        if self._worker is not None and self._worker.poll() is None:
            return
        self.close()
        # -P: this folder must not be searched for modules. By file, so that the path of this package does not matter.
        script = Path(__file__).with_name("_math_worker.py")
        self._worker = subprocess.Popen(
            [sys.executable, "-P", str(script), str(math.ceil(self.timeout_s) + 60)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the run, which then closes its oracle
        )
        for pipe in (self._worker.stdin, self._worker.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)  # every wait has a deadline
        if self._answer(time.monotonic() + _START_TIMEOUT_S) is None:
            self.close()
            raise OracleError(
                "the process that compares answers did not start",
                field="oracle.name",
                fix="see its error above; `pip install math-verify` if it is missing",
            )

    def close(self) -> None:
        """Stop the process."""
        if self._worker is None:
            return
        self._worker.kill()
        self._worker.wait()
        for pipe in (self._worker.stdin, self._worker.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # a request it never read
                    pipe.close()
        self._worker = None

    @property
    def version(self) -> str:
        """Version of math-verify, and how what it cannot compare is scored."""
        # 2: a process that dies gives no score, and what is late is tried twice.
        return f"math-verify-{_verdicts.version_of('math-verify')}-2-uncomparable={self.uncomparable_score}"

    @property
    def needs_reference_answer(self) -> bool:
        """Nothing to compare with otherwise."""
        return True

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        """One Verdict with K scores of 0 or 1 per query, in order, NaN for a response that could not be compared; a Failure where the reference
        answer cannot be read, or fewer than two responses are judged.

        A call that missed its deadline is left to itself and may still be at work when the next one comes: it then gives up.

        Raises:
            OracleError: if a prompt has no reference answer.
        """
        self._calls = call = self._calls + 1
        for query in queries:
            _verdicts.answer_of(query.prompt)
        return [self._judge(query, call) for query in queries]

    def _judge(self, query: Query, call: int) -> Verdict | Failure:
        started = time.perf_counter()
        found: list[float | Failure] = []
        for response in query.responses:
            for _ in range(2):  # the machine may have been busy
                with self._turn:  # one question at a time: answers do not say whose they are
                    if call != self._calls:
                        message = f"prompt {query.prompt.id!r}: nobody waits for this answer any more"
                        return Failure(kind="timeout", message=message)
                    score = self._compare(str(query.prompt.reference_answer), response)
                late = isinstance(score, Failure) and score.kind == "timeout"
                if not late:
                    break
            if isinstance(score, Failure) and score.kind == "parse_fail":
                return replace(score, message=f"prompt {query.prompt.id!r}: {score.message}")
            found.append(self.uncomparable_score if late and self.uncomparable_score is not None else score)
        cost = Cost(calls=len(found), seconds=time.perf_counter() - started)
        return _verdicts.from_each(found, annotator="math_verify", oracle_version=self.version, cost=cost)

    def _compare(self, reference: str, response: str) -> float | Failure:
        self.open()
        assert self._worker is not None
        request = json.dumps({"reference": reference, "response": response}).encode() + b"\n"
        deadline = time.monotonic() + self.timeout_s
        answer = self._answer(deadline) if self._send(request, deadline) else None
        if answer is None:
            crashed = self._worker.poll() is not None
            self.close()  # the next comparison starts a fresh process
            if crashed:
                return Failure(kind="error", message="the process that compares answers died, perhaps out of memory")
            return Failure(kind="timeout", message=f"not compared within {self.timeout_s:g} s, twice")
        if "unreadable" in answer:
            return Failure(kind="parse_fail", message=f"the reference answer {reference!r} is not a mathematical expression")
        return float(answer["score"])

    def _send(self, request: bytes, deadline: float) -> bool:
        """Give the process a request; False if it has not taken all of it in time, or is dead."""
        assert self._worker is not None
        assert self._worker.stdin is not None
        rest = memoryview(request)
        while rest:
            if not _ready(self._worker.stdin, selectors.EVENT_WRITE, deadline):
                return False
            try:
                rest = rest[os.write(self._worker.stdin.fileno(), rest) :]
            except BrokenPipeError:
                self._reap()
                return False
        return True

    def _answer(self, deadline: float) -> dict[str, Any] | None:
        """The next line of the process; None if it is late or the process is dead."""
        assert self._worker is not None
        assert self._worker.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            if not _ready(self._worker.stdout, selectors.EVENT_READ, deadline):
                return None
            part = os.read(self._worker.stdout.fileno(), 1 << 16)
            if not part:
                self._reap()
                return None
            line += part
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _reap(self) -> None:
        """The process has closed a pipe: it is dead or dying."""
        assert self._worker is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._worker.wait(_END_TIMEOUT_S)


def _ready(pipe: IO[bytes], event: int, deadline: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, event)
        return bool(selector.select(max(0.0, deadline - time.monotonic())))
