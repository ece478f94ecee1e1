"""What is put on a causal LM to train it: low-rank adapters beside its weights, and a value head on its hidden states.

Low-rank adapters (LoRA, arXiv 2106.09685): small trainable matrices beside frozen ones, by peft.
With W frozen, a projection computes W x + s B A x, s = alpha / rank; B starts at 0, so the first output is the frozen
model's. Turned off, the same weights are the frozen reference: no second model in memory. Engines, the registry and
users never see adapters: what is published and saved is W + s B A under the model's own names.

Policy and critic in one module: a causal LM and a value head on its detached hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from rl_actors.contracts import BadInputError
from rl_actors.models.scoring_head import score_tokens, shift_right

TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Projections of attention and of dense MLPs; fused experts have none of these names and stay frozen."""
ALPHA_PER_RANK: Final = 2.0
# peft's names: of an adapter, and of the frozen matrix inside an adapted module.
_NAME: Final = "default"
_BASE: Final = ".base_layer"


def add_adapters(model: nn.Module, rank: int) -> list[str]:
    """Freeze the model and put adapters of this rank beside its projections; returns their module names.

    Raises:
        BadInputError: The model has no projection that could take one.
    """
    # Here, because peft is slow to import, and most recipes train all weights.
    from peft import LoraConfig, inject_adapter_in_model

    parts = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    names = [name for name, _ in parts if name.rpartition(".")[2] in TARGETS]
    if not names:
        raise BadInputError("recipe.lora_rank", rank, f"{type(model).__name__} has none of {', '.join(TARGETS)}; use 0")
    settings = LoraConfig(r=rank, lora_alpha=int(ALPHA_PER_RANK * rank), target_modules=names)
    inject_adapter_in_model(settings, model, _NAME)
    return names


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Compute with the frozen weights alone inside the context."""
    layers = [layer for _, layer in _adapted(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of the model with every adapter added into its matrix, under the model's own names.

    `state` holds whole tensors, by the names of `model.state_dict()`; it is not changed.
    """
    found = {name.replace(_BASE, ""): x for name, x in state.items() if ".lora_" not in name}
    for name, part in _adapted(model):
        # In float32: an update is far smaller than the weight it is added to.
        a_RI, b_OR = (state[f"{name}.lora_{letter}.{_NAME}.weight"].float() for letter in "AB")
        weight = found[f"{name}.weight"]
        found[f"{name}.weight"] = torch.add(weight.float(), b_OR @ a_RI, alpha=float(part.scaling[_NAME])).to(
            weight.dtype
        )
    return found


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the modules with adapters, by name."""
    return [(name, part) for name, part in model.named_modules() if hasattr(part, "lora_A")]


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
