"""Where a model to train comes from: loaded with the fast paths of this machine, or built small on the spot.

A model with attention sinks must show that they act. The one built here is a ~1M-parameter GPT-OSS: sinks, sliding
window, grouped heads, top-2 of 4 experts, YaRN.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rl_actors.contracts import AttestationError
from rl_actors.models.experts import use_sorted_experts
from rl_actors.models.scoring_head import use_scoring_head
from rl_actors.models.sinks import (
    allowed_pairs,
    attention_scores,
    eager_sink_attention,
    modules_with_sinks,
    use_sink_attention,
)

# Half-precision gradients of a small model differ by hundredths of their maximum; without its sink by half of it.
_TOLERANCES: Final = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}
_PROBE_WINDOW: Final = 4
# More than two windows, so that a kernel which goes by blocks of a window has a whole block behind it.
_PROBE_TOKENS: Final = 3 * _PROBE_WINDOW


def load_causal_lm(path: str | Path) -> Any:
    """Load a causal LM to train, in float32, with a head that scores chunk by chunk where the model allows it.

    Raises:
        AttestationError: Its attention sinks do not act.
    """
    model = _ready_to_train(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    use_scoring_head(model)
    return model


def load_backbone(path: str | Path) -> Any:
    """Load a model without its language head, in float32. Raises AttestationError as `load_causal_lm` does."""
    return _ready_to_train(AutoModel.from_pretrained(path, dtype=torch.float32))


def _ready_to_train(model: Any) -> Any:
    """Choose our paths for GPT-OSS on CPU; any other model, and any GPU, keeps Transformers' choice."""
    if model.config.model_type != "gpt_oss":
        return model
    # On a GPU the sink kernel has not been measured yet (`benchmarks/gpu_learner.py`); eager attention is right there.
    if not torch.cuda.is_available():
        use_sorted_experts(model)
        use_sink_attention(model)
    check_sinks_reach_kernel(model)
    return model


def check_sinks_reach_kernel(model: Any) -> float:
    """Run a few tokens and compare each layer's attention, whatever it is, with the definition: output and gradients.

    Returns the largest error, as a fraction of the largest entry expected; 0 for a model without sinks. Run it before
    parameters are sharded; it costs six small attentions per layer.

    Raises:
        AttestationError: a layer's sinks, window or padding do not act on output and gradients as the definition says.
    """
    modules = modules_with_sinks(model)
    if not modules:
        return 0.0
    ids_BT = (torch.arange(2 * _PROBE_TOKENS, device=modules[0].sinks.device) + 1) % model.config.vocab_size
    left_BT = torch.ones_like(ids_BT).view(2, -1)
    left_BT[1, :_PROBE_WINDOW] = 0
    # Padding on the right, as training pads and as kernels without a mask allow, then on the left, where only a mask
    # keeps it out.
    with _narrow_windows([model.config, *modules]):
        rows = [_layer_errors(model, modules, ids_BT.view(2, -1), mask_BT) for mask_BT in (left_BT.flip(1), left_BT)]
    errors = torch.tensor(rows).amax(0).tolist()  # keeps a NaN, which the builtin may lose
    lost = {i: error for i, error in enumerate(errors) if not error <= _TOLERANCES[modules[i].sinks.dtype]}
    if lost:
        what = f"attention {model.config._attn_implementation!r} bends the sinks, the window or the padding"
        remedy = "call use_sink_attention(model), or load it with attn_implementation='eager'"
        raise AttestationError(f"{what}, relative error by layer {lost}: {remedy}")
    return max(errors)


@contextmanager
def _narrow_windows(owners: Sequence[Any]) -> Iterator[None]:
    """Narrow every sliding window to a third of the probe, so that a kernel that does not end at it shows that."""
    # Masks are built from the configuration's window, kernels get the layer's.
    before = [(owner, owner.sliding_window) for owner in owners if getattr(owner, "sliding_window", None)]
    try:
        for owner, window in before:
            owner.sliding_window = min(window, _PROBE_WINDOW)
        yield
    finally:
        for owner, window in before:
            owner.sliding_window = window


