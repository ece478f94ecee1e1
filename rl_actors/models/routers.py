"""The routers of a mixture-of-experts model: where they sit, how they weigh experts, and whether they train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from rl_actors.contracts import BadInputError

NO_ROUTE: Final = -1

Gates = Callable[[Any, Tensor, Tensor], Tensor]
"""(router, logits [N, E], forced experts [N, K]) -> gate weights [N, K], as that router computes them itself."""


def _gpt_oss_gates(_router: Any, logits_NE: Tensor, experts_NK: Tensor) -> Tensor:
    """Softmax over the selected logits alone."""
    chosen = logits_NE.gather(-1, experts_NK)
    return torch.softmax(chosen, dim=-1, dtype=chosen.dtype)


def _mixtral_gates(_router: Any, logits_NE: Tensor, experts_NK: Tensor) -> Tensor:
    """Softmax over all experts, in float32 and left so; the selected ones made to sum to one."""
    chosen = torch.softmax(logits_NE.float(), dim=-1).gather(-1, experts_NK)
    return chosen / chosen.sum(dim=-1, keepdim=True)


def _qwen3_gates(router: Any, logits_NE: Tensor, experts_NK: Tensor) -> Tensor:
    """Softmax over all experts in float32; whether the selected ones sum to one is the model's setting."""
    chosen = torch.softmax(logits_NE.float(), dim=-1).gather(-1, experts_NK)
    if router.norm_topk_prob:
        chosen = chosen / chosen.sum(dim=-1, keepdim=True)
    return chosen.to(logits_NE.dtype)


# Routers that return (logits, gates, experts) and whose choice is the top K of what the gates are computed from.
_GATES: Final[Mapping[str, Gates]] = {
    "GptOssTopKRouter": _gpt_oss_gates,
    "MixtralTopKRouter": _mixtral_gates,
    "Qwen3MoeTopKRouter": _qwen3_gates,
}


class MoeLayer(NamedTuple):
    """One layer: the block that is called, its router, and how that weighs the experts it chose."""

    name: str
    block: nn.Module
    router: Any
    gates: Gates


def moe_layers(model: nn.Module) -> list[MoeLayer]:
    """Return the mixture-of-experts layers in order; a layer that routes in a way unknown here is refused."""
    layers = []
    for name, block in model.named_modules():
        children = dict(block.named_children())
        routers = [(child, gates) for child in children.values() if (gates := _gates_of(child)) is not None]
        layers += [MoeLayer(name, block, router, gates) for router, gates in routers]
        looks_routed = children.keys() & {"experts", "router"} or any(
            "Router" in type(c).__name__ for c in block.children()
        )
        if looks_routed and not routers:
            remedy = f"its routing cannot be replayed or frozen here; supported are {', '.join(_GATES)}"
            raise BadInputError(name or "model", type(block).__name__, remedy)
    return layers


def _gates_of(module: nn.Module) -> Gates | None:
    # By name along the ancestry: sharding wrappers subclass, and importing three model files would cost a second.
    return next((_GATES[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in _GATES), None)


def router_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the routers' parameters by their name in the model; empty for a model without routers.

    Raises:
        BadInputError: A mixture-of-experts layer whose router is not supported.
    """
    routers = {id(parameter) for layer in moe_layers(model) for parameter in layer.router.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in routers}


def freeze_router(model: nn.Module) -> int:
    """Take the routers out of training; returns the number of parameter tensors frozen.

    Gradients still flow *through* the gates to earlier layers. Call it before the optimizer is built.

    Raises:
        BadInputError: A mixture-of-experts layer whose router is not supported.
    """
    parameters = router_parameters(model).values()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return len(parameters)


def engine_routes(model: nn.Module, routes_LBTK: Tensor) -> Tensor | None:
    """Return an engine's routes [all layers, B, T, K] for this model's expert layers alone; None when it has none.

    Raises:
        BadInputError: The engine's model has fewer layers than this one's last expert layer.
    """
    if not routes_LBTK.numel() or bool((routes_LBTK == NO_ROUTE).all()):
        return None
    layers = [_layer_number(layer.name) for layer in moe_layers(model)]
    if max(layers) >= len(routes_LBTK):
        raise BadInputError("routes.shape", tuple(routes_LBTK.shape), f"the model's last expert layer is {max(layers)}")
    return routes_LBTK[layers]


def _layer_number(name: str) -> int:
    """Return the number in a name such as model.layers.3.mlp."""
    return int(next(part for part in name.split(".") if part.isdigit()))
