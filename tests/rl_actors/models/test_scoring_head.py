"""The head that scores chunk by chunk: the numbers and gradients of all logits, and only where the model allows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
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
    monkeypatch.setattr(scoring_head, "CHUNK_VALUES", {"cpu": 2 * 512})


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
