"""Makes an oracle worse in a way that is known, to see what an algorithm makes of it.

Each draw follows from the seed, the prompt and the texts alone: the same question always gets the same answer, in every order of the
responses, after a resume and in another iteration.

Sources: "Provably Robust DPO: Aligning Language Models with Noisy Feedback" (arXiv 2403.00409), equation 3, for flips; "Models of human
preference for learning reward functions" (arXiv 2206.02231) for choices that are drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Literal, Self, cast

import numpy as np
from pydantic import Field, model_validator

from onlinerl.errors import ConfigError
from onlinerl.oracles._inner import Container, Inner, failed
from onlinerl.types import Failure, Query, Verdict, derive_seed
from onlinerl.types.directions import Directions

_OF_PAIRS = ("flip_rate", "choice_temperature", "sampled", "position_bias", "length_bias", "tie_band")


class Noisy(Container):
    """What another oracle says, with noise. Noise on pairs makes it an oracle that only compares, in both orders of each pair; its
    verdict without the noise is kept in `raw`."""

    base: Inner
    """The oracle that is asked: {name: sentiment}."""
    seed: int = 0
    score_noise: float = Field(0.0, ge=0)
    """Standard deviation of what is added to each score."""
    choice_temperature: float | None = Field(None, gt=0)
    """Log-odds of each preference are divided by this: above 1, better and worse are told apart less."""
    length_bias: float = 0.0
    """Log-odds for each word that a response has more than the other."""
    sampled: bool = False
    """Whether a comparison is one choice, drawn with the probability that the oracle gives, instead of that probability."""
    flip_rate: float = Field(0.0, ge=0, le=1)
    """How probable it is that a comparison is turned round."""
    scope: Literal["pair", "call"] = "pair"
    """Whether choices and flips are drawn once for a pair, or for each of its two orders."""
    position_bias: float = Field(0.0, ge=-1, le=1)
    """What is added to the probability that the response shown first wins."""
    tie_band: float = Field(0.0, ge=0, le=0.5)
    """Probabilities nearer to 1/2 than this become 1/2."""

    @model_validator(mode="after")
    def _noisy(self) -> Self:
        if not self.score_noise and not self._of_pairs:
            keys = ", ".join(("score_noise", *_OF_PAIRS))
            raise ConfigError("has no noise", field="oracle", fix=f"set one of {keys}, or name the oracle in `base` alone")
        return self

    @property
    def _of_pairs(self) -> bool:
        return any(getattr(self, key) for key in _OF_PAIRS)

    @property
    def components(self) -> tuple[str, ...]:
        """None: other scores of `base` would be without noise."""
        return ()

    @property
    def compares(self) -> bool | None:
        """With noise on pairs, and where `base` does."""
        return self._of_pairs or self.base.compares

    @property
    def gives_uncertainty(self) -> bool:
        """Never: it would be that of `base`, without noise."""
        return False

    @property
    def directions(self) -> Directions | None:
        """Those of `base`."""
        return self.base.directions

    @property
    def version(self) -> str:
        """Hash of that of `base` and of the noise."""
        return self._version(**self.model_dump(include={"seed", "score_noise", "scope", *_OF_PAIRS}))

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        """One result per query, in order; a Failure where `base` failed."""
        version = self.version if queries else ""
        asked = zip(queries, self._ask("base", queries), strict=True)
        return [failed({"base": said}) or self._worse(query, cast(Verdict, said), version) for query, said in asked]

    def _worse(self, query: Query, clean: Verdict, version: str) -> Verdict | Failure:
        said = replace(
            clean,
            annotator=f"noisy:{clean.annotator}",
            oracle_version=version,
            components=None,
            uncertainty=None,
            strength=None,
        )
        if self.score_noise:
            if clean.scores is None:
                return Failure(kind="error", message="base only compares, and score_noise is of scores", cost=clean.cost)
            texts = [(query.prompt.id, response) for response in query.responses]
            noise = [self.score_noise * NormalDist().inv_cdf(self._draw("score", *text)) for text in texts]
            scores = tuple(score + more for score, more in zip(clean.scores, noise, strict=True))
            said = replace(said, scores=scores, preferences=None, log_odds=None)
        if self._of_pairs:
            cells = self._cells(query, said.matrix())
            said = replace(said, scores=None, unjudged=(), preferences=cells, log_odds=None, on_disagree="average")
        note = json.dumps({"without_noise": np.round(clean.matrix(), 4).tolist()})
        return replace(said, raw="\n".join(filter(None, (note, clean.raw))))

    def _cells(self, query: Query, clean: np.ndarray) -> tuple[tuple[float, ...], ...]:
        """[K][K], each cell with the first response shown first."""
        k = range(len(query.responses))
        return tuple(tuple(math.nan if i == j else self._cell(query, i, j, float(clean[i, j])) for j in k) for i in k)

    def _cell(self, query: Query, i: int, j: int, p: float) -> float:
        first, second = query.responses[i], query.responses[j]
        if math.isnan(p):
            return p
        if self.choice_temperature is not None or self.length_bias:
            odds = _logit(p) / (self.choice_temperature or 1.0)
            p = _sigmoid(odds + self.length_bias * (len(first.split()) - len(second.split())))
        pair = (first, second) if self.scope == "call" else tuple(sorted((first, second)))
        if self.sampled and first != second:
            low, wins = (p, 1.0) if (first, second) == pair else (1.0 - p, 0.0)  # of the pair as it is drawn
            p = wins if self._draw("choice", query.prompt.id, *pair) < low else 1.0 - wins
        if self._draw("flip", query.prompt.id, *pair) < self.flip_rate:
            p = 1.0 - p
        p = min(1.0, max(0.0, p + self.position_bias))
        return 0.5 if abs(p - 0.5) < self.tie_band else p

    def _draw(self, *about: str) -> float:
        """Between 0 and 1, neither of them."""
        return (derive_seed("noisy", self.seed, *map(ascii, about)) + 0.5) / 2**31


def _logit(p: float) -> float:
    p = min(1 - 1e-12, max(1e-12, p))
    return math.log(p / (1 - p))


def _sigmoid(odds: float) -> float:
    return 1 / (1 + math.exp(-max(-700.0, min(700.0, odds))))
