"""Policy and critic: which position a number belongs to, and what the critic may not touch."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rl_actors.models.attachments import PolicyWithValue
from rl_actors.models.scoring_head import shift_right, token_logprobs_and_entropy

torch.set_num_threads(1)
IDS = torch.tensor([[1, 20, 30, 40, 50], [1, 21, 31, 0, 0]])
ATTENTION = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


class Lookup(torch.nn.Module):
    """A policy whose logits at t depend on token t alone, so that an off-by-one is seen."""

    def __init__(self, vocabulary: int = 60, hidden: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(vocabulary, hidden)
        self.output = torch.nn.Linear(hidden, vocabulary)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, output_hidden_states: bool) -> Any:
        hidden = self.embedding(input_ids)
        return SimpleNamespace(logits=self.output(hidden), hidden_states=(torch.zeros_like(hidden), hidden))


def module() -> PolicyWithValue:
    """A policy with a critic that already says something."""
    one = PolicyWithValue(Lookup(), 8)
    torch.nn.init.normal_(one.value_head[-1].weight)
    return one


def test_the_logprob_of_a_token_comes_from_the_position_before_it():
    logits = torch.full((1, 3, 4), 0.0)
    logits[0, 0, 2] = 5.0  # after token 0, token 2 is likely
    logits[0, 1, 1] = 5.0  # after token 1, token 1 is likely
    logits[0, 2, 0] = 50.0  # belongs to a token that is not there
    logprobs, _ = token_logprobs_and_entropy(logits, torch.tensor([[3, 2, 1]]), 1.0)
    likely = 5.0 - math.log(math.exp(5.0) + 3.0)
    assert logprobs[0].tolist() == pytest.approx([0.0, likely, likely], abs=1e-6)
    wrong, _ = token_logprobs_and_entropy(logits, torch.tensor([[3, 1, 2]]), 1.0)
    assert wrong[0, 1] < -5.0, "negative control: the other order is unlikely"


def test_logprobs_against_the_definition():
    one = module()
    outputs = one(IDS, ATTENTION, 0.5)
    logits = one.policy.output(one.policy.embedding(IDS)) / 0.5
    for row, column in [(0, 1), (0, 4), (1, 2)]:
        expected = torch.log_softmax(logits[row, column - 1], -1)[IDS[row, column]]
        torch.testing.assert_close(outputs.logprobs_BT[row, column], expected)
        entropy = torch.distributions.Categorical(logits=logits[row, column - 1]).entropy()
        torch.testing.assert_close(outputs.entropy_BT[row, column], entropy)


def test_the_value_of_a_token_is_that_of_the_state_it_is_sampled_in():
    one = module()
    values = one(IDS, ATTENTION, 1.0).values_BT
    before = one.value_head(one.policy.embedding(IDS[:, :-1])).squeeze(-1)
    torch.testing.assert_close(values[:, 1:], before)
    changed = IDS.clone()
    changed[0, 3] = 11
    moved = one(changed, ATTENTION, 1.0).values_BT
    assert torch.equal(moved[0, :4], values[0, :4]), "a token cannot change the value of its own state"
    assert moved[0, 4] != values[0, 4]


def test_the_first_column_is_nothing():
    outputs = module()(IDS, ATTENTION, 1.0)
    for field in (outputs.logprobs_BT, outputs.entropy_BT, outputs.values_BT):
        assert field.shape == IDS.shape
        assert field[:, 0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_is_the_samplers(temperature: float):
    logits = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[1, 2, 3, 4]])
    got, _ = token_logprobs_and_entropy(logits, ids, temperature)
    want, _ = token_logprobs_and_entropy(logits / temperature, ids, 1.0)
    torch.testing.assert_close(got, want)
    plain, _ = token_logprobs_and_entropy(logits, ids, 1.0)
    assert not torch.allclose(got, plain)


def test_entropy_of_an_even_choice_is_the_logarithm_of_their_number():
    _, entropy = token_logprobs_and_entropy(torch.zeros(1, 3, 16), torch.tensor([[1, 2, 3]]), 1.0)
    assert entropy[0].tolist() == pytest.approx([0.0, math.log(16), math.log(16)])


def test_half_precision_logits_are_scored_in_float32():
    logits = torch.randn(1, 4, 50, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([[1, 2, 3, 4]])
    half, _ = token_logprobs_and_entropy(logits.bfloat16(), ids, 1.0)
    full, _ = token_logprobs_and_entropy(logits.bfloat16().float(), ids, 1.0)
    assert half.dtype == torch.float32
    assert torch.equal(half, full)


def test_a_fresh_critic_says_zero():
    values = PolicyWithValue(Lookup(), 8)(IDS, ATTENTION, 1.0).values_BT
    assert float(values.detach().abs().sum()) == 0.0


def test_the_critic_cannot_pull_on_the_policy():
    one = module()
    one(IDS, ATTENTION, 1.0).values_BT.square().sum().backward()
    assert all(parameter.grad is None for parameter in one.policy.parameters())
    assert all(parameter.grad is not None for parameter in one.value_head.parameters())


def test_the_policy_does_feel_its_own_loss_and_the_critic_does_not():
    """Negative control of the one above."""
    one = module()
    one(IDS, ATTENTION, 1.0).logprobs_BT.sum().backward()
    assert all(parameter.grad is not None for parameter in one.policy.parameters())
    assert all(parameter.grad is None for parameter in one.value_head.parameters())


def test_shift_right_moves_and_drops_nothing():
    assert shift_right(torch.tensor([[1.0, 2.0]])).tolist() == [[0.0, 1.0, 2.0]]


def test_padding_changes_nothing_of_a_real_model(tiny_dir: Path):
    policy: Any = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()
    one = PolicyWithValue(policy, policy.config.hidden_size).eval()
    torch.nn.init.normal_(one.value_head[-1].weight)
    with torch.no_grad():
        padded = one(IDS, ATTENTION, 1.0)
        alone = one(IDS[1:, :3], ATTENTION[1:, :3], 1.0)
    for with_padding, without in zip(padded[:3], alone[:3], strict=True):
        torch.testing.assert_close(with_padding[1:, :3], without, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded.final_values_B[1:], alone.final_values_B, rtol=1e-4, atol=1e-5)


def test_the_final_value_is_that_of_the_state_after_the_last_token():
    """What the critic would say of one more token, whatever that token is and however much padding follows."""
    one = module()
    torch.nn.init.normal_(one.value_head[-1].weight)
    longer = torch.cat([IDS, torch.full((len(IDS), 1), 3)], dim=1)
    values = one(longer, torch.ones_like(longer), 1.0).values_BT
    lengths = ATTENTION.sum(-1)
    expected = torch.stack([row[length] for row, length in zip(values, lengths.tolist(), strict=True)])
    torch.testing.assert_close(one(IDS, ATTENTION, 1.0).final_values_B, expected)


def test_without_a_critic_there_are_no_values_and_nothing_to_train():
    one = PolicyWithValue(Lookup(), 8, has_critic=False)
    outputs = one(IDS, ATTENTION, 1.0)
    assert not outputs.values_BT.any()
    assert outputs.final_values_B.tolist() == [0.0] * len(IDS)
    assert all(name.startswith("policy.") for name, _ in one.named_parameters())
