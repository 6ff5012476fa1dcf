"""Policies over so few responses that every expectation is a sum: nothing is sampled, and no optimizer is needed.

A group that a policy samples is replaced by all groups that it could sample, each weighted by its probability.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from onlinerl.batch import Outputs
from onlinerl.ops.batching import collate
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.types import Group, Judged, Pair, Prompt, Rollout, Sampling, TrainItem, TrainSequence, Verdict

Response = tuple[int, ...]
Table = Mapping[Response, Tensor]
"""What a policy says of each response: log-probs of its tokens, f64[T]."""


def judged(responses: Sequence[Response], prompt: str = "p", **verdict: object) -> Judged:
    """A group of these responses, of which several may be the same, judged as given."""
    rollouts = tuple(
        Rollout(
            token_ids=response,
            logprobs=(0.0,) * len(response),
            text=str(response),
            finish_reason="stop",
            policy_version=0,
            sampler=Sampling(),
            seed=seed,
        )
        for seed, response in enumerate(responses)
    )
    group = Group(prompt=Prompt(id=prompt, text="", token_ids=(1,)), rollouts=rollouts)
    return Judged(group=group, verdict=Verdict(annotator="exact", oracle_version="1", **verdict))  # type: ignore[arg-type]


def both_orders(group: Judged) -> list[tuple[Pair, float]]:
    """Every pair of a group in both orders, and how often it is labelled so: P(chosen beats rejected)."""
    matrix, K = group.verdict.matrix(), len(group.group.rollouts)
    cells = [(i, j) for i in range(K) for j in range(K) if i != j]
    return [(Pair(chosen=i, rejected=j, prob=float(matrix[i, j])), float(matrix[i, j])) for i, j in cells]


@dataclasses.dataclass(frozen=True)
class Weighted:
    """Items, and how often each of them is trained."""

    items: list[TrainItem]
    weights: list[float]


def items_of(algorithm: Algorithm, groups: Iterable[tuple[Judged, float]]) -> Weighted:
    """What is trained of these groups, each of which comes up so often. Pairs have both labels, each as often as it is given."""
    made = Weighted([], [])
    for group, often in groups:
        if not algorithm.needs.pairs:
            own = algorithm.items(group, [])[0]
            made.items.extend(own)
            made.weights.extend([often] * len(own))
            continue
        for pair, share in both_orders(group):
            own = algorithm.items(group, [pair])[0]
            made.items.extend(own)
            made.weights.extend([often * share] * len(own))
    return made


def groups_of(
    chances: Mapping[Response, float], K: int, judge: Callable[[Sequence[Response]], dict]
) -> list[tuple[Judged, float]]:
    """All groups of K responses that a policy may give to one prompt, with their probabilities."""
    groups = enumerate(product(chances, repeat=K))
    return [(judged(g, f"p{n}", **judge(g)), float(np.prod([chances[r] for r in g]))) for n, g in groups]


def prepared(algorithm: Algorithm, made: Weighted, **tables: Table) -> list[TrainItem]:
    """The items as they reach the loss, weighted. `tables`: what fills in each field of log-probs, e.g. `reference_logprobs`."""

    def fill(s: TrainSequence) -> TrainSequence:
        rows = {name: table[tuple(s.response_ids)].detach().numpy().astype(np.float32) for name, table in tables.items()}
        return s.with_(**rows)

    filled = [dataclasses.replace(item, sequences=tuple(map(fill, item.sequences))) for item in made.items]
    ready = algorithm.prepare(filled)
    return [dataclasses.replace(i, weight=i.weight * weight) for i, weight in zip(ready, made.weights, strict=True)]


class Loss:
    """The sum that an algorithm makes of some items, as a function of the policy."""

    def __init__(self, algorithm: Algorithm, items: Sequence[TrainItem]) -> None:
        self.algorithm, self.batch = algorithm, collate(items)
        self.responses = [tuple(s.response_ids) for item in items for s in item.sequences]

    def __call__(self, policy: Table, **columns: Table) -> Tensor:
        """Its value, with gradient. `columns`: further outputs of the forward pass, e.g. `values_BT`."""
        outputs = {name: self._rows(table) for name, table in {"logprobs_BT": policy, **columns}.items()}
        return self.algorithm.loss(Outputs(**outputs), self.batch).total

    def _rows(self, table: Table) -> Tensor:
        width = self.batch.mask_BT.shape[1]
        wide = {response: pad(row, (0, width - len(row)), value=float("nan")) for response, row in table.items()}
        return torch.stack([wide[response] for response in self.responses])


class Softmax:
    """A softmax over `V` tokens after every prefix. Token 0 ends a response; so does the `T`-th token, whichever it is."""

    def __init__(self, V: int, T: int, seed: int) -> None:
        prefixes: list[Response] = [p for t in range(T) for p in product(range(1, V), repeat=t)]
        self.places = {prefix: n for n, prefix in enumerate(prefixes)}
        self.responses: list[Response] = [
            (*prefix, token) for prefix in prefixes for token in range(V) if token == 0 or len(prefix) == T - 1
        ]
        drawn = np.random.default_rng(seed).standard_normal((len(prefixes), V))
        self.logits = torch.tensor(drawn, dtype=torch.float64, requires_grad=True)

    def table(self) -> dict[Response, Tensor]:
        """Log-probs of all responses."""
        logprobs = torch.log_softmax(self.logits, dim=1)
        states = {r: [self.places[r[:t]] for t in range(len(r))] for r in self.responses}
        return {r: logprobs[states[r], list(r)] for r in self.responses}

    def chances(self) -> dict[Response, float]:
        """Probabilities of all responses."""
        return {r: row.detach().sum().exp().item() for r, row in self.table().items()}

    def expected(self, value: Callable[[Response, Tensor], Tensor | float]) -> Tensor:
        """The exact mean of `value(response, its log-probs)` over what the policy gives, with gradient."""
        return sum((row.sum().exp() * value(r, row) for r, row in self.table().items()), torch.zeros((), dtype=torch.float64))

    def slope(self, value: Tensor) -> Tensor:
        """The gradient of `value` by the logits."""
        return torch.autograd.grad(value, self.logits)[0]
