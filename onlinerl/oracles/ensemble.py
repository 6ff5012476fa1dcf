"""Several oracles that judge the same thing: their mean, or a careful one, and how far they disagree.

Sources: "Reward Model Ensembles Help Mitigate Overoptimization" (arXiv 2310.02743), section 3, for the mean, the worst case and the mean less
a share of the spread; "Self-Evolutionary Large Language Models through Uncertainty-Enhanced Preference Optimization" for the uncertainty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from onlinerl.errors import ConfigError
from onlinerl.oracles import _verdicts
from onlinerl.oracles._combining import Combined, unjudged, votes
from onlinerl.oracles._inner import cost_of, failed, replies_of, verdicts, words
from onlinerl.types import Failure, Query, Verdict
from onlinerl.types.labels import induced


class Ensemble(Combined):
    """Combines members that judge the same thing. `std`, beside the members' own scores, is how far they are apart on each response."""

    combine: Literal["mean", "min", "lcb", "vote"] = "mean"
    """`mean` of the scores, or of the preferences where a member only compares; `min`, the worst of the scores; `lcb`, the mean less
    `lcb_coef` standard deviations; `vote`: no score, but for each pair the share of members that prefer one response."""
    lcb_coef: float | None = Field(None, gt=0)
    """Of `lcb`; 1 is usual."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.members) < 2:
            raise ConfigError("are one, which cannot disagree with itself", field="oracle.members", fix="give two or more")
        if "std" in self.members:
            cause = "'std' is how the spread of the members is called"
            raise ConfigError(cause, field="oracle.members", fix="choose another name")
        if (self.lcb_coef is not None) != (self.combine == "lcb"):
            cause = "is missing" if self.combine == "lcb" else "belongs to combine=lcb"
            raise ConfigError(
                cause, field="oracle.lcb_coef", fix="set it, e.g. to 1" if self.combine == "lcb" else "leave it out"
            )
        return self

    @property
    def _what(self) -> str:
        return f"combine={self.combine}"

    @property
    def compares(self) -> bool | None:
        """Where members vote, or one of those whose mean is taken only compares."""
        if self.combine in ("min", "lcb"):
            return False
        said = [each.compares for each in self.members.values()]
        return True if self.combine == "vote" or True in said else None if None in said else False

    @property
    def gives_uncertainty(self) -> bool:
        """Of its members."""
        return True

    @property
    def components(self) -> tuple[str, ...]:
        """The members' scores, and how far they are apart."""
        return (*super().components, "std")

    @property
    def version(self) -> str:
        """Hash of the members' versions and of how they are combined."""
        own = {"combine", "lcb_coef", "means", "stds"} | ({"preference_temperature"} if self.stds else set())
        return self._version(**self.model_dump(include=own))

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        """One Verdict per query, in order, with the members' scores as components; a Failure where one of them failed.

        Raises:
            OracleError: if a member only compares, and scores are needed.
        """
        version = self.version if queries else ""
        return [failed(said) or self._verdict(verdicts(said), version) for said in self._ask_all(queries)]

    def _verdict(self, said: Mapping[str, Verdict], version: str) -> Verdict:
        matrices = {name: self._matrix(name, verdict) for name, verdict in said.items()}
        known: dict[str, Any] = {
            "annotator": "ensemble",
            "oracle_version": version,
            "uncertainty": _verdicts.nats_of(list(matrices.values())),
            "raw": words(said),
            "cost": cost_of(said),
            "replies": replies_of(said),
        }
        components = self._components(said)
        compares = any(verdict.scores is None for verdict in said.values())
        if self.combine == "vote" or (compares and self.combine == "mean"):
            together = votes(matrices) if self.combine == "vote" else np.mean(list(matrices.values()), axis=0)
            np.fill_diagonal(together, np.nan)
            kept = {name: values for name, values in components.items() if np.isfinite(values).all()}
            return Verdict(preferences=tuple(map(tuple, together.tolist())), components=kept or None, **known)
        scaled = np.stack(list(self._scaled(said).values()))
        mean, std = scaled.mean(axis=0), scaled.std(axis=0)
        scores = {"mean": mean, "min": scaled.min(axis=0), "lcb": mean - (self.lcb_coef or 0.0) * std}[self.combine]
        components["std"] = tuple(std.tolist())
        return Verdict(scores=tuple(scores.tolist()), unjudged=unjudged(scores), components=components, **known)

    def _matrix(self, name: str, verdict: Verdict) -> np.ndarray:
        """P[i, j] of a member; of one with a scale of its own that was given, at the ensemble's temperature on the common scale."""
        if name in self.stds and verdict.scores is not None and verdict.preferences is None:
            scaled = self._scaled({name: verdict})[name]
            return induced(tuple(scaled.tolist()), self.preference_temperature)
        return verdict.matrix()
