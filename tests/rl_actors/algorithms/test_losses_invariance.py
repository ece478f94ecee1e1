"""Losses are invariant under any split, blind to masked values and exact on the first on-policy step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl_actors.algorithms.kl import kl_loss
from rl_actors.algorithms.losses import (
    LossOutput,
    merge_metrics,
    policy_loss,
    value_loss,
    zero_masked,
)
from rl_actors.errors import BadInputError

torch.set_num_threads(1)
quick = settings(deadline=None, max_examples=15)
KINDS = ["ppo", "gspo", "cispo"]
AGGREGATIONS = ["token_mean", "sequence_mean", "sequence_sum"]
CLIPS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.3}
Batch = dict[str, Tensor]
Loss = Callable[..., LossOutput]


def random_batch(seed: int, rows: int = 6, width: int = 5) -> Batch:
    """Float64 tensors with NaN at every masked position, one row all-masked."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, width, generator=generator) < 0.6
    mask[0], mask[1, 0] = False, True

    def normal(scale: float) -> Tensor:
        x = scale * torch.randn(rows, width, generator=generator, dtype=torch.float64)
        return torch.where(mask, x, math.nan)

    old = normal(1.0) - 2.0
    return {
        "logprobs": old + normal(0.4),
        "old": old,
        "advantages": normal(2.0),
        "correction": normal(0.2).exp(),
        "mask": mask,
    }


def policy(batch: Batch, **options: Any) -> LossOutput:
    return policy_loss(
        batch["logprobs"],
        batch["old"],
        batch["advantages"],
        batch["mask"],
        correction_BT=batch["correction"],
        **CLIPS,
        **options,
    )


def leash(batch: Batch, **options: Any) -> LossOutput:
    return kl_loss(batch["logprobs"], batch["advantages"], batch["mask"], old_logprobs_BT=batch["old"], **options)


def critic(batch: Batch, **options: Any) -> LossOutput:
    return value_loss(batch["logprobs"], batch["old"], batch["advantages"], batch["mask"], clip=0.3, **options)


def loss_and_gradient(loss: Loss, batch: Batch, rows: Tensor, **options: Any) -> tuple[LossOutput, Tensor]:
    """Loss of some rows and its gradient with respect to the whole batch's logprobs."""
    logprobs = batch["logprobs"].clone().requires_grad_()
    part = {name: x[rows] for name, x in batch.items()} | {"logprobs": logprobs[rows]}
    output = loss(part, **options)
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    return output, gradient


def global_counts(batch: Batch) -> dict[str, int]:
    return {
        "num_loss_tokens": int(batch["mask"].sum()),
        "num_sequences": int(batch["mask"].any(-1).sum()),
    }


def split_rows(seed: int, rows: int, parts: int) -> list[Tensor]:
    """A random partition of the rows; some parts may be empty."""
    owner = torch.randint(0, parts, (rows,), generator=torch.Generator().manual_seed(seed))
    return [torch.nonzero(owner == part).flatten() for part in range(parts)]


CASES: list[Any] = [
    *(pytest.param(policy, {"kind": k, "aggregation": a}, id=f"{k}-{a}") for k in KINDS for a in AGGREGATIONS),
    *(
        pytest.param(policy, {"kind": k, "dual_clip": 1.5, "aggregation": a}, id=f"{k}-dual-{a}")
        for k in ("ppo", "gspo")
        for a in AGGREGATIONS
    ),
    *(
        pytest.param(leash, {"kind": k, "aggregation": a}, id=f"{k}-{a}")
        for k in ("k1", "k2", "k3")
        for a in AGGREGATIONS
    ),
    pytest.param(critic, {}, id="value"),
]


def counts_for(loss: Loss, batch: Batch) -> dict[str, int]:
    counts = global_counts(batch)
    return {"num_loss_tokens": counts["num_loss_tokens"]} if loss is critic else counts


@pytest.mark.parametrize(("loss", "options"), CASES)
@quick
@given(seed=st.integers(0, 10_000), parts=st.integers(1, 6))
def test_microbatches_add_up_to_the_batch(loss: Loss, options: dict[str, Any], seed: int, parts: int) -> None:
    batch = random_batch(seed)
    whole, whole_gradient = loss_and_gradient(loss, batch, torch.arange(6), **options)
    counts = counts_for(loss, batch)
    pieces = [loss_and_gradient(loss, batch, rows, **options, **counts) for rows in split_rows(seed, 6, parts)]
    total = torch.stack([output.loss for output, _ in pieces]).sum()
    torch.testing.assert_close(total, whole.loss)
    torch.testing.assert_close(torch.stack([gradient for _, gradient in pieces]).sum(0), whole_gradient)
    assert merge_metrics([output.metrics for output, _ in pieces]) == pytest.approx(dict(whole.metrics))


