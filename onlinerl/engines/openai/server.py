"""`vllm serve`, as one replica starts it for itself; run as a module it is the server's own process, which ends with its parent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from onlinerl import serving
from onlinerl.engines import _fit, _vllm
from onlinerl.processes import die_with_parent
from onlinerl.protocols.engine import Place, ReplicaSettings

if TYPE_CHECKING:
    from onlinerl.engines.openai import OpenAI

MODEL = "policy"
"""What the server calls its model."""


class OwnServer(serving.Server):
    """That of one replica.

    Args:
        model: directory of the base model.
        config: the engine section.
        places: where all replicas run.
        index: of this one.
        settings: what else it is told.
    """

    def __init__(self, model: str, config: OpenAI, places: Sequence[Place], index: int, settings: ReplicaSettings) -> None:
        if settings.device == "cpu":
            _vllm.prepare_cpu(config, _fit.share_cores(places, index, config))
        super().__init__(options(model, config, settings))


def options(model: str, config: OpenAI, settings: ReplicaSettings) -> dict[str, Any]:
    """What the server is told: all that a replica's process would be."""
    return {**_vllm.arguments(model, config, settings), "served_model_name": MODEL}


def main() -> None:
    """Serve."""
    die_with_parent()
    # Not the command `vllm` itself: it asks for the version of a package of that name, and vLLM for CPUs has another.
    from vllm.entrypoints.launchers.api_server import entry

    entry.main()


if __name__ == "__main__":
    main()
