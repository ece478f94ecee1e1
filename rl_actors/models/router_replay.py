"""Router replay: the experts chosen in one pass are forced in another; the router can be frozen instead.

A small change of weights, or another engine's rounding, can flip which experts a token visits, and its probability
ratio then jumps for a reason that no clip of the loss was made for. Replaying the old pass's routes ("Routing Replay",
GSPO, arXiv 2507.18071 section 5.3) or the engine's ("Rollout Routing Replay", R3, arXiv 2510.11370) removes
the jump. Only the choice is replayed: gates are computed from the current logits, so the router still learns.

    with record_routes(model) as old:                # the old pass, one or many microbatches
        model(input_ids=ids, attention_mask=mask)
    with replay_routes(model, old.joined()) as new:  # forward and backward of the update
        loss(model(input_ids=ids, attention_mask=mask)).backward()
    drift = 1.0 - route_agreement(old.joined(), new.joined(), loss_mask)

Routes are int16 [layers, B, T, K] over the model's mixture-of-experts layers, in order; `NO_ROUTE` in all K places
leaves a token to the router (an engine reports no route for its last token). Hooks sit on the routers and read their
outputs only: the expert implementation may be any, and sharded parameters are never touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from rl_actors.contracts import BadInputError
from rl_actors.models.routers import NO_ROUTE, Gates, MoeLayer, moe_layers

ROUTES_DTYPE: Final = torch.int16


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
        gates_NK = self.gates(router, logits_NE, forced_NK)
        if self.is_checkpointed and gates_NK.requires_grad and not _is_recomputing():
            self._await_backward(gates_NK)
        return logits_NE, gates_NK, forced_NK

    def leave(self, block: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        if not self.has_routed:
            remedy = "ran without calling its router (a fused kernel?); routes are neither seen nor forced"
            raise BadInputError("model", type(block).__name__, remedy)

    def _await_backward(self, gates_NK: Tensor) -> None:
        mark = object()
        self.waiting.add(mark)
        gates_NK.register_hook(lambda _gradient: self.waiting.discard(mark))


def _is_recomputing() -> bool:
    """Return True inside a backward pass, where a forward can only be gradient checkpointing's second one."""
    return torch._C._current_graph_task_id() != -1


@contextmanager
def record_routes(model: nn.Module) -> Iterator[RecordedRoutes]:
    """Record the experts that each token visits in every forward pass of the context.

    Inside `replay_routes` (or around it) the forced experts are recorded: what was used, not what was preferred.
    Recomputation under gradient checkpointing is not a pass. A model without routers gives zero layers.

    Raises:
        BadInputError: A mixture-of-experts layer whose router is not supported, or that is bypassed in a pass.
    """
    layers = moe_layers(model)
    routes = RecordedRoutes(len(layers))
    taps = [_Tap(layer.gates, log) for layer, log in zip(layers, routes._calls, strict=True)]
    with _hooked(layers, taps):
        yield routes


@contextmanager
def replay_routes(model: nn.Module, routes_LBTK: Tensor) -> Iterator[RecordedRoutes]:
    """Force the experts of every forward pass of the context; each pass must have the routes' B and T.

    Yields what the current routers would have chosen, each given the forced routes of the layers below it: compared
    with `route_agreement`, the drift comes without a pass of its own. Under gradient checkpointing, backward belongs
    inside the context, because it routes a second time. Zero layers of routes on a model without routers do nothing.

    Args:
        model: any module that contains the routers.
        routes_LBTK: experts by layer and token, any integer dtype; rows of `NO_ROUTE` leave a token to the router.

    Raises:
        BadInputError: Routes that do not fit the model or a pass; a replay inside a replay; an unsupported router;
            re-entrant checkpointing; or a context that ended before the backward of a checkpointed pass.
    """
    layers = moe_layers(model)
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
def _hooked(layers: Sequence[MoeLayer], taps: Sequence[_Tap]) -> Iterator[None]:
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


def _require_fitting(routes_LBTK: Tensor, layers: Sequence[MoeLayer]) -> None:
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
    ordered = routes_BTK.sort(dim=-1).values
    repeats = (ordered.diff(dim=-1) == 0).any(-1)
    outside = ((routes_BTK < 0) | (routes_BTK >= num_experts)).any(-1)
    is_free = (routes_BTK == NO_ROUTE).all(-1)
    return not bool(((repeats | outside) & ~is_free).any())


def _is_replayed(router: nn.Module) -> bool:
    taps = (getattr(hook, "__self__", None) for hook in router._forward_hooks.values())
    return any(isinstance(tap, _Tap) and tap.forced_BTK is not None for tap in taps)


def _is_checkpointed(model: nn.Module) -> bool:
    """Return True when a layer recomputes in backward. Refuses the re-entrant kind: its first pass has no graph."""
    active = [
        module for module in model.modules() if module.training and getattr(module, "gradient_checkpointing", False)
    ]
    settings = [getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}) for module in active]
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
