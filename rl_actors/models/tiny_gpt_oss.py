"""A ~1M-parameter model of the GPT-OSS architecture: sinks, sliding window, grouped heads, top-2 of 4 experts, YaRN.

It is built from a configuration, with no download, and runs through the very same code as `openai/gpt-oss-20b`.
"""

from __future__ import annotations

import torch
from transformers import GptOssConfig, GptOssForCausalLM

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
