"""What combining several oracles has in common: their scores on one scale, and their names in the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from onlinerl.errors import ConfigError, OracleError
from onlinerl.oracles._inner import Container, Members
from onlinerl.types import Verdict


class Combined(Container):
    """Base of oracles that make one verdict of those of several members."""

    members: Members
    """The oracles, each by a name of its own: {correct: {name: math_verifier}, helpful: {name: reward_model, path: ...}}."""
    means: dict[str, float] = Field(default_factory=dict)
    """By member, what is subtracted from its scores, 0 by default: their mean on a fixed set, such as the base model's answers."""
    stds: dict[str, float] = Field(default_factory=dict)
    """By member, what its scores are divided by after that, 1 by default: their standard deviation on the same set."""

    @model_validator(mode="after")
    def _known_members(self) -> Self:
        for key in self._by_member:
            if unknown := sorted(getattr(self, key).keys() - self.members.keys()):
                raise ConfigError(
                    f"names {unknown[0]!r}, which is no member",
                    field=f"oracle.{key}",
                    fix=f"name one of {', '.join(self.members)}",
                )
        if wrong := [name for name, std in self.stds.items() if not std > 0]:
            raise ConfigError(f"of {wrong[0]} is {self.stds[wrong[0]]:g}", field="oracle.stds", fix="give a number above 0")
        return self

    @property
    def _by_member(self) -> tuple[str, ...]:
        """Keys that say something of each member."""
        return ("means", "stds")

    def _scaled(self, said: Mapping[str, Verdict]) -> dict[str, np.ndarray]:
        """(score - mean) / std of each member, f64[K]; NaN where it was asked and did not say.

        Raises:
            OracleError: if one only compares.
        """
        for name, verdict in said.items():
            if verdict.scores is None:
                raise OracleError(
                    f"{name} only compares responses, and {self._what} needs scores of each",
                    field=f"oracle.members.{name}",
                    fix="set oracle.combine=vote, or choose an oracle that scores",
                )
        return {
            name: (np.asarray(verdict.scores, np.float64) - self.means.get(name, 0.0)) / self.stds.get(name, 1.0)
            for name, verdict in said.items()
        }

    @property
    def _what(self) -> str:
        raise NotImplementedError

    def _components(self, said: Mapping[str, Verdict]) -> dict[str, tuple[float, ...]]:
        """Every score that the members gave, as they gave it, by name: a member's own score by the member's name, others after it.

        Raises:
            OracleError: if two have one name.
        """
        found: dict[str, tuple[float, ...]] = {}
        for name, verdict in said.items():
            own = {} if verdict.scores is None else {name: verdict.scores}
            inner = {f"{name}_{key}": tuple(values) for key, values in (verdict.components or {}).items()}
            if twice := sorted(found.keys() & {**own, **inner}.keys()):
                raise OracleError(
                    f"two scores are called {twice[0]}", field="oracle.members", fix="give the members other names"
                )
            found |= {**own, **inner}
        return found

    @property
    def components(self) -> tuple[str, ...]:
        """The members, and what they are known to give beside their score."""
        inner = (f"{name}_{key}" for name, each in self.members.items() for key in each.components or ())
        return (*self.members, *inner)


def unjudged(scores: np.ndarray) -> tuple[int, ...]:
    """Responses without a score."""
    return tuple(np.flatnonzero(np.isnan(scores)).tolist())


def votes(matrices: Mapping[str, np.ndarray], weights: Mapping[str, float] = MappingProxyType({})) -> np.ndarray:
    """f64[K, K], the weighted share of members that prefer i to j, a tie being half; NaN on the diagonal and where none says.

    Args:
        matrices: P[i, j] of each member, f64[K, K].
        weights: 1 by default; with a negative one a member's preferences are turned round.
    """
    wins = total = np.zeros(())
    for name, probs in matrices.items():
        weight, asked = weights.get(name, 1.0), ~np.isnan(probs)
        own = np.where(probs == 0.5, 0.5, (probs > 0.5) == (weight > 0))
        wins, total = wins + abs(weight) * np.where(asked, own, 0.0), total + abs(weight) * asked
    with np.errstate(invalid="ignore"):
        shares: np.ndarray = wins / total
    np.fill_diagonal(shares, np.nan)
    return shares
