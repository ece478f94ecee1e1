"""Attention with a learnable sink per head, through a flash kernel that knows no sinks.

A sink is one more logit s per head whose value is zero (GPT-OSS model card, section 2.2). A flash kernel returns the
plain output O' and LSE_i = log sum_j exp(S_ij); with L = logaddexp(LSE, s) the rest is a gate, exact:

    O = O' * exp(LSE - L) = O' * sigmoid(LSE - s)

Backward, with P_ij = exp(S_ij - L_i), D_i = dO_i . O_i and p_i = exp(s - L_i) = sigmoid(s - LSE_i):

    dV_j = sum_i P_ij dO_i        dS_ij = P_ij (dO_i . V_j - D_i)        ds = -sum_i p_i D_i

The first two are what a flash backward computes (Dao et al., FlashAttention, appendix B.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rl_actors.contracts import BadInputError

SINK_ATTENTION: Final = "seatrial_sink"
_aten: Final = torch.ops.aten
_Triple = tuple[Tensor, Tensor, Tensor]
_KernelName = Literal["cpu_flash", "cuda_flash", "cuda_efficient"]


def sink_attention(
    query_BHTD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    sinks_H: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = True,
    sliding_window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return softmax([scale * QK^T, s]) [V; 0], [B, H, T, D]; once differentiable in query, key, value and sinks.

    Args:
        query_BHTD: H query heads; the T queries are the last of the S positions.
        key_BKSD: K key heads, H a multiple of K.
        sinks_H: sink logits in nats; -inf is no sink.
        mask: bool, broadcast to [B, H, T, S], True where a query may attend; a row without any gives 0.
        is_causal: a query sees no later key.
        sliding_window: a query sees this many keys, itself included; None sees all.
        scale: factor of the scores, D ** -0.5 unless given.

    Raises:
        BadInputError: a window that is not positive or not causal, or a mask that is not bool.
    """
    if mask is not None and mask.dtype != torch.bool:
        raise BadInputError("mask", str(mask.dtype), "give a bool mask, True where a query may attend")
    if sliding_window is not None and (sliding_window < 1 or not is_causal):
        raise BadInputError("sliding_window", sliding_window, "must be positive, with is_causal=True")
    inputs = (query_BHTD, key_BKSD, value_BKSD, sinks_H)
    (length, head_dim), num_keys = query_BHTD.shape[2:], key_BKSD.shape[2]
    factor: float = head_dim**-0.5 if scale is None else scale
    window = sliding_window if sliding_window and sliding_window < num_keys else None
    is_cut_short = mask is not None or (is_causal and length != num_keys)
    kernel = _kernel_for(query_BHTD, value_BKSD, needs_mask=is_cut_short)
    if kernel is None:
        return eager_sink_attention(*inputs, allowed_pairs(query_BHTD, key_BKSD, mask, is_causal, window), factor)
    if window and kernel != "cuda_flash" and not is_cut_short and length > 2 * window:
        return _banded(inputs, window, _Plan(kernel, factor))
    if is_cut_short or (window and kernel != "cuda_flash"):
        mask = allowed_pairs(query_BHTD, key_BKSD, mask, is_causal, window)
        # The CPU kernel takes both, and with causality it skips the keys above the diagonal.
        is_causal, window = is_causal and kernel == "cpu_flash" and length == num_keys, None
    return _SinkAttention.apply(*inputs, mask, _Plan(kernel, factor, is_causal, window))


def eager_sink_attention(
    query_BHTD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, sinks_H: Tensor, allowed: Tensor, scale: float
) -> Tensor:
    """Return attention by its definition, in float32 or better: append the sink, softmax, drop the sink."""
    scores_BHTS = attention_scores(query_BHTD, key_BKSD, scale)
    scores_BHTS = scores_BHTS.masked_fill(~allowed, torch.finfo(scores_BHTS.dtype).min)
    sinks = sinks_H.to(scores_BHTS.dtype).view(1, -1, 1, 1).expand(*scores_BHTS.shape[:3], 1)
    probs_BHTS = torch.cat([scores_BHTS, sinks], dim=-1).softmax(-1)[..., :-1].masked_fill(~allowed, 0.0)
    return probs_BHTS.to(value_BKSD.dtype) @ _per_query_head(value_BKSD, query_BHTD.shape[1])


