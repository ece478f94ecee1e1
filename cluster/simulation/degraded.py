"""The deliberately bad candidate of the fail-back drill: what a broken training run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cluster.records import copy_tokenizer, freeze_policy, fresh
from rl_actors.contracts import PolicyVersion

# Standard deviation of the noise, in standard deviations of each weight tensor.
DEGRADE_SCALE: Final = 0.6


def degrade_policy(policy: PolicyVersion, directory: Path, seed: int) -> PolicyVersion:
    """Write a really bad checkpoint: every matrix of the policy with noise added."""
    # Imported here: the users of this room need neither.
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy.path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and sinks stay as they are: with noise on them it would not even sample.
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * parameter.std() * DEGRADE_SCALE)
    model.save_pretrained(fresh(directory))
    copy_tokenizer(policy.path, directory)
    return freeze_policy("degraded_v1", "degraded", directory, policy.sha256)
