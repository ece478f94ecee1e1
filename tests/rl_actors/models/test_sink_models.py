"""GPT-OSS models on sink attention equal eager models; the start-up self-test fires when sinks get lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rl_actors.contracts.errors import AttestationError, BadInputError
from rl_actors.models import sinks as kit
from rl_actors.models.loading import build_tiny_model, check_sinks_reach_kernel, tiny_config
from rl_actors.models.sinks import SINK_ATTENTION, use_sink_attention

torch.set_num_threads(1)


def tiny_model(seed: int = 0, window: int = 4) -> Any:
    config = tiny_config(vocab_size=64, hidden_size=128, num_layers=4, num_experts=2, max_length=64, eos_token_id=7)
    config.sliding_window = window
    model: Any = build_tiny_model(config, seed=seed)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(seed))
    return model


def model_results(model: Any, mask_BT: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of real tokens and all gradients of a loss over them."""
    ids = torch.randint(8, 64, (3, 20), generator=torch.Generator().manual_seed(2))
    real = torch.ones_like(ids, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    logits = model(input_ids=ids, attention_mask=mask_BT).logits[real]
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


PADDINGS = {
    "none": None,
    "right": (torch.arange(20) < torch.tensor([20, 13, 5])[:, None]).long(),
    "left": (torch.arange(20) >= torch.tensor([0, 7, 15])[:, None]).long(),
}


@pytest.mark.parametrize("padding", PADDINGS)
def test_a_model_is_the_eager_model(padding: str):
    wanted, wanted_grads = model_results(tiny_model(), PADDINGS[padding])
    model = tiny_model()
    assert use_sink_attention(model) is None
    assert model.config._attn_implementation == SINK_ATTENTION
    found, grads = model_results(model, PADDINGS[padding])
    assert torch.allclose(found, wanted, atol=1e-5)
    assert grads.keys() == wanted_grads.keys()
    assert any(name.endswith("sinks") for name in grads)
    for name, grad in wanted_grads.items():
        assert torch.allclose(grads[name], grad, atol=1e-5), name


def test_generation_with_a_cache_gives_the_same_tokens():
    ids = torch.randint(8, 64, (2, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    model = tiny_model()
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    use_sink_attention(model)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False), wanted)


def test_masks_are_bool_or_absent(monkeypatch: pytest.MonkeyPatch):
    seen: list[Tensor | None] = []
    model = tiny_model()
    use_sink_attention(model)
    forward = ALL_ATTENTION_FUNCTIONS[SINK_ATTENTION]

    def watched(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **rest: Any) -> Any:
        seen.append(mask)
        return forward(module, q, k, v, mask, **rest)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, SINK_ATTENTION, watched)
    model_results(model, PADDINGS["right"])
    assert seen == [None] * 4
    seen.clear()
    model_results(model, PADDINGS["left"])
    assert {mask.dtype for mask in seen if mask is not None} == {torch.bool}
    assert len(seen) == 4


def test_a_saved_model_does_not_name_the_switch(tmp_path: Any):
    model = tiny_model()
    use_sink_attention(model)
    model.save_pretrained(tmp_path)
    assert GptOssForCausalLM.from_pretrained(tmp_path).config._attn_implementation != SINK_ATTENTION


def llama() -> LlamaForCausalLM:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


def test_a_model_without_sinks_is_left_alone_and_says_why():
    model = llama()
    before = model.config._attn_implementation
    assert use_sink_attention(model) == "llama has no attention sinks"
    assert model.config._attn_implementation == before
    assert check_sinks_reach_kernel(model) == 0.0


def test_a_layer_of_unknown_kind_is_left_alone():
    model = tiny_model()
    model.config.layer_types = ["chunked_attention"] * 4
    assert "chunked_attention" in (use_sink_attention(model) or "")
    assert model.config._attn_implementation != SINK_ATTENTION


def test_dropout_in_attention_is_refused():
    model = tiny_model()
    use_sink_attention(model)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(BadInputError, match="attention_dropout"):
        model.train()(input_ids=torch.arange(8, 16)[None])


# --- the self-test ------------------------------------------------------------------------------------


