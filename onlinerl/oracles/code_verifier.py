"""Does a program pass its tests? Runs the code in a response against the prompt's reference answer, which holds the tests.

The program runs in a process of its own, without network, with a folder of its own and nothing else that it can write to or, but for Python,
read; with limits on time, memory, processes and output. What its functions return, or what it writes, is compared outside of that
process, so that it can neither see what is expected nor say that it has passed. Where a test itself computes in the program's process
(`assert math.isclose(f(1), 2)`, a `check` function), a program that was made to deceive it can.

Sources: "PLUM: Preference Learning Plus Test Cases Yields Better Code Language Models" (arXiv 2406.06887), for the score; the forms of tests
are those of MBPP, HumanEval, APPS and verl.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr

from onlinerl.errors import OracleError
from onlinerl.oracles import _code_tests, _verdicts
from onlinerl.oracles._code_tests import Tests
from onlinerl.protocols.keys import Resumable, Seconds
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Cost, Failure, Query, Verdict

_START_TIMEOUT_S, _END_TIMEOUT_S = 120.0, 10.0
_FILE_BYTES = 16 << 20
_ISOLATION = {
    "network": "a network namespace of its own",
    "files": "Landlock, for files",
    "processes": "a user of its own, for the number of processes",
}


@dataclass(frozen=True, kw_only=True)
class _Ran:
    """What came of one process."""

    isolated: dict[str, bool]
    output: str
    problem: str | None
    """Why it was ended before its end."""


class CodeVerifier(Oracle):
    """Scores 1 for a program that passes all of its tests, 0 for any other."""

    call_timeout_s: Resumable[Seconds] = 3600.0  # each program has a deadline of its own
    max_concurrent: Resumable[int] = Field(4, ge=1)
    partial_credit: bool = False
    """Whether the score is the share of the tests that a program passes. It is `passed` beside the score in any case."""
    timeout_s: Seconds = 5.0
    """Longest run of a program: of all calls of its functions together, or of each test that reads stdin. On a busy machine programs are
    slower."""
    memory_mb: int = Field(1024, ge=128)
    """Most memory of each of its processes, in MiB."""
    max_processes: int = Field(8, ge=1)
    """Processes and threads of a program, its first one included."""
    max_output_kb: int = Field(1024, ge=1)
    """Most that a program may write, or its functions return, in KiB."""
    include_prompt: bool = False
    """Whether the program begins with the prompt, as of a model that completes code."""
    sandbox: Literal["required", "best_effort"] = "required"
    """What happens where this machine cannot isolate a program entirely: the run is refused, or programs run with what there is, and
    `check` says what is missing. Programs of a model may do anything that you may: take `best_effort` only where that does not matter."""

    preference_temperature: float = Field(0.2, gt=0)
    """As for every oracle. Passing beats failing by one point and is not a matter of taste: 0.2 makes that a probability of 0.993."""

    _isolated: dict[str, bool] | None = PrivateAttr(None)

    def open(self) -> None:
        """Find out, with an empty program, what isolates programs here. Idempotent; `judge` calls it too.

        Raises:
            OracleError: if too little does, or the process does not start.
        """
        if self._isolated is not None:
            return
        ran = self._run("", Tests(), None)
        if isinstance(ran, Failure):
            fix = "see whether Python can start processes here"
            raise OracleError(f"programs cannot be run: {ran.message}", field="oracle.name", fix=fix)
        if self._missing(ran.isolated) and self.sandbox == "required":
            raise OracleError(
                f"programs cannot be isolated on this machine, which lacks {self._missing(ran.isolated)}",
                field="oracle.sandbox",
                fix="allow user namespaces and Landlock here (Linux 5.13 or later; in a container its seccomp profile has to let "
                "`unshare` and `landlock_*` pass), or set oracle.sandbox=best_effort on a machine that holds nothing of worth",
            )
        self._isolated = ran.isolated

    @property
    def remarks(self) -> Sequence[str]:
        """What does not isolate programs here."""
        missing = self._missing(self._isolated or {})
        return [f"code_verifier: programs of the model run without {missing}"] if missing and self._isolated is not None else []

    @property
    def version(self) -> str:
        """The rules and the limits."""
        said = self.model_dump(
            include={"partial_credit", "timeout_s", "memory_mb", "max_processes", "max_output_kb", "include_prompt"}
        )
        return "code-1-python" + ".".join(map(str, sys.version_info[:2])) + "".join(f"-{value}" for value in said.values())

    @property
    def components(self) -> tuple[str, ...]:
        """The share of the tests that were passed."""
        return ("passed",)

    @property
    def needs_reference_answer(self) -> bool:
        """It holds the tests."""
        return True

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        """One Verdict with K scores per query, in order; a Failure where a prompt's tests cannot be read or a process did not start.

        Raises:
            OracleError: if a prompt has no reference answer, or programs cannot be isolated.
        """
        for query in queries:
            _verdicts.answer_of(query.prompt, ", which holds the tests", "assert ...")
        if queries:
            self.open()
        return [self._judge(query) for query in queries]

    def _judge(self, query: Query) -> Verdict | Failure:
        started = time.perf_counter()
        try:
            tests = _code_tests.read(str(query.prompt.reference_answer))
        except ValueError as error:
            return Failure(kind="parse_fail", message=f"prompt {query.prompt.id!r}: {error}")
        shares: list[float] = []
        remarks: list[str] = []
        for index, response in enumerate(query.responses):
            code = (query.prompt.text if self.include_prompt else "") + _code_tests.program(response)
            found = self._passed(code, tests)
            if isinstance(found, Failure):
                return Failure(kind=found.kind, message=f"prompt {query.prompt.id!r}, response {index}: {found.message}")
            shares.append(found[0])
            remarks += [f"response {index}: {found[1]}"] if found[1] else []
        scores = shares if self.partial_credit else [float(share == 1.0) for share in shares]
        return _verdicts.from_components(
            {"score": scores, "passed": shares},
            len(query.responses),
            annotator="code_verifier",
            oracle_version=self.version,
            cost=Cost(calls=len(scores), seconds=time.perf_counter() - started),
            raw="; ".join(remarks) or None,
        )

    def _passed(self, code: str, tests: Tests) -> tuple[float, str] | Failure:
        """The share of tests that a program passes, and the first thing that went wrong."""
        if not tests.streams:
            ran = self._run(code, tests, None)
            return ran if isinstance(ran, Failure) else _right(ran, tests)
        passed, first = 0, ""
        for given, wanted in tests.streams:
            ran = self._run(code, tests, given)
            if isinstance(ran, Failure):
                return ran
            right = ran.problem is None and _code_tests.same_output(ran.output, wanted)
            passed += right
            first = first or ("" if right else ran.problem or "wrote something else")
        return passed / len(tests.streams), first

    def _run(self, code: str, tests: Tests, stdin: str | None) -> _Ran | Failure:
        request = {
            "program": code,
            "setup": tests.setup,
            "calls": [expression for check in tests.checks for expression in check.expressions] if stdin is None else None,
            "stdin": stdin,
            "required": self.sandbox == "required",
            "limits": {
                "memory_bytes": self.memory_mb << 20,
                "cpu_s": math.ceil(self.timeout_s) + 1,
                "file_bytes": _FILE_BYTES,
                "processes": self.max_processes,
            },
        }
        with tempfile.TemporaryDirectory(prefix="onlinerl-code-", ignore_cleanup_errors=True) as folder:
            with tempfile.TemporaryFile() as file:
                file.write(json.dumps(request).encode())
                file.seek(0)
                process = _started(folder, file)
            try:
                return self._watched(process)
            finally:
                _end(process)

    def _watched(self, process: subprocess.Popen[bytes]) -> _Ran | Failure:
        """What it writes, until it ends, is late or writes too much."""
        assert process.stdout is not None
        pipe, said, isolated = process.stdout.fileno(), b"", None
        deadline, most = time.monotonic() + _START_TIMEOUT_S, self.max_output_kb << 10
        problem: str | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while problem is None:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    problem = f"took longer than {self.timeout_s:g} s"
                elif not (part := os.read(pipe, 1 << 16)):
                    break
                else:
                    said += part
                    if isolated is None and b"\n" in said:
                        line, _, said = said.partition(b"\n")
                        isolated, deadline = json.loads(line), time.monotonic() + self.timeout_s
                    if len(said) > most:
                        problem = f"wrote more than {self.max_output_kb} KiB"
        if isolated is None:
            return Failure(kind="error", message="the process that runs programs did not start")
        if self._isolated is not None and self.sandbox == "required" and self._missing(isolated):
            return Failure(kind="error", message=f"this program could not be isolated: {self._missing(isolated)}")
        return _Ran(isolated=isolated, output=said.decode(errors="replace"), problem=problem)

    def _missing(self, isolated: dict[str, bool]) -> str:
        return " and ".join(words for key, words in _ISOLATION.items() if not isolated.get(key))


def _started(folder: str, request: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # -I: neither its folder nor what the environment says is searched for modules.
        [sys.executable, "-I", str(Path(__file__).with_name("_code_worker.py"))],
        stdin=request,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={
            "PATH": os.defpath,
            "HOME": folder,
            "TMPDIR": folder,
            "LANG": "C.UTF-8",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        },
        bufsize=0,
        start_new_session=True,  # it is ended with all that it has started, and Ctrl-C is not for it
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Return when it and all that it has started are gone."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):  # where it has no processes of its own
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _right(ran: _Ran, tests: Tests) -> tuple[float, str]:
    """The share of checks that hold by what the process said, and the first thing that went wrong."""
    values: dict[int, str] = {}
    errors: list[str] = []
    for line in ran.output.split("\n"):
        try:
            said = json.loads(line)
            if isinstance(said.get("value"), str):
                values.setdefault(int(said["i"]), said["value"])
            else:
                errors.append(str(said["error"]))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # a program may write what it likes
    passed, place = 0, 0
    for check in tests.checks:
        given = [values.get(place + k) for k in range(len(check.expressions))]
        place += len(check.expressions)
        known = [value for value in given if value is not None]
        passed += len(known) == len(given) and check.passed(known)
    first = ran.problem or (errors[0] if errors else "")
    return passed / len(tests.checks), "" if passed == len(tests.checks) else first or "a test fails"
