"""Mixture-of-experts layers: a CPU path, routers that can be frozen, and routes that can be recorded and replayed.

A small change of weights, or another engine's rounding, can flip which experts a token visits, and its probability
ratio then jumps for a reason that no clip of the loss was made for. Replaying the old pass's routes ("Routing Replay",
GSPO, arXiv 2507.18071 section 5.3) or the engine's ("Rollout Routing Replay", R3, arXiv 2510.11370) removes the jump.

    with record_routes(model) as old:                # the old pass, one or many microbatches
        model(input_ids=ids, attention_mask=mask)
    with replay_routes(model, old.joined()) as new:  # forward and backward of the update
        loss(model(input_ids=ids, attention_mask=mask)).backward()
    drift = 1.0 - route_agreement(old.joined(), new.joined(), loss_mask)

Routes are int16 [layers, B, T, K] over the model's mixture-of-experts layers, in order; `NO_ROUTE` in all K places
leaves a token to the router (an engine reports no route for its last token). Everything that looks for layers raises
BadInputError for one whose router is not supported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from rl_actors.contracts import BadInputError

SORTED_EXPERTS: Final = "seatrial_sorted"
NO_ROUTE: Final = -1
ROUTES_DTYPE: Final = torch.int16

Gates = Callable[[Any, Tensor, Tensor], Tensor]
"""(router, logits [N, E], forced experts [N, K]) -> gate weights [N, K], as that router computes them itself."""


def sorted_experts(experts: Any, hidden_NH: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Return the weighted sum of each token's experts, [N, H]: the grouped path's up to rounding.

    `experts` is a GPT-OSS module, with biases, and weights laid out [E, in, out].
    """
    # Transformers' grouped path gathers one bias row per (token, expert) pair; the backward of that gather is a serial
    # scatter, a fifth of a training step on CPU (`benchmarks/expert_path.py`). Here each expert is one `addmm`.
    flat = expert_ids_NK.reshape(-1)
    order = torch.sort(flat, stable=True).indices
    counts = torch.bincount(flat, minlength=experts.num_experts).tolist()
    parts = hidden_NH.index_select(0, order // expert_ids_NK.shape[-1]).split(counts)
    out = torch.cat([_one_expert(experts, index, part) for index, part in enumerate(parts)])
    out = out * weights_NK.reshape(-1).index_select(0, order).unsqueeze(-1)
    back = torch.argsort(order)
    return out.index_select(0, back).view(*expert_ids_NK.shape, -1).sum(1).to(hidden_NH.dtype)


def _one_expert(experts: Any, index: int, tokens_MH: Tensor) -> Tensor:
    gate_up = torch.addmm(experts.gate_up_proj_bias[index], tokens_MH, experts.gate_up_proj[index])
    return torch.addmm(experts.down_proj_bias[index], experts._apply_gate(gate_up), experts.down_proj[index])


def use_sorted_experts(model: Any) -> None:
    """Switch a GPT-OSS model to the sorted expert path."""
    ALL_EXPERTS_FUNCTIONS.register(SORTED_EXPERTS, sorted_experts)
    model.set_experts_implementation(SORTED_EXPERTS)


def _gpt_oss_gates(_router: Any, logits_NE: Tensor, experts_NK: Tensor) -> Tensor:
    """Softmax over the selected logits alone."""
    chosen = logits_NE.gather(-1, experts_NK)
    return torch.softmax(chosen, dim=-1, dtype=chosen.dtype)


def _mixtral_gates(router: Any, logits_NE: Tensor, experts_NK: Tensor) -> Tensor:
    """Softmax over all experts, in float32 and left so; the selected ones made to sum to one."""
    chosen = torch.softmax(logits_NE.float(), dim=-1).gather(-1, experts_NK)
    # Only Qwen3 leaves it to the model's settings.
    return chosen / chosen.sum(dim=-1, keepdim=True) if getattr(router, "norm_topk_prob", True) else chosen


def _qwen3_gates(router: Any, logits_NE: Tensor, experts_NK: Tensor) -> Tensor:
    return _mixtral_gates(router, logits_NE, experts_NK).to(logits_NE.dtype)


# Routers that return (logits, gates, experts) and whose choice is the top K of what the gates are computed from.
_GATES: Final[Mapping[str, Gates]] = {
    "GptOssTopKRouter": _gpt_oss_gates,
    "MixtralTopKRouter": _mixtral_gates,
    "Qwen3MoeTopKRouter": _qwen3_gates,
}


class _MoeLayer(NamedTuple):
    """One layer: the block that is called, its router, and how that weighs the experts it chose."""

    name: str
    block: nn.Module
    router: Any
    gates: Gates


def _moe_layers(model: nn.Module) -> list[_MoeLayer]:
    """Return the mixture-of-experts layers in order; a layer that routes in a way unknown here is refused."""
    layers = []
    for name, block in model.named_modules():
        children = dict(block.named_children())
        routers = [(child, gates) for child in children.values() if (gates := _gates_of(child)) is not None]
        layers += [_MoeLayer(name, block, router, gates) for router, gates in routers]
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
    """Return the routers' parameters by their name in the model; empty for a model without routers."""
    routers = {id(parameter) for layer in _moe_layers(model) for parameter in layer.router.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in routers}


def freeze_router(model: nn.Module) -> int:
    """Take the routers out of training; returns the number of parameter tensors frozen.

    Gradients still flow *through* the gates to earlier layers. Call it before the optimizer is built.
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
    # The number in a name such as model.layers.3.mlp.
    layers = [int(next(part for part in layer.name.split(".") if part.isdigit())) for layer in _moe_layers(model)]
    if max(layers) >= len(routes_LBTK):
        raise BadInputError("routes.shape", tuple(routes_LBTK.shape), f"the model's last expert layer is {max(layers)}")
    return routes_LBTK[layers]


class RecordedRoutes:
    """The routes of every forward pass in a context; each pass is int16 [layers, B, T, K]."""

    def __init__(self, num_layers: int) -> None:
        self._calls: list[list[Tensor]] = [[] for _ in range(num_layers)]

    @property
    def passes(self) -> list[Tensor]:
        """Routes of each pass, in order.

        Raises:
            BadInputError: A pass broke off half-way, so that layers have seen different numbers of passes.
        """
        counts = {len(calls) for calls in self._calls}
        if len(counts) > 1:
            raise BadInputError("routes.passes", sorted(counts), "a pass broke off between layers; record it again")
        return [torch.stack(calls) for calls in zip(*self._calls, strict=True)]

    def joined(self) -> Tensor:
        """Return all passes as one batch, [layers, sum of B, T, K]; without a pass, B = T = K = 0.

        Raises:
            BadInputError: The passes differ in T: take `passes` one by one.
        """
        passes = self.passes
        if not passes:
            return torch.empty(len(self._calls), 0, 0, 0, dtype=ROUTES_DTYPE)
        lengths = [routes.shape[2] for routes in passes]
        if len(set(lengths)) > 1:
            raise BadInputError("routes.passes", lengths, "passes of different lengths; use `passes` one by one")
        return torch.cat(passes, dim=1)


@dataclass(slots=True, eq=False)
class _Tap:
    """The hooks of one layer: the block's input tells B and T, the router's output the routes."""

    # On the router, reading its output only: the expert path may be any, and sharded parameters are never touched.
    gates: Gates
    log: list[Tensor]
    forced_BTK: Tensor | None = None
    is_checkpointed: bool = False
    shape_BT: tuple[int, ...] = ()
    has_routed: bool = False
    waiting: set[object] = field(default_factory=set)

    def enter(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_BTH = args[0] if args else kwargs["hidden_states"]
        self.shape_BT, self.has_routed = tuple(hidden_BTH.shape[:2]), False
        if self.forced_BTK is not None and self.shape_BT != tuple(self.forced_BTK.shape[:2]):
            recorded = tuple(self.forced_BTK.shape[:2])
            raise BadInputError("routes [B, T]", recorded, f"this pass has {self.shape_BT}; replay a pass of its own")

    def route(self, router: Any, _args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits_NE, _, experts_NK = output
        self.has_routed = True
        if not _is_recomputing():
            self.log.append(experts_NK.detach().to(ROUTES_DTYPE).view(*self.shape_BT, -1))
        if self.forced_BTK is None:
            return None
        forced_NK = self.forced_BTK.to(experts_NK.device, experts_NK.dtype).reshape(experts_NK.shape)
        forced_NK = torch.where(forced_NK == NO_ROUTE, experts_NK, forced_NK)
        # Only the choice is replayed: gates come from the current logits, so that the router still learns.
        gates_NK = self.gates(router, logits_NE, forced_NK)
        if self.is_checkpointed and gates_NK.requires_grad and not _is_recomputing():
            # Recomputation routes again: outside the context it would take the router's own choice, unseen.
            mark = object()
            self.waiting.add(mark)
            gates_NK.register_hook(lambda _gradient: self.waiting.discard(mark))
        return logits_NE, gates_NK, forced_NK

    def leave(self, block: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        if not self.has_routed:
            remedy = "ran without calling its router (a fused kernel?); routes are neither seen nor forced"
            raise BadInputError("model", type(block).__name__, remedy)


def _is_recomputing() -> bool:
    # Inside a backward pass, a forward can only be gradient checkpointing's second one.
    return torch._C._current_graph_task_id() != -1


@contextmanager
def record_routes(model: nn.Module) -> Iterator[RecordedRoutes]:
    """Record the experts that each token visits in every forward pass of the context.

    Inside `replay_routes` (or around it) the forced experts are recorded: what was used, not what was preferred.
    Recomputation under gradient checkpointing is not a pass. A model without routers gives zero layers.

    Raises:
        BadInputError: A layer whose router is bypassed in a pass.
    """
    layers = _moe_layers(model)
    routes = RecordedRoutes(len(layers))
    taps = [_Tap(layer.gates, log) for layer, log in zip(layers, routes._calls, strict=True)]
    with _hooked(layers, taps):
        yield routes


@contextmanager
def replay_routes(model: nn.Module, routes_LBTK: Tensor) -> Iterator[RecordedRoutes]:
    """Force the experts of every forward pass of the context; each pass must have the routes' B and T.

    Yields what the current routers would have chosen, each given the forced routes of the layers below it: compared
    with `route_agreement`, the drift comes without a pass of its own. Under gradient checkpointing, backward belongs
    inside the context. Zero layers of routes on a model without routers do nothing. Routes may be of any integer dtype.

    Raises:
        BadInputError: Routes that do not fit the model or a pass; a replay inside a replay; re-entrant checkpointing;
            or a context that ended before the backward of a checkpointed pass.
    """
    layers = _moe_layers(model)
    _require_fitting(routes_LBTK, layers)
    is_checkpointed = _is_checkpointed(model)
    live = RecordedRoutes(len(layers))
    taps = [
        _Tap(layer.gates, log, forced_BTK, is_checkpointed)
        for layer, log, forced_BTK in zip(layers, live._calls, routes_LBTK, strict=True)
    ]
    with _hooked(layers, taps):
        yield live
    if any(tap.waiting for tap in taps):
        remedy = "call backward inside the context (or run the pass without gradients): it routes again"
        raise BadInputError("gradient_checkpointing", True, remedy)


@contextmanager
def _hooked(layers: Sequence[_MoeLayer], taps: Sequence[_Tap]) -> Iterator[None]:
    """Hook every layer, and unhook it however the context ends."""
    handles = []
    try:
        for layer, tap in zip(layers, taps, strict=True):
            handles.append(layer.block.register_forward_pre_hook(tap.enter, with_kwargs=True))
            # A replay comes before any record, so that records see what is used.
            handles.append(layer.router.register_forward_hook(tap.route, prepend=tap.forced_BTK is not None))
            handles.append(layer.block.register_forward_hook(tap.leave))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _require_fitting(routes_LBTK: Tensor, layers: Sequence[_MoeLayer]) -> None:
    shape = tuple(routes_LBTK.shape)
    if routes_LBTK.is_floating_point() or routes_LBTK.dtype == torch.bool:
        raise BadInputError("routes.dtype", routes_LBTK.dtype, "expert numbers are integers")
    if len(shape) != 4 or shape[0] != len(layers):
        raise BadInputError("routes.shape", shape, f"want [layers, B, T, K] with {len(layers)} layers")
    if any(_is_replayed(layer.router) for layer in layers):
        raise BadInputError("model", "already replaying", "leave the first replay before the next")
    if {int(layer.router.top_k) for layer in layers} - {shape[3]}:
        raise BadInputError("routes.shape", shape, f"each token visits {layers[0].router.top_k} experts")
    for index, layer in enumerate(layers):
        if not _are_choices(routes_LBTK[index].int(), int(layer.router.num_experts)):
            remedy = f"a token wants distinct experts of 0..{layer.router.num_experts - 1}, or {NO_ROUTE} in all places"
            raise BadInputError(f"routes[{index}]", layer.name, remedy)


def _are_choices(routes_BTK: Tensor, num_experts: int) -> bool:
    repeats = (routes_BTK.sort(dim=-1).values.diff(dim=-1) == 0).any(-1)
    outside = ((routes_BTK < 0) | (routes_BTK >= num_experts)).any(-1)
    is_free = (routes_BTK == NO_ROUTE).all(-1)
    return not bool(((repeats | outside) & ~is_free).any())


def _is_replayed(router: nn.Module) -> bool:
    taps = (getattr(hook, "__self__", None) for hook in router._forward_hooks.values())
    return any(isinstance(tap, _Tap) and tap.forced_BTK is not None for tap in taps)


def _is_checkpointed(model: nn.Module) -> bool:
    """Return True when a layer recomputes in backward; refuses the re-entrant kind."""
    active = [
        module for module in model.modules() if module.training and getattr(module, "gradient_checkpointing", False)
    ]
    settings = [getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}) for module in active]
    # Its first pass has no graph, so that no hook could tell whether the backward ran inside the context.
    if any(setting.get("use_reentrant") for setting in settings):
        raise BadInputError("use_reentrant", True, "whether its backward was replayed cannot be told; set it to False")
    return bool(active)


def route_agreement(first_LBTK: Tensor, second_LBTK: Tensor, mask_BT: Tensor) -> float:
    """Return the share of (token, expert) pairs of `first` that `second` visits too, in any order, over all layers.

    Tokens outside the mask, and those that either side left without a route, do not count; none at all give 0.0.

    Raises:
        BadInputError: The shapes disagree.
    """
    if first_LBTK.shape != second_LBTK.shape or first_LBTK.shape[1:3] != mask_BT.shape:
        shapes = (tuple(first_LBTK.shape), tuple(second_LBTK.shape), tuple(mask_BT.shape))
        raise BadInputError("routes, routes, mask", shapes, "want [L, B, T, K] twice and [B, T]")
    first_LBTK, second_LBTK = first_LBTK.int(), second_LBTK.int()
    counted_LBT = mask_BT.bool() & (first_LBTK >= 0).all(-1) & (second_LBTK >= 0).all(-1)
    agree_LBTK = (first_LBTK.unsqueeze(-1) == second_LBTK.unsqueeze(-2)).any(-1)
    num_pairs = int(counted_LBT.sum()) * first_LBTK.shape[-1]
    return int(agree_LBTK[counted_LBT].sum()) / num_pairs if num_pairs else 0.0
