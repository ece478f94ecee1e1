"""The head that scores chunk by chunk: the numbers and gradients of all logits, and only where the model allows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rl_actors.models import scoring_head
from rl_actors.models.loading import load_causal_lm
from rl_actors.models.scoring_head import ScoringHead, score_tokens, token_logprobs_and_entropy, use_scoring_head

torch.set_num_threads(1)
IDS = torch.tensor([[1, 20, 30, 40, 50, 60], [1, 21, 31, 41, 0, 0]])
ATTENTION = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
MASK = torch.tensor([[0, 0, 1, 1, 0, 1], [0, 1, 0, 1, 0, 0]]).bool()


def plain(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.fixture
def pair(tiny_dir: Path) -> tuple[Any, Any]:
    """The same model twice: with its own head, and with the scoring one."""
    one, other = plain(tiny_dir), plain(tiny_dir)
    assert use_scoring_head(other)
    return one, other


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows at a time, so that every case crosses a border between chunks."""
    monkeypatch.setattr(scoring_head, "LOGIT_CHUNK_VALUES", {"cpu": 2 * 512})


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_scores_and_gradients_are_those_of_all_logits(
    pair: tuple[Any, Any], mask: torch.Tensor | None, temperature: float
):
    found = [score_tokens(m, IDS, ATTENTION, temperature=temperature, mask_BT=mask) for m in pair]
    counted = ATTENTION.bool() if mask is None else mask
    for field in ("logprobs_BT", "entropy_BT"):
        full, chunked = (getattr(scores, field)[counted] for scores in found)
        torch.testing.assert_close(chunked, full, rtol=1e-5, atol=1e-6)
    for scores in found:
        (scores.logprobs_BT[counted].sum() + 0.3 * scores.entropy_BT[counted].sum()).backward()
    for (name, full), (_, chunked) in zip(pair[0].named_parameters(), pair[1].named_parameters(), strict=True):
        torch.testing.assert_close(chunked.grad, full.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_only_tokens_in_the_mask_are_scored(pair: tuple[Any, Any]):
    for model in pair:
        scores = score_tokens(model, IDS, ATTENTION, temperature=1.0, mask_BT=MASK)
        assert scores.logprobs_BT[~MASK].tolist() == [0.0] * int((~MASK).sum())
        assert (scores.logprobs_BT[MASK] < 0).all()
        assert scores.logprobs_BT.shape == scores.entropy_BT.shape == IDS.shape


def test_no_more_logits_than_the_mask_asks_for(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    rows: list[int] = []
    linear = torch.Tensor.__matmul__

    def counting(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if right.shape[-1] == pair[1].config.vocab_size:
            rows.append(len(left))
        return linear(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", counting)
    with torch.no_grad():
        score_tokens(pair[1], IDS, ATTENTION, temperature=1.0, mask_BT=MASK)
    assert sum(rows) == int(MASK.sum())
    assert max(rows) <= max(1, 2 * 512 // pair[1].config.vocab_size)


def test_called_with_hidden_states_alone_it_is_the_head_it_was(pair: tuple[Any, Any]):
    with torch.no_grad():
        one, other = (model(input_ids=IDS).logits for model in pair)
    assert torch.equal(one, other)


def test_a_model_loaded_to_train_scores_chunk_by_chunk(tiny_dir: Path):
    assert isinstance(load_causal_lm(tiny_dir).get_output_embeddings(), ScoringHead)


# --- the head by itself: any chunk, temperature and mask, and the mistakes that the same check must see ---------------


Scorer = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def chunked(
    head: ScoringHead, hidden: torch.Tensor, ids: torch.Tensor, **how: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """What models score with."""
    return head(hidden, ids, how["temperature"], how["mask"])


def full(head: ScoringHead, hidden: torch.Tensor, ids: torch.Tensor, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits at once, written down from the definition; the gradient is autograd's."""
    logps = (hidden @ head.weight.T / how["temperature"]).log_softmax(-1)
    logprobs, entropy = torch.zeros(2, *ids.shape, dtype=hidden.dtype).unbind()
    for row, column in how["mask"].nonzero().tolist():
        before = logps[row, column - 1]
        logprobs = logprobs.index_put((torch.tensor(row), torch.tensor(column)), before[ids[row, column]])
        entropy = entropy.index_put((torch.tensor(row), torch.tensor(column)), -(before.exp() * before).sum())
    return logprobs, entropy


def without_the_shift(head: ScoringHead, hidden: torch.Tensor, ids: torch.Tensor, **how: Any) -> Any:
    """Row t scores token t, which it has already read."""
    return chunked(head, hidden.roll(-1, 1), ids, **how)


def with_an_entropy_that_does_not_train(head: ScoringHead, hidden: torch.Tensor, ids: torch.Tensor, **how: Any) -> Any:
    """The backward pass leaves out -p (log p + H)."""
    logprobs, entropy = chunked(head, hidden, ids, **how)
    return logprobs, entropy.detach()


def without_entropy(head: ScoringHead, hidden: torch.Tensor, ids: torch.Tensor, **how: Any) -> Any:
    return head(hidden, ids, how["temperature"], how["mask"], False)


def at_another_temperature(head: ScoringHead, hidden: torch.Tensor, ids: torch.Tensor, **how: Any) -> Any:
    """The raw logits, whatever the sampler did."""
    return chunked(head, hidden, ids, **(how | {"temperature": 1.0}))


def with_a_temperature_that_only_scores(head: ScoringHead, hidden: torch.Tensor, ids: torch.Tensor, **how: Any) -> Any:
    """Right numbers; the backward pass forgets to divide by the temperature."""
    value = chunked(head, hidden, ids, **how)
    return tuple(x.detach() + how["temperature"] * (x - x.detach()) for x in value)


def head_errors(scorer: Scorer, seed: int, *, temperature: float, chunk: int = 2) -> dict[str, float]:
    """Largest differences from the full head: what it returns, and the gradients of a mixture of both."""
    generator = torch.Generator().manual_seed(seed)
    head = ScoringHead(4, 7, bias=False, dtype=torch.float64)
    hidden = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    torch.nn.init.normal_(head.weight, generator=generator)
    ids = torch.randint(0, 7, (3, 6), generator=generator)
    mask = torch.rand(3, 6, generator=generator) < 0.6
    mask[:, 0], mask[0, 1] = False, True
    mix = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring_head, "LOGIT_CHUNK_VALUES", {"cpu": 7 * chunk})
        for one in (scorer, full):
            logprobs, entropy = one(head, hidden, ids, temperature=temperature, mask=mask)
            grads = torch.autograd.grad((mix[0] * logprobs + mix[1] * entropy).sum(), (hidden, head.weight))
            found.append((logprobs, entropy, *grads))
    names = ("logprobs", "entropy", "hidden gradient", "weight gradient")
    return {name: float((a - b).abs().max().detach()) for name, a, b in zip(names, *found, strict=True)}


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), chunk=st.integers(1, 20), temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]))
def test_the_head_is_the_full_one_for_any_chunk_temperature_and_mask(seed: int, chunk: int, temperature: float):
    assert max(head_errors(chunked, seed, temperature=temperature, chunk=chunk).values()) < 1e-11


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (without_the_shift, {"logprobs", "entropy", "hidden gradient", "weight gradient"}),
        (without_entropy, {"entropy", "hidden gradient", "weight gradient"}),
        (with_an_entropy_that_does_not_train, {"hidden gradient", "weight gradient"}),
        (at_another_temperature, {"logprobs", "entropy", "hidden gradient", "weight gradient"}),
        (with_a_temperature_that_only_scores, {"hidden gradient", "weight gradient"}),
    ],
)
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10_000))
def test_a_wrong_head_fails_the_same_check(wrong: Scorer, what: set[str], seed: int):
    found = head_errors(wrong, seed, temperature=0.7)
    assert {name for name, error in found.items() if error > 1e-11} == what


