"""Sink attention through a flash kernel is the definition: outputs, gradients, windows, masks, keys in parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rl_actors.contracts.errors import BadInputError
from rl_actors.models import sinks as kit
from rl_actors.models.sinks import allowed_pairs, eager_sink_attention, gate_with_sink, sink_attention

torch.set_num_threads(1)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def random_inputs(
    *, rows: int = 2, heads: int = 4, key_heads: int = 2, length: int = 9, num_keys: int | None = None, dim: int = 8,
    dtype: torch.dtype = torch.float64, seed: int = 0,
) -> Inputs:  # fmt: skip
    """Query, key, value and sinks that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    num_keys = num_keys or length
    shapes = [(rows, heads, length, dim), (rows, key_heads, num_keys, dim), (rows, key_heads, num_keys, dim), (heads,)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    query, key, value, sinks = (tensor.requires_grad_() for tensor in drawn)
    return query, key, value, sinks


def eager(inputs: Inputs, *, mask: Tensor | None = None, is_causal: bool = True, window: int | None = None) -> Tensor:
    allowed = allowed_pairs(inputs[0], inputs[1], mask, is_causal, window)
    return eager_sink_attention(*inputs, allowed, inputs[0].shape[-1] ** -0.5)


def fast(inputs: Inputs, *, mask: Tensor | None = None, is_causal: bool = True, window: int | None = None) -> Tensor:
    return sink_attention(*inputs, mask=mask, is_causal=is_causal, sliding_window=window)


def errors(inputs: Inputs, other: Inputs | None = None, **limits: Any) -> list[float]:
    """Largest differences of output and of each gradient between the kernel and the definition."""
    found, wanted = fast(inputs, **limits), eager(other or inputs, **limits)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=wanted.dtype)
    pairs = zip(
        (found, *torch.autograd.grad(found, inputs, weights.to(found.dtype))),
        (wanted, *torch.autograd.grad(wanted, other or inputs, weights)),
        strict=True,
    )
    return [float((a - b).abs().max().detach()) for a, b in pairs]


def right_padding(lengths: tuple[int, ...], width: int) -> Tensor:
    return (torch.arange(width) < torch.tensor(lengths)[:, None])[:, None, None, :]


MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"is_causal": False},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "window wider than the keys": {"window": 50},
    "right padding": {"mask": right_padding((9, 4), 9)},
    "left padding, blind rows": {"mask": right_padding((9, 4), 9).flip(-1), "window": 3},
    "a blind sample": {"mask": right_padding((9, 0), 9), "is_causal": False},
    "any mask, by head": {"mask": torch.rand(2, 4, 9, 9, generator=torch.Generator().manual_seed(3)) < 0.5},
}


# --- the kernel against the definition and against finite differences ---------------------------------


@pytest.mark.parametrize("name", MASKS)
def test_gradients_are_those_of_finite_differences(name: str):
    def call(*inputs: Tensor) -> Tensor:
        return fast((inputs[0], inputs[1], inputs[2], inputs[3]), **MASKS[name])

    assert torch.autograd.gradcheck(call, random_inputs(), eps=1e-5, atol=2e-9, rtol=1e-8)


def test_a_lost_sink_gradient_would_be_seen_by_finite_differences():
    """Negative control of the one above."""

    def call(*inputs: Tensor) -> Tensor:
        return fast((inputs[0], inputs[1], inputs[2], inputs[3].detach() + 0.0 * inputs[3]))

    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(call, random_inputs(), eps=1e-5, atol=2e-9, rtol=1e-8)


def slope(call: Callable[[Tensor], Tensor], where: Tensor, direction: Tensor) -> float:
    """Derivative of a scalar along a direction, by central differences of sixth order.

    A plain central difference leaves 4e-10 at its best step, 1e-5, where rounding (eps |f| / h) meets truncation
    (h^2 f3 / 6): no margin below 1e-9. This one truncates at h^6 f7 / 140, may step 2e-2 and leaves 1e-11. (A complex
    step would need a kernel that takes complex numbers.)
    """
    step, total = 2e-2, 0.0
    for times, weight in ((1, 45.0), (2, -9.0), (3, 1.0)):
        ahead, behind = (call(where.detach() + side * times * step * direction) for side in (1, -1))
        total += weight * float((ahead - behind).detach())
    return total / (60.0 * step)


Attention = Callable[..., Tensor]


def sink_slope_errors(attention: Attention, seed: int, **limits: Any) -> list[float]:
    """Sink by sink: how far the gradient is from the finite difference of the same attention's output."""
    inputs = query, key, value, sinks = random_inputs(seed=seed)
    weights = torch.randn(query.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=query.dtype)

    def loss(sinks: Tensor) -> Tensor:
        return (attention((query, key, value, sinks), **limits) * weights).sum()

    (gradient,) = torch.autograd.grad((attention(inputs, **limits) * weights).sum(), sinks)
    slopes = [slope(loss, sinks, direction) for direction in torch.eye(len(sinks), dtype=sinks.dtype)]
    return [abs(float(found) - wanted) for found, wanted in zip(gradient, slopes, strict=True)]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(sorted(MASKS)))
