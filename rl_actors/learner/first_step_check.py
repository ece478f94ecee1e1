"""Prove that the optimizer reaches every trainable parameter, and nobody any frozen one.

A parameter that never moves is the quietest failure of training: an attention sink that no kernel reads, a tensor the
optimizer was not given, a bfloat16 weight that rounds every small step away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from rl_actors.contracts import InstabilityError, TamperedError
from rl_actors.learner import ranks

Fingerprint = tuple[float, float]


@torch.no_grad()
def fingerprints(module: torch.nn.Module) -> dict[str, Fingerprint]:
    """Return (sum, sum of squares) of each parameter in float64, added over ranks: under ZeRO-3 each holds a shard.

    Of bfloat16 weights the float32 masters count: a norm's weight of 1 may take many steps to reach the next bfloat16.
    """
    names, sums = [], []
    for name, parameter in module.named_parameters():
        held = _stepped(parameter).detach().double()
        names.append(name)
        sums.append(torch.stack([held.sum(), held.square().sum()]).cpu())
    rows = ranks.summed(torch.stack(sums)).tolist()
    return {name: (row[0], row[1]) for name, row in zip(names, rows, strict=True)}


def _stepped(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return what the optimizer steps, or this rank's part of it; a frozen parameter has only itself."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

    is_sharded = hasattr(parameter, "ds_tensor")
    master = None
    if parameter.requires_grad:
        master = (safe_get_local_fp32_param if is_sharded else safe_get_full_fp32_param)(parameter)
    return getattr(parameter, "ds_tensor", parameter) if master is None else master


def require_moved(
    before: Mapping[str, Fingerprint], after: Mapping[str, Fingerprint], *, trainable: Sequence[str]
) -> None:
    """Compare fingerprints taken around a step with gradient.

    Raises:
        InstabilityError: names trainable parameters that did not move, or frozen ones that did.
    """
    moved = {name for name, fingerprint in before.items() if after[name] != fingerprint}
    still = sorted(set(trainable) - moved)
    if still:
        raise InstabilityError(
            f"parameter_not_trained: {len(still)} of {len(trainable)} trainable parameters did not move in the first "
            f"step, {', '.join(still[:3])}; look for a kernel that ignores them, or weights kept in too few bits"
        )
    drifted = sorted(moved - set(trainable))
    if drifted:
        raise InstabilityError(
            f"frozen_parameter_moved: {len(drifted)} frozen parameters moved, {', '.join(drifted[:3])}"
        )


def require_unchanged(before: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint]) -> None:
    """Compare fingerprints of frozen weights.

    Raises:
        TamperedError: names what changed.
    """
    changed = sorted(name for name in before if now[name] != before[name])
    if changed:
        names = ", ".join(changed[:3])
        raise TamperedError(
            f"the frozen reference changed in memory: {len(changed)} of {len(before)} parameters, {names}; every KL "
            "since the last checkpoint is in doubt: resume from it"
        )
