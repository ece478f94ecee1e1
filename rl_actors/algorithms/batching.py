"""Samples to tensors, and token-budget microbatches.

Alignment, everywhere in seatrial: a per-token array of length T is aligned with the token it *scores*. Entry t belongs
to token t given tokens < t, so entry 0 is 0 and position 0 is never a loss token. Logits and hidden states keep the
model's own alignment (row t predicts token t + 1); `models.scoring_head` does the shift, so that no caller ever does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rl_actors.contracts import BadDataError, BadInputError

if TYPE_CHECKING:
    from rl_actors.contracts import TrainingSample


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

    def to(self, device: torch.device | str) -> TrainingBatch:
        """Copy to a device."""
        return replace(self, **{item.name: getattr(self, item.name).to(device) for item in fields(self)})


def collate(samples: Sequence[TrainingSample]) -> TrainingBatch:
    """Right-pad samples with token 0 to the longest.

    Raises:
        BadDataError: no sample, or a loss token at position 0, which nothing predicts.
    """
    if not samples:
        raise BadDataError("samples", 0, "a batch needs one sample or more; for an idle rank take filler_batch()")
    for sample in samples:
        if sample.loss_mask and sample.loss_mask[0]:
            remedy = "the first token has no prediction; start with a prompt"
            raise BadDataError("loss_mask[0]", sample.rollout_id, remedy)
    width = max(1, *(len(sample.token_ids) for sample in samples))
    loss_mask_BT = _padded([sample.loss_mask for sample in samples], width, torch.bool)
    logprobs_BT = _padded([sample.rollout_logprobs for sample in samples], width, torch.float32)
    return TrainingBatch(
        token_ids_BT=_padded([sample.token_ids for sample in samples], width, torch.int64),
        attention_mask_BT=_padded([(True,) * len(sample.token_ids) for sample in samples], width, torch.bool),
        loss_mask_BT=loss_mask_BT,
        # Engines report something for prompt and tool tokens too; nothing may read it.
        rollout_logprobs_BT=torch.where(loss_mask_BT, logprobs_BT, torch.zeros_like(logprobs_BT)),
        rewards_B=torch.tensor([sample.reward for sample in samples], dtype=torch.float32),
        group_ids_B=torch.tensor([sample.group_id for sample in samples], dtype=torch.int64),
        truncated_B=torch.tensor([sample.truncated for sample in samples], dtype=torch.bool),
        routes_LBTK=_routes(samples, width),
    )


def filler_batch() -> TrainingBatch:
    """Return one row without loss tokens: loss 0, gradient 0."""
    # A rank with no work must run the same passes as its peers, or ZeRO-3 waits for its shards for ever.
    nothing_12 = torch.zeros(1, 2)
    return TrainingBatch(
        token_ids_BT=nothing_12.long(),
        attention_mask_BT=nothing_12 == 0,
        loss_mask_BT=nothing_12 != 0,
        rollout_logprobs_BT=nothing_12,
        rewards_B=torch.zeros(1),
        group_ids_B=torch.tensor([-1]),
        truncated_B=torch.tensor([False]),
        routes_LBTK=torch.empty(0, 1, 2, 0, dtype=torch.int16),
    )


def plan_microbatches(lengths: Sequence[int], *, token_budget: int, max_waste_fraction: float = 0.1) -> list[list[int]]:
    """Cut samples, sorted by length, into microbatches of indices, longest first, of at most `token_budget` positions.

    Ties keep their order. A position is a row times the padded width; `max_waste_fraction` of them may be padding.

    Raises:
        BadInputError: a sample is longer than the budget.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    if order and lengths[order[0]] > token_budget:
        raise BadInputError("token_budget", token_budget, f"raise it to the longest sample, {lengths[order[0]]} tokens")
    groups: list[list[int]] = []
    width = real = 0
    for index in order:
        rows = len(groups[-1]) + 1 if groups else 1
        area = rows * width
        # Each microbatch closes before its padding exceeds the share, so that the whole plan stays within it.
        if area == 0 or area > token_budget or area - real - lengths[index] > max_waste_fraction * area:
            groups.append([])
            width, real = lengths[index], 0
        groups[-1].append(index)
        real += lengths[index]
    return groups


def _routes(samples: Sequence[TrainingSample], width: int) -> Tensor:
    """Return the engine's routes as [layers, B, T, K]; what no engine recorded stays -1, for the router to choose."""
    layers, top_k = max((sample.routes.num_layers, sample.routes.top_k) for sample in samples)
    routes_BTLK = torch.full((len(samples), width, layers, top_k), -1, dtype=torch.int16)
    for row, sample in enumerate(samples):
        if sample.routes.num_tokens:
            experts = torch.tensor(sample.routes.experts, dtype=torch.int16).view(-1, layers, top_k)
            routes_BTLK[row, : len(experts)] = experts
    return routes_BTLK.permute(2, 0, 1, 3).contiguous()


def _padded(rows: Sequence[Sequence[float]], width: int, dtype: torch.dtype) -> Tensor:
    out_BT = torch.zeros((len(rows), width), dtype=dtype)
    for row_T, values in zip(out_BT, rows, strict=True):
        row_T[: len(values)] = torch.tensor(values, dtype=dtype)
    return out_BT
