"""Adapters: nothing changes until a step, off means the frozen model, and what is published has no adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rl_actors.contracts.errors import BadInputError
from rl_actors.models.attachments import ALPHA_PER_RANK, adapters_off, add_adapters, merged

torch.set_num_threads(1)
IDS = torch.tensor([[1, 20, 30, 40, 50]])


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture
def adapted(tiny_dir: Path) -> Any:
    """A model whose adapters say something."""
    torch.manual_seed(0)
    model = load(tiny_dir)
    add_adapters(model, 3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_fresh_adapters_change_nothing(tiny_dir: Path):
    model = load(tiny_dir)
    names = add_adapters(model, 3)
    assert torch.equal(logits(model), logits(load(tiny_dir)))
    assert len(names) == 4 * model.config.num_hidden_layers, "q, k, v and o of every layer"


def test_only_adapters_train(adapted: Any):
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".lora_" in name for name in trainable)


def test_off_is_the_frozen_model_and_on_again_is_not(adapted: Any, tiny_dir: Path):
    frozen, on = logits(load(tiny_dir)), logits(adapted)
    with adapters_off(adapted):
        assert torch.equal(logits(adapted), frozen)
    assert torch.equal(logits(adapted), on)
    assert not torch.allclose(on, frozen, atol=1e-3), "negative control: these adapters do something"
    assert any(parameter.requires_grad for parameter in adapted.parameters()), "and they still train"


def test_adapters_come_back_on_after_an_error(adapted: Any):
    on = logits(adapted)
    with pytest.raises(RuntimeError), adapters_off(adapted):
        raise RuntimeError
    assert torch.equal(logits(adapted), on)


def test_merged_weights_are_the_models_own_names_and_say_the_same(adapted: Any, tiny_dir: Path):
    plain = load(tiny_dir)
    state = merged(adapted, adapted.state_dict())
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    torch.testing.assert_close(logits(plain), logits(adapted), rtol=1e-5, atol=1e-5)


def test_merging_by_hand(adapted: Any):
    name = "model.layers.0.self_attn.q_proj"
    before = adapted.state_dict()
    a, b = (before[f"{name}.lora_{letter}.default.weight"] for letter in "AB")
    expected = before[f"{name}.base_layer.weight"] + ALPHA_PER_RANK * b @ a
    torch.testing.assert_close(merged(adapted, before)[f"{name}.weight"], expected)
    after = adapted.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before), "the model itself is left alone"


def test_a_model_without_projections_is_refused():
    with pytest.raises(BadInputError, match=r"recipe\.lora_rank = 4: Linear has none of q_proj"):
        add_adapters(torch.nn.Linear(2, 2), 4)