def test_the_sink_gradient_is_the_finite_difference_to_a_billionth(seed: int, name: str):
    assert max(sink_slope_errors(fast, seed, **MASKS[name])) < 1e-9


class _UngatedDots(torch.autograd.Function):
    """Passes the output on, and gives the sinks p_i times dO . O of the *plain* output: the gate left out of D."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        out_BHTD, plain_BHTD, share_BHT, _ = arguments
        ctx.save_for_backward(plain_BHTD, share_BHT)
        return out_BHTD.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        plain_BHTD, share_BHT = ctx.saved_tensors
        return None, None, None, -(share_BHT * (grad_outputs[0] * plain_BHTD).sum(-1)).sum((0, 2))


def plain_and_lse(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of one kernel call, without sinks."""
    out, lse, _ = kit._flash_forward((query, key, value), None, kit._Plan("cpu_flash", query.shape[-1] ** -0.5, True))
    return out, lse


def with_ungated_dots(inputs: Inputs) -> Tensor:
    """Right outputs; D taken before the gate."""
    query, key, value, sinks = inputs
    plain, lse = plain_and_lse(query.detach(), key.detach(), value.detach())
    out = gate_with_sink(plain, lse, sinks.detach())
    return _UngatedDots.apply(out, plain, torch.sigmoid(sinks.detach()[:, None] - lse), sinks)


def with_a_nearly_right_gradient(inputs: Inputs) -> Tensor:
    """Right outputs; gradients a hundred-millionth too large, below what a plain central difference can tell."""
    *rest, sinks = inputs
    nudged = sinks + 1e-8 * (sinks - sinks.detach())
    return fast((rest[0], rest[1], rest[2], nudged))


@pytest.mark.parametrize("wrong", [with_ungated_dots, with_a_nearly_right_gradient])
def test_a_wrong_sink_gradient_fails_the_same_check(wrong: Attention):
    assert torch.allclose(wrong(random_inputs()), fast(random_inputs()), atol=1e-14)
    assert max(sink_slope_errors(wrong, seed=0)) > 1e-9


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(sorted(MASKS)))
def test_float32_is_the_definition(seed: int, name: str):
    assert max(errors(random_inputs(dtype=torch.float32, seed=seed), **MASKS[name])) < 1e-5


def test_float32_with_half_precision_sinks_is_not_the_definition():
    """Negative control of the one above."""
    query, key, value, sinks = random_inputs(dtype=torch.float32)
    rounded = sinks.detach().half().float().requires_grad_()
    assert min(errors((query, key, value, rounded), (query, key, value, sinks))[:2]) > 1e-5


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3), key_heads=st.integers(1, 3), groups=st.integers(1, 3), length=st.integers(1, 40),
    dim=st.integers(1, 17), window=st.none() | st.integers(1, 12), more_keys=st.integers(0, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_window_and_cache_is_the_definition(
    rows: int, key_heads: int, groups: int, length: int, dim: int, window: int | None, more_keys: int, seed: int
):
    inputs = random_inputs(
        rows=rows, heads=key_heads * groups, key_heads=key_heads, length=length, num_keys=length + more_keys, dim=dim,
        seed=seed,
    )  # fmt: skip
    assert max(errors(inputs, window=window)) < 1e-11


@settings(max_examples=40, deadline=None)
@given(data=st.data(), length=st.integers(1, 12), is_causal=st.booleans())
def test_any_mask_is_the_definition_and_blind_rows_are_zero(data: st.DataObject, length: int, is_causal: bool):
    bits = data.draw(st.lists(st.booleans(), min_size=2 * length * length, max_size=2 * length * length))
    mask = torch.tensor(bits).view(2, 1, length, length)
    inputs = random_inputs(length=length)
    assert max(errors(inputs, mask=mask, is_causal=is_causal)) < 1e-11
    blind = ~allowed_pairs(inputs[0], inputs[1], mask, is_causal, None).any(-1)
    out_BTHD = fast(inputs, mask=mask, is_causal=is_causal).transpose(1, 2)
    assert not out_BTHD[blind.squeeze(1)].any()


def test_bfloat16_is_close_to_float32():
    half = random_inputs(dtype=torch.bfloat16, length=64, dim=32)
    query, key, value, sinks = (tensor.detach().float().requires_grad_() for tensor in half)
    assert fast(half).dtype == torch.bfloat16
    assert max(errors(half, (query, key, value, sinks))) < 0.1
    assert errors(half, (query, key, value, sinks))[0] < 0.02


def sinkless_errors(sink: float, seed: int, **limits: Any) -> list[float]:
    """Output, gradients of query, key and value, and the sinks' own gradient, against attention without sinks."""
    inputs = query, key, value, sinks = random_inputs(seed=seed, key_heads=4)
    low = torch.full_like(sinks, sink).requires_grad_()
    found = fast((query, key, value, low), **limits)
    allowed = allowed_pairs(query, key, limits.get("mask"), limits.get("is_causal", True), limits.get("window"))
    allowed = allowed.expand(*query.shape[:3], -1)
    sees = allowed.any(-1, keepdim=True)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed | ~sees)
    wanted = wanted.masked_fill(~sees, 0.0)
    *grads, grad_sinks = torch.autograd.grad(found.square().sum(), (query, key, value, low))
    expected = torch.autograd.grad(wanted.square().sum(), inputs[:3])
    pairs = [(found, wanted), *zip(grads, expected, strict=True), (grad_sinks, torch.zeros_like(grad_sinks))]
    return [float((a - b).abs().max().detach()) for a, b in pairs]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), name=st.sampled_from(sorted(MASKS)), sink=st.floats(-1e4, -40.0) | st.just(-torch.inf)
)
def test_a_sink_to_minus_infinity_is_plain_attention(seed: int, name: str, sink: float):
    assert max(sinkless_errors(sink, seed, **MASKS[name])) < 1e-12


