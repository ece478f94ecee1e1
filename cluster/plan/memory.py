"""Size of a model from its configuration, and the memory of each part of a stage over all its processes, in bytes.

Formulas on the model's shape; only estimates. Mixed precision as in arXiv 1910.02054 section 3: 2 bytes a weight, 2 a
gradient, 12 of Adam. On CPU all is float32.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from cluster.spec import ModelSection, WorkflowSpec
from rl_actors.contracts import LOGIT_CHUNK_VALUES, MAX_IN_FLIGHT, MICROBATCH_TOKENS

Device = Literal["cpu", "gpu"]
Parts = dict[str, int]

GIB: Final = 1024**3
PROCESS_BYTES: Final = round(0.9 * GIB)  # Python, torch and Ray, measured
ENGINE_BYTES: Final = round(1.4 * GIB)  # the same with vLLM
CPU_KV_CACHE_BYTES: Final = GIB  # set aside by VLLM_CPU_KVCACHE_SPACE
MIN_SHARDED_PARAMS: Final = 500_000_000  # 8 GB of weights, gradients and optimizer state on each learner
MIN_PARTITIONED_PARAMS: Final = 8_000_000_000  # 2 bytes each of weights and gradients alone fill 32 GB

PARTS: Final = (
    "processes",
    "weights",
    "gradients",
    "optimizer",
    "attention",
    "experts",
    "logits",
    "reference",
    "critic",
    "reward_model",
    "engine_weights",
    "kv_cache",
)
"""Every part a stage may name, in the order of the table; `attention` and `experts` are their activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes that decide how large and how fast a decoder is; a dense model has one expert, and that one active."""

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
    """Return the shape of the small GPT-OSS that is built when no model is given."""
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
    """Return the model's shape, read from `config.json` when `model.path` is a directory."""
    if not model.path:
        return tiny_shape(model)
    config_file = Path(model.path) / "config.json"
    # A hub id has no config on disk: it is planned as openai/gpt-oss-20b, the first of its kind.
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
    """Return how DeepSpeed shards the learner: nothing (0), optimizer state and gradients (2), parameters too (3)."""
    # All three take the same steps (`tests/rl_actors/training/test_rank_agreement.py`); sharding costs communication,
    # so it begins where replicas would crowd a device: 16 bytes a parameter (arXiv 1910.02054 section 3).
    if num_learners == 1 or params < MIN_SHARDED_PARAMS:
        return 0
    return 2 if params < MIN_PARTITIONED_PARAMS else 3


def adapter_params(shape: ModelShape, rank: int) -> int:
    """Return the parameters of rank-r adapters (arXiv 2106.09685): r (inputs + outputs) of each projection."""
    hidden, query, key = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = 2 * (hidden + query) + 2 * (hidden + key)
    # Fused experts take no adapters; a dense MLP does.
    mlp = 3 * (hidden + shape.intermediate_size) if shape.num_experts == 1 else 0
    return rank * shape.num_layers * (attention + mlp)


