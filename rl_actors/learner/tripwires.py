"""Guards of a learner: the judgement of each minibatch, and proof that the optimizer reaches every parameter.

A parameter that never moves is the quietest failure of training: an attention sink that no kernel reads, a tensor the
optimizer was not given, a bfloat16 weight that rounds every small step away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from rl_actors.algorithms import (
    Continue,
    ReasonCode,
    RestoreLastGood,
    SkipUpdate,
    StabilityDecision,
    StabilityLimits,
    check_stability,
    escalate,
)
from rl_actors.contracts import InstabilityError, TamperedError
from rl_actors.learner import ranks

Fingerprint = tuple[float, float]


class Tripwires:
    """Judges one minibatch after the other, and remembers skips in a row, restores, and what tripped.

    `trips` holds reason, metric, value and limit. It and `unchecked` are of the update that `begin_update` began.
    """

    def __init__(self, limits: StabilityLimits) -> None:
        """Start with a clean record."""
        # The loop judges this one, over rollouts of many steps; of a minibatch it would always be unchecked.
        self._limits = replace(limits, max_reward_outcome_divergence=None)
        self.num_skipped = 0  # optimizer steps in a row, across updates
        self.num_restores = 0
        self.begin_update()

    def begin_update(self) -> None:
        """Forget the minibatches of another update; streaks go on."""
        self.trips: list[str] = []
        self._unchecked = Counter[ReasonCode]()

    @property
    def unchecked(self) -> dict[str, float]:
        """`unchecked_<reason code>`: minibatches that passed although this limit's metric was not there."""
        return {f"unchecked_{code}": float(count) for code, count in self._unchecked.items()}

    def judge(self, metrics: Mapping[str, float], *, is_critic_warmup: bool = False) -> StabilityDecision:
        """Judge one minibatch, the streak of skips and the number of restores so far included."""
        # A critic that warms up explains nothing yet, and a skipped step could not teach it: it is not judged.
        unjudged = {"explained_variance"} if is_critic_warmup else set[str]()
        decision = check_stability({name: x for name, x in metrics.items() if name not in unjudged}, self._limits)
        self.num_skipped = self.num_skipped + 1 if isinstance(decision, SkipUpdate) else 0
        decision = self._escalate(decision)
        if isinstance(decision, RestoreLastGood):
            self.num_restores, self.num_skipped = self.num_restores + 1, 0
            decision = self._escalate(decision)
        if isinstance(decision, Continue):
            self._unchecked.update(decision.unchecked)
        else:
            self.trips.append(str(decision))
        return decision

    def _escalate(self, decision: StabilityDecision) -> StabilityDecision:
        return escalate(decision, self._limits, consecutive_skips=self.num_skipped, restores=self.num_restores)


@torch.no_grad()
def fingerprints(module: torch.nn.Module) -> dict[str, Fingerprint]:
    """Return (sum, sum of squares) of each parameter in float64, added over ranks; all ranks must call it."""
    names, sums = [], []
    for name, parameter in module.named_parameters():
        held = _stepped(parameter).detach().double()
        names.append(name)
        sums.append(torch.stack([held.sum(), held.square().sum()]).cpu())
    rows = ranks.summed(torch.stack(sums)).tolist()
    return {name: (row[0], row[1]) for name, row in zip(names, rows, strict=True)}


def _stepped(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return what the optimizer steps, or under ZeRO-3 this rank's shard; a frozen parameter has only itself."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

    is_sharded = hasattr(parameter, "ds_tensor")
    master = None
    if parameter.requires_grad:
        # The float32 master counts: a norm's weight of 1 may take many steps to reach the next bfloat16.
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
