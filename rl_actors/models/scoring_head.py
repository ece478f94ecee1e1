"""Log-probability and entropy of the tokens that train, without a [B, T, V] tensor where the model's head allows it."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rl_actors.contracts import LOGIT_CHUNK_VALUES, BadInputError

_CHECK_IDS: Final = ((1, 2, 3, 4, 5, 6, 7, 8),)
_TOLERANCE: Final = 1e-4


class TokenScores(NamedTuple):
    """Log p and entropy in nats, [B, T], of each token scored, 0 elsewhere and in column 0; last hidden states."""

    logprobs_BT: Tensor
    entropy_BT: Tensor
    hidden_BTH: Tensor


class ScoringHead(nn.Linear):
    """A language head that also scores tokens chunk by chunk; called with hidden states alone, it is what it was."""

    # Scoring goes through the module's own call, so that hooks which gather sharded weights (ZeRO-3) run around it.
    def forward(
        self,
        input: Tensor,
        token_ids_BT: Tensor | None = None,
        temperature: float = 1.0,
        mask_BT: Tensor | None = None,
        with_entropy: bool = True,
    ) -> Any:
        """Return logits; with token ids, (log-probabilities, entropies) as `chunked_token_logprobs_and_entropy`."""
        if token_ids_BT is None:
            return super().forward(input)
        chunk = max(1, LOGIT_CHUNK_VALUES[input.device.type] // self.out_features)
        how: dict[str, Any] = {"temperature": temperature, "mask_BT": mask_BT, "with_entropy": with_entropy}
        return chunked_token_logprobs_and_entropy(input, self.weight, token_ids_BT, chunk, **how)


def use_scoring_head(model: Any) -> bool:
    """Turn the model's head into a `ScoringHead` where its logits are head(last hidden state) and nothing more.

    A head with a bias, or a model that scales or caps its logits, keeps its own way; returns False then.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or not _is_plain(model, head):
        return False
    # The same object by another class: names, hooks and optimizer groups of its weight stay.
    head.__class__ = ScoringHead
    return True


@torch.no_grad()
def _is_plain(model: Any, head: nn.Module) -> bool:
    # No configuration says what a model does to its logits, so a few tokens are tried.
    ids = torch.tensor(_CHECK_IDS, device=model.device)
    was_training = model.training
    model.eval()
    logits = model(input_ids=ids).logits
    plain = head(model.base_model(input_ids=ids).last_hidden_state)
    model.train(was_training)
    return torch.allclose(logits, plain, rtol=_TOLERANCE, atol=_TOLERANCE)


def score_tokens(
    model: Any,
    token_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    *,
    temperature: float,
    mask_BT: Tensor | None = None,
    with_entropy: bool = True,
) -> TokenScores:
    """Score each token under the model at the sampler's temperature; with a mask, only the tokens in it.

    A model without a `ScoringHead` computes all logits, and its entropy always.
    """
    inputs = {"input_ids": token_ids_BT, "attention_mask": attention_mask_BT}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(head, ScoringHead):
        hidden_BTH = model.base_model(**inputs).last_hidden_state
        logprobs_BT, entropy_BT = head(hidden_BTH, token_ids_BT, temperature, mask_BT, with_entropy)
        return TokenScores(logprobs_BT, entropy_BT, hidden_BTH)
    outputs = model(**inputs, output_hidden_states=True)
    logprobs_BT, entropy_BT = token_logprobs_and_entropy(outputs.logits, token_ids_BT, temperature)
    if mask_BT is not None:
        logprobs_BT, entropy_BT = (x_BT.masked_fill(~mask_BT, 0.0) for x_BT in (logprobs_BT, entropy_BT))
    return TokenScores(logprobs_BT, entropy_BT, outputs.hidden_states[-1])