def gate_with_sink(out_BHTD: Tensor, lse_BHT: Tensor, sinks_H: Tensor) -> Tensor:
    """Return out * sigmoid(LSE - s): the sink's share taken out of a plain attention over *all* keys."""
    # Keys split over devices are merged first and gated once: a gate per part would count the sink once per part.
    gate_BHT = torch.sigmoid(lse_BHT - sinks_H.to(lse_BHT.dtype)[:, None])
    return (out_BHTD * gate_BHT.unsqueeze(-1)).to(out_BHTD.dtype)


class _SinkAttention(torch.autograd.Function):
    """The gate around a kernel: query, key, value, sinks, bool mask [B, H, T, S] (or broadcast) or None, plan."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        query, key, value, sinks_H, mask, ctx.plan = arguments
        out_BHTD, lse_BHT, rng = _flash_forward((query, key, value), _bias(mask, query), ctx.plan)
        out_BHTD = _cut_blind(gate_with_sink(out_BHTD, lse_BHT, sinks_H), mask)
        ctx.save_for_backward(query, key, value, sinks_H, mask, out_BHTD, lse_BHT, *rng)
        return out_BHTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, sinks_H, mask, out_BHTD, lse_BHT, *rng = ctx.saved_tensors
        grad_BHTD = _cut_blind(grad_outputs[0], mask)
        grad_BHTD = grad_BHTD if grad_BHTD.stride(-1) == 1 else grad_BHTD.contiguous()
        sinks_H1 = sinks_H.to(lse_BHT.dtype)[:, None]
        # A flash backward goes by the output and LSE it is handed: given the gated O and L, its dQ, dK, dV are exact,
        # and the gate needs no backward of its own.
        done = (out_BHTD, torch.logaddexp(lse_BHT, sinks_H1), rng)
        grads = _flash_backward(grad_BHTD, (query, key, value), _bias(mask, query), done, ctx.plan)
        dots_BHT = (grad_BHTD.to(lse_BHT.dtype) * out_BHTD).sum(-1)
        grad_sinks_H = -(torch.sigmoid(sinks_H1 - lse_BHT) * dots_BHT).sum((0, 2))
        return *grads, grad_sinks_H.to(sinks_H.dtype), None, None


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which kernel runs, and what it does by itself beside the additive mask it may get."""

    kernel: _KernelName
    scale: float
    is_causal: bool = False
    window: int | None = None

    @property
    def window_sizes(self) -> dict[str, int]:
        return {} if self.window is None else {"window_size_left": self.window - 1, "window_size_right": 0}


def _kernel_for(query: Tensor, value: Tensor, *, needs_mask: bool) -> _KernelName | None:
    """Return the kernel that fits, or None."""
    head_dim, device = query.shape[-1], query.device.type
    if device == "cpu" and head_dim == value.shape[-1]:
        return "cpu_flash"
    if device != "cuda" or head_dim != value.shape[-1] or head_dim % 8 or query.dtype == torch.float64:
        return None
    # CUDA's FlashAttention-2 has windows, but neither masks nor float32.
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    return "cuda_flash" if is_half and not needs_mask and head_dim <= 256 else "cuda_efficient"


