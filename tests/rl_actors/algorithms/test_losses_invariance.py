"""Losses are invariant under any split, blind to masked values and exact on the first on-policy step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl_actors.algorithms.kl import kl_loss
from rl_actors.algorithms.losses import LossOutput, merge_metrics, policy_loss, value_loss, zero_masked
from rl_actors.contracts.errors import BadInputError

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


Split = Callable[..., tuple[Tensor, Tensor]]


def shares_added(loss: Loss, batch: Batch, parts: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the batch from its parts, each told the counts of the whole batch."""
    pieces = [loss_and_gradient(loss, batch, rows, **options, **counts_for(loss, batch)) for rows in parts]
    return sum_of(pieces)


def sum_of(pieces: list[tuple[LossOutput, Tensor]]) -> tuple[Tensor, Tensor]:
    losses, gradients = zip(*pieces, strict=True)
    return torch.stack([output.loss.detach() for output in losses]).sum(), torch.stack(gradients).sum(0)


def ranks_averaged(loss: Loss, batch: Batch, parts: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Each part is a rank whose backend averages: what it hands over is its share times the number of ranks."""
    counts = counts_for(loss, batch)
    pieces = [loss_and_gradient(loss, batch, rows, **options, **counts) for rows in parts]
    scaled = [(LossOutput(len(parts) * output.loss, {}), len(parts) * gradient) for output, gradient in pieces]
    total, gradient = sum_of(scaled)
    return total / len(parts), gradient / len(parts)


def normalised_per_part(loss: Loss, batch: Batch, parts: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The common mistake: each part divides by its own counts, and the parts are averaged."""
    pieces = [loss_and_gradient(loss, batch, rows, **options) for rows in parts]
    total, gradient = sum_of(pieces)
    return total / len(parts), gradient / len(parts)


def split_errors(split: Split, loss: Loss, batch: Batch, parts: list[Tensor], **options: Any) -> dict[str, float]:
    """Largest differences of loss and gradient between the parts and the one batch."""
    whole, whole_gradient = loss_and_gradient(loss, batch, torch.arange(len(batch["mask"])), **options)
    total, gradient = split(loss, batch, parts, **options)
    return {
        "loss": abs(float(total - whole.loss.detach())),
        "gradient": float((gradient - whole_gradient).abs().max()),
    }


@pytest.mark.parametrize("split", [shares_added, ranks_averaged])
@pytest.mark.parametrize(("loss", "options"), CASES)
@quick
@given(seed=st.integers(0, 10_000), parts=st.integers(1, 6))
def test_microbatches_and_ranks_add_up_to_the_batch(
    split: Split, loss: Loss, options: dict[str, Any], seed: int, parts: int
) -> None:
    batch = random_batch(seed)
    found = split_errors(split, loss, batch, split_rows(seed, 6, parts), **options)
    assert max(found.values()) < 1e-11


@pytest.mark.parametrize(("loss", "options"), CASES)
@quick
@given(seed=st.integers(0, 10_000), parts=st.integers(1, 6))
def test_metrics_of_the_parts_merge_to_those_of_the_batch(
    loss: Loss, options: dict[str, Any], seed: int, parts: int
) -> None:
    batch = random_batch(seed)
    whole, _ = loss_and_gradient(loss, batch, torch.arange(6), **options)
    counts = counts_for(loss, batch)
    pieces = [loss_and_gradient(loss, batch, rows, **options, **counts)[0] for rows in split_rows(seed, 6, parts)]
    assert merge_metrics([output.metrics for output in pieces]) == pytest.approx(dict(whole.metrics))


@pytest.mark.parametrize(("loss", "options"), CASES)
@quick
@given(seed=st.integers(0, 10_000))
def test_control_normalising_per_part_fails_for_loss_and_gradient(
    loss: Loss, options: dict[str, Any], seed: int
) -> None:
    batch = random_batch(seed)
    batch["mask"][2:, :2] = True
    batch = {name: x if name == "mask" else torch.where(batch["mask"] & x.isnan(), 0.7, x) for name, x in batch.items()}
    # One sequence of at most five loss tokens beside four of eight or more: no denominator is the batch's by chance.
    found = split_errors(normalised_per_part, loss, batch, [torch.arange(2), torch.arange(2, 6)], **options)
    assert min(found.values()) > 1e-9


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@quick
@given(seed=st.integers(0, 10_000))
def test_control_ranks_that_average_bare_shares_fail(aggregation: str, seed: int) -> None:
    def bare(loss: Loss, batch: Batch, parts: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
        total, gradient = shares_added(loss, batch, parts, **options)
        return total / len(parts), gradient / len(parts)

    found = split_errors(bare, policy, random_batch(seed), split_rows(seed, 6, 3), aggregation=aggregation)
    assert min(found.values()) > 1e-9


# --- the first on-policy step ---------------------------------------------------------------------------


def token_weights(mask: Tensor, aggregation: str) -> Tensor:
    """How much one token's term counts: 1/N, 1/(S * its sequence's length), 1/S; 0 where masked."""
    num_sequences = int(mask.any(-1).sum())
    each = {
        "token_mean": torch.full_like(mask, 1, dtype=torch.float64) / int(mask.sum()),
        "sequence_mean": 1.0 / (num_sequences * mask.sum(-1, keepdim=True).clamp(min=1).double()),
        "sequence_sum": torch.full_like(mask, 1, dtype=torch.float64) / num_sequences,
    }[aggregation]
    return each.expand(mask.shape) * mask


def on_policy_faults(policy_step: Loss, seed: int, *, density: float, **options: Any) -> set[str]:
    """Which claims about the first step do not hold, with junk where masked and tool tokens in between."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(5, 7, generator=generator) < density
    mask[0, 3], mask[1], mask[2] = True, False, torch.tensor([False, True, True, False, True, True, True])
    current = torch.randn(5, 7, generator=generator, dtype=torch.float64) - 2.0
    advantages = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    logprobs = torch.where(mask, current, math.nan).requires_grad_()
    output = policy_step(logprobs, torch.where(mask, advantages, math.nan), mask, **options)
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    pulls = token_weights(mask, options["aggregation"]) * advantages
    # cispo is weight * log p by definition: its value is not -mean(A), its gradient is the same.
    value = -(pulls * current).sum() if options["kind"] == "cispo" else -pulls.sum()
    holds = {
        "ratio": output.metrics["ratio_mean"] == output.metrics["ratio_max"] == 1.0,
        "clip": output.metrics["clip_fraction"] == 0.0,
        "kl": output.metrics["approx_kl"] == 0.0,
        "loss": torch.allclose(output.loss.detach(), value, rtol=0, atol=1e-12),
        "gradient": torch.allclose(gradient, -pulls, rtol=0, atol=1e-12),
    }
    return {name for name, is_held in holds.items() if not is_held}


def first_step(logprobs: Tensor, advantages: Tensor, mask: Tensor, **options: Any) -> LossOutput:
    return policy_loss(logprobs, logprobs.detach(), advantages, mask, **CLIPS, **options)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    ("kind", "dual_clip"), [("ppo", None), ("ppo", 3.0), ("gspo", None), ("gspo", 3.0), ("cispo", None)]
)
@quick
@given(seed=st.integers(0, 10_000), density=st.floats(0.0, 1.0))
def test_first_on_policy_step_is_exact(
    kind: str, dual_clip: float | None, aggregation: str, seed: int, density: float
) -> None:
    options = {"kind": kind, "dual_clip": dual_clip, "aggregation": aggregation}
    assert on_policy_faults(first_step, seed, density=density, **options) == set()


def with_the_engines_logprobs(logprobs: Tensor, advantages: Tensor, mask: Tensor, **options: Any) -> LossOutput:
    """The ratio taken to what the engine said, which is off by a rounding or more."""
    noise = 0.4 * torch.sin(97.0 * logprobs.detach())
    return policy_loss(logprobs, logprobs.detach() + noise, advantages, mask, **CLIPS, **options)


def over_padded_positions(logprobs: Tensor, advantages: Tensor, mask: Tensor, **options: Any) -> LossOutput:
    """Divides by all positions, tool tokens and padding included."""
    counts = {"num_loss_tokens": mask.numel(), "num_sequences": len(mask)}
    return policy_loss(logprobs, logprobs.detach(), advantages, mask, **CLIPS, **options, **counts)


def with_a_detached_ratio(logprobs: Tensor, advantages: Tensor, mask: Tensor, **options: Any) -> LossOutput:
    """Old log-probabilities that carry the gradient too: it cancels."""
    output = first_step(logprobs, advantages, mask, **options)
    return LossOutput(output.loss.detach() + 0.0 * zero_masked(logprobs, mask).sum(), output.metrics)


def with_plain_logprobs(logprobs: Tensor, advantages: Tensor, mask: Tensor, **options: Any) -> LossOutput:
    """A log p in place of A ratio: the gradient is right, the value is not -mean(A)."""
    terms = -zero_masked(advantages, mask) * zero_masked(logprobs, mask)
    metrics = first_step(logprobs, advantages, mask, **options).metrics
    return LossOutput((token_weights(mask, options["aggregation"]) * terms).sum(), metrics)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    ("kind", "wrong", "faults"),
    [
        *((kind, with_the_engines_logprobs, {"ratio", "clip", "kl", "loss", "gradient"}) for kind in ("ppo", "gspo")),
        *((kind, with_a_detached_ratio, {"gradient"}) for kind in KINDS),
        ("ppo", with_plain_logprobs, {"loss"}),
    ],
)
@quick
@given(seed=st.integers(0, 10_000))
def test_control_a_wrong_first_step_fails_the_same_check(
    kind: str, wrong: Loss, faults: set[str], aggregation: str, seed: int
) -> None:
    found = on_policy_faults(wrong, seed, density=0.6, kind=kind, aggregation=aggregation)
    # A clip is active only where the noise happens to reach it.
    assert found | {"clip"} == faults | {"clip"}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", KINDS)
@quick
@given(seed=st.integers(0, 10_000))
def test_control_a_mean_over_padded_positions_fails_the_same_check(kind: str, aggregation: str, seed: int) -> None:
    found = on_policy_faults(over_padded_positions, seed, density=0.5, kind=kind, aggregation=aggregation)
    assert found >= {"ratio", "loss", "gradient"}


def test_control_another_aggregation_fails_the_same_check() -> None:
    for asked, given_ in itertools.permutations(AGGREGATIONS, 2):

        def other(*tensors: Tensor, given_: str = given_, **options: Any) -> LossOutput:
            return first_step(*tensors, **(options | {"aggregation": given_}))

        assert on_policy_faults(other, 1, density=0.6, kind="ppo", aggregation=asked) >= {"loss", "gradient"}


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


def nothing_faults(loss: Loss, seed: int, junk: float, **options: Any) -> set[str]:
    """What an all-masked batch leaves behind that is not 0."""
    batch = random_batch(seed)
    batch = {name: torch.where(x.isnan(), junk, x) for name, x in batch.items() if name != "mask"}
    batch["mask"] = torch.zeros(6, 5, dtype=torch.bool)
    output, gradient = loss_and_gradient(loss, batch, torch.arange(6), **options)
    holds = {
        "loss": output.loss.item() == 0.0,
        "gradient": bool((gradient == 0).all()),
        "metrics": all(math.isfinite(value) for value in output.metrics.values()),
    }
    return {name for name, is_held in holds.items() if not is_held}


@pytest.mark.parametrize(("loss", "options"), CASES)
@quick
@given(
    seed=st.integers(0, 10_000),
    junk=st.sampled_from([0.0, math.nan, math.inf, -1e30]),
    counts=st.sampled_from([None, 0, 9]),
)
def test_all_masked_batch_gives_zero_loss_and_gradient(
    loss: Loss, options: dict[str, Any], seed: int, junk: float, counts: int | None
) -> None:
    names = () if counts is None else ("num_loss_tokens",) if loss is critic else ("num_loss_tokens", "num_sequences")
    assert nothing_faults(loss, seed, junk, **options, **dict.fromkeys(names, counts)) == set()


def sum_over_count(batch: Batch, **_: Any) -> LossOutput:
    """Sum over count as it is usually written, on values that are all finite."""
    terms = -batch["advantages"] * (batch["logprobs"] - batch["old"]).exp()
    loss = (terms * batch["mask"]).sum() / batch["mask"].sum()
    return LossOutput(loss, {"loss": loss.item()})


def mean_of_selection(batch: Batch, **_: Any) -> LossOutput:
    """The mean of nothing."""
    loss = (-batch["advantages"] * batch["logprobs"])[batch["mask"]].mean()
    return LossOutput(loss, {"loss": loss.item()})


@pytest.mark.parametrize("naive", [sum_over_count, mean_of_selection])
def test_control_a_naive_mean_of_an_all_masked_batch_is_nan(naive: Loss) -> None:
    assert nothing_faults(naive, 3, 0.5) >= {"loss", "metrics"}
    batch = random_batch(3) | {"mask": torch.zeros(6, 5, dtype=torch.bool)}
    clean = {name: x if name == "mask" else x.nan_to_num(0.5) for name, x in batch.items()}
    assert naive(clean).loss.isnan()


def test_control_sum_over_count_of_an_all_masked_batch_has_a_nan_gradient() -> None:
    assert nothing_faults(sum_over_count, 3, 0.5) == {"loss", "gradient", "metrics"}


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
