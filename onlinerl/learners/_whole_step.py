"""The first pass of a loss of a whole optimizer step (ops/whole_step.py), and what such a loss keeps from one step to the next."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from onlinerl import users_code
from onlinerl.batch import Batch, Outputs
from onlinerl.errors import LearnerError
from onlinerl.learners._loss import called, shown
from onlinerl.ops.whole_step import Rows, State, WholeStep, differentiated, with_slopes
from onlinerl.protocols.algorithm import Algorithm

FILE = "algorithm.json"
"""Of a checkpoint: the state of the algorithm. JSON writes a float so that reading it gives the very same one."""
Gather = Callable[[list[Rows]], tuple[list[list[Rows]], int]]
"""This rank's rows -> those of every rank, and which of them is this one. Collective."""


def first_pass(
    algorithm: WholeStep, batches: Sequence[Batch], forward: Callable[[Batch], Outputs], gather: Gather, state: State | None
) -> tuple[list[Batch], State | None]:
    """The first pass of one rank.

    Args:
        algorithm: whose loss.
        batches: micro-batches of this rank.
        forward: the policy's forward pass as the loss gets it.
        gather: how ranks exchange rows.
        state: what the step before has left; None of an algorithm that keeps nothing.

    Returns:
        The micro-batches with slopes, and the state that this step leaves if it is taken.

    Raises:
        LearnerError: if a method of the algorithm fails, or returns something else than it must.
    """
    with torch.no_grad():
        own = [_rows(algorithm, forward(batch), batch) for batch in batches]
    ranks, rank = gather(own)
    rows = replace(Rows.together([part for parts in ranks for part in parts]), state=state or {})
    with called(algorithm, "step_loss"):
        loss, slopes_N = differentiated(algorithm, rows)
    start = sum(len(part.values_N) for parts in ranks[:rank] for part in parts)
    filled = with_slopes(batches, own, loss if rank == 0 else torch.zeros_like(loss), slopes_N[start:])
    return filled, None if state is None else _next_state(algorithm, rows, usable=bool(loss.isfinite()))


def _rows(algorithm: WholeStep, outputs: Outputs, batch: Batch) -> Rows:
    with called(algorithm, "values"):
        values_B: object = algorithm.values(outputs, batch)
    if not isinstance(values_B, Tensor) or values_B.shape != batch.weight_B.shape:
        raise users_code.wrong_result(algorithm, "values", shown(values_B), f"a number for each of {len(batch.weight_B)} rows")
    with called(algorithm, "row_weights"):
        weighed = replace(batch, weight_B=algorithm.row_weights(outputs, batch))
    with called(algorithm, "facts"):
        return Rows.of(values_B, algorithm.facts(batch), weighed)


def _next_state(algorithm: WholeStep, rows: Rows, *, usable: bool) -> State:
    """The state after this step; one that is not finite may only come of a loss that is not, whose step is not taken."""
    with called(algorithm, "next_state"), torch.no_grad():
        made: object = algorithm.next_state(rows)
    if not isinstance(made, Mapping) or not all(isinstance(value, float) for value in made.values()):
        raise users_code.wrong_result(algorithm, "next_state", f"{made!r:.80}", "{name: float}")
    if usable and (wrong := [name for name, value in made.items() if not math.isfinite(value)]):
        raise users_code.wrong_result(algorithm, "next_state", f"{wrong[0]} = {made[wrong[0]]}", "finite numbers")
    return dict(made)


def initial_state(algorithm: Algorithm) -> State | None:
    """What the algorithm keeps, before the first step; None if it keeps nothing."""
    state = algorithm.initial_state() if isinstance(algorithm, WholeStep) else None
    return None if state is None else {name: float(value) for name, value in state.items()}


def state_metrics(algorithm: Algorithm, state: State | None) -> dict[str, float]:
    """What is reported of it after a step.

    Raises:
        LearnerError: if the algorithm fails.
    """
    if not isinstance(algorithm, WholeStep) or state is None:
        return {}
    with users_code.calling(algorithm, "state_metrics"):
        return {name: float(value) for name, value in algorithm.state_metrics(state).items()}


def save_state(folder: Path, state: State | None) -> list[Path]:
    """Write it, if there is one, and return the files. All ranks hold the same, so one of them writes."""
    if state is None:
        return []
    (folder / FILE).write_text(json.dumps(dict(state), allow_nan=False))
    return [folder / FILE]


def load_state(folder: Path, algorithm: Algorithm) -> State | None:
    """The reverse of `save_state`.

    Raises:
        LearnerError: if the algorithm keeps something, and the checkpoint does not have it.
    """
    if initial_state(algorithm) is None:
        return None
    if not (folder / FILE).exists():
        raise LearnerError(
            f"{type(algorithm).__name__} keeps a state from step to step, and there is none in {folder}: the checkpoint was written with "
            "another algorithm, or by a version of this one that kept none",
            field="algorithm.name",
            fix="start a new run from the last export (model=...), whose state begins anew",
        )
    return {str(name): float(value) for name, value in json.loads((folder / FILE).read_text()).items()}
