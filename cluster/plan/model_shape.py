"""Size of a decoder from its configuration: parameters in all, parameters a token passes, bytes of KV cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cluster.spec import ModelSection

MIN_SHARDED_PARAMS = 500_000_000  # 8 GB of weights, gradients and optimizer state on each learner


MIN_PARTITIONED_PARAMS = 8_000_000_000  # 2 bytes each of weights and gradients alone fill 32 GB


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What decides size and speed of a decoder. `active_experts` is 1 and `num_experts` 1 for a dense model."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    active_experts: int
    vocab_size: int

    def _params(self, experts: int) -> int:
        hidden, inner = self.hidden_size, self.intermediate_size
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = hidden * (2 * query + 2 * key) + query + 2 * key + hidden + self.num_heads
        expert = 3 * hidden * inner + 2 * inner + hidden
        router = (hidden + 1) * self.num_experts
        layer = attention + router + experts * expert + 2 * hidden
        return 2 * self.vocab_size * hidden + self.num_layers * layer + hidden

    @property
    def params(self) -> int:
        """Parameters in all, as GPT-OSS counts them (untied embeddings, biases, one sink per head)."""
        return self._params(self.num_experts)

    @property
    def active_params(self) -> int:
        """Parameters one token passes through."""
        return self._params(min(self.active_experts, self.num_experts))

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Keys and values of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value


def tiny_shape(model: ModelSection) -> ModelShape:
    """Return the shape of the GPT-OSS architecture that is built when no model is given."""
    heads = model.hidden_size // 32
    return ModelShape(
        hidden_size=model.hidden_size,
        intermediate_size=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=heads,
        num_kv_heads=max(1, heads // 2),
        head_dim=32,
        num_experts=model.num_experts,
        active_experts=2,
        vocab_size=model.vocab_size,
    )


def shape_of(model: ModelSection) -> ModelShape:
    """Return the model's shape, read from `config.json` when `model.path` is a directory.

    A hub id whose config is not on disk is planned as openai/gpt-oss-20b, the first of its kind.
    """
    if not model.path:
        return tiny_shape(model)
    config_file = Path(model.path) / "config.json"
    config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    heads = config.get("num_attention_heads", 64)
    hidden = config.get("hidden_size", 2880)
    experts = config.get("num_local_experts", 1 if config else 32)
    return ModelShape(
        hidden_size=hidden,
        intermediate_size=config.get("intermediate_size", 2880),
        num_layers=config.get("num_hidden_layers", 24),
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads", heads if config else 8),
        head_dim=config.get("head_dim") or (hidden // heads if config else 64),
        num_experts=experts,
        active_experts=config.get("num_experts_per_tok", 1 if config else 4),
        vocab_size=config.get("vocab_size", 201088),
    )


def zero_stage(params: int, num_learners: int) -> int:
    """Return how DeepSpeed shards the learner: nothing (0), optimizer state and gradients (2), parameters too (3).

    All three take the same steps (`tests/rl_actors/training/test_rank_agreement.py`); sharding costs communication, so
    it begins where replicas would crowd a device: 16 bytes a parameter in mixed precision (arXiv 1910.02054 section 3).
    """
    if num_learners == 1 or params < MIN_SHARDED_PARAMS:
        return 0
    return 2 if params < MIN_PARTITIONED_PARAMS else 3