@pytest.mark.parametrize("name", MASKS)
def test_a_sink_of_zero_is_not_plain_attention(name: str):
    """Negative control of the one above: a zero *logit* still takes weight, as `sinks = 0` to turn them off would."""
    assert min(sinkless_errors(0.0, 0, **MASKS[name])) > 1e-3


def test_a_huge_sink_takes_everything():
    query, key, value, sinks = random_inputs()
    out = sink_attention(query, key, value, sinks + 1e4)
    assert not out.any()
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(out.sum(), (query, key, value, sinks)))


@pytest.mark.parametrize("length", [24, 25, 31])
def test_blocks_of_a_window_are_the_dense_mask(length: int, monkeypatch: pytest.MonkeyPatch):
    calls = []
    banded = kit._banded
    monkeypatch.setattr(kit, "_banded", lambda *arguments: calls.append(1) or banded(*arguments))
    assert max(errors(random_inputs(length=length, rows=3), window=8)) < 1e-12
    assert len(calls) == (length > 16)


def test_one_kernel_call_each_way(monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(kit, name)
        return lambda *arguments: calls.append(name) or original(*arguments)

    for name in ("_flash_forward", "_flash_backward"):
        monkeypatch.setattr(kit, name, counted(name))
    fast(random_inputs()).sum().backward()
    assert calls == ["_flash_forward", "_flash_backward"]


def test_no_square_matrix_is_kept_for_the_backward():
    kept: list[int] = []
    inputs = random_inputs(length=64, rows=1)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        fast(inputs)
    assert max(kept) < 4 * 64 * 64


def test_where_no_kernel_fits_the_definition_runs():
    query, key, _, sinks = random_inputs()
    value = torch.randn(2, 2, 9, 5, dtype=torch.float64)
    assert torch.equal(sink_attention(query, key, value, sinks), eager((query, key, value, sinks)))


@pytest.mark.parametrize(
    "limits", [{"mask": torch.zeros(9, 9)}, {"sliding_window": 0}, {"sliding_window": 3, "is_causal": False}]
)
def test_what_it_cannot_mean_is_refused(limits: dict[str, Any]):
    with pytest.raises(BadInputError):
        sink_attention(*random_inputs(), **limits)


# --- keys in parts: gate once, after the merge --------------------------------------------------------


def parts_of_attention(inputs: Inputs, cuts: tuple[slice, ...]) -> list[tuple[Tensor, Tensor]]:
    """Plain (output, LSE) over each part of the keys, as devices of a ring would hold them."""
    query, key, value, _ = inputs
    plan = kit._Plan("cpu_flash", query.shape[-1] ** -0.5)
    return [kit._flash_forward((query, key[:, :, cut], value[:, :, cut]), None, plan)[:2] for cut in cuts]


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    outs, lses = (torch.stack(items) for items in zip(*parts, strict=True))
    lse = lses.logsumexp(0)
    return (outs * (lses - lse).exp().unsqueeze(-1)).sum(0), lse


def gated_after_the_merge(inputs: Inputs, cuts: tuple[slice, ...]) -> Tensor:
    return gate_with_sink(*merged(parts_of_attention(inputs, cuts)), inputs[3])


def gated_per_part(inputs: Inputs, cuts: tuple[slice, ...]) -> Tensor:
    sinks = inputs[3]
    parts = parts_of_attention(inputs, cuts)
    return merged([(gate_with_sink(out, lse, sinks), torch.logaddexp(lse, sinks[:, None])) for out, lse in parts])[0]


def merge_errors(merge: Callable[..., Tensor], inputs: Inputs, cuts: tuple[slice, ...], wanted: Tensor) -> list[float]:
    """Errors of output and sink gradient of attention whose keys lie in parts; the gate is plain autograd."""
    found = merge(inputs, cuts)
    grads = (torch.autograd.grad(out.square().sum(), inputs[3])[0] for out in (found, wanted))
    found_grad, wanted_grad = grads
    return [float((found - wanted).abs().max().detach()), float((found_grad - wanted_grad).abs().max())]


def parted(borders: list[int], length: int) -> tuple[slice, ...]:
    edges = [0, *sorted(borders), length]
    return tuple(slice(a, b) for a, b in pairwise(edges))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), borders=st.sets(st.integers(1, 8), max_size=4))
