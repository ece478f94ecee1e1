"""An expert path for CPU that spends no time on scattered writes.

Transformers' grouped path gathers one bias row per (token, expert) pair; the backward of that gather is a serial
scatter, a fifth of a training step on CPU. Here each expert is one `addmm` over its own tokens: equal up to rounding,
the same in train and no-grad passes. `benchmarks/expert_path.py` shows the difference.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

SORTED_EXPERTS: Final = "seatrial_sorted"


def sorted_experts(experts: Any, hidden_NH: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Return the weighted sum of each token's experts, [N, H].

    Args:
        experts: a GPT-OSS experts module: biases, and weights laid out [E, in, out].
        hidden_NH: tokens.
        expert_ids_NK: the K experts each token was routed to.
        weights_NK: their routing weights.
    """
    num_experts_per_token = expert_ids_NK.shape[-1]
    flat = expert_ids_NK.reshape(-1)
    order = torch.sort(flat, stable=True).indices
    counts = torch.bincount(flat, minlength=experts.num_experts).tolist()
    parts = hidden_NH.index_select(0, order // num_experts_per_token).split(counts)
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
