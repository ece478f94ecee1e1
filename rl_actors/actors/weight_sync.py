"""Weights from learner to engine through vLLM's weight-transfer API, complete for GPT-OSS.

vLLM's layerwise reload leaves GPT-OSS experts and attention sinks at their old values without raising: the model
copies them with `param.copy_()` while the parameters sit on the meta device, so the copy vanishes. On CPU the experts
are prepacked too. `ObjectStoreTransferEngine` reloads everything the stock way and then writes those tensors itself.
Nothing here is trusted: `publish` proves after every publish that the engine computes what the learner does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "seatrial_object_store"


@dataclass
class ObjectStoreInitInfo(WeightTransferInitInfo):
    """Nothing to set up: tensors arrive by reference from the Ray object store."""


@dataclass
class ObjectStoreUpdateInfo(WeightTransferUpdateInfo):
    """One chunk of checkpoint-format weights, by Hugging Face parameter name."""

    named_tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


class ObjectStoreTransferEngine(WeightTransferEngine[ObjectStoreInitInfo, ObjectStoreUpdateInfo]):
    """Receives whole-model weights and loads them into this worker's model, GPT-OSS experts and sinks included."""

    init_info_cls = ObjectStoreInitInfo
    update_info_cls = ObjectStoreUpdateInfo

    def init_transfer_engine(self, init_info: ObjectStoreInitInfo) -> None:
        """Keep nothing; the API asks for the method."""

    def start_weight_update(self) -> None:
        """Put the layers on the meta device, as vLLM's own engines do."""
        self._vanishing: dict[str, torch.Tensor] = {}
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ObjectStoreUpdateInfo) -> None:
        """Load one chunk and remember what the stock path would lose."""
        named = dict(update_info.named_tensors)
        self._vanishing.update({name: tensor for name, tensor in named.items() if _vanishes(name)})
        self.model.load_weights(iter(named.items()))  # pyright: ignore[reportCallIssue]

    def finish_weight_update(self) -> None:
        """Finish the layerwise reload, then write what it lost."""
        finalize_layerwise_reload(self.model, self.model_config)
        with torch.no_grad():
            for index, layer in _gpt_oss_layers(self.model):
                write_gpt_oss_layer(layer, index, self._vanishing)
        self._vanishing = {}

    def shutdown(self) -> None:
        """Hold nothing, release nothing."""


def _vanishes(name: str) -> bool:
    """Return True for the GPT-OSS tensors that vLLM's layerwise reload drops."""
    return name.endswith(".sinks") or ".mlp.experts." in name


def _gpt_oss_layers(model: torch.nn.Module) -> Iterator[tuple[int, Any]]:
    """Yield (index, layer) of a GPT-OSS model; nothing for any other architecture."""
    layers = getattr(getattr(model, "model", None), "layers", ())
    for index, layer in enumerate(layers):
        if hasattr(getattr(layer, "attn", None), "sinks"):
            yield index, layer


def write_gpt_oss_layer(layer: Any, index: int, weights: Mapping[str, torch.Tensor]) -> None:
    """Write sinks, expert weights and biases of one layer in the layout the kernels read.

    Checkpoint layout: gate_up_proj [E, H, 2I], down_proj [E, I, H]; kernels read the last two axes transposed, and the
    CPU kernels read them prepacked for their instruction set.

    Raises:
        KeyError: A tensor of this layer was not published.
    """
    prefix = f"model.layers.{index}."
    layer.attn.sinks.data.copy_(weights[prefix + "self_attn.sinks"])
    experts = layer.mlp.experts.routed_experts
    for source, target in (("gate_up_proj", "w13"), ("down_proj", "w2")):
        weight = weights[f"{prefix}mlp.experts.{source}"].permute(0, 2, 1).contiguous()
        destination = getattr(experts, f"{target}_weight").data
        destination.copy_(_kernel_layout(experts, weight.to(destination.dtype)))
        getattr(experts, f"{target}_bias").data.copy_(weights[f"{prefix}mlp.experts.{source}_bias"])


def _kernel_layout(experts: Any, weight: torch.Tensor) -> torch.Tensor:
    """Return expert weights as this platform's kernels store them."""
    kernel = getattr(getattr(experts.quant_method, "moe_kernel", None), "fused_experts", None)
    isa = getattr(kernel, "isa", None)
    if isa is None:
        return weight
    from vllm._custom_ops import cpu_prepack_moe_weight  # CPU builds only

    return cpu_prepack_moe_weight(weight, isa)


def register_transfer_engine() -> None:
    """Make the backend known to vLLM in this process; harmless when it already is."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, ObjectStoreTransferEngine)
