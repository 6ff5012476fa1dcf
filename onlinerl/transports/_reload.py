"""What vLLM needs before and after new weights are loaded into a model that is there."""

from __future__ import annotations

from typing import Any

from torch import nn


def begin(model: nn.Module) -> None:
    """Prepare vLLM's layer-by-layer reload."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    initialize_layerwise_reload(model)
    # On CPU the kernel of a mixture of experts computes with packed matrices. vLLM packs them when it builds the kernel, and
    # builds it once: new matrices would be taken for packed ones. Without its kernel, a layer builds it anew when they arrive.
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def finish(model: nn.Module, model_config: Any) -> None:
    """Finish the reload."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)
    # On CPU an output matrix is packed into a copy. A tied one gets no weights of its own, so the reload leaves its copy as it
    # was, and the model would go on computing its logits with the matrix it started with.
    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding):
            layer.quant_method.process_weights_after_loading(layer)
