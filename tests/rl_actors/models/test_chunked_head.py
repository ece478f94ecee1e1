"""The chunked head is the full one, forward and backward, and never holds more than a chunk of logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rl_actors.contracts.errors import BadInputError
from rl_actors.models.scoring_head import chunked_token_logprobs_and_entropy, token_logprobs_and_entropy

torch.set_num_threads(1)
quick = settings(deadline=None, max_examples=40)


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
