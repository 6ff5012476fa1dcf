"""Random groups, items and a policy of free log-probs, for what every algorithm must hold to."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from matrix_oracle import Referee
from torch import Tensor
from torch.nn.functional import pad

from onlinerl import registry
from onlinerl.batch import Batch, Outputs
from onlinerl.learners._whole_step import first_pass, state_metrics
from onlinerl.ops import whole_step
from onlinerl.ops.batching import collate
from onlinerl.ops.whole_step import WholeStep
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.needs import Needs
from onlinerl.types import Group, Judged, Pair, Prompt, Query, Rollout, Sampling, TrainItem, TrainSequence, Verdict

GOLDEN = Path(__file__).parents[1] / "unit" / "algorithms"


def build(name: str, knobs: dict) -> Algorithm:
    return registry.load("algorithms", name, Algorithm)(**knobs)


def golden(name: str) -> ModuleType:
    """The test file of an algorithm, which brings what no contract can know: values worked out by hand, and how its knobs are set.

    test_value_by_hand    the loss of a few tokens
    at_reference(items)   the mean loss where policy, old policy, reference and engine agree, with the first of the variants
    VARIANTS              knobs that the contracts are tried with
    stops_gradients       optional: whether this loss holds a term constant on purpose; its docstring names the term, for the table in docs/
    KNOBS                 by knob: which others are set with it, and a value that must change something
    """
    file = GOLDEN / f"test_{name}.py"
    assert file.is_file(), (
        f"{name} has no golden test: write {file.relative_to(GOLDEN.parents[2])} (see `golden` for what it holds)"
    )
    return importlib.import_module(file.stem)


def variants(name: str) -> list[dict]:
    """What the contracts are tried with: of an algorithm without a golden test, which is a failure of its own, the defaults."""
    return golden(name).VARIANTS if (GOLDEN / f"test_{name}.py").is_file() else [{}]


def holds_constants(name: str, algorithm: Algorithm) -> bool:
    """Whether its golden test says that it does, with these knobs."""
    own = golden(name) if (GOLDEN / f"test_{name}.py").is_file() else None
    return own is not None and hasattr(own, "stops_gradients") and own.stops_gradients(algorithm)


def sources(algorithm: Algorithm) -> tuple[str, ...]:
    """Where the last responses of each group are from: those that the algorithm asks for beside the policy's."""
    return algorithm.needs.beside_samples


def also_scored(verdict: Verdict, needs: Needs, K: int) -> Verdict:
    """The same with the other scores that an algorithm asks for."""
    rng = np.random.default_rng(K)
    return dataclasses.replace(verdict, components={name: tuple(rng.standard_normal(K).tolist()) for name in needs.components})


def group(
    rng: np.random.Generator, number: int, kind: str, K: int = 4, sources: tuple[str, ...] = (), needs: Needs | None = None
) -> Judged:
    """A group of K random responses of 1 to 6 tokens, judged by scores only, by a matrix only (one order, both, gaps) or by an oracle
    that compares and leaves one response out, and by the other scores that are asked for. The last responses are from `sources`."""
    own = (*["policy"] * (K - len(sources)), *sources)
    rollouts = tuple(
        Rollout(
            token_ids=(k, *rng.integers(10, 99, rng.integers(0, 6)).tolist()),
            logprobs=(),
            text="",
            finish_reason="length" if rng.random() < 0.2 else "stop",
            policy_version=1,
            sampler=Sampling(),
            seed=k,
            source=own[k],
        )
        for k in range(K)
    )
    rollouts = tuple(dataclasses.replace(r, logprobs=tuple(-rng.random(len(r.token_ids)) - 0.1)) for r in rollouts)
    if kind == "oracle":
        texts = ["dull", *("a" * k + "b" * int(rng.integers(1, 4)) for k in rng.integers(0, 4, K - 1))]
        (verdict,) = Referee().ask([Query(prompt=Prompt(id="", text="", token_ids=(1,)), responses=tuple(texts))])
    elif kind == "scores":
        verdict = Verdict(annotator="t", oracle_version="1", scores=tuple(rng.standard_normal(K).tolist()))
    else:
        matrix = rng.random((K, K))
        np.fill_diagonal(matrix, np.nan)
        matrix[0, 1] = np.nan  # asked in one order only
        verdict = Verdict(annotator="t", oracle_version="1", preferences=tuple(map(tuple, matrix.tolist())))
    nats = math.log(2) * np.random.default_rng(number).random((K, K))
    verdict = dataclasses.replace(verdict, uncertainty=tuple(map(tuple, ((nats + nats.T) / 2).tolist())))
    token_ids = tuple(rng.integers(1, 9, rng.integers(1, 5)).tolist())
    goal_ids = tuple((goal, *token_ids) for goal in range(1, 11))
    prompt = Prompt(id=f"p{number}", text="", token_ids=token_ids, goal_ids=goal_ids, answer_ids=(100, 101 + number, 2))
    verdict = also_scored(verdict, needs or Needs(), K)
    return Judged(group=Group(prompt=prompt, rollouts=rollouts), verdict=verdict)


