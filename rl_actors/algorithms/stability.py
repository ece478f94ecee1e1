"""Tripwires of the update as pure decisions: metrics and limits in, one value out, with its evidence.

The learner calls `check_stability` after each minibatch's backward pass, before the optimizer step, and acts:
Continue steps; SkipUpdate drops this step; StopUpdate also drops the rest of the batch's minibatches and epochs,
keeping what was applied; RestoreLastGood goes back to the last good state with a lower learning rate; StopTraining ends
the run. `escalate` turns a streak of skips or restores into the next stronger action.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np

ReasonCode = Literal[
    "non_finite",
    "grad_norm",
    "mismatch_mean",
    "mismatch_max",
    "target_kl",
    "ratio",
    "clip_fraction",
    "entropy_collapse",
    "explained_variance",
    "reward_outcome_divergence",
    "repeated_skips",
    "repeated_restores",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StabilityLimits:
    """Limits of every tripwire; None turns one off. KL, entropy and |delta logp| in nats per token.

    `reward_outcome_divergence` is in standard deviations, see the function of that name.
    """

    max_grad_norm: float | None = 100.0
    max_mismatch_mean: float | None = 0.1
    max_mismatch_max: float | None = None
    max_kl: float | None = 0.1
    max_ratio: float | None = 50.0
    max_clip_fraction: float | None = 0.5
    min_entropy: float | None = 0.0005  # dialogues from templates start at 0.02 and rightly end near 0.005
    min_explained_variance: float | None = None
    max_reward_outcome_divergence: float | None = 1.0
    max_consecutive_skips: int = 3
    max_restores: int = 2
    restore_learning_rate_factor: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Trip:
    """One limit that was crossed: why, which metric, its value and the limit."""

    reason_code: ReasonCode
    metric: str
    value: float
    limit: float

    def __str__(self) -> str:
        """Reason first, as `InstabilityError` wants it."""
        return f"{self.reason_code}: {self.metric} = {self.value:.6g}, limit {self.limit:.6g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Continue:
    """Nothing tripped. `unchecked` names the limits whose metric was not there: not checked is not passed."""

    unchecked: tuple[ReasonCode, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tripped:
    """`trips` holds every crossed limit, those that decided first."""

    trips: tuple[Trip, ...]

    @property
    def reason_code(self) -> ReasonCode:
        """Code of the trip that decided."""
        return self.trips[0].reason_code

    def __str__(self) -> str:
        """All reasons on one line."""
        return "; ".join(map(str, self.trips))


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipUpdate(_Tripped):
    """Do not apply this optimizer step; go on with the next minibatch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopUpdate(_Tripped):
    """Do not apply this step nor any further one on this batch; keep those already applied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreLastGood(_Tripped):
    """Go back to the last good state and multiply the learning rate by the factor."""

    learning_rate_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StopTraining(_Tripped):
    """End the run with an `InstabilityError`; going on would optimise the wrong thing."""


StabilityDecision = Continue | SkipUpdate | StopUpdate | RestoreLastGood | StopTraining
_Action = type[SkipUpdate] | type[StopUpdate] | type[RestoreLastGood] | type[StopTraining]
_BY_STRENGTH: Final[tuple[_Action, ...]] = (StopTraining, RestoreLastGood, StopUpdate, SkipUpdate)


class _Tripwire(NamedTuple):
    """`limit` is the field of `StabilityLimits`; `sign` is +1 for an upper limit, -1 for a lower one."""

    reason_code: ReasonCode
    metric: str
    limit: str
    action: _Action
    sign: int = 1


_TRIPWIRES: Final = (
    _Tripwire("reward_outcome_divergence", "reward_outcome_divergence", "max_reward_outcome_divergence", StopTraining),
    _Tripwire("entropy_collapse", "entropy", "min_entropy", RestoreLastGood, -1),
    # The batch has moved the policy far enough: further steps on it are the harm, those before it are not.
    _Tripwire("target_kl", "approx_kl", "max_kl", StopUpdate),
    _Tripwire("ratio", "ratio_max", "max_ratio", StopUpdate),
    _Tripwire("clip_fraction", "clip_fraction", "max_clip_fraction", StopUpdate),
    _Tripwire("grad_norm", "grad_norm", "max_grad_norm", SkipUpdate),
    _Tripwire("mismatch_mean", "mismatch_abs_mean", "max_mismatch_mean", SkipUpdate),
    _Tripwire("mismatch_max", "mismatch_abs_max", "max_mismatch_max", SkipUpdate),
    _Tripwire("explained_variance", "explained_variance", "min_explained_variance", SkipUpdate, -1),
)


def check_stability(metrics: Mapping[str, float], limits: StabilityLimits) -> StabilityDecision:
    """Compare the metrics of one minibatch, merged over all parts and ranks, with the limits.

    `metrics` have the names that the functions of this package return, plus `grad_norm`. Any non-finite one skips the
    step. A limit whose metric is absent is not checked and named in `Continue.unchecked`. The strongest action wins;
    its evidence comes first.
    """
    # Every rank must see the same metrics, or one would step where another skips and wait for it for ever.
    crossed: list[tuple[_Action, Trip]] = [
        (SkipUpdate, Trip(reason_code="non_finite", metric=name, value=value, limit=math.inf))
        for name, value in metrics.items()
        if not math.isfinite(value)
    ]
    unchecked: list[ReasonCode] = []
    for wire in _TRIPWIRES:
        limit: float | None = getattr(limits, wire.limit)
        if limit is None:
            continue
        if wire.metric not in metrics:
            unchecked.append(wire.reason_code)
        elif (metrics[wire.metric] - limit) * wire.sign > 0:
            trip = Trip(reason_code=wire.reason_code, metric=wire.metric, value=metrics[wire.metric], limit=limit)
            crossed.append((wire.action, trip))
    if not crossed:
        return Continue(unchecked=tuple(unchecked))
    crossed.sort(key=lambda pair: _BY_STRENGTH.index(pair[0]))
    return _decision(crossed[0][0], tuple(trip for _, trip in crossed), limits)


def escalate(
    decision: StabilityDecision, limits: StabilityLimits, *, consecutive_skips: int, restores: int
) -> StabilityDecision:
    """Strengthen a decision of `check_stability` that keeps coming back.

    Too many skips in a row become a restore, too many restores in a run its end; both counts include this decision.
    """
    if isinstance(decision, SkipUpdate) and consecutive_skips > limits.max_consecutive_skips:
        reason = _count_trip("repeated_skips", "consecutive_skips", consecutive_skips, limits.max_consecutive_skips)
        return _decision(RestoreLastGood, (reason, *decision.trips), limits)
    if isinstance(decision, RestoreLastGood) and restores > limits.max_restores:
        reason = _count_trip("repeated_restores", "restores", restores, limits.max_restores)
        return StopTraining(trips=(reason, *decision.trips))
    return decision


def reward_outcome_divergence(
    before_rewards: Sequence[float],
    before_outcomes: Sequence[float],
    now_rewards: Sequence[float],
    now_outcomes: Sequence[float],
) -> float:
    """Return how much more the learned reward rose than the verified outcome did, each in its own standard deviations.

    Two windows of rollouts, an early and a recent one; 0.0 while either is empty. Near 0 the reward model still
    measures what is verified; towards 1 and beyond the policy collects reward without doing the job.
    """
    if not (before_rewards and now_rewards and before_outcomes and now_outcomes):
        return 0.0
    return _standardised_gain(before_rewards, now_rewards) - _standardised_gain(before_outcomes, now_outcomes)


def _standardised_gain(before: Sequence[float], now: Sequence[float]) -> float:
    # Of both windows together: the gain then stays within +-2 for equal windows, and a constant has none.
    deviation = float(np.std([*before, *now]))
    return float(np.mean(now) - np.mean(before)) / deviation if deviation > 0 else 0.0


def _count_trip(reason_code: ReasonCode, metric: str, value: int, limit: int) -> Trip:
    return Trip(reason_code=reason_code, metric=metric, value=float(value), limit=float(limit))


def _decision(action: _Action, trips: tuple[Trip, ...], limits: StabilityLimits) -> StabilityDecision:
    if issubclass(action, RestoreLastGood):
        return action(trips=trips, learning_rate_factor=limits.restore_learning_rate_factor)
    return action(trips=trips)