def state(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("window", [2, 4, 128])
@pytest.mark.parametrize("switch", [True, False])
def test_the_self_test_passes_and_leaves_the_model_as_it_was(switch: bool, window: int):
    model = tiny_model(window=window)
    if switch:
        use_sink_attention(model)
    model.model.layers[0].self_attn.sinks.requires_grad_(False)
    before = state(model)
    assert check_sinks_reach_kernel(model) < 1e-5
    assert all(torch.equal(before[name], tensor) for name, tensor in state(model).items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.model.layers[0].self_attn.sinks.requires_grad
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping
    assert model.config.sliding_window == window
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [window, None] * 2


def test_the_self_test_passes_in_bfloat16():
    model = tiny_model().to(torch.bfloat16)
    use_sink_attention(model)
    assert check_sinks_reach_kernel(model) < 0.1


def dropped(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **rest: Any) -> Any:
    """A kernel that knows no sinks, as FlashAttention-2."""
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, scaling=rest["scaling"])


def frozen(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **rest: Any) -> Any:
    """Right outputs, but no gradient for the sinks."""
    rest["s_aux"] = rest["s_aux"].detach()
    return kit._transformers_attention(module, q, k, v, mask, **rest)


def shuffled(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **rest: Any) -> Any:
    """Sinks that reach the wrong heads."""
    rest["s_aux"] = rest["s_aux"].roll(1)
    return kit._transformers_attention(module, q, k, v, mask, **rest)


def beyond_its_window(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **rest: Any) -> Any:
    """A kernel that is told of no window, and no mask ends it either."""
    out = kit.sink_attention(q, k, v, rest["s_aux"], mask=real_keys(mask), scale=rest["scaling"])
    return out.transpose(1, 2), None


def real_keys(mask: Tensor | None) -> Tensor | None:
    """Those that some query may attend to."""
    return None if mask is None else mask.any(-2, keepdim=True)


def through_padding(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **rest: Any) -> Any:
    """A kernel that keeps its window and drops every mask."""
    return kit._transformers_attention(module, q, k, v, None, **rest)


def blind_across_blocks(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **rest: Any) -> Any:
    """A kernel whose blocks of a window forget the block before: right up to one window."""
    window = rest["sliding_window"]
    if window is None:
        return kit._transformers_attention(module, q, k, v, mask, **rest)
    block = torch.arange(q.shape[2]) // window
    same = (block[:, None] == block).expand(1, 1, -1, -1)
    limits = same if mask is None else same & mask
    return kit.sink_attention(q, k, v, rest["s_aux"], mask=limits, scale=rest["scaling"]).transpose(1, 2), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("broken", [dropped, frozen, shuffled, beyond_its_window, through_padding, blind_across_blocks])
def test_the_self_test_fires(broken: Callable[..., Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model(window=128).to(dtype)
    use_sink_attention(model)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, SINK_ATTENTION, broken)
    before = state(model)
    with pytest.raises(AttestationError, match="use_sink_attention"):
        check_sinks_reach_kernel(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in state(model).items())
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping


@pytest.mark.parametrize(
    ("broken", "layers"),
    [(beyond_its_window, [0, 2]), (blind_across_blocks, [0, 2]), (through_padding, [0, 1, 2, 3])],
)
def test_the_self_test_names_the_layers_that_are_wrong(
    broken: Callable[..., Any], layers: list[int], monkeypatch: pytest.MonkeyPatch
):
    model = tiny_model(window=128)
    use_sink_attention(model)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, SINK_ATTENTION, broken)
    with pytest.raises(AttestationError) as raised:
        check_sinks_reach_kernel(model)
    assert [layer for layer in range(4) if f"{layer}: " in str(raised.value)] == layers


def test_the_self_test_is_quick():
    model = tiny_model(window=128)
    use_sink_attention(model)
    before = time.process_time()
    check_sinks_reach_kernel(model)
    assert time.process_time() - before < 0.3


def test_the_self_test_fires_when_attention_bypasses_the_interface(monkeypatch: pytest.MonkeyPatch):
    model = tiny_model()
    attention = model.model.layers[2].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(AttestationError, match=r"\{2: inf\}"):
        check_sinks_reach_kernel(model)