@torch.no_grad()
def _layer_errors(model: Any, modules: Sequence[Any], ids_BT: Tensor, mask_BT: Tensor) -> list[float]:
    """Return errors by layer for one padding; a layer that never called the attention interface has an infinite one."""
    errors = dict.fromkeys(modules, torch.inf)
    name = model.config._attn_implementation
    eager: Any = getattr(inspect.getmodule(type(modules[0])), "eager_attention_forward", None)
    original = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)

    def probe(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **arguments: Any) -> Any:
        errors[module] = _sink_error(original, module, (query, key, value), mask_BT.bool(), mask, arguments)
        return original(module, query, key, value, mask, **arguments)

    ALL_ATTENTION_FUNCTIONS[name] = probe
    try:
        model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
    return list(errors.values())


def _sink_error(
    original: Any, module: Any, qkv: Sequence[Tensor], is_real_BT: Tensor, mask: Any, arguments: dict[str, Any]
) -> float:
    """Return the largest relative error of one layer's output at real tokens, and of its gradients."""
    scale, window = arguments["scaling"], getattr(module, "sliding_window", None)
    allowed = allowed_pairs(qkv[0], qkv[1], is_real_BT[:, None, None, :], True, window)
    lse_BHT = attention_scores(qkv[0], qkv[1], scale).masked_fill(~allowed, -torch.inf).logsumexp(-1)
    sinks_H, before_H, trains = module.sinks, module.sinks.detach().clone(), module.sinks.requires_grad
    # Each sink at its head's mean LSE holds half of the weight: a kernel that drops it is wrong by a factor of two.
    sinks_H.requires_grad_(True).data.copy_(lse_BHT.transpose(1, 2)[is_real_BT].mean(0))
    try:
        inputs = query, key, value, _ = [*(x.detach().requires_grad_() for x in qkv), sinks_H]
        with torch.enable_grad():
            wanted = eager_sink_attention(query, key, value, sinks_H, allowed, scale).transpose(1, 2)[is_real_BT]
            found = original(module, query, key, value, mask, **arguments)[0][is_real_BT]
        expected = [wanted, *torch.autograd.grad(wanted, inputs, wanted.detach())]
        # A kernel that never saw the sinks gives them no gradient at all.
        results = [found, *torch.autograd.grad(found, inputs, wanted.detach(), allow_unused=True)]
    finally:
        sinks_H.requires_grad_(trains).data.copy_(before_H)
    pairs = [(x, y.detach()) for x, y in zip(results, expected, strict=True)]
    errors = [torch.inf if x is None else float((x.detach() - y).abs().max() / y.abs().max()) for x, y in pairs]
    return float(torch.tensor(errors).max())


EMBEDDING_STD = 0.3


def tiny_config(
    *, vocab_size: int, hidden_size: int, num_layers: int, num_experts: int, max_length: int, eos_token_id: int
) -> GptOssConfig:
    """Return the configuration. Hidden and intermediate sizes must be multiples of 32 (vLLM's AMX expert kernels)."""
    head_dim = 32
    return GptOssConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // head_dim,
        num_key_value_heads=max(1, hidden_size // head_dim // 2),
        head_dim=head_dim,
        num_local_experts=num_experts,
        num_experts_per_tok=min(2, num_experts),
        sliding_window=128,
        max_position_embeddings=max_length,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 1.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": max_length,
        },
        tie_word_embeddings=False,
        output_router_logits=False,
        initializer_range=0.05,
        pad_token_id=0,
        eos_token_id=eos_token_id,
        dtype="float32",
    )


def build_tiny_model(config: GptOssConfig, *, seed: int) -> GptOssForCausalLM:
    """Build the model with weights that depend on `seed` alone, in float32."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = GptOssForCausalLM(config).float()
        with torch.no_grad():
            model.model.embed_tokens.weight.normal_(0.0, EMBEDDING_STD)
            # Not tied, but a copy to start from: a token that attention fetched is then already half said, and copying
            # is learned several times sooner.
            model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        return model
    finally:
        torch.set_rng_state(state)
