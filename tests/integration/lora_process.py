"""One rank of a real learner with adapters; started as `rank_process.py` is.

python lora_process.py JOB RANK WORLD_SIZE PORT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import rank_process
import torch
from rank_process import WEIGHTS, Ranks, array, innermost, moments, optimizer_tensors, scored, weights

from onlinerl.learners._rank import Rank
from onlinerl.types import TrainItem


def adapters(learner: Rank) -> WEIGHTS:
    """The trained ones of the language model, whole, by the names of peft's files. Collective."""
    assert learner._adapters is not None
    return {n: array(t) for n, t in learner._source(learner._policy.model, torch.float32, learner._adapters.exported())}


def everything_trained(learner: Rank) -> WEIGHTS:
    """By parameter name, a critic's too. Collective."""
    found = {}
    for name, parameter in learner._policy.named_parameters():
        if parameter.requires_grad:
            with learner._gathered([parameter]):
                found[name] = array(parameter)
    return found


def moved(ranks: Ranks, learner: Rank, items: list[TrainItem], budget: int = 60) -> Rank:
    """After two steps, so that no adapter is zero any more."""
    for _ in range(2):
        ranks.step(learner, items, budget, lr=1e-2)
    return learner


def given_away(learner: Rank, items: list[TrainItem], models: list[str]) -> dict[str, Any]:
    """Memory that is given away and taken back."""

    def scores() -> list[list[np.ndarray]]:
        return [scored(learner, items, name, 1.0) for name in ("policy", *models)]

    before, state = scores(), optimizer_tensors(learner)
    found: dict[str, Any] = {"merged": weights(learner)}
    learner.offload("optimizer")
    found["merged without moments"] = weights(learner)
    found["moments left"] = [tensor.untyped_storage().nbytes() for _, tensor in moments(learner)]
    learner.offload("all")
    found["kept"] = sum(tensor.numel() for tensor in learner._host_memory.contents())
    learner.reload()
    found["scores"] = dict(zip(("policy", *models), zip(before, scores(), strict=True), strict=True))
    return found | {"state": [state, optimizer_tensors(learner)]}


def lora(ranks: Ranks, job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Scores, steps, gradients, an export, a checkpoint."""
    model, items = job["model"], job["items"]

    def made(algorithm: Any = None, **more: Any) -> Rank:
        lora = {**job["lora"], **more}
        kind = {"stage": case["stage"], "dtype": case["dtype"]}
        own = {"lora": lora, "padding_free": case.get("padding_free", False)}
        return ranks.learner(model, algorithm or job["algorithm"], **kind, learner=own)

    learner = made()
    found: dict[str, Any] = {
        "begun": [scored(learner, items, "policy", 1.0), scored(learner, items, model, 1.0)],
        "base": {name: array(tensor) for name, tensor in learner.weight_source(torch.float32, model)},
    }
    moved(ranks, learner, items)
    found["base after"] = {name: array(tensor) for name, tensor in learner.weight_source(torch.float32, model)}
    found["adapters"], found["merged"] = adapters(learner), weights(learner)
    found["scores"] = {name: scored(learner, items, where, 1.0) for name, where in (("policy", "policy"), ("base", model))}
    found["optimized"] = sum(state["exp_avg"].numel() for state in innermost(learner).state.values() if state)
    for name, loss in job["losses"].items():
        learner.algorithm, learner.needs = loss["algorithm"], loss["algorithm"].needs
        found["gradients", name] = learner.gradients(ranks.mine(loss["items"], 60), len(loss["items"]))
    found["gradients", "again"] = learner.gradients(ranks.mine(loss["items"], 60), len(loss["items"]))
    learner.algorithm, learner.needs = job["algorithm"], job["algorithm"].needs

    rows = "packed" if case.get("padding_free") else "padded"
    here = Path(job["directory"]) / f"{ranks.world_size}-{case['stage']}-{case['dtype']}-{rows}"
    export, older, newer = (str(here / name) for name in ("export", "older", "newer"))
    for folder in (export, older, newer, here / "checkpoint"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    learner.export(export, model)
    learner.save(older)
    moved(ranks, learner, items)
    found["scores"]["later"] = scored(learner, items, "policy", 1.0)
    found["scores"]["of the export"] = scored(learner, items, export, 1.0)
    found["scores"]["still"] = scored(learner, items, "policy", 1.0)
    learner.algorithm = job["beside"]["algorithm"]
    learner.needs = learner.algorithm.needs
    for name, where in (("base", model), ("export", export)):
        learner.set_reference(where)
        found["beside", name] = learner.gradients(ranks.mine(job["beside"]["items"], 60), len(job["beside"]["items"]))
    found["later"] = adapters(learner)
    draws, sampling, weight = job["mixture"]
    for name, where in (("base", model), ("export", export)):
        (found["mixed", name],) = learner.sample_mixture([draws], sampling, where, weight, [2])
    learner.save(newer)
    for name in (older, newer):
        learner.load(name)
        found[Path(name).name] = scored(learner, items, "policy", 1.0)
    found["export beside the newer"] = scored(learner, items, export, 1.0)
    found["away"] = given_away(learner, items, [model, export])
    found["second model"] = learner._reader.kept is not None

    # With dropout, which a resume repeats.
    learner = moved(ranks, made(dropout=0.3), items)
    found["written"] = learner.save(str(here / "checkpoint"))
    found["without dropout"] = [scored(learner, items, "policy", 1.0) for _ in range(2)]
    found["saved"] = everything_trained(learner)
    metrics = ranks.step(learner, items, 60)
    found["continued"] = [metrics, everything_trained(learner), scored(learner, items, "policy", 1.0)]
    learner.load(str(here / "checkpoint"))
    found["loaded"] = everything_trained(learner)
    found["loaded continued"] = [ranks.step(learner, items, 60), everything_trained(learner)]
    fresh = made(dropout=0.3)
    fresh.load(str(here / "checkpoint"))
    found["fresh continued"] = [ranks.step(fresh, items, 60), everything_trained(fresh), scored(fresh, items, "policy", 1.0)]
    found["with other masks"] = ranks.step(learner, items, 60)
    found["here"] = str(here)
    return found


def critic(ranks: Ranks, job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """A separate critic has adapters too, and a head that is trained whole."""
    loss = job["critic"]
    keys = {"lora": job["lora"], "gradient_checkpointing": case["stage"] == 3}
    learner = ranks.learner(job["model"], loss["algorithm"], stage=case["stage"], dtype=case["dtype"], learner=keys)
    moved(ranks, learner, loss["items"], 60)
    found: dict[str, Any] = {"trained": everything_trained(learner)}
    found["gradients"] = learner.gradients(ranks.mine(loss["items"], 60), len(loss["items"]))
    here = Path(job["directory"]) / f"critic-{ranks.world_size}-{case['stage']}"
    here.mkdir(exist_ok=True)
    learner.save(str(here))
    fresh = ranks.learner(job["model"], loss["algorithm"], stage=case["stage"], dtype=case["dtype"], learner=keys)
    fresh.load(str(here))
    sequences = [[s for item in loss["items"] for s in item.sequences]]
    found["resumed"] = all(map(np.array_equal, learner.values(sequences)[0], fresh.values(sequences)[0]))
    return found


rank_process.KINDS |= {"lora": lora, "critic": critic}

if __name__ == "__main__":
    rank_process.main(*sys.argv[1:])