def test_a_gate_after_the_merge_is_right_for_any_parts(seed: int, borders: set[int]):
    inputs = random_inputs(seed=seed)
    wanted = eager(inputs, is_causal=False)
    assert max(merge_errors(gated_after_the_merge, inputs, parted(list(borders), 9), wanted)) < 1e-12


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), borders=st.sets(st.integers(1, 8), min_size=1, max_size=4))
def test_a_gate_per_part_is_wrong_and_counts_the_sink_once_per_part(seed: int, borders: set[int]):
    """Negative control of the one above; with the keys in one part both are the same."""
    inputs = query, key, value, sinks = random_inputs(seed=seed)
    cuts = parted(list(borders), 9)
    assert min(merge_errors(gated_per_part, inputs, cuts, eager(inputs, is_causal=False))) > 1e-4
    often = eager((query, key, value, sinks + math.log(len(cuts))), is_causal=False)
    assert max(merge_errors(gated_per_part, inputs, cuts, often)) < 1e-12


# --- the CUDA kernels, as far as they can be called without a GPU ---------------------------------


@pytest.mark.parametrize(
    ("device", "dtype", "dim", "needs_mask", "kernel"),
    [
        ("cpu", torch.float64, 7, True, "cpu_flash"),
        ("cuda", torch.bfloat16, 64, False, "cuda_flash"),
        ("cuda", torch.bfloat16, 64, True, "cuda_efficient"),
        ("cuda", torch.float32, 64, False, "cuda_efficient"),
        ("cuda", torch.float64, 64, False, None),
        ("cuda", torch.bfloat16, 60, False, None),
        ("mps", torch.float32, 64, False, None),
    ],
)
def test_the_kernel_is_chosen_by_what_it_can_do(
    device: str, dtype: torch.dtype, dim: int, needs_mask: bool, kernel: str | None
):
    tensor: Any = SimpleNamespace(device=SimpleNamespace(type=device), dtype=dtype, shape=(2, 4, 9, dim))
    assert kit._kernel_for(tensor, tensor, needs_mask=needs_mask) == kernel


@pytest.mark.parametrize(
    ("kernel", "window", "is_masked"),
    [
        ("cuda_flash", None, False),
        ("cuda_flash", 4, False),
        ("cuda_efficient", None, False),
        ("cuda_efficient", None, True),
    ],
)
def test_cuda_kernels_are_called_as_their_schema_says(kernel: Any, window: int | None, is_masked: bool):
    """On the meta device: argument order, layouts, grouped heads and the padded LSE, not numbers."""
    query, key, value, sinks = (
        tensor.detach().to("meta").requires_grad_() for tensor in random_inputs(dtype=torch.bfloat16)
    )
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool, device="meta") if is_masked else None
    plan = kit._Plan(kernel, 0.35, is_causal=mask is None, window=window)
    out = kit._SinkAttention.apply(query, key, value, sinks, mask, plan)
    assert out.shape == query.shape
    out.sum().backward()
    for tensor in (query, key, value, sinks):
        assert tensor.grad is not None
        assert (tensor.grad.shape, tensor.grad.dtype) == (tensor.shape, tensor.dtype)


def test_the_efficient_backward_gets_an_lse_of_whole_tiles():
    """The kernel demands rows in multiples of 32; those that are not there weigh exp(-inf)."""
    seen: list[Tensor] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._scaled_dot_product_efficient_attention_backward.default:
                seen.append(args[6])
            return func(*args, **(kwargs or {}))

    query, key, value, _ = (tensor.detach().to("meta") for tensor in random_inputs(dtype=torch.bfloat16))
    done = (query, torch.empty(2, 4, 9, device="meta"), [torch.empty(0, device="meta")] * 2)
    with Watch():
        kit._flash_backward(query, (query, key, value), None, done, kit._Plan("cuda_efficient", 0.35))
    assert [tuple(lse.shape) for lse in seen] == [(2, 4, 32)]
