"""Loading models to train: GPT-OSS gets the fast paths of this machine, and must show that its sinks act."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM

from rl_actors.models.experts import use_sorted_experts
from rl_actors.models.scoring_head import use_scoring_head
from rl_actors.models.sink_attention import check_sinks_reach_kernel, use_sink_attention


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
    """Choose our paths for GPT-OSS on CPU; any other model, and any GPU, keeps Transformers' choice.

    On a GPU the sink kernel has not been measured yet (`benchmarks/gpu_learner.py`); eager attention is right there.
    """
    if model.config.model_type != "gpt_oss":
        return model
    if not torch.cuda.is_available():
        use_sorted_experts(model)
        use_sink_attention(model)
    check_sinks_reach_kernel(model)
    return model
