"""Log-probability and entropy of the tokens that train, without a [B, T, V] tensor where the model's head allows it."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from rl_actors.algorithms import chunked_token_logprobs_and_entropy, zero_masked
from rl_actors.contracts import LOGIT_CHUNK_VALUES

_CHECK_IDS: Final = ((1, 2, 3, 4, 5, 6, 7, 8),)
_TOLERANCE: Final = 1e-4


class TokenScores(NamedTuple):
    """Log p and entropy in nats, [B, T], of each token scored, 0 elsewhere and in column 0; last hidden states."""

    logprobs_BT: Tensor
    entropy_BT: Tensor
    hidden_BTH: Tensor


class ScoringHead(nn.Linear):
    """A language head that also scores tokens chunk by chunk; called with hidden states alone, it is what it was.

    Scoring goes through the module's own call, so that hooks which gather sharded weights (ZeRO-3) run around it.
    """

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
        return chunked_token_logprobs_and_entropy(
            input,
            self.weight,
            token_ids_BT,
            chunk,
            temperature=temperature,
            mask_BT=mask_BT,
            with_entropy=with_entropy,
        )


def use_scoring_head(model: Any) -> bool:
    """Turn the model's head into a `ScoringHead` where its logits are head(last hidden state) and nothing more.

    A head with a bias, or a model that scales or caps its logits, keeps its own way; returns False then.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or not _is_plain(model, head):
        return False
    head.__class__ = ScoringHead
    return True


@torch.no_grad()
def _is_plain(model: Any, head: nn.Module) -> bool:
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

    A model without a `ScoringHead` computes all logits; what it then says outside the mask is 0 too. Without
    `with_entropy` a `ScoringHead` leaves it at 0.
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
        logprobs_BT, entropy_BT = zero_masked(logprobs_BT, mask_BT), zero_masked(entropy_BT, mask_BT)
    return TokenScores(logprobs_BT, entropy_BT, outputs.hidden_states[-1])


def token_logprobs_and_entropy(logits_BTV: Tensor, token_ids_BT: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return (log-probability of each token, entropy of its distribution), [B, T] float32, column 0 is 0."""
    scaled = logits_BTV[:, :-1].float() / temperature
    logp = torch.log_softmax(scaled, dim=-1)
    chosen = logp.gather(-1, token_ids_BT[:, 1:, None]).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return shift_right(chosen), shift_right(entropy)


def shift_right(x_BT: Tensor) -> Tensor:
    """Prepend a column of zeros: what was computed at t-1 belongs to token t."""
    return nn.functional.pad(x_BT, (1, 0))
