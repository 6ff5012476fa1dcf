"""Makes the probabilities of another oracle true: fitted on pairs of which it is known which response is better.

Sources: "On Calibration of Modern Neural Networks" (arXiv 1706.04599), section 4.2, for temperature and Platt scaling; "On Diversified
Preferences of Large Language Model Alignment" (arXiv 2312.07401) for reward models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
from pydantic import Field, PrivateAttr

from onlinerl.errors import OracleError
from onlinerl.ops import calibration
from onlinerl.ops.calibration import Fit
from onlinerl.oracles._inner import Inner, OnBase, failed, keep, kept, total
from onlinerl.oracles._known_pairs import KnownPair, located, read
from onlinerl.types import Cost, Failure, Query, Verdict

FEW = 2000
"""Below so many pairs the calibration error is mostly noise."""
LEAST = 50
FILE = "calibration.json"


class Calibrated(OnBase):
    """What another oracle says, with preferences that are right as often as they say. Scores stay as they are, and so does their order.

    `base` is asked about all pairs of `data` when it is opened; the fit is kept with the run, so a resume does not ask again.
    """

    base: Inner
    """The oracle whose preferences are calibrated."""
    data: str = Field(description="FILE.jsonl", examples=["anchors.jsonl"])
    """JSON lines of pairs that nothing is trained on: `prompt` (a text, or messages), `chosen`, `rejected`; perhaps `p`, how probable it is
    that the chosen one is better (1 by default), and `reference_answer`. Two thousand or more say something."""
    method: Literal["temperature", "platt"] = "temperature"
    """`temperature`: log-odds are divided by one number. `platt`: another one is added, for what the place of a response does to the
    verdict of a judge that is asked in one order; in both orders it cancels."""

    _fit: Fit | None = PrivateAttr(None)
    _report: str = PrivateAttr("")
    _folder: Path | None = PrivateAttr(None)
    _said: dict[str, Any] | None = PrivateAttr(None)
    _paid: Cost = PrivateAttr(default_factory=Cost)

    def located(self, folders: Sequence[Path]) -> Self:
        """With the absolute path of its data."""
        return super().located(folders).model_copy(update={"data": located(self.data, "oracle.data", folders)})

    def recall(self, folder: Path) -> None:
        """Look there for the fit."""
        super().recall(folder)
        self._folder = folder

    def remember(self, folder: Path) -> None:
        """Keep the fit there, one that is known already too.

        Raises:
            OracleError: if the disk does not take it.
        """
        super().remember(folder)
        self._folder = folder
        if self._said is not None:
            keep(folder / FILE, self._said)

    def open(self) -> None:
        """Open `base` and fit, unless this run has done so. Idempotent; `judge` calls it too.

        Raises:
            OracleError: if the pairs cannot be read, `base` fails on many of them, or is wrong about most.
        """
        super().open()
        if self._fit is not None:
            return
        pairs, digest = read(self.data, "oracle.data")
        if len(pairs) < LEAST:
            fix = f"give {FEW} or more, {LEAST} at least"
            raise OracleError(f"{self.data} holds {len(pairs)} pairs", field="oracle.data", fix=fix)
        identity = {"base": self.base.version, "data": digest, "method": self.method}
        file = None if self._folder is None else self._folder / FILE
        said = None if file is None else kept(file)
        if said is None or said["of"] != identity:
            said = {"of": identity, **self._fitted(pairs)}
            if file is not None:
                keep(file, said)
        self._said = said
        self._fit, self._report = Fit(**said["fit"]), said["report"]

    @property
    def remarks(self) -> Sequence[str]:
        """What the fit has found, and how good it is."""
        return [*([self._report] if self._report else []), *super().remarks]

    @property
    def opening_cost(self) -> Cost:
        """Of the verdicts about the pairs, and what `base` asks for itself."""
        return super().opening_cost.plus(self._paid)

    @property
    def version(self) -> str:
        """Hash of that of `base` and of the fit."""
        self.open()
        assert self._fit is not None
        return self._version(method=self.method, **asdict(self._fit))

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        """One result per query, in order; a Failure where `base` failed."""
        version = self.version if queries else ""
        asked = self._ask("base", queries)
        return [failed({"base": said}) or self._calibrated(cast(Verdict, said), version) for said in asked]

    def _calibrated(self, verdict: Verdict, version: str) -> Verdict:
        assert self._fit is not None
        known = {"annotator": f"calibrated:{verdict.annotator}", "oracle_version": version}
        if len(verdict.matrix()) < 2:  # there is nothing to compare
            return replace(verdict, annotator=known["annotator"], oracle_version=version)
        odds = self._fit.slope * cells(verdict) + self._fit.intercept
        with np.errstate(over="ignore"):
            probs = 1 / (1 + np.exp(-odds))
        return replace(
            verdict,
            annotator=known["annotator"],
            oracle_version=version,
            preferences=tuple(map(tuple, probs.tolist())),
            log_odds=tuple(map(tuple, odds.tolist())),
        )

    def _fitted(self, pairs: Sequence[KnownPair]) -> dict[str, Any]:
        """Ask about the pairs, and fit."""
        said = self._ask("base", [Query(prompt=each.prompt, responses=(each.chosen, each.rejected)) for each in pairs])
        self._paid = total(one.cost for one in said)
        judged = [(one, each.prob) for one, each in zip(said, pairs, strict=True) if isinstance(one, Verdict)]
        known = [(cells(one), p) for one, p in judged if not np.isnan(one.matrix()[0, 1])]
        if len(known) < 0.9 * len(pairs) or len(known) < LEAST:
            first = next((one.message for one in said if isinstance(one, Failure)), "it gave no preference")
            raise OracleError(
                f"was judged for {len(known)} of {len(pairs)} pairs; first: {first}",
                field="oracle.data",
                fix="repair oracle.base",
            )
        odds = np.array([each for each, _ in known])  # [n, 2, 2]
        outcomes = np.array([p for _, p in known])
        both = _symmetric(odds[:, 0, 1], odds[:, 1, 0])
        if self.method == "temperature":
            fit = calibration.fit(both, outcomes, intercept=False)
        else:
            shown, won = np.concatenate([odds[:, 0, 1], odds[:, 1, 0]]), np.concatenate([outcomes, 1 - outcomes])
            asked = ~np.isnan(shown)
            fit = calibration.fit(shown[asked], won[asked], intercept=True)
        if not fit.slope > 1e-6:
            raise OracleError(
                f"is wrong about most of the {len(known)} pairs of {self.data}, so no temperature makes its probabilities true",
                field="oracle.base",
                fix="choose another oracle, or look whether `chosen` and `rejected` have changed places",
            )
        after = _symmetric(*(fit.slope * each + fit.intercept for each in (odds[:, 0, 1], odds[:, 1, 0])))
        return {"fit": asdict(fit), "report": _report(fit, self.method, both, after, outcomes)}


def cells(verdict: Verdict) -> np.ndarray:
    """Log-odds f64[K, K] as returned, the first response shown first; NaN on the diagonal and where it was not asked."""
    if verdict.log_odds is not None:
        odds = np.asarray(verdict.log_odds, np.float64) / verdict.temperature
    elif verdict.preferences is not None:
        odds = calibration.logit(np.asarray(verdict.preferences, np.float64))
    else:
        scores = np.asarray(verdict.scores, np.float64)
        odds = (scores[:, None] - scores[None, :]) / verdict.temperature
    odds = odds.copy()
    np.fill_diagonal(odds, np.nan)
    return odds


def _symmetric(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Log-odds that the first beats the second, from either order or both; f64[n]."""
    return np.where(np.isnan(one), -other, np.where(np.isnan(other), one, (one - other) / 2))


def _report(fit: Fit, method: str, before: np.ndarray, after: np.ndarray, outcomes: np.ndarray) -> str:
    probs = [1 / (1 + np.exp(-np.clip(odds, -700, 700))) for odds in (before, after)]
    said = [calibration.predictions(p, outcomes) for p in probs]
    errors = [calibration.calibration_error(*each) for each in said]
    floor, high = calibration.noise_floor(said[1][0])
    numbers = f"temperature {1 / fit.slope:.3g}" + (f", intercept {fit.intercept:.3g}" if method == "platt" else "")
    few = "" if len(outcomes) >= FEW else f"; fewer than {FEW} pairs say little"
    return (
        f"calibrated on {len(outcomes)} pairs: {numbers}; calibration error {errors[0]:.3f} before, {errors[1]:.3f} after "
        f"(noise of so many pairs: {floor:.3f}, 95th percentile {high:.3f}){few}"
    )