@pytest.mark.parametrize(("loss", "options"), CASES)
def test_ranks_that_average_gradients_scale_by_their_number(loss: Loss, options: dict[str, Any]) -> None:
    batch = random_batch(11)
    _, whole_gradient = loss_and_gradient(loss, batch, torch.arange(6), **options)
    counts = counts_for(loss, batch)
    ranks = [loss_and_gradient(loss, batch, rows, **options, **counts)[1] for rows in split_rows(5, 6, 3)]
    torch.testing.assert_close(torch.stack([3 * gradient for gradient in ranks]).mean(0), whole_gradient)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_control_local_denominators_are_seen(aggregation: str) -> None:
    batch = random_batch(4)
    whole, _ = loss_and_gradient(policy, batch, torch.arange(6), aggregation=aggregation)
    local = [
        loss_and_gradient(policy, batch, rows, aggregation=aggregation)[0].loss.detach()
        for rows in (torch.arange(2), torch.arange(2, 6))
    ]
    assert abs(float(torch.stack(local).mean() - whole.loss.detach())) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_first_on_policy_step_is_exact(kind: str, dual_clip: float | None) -> None:
    batch = random_batch(2)
    logprobs = batch["logprobs"].clone().requires_grad_()
    output = policy_loss(
        logprobs,
        logprobs.detach(),
        batch["advantages"],
        batch["mask"],
        kind=kind,  # pyright: ignore[reportArgumentType]
        dual_clip=None if kind == "cispo" else dual_clip,
        **CLIPS,
    )
    output.loss.backward()
    advantages, count = zero_masked(batch["advantages"], batch["mask"]), int(batch["mask"].sum())
    assert output.metrics == {"ratio_mean": 1.0, "ratio_max": 1.0, "clip_fraction": 0.0, "approx_kl": 0.0}
    torch.testing.assert_close(logprobs.grad, -advantages / count)
    if kind != "cispo":
        torch.testing.assert_close(output.loss, -advantages.sum() / count)


def test_control_a_moved_policy_is_not_on_policy() -> None:
    metrics = policy(random_batch(2)).metrics
    assert metrics["approx_kl"] > 0 < metrics["clip_fraction"]
    assert metrics["ratio_mean"] != 1.0 != metrics["ratio_max"]


@pytest.mark.parametrize(("loss", "options"), CASES)
@quick
@given(seed=st.integers(0, 10_000), junk=st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_masked_values_never_leak(loss: Loss, options: dict[str, Any], seed: int, junk: float) -> None:
    batch = random_batch(seed)
    clean = {name: zero_masked(x, batch["mask"]) if name != "mask" else x for name, x in batch.items()}
    dirty = {name: torch.where(batch["mask"], x, junk) if name != "mask" else x for name, x in batch.items()}
    expected, expected_gradient = loss_and_gradient(loss, clean, torch.arange(6), **options)
    output, gradient = loss_and_gradient(loss, dirty, torch.arange(6), **options)
    assert bool(output.loss.isfinite())
    torch.testing.assert_close(output.loss, expected.loss, rtol=0, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=0)
    assert dict(output.metrics) == dict(expected.metrics)
    assert bool((gradient[~batch["mask"]] == 0).all())


def test_control_multiplying_by_the_mask_leaks() -> None:
    x = torch.tensor([[1.0, math.nan]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    assert (x * mask).sum().isnan()
    # Masking after the arithmetic repairs the value but not the gradient.
    late = torch.where(mask, x.exp() * 0.0 + (x - x.detach()).sqrt(), torch.zeros(()))
    (gradient,) = torch.autograd.grad(late.sum(), x)
    assert bool(gradient.isnan().any())
    assert zero_masked(x, mask).sum().item() == 1.0


@pytest.mark.parametrize(("loss", "options"), CASES)
@pytest.mark.parametrize("known_counts", [False, True])
def test_all_masked_batch_gives_zero_loss_and_gradient(
    loss: Loss, options: dict[str, Any], *, known_counts: bool
) -> None:
    batch = random_batch(3) | {"mask": torch.zeros(6, 5, dtype=torch.bool)}
    counts = counts_for(loss, batch) if known_counts else {}
    output, gradient = loss_and_gradient(loss, batch, torch.arange(6), **options, **counts)
    assert output.loss.item() == 0.0
    assert bool((gradient == 0).all())
    assert all(math.isfinite(value) for value in output.metrics.values())


def test_empty_part_gives_zero() -> None:
    output, gradient = loss_and_gradient(policy, random_batch(3), torch.arange(0), num_loss_tokens=7)
    assert output.loss.item() == 0.0
    assert bool((gradient == 0).all())


def test_an_unmasked_nan_is_reported_not_hidden() -> None:
    batch = random_batch(3)
    batch["logprobs"][1, 0] = math.nan
    output = policy(batch)
    assert output.loss.isnan()
    assert math.isnan(output.metrics["ratio_max"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kind": "trpo"}, "choose one of ppo, gspo, cispo"),
        ({"aggregation": "mean"}, "choose one of token_mean"),
        ({"kind": "cispo", "dual_clip": 3.0}, "already bounds"),
        ({"dual_clip": 1.0}, "must exceed 1"),
        ({"aggregation": "sequence_mean", "num_loss_tokens": 4}, "both global counts"),
        ({"aggregation": "sequence_sum", "num_sequences": 4}, "both global counts"),
    ],
)
def test_incompatible_choices_are_refused_with_the_reason(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadInputError, match=reason):
        policy(random_batch(0), **options)