def _flash_forward(qkv: _Triple, bias: Tensor | None, plan: _Plan) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the plain output [B, H, T, D], its LSE [B, H, T] in float32 or better, and random state."""
    if plan.kernel == "cuda_flash":
        sizes = (None, None, qkv[0].shape[2], qkv[1].shape[2], 0.0, plan.is_causal, False)
        turned = (x.transpose(1, 2) for x in qkv)
        out, lse, *rng, _ = _aten._flash_attention_forward(*turned, *sizes, scale=plan.scale, **plan.window_sizes)
        return out.transpose(1, 2), lse, rng
    if plan.kernel == "cpu_flash":
        kernel = _aten._scaled_dot_product_flash_attention_for_cpu
        return *kernel(*qkv, 0.0, plan.is_causal, attn_mask=bias, scale=plan.scale), []
    kernel = _aten._scaled_dot_product_efficient_attention
    heads = [_per_query_head(x, qkv[0].shape[1]) for x in qkv]
    out, lse, *rng = kernel(*heads, bias, True, 0.0, plan.is_causal, scale=plan.scale)
    return out, lse[..., : out.shape[2]], rng


def _flash_backward(grad: Tensor, qkv: _Triple, bias: Tensor | None, done: tuple[Any, ...], plan: _Plan) -> _Triple:
    """Return the gradients of query, key and value, given the output, LSE and random state in `done`."""
    out, lse, rng = done
    if plan.kernel == "cuda_flash":
        sizes = (None, None, qkv[0].shape[2], qkv[1].shape[2], 0.0, plan.is_causal)
        turned = (x.transpose(1, 2) for x in (grad, *qkv, out))
        grads = _aten._flash_attention_backward(*turned, lse, *sizes, *rng, scale=plan.scale, **plan.window_sizes)
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv
    if plan.kernel == "cpu_flash":
        kernel = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(grad, *qkv, out, lse, 0.0, plan.is_causal, attn_mask=bias, scale=plan.scale)
    kernel = _aten._scaled_dot_product_efficient_attention_backward
    heads = [_per_query_head(x, qkv[0].shape[1]) for x in qkv]
    lse = pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)  # the kernel reads whole tiles of 32 rows
    arguments = (bias, out, lse, *rng, 0.0, [True, True, True, False], plan.is_causal)
    dq, dk, dv, _ = kernel(grad, *heads, *arguments, scale=plan.scale)
    dk, dv = (x.unflatten(1, (qkv[1].shape[1], -1)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def allowed_pairs(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, window: int | None) -> Tensor:
    """Return the bool mask [1 or B, 1 or H, T, S] of everything that limits a query."""
    num_keys = key.shape[2]
    keys = torch.arange(num_keys, device=query.device)
    queries = torch.arange(num_keys - query.shape[2], num_keys, device=query.device)[:, None]
    allowed = ((keys <= queries) | (not is_causal)) & (keys > queries - (window or num_keys))
    if mask is not None:
        allowed = allowed & mask
    return allowed.expand(*(1,) * (4 - allowed.dim()), *allowed.shape)


def _banded(inputs: tuple[Tensor, ...], window: int, plan: _Plan) -> Tensor:
    """Return causal attention in a window of W: blocks of W queries see the keys of their block and the one before."""
    # A kernel without windows would compute all T^2 scores of a dense mask; here it computes 2 * T * W.
    query, key, value, sinks_H = inputs
    num_rows, _, length, _ = query.shape
    tail = -length % window
    query = _blocks(pad(query, (0, 0, 0, tail)), window)
    padded = (pad(x, (0, 0, window, tail)) for x in (key, value))
    key, value = (torch.cat([_blocks(x[:, :, :-window], window), _blocks(x[:, :, window:], window)], 2) for x in padded)
    rows, columns = torch.arange(window, device=query.device)[:, None], torch.arange(2 * window, device=query.device)
    mask = ((columns > rows) & (columns <= rows + window)).repeat((length + tail) // window, 1, 1, 1)
    mask[0] &= columns >= window  # nothing is before the first block
    out = _SinkAttention.apply(query, key, value, sinks_H, mask.repeat(num_rows, 1, 1, 1), plan)
    return out.unflatten(0, (num_rows, -1)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _blocks(x_BHTD: Tensor, window: int) -> Tensor:
    return x_BHTD.unflatten(2, (-1, window)).transpose(1, 2).flatten(0, 1)


def _cut_blind(x_BHTD: Tensor, mask: Tensor | None) -> Tensor:
    """Set the rows of queries that may attend to nothing to 0."""
    return x_BHTD if mask is None else x_BHTD.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def _bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Return the additive mask [B, H, T, S], its rows at multiples of 16 elements as CUDA kernels want them."""
    if mask is None:
        return None
    # A blind row sees all, lest a kernel divide 0 by 0; its output and gradient are cut.
    num_keys = mask.shape[-1]
    bias = query.new_zeros(*mask.shape[:-1], num_keys + -num_keys % 16)[..., :num_keys]
    return bias.masked_fill_(~mask & mask.any(-1, keepdim=True), -torch.inf).expand(*query.shape[:3], -1)


