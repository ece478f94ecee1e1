"""Policy and critic in one module: a causal LM and a value head on its detached hidden states."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class TokenOutputs(NamedTuple):
    """Per-token learner outputs, aligned with the token they belong to; column 0 is never sampled and holds 0."""

    logprobs_BT: torch.Tensor
    entropy_BT: torch.Tensor
    values_BT: torch.Tensor
    final_values_B: torch.Tensor
    """V(state after the last token): what a truncated rollout would go on from."""


class PolicyWithValue(torch.nn.Module):
    """A causal LM with a critic. The critic reads detached states, so it cannot pull on the policy's weights."""

    def __init__(self, policy: torch.nn.Module, hidden_size: int, *, has_critic: bool = True) -> None:
        """Put a two-layer critic with zero output beside the policy; without a critic all values are 0."""
        super().__init__()
        self.policy, self.has_critic = policy, has_critic
        if not has_critic:
            return
        last = torch.nn.Linear(hidden_size, 1)
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
        self.value_head = torch.nn.Sequential(
            torch.nn.LayerNorm(hidden_size), torch.nn.Linear(hidden_size, hidden_size), torch.nn.GELU(), last
        )

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, temperature: float) -> TokenOutputs:
        """Return log p(token | before) [B, T] in nats, entropy [B, T] and V(state in which the token is sampled).

        `temperature` is the rollout's: the learner must score the distribution that was sampled from.
        """
        outputs: Any = self.policy(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        logprobs, entropy = token_logprobs_and_entropy(outputs.logits, input_ids, temperature)
        if not self.has_critic:
            return TokenOutputs(logprobs, entropy, torch.zeros_like(logprobs), logprobs.new_zeros(len(logprobs)))
        values = self.value_head(outputs.hidden_states[-1].detach().float()).squeeze(-1)
        last = attention_mask.long().sum(-1, keepdim=True).sub(1).clamp(min=0)
        return TokenOutputs(logprobs, entropy, shift_right(values[:, :-1]), values.gather(-1, last).squeeze(-1))


def token_logprobs_and_entropy(
    logits_BTV: torch.Tensor, token_ids_BT: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log-probability of each token, entropy of its distribution), [B, T] float32, column 0 is 0."""
    scaled = logits_BTV[:, :-1].float() / temperature
    logp = torch.log_softmax(scaled, dim=-1)
    chosen = logp.gather(-1, token_ids_BT[:, 1:, None]).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return shift_right(chosen), shift_right(entropy)


def shift_right(x_BT: torch.Tensor) -> torch.Tensor:
    """Prepend a column of zeros: what was computed at t-1 belongs to token t."""
    return torch.nn.functional.pad(x_BT, (1, 0))
