"""One score from several oracles: a weighted sum, or another way to combine them, with gates. Each score is kept beside it by name, for
algorithms that read several (`constrained`).

Sources: "Arithmetic Control of LLMs for Diverse User Preferences: Directional Preference Alignment with Multi-Objective Rewards" (arXiv
2402.18571), equation 2, for the weighted sum and `direction`; "ALaRM: Align Language Models via Hierarchical Rewards Modeling" (arXiv 2403.06754) for
`hierarchical`; "BalancedDPO" (arXiv 2503.12575) for `vote`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from onlinerl.errors import ConfigError
from onlinerl.oracles._combining import Combined, unjudged, votes
from onlinerl.oracles._inner import cost_of, failed, replies_of, verdicts, words
from onlinerl.types import Failure, Query, Verdict
from onlinerl.types.directions import Directions

Combine = Literal["sum", "product", "min", "softmin", "hierarchical", "vote", "direction"]
DIRECTION_TEXT = "You are a helpful assistant. Your response should maximize weighted rating = {direction}."


class Composite(Combined):
    """Combines the scores of its members."""

    weights: dict[str, float] = Field(default_factory=dict)
    """By member, 1 by default. A negative one is of a score that should be low; with 0 a member is asked and kept by name, no more."""
    combine: Combine = "sum"
    """`sum` of weight times score; `min` of them; `softmin`, a soft one; `product` of the scores; `hierarchical`: `holistic` alone where it
    is below `holistic_above`, else the sum; `vote`: no score, but for each pair the weighted share of members that prefer one response;
    `direction`: the sum with weights that are drawn for each prompt, and that the prompt says, so that one model learns all of them."""
    softmin_temperature: float | None = Field(None, gt=0)
    """Of `softmin`, in units of the score: -t log mean exp(-x / t). Towards 0 it is the minimum, and the mean where it is large."""
    holistic: str | None = None
    """Of `hierarchical`, the member that comes before the others."""
    holistic_above: float | None = None
    """Of `hierarchical`, the scaled score of `holistic` (see `means`) from which on the others count; 0.5 in the paper."""
    direction_bounds: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Of `direction`, by member, between what its weight is drawn, [0, 1] by default. The squares of all weights have the sum 1. The paper has
    {helpful: [0.707, 1], verbose: [-0.707, 0.707]}."""
    direction_text: str | None = None
    """Of `direction`, what a prompt says, with {direction} where the weights go, in hundredths as `helpful*80 - verbose*60`. By default
    "You are a helpful assistant. Your response should maximize weighted rating = {direction}."."""
    direction_place: Literal["system", "user"] | None = None
    """Of `direction`: in a system turn of a conversation (the default), or before its last user turn. A text that is continued begins with it."""
    direction_seed: int = 0
    """Of `direction`: with another seed each prompt gets another one."""
    gates: dict[str, float] = Field(default_factory=dict)
    """By member, the least score, as it gave it, without which a response gets `gated_score`: {format: 1.0} puts format before all else."""
    gated_score: float | None = None
    """What a response gets that does not pass a gate. Choose one below what those that pass can get."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        own = {"softmin_temperature": "softmin", "holistic": "hierarchical", "holistic_above": "hierarchical"}
        for key, combine in own.items():
            if (getattr(self, key) is not None) != (self.combine == combine):
                cause = (
                    f"belongs to combine={combine}"
                    if self.combine != combine
                    else f"is missing, and combine={combine} reads it"
                )
                raise ConfigError(cause, field=f"oracle.{key}", fix="leave it out" if self.combine != combine else "set it")
        if self.holistic is not None and self.holistic not in self.members:
            raise ConfigError(
                f"{self.holistic!r} is no member", field="oracle.holistic", fix=f"name one of {', '.join(self.members)}"
            )
        if self.combine == "product" and self.weights:
            cause = "of a product change its scale and nothing else"
            raise ConfigError(cause, field="oracle.weights", fix="leave them out, or choose another oracle.combine")
        if bool(self.gates) != (self.gated_score is not None):
            field, fix = ("gated_score", "set it") if self.gates else ("gates", "set them, or leave oracle.gated_score out")
            raise ConfigError("is missing: gates and gated_score go together", field=f"oracle.{field}", fix=fix)
        if self.combine == "vote":
            self._no_scores()
        self._check_directions()
        if not any(self.weights.get(name, 1.0) for name in self.members):
            raise ConfigError("are all 0, so nothing is judged", field="oracle.weights", fix="give one member a weight")
        return self

    def _no_scores(self) -> None:
        for key in ("gates", "means", "stds"):
            if getattr(self, key):
                raise ConfigError("is of scores, and combine=vote reads none", field=f"oracle.{key}", fix="leave it out")

    def _check_directions(self) -> None:
        if self.combine != "direction":
            for key in ("direction_bounds", "direction_text", "direction_place", "direction_seed"):
                if getattr(self, key):
                    raise ConfigError("belongs to combine=direction", field=f"oracle.{key}", fix="leave it out")
            return
        if self.weights:
            raise ConfigError("are drawn for each prompt", field="oracle.weights", fix="set oracle.direction_bounds instead")
        if len(self.members) < 2:
            raise ConfigError("is one, which has one direction", field="oracle.members", fix="name two or more")
        if self.direction_text is not None and "{direction}" not in self.direction_text:
            cause = "does not say the direction"
            raise ConfigError(cause, field="oracle.direction_text", fix="write {direction} where the weights go")
        for name, (low, high) in self.direction_bounds.items():
            if not -1 <= low < high <= 1:
                cause, fix = f"of {name} are {low:g} and {high:g}", "give two numbers from -1 to 1, the lower one first"
                raise ConfigError(cause, field="oracle.direction_bounds", fix=fix)
        try:
            self._directions.of("")
        except ValueError as error:
            raise ConfigError(str(error), field="oracle.direction_bounds", fix="widen them") from None

    @property
    def _directions(self) -> Directions:
        return Directions(
            bounds={name: self.direction_bounds.get(name, (0.0, 1.0)) for name in self.members},
            text=self.direction_text or DIRECTION_TEXT,
            place=self.direction_place or "system",
            seed=self.direction_seed,
        )

    @property
    def directions(self) -> Directions | None:
        """Those that each prompt says, with `combine=direction`."""
        return self._directions if self.combine == "direction" else None

    @property
    def remarks(self) -> Sequence[str]:
        """And what whoever uses the model must know."""
        if self.directions is None:
            return super().remarks
        said = "the policy is sampled and evaluated with a direction in its prompts; an exported model expects one too, e.g."
        return [*super().remarks, f"{said} {self.directions.said('')!r}"]

    @property
    def _by_member(self) -> tuple[str, ...]:
        return ("means", "stds", "weights", "gates", "direction_bounds")

    @property
    def _what(self) -> str:
        return f"combine={self.combine}"

    @property
    def compares(self) -> bool:
        """Where members vote."""
        return self.combine == "vote"

    @property
    def gives_uncertainty(self) -> bool:
        """Its members judge different things: that they differ says nothing of how sure any of them is."""
        return False

    @property
    def version(self) -> str:
        """Hash of the members' versions and of how they are combined."""
        own = self.model_dump(include={"weights", "combine", "gates", "gated_score", "means", "stds"} | {*_OF_ONE})
        if self.combine == "direction":
            own |= self.model_dump(include={"direction_bounds", "direction_seed"})
        return self._version(**own)

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        """One Verdict per query, in order, with the members' scores as components; a Failure where one of them failed.

        Raises:
            OracleError: if a member only compares, and scores are needed.
        """
        version = self.version if queries else ""
        answers = zip(queries, self._ask_all(queries), strict=True)
        return [failed(said) or self._verdict(query.prompt.id, verdicts(said), version) for query, said in answers]

    def _verdict(self, prompt_id: str, said: Mapping[str, Verdict], version: str) -> Verdict:
        known: dict[str, Any] = {"annotator": "composite", "oracle_version": version, "raw": words(said)}
        known |= {"cost": cost_of(said), "replies": replies_of(said)}
        components = self._components(said)
        if self.combine == "vote":
            shares = votes({name: verdict.matrix() for name, verdict in said.items()}, self.weights)
            kept = {name: values for name, values in components.items() if np.isfinite(values).all()}
            return Verdict(preferences=tuple(map(tuple, shares.tolist())), components=kept or None, **known)
        weights = self.weights
        if self.combine == "direction":
            weights = self._directions.of(prompt_id)
            known["raw"] = "\n".join([f"direction: {self._directions.words(prompt_id)}", *filter(None, [known["raw"]])])
        scores = self._combined(self._scaled(said), weights)
        for name, least in self.gates.items():
            given = np.asarray(said[name].scores, np.float64)
            scores = np.where(given < least, float(self.gated_score or 0.0), scores)
        # A response that one member has not judged is not judged, whatever the others say.
        scores = np.where(np.any([np.isnan(values) for values in components.values()], axis=0), np.nan, scores)
        return Verdict(scores=tuple(scores.tolist()), unjudged=unjudged(scores), components=components, **known)

    def _combined(self, scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
        """One score of each response, f64[K], from the scaled ones of each member and their weights, 1 by default."""
        if self.combine == "product":
            product: np.ndarray = np.prod(list(scores.values()), axis=0)
            return product
        weighted = {name: weight * scores[name] for name in scores if (weight := weights.get(name, 1.0))}
        total: np.ndarray
        if self.combine == "min":
            total = np.min(list(weighted.values()), axis=0)
        elif self.combine == "softmin":
            t = self.softmin_temperature or 1.0
            lowest = np.min(list(weighted.values()), axis=0)
            total = lowest - t * np.log(np.mean([np.exp((lowest - x) / t) for x in weighted.values()], axis=0))
        elif self.combine == "hierarchical":
            first = scores[str(self.holistic)]
            others = sum((x for name, x in weighted.items() if name != self.holistic), np.zeros_like(first))
            total = weights.get(str(self.holistic), 1.0) * first + np.where(first < (self.holistic_above or 0.0), 0.0, others)
        else:
            total = np.sum(list(weighted.values()), axis=0)
        return total


_OF_ONE = ("softmin_temperature", "holistic", "holistic_above")