def attention_scores(query_BHTD: Tensor, key_BKSD: Tensor, scale: float) -> Tensor:
    """Return scale * QK^T, [B, H, T, S] in float32 or better."""
    scores_BHTS = query_BHTD @ _per_query_head(key_BKSD, query_BHTD.shape[1]).mT * scale
    return scores_BHTS if scores_BHTS.dtype == torch.float64 else scores_BHTS.float()


def _per_query_head(x_BKSD: Tensor, num_heads: int) -> Tensor:
    groups = num_heads // x_BKSD.shape[1]
    return x_BKSD if groups == 1 else x_BKSD.repeat_interleave(groups, dim=1)


def use_sink_attention(model: Any) -> str | None:
    """Switch a model with sinks (GPT-OSS) to `sink_attention`. Returns None, or why the model was left as it is."""
    if not modules_with_sinks(model):
        return f"{model.config.model_type} has no attention sinks"
    if unknown := set(model.config.layer_types) - {"full_attention", "sliding_attention"}:
        return f"{model.config.model_type} has layers of another kind: {', '.join(sorted(unknown))}"
    ALL_ATTENTION_FUNCTIONS.register(SINK_ATTENTION, _transformers_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(SINK_ATTENTION, _transformers_mask)
    model.set_attn_implementation(SINK_ATTENTION)
    return None


def _transformers_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """Return the output [B, T, H, D], in the signature of Transformers' attention interface."""
    if arguments.get("dropout"):
        raise BadInputError("attention_dropout", arguments["dropout"], "kernels drop nothing: set it to 0")
    given: dict[str, Any] = {"scale": arguments.get("scaling"), "mask": attention_mask}
    # A mask that Transformers built holds causality and window already, at positions that only its cache knows.
    if attention_mask is None:
        given["sliding_window"] = arguments.get("sliding_window")
    out = sink_attention(query, key, value, arguments["s_aux"], is_causal=attention_mask is None, **given)
    return out.transpose(1, 2).contiguous(), None


def _transformers_mask(*, q_length: int, kv_length: int, **rest: Any) -> Tensor | None:
    """Return Transformers' bool mask, or None where causality and window are all that limits a real token."""
    # With padding on the right no real token sees a pad, and what pads compute is read by nobody.
    mask_BT = rest.get("attention_mask")
    may_skip = rest.pop("allow_is_causal_skip", True) and q_length == kv_length
    is_plain = mask_BT is None or (mask_BT.shape[-1] == kv_length and (mask_BT[:, 1:] <= mask_BT[:, :-1]).all())
    if may_skip and is_plain:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, **rest, allow_is_causal_skip=False)


def modules_with_sinks(model: Any) -> list[Any]:
    """Return the attention layers that own sinks, in the order in which they run."""
    return [module for module in model.modules() if isinstance(getattr(module, "sinks", None), torch.nn.Parameter)]
