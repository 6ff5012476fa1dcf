"""What the last push delivered, and the proof that a replica holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from onlinerl.cluster.replica import Replica, TokenPair, outcomes
from onlinerl.errors import OnlineRLError, SyncError
from onlinerl.protocols.engine import EngineReplica
from onlinerl.transports import _proof as proof


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """A version, and all that a replica is compared with to prove that it holds it. Any replica, at any later time."""

    version: int
    digests: Mapping[str, str]
    """Checksums of the tensors that were checked, as the learner held them."""
    canary: Sequence[TokenPair]
    logprobs: Sequence[np.ndarray]
    """The learner's, of the canary."""
    tolerance: float
    """Of the canary, in nats per token."""

    def prove(
        self, replicas: Sequence[Replica], left: Callable[[], float], *, known: bool = True
    ) -> tuple[float, dict[str, OnlineRLError]]:
        """Ask them for all three witnesses.

        Args:
            replicas: who must hold it.
            left: seconds until the deadline.
            known: whether the weights came under the learner's names; a base model on disk may have names of its own, and then
                those that both have are compared.

        Returns:
            The largest gap on the canary, and by name of a replica what it could not prove.
        """
        failed: dict[str, OnlineRLError] = {}
        worst = 0.0

        def ask(what: str, question: Callable[[Replica], Future[Any]], check: Callable[[str, Any], float | None]) -> None:
            nonlocal worst
            futures = {r.name: question(r) for r in replicas if r.name not in failed}
            for name, answer in outcomes(futures, left(), SyncError, what).items():
                try:
                    if isinstance(answer, OnlineRLError):
                        raise answer
                    worst = max(worst, check(name, answer) or 0.0)
                except OnlineRLError as error:
                    failed[name] = error

        ask(
            "saying its version",
            lambda r: r.call(EngineReplica.weight_version),
            lambda name, got: proof.check_version(self.version, [got], [name]),
        )
        ask(
            "saying what it received",
            lambda r: r.call(EngineReplica.received),
            lambda name, got: self._check_digests(name, got, known=known),
        )
        ask("log-probs of the canary", lambda r: r.logprobs(self.canary), self.check_canary)
        return worst, failed

    def check_canary(self, name: str, logprobs: Sequence[np.ndarray]) -> float:
        """The gap between the learner's log-probs of the canary and those of a replica.

        Raises:
            SyncError: if it is too large.
        """
        return proof.check_canary(self.logprobs, [logprobs], [name], self.tolerance)

    def _check_digests(self, name: str, got: Mapping[str, str], *, known: bool) -> None:
        sent = self.digests if known else {n: value for n, value in self.digests.items() if n in got}
        if not sent:
            raise SyncError(
                f"{name}: none of the tensors that the push checked is in the files that it was given",
                field="engine.max_restarts",
                fix="this model has other names on disk: `onlinerl resume` sends the weights from the learner",
            )
        proof.check_digests(sent, [got], [name])
