"""Low-rank adapters (LoRA, arXiv 2106.09685): small trainable matrices beside frozen ones, by peft.

With W frozen, a projection computes W x + s B A x, s = alpha / rank; B starts at 0, so the first output is the frozen
model's. Turned off, the same weights are the frozen reference: no second model in memory. Engines, the registry and
users never see adapters: what is published and saved is W + s B A under the model's own names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from rl_actors.contracts import BadInputError

TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Projections of attention and of dense MLPs; fused experts have none of these names and stay frozen."""
ALPHA_PER_RANK: Final = 2.0
# peft's names: of an adapter, and of the frozen matrix inside an adapted module.
_NAME: Final = "default"
_BASE: Final = ".base_layer"


def add_adapters(model: nn.Module, rank: int) -> list[str]:
    """Freeze the model and put adapters of this rank beside its projections; returns their module names.

    Raises:
        BadInputError: The model has no projection that could take one.
    """
    # Here, because peft is slow to import, and most recipes train all weights.
    from peft import LoraConfig, inject_adapter_in_model

    parts = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    names = [name for name, _ in parts if name.rpartition(".")[2] in TARGETS]
    if not names:
        raise BadInputError("recipe.lora_rank", rank, f"{type(model).__name__} has none of {', '.join(TARGETS)}; use 0")
    settings = LoraConfig(r=rank, lora_alpha=int(ALPHA_PER_RANK * rank), target_modules=names)
    inject_adapter_in_model(settings, model, _NAME)
    return names


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Compute with the frozen weights alone inside the context."""
    layers = [layer for _, layer in _adapted(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of the model with every adapter added into its matrix, under the model's own names.

    `state` holds whole tensors, by the names of `model.state_dict()`; it is not changed.
    """
    found = {name.replace(_BASE, ""): x for name, x in state.items() if ".lora_" not in name}
    for name, part in _adapted(model):
        # In float32: an update is far smaller than the weight it is added to.
        a_RI, b_OR = (state[f"{name}.lora_{letter}.{_NAME}.weight"].float() for letter in "AB")
        weight = found[f"{name}.weight"]
        found[f"{name}.weight"] = torch.add(weight.float(), b_OR @ a_RI, alpha=float(part.scaling[_NAME])).to(
            weight.dtype
        )
    return found


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the modules with adapters, by name."""
    return [(name, part) for name, part in model.named_modules() if hasattr(part, "lora_A")]
