"""The sorted expert path is Transformers' own, faster: same outputs, same gradients, whatever the routing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rl_actors.models.experts import SORTED_EXPERTS
from rl_actors.models.loading import load_backbone, load_causal_lm
from tests.rl_actors.fakes import save_tiny_model

torch.set_num_threads(1)
IDS = torch.randint(8, 200, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), seed=1)


def loss_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_outputs_and_gradients_are_those_of_the_eager_path(tiny: Path):
    eager: Any = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, experts_implementation="eager")
    ours = load_causal_lm(tiny)
    assert ours.config._experts_implementation == SORTED_EXPERTS
    (loss, gradients), (expected, wanted) = loss_and_gradients(ours), loss_and_gradients(eager)
    # Relative: at a loss of 17 one step of float32 is 1.9e-6, and which way it falls depends on the processor.
    assert loss == pytest.approx(expected, rel=1e-6)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(gradients[name], gradient, atol=1e-6), name


def test_a_swapped_expert_would_be_seen(tiny: Path):
    """Negative control of the one above."""
    ours = load_causal_lm(tiny)
    before = float(ours(input_ids=IDS, labels=IDS).loss.detach())
    with torch.no_grad():
        experts = ours.model.layers[0].mlp.experts
        experts.down_proj.copy_(experts.down_proj.flip(0))
    assert abs(float(ours(input_ids=IDS, labels=IDS).loss.detach()) - before) > 1e-4


def test_train_and_no_grad_passes_take_the_same_path(tiny: Path):
    ours = load_causal_lm(tiny)
    trained = ours.train()(input_ids=IDS).logits
    with torch.no_grad():
        assert torch.equal(ours.eval()(input_ids=IDS).logits, trained)


def test_an_expert_without_tokens_is_no_trouble(tiny: Path):
    ours = load_causal_lm(tiny)
    with torch.no_grad():
        for layer in ours.model.layers:
            layer.mlp.router.bias.copy_(torch.tensor([50.0, 40.0, *[0.0] * (len(layer.mlp.router.bias) - 2)]))
    loss, gradients = loss_and_gradients(ours)
    assert torch.isfinite(torch.tensor(loss))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())


def test_a_backbone_is_loaded_the_same_way(tiny: Path):
    assert load_backbone(tiny).config._experts_implementation == SORTED_EXPERTS
