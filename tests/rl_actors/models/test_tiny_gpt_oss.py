"""The tiny model is of the GPT-OSS architecture, about a million parameters, and a function of its seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rl_actors.models.loading import EMBEDDING_STD, build_tiny_model, tiny_config

torch.set_num_threads(1)


def config(**changes: Any):
    fields: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 128, "num_layers": 4, "num_experts": 4, "max_length": 512, "eos_token_id": 7,
    }  # fmt: skip
    return tiny_config(**(fields | changes))


SMALL = {"hidden_size": 64, "num_layers": 2, "num_experts": 2}


def test_the_default_shape_has_about_a_million_parameters():
    """1.1 million in blocks, of which every expert counts: what the README and the timings speak of."""
    assert 0.9e6 < build_tiny_model(config(), seed=0).num_parameters() < 1.6e6


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = build_tiny_model(config(**SMALL), seed=3).state_dict()
    torch.manual_seed(2)
    second = build_tiny_model(config(**SMALL), seed=3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_tiny_model(config(**SMALL), seed=4).state_dict()
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_building_leaves_the_callers_chance_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_tiny_model(config(**SMALL), seed=9)
    assert torch.equal(torch.rand(3), expected)


def test_the_output_matrix_starts_as_a_copy_of_the_embeddings_but_is_its_own():
    model = build_tiny_model(config(**SMALL), seed=0)
    embeddings, output = model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()
    assert torch.equal(embeddings, output)
    assert embeddings.data_ptr() != output.data_ptr()
    assert float(embeddings.std()) == pytest.approx(EMBEDDING_STD, rel=0.05)
    with torch.no_grad():
        output.zero_()
    assert float(embeddings.abs().sum()) > 0.0


def test_it_has_what_makes_gpt_oss_hard_to_serve():
    names = dict(build_tiny_model(config(), seed=0).named_parameters())
    assert names["model.layers.0.self_attn.sinks"].shape == (4,)
    assert names["model.layers.3.mlp.experts.gate_up_proj"].shape == (4, 128, 256)
    assert names["model.layers.3.mlp.router.weight"].shape == (4, 128)
    settings = config()
    assert set(settings.layer_types) == {"sliding_attention", "full_attention"}
    assert settings.num_key_value_heads < settings.num_attention_heads
    assert settings.rope_parameters["rope_type"] == "yarn"


@pytest.mark.parametrize(("hidden", "heads", "kv_heads"), [(32, 1, 1), (64, 2, 1), (128, 4, 2), (256, 8, 4)])
def test_heads_follow_from_the_hidden_size(hidden: int, heads: int, kv_heads: int):
    made = config(hidden_size=hidden)
    assert (made.num_attention_heads, made.num_key_value_heads, made.head_dim) == (heads, kv_heads, 32)
    assert made.intermediate_size % 32 == 0


@pytest.mark.parametrize(("experts", "active"), [(1, 1), (2, 2), (8, 2)])
def test_never_more_experts_are_active_than_there_are(experts: int, active: int):
    assert config(num_experts=experts).num_experts_per_tok == active


def test_it_computes_the_same_after_saving(tiny_dir: Path, tmp_path: Path):
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 20, 30, 40, 50]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


def test_it_is_causal(tiny_dir: Path):
    """What comes later must not change what was said before: the learner scores whole sequences at once."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()
    first, second = torch.tensor([[1, 20, 30, 40]]), torch.tensor([[1, 20, 30, 41]])
    with torch.no_grad():
        one, two = model(input_ids=first).logits, model(input_ids=second).logits
    torch.testing.assert_close(one[:, :3], two[:, :3])
    assert not torch.allclose(one[:, 3], two[:, 3])