def refereed(texts: list[str], sources: tuple[str, ...] = (), needs: Needs | None = None) -> Judged:
    """A group judged by an oracle that compares, and leaves some cells and some responses out. "b", and then "ba", are from `sources`."""
    own = dict(zip(("b", "ba"), sources, strict=False))
    rollouts = tuple(
        Rollout(
            token_ids=tuple(text.encode()),
            logprobs=(-0.5,) * len(text),
            text=text,
            finish_reason="stop",
            policy_version=1,
            sampler=Sampling(),
            seed=k,
            source=own.get(text, "policy"),
        )
        for k, text in enumerate(texts)
    )
    prompt = Prompt(id="p", text="", token_ids=(1, 2), goal_ids=tuple((7, goal) for goal in range(1, 11)), answer_ids=(100, 2))
    (verdict,) = Referee().ask([Query(prompt=prompt, responses=tuple(texts))])
    # By text: a response that nobody judged has no part in it.
    named = {name: tuple(float(len(text) + text.count("a")) for text in texts) for name in (needs or Needs()).components}
    verdict = dataclasses.replace(verdict, components=named)
    return Judged(group=Group(prompt=prompt, rollouts=rollouts), verdict=verdict)


def trained(algorithm: Algorithm, judged: Judged, pairs: list[Pair]) -> tuple[set[tuple], dict[str, int]]:
    """What reaches a loss of every item of a group, without what the learner fills in; and what was left out."""
    items, dropped = algorithm.items(judged, pairs)
    described = {
        (
            item.prob,
            *(
                (bytes(s.response_ids), s.score, s.win_rate, None if s.advantages is None else tuple(s.advantages))
                for s in item.sequences
            ),
        )
        for item in items
    }
    return described, dict(dropped)


def pairs_of(judged: Judged) -> list[Pair]:
    probs, K = judged.verdict.matrix(), len(judged.group.rollouts)
    cells = [(i, j) for i in range(K) for j in range(K) if i != j and probs[i, j] > 0.5]
    return [Pair(chosen=i, rejected=j, prob=float(probs[i, j])) for i, j in cells]


def sampled(s: TrainSequence) -> np.ndarray:
    """What the engine says of a response; of a stored answer, which it did not sample, -1 per token."""
    return np.full(len(s.response_ids), -1.0) if s.behavior_logprobs is None else s.behavior_logprobs


def annotated_items(algorithm: Algorithm, kind: str = "scores", *, at_reference: bool = False) -> list[TrainItem]:
    """Items with what `needs` asks for filled in and nothing else: what `prepare` and `figures` get."""
    rng = np.random.default_rng(5)
    needs = algorithm.needs

    def fill(s: TrainSequence) -> TrainSequence:
        def draw() -> np.ndarray:
            near = sampled(s) if at_reference else sampled(s) + 0.3 * rng.standard_normal(len(s.response_ids))
            return near.astype(np.float32)

        return s.with_(
            old_logprobs=draw() if needs.old_logprobs else None,
            reference_logprobs=draw() if needs.reference_logprobs else None,
            anchor_logprobs=draw() if needs.anchor else None,
            values=rng.standard_normal(len(s.response_ids)).astype(np.float32) if needs.values else None,
        )

    judged = [group(rng, number, kind, sources=sources(algorithm), needs=needs) for number in range(5)]
    items = [item for j in judged for item in algorithm.items(j, pairs_of(j) if needs.pairs else [])[0]]
    filled = [dataclasses.replace(item, sequences=tuple(fill(s) for s in item.sequences)) for item in items]
    if not needs.ches:
        return filled
    drawn = np.random.default_rng(6).standard_normal((len(filled), 2)).astype(np.float32)
    firsts = [item.sequences[0].with_(ches=ches) for item, ches in zip(filled, drawn, strict=True)]
    return [dataclasses.replace(i, sequences=(first, *i.sequences[1:])) for i, first in zip(filled, firsts, strict=True)]


def selected(algorithm: Algorithm, items: list[TrainItem]) -> list[TrainItem]:
    """Those that are left when everything is known about them."""
    return [items[place] for place in algorithm.select(items)[0]]


def training_items(algorithm: Algorithm, kind: str = "scores", *, at_reference: bool = False) -> list[TrainItem]:
    """What reaches the learner in the first iteration."""
    return list(algorithm.prepare(selected(algorithm, annotated_items(algorithm, kind, at_reference=at_reference))))


