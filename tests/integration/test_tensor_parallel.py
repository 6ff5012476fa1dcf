"""One real vLLM replica that is split over two workers, and sent weights over gloo."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from engine import CANARY, CLOSE, PROMPT, Replica, Sender, canary, plain, prove, state_of
from transformers import LlamaForCausalLM

from onlinerl.errors import SyncError

pytestmark = pytest.mark.engine

SUPPORT = Path(__file__).resolve().parents[1] / "support"
QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def split(tiny_llama: Path) -> Iterator[Replica]:
    """Its workers can be told to lose or alter what they receive."""
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, {"PYTHONPATH": path}):
        replica = Replica(tiny_llama, worker="faulty_worker.FaultyReceiver", tensor_parallel_size=2)
    yield replica
    replica.close()


@pytest.fixture(scope="module")
def sender(split: Replica) -> Sender:
    return Sender(split)


def plant(split: Replica, rank: int, fault: str, bucket: int = 1) -> None:
    split.wait(split.replica._engine.collective_rpc("plant", args=(rank, fault, bucket)))


def test_both_workers_get_their_part_and_compute_with_it(
    split: Replica, sender: Sender, base: LlamaForCausalLM, other: LlamaForCausalLM
) -> None:
    for version, model in enumerate((base, other, base), start=1):
        sender.push(state_of(model), version)

        prove(split, model, version)
        for (prompt, response), scores in zip(CANARY, canary(split), strict=True):
            np.testing.assert_allclose(scores, plain(model, prompt, response), atol=CLOSE)
        (rollout,) = split.sample(PROMPT, [7]).rollouts
        np.testing.assert_allclose(rollout.logprobs, plain(model, PROMPT, rollout.token_ids), atol=CLOSE)


def test_changed_weights_change_what_is_generated(
    split: Replica, sender: Sender, base: LlamaForCausalLM, other: LlamaForCausalLM
) -> None:
    sender.push(state_of(base), 10)
    before, held = [r.token_ids for r in split.sample(PROMPT, range(8)).rollouts], split.call("held")

    sender.push(state_of(other), 11)
    assert [r.token_ids for r in split.sample(PROMPT, range(8)).rollouts] != before
    sender.push(state_of(base), 12)

    assert [r.token_ids for r in split.sample(PROMPT, range(8)).rollouts] == before
    assert split.call("held") == held
    norm, halved = "model.norm.weight", "model.embed_tokens.weight"
    assert len(held) == 2
    assert held[0][norm] == held[1][norm], "what both need whole"
    assert held[0][halved] != held[1][halved], "what each has a half of"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", ["lose", "flip"])
@pytest.mark.parametrize("bucket", [1, 4])
def test_what_one_worker_misses_or_has_wrong_is_noticed(
    split: Replica, sender: Sender, base: LlamaForCausalLM, other: LlamaForCausalLM, rank: int, fault: str, bucket: int
) -> None:
    sender.push(state_of(base), 20)
    plant(split, rank, fault, bucket)

    sender.push(state_of(other), 21)
    with pytest.raises(SyncError, match="replica 0"):
        prove(split, other, 21, witness="checksums")

    plant(split, rank, "none")
    sender.push(state_of(other), 22)
    prove(split, other, 22)


def test_a_replica_on_gpus_sees_one_for_each_worker() -> None:
    """Ray is told that there are three GPUs; none is touched."""
    import ray

    from onlinerl import config as configuration
    from onlinerl.cluster.runtime import Cluster
    from onlinerl.placement import plan

    overrides = ["engine.tensor_parallel_size=2", "engine.cpus=0", "learner.cpus=0"]
    cluster = Cluster(configuration.load(QUICKSTART, overrides))
    cluster.placements = plan(cluster._config, "cuda")

    class Looks:
        def visible(self) -> str:
            return os.environ["CUDA_VISIBLE_DEVICES"]

    ray.init(address="local", num_gpus=3, num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20)
    try:
        cluster._reserve()
        actors = [ray.remote(Looks).options(**cluster.options(i, {})).remote() for i in range(2)]  # type: ignore[attr-defined]
        learner, replica = ray.get([actor.visible.remote() for actor in actors], timeout=60)
    finally:
        ray.shutdown()
    assert len(replica.split(",")) == 2
    assert sorted([learner, *replica.split(",")]) == ["0", "1", "2"]
