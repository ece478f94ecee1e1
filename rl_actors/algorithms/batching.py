"""Samples to tensors, token-budget microbatches, and log-probabilities without a [B, T, V] tensor.

Alignment, everywhere in seatrial: a per-token array of length T is aligned with the token it *scores*. Entry t belongs
to token t given tokens < t, so entry 0 is 0 and position 0 is never a loss token. Logits and hidden states keep the
model's own alignment (row t predicts token t + 1); the functions here do the shift, so that no caller ever does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rl_actors.contracts import BadDataError, BadInputError, TrainingSample


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """Right-padded samples, one per row.

    `attention_mask_BT` is True on real tokens, `loss_mask_BT` True on tokens the policy sampled, `rollout_logprobs_BT`
    in nats under the engine and 0 where masked. `rewards_B` are float32, `group_ids_B` int64, `truncated_B` bool.
    `routes_LBTK` are int16, the engine's experts by layer of the model and token read, -1 where it has none; L and K
    are 0 when it recorded none at all.
    """

    token_ids_BT: Tensor
    attention_mask_BT: Tensor
    loss_mask_BT: Tensor
    rollout_logprobs_BT: Tensor
    rewards_B: Tensor
    group_ids_B: Tensor
    truncated_B: Tensor
    routes_LBTK: Tensor

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that train in this batch."""
        return int(self.loss_mask_BT.sum())

    @property
    def num_sequences(self) -> int:
        """Rows with at least one loss token."""
        return int(self.loss_mask_BT.any(-1).sum())

    def to(self, device: torch.device | str) -> TrainingBatch:
        """Copy to a device."""
        return replace(self, **{item.name: getattr(self, item.name).to(device) for item in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchPlan:
    """Groups of sample indices, longest samples first, with what padding costs."""

    groups: tuple[tuple[int, ...], ...]
    real_tokens: int
    padded_tokens: int

    @property
    def waste_fraction(self) -> float:
        """Share of computed positions that are padding, in [0, 1)."""
        return 1.0 - self.real_tokens / self.padded_tokens if self.padded_tokens else 0.0


def collate(samples: Sequence[TrainingSample], *, pad_token_id: int = 0, pad_to_multiple: int = 1) -> TrainingBatch:
    """Right-pad samples to the longest (rounded up to `pad_to_multiple`).

    Raises:
        BadDataError: no sample, or a loss token at position 0, which nothing predicts.
    """
    if not samples:
        raise BadDataError("samples", 0, "a batch needs one sample or more; for an idle rank take filler_batch()")
    for sample in samples:
        if sample.loss_mask and sample.loss_mask[0]:
            raise BadDataError(
                "loss_mask[0]", sample.rollout_id, "the first token has no prediction; start with a prompt"
            )
    width = _rounded_up(max(1, *(len(sample.token_ids) for sample in samples)), pad_to_multiple)
    loss_mask_BT = _padded([sample.loss_mask for sample in samples], width, False, torch.bool)
    logprobs_BT = _padded([sample.rollout_logprobs for sample in samples], width, 0.0, torch.float32)
    return TrainingBatch(
        token_ids_BT=_padded([sample.token_ids for sample in samples], width, pad_token_id, torch.int64),
        attention_mask_BT=_padded([(True,) * len(sample.token_ids) for sample in samples], width, False, torch.bool),
        loss_mask_BT=loss_mask_BT,
        rollout_logprobs_BT=torch.where(loss_mask_BT, logprobs_BT, torch.zeros_like(logprobs_BT)),
        rewards_B=torch.tensor([sample.reward for sample in samples], dtype=torch.float32),
        group_ids_B=torch.tensor([sample.group_id for sample in samples], dtype=torch.int64),
        truncated_B=torch.tensor([sample.truncated for sample in samples], dtype=torch.bool),
        routes_LBTK=_routes(samples, width),
    )


def _routes(samples: Sequence[TrainingSample], width: int) -> Tensor:
    """Lay the engine's routes out as [layers, B, T, K]; what no engine recorded stays -1, for the router to choose."""
    layers, top_k = max((sample.routes.num_layers, sample.routes.top_k) for sample in samples)
    routes_BTLK = torch.full((len(samples), width, layers, top_k), -1, dtype=torch.int16)
    for row, sample in enumerate(samples):
        if sample.routes.num_tokens:
            experts = torch.tensor(sample.routes.experts, dtype=torch.int16).view(-1, layers, top_k)
            routes_BTLK[row, : len(experts)] = experts
    return routes_BTLK.permute(2, 0, 1, 3).contiguous()


def filler_batch(*, pad_token_id: int = 0, width: int = 2) -> TrainingBatch:
    """One row without loss tokens: loss 0, gradient 0. Keeps a rank with no work in step with its peers (ZeRO-3)."""
    sample = TrainingSample(
        rollout_id="filler",
        group_id=-1,
        weights_versions=(),
        token_ids=(pad_token_id,) * width,
        loss_mask=(False,) * width,
        rollout_logprobs=(0.0,) * width,
        reward=0.0,
        truncated=False,
    )
    return collate([sample], pad_token_id=pad_token_id)


def plan_microbatches(
    lengths: Sequence[int], *, token_budget: int, max_waste_fraction: float = 0.1, pad_to_multiple: int = 1
) -> MicrobatchPlan:
    """Cut samples, sorted by length, into microbatches of at most `token_budget` padded positions.

    A microbatch is closed early when the next sample would push its padding above `max_waste_fraction`, so with
    `pad_to_multiple=1` the whole plan stays within it; a single sample always fits. Ties keep their order.

    Args:
        lengths: tokens of each sample.
        token_budget: rows times padded width allowed in one microbatch.
        max_waste_fraction: padding allowed in one microbatch, in [0, 1).
        pad_to_multiple: width is rounded up to this.

    Raises:
        BadInputError: a sample is longer than the budget.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    if order and _rounded_up(lengths[order[0]], pad_to_multiple) > token_budget:
        raise BadInputError("token_budget", token_budget, f"raise it to the longest sample, {lengths[order[0]]} tokens")
    groups: list[list[int]] = []
    width = real = padded = 0
    for index in order:
        rows = len(groups[-1]) + 1 if groups else 1
        area = rows * width
        if area == 0 or area > token_budget or area - real - lengths[index] > max_waste_fraction * area:
            groups.append([])
            width, real, rows = _rounded_up(lengths[index], pad_to_multiple), 0, 1
        groups[-1].append(index)
        real += lengths[index]
        padded += width
    return MicrobatchPlan(groups=tuple(map(tuple, groups)), real_tokens=sum(lengths), padded_tokens=padded)


def chunked_token_logprobs_and_entropy(
    hidden_BTH: Tensor,
    weight_VH: Tensor,
    token_ids_BT: Tensor,
    chunk: int,
    *,
    temperature: float = 1.0,
    mask_BT: Tensor | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each token from the last hidden states, exact in forward and backward.

    Only `chunk` rows of logits exist at a time, in float32: peak extra memory is O(chunk * V) instead of O(B * T * V).
    The backward pass recomputes them. Under ZeRO-3 gather `weight_VH` around forward *and*
    backward: the function reads the tensor, so module hooks do not run.

    Args:
        hidden_BTH: final hidden states, row t predicting token t + 1.
        weight_VH: LM head, without bias.
        token_ids_BT: the tokens themselves.
        chunk: positions per chunk, > 0.
        temperature: the sampler's temperature, > 0.
        mask_BT: score only these tokens (normally the loss mask), 0 elsewhere: tool tokens then cost nothing and a
            NaN in their hidden state stays where it is. None scores all tokens.
        with_entropy: without it entropies are 0, and a third of the work on logits is saved.

    Returns:
        Log-probabilities and entropies in nats, `[B, T]`, aligned with the token they score; entry 0 is 0. The entropy
        is that of the distribution the token was drawn from.

    Raises:
        BadInputError: `chunk` is not positive.
    """
    if chunk <= 0:
        raise BadInputError("chunk", chunk, "positions per chunk must be positive")
    targets_BT = token_ids_BT[:, 1:]
    is_scored_BT = torch.ones_like(targets_BT, dtype=torch.bool) if mask_BT is None else mask_BT[:, 1:]
    hidden_NH = hidden_BTH[:, :-1][is_scored_BT]
    targets_N = targets_BT[is_scored_BT]
    logprobs_N, entropy_N = _ChunkedHead.apply(hidden_NH, weight_VH, targets_N, chunk, temperature, with_entropy)
    empty_BT = logprobs_N.new_zeros(targets_BT.shape)
    return (
        _shifted(empty_BT.masked_scatter(is_scored_BT, logprobs_N)),
        _shifted(empty_BT.masked_scatter(is_scored_BT, entropy_N)),
    )


class _ChunkedHead(torch.autograd.Function):
    """Rows of hidden states to (log p(target), entropy), recomputing each chunk's logits in the backward pass.

    With p = softmax(z): d log p_y / dz = onehot(y) - p, and dH / dz = -p * (log p + H). Logits are worked on in place:
    at a large vocabulary, time goes by passes over [chunk, V].
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        chunk: int,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        """Score chunk by chunk; keep inputs and entropies."""
        logprobs_N = hidden_NH.new_empty(len(targets_N), dtype=_wide_dtype(hidden_NH))
        entropy_N = torch.zeros_like(logprobs_N)
        for start in range(0, len(targets_N), chunk):
            part = slice(start, start + chunk)
            logp_CV = _log_softmax_rows(hidden_NH[part], weight_VH, temperature)
            logprobs_N[part] = logp_CV.gather(-1, targets_N[part].unsqueeze(-1)).squeeze(-1)
            if with_entropy:
                entropy_N[part] = -logp_CV.exp().mul_(logp_CV).sum(-1)
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, entropy_N)
        ctx.chunk, ctx.temperature = chunk, temperature
        ctx.set_materialize_grads(False)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states and head weight; a gradient that is not needed is not computed."""
        hidden_NH, weight_VH, targets_N, entropy_N = ctx.saved_tensors
        grad_hidden_NH = torch.zeros_like(hidden_NH) if ctx.needs_input_grad[0] else None
        # The head's gradient sums thousands of chunks: half precision would lose the small ones.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=_wide_dtype(weight_VH)) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets_N), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logp_CV = _log_softmax_rows(hidden_NH[part], weight_VH, ctx.temperature)
            grad_logprob_C, grad_entropy_C = (grad_N if grad_N is None else grad_N[part] for grad_N in grad_outputs)
            grad_CV = _logit_gradient(logp_CV, targets_N[part], entropy_N[part], grad_logprob_C, grad_entropy_C)
            if ctx.temperature != 1.0:
                grad_CV.div_(ctx.temperature)
            grad_CV = grad_CV.to(weight_VH.dtype)
            if grad_hidden_NH is not None:
                grad_hidden_NH[part] = grad_CV @ weight_VH
            if grad_weight_VH is not None:
                _add_product(grad_weight_VH, grad_CV.T, hidden_NH[part])
        grad_weight = None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype)
        return grad_hidden_NH, grad_weight, None, None, None, None


def _log_softmax_rows(hidden_CH: Tensor, weight_VH: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities; minus infinity becomes finite, so that p log p has its limit 0.

    A NaN stays a NaN, so that a diverged model is seen.
    """
    logits_CV = _wide(hidden_CH @ weight_VH.T)
    if temperature != 1.0:
        logits_CV.div_(temperature)
    return logits_CV.log_softmax(-1).clamp_(min=torch.finfo(logits_CV.dtype).min)


def _logit_gradient(
    logp_CV: Tensor, targets_C: Tensor, entropy_C: Tensor, grad_logprob_C: Tensor | None, grad_entropy_C: Tensor | None
) -> Tensor:
    """Gradient with respect to the (temperature-scaled) logits of one chunk; uses up `logp_CV`."""
    grad_CV = logp_CV.exp()
    logprob_C = torch.zeros_like(entropy_C) if grad_logprob_C is None else grad_logprob_C
    if grad_entropy_C is None:
        grad_CV.mul_(-logprob_C.unsqueeze(-1))
    else:
        pull_CV = logp_CV.add_(entropy_C.unsqueeze(-1)).mul_(grad_entropy_C.unsqueeze(-1))
        grad_CV.mul_(pull_CV.add_(logprob_C.unsqueeze(-1))).neg_()
    return grad_CV.scatter_add_(-1, targets_C.unsqueeze(-1), logprob_C.unsqueeze(-1))


def _add_product(total_VH: Tensor, left_VC: Tensor, right_CH: Tensor) -> None:
    """Add left @ right to the total, without a [V, H] tensor in between where the precisions allow it."""
    if left_VC.dtype == right_CH.dtype == total_VH.dtype:
        total_VH.addmm_(left_VC, right_CH)
    else:
        total_VH += left_VC @ right_CH


def _wide_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_dtype(x))


def _shifted(x_BT: Tensor) -> Tensor:
    """Move predictions of row t to the token t + 1 they score."""
    return torch.nn.functional.pad(x_BT, (1, 0))


def _rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _padded(rows: Sequence[Sequence[float]], width: int, fill: float, dtype: torch.dtype) -> Tensor:
    out_BT = torch.full((len(rows), width), fill, dtype=dtype)
    for row_T, values in zip(out_BT, rows, strict=True):
        row_T[: len(values)] = torch.tensor(values, dtype=dtype)
    return out_BT