def token_logprobs_and_entropy(logits_BTV: Tensor, token_ids_BT: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return (log-probability of each token, entropy of its distribution), [B, T] float32, column 0 is 0."""
    logp = torch.log_softmax(logits_BTV[:, :-1].float() / temperature, dim=-1)
    chosen = logp.gather(-1, token_ids_BT[:, 1:, None]).squeeze(-1)
    return shift_right(chosen), shift_right(-(logp.exp() * logp).sum(-1))


def shift_right(x_BT: Tensor) -> Tensor:
    """Prepend a column of zeros: what was computed at t-1 belongs to token t."""
    return nn.functional.pad(x_BT, (1, 0))


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
    """Return log-probability and entropy [B, T] in nats of each token, exact in forward and backward; entry 0 is 0.

    Only `chunk` rows of logits exist at a time, in float32: peak extra memory is O(chunk * V) instead of O(B * T * V).
    The backward pass recomputes them. Under ZeRO-3 gather `weight_VH` around forward *and* backward.

    Args:
        hidden_BTH: final hidden states, row t predicting token t + 1.
        weight_VH: LM head, without bias.
        chunk: positions per chunk, > 0.
        mask_BT: score only these tokens (normally the loss mask), 0 elsewhere: tool tokens then cost nothing and a
            NaN in their hidden state stays where it is. None scores all tokens.
        with_entropy: without it entropies are 0, and a third of the work on logits is saved.

    Raises:
        BadInputError: `chunk` is not positive.
    """
    if chunk <= 0:
        raise BadInputError("chunk", chunk, "positions per chunk must be positive")
    targets_BT = token_ids_BT[:, 1:]
    is_scored_BT = torch.ones_like(targets_BT, dtype=torch.bool) if mask_BT is None else mask_BT[:, 1:]
    rows = (hidden_BTH[:, :-1][is_scored_BT], weight_VH, targets_BT[is_scored_BT])
    logprobs_N, entropy_N = _ChunkedHead.apply(*rows, chunk, temperature, with_entropy)
    empty_BT = logprobs_N.new_zeros(targets_BT.shape)
    return (
        shift_right(empty_BT.masked_scatter(is_scored_BT, logprobs_N)),
        shift_right(empty_BT.masked_scatter(is_scored_BT, entropy_N)),
    )


class _ChunkedHead(torch.autograd.Function):
    """Rows of hidden states to (log p(target), entropy).

    With p = softmax(z): d log p_y / dz = onehot(y) - p, and dH / dz = -p * (log p + H).
    """

    # Logits are worked on in place: at a large vocabulary, time goes by passes over [chunk, V].
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
        # A gradient that nobody asked for comes as None, and its share of the work is saved.
        ctx.set_materialize_grads(False)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden states and head weight, each only where it is needed."""
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
    logits_CV = hidden_CH @ weight_VH.T
    logits_CV = logits_CV.to(_wide_dtype(logits_CV))
    if temperature != 1.0:
        logits_CV.div_(temperature)
    # Minus infinity becomes finite, so that p log p has its limit 0; a NaN stays, so that a diverged model is seen.
    return logits_CV.log_softmax(-1).clamp_(min=torch.finfo(logits_CV.dtype).min)


def _logit_gradient(
    logp_CV: Tensor, targets_C: Tensor, entropy_C: Tensor, grad_logprob_C: Tensor | None, grad_entropy_C: Tensor | None
) -> Tensor:
    """Return the gradient of the (temperature-scaled) logits of one chunk; uses up `logp_CV`."""
    grad_CV = logp_CV.exp()
    logprob_C = torch.zeros_like(entropy_C) if grad_logprob_C is None else grad_logprob_C
    if grad_entropy_C is None:
        grad_CV.mul_(-logprob_C.unsqueeze(-1))
    else:
        pull_CV = logp_CV.add_(entropy_C.unsqueeze(-1)).mul_(grad_entropy_C.unsqueeze(-1))
        grad_CV.mul_(pull_CV.add_(logprob_C.unsqueeze(-1))).neg_()
    return grad_CV.scatter_add_(-1, targets_C.unsqueeze(-1), logprob_C.unsqueeze(-1))


def _add_product(total_VH: Tensor, left_VC: Tensor, right_CH: Tensor) -> None:
    # Without a [V, H] tensor in between where the precisions allow it.
    if left_VC.dtype == right_CH.dtype == total_VH.dtype:
        total_VH.addmm_(left_VC, right_CH)
    else:
        total_VH += left_VC @ right_CH


def _wide_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