def value_head_params(hidden: int) -> int:
    """Return the critic's parameters: layer norm, a square layer and one output on the policy's hidden states."""
    return 2 * hidden + hidden * hidden + hidden + hidden + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModel:
    """Memory of each stage by spec and shape; each method returns bytes by part."""

    spec: WorkflowSpec
    shape: ModelShape

    @property
    def device(self) -> Device:
        """Where learners and engines compute."""
        return "gpu" if self.spec.cluster.uses_gpu else "cpu"

    @property
    def bytes_per_value(self) -> int:
        """Bytes of a weight, a gradient or an activation."""
        return 2 if self.spec.cluster.dtype == "bfloat16" else 4

    @property
    def weights(self) -> int:
        """One copy of the model."""
        return self.shape.params * self.bytes_per_value

    def sft(self) -> Parts:
        """Supervised fine-tuning: a whole batch in one pass."""
        tokens = self.spec.sft.batch_tokens
        # All logits at once: in the model's precision, in float32, and their gradient.
        logits = self._ranks * tokens * self.shape.vocab_size * (self.bytes_per_value + 8)
        return self._training(self.shape.params, 0) | self._activations(tokens) | {"logits": logits}

    def reward_model(self) -> Parts:
        """Microbatches of pairs, a pair at the least."""
        tokens = max(MICROBATCH_TOKENS, 2 * self.spec.model.max_length)
        # The score is read off hidden states: there are no logits.
        training = self._training(self.shape.params, 0) | self._activations(tokens)
        # The baseline's rollouts are sampled before, with an engine that is gone by then.
        return max(self.evaluation(policies=1), training, key=lambda parts: sum(parts.values()))

    def ppo(self, tokens_per_minibatch: int) -> Parts:
        """Learners, scorer and engines at the same time."""
        rank, ranks = self.spec.recipe.lora_rank, self._ranks
        # Microbatches bound the activations, whatever the minibatch; one long rollout may alone exceed their budget.
        tokens = min(math.ceil(tokens_per_minibatch / ranks), max(MICROBATCH_TOKENS, self.spec.model.max_length))
        parts = self._ppo_learner(rank) | self._activations(tokens)
        # Logits exist a chunk at a time: their values, the probabilities and the gradient, all in float32.
        chunk = min(tokens * self.shape.vocab_size, LOGIT_CHUNK_VALUES["cuda" if self.device == "gpu" else "cpu"])
        parts["logits"] = ranks * chunk * 12
        parts["reference"] = 0 if rank else ranks * self.weights  # adapters turned off are the reference
        engines = self.engines(self.spec.ppo.num_rollout_workers, self.spec.ppo.rollouts_per_step)
        parts |= self._scorer() | engines
        return parts | {"processes": ranks * PROCESS_BYTES + engines["processes"] + PROCESS_BYTES}

    def _ppo_learner(self, lora_rank: int) -> Parts:
        stage = zero_stage(self.shape.params, self._ranks)
        adapters = adapter_params(self.shape, lora_rank)
        parts = self._training(adapters or self.shape.params, stage)
        parts["weights"] += (1 if stage == 3 else self._ranks) * adapters * self.bytes_per_value
        if self.spec.recipe.has_critic:
            values = value_head_params(self.shape.hidden_size)
            parts["critic"] = self._ranks * values * (2 * self.bytes_per_value + self._optimizer_bytes)
        return parts

    def evaluation(self, policies: int = 2) -> Parts:
        """Baseline and candidate run side by side where the cluster has room."""
        sequences = policies * MAX_IN_FLIGHT * self.spec.ppo.num_rollout_workers
        return self.engines(policies * self.spec.ppo.num_rollout_workers, sequences)

    def canary(self) -> Parts:
        """Stable and candidate, each with all open tickets at the worst; the gateway and the critic."""
        engines = self.engines(2, 2 * self.spec.release.concurrency)
        return engines | self._scorer() | {"processes": engines["processes"] + 2 * PROCESS_BYTES}

    def engines(self, engines: int, sequences: int) -> Parts:
        """Engines with their weights and the KV cache of `sequences` over all of them."""
        in_flight = min(math.ceil(sequences / engines), MAX_IN_FLIGHT)
        needed = in_flight * self.spec.model.max_length * self.shape.kv_bytes_per_token(self.bytes_per_value)
        kept = max(needed, CPU_KV_CACHE_BYTES) if self.device == "cpu" else needed
        return {
            "processes": engines * ENGINE_BYTES,
            "engine_weights": engines * self.weights,
            "kv_cache": engines * kept,
        }

    @property
    def _ranks(self) -> int:
        return self.spec.ppo.num_learners

    @property
    def _optimizer_bytes(self) -> int:
        """Adam's two moments in float32, and a float32 copy of bfloat16 weights."""
        return 12 if self.bytes_per_value == 2 else 8

    def _training(self, trained: int, stage: int) -> Parts:
        # ZeRO 2 splits gradients and optimizer over the ranks, ZeRO 3 the weights too; below, each has its own.
        copies, ranks = 1 if stage >= 2 else self._ranks, self._ranks
        return {
            "processes": ranks * PROCESS_BYTES,
            "weights": (1 if stage == 3 else ranks) * self.weights,
            "gradients": copies * trained * self.bytes_per_value,
            "optimizer": copies * trained * self._optimizer_bytes,
        }

    def _activations(self, tokens: int) -> Parts:
        """Values that each layer keeps for the backward pass; nothing is recomputed."""
        s, length = self.shape, min(tokens, self.spec.model.max_length)
        query, key = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        # On a GPU attention is eager: a row of scores and one of probabilities per head.
        scores = 2 * s.num_heads * length if self.device == "gpu" else 0
        # Inputs and outputs of norm and projections, queries, keys, values; then gate, up and product of each expert.
        attention = 4 * s.hidden_size + 2 * query + 2 * key + scores
        experts = 2 * s.hidden_size + s.num_experts + s.active_experts * (3 * s.intermediate_size + s.hidden_size)
        scale = self._ranks * tokens * s.num_layers * self.bytes_per_value
        return {"attention": scale * attention, "experts": scale * experts}

    def _scorer(self) -> Parts:
        # The reward model scores in float32 on CPU: the backbone, without the head over the vocabulary.
        return {"reward_model": 4 * (self.shape.params - self.shape.vocab_size * self.shape.hidden_size)}
