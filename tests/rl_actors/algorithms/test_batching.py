"""Batching: alignment, token budgets, and a chunked head equal to the full one in forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rl_actors.algorithms.batching import chunked_token_logprobs_and_entropy, collate, filler_batch, plan_microbatches
from rl_actors.algorithms.losses import policy_loss
from rl_actors.contracts.errors import BadDataError, BadInputError
from rl_actors.contracts.rollouts import Routes, TrainingSample
from rl_actors.models.scoring_head import token_logprobs_and_entropy

torch.set_num_threads(1)
quick = settings(deadline=None, max_examples=40)


def sample(length: int, *, prompt: int = 1, name: str = "r", **changes: object) -> TrainingSample:
    """A sample whose token i has id 10 + i and rollout logprob -i."""
    fields: dict[str, object] = {
        "rollout_id": name,
        "group_id": 4,
        "weights_versions": (0,),
        "token_ids": tuple(range(10, 10 + length)),
        "loss_mask": tuple(i >= prompt for i in range(length)),
        "rollout_logprobs": tuple(-float(i) for i in range(length)),
        "reward": 0.5,
        "truncated": False,
    }
    return TrainingSample(**(fields | changes))  # pyright: ignore[reportArgumentType]


def test_collate_by_hand() -> None:
    batch = collate([sample(3), sample(2, reward=1.5, truncated=True, group_id=9)], pad_token_id=7, pad_to_multiple=4)
    assert batch.token_ids_BT.tolist() == [[10, 11, 12, 7], [10, 11, 7, 7]]
    assert batch.attention_mask_BT.tolist() == [[True, True, True, False], [True, True, False, False]]
    assert batch.loss_mask_BT.tolist() == [[False, True, True, False], [False, True, False, False]]
    assert batch.rollout_logprobs_BT.tolist() == [[0.0, -1.0, -2.0, 0.0], [0.0, -1.0, 0.0, 0.0]]
    assert batch.rewards_B.tolist() == [0.5, 1.5]
    assert batch.group_ids_B.tolist() == [4, 9]
    assert batch.truncated_B.tolist() == [False, True]
    assert (batch.num_loss_tokens, batch.num_sequences) == (3, 2)


def test_an_engines_routes_lie_by_layer_and_token_and_the_rest_is_open() -> None:
    routes = Routes(num_layers=2, top_k=1, experts=(1, 5, 2, 6))
    batch = collate([sample(3, routes=routes), sample(2)], pad_to_multiple=4)
    assert batch.routes_LBTK[:, :, :, 0].tolist() == [
        [[1, 2, -1, -1], [-1, -1, -1, -1]],
        [[5, 6, -1, -1], [-1, -1, -1, -1]],
    ]
    assert collate([sample(3)]).routes_LBTK.shape == (0, 1, 3, 0)
    assert filler_batch().routes_LBTK.numel() == 0


def test_collate_drops_junk_logprobs_of_unsampled_tokens() -> None:
    batch = collate([sample(3, prompt=2, rollout_logprobs=(math.nan, math.nan, -1.0))])
    assert batch.rollout_logprobs_BT.tolist() == [[0.0, 0.0, -1.0]]


def test_collate_copies_to_a_device() -> None:
    batch = collate([sample(2)]).to("meta")
    assert {str(batch.token_ids_BT.device), str(batch.rewards_B.device)} == {"meta"}


def test_a_loss_token_at_position_zero_is_refused() -> None:
    with pytest.raises(BadDataError, match="start with a prompt"):
        collate([sample(3), sample(3, prompt=0, name="bad")])


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(BadDataError, match="filler_batch"):
        collate([])


def test_a_filler_trains_nothing() -> None:
    batch = filler_batch(pad_token_id=3)
    logits = torch.randn(1, 2, 5, requires_grad=True)
    logprobs, _ = token_logprobs_and_entropy(logits, batch.token_ids_BT, 1.0)
    output = policy_loss(
        logprobs, logprobs, torch.ones(1, 2), batch.loss_mask_BT, clip_low=0.2, clip_high=0.2, num_loss_tokens=9
    )
    output.loss.backward()
    assert batch.num_loss_tokens == batch.num_sequences == 0
    assert output.loss.item() == 0.0
    assert logits.grad is not None
    assert bool((logits.grad == 0).all())


def workflow_lengths(seed: int, count: int) -> list[int]:
    """Long-tailed lengths like those of a tool-using workflow: prompt 60, about 200 tokens, some of 1,000."""
    tail = torch.randn(count, generator=torch.Generator().manual_seed(seed)).mul(0.6).exp()
    return [60 + int(140 * value) for value in tail.tolist()]


@quick
@given(
    lengths=st.lists(st.integers(1, 100), max_size=40),
    budget=st.integers(100, 400),
    waste=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_a_plan_covers_every_sample_once_within_budget_and_waste(lengths: list[int], budget: int, waste: float) -> None:
    plan = plan_microbatches(lengths, token_budget=budget, max_waste_fraction=waste)
    assert sorted(index for group in plan.groups for index in group) == list(range(len(lengths)))
    padded = [len(group) * max(lengths[index] for index in group) for group in plan.groups]
    assert all(tokens <= budget for tokens in padded)
    assert plan.padded_tokens == sum(padded)
    assert plan.real_tokens == sum(lengths)
    assert plan.waste_fraction <= waste + 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_padding_waste_on_workflow_lengths_is_within_a_tenth(seed: int) -> None:
    lengths = workflow_lengths(seed, 192)
    plan = plan_microbatches(lengths, token_budget=8192)
    assert plan.waste_fraction <= 0.10
    # The bound must not be bought with tiny microbatches.
    assert len(plan.groups) <= 2.5 * math.ceil(sum(lengths) / 8192)


def test_control_unsorted_microbatches_waste_more() -> None:
    lengths = workflow_lengths(0, 192)
    groups = [lengths[start : start + 8] for start in range(0, 192, 8)]
    padded = sum(len(group) * max(group) for group in groups)
    assert 1 - sum(lengths) / padded > 0.3


def test_pad_to_multiple_counts_against_the_budget() -> None:
    plan = plan_microbatches([5, 5, 5], token_budget=16, pad_to_multiple=8, max_waste_fraction=0.5)
    assert plan.groups == ((0, 1), (2,))
    assert plan.padded_tokens == 24
    assert plan.waste_fraction == pytest.approx(9 / 24)


def test_plan_of_nothing_is_empty() -> None:
    plan = plan_microbatches([], token_budget=8)
    assert (plan.groups, plan.waste_fraction) == ((), 0.0)


def test_a_sample_over_the_budget_is_refused_with_its_length() -> None:
    with pytest.raises(BadInputError, match="longest sample, 9 tokens"):
        plan_microbatches([3, 9], token_budget=8)


def head_inputs(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 7, (3, 5), generator=generator)


def full_head(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The reference: all logits at once, autograd's own backward."""
    logps = (hidden @ weight.T / temperature).log_softmax(-1)[:, :-1]
    chosen = logps.gather(-1, tokens[:, 1:, None])[..., 0]
    entropy = -(logps.exp() * logps).sum(-1)
    first = chosen.new_zeros(len(tokens), 1)
    return torch.cat([first, chosen], 1), torch.cat([first, entropy], 1)


