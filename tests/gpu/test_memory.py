"""That an engine which sleeps and a learner which leaves really give a GPU's memory back, and go on as if nothing had been."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onlinerl.config import TrainingConfig
from onlinerl.types import Prompt, Request, Sampling, TrainItem, TrainSequence

pytestmark = [pytest.mark.engine, pytest.mark.gpus(1), pytest.mark.timeout(300)]

Record = Callable[[str, object], None]
MIB = 2**20


def test_an_engine_sleeps_and_wakes(gpu_model: Path, record_property: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from onlinerl.engines.vllm import VLLM, VLLMReplica
    from onlinerl.protocols.engine import ReplicaSettings
    from onlinerl.transports.ipc import Ipc

    config = VLLM(dtype="bfloat16", enforce_eager=True, max_num_seqs=16, gpu_memory_utilization=0.5)
    for name, value in {**config.environment(), **Ipc().environment()}.items():
        monkeypatch.setenv(name, value)

    def free() -> int:
        return torch.cuda.mem_get_info()[0]

    async def turns() -> None:
        before = free()
        settings = ReplicaSettings(device="cuda", colocated=True, max_model_len=64, transport=Ipc(), seed=0)
        replica = VLLMReplica(str(gpu_model), config, settings)
        try:
            request = Request(prompt=Prompt(id="p", text="", token_ids=(3, 4, 5)), seeds=(1, 2))
            sampling = Sampling(temperature=0.0, max_new_tokens=8)
            awake, first = free(), await replica.generate(request, sampling)
            for tags in (None, ["weights"]):
                await replica.sleep()
                asleep = free()
                assert asleep - awake > 0.9 * (before - awake) - 1024 * MIB, "sleeping gave little memory back"
                await replica.wake_up(tags)
                if tags is not None:
                    weights = free()
                    await replica.wake_up(["kv_cache"])
                    assert weights - free() > 256 * MIB, "the KV cache was there before it was asked for"
                again = await replica.generate(request, sampling)
                assert [r.token_ids for r in again.rollouts] == [r.token_ids for r in first.rollouts]
            record_property("awake_gib", f"{(before - awake) / 2**30:.1f}")
            record_property("asleep_gib", f"{(before - asleep) / 2**30:.1f}")
        finally:
            await replica.shutdown()

    asyncio.run(turns())


def test_a_zero_3_learner_leaves_and_returns(gpu_model: Path, record_property: Record) -> None:
    import torch
    from torch.distributed import TCPStore

    from onlinerl.algorithms.dpo import Dpo
    from onlinerl.learners.deepspeed import DeepSpeed
    from onlinerl.protocols.learner import RankSettings

    settings = RankSettings(
        model=str(gpu_model),
        algorithm=Dpo(),
        training=TrainingConfig(learning_rate=1e-4),
        world_size=1,
        device="cuda",
        temperature=1.0,
        seed=0,
    )
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rank = DeepSpeed(zero_stage=3, dtype="bfloat16").rank(settings, rank=0, store=store, address="127.0.0.1")
    zeros = np.zeros(3, np.float32)
    chosen, rejected = (
        TrainSequence(prompt_ids=(3, 4), response_ids=r, reference_logprobs=zeros) for r in ((5, 6, 7), (8, 9, 10))
    )
    items = [TrainItem(prompt_id="p", sequences=(chosen, rejected))]

    first = rank.step([items], 1, 1e-4)
    assert first["skipped"] == 0
    assert np.isfinite(first["loss"])
    scores = rank.logprobs([[chosen, rejected]], "policy", 1.0)
    loaded = torch.cuda.memory_allocated()
    rank.offload("optimizer")
    pushing = torch.cuda.memory_allocated()
    rank.offload("all")
    left = torch.cuda.memory_allocated()
    rank.reload()

    record_property("loaded_mib", loaded // MIB)
    record_property("pushing_mib", pushing // MIB)
    record_property("left_mib", left // MIB)
    assert left < 0.1 * loaded
    assert left < pushing < 0.5 * loaded
    again = rank.logprobs([[chosen, rejected]], "policy", 1.0)
    for ours, theirs in zip(again[0], scores[0], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert rank.step([items], 1, 1e-4)["loss"] < first["loss"]
    rank.shutdown()
