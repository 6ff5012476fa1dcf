"""Weights over NCCL, between GPUs of different processes: vLLM's own transport on both sides.

Rank 0 of the learner is rank 0 of the group and sends; the other ranks only take part in gathering. Each vLLM worker is a member:
those of a replica follow those of the replica before it (`rank_offset`, plus the worker's own rank under tensor parallelism).
"""

from __future__ import annotations

from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo


def init_info(rank: int, address: str, port: int, world_size: int, bucket_bytes: int) -> NCCLTrainerInitInfo:
    """What one learner rank needs to open the group.

    Args:
        rank: of the learner process; 0 sends.
        address: a routable address of the sender's machine.
        port: for the rendezvous, free on that machine.
        world_size: the sender plus all vLLM workers.
        bucket_bytes: size of a message, unless a single tensor is larger; two are in flight.
    """
    return NCCLTrainerInitInfo(
        rank=rank, master_address=address, master_port=port, world_size=world_size, packed_buffer_size_bytes=bucket_bytes
    )