@quick
@given(seed=st.integers(0, 1000), chunk=st.integers(1, 20), temperature=st.sampled_from([0.7, 1.0, 2.0]))
def test_chunked_head_equals_the_full_one(seed: int, chunk: int, temperature: float) -> None:
    hidden, weight, tokens = head_inputs(seed)
    mix = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    results = []
    for logprobs, entropy in (
        full_head(hidden, weight, tokens, temperature),
        chunked_token_logprobs_and_entropy(hidden, weight, tokens, chunk, temperature=temperature),
    ):
        loss = (mix[0] * logprobs + mix[1] * entropy).sum()
        results.append((logprobs, entropy, *torch.autograd.grad(loss, (hidden, weight))))
    for chunked, full in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(chunked, full, rtol=1e-10, atol=1e-12)


def test_chunked_head_against_finite_differences() -> None:
    hidden, weight, tokens = head_inputs(1)

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return chunked_token_logprobs_and_entropy(hidden, weight, tokens, 3, temperature=1.3)

    assert torch.autograd.gradcheck(head, (hidden, weight))


def test_a_second_derivative_of_the_chunked_head_is_refused_not_wrong() -> None:
    hidden, weight, tokens = head_inputs(1)
    total = sum(part.square().sum() for part in chunked_token_logprobs_and_entropy(hidden, weight, tokens, 3))
    (gradient,) = torch.autograd.grad(total, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_without_entropy_the_rest_is_the_same() -> None:
    hidden, weight, tokens = head_inputs(4)
    with_it, without = (
        chunked_token_logprobs_and_entropy(hidden, weight, tokens, 3, with_entropy=wanted) for wanted in (True, False)
    )
    assert torch.equal(with_it[0], without[0])
    assert not without[1].any()
    for one, other in zip(
        torch.autograd.grad(with_it[0].sum(), (hidden, weight)),
        torch.autograd.grad(without[0].sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("which", [0, 1])
def test_chunked_head_with_only_one_gradient_needed(which: int) -> None:
    hidden, weight, tokens = head_inputs(2)
    full = torch.autograd.grad(full_head(hidden, weight, tokens)[which].sum(), (hidden, weight))
    chunked = chunked_token_logprobs_and_entropy(hidden, weight, tokens, 4)[which].sum()
    torch.testing.assert_close(torch.autograd.grad(chunked, (hidden, weight)), full)
    frozen = chunked_token_logprobs_and_entropy(hidden, weight.detach(), tokens, 4)[which].sum()
    torch.testing.assert_close(torch.autograd.grad(frozen, hidden)[0], full[0])


def test_chunked_head_scores_only_masked_in_tokens_and_contains_nan() -> None:
    hidden, weight, tokens = head_inputs(3)
    mask = torch.tensor([[False, True, False, True, True], [False] * 5, [False, True, True, True, True]])
    with torch.no_grad():
        hidden[0, 1] = math.nan  # predicts token 2, which is masked
        hidden[1] = math.nan
    full, _ = full_head(hidden, weight, tokens)
    logprobs, entropy = chunked_token_logprobs_and_entropy(hidden, weight, tokens, 2, mask_BT=mask)
    torch.testing.assert_close(logprobs[mask], full[mask])
    assert bool((logprobs[~mask] == 0).all())
    assert bool((entropy[~mask] == 0).all())
    gradients = torch.autograd.grad((logprobs + entropy).sum(), (hidden, weight))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_control_a_scored_nan_is_not_hidden() -> None:
    hidden, weight, tokens = head_inputs(3)
    with torch.no_grad():
        hidden[0, 1] = math.nan
    logprobs, entropy = chunked_token_logprobs_and_entropy(hidden, weight, tokens, 2)
    assert logprobs[0, 2].isnan()
    assert entropy[0, 2].isnan()


def test_chunked_head_of_no_scored_token_has_zero_gradient() -> None:
    hidden, weight, tokens = head_inputs(4)
    logprobs, entropy = chunked_token_logprobs_and_entropy(hidden, weight, tokens, 2, mask_BT=torch.zeros(3, 5).bool())
    gradients = torch.autograd.grad((logprobs + entropy).sum(), (hidden, weight))
    assert all(bool((gradient == 0).all()) for gradient in gradients)


def test_entropy_of_an_excluded_token_is_finite() -> None:
    weight = torch.tensor([[0.0], [-1e30]], requires_grad=True)
    hidden = torch.ones(1, 2, 1, requires_grad=True)
    _, entropy = chunked_token_logprobs_and_entropy(hidden, weight, torch.zeros(1, 2).long(), 8)
    entropy.sum().backward()
    assert entropy.tolist() == [[0.0, 0.0]]
    assert hidden.grad is not None
    assert bool(hidden.grad.isfinite().all())


def test_chunked_head_in_bfloat16_agrees_with_the_full_one() -> None:
    hidden, weight, tokens = head_inputs(5, torch.bfloat16)
    logprobs, entropy = chunked_token_logprobs_and_entropy(hidden, weight, tokens, 2)
    torch.testing.assert_close(logprobs, token_logprobs_and_entropy(hidden @ weight.T, tokens, 1.0)[0])
    gradients = torch.autograd.grad((logprobs + entropy).sum(), (hidden, weight))
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.bfloat16]
    wide_hidden, wide_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    full_logprobs, full_entropy = full_head(wide_hidden, wide_weight, tokens)
    expected = torch.autograd.grad((full_logprobs + full_entropy).sum(), (wide_hidden, wide_weight))
    torch.testing.assert_close([g.double() for g in gradients], list(expected), rtol=0.1, atol=0.05)


class _LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation creates."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation and look at its results."""
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


@pytest.mark.parametrize(("head", "is_small"), [("chunked", True), ("full", False)])
def test_only_a_chunk_of_logits_ever_exists(head: str, *, is_small: bool) -> None:
    hidden = torch.randn(4, 33, 2, requires_grad=True)
    weight = torch.randn(500, 2, requires_grad=True)
    tokens = torch.zeros(4, 33, dtype=torch.long)
    with _LargestTensor() as largest:
        if head == "chunked":
            logprobs, _ = chunked_token_logprobs_and_entropy(hidden, weight, tokens, 8)
        else:
            logprobs, _ = token_logprobs_and_entropy(hidden @ weight.T, tokens, 1.0)
        logprobs.sum().backward()
    assert (largest.num_elements <= 8 * 500) == is_small


def test_chunk_must_be_positive() -> None:
    hidden, weight, tokens = head_inputs()
    with pytest.raises(BadInputError, match="must be positive"):
        chunked_token_logprobs_and_entropy(hidden, weight, tokens, 0)
