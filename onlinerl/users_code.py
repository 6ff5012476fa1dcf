"""Code of the user's own that fails: an error says which part it was, what it raised, and on which line."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from onlinerl.errors import LearnerError, OnlineRLError

T = TypeVar("T")

LINES = 3
"""Of a traceback, at most."""
FIELD = "algorithm.name"
FIX = "correct it, then `onlinerl resume`; the traceback is in failure.json of the run"


@contextmanager
def calling(algorithm: object, method: str, about: str = "") -> Iterator[None]:
    """Around a call of an algorithm's method.

    Args:
        algorithm: perhaps of the user's own.
        method: its name.
        about: what it is called for, for the message, beginning with a space.

    Raises:
        LearnerError: in place of what the method raises, unless that is an error of ours already.
    """
    try:
        yield
    except OnlineRLError:
        raise
    except Exception as problem:
        cause = f"{type(algorithm).__name__}.{method} failed{about}: {said(problem)}{line(problem)}"
        raise LearnerError(cause, field=FIELD, fix=FIX) from problem


def each(algorithm: object, method: str, made: Iterable[T]) -> Iterator[T]:
    """What a method yields, which may fail on the way."""
    with calling(algorithm, method):
        yield from made


def wrong_result(algorithm: object, method: str, got: str, wanted: str) -> LearnerError:
    """The error for a method that returned something else than it must, with the line where it begins."""
    code = getattr(getattr(type(algorithm), method, None), "__code__", None)
    where = f"\n  in {code.co_filename}, line {code.co_firstlineno}" if code and not _is_library(code.co_filename) else ""
    cause = f"{type(algorithm).__name__}.{method} returned {got} instead of {wanted}{where}"
    return LearnerError(cause, field=FIELD, fix="correct what it returns, then `onlinerl resume`")


def said(problem: BaseException) -> str:
    """Type and message."""
    return "".join(traceback.format_exception_only(problem)).strip()


def line(problem: BaseException) -> str:
    """Where in the user's code it was raised; empty if in none of it. A SyntaxError says so itself."""
    own = [frame for frame in traceback.extract_tb(problem.__traceback__) if not _is_library(frame.filename)]
    return f"\n  in {own[-1].filename}, line {own[-1].lineno}: {own[-1].line}" if own else ""


def on_import(problem: BaseException) -> str:
    """What an import raised, and where: type and message, then at most three lines, each a file, a line and its statement. The first is that of
    the module that was asked for, the last the one to blame."""
    frames = [
        (f.filename, f.lineno, f.line) for f in traceback.extract_tb(problem.__traceback__) if not _is_library(f.filename)
    ]
    words = said(problem)
    if isinstance(problem, SyntaxError) and problem.filename:  # raised by the compiler, which has no frame in that file
        words = f"{type(problem).__name__}: {problem.msg}"
        frames.append((problem.filename, problem.lineno, problem.text))
    shown = frames if len(frames) <= LINES else [frames[0], *frames[1 - LINES :]]
    return words + "".join(f"\n  in {file}, line {number}: {(text or '').strip()}" for file, number, text in shown)


def _is_library(file: str) -> bool:
    return file.startswith(("<frozen", os.path.dirname(os.__file__), os.path.dirname(__file__))) or "site-packages" in file
