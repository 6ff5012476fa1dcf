"""What onlinerl adds to a vLLM worker (`worker_extension_cls`): a record of what arrived, and a look at what is there.

The recorder sits where a tensor is handed to the model's own loader, so it works for every transport.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor

from onlinerl.transports import _reload as reload
from onlinerl.transports._proof import digest
from onlinerl.transports.gloo import halves

halves.register()  # the module is imported in the worker process, also where entry points are not installed


class Receiver:
    """Mixed into vLLM's worker class by vLLM; its methods are called through `collective_rpc`."""

    def onlinerl_watch(self, names: list[str]) -> None:
        """From now on, keep the checksum of each of these tensors as it arrives."""
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        watched, seen = set(names), {}
        original = getattr(model, "_onlinerl_load_weights", model.load_weights)

        def load_weights(weights: Iterable[tuple[str, Tensor]]) -> Any:
            def recorded() -> Iterable[tuple[str, Tensor]]:
                for name, tensor in weights:
                    if name in watched:
                        seen[name] = digest(tensor)
                    yield name, tensor

            return original(recorded())

        model._onlinerl_load_weights = original
        model._onlinerl_seen = seen
        model.load_weights = load_weights

    def onlinerl_received(self) -> dict[str, str]:
        """Checksums of the watched tensors that have arrived since `onlinerl_watch`."""
        return dict(getattr(self.model_runner.get_model(), "_onlinerl_seen", {}))  # type: ignore[attr-defined]

    def onlinerl_held(self) -> dict[str, str]:
        """Checksums of every parameter as the model holds it now, under vLLM's own names (fused and repacked as it likes)."""
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        return {name: digest(tensor) for name, tensor in model.named_parameters()}

    def onlinerl_load(self, path: str, dtypes: list[str]) -> None:
        """Load all weights from a model on disk, as if they had been sent: the transport to a replica that was down during a push.

        Args:
            path: directory in Hugging Face format.
            dtypes: through which they go, in this order: the learner's, then that of the wire.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import get_model_loader

        runner = self.model_runner  # type: ignore[attr-defined]
        model = runner.get_model()
        on_disk = copy(runner.model_config)
        on_disk.model, on_disk.model_weights, on_disk.revision = path, "", None

        def as_sent() -> Iterator[tuple[str, Tensor]]:
            loader = get_model_loader(self.vllm_config.load_config)  # type: ignore[attr-defined]
            for name, tensor in loader.get_all_weights(on_disk, model):
                for dtype in dtypes:
                    tensor = tensor.to(getattr(torch, dtype))
                yield name, tensor.to(self.device)  # type: ignore[attr-defined]

        with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
            reload.begin(model)
            model.load_weights(as_sent())
            reload.finish(model, runner.model_config)

    def onlinerl_abandon_update(self) -> None:
        """Close an update that was never finished, so that the next one can start; does nothing if there is none.

        Layers that had not arrived whole are left with whatever they hold: the next update must send everything.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        runner = self.model_runner  # type: ignore[attr-defined]
        model = runner.get_model()
        # vLLM's own flag is lowered by a failed update, but layers still count what had arrived before it failed.
        if any(get_layerwise_info(layer).can_load() for layer in model.modules()):
            with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
                finalize_layerwise_reload(model, runner.model_config)
        self._weight_update_active = False

    def onlinerl_pid(self) -> int:
        """Process id of this worker."""
        import os

        return os.getpid()
