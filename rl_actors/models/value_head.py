"""Policy and critic in one module: a causal LM and a value head on its detached hidden states."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rl_actors.models.scoring_head import score_tokens, shift_right


class TokenOutputs(NamedTuple):
    """Per-token learner outputs, aligned with the token they belong to; column 0 is never sampled and holds 0.

    `final_values_B` is V(state after the last token), which a truncated rollout would go on from.
    """

    logprobs_BT: torch.Tensor
    entropy_BT: torch.Tensor
    values_BT: torch.Tensor
    final_values_B: torch.Tensor


class PolicyWithValue(torch.nn.Module):
    """A causal LM with a critic."""

    def __init__(self, policy: torch.nn.Module, hidden_size: int, *, has_critic: bool = True) -> None:
        """Put a two-layer critic with zero output beside the policy; without a critic all values are 0."""
        super().__init__()
        self.policy, self.has_critic = policy, has_critic
        if not has_critic:
            return
        # At 0, the first advantages hold rewards alone, not the noise of a random critic.
        last = torch.nn.Linear(hidden_size, 1)
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
        self.value_head = torch.nn.Sequential(
            torch.nn.LayerNorm(hidden_size), torch.nn.Linear(hidden_size, hidden_size), torch.nn.GELU(), last
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        temperature: float,
        mask_BT: torch.Tensor | None = None,
    ) -> TokenOutputs:
        """Return log p(token | before) [B, T] in nats, entropy [B, T] and V(state in which the token is sampled).

        With a mask only its tokens are scored, and log-probability and entropy are 0 elsewhere; values are those of
        every state.
        """
        # The temperature is the rollout's: the learner must score the distribution that was sampled from.
        logprobs, entropy, hidden = score_tokens(
            self.policy, input_ids, attention_mask, temperature=temperature, mask_BT=mask_BT
        )
        if not self.has_critic:
            return TokenOutputs(logprobs, entropy, torch.zeros_like(logprobs), logprobs.new_zeros(len(logprobs)))
        # In bfloat16 training, hidden states and head may differ in precision.
        precision = next(self.value_head.parameters()).dtype
        # Detached: the critic must not pull on the policy's weights.
        values = self.value_head(hidden.detach().to(precision)).squeeze(-1).float()
        last = attention_mask.long().sum(-1, keepdim=True).sub(1).clamp(min=0)
        return TokenOutputs(logprobs, entropy, shift_right(values[:, :-1]), values.gather(-1, last).squeeze(-1))
