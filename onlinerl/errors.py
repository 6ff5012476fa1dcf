"""One exception per boundary.

Every message says what was wrong (the field), why (the cause) and what to do (the fix). `OnlineRLError.__str__` lays the three
out the same way everywhere, so a user who has read one has read them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class OnlineRLError(Exception):
    """Base of every error that onlinerl raises on purpose.

    Args:
        cause: what is wrong, in one sentence.
        field: the dotted configuration key or the object concerned, if there is one.
        fix: what the user can do about it.
        also: what is wrong beside it, where that was found at the same time.
    """

    boundary = "onlinerl"
    started = False
    """True if a run was under way; otherwise nothing had been started."""

    def __init__(
        self, cause: str, *, field: str | None = None, fix: str | None = None, also: Sequence[OnlineRLError] = ()
    ) -> None:
        super().__init__(cause, field, fix)
        self.cause, self.field, self.fix, self.also = cause, field, fix, tuple(also)

    def __str__(self) -> str:
        head = f"{self.field}: {self.cause}" if self.field else self.cause
        return "\n".join([f"{head}\n  fix: {self.fix}" if self.fix else head, *map(str, self.also)])

    def one_by_one(self) -> list[OnlineRLError]:
        """This problem alone, and each that was found with it."""
        return [type(self)(self.cause, field=self.field, fix=self.fix), *self.also]

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only fields do not survive the default pickling, and errors cross process boundaries.
        return _rebuild, (type(self), self.cause, {"field": self.field, "fix": self.fix, "also": self.also})


def _rebuild(cls: type[OnlineRLError], cause: str, rest: dict[str, Any]) -> OnlineRLError:
    return cls(cause, **rest)


class ConfigError(OnlineRLError):
    """The configuration is not usable as it stands."""

    boundary = "config"


class PromptError(OnlineRLError):
    """A prompt file, a prompt or its rendering is not usable."""

    boundary = "prompts"


class EngineError(OnlineRLError):
    """A rollout engine failed or answered something that may not reach training."""

    boundary = "engine"


class OracleError(OnlineRLError):
    """The oracle cannot judge, or its judgements cannot be trained on."""

    boundary = "oracle"


class BudgetError(OracleError):
    """The next question to the oracle might cost more than the run may still pay. Nothing that was paid for is lost."""

    boundary = "budget"


class LearnerError(OnlineRLError):
    """The learner failed or produced a non-finite number."""

    boundary = "learner"


class LearnerLost(LearnerError):
    """A rank of the learner is gone or says nothing any more, and what it held in memory is lost: this attempt ends, and a resume
    goes on.

    Nothing has to be repaired for that, so it ends with the exit code of a run that was stopped.
    """


class SyncError(OnlineRLError):
    """Weights did not arrive, or could not be proved to have arrived."""

    boundary = "sync"


class StoreError(OnlineRLError):
    """The run directory cannot be written, read or trusted."""

    boundary = "store"


class ClusterError(OnlineRLError):
    """The cluster is too small, out of reach, or lost a member."""

    boundary = "cluster"


class Interrupted(BaseException):
    """SIGINT or SIGTERM asked the run to stop; everything finished so far is on disk.

    Not an Exception: it is raised wherever the process happens to be, and code that handles the errors of an oracle's or a
    template's own code must not take it for one of them.
    """

    exit_code = 75
    """EX_TEMPFAIL: what a launcher puts into the queue again."""

    def __init__(self, cause: str, *, fix: str) -> None:
        super().__init__(cause, fix)
        self.cause, self.fix = cause, fix

    def __str__(self) -> str:
        return f"{self.cause}\n  fix: {self.fix}"