class Policy:
    """What a learner computes of every sequence as fp64 leaves, so that gradients can be compared sequence by sequence."""

    COLUMNS = ("logprobs_BT", "values_BT", "entropy_BT", "collision_BT", "reference_kl_BT")

    def __init__(self, items: list[TrainItem], *, at_reference: bool = False) -> None:
        rng, more = np.random.default_rng(9), np.random.default_rng(10)
        self.sequences = [s for item in items for s in item.sequences]
        # Weights are kept per occurrence, since one response may be part of several pairs.
        self.index = {id(s): n for n, s in enumerate(self.sequences)}
        self.leaves = []
        for s in self.sequences:
            T = len(s.response_ids)
            logprobs = sampled(s) if at_reference else sampled(s) + 0.3 * rng.standard_normal(T)
            values = np.zeros(T) if s.values is None else s.values + (0.0 if at_reference else 0.3 * rng.standard_normal(T))
            collisions, kls = -0.5 - more.random(T), (0.0 if at_reference else 1.0) * more.random(T)
            columns = (logprobs, values, rng.random(T), collisions, kls)
            self.leaves += [torch.tensor(x, dtype=torch.float64).requires_grad_() for x in columns]

    def moved(self, step: Tensor) -> Policy:
        """The same policy with all leaves, one after the other, moved by `step`."""
        other = copy.copy(self)
        parts = torch.split(step, [len(leaf) for leaf in self.leaves])
        other.leaves = [(leaf.detach() + part).requires_grad_() for leaf, part in zip(self.leaves, parts, strict=True)]
        return other

    def outputs(self, rows: list[TrainSequence], batch: Batch, junk: float = math.nan) -> Outputs:
        """The outputs for a batch whose rows are these sequences; `junk` is what padding holds."""
        width = batch.mask_BT.shape[1]
        columns = {}
        for part, name in enumerate(self.COLUMNS):
            leaves = [self.leaves[len(self.COLUMNS) * self.index[id(s)] + part] for s in rows]
            padded = [pad(x, (0, width - len(x)), value=junk) for x in leaves or [torch.zeros(0, dtype=torch.float64)]]
            columns[name] = torch.stack(padded)
        return Outputs(**columns)

    def gradient(self, algorithm: Algorithm, micros: list[list[TrainItem]], *, extra: int = 0, junk: float = math.nan):
        """(mean loss, gradient of every leaf, metrics) of an optimizer step made of these micro-batches."""
        total, metrics, units = torch.zeros((), dtype=torch.float64), {}, 0
        batches = [widen(collate(micro), extra) for micro in micros]
        needs = algorithm.needs
        undeclared = {f"{name}_BT": None for name in ("collision", "reference_kl") if not getattr(needs, name)}
        outputs = [
            dataclasses.replace(self.outputs([s for item in micro for s in item.sequences], batch, junk), **undeclared)
            for micro, batch in zip(micros, batches, strict=True)
        ]
        if isinstance(algorithm, WholeStep):
            given = iter(outputs)
            state = algorithm.initial_state()
            batches, state = first_pass(algorithm, batches, lambda _: next(given), lambda own: ([own], 0), state)
            metrics |= {name: (value, 1.0) for name, value in state_metrics(algorithm, state).items()}
        for micro, batch, output in zip(micros, batches, outputs, strict=True):
            out = algorithm.loss(output, batch)
            total = total + out.total
            units += sum(item.count(algorithm.unit) for item in micro)
            for name, mean in out.metrics.items():
                a, b = metrics.get(name, (0.0, 0.0))
                metrics[name] = (a + float(mean.total), b + float(mean.count))
        gradients = torch.autograd.grad(total / units, self.leaves, allow_unused=True)
        flat = torch.cat([torch.zeros_like(x) if g is None else g for g, x in zip(gradients, self.leaves, strict=True)])
        return (total / units).item(), flat, metrics


class Constants:
    """What a loss holds constant: every result of `Tensor.detach` while it is computed.

    They are recorded the first time, and each later evaluation gets them back in the same order, wherever its own point is. So values of
    the loss move as its gradient says: those of z of `kto` or of the other response's ratio of `p3o` stay where they were.

    Not those of `ops/whole_step.py`, which detaches to carry numbers from one pass to the next: what is made of them has a gradient.
    A loss that holds something constant in another way (`no_grad`, `item` of what was not detached) gives values that move.
    """

    def __init__(self) -> None:
        self._found: list[Tensor] | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """While this is open, a loss gets the constants of the first time it was."""
        plain: Callable[[Tensor], Tensor] = Tensor.detach
        recorded: list[Tensor] = []
        left = None if self._found is None else iter(self._found)

        def detach(tensor: Tensor) -> Tensor:
            if sys._getframe(1).f_code.co_filename == whole_step.__file__:
                return plain(tensor)
            constant = plain(tensor).clone() if left is None else next(left)
            assert constant.shape == tensor.shape, "the loss does not take the same steps wherever it is computed"
            recorded.append(constant)
            return constant

        Tensor.detach = detach  # type: ignore[method-assign]
        try:
            yield
        finally:
            Tensor.detach = plain  # type: ignore[method-assign]
        self._found = recorded


def widen(batch: Batch, extra: int) -> Batch:
    """The same batch with `extra` more padded positions per row."""
    changes = {
        f.name: pad(value, (0, extra))
        for f in dataclasses.fields(batch)
        if f.name.endswith(("_BT", "_BS")) and (value := getattr(batch, f.name)) is not None
    }
    return dataclasses.replace(batch, **changes)
