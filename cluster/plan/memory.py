"""Memory of each part of a stage, over all its processes, in bytes. Formulas on the model's shape; only estimates.

Mixed precision as in arXiv 1910.02054 section 3: 2 bytes a weight, 2 a gradient, 12 of Adam. On CPU all is float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from cluster.plan.model_shape import ModelShape, zero_stage
from cluster.spec import WorkflowSpec
from rl_actors.contracts import LOGIT_CHUNK_VALUES, MAX_IN_FLIGHT, MICROBATCH_TOKENS

GIB: Final = 1024**3


Device = Literal["cpu", "gpu"]


Parts = dict[str, int]


PROCESS_BYTES: Final = round(0.9 * GIB)  # Python, torch and Ray, measured


ENGINE_BYTES: Final = round(1.4 * GIB)  # the same with vLLM


CPU_KV_CACHE_BYTES: Final = GIB  # set aside by VLLM_CPU_KVCACHE_SPACE


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


def adapter_params(shape: ModelShape, rank: int) -> int:
    """Return the parameters of rank-r adapters (arXiv 2106.09685): r (inputs + outputs) of each projection.

    On attention, and on the MLP of a dense model; fused experts take none.
    """
    hidden, query, key = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = 2 * (hidden + query) + 2 * (hidden + key)
    mlp = 3 * (hidden + shape.intermediate_size) if shape.num_experts == 1 else 0
    return rank * shape.num_layers * (attention + mlp)


def value_head_params(hidden: int) -> int:
    """Return the critic's parameters: layer norm, a square layer and one output on the policy's hidden states."""
    return 2 * hidden + hidden * hidden + hidden + hidden + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModel:
    """What the spec and the shape say about memory; each method returns bytes by part."""

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

    @property
    def rollout_limit(self) -> int:
        """Tokens of the longest microbatch: the budget, or one rollout that alone exceeds it."""
        return max(MICROBATCH_TOKENS, self.spec.model.max_length)

    def sft(self) -> Parts:
        """A whole batch in one pass, with all its logits: in the model's precision, in float32, and their gradient."""
        tokens = self.spec.sft.batch_tokens
        logits = self._ranks * tokens * self.shape.vocab_size * (self.bytes_per_value + 8)
        return self._training(self.shape.params, 0) | self._activations(tokens) | {"logits": logits}

    def reward_model(self) -> Parts:
        """Microbatches of pairs, a pair at the least; the score is read off hidden states, so there are no logits.

        The baseline's rollouts are sampled before, with an engine that is gone by then: the larger of the two counts.
        """
        tokens = max(MICROBATCH_TOKENS, 2 * self.spec.model.max_length)
        training = self._training(self.shape.params, 0) | self._activations(tokens)
        return max(self.evaluation(policies=1), training, key=lambda parts: sum(parts.values()))

    def ppo(self, tokens_per_minibatch: int) -> Parts:
        """Learners, scorer and engines at the same time. Microbatches bound the activations, whatever the minibatch."""
        recipe, ranks = self.spec.recipe, self._ranks
        rank = recipe.lora_rank
        tokens = min(math.ceil(tokens_per_minibatch / ranks), self.rollout_limit)
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
        """Stable and candidate, each with all open tickets at the worst; the gateway; the critic that scores runs."""
        engines = self.engines(2, 2 * self.spec.release.concurrency)
        return engines | self._scorer() | {"processes": engines["processes"] + 2 * PROCESS_BYTES}

    def engines(self, engines: int, sequences: int) -> Parts:
        """KV cache: what the sequences in flight need, and on CPU at least what vLLM sets aside."""
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
        """ZeRO 2 splits gradients and optimizer over the ranks, ZeRO 3 the weights too; below, each has its own."""
        copies, ranks = 1 if stage >= 2 else self._ranks, self._ranks
        return {
            "processes": ranks * PROCESS_BYTES,
            "weights": (1 if stage == 3 else ranks) * self.weights,
            "gradients": copies * trained * self.bytes_per_value,
            "optimizer": copies * trained * self._optimizer_bytes,
        }

    def _activations(self, tokens: int) -> Parts:
        """What each layer keeps for the backward pass, per token; nothing is recomputed.

        Attention: inputs and outputs of norm and projections, queries, keys, values. Experts: gate, up and their
        product of each expert visited. On a GPU attention is eager: a row of scores and of probabilities per head.
        """
        s, length = self.shape, min(tokens, self.spec.model.max_length)
        query, key = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        scores = 2 * s.num_heads * length if self.device == "gpu" else 0
        attention = 4 * s.hidden_size + 2 * query + 2 * key + scores
        experts = 2 * s.hidden_size + s.num_experts + s.active_experts * (3 * s.intermediate_size + s.hidden_size)
        scale = self._ranks * tokens * s.num_layers * self.bytes_per_value
        return {"attention": scale * attention, "experts": scale * experts}

    def _scorer(self) -> Parts:
        """The reward model scores in float32 on CPU: the backbone, without the head over the vocabulary."""
        return {"reward_model": 4 * (self.shape.params - self.shape.vocab_size * self.shape.hidden_size)}