class Scaled(torch.nn.Module):
    """Logits that are more than head(hidden): what Gemma 2, Cohere and Granite do."""

    device = torch.device("cpu")

    def __init__(self, scale: float, *, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base_model, self.head, self.scale = Backbone(), torch.nn.Linear(8, 60, bias=bias), scale

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        hidden = self.base_model(input_ids).last_hidden_state
        return type("Out", (), {"logits": self.head(hidden) * self.scale, "hidden_states": (hidden,)})


class Backbone(torch.nn.Module):
    """One embedding, seen through a model's output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(60, 8)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return type("Out", (), {"last_hidden_state": self.embedding(input_ids)})


def test_a_model_that_scales_its_logits_keeps_its_own_way():
    model = Scaled(0.5)
    assert not use_scoring_head(model)
    ids = torch.tensor([[1, 2, 3]])
    found = score_tokens(model, ids, torch.ones_like(ids), temperature=1.0).logprobs_BT
    expected, _ = token_logprobs_and_entropy(model(ids).logits, ids, 1.0)
    assert torch.equal(found, expected)


def test_a_head_with_a_bias_keeps_its_own_way():
    assert not use_scoring_head(Scaled(1.0, bias=True))


def test_a_plain_head_does_not():
    """Negative control of the two above."""
    assert use_scoring_head(Scaled(1.0))
