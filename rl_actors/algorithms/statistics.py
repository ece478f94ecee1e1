"""Intervals and tests for evaluation reports: small samples, paired by task id and seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from scipy.stats import binom, norm

from rl_actors.contracts import Interval
from rl_actors.errors import BadDataError

Alternative = Literal["two_sided", "candidate_better", "candidate_worse"]


def wilson_interval(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Score interval of a success rate (Wilson, 1927): honest at 0 %, at 100 % and for small n.

    Args:
        successes: successes, in [0, n].
        n: trials.
        confidence: coverage, in (0, 1).

    Raises:
        BadDataError: no trials, or successes outside [0, n].
    """
    if n < 1 or not 0 <= successes <= n:
        raise BadDataError("successes/n", (successes, n), "needs one trial or more and 0 <= successes <= n")
    z = float(norm.ppf(0.5 + confidence / 2))
    rate, spread = successes / n, z * z / n
    centre = (rate + spread / 2) / (1 + spread)
    half_width = z * math.sqrt(rate * (1 - rate) / n + spread / (4 * n)) / (1 + spread)
    # The ends are exact at 0 and n; rounding must not put the estimate outside its own interval.
    return Interval(
        mean=rate, low=min(max(centre - half_width, 0.0), rate), high=max(min(centre + half_width, 1.0), rate)
    )


def mcnemar_p_value(
    baseline: Sequence[bool], candidate: Sequence[bool], *, alternative: Alternative = "two_sided"
) -> float:
    """Exact McNemar test: under no difference, each discordant pair is a fair coin (McNemar, 1947).

    Args:
        baseline: success of the baseline on each task.
        candidate: success of the candidate on the same task and seed, in the same order.
        alternative: what a small p-value speaks for.

    Returns:
        The p-value; 1.0 when no pair differs, because nothing was then shown.

    Raises:
        BadDataError: lists of different length.
    """
    if len(baseline) != len(candidate):
        raise BadDataError("candidate", len(candidate), f"needs one result per baseline result, {len(baseline)}")
    wins = sum(new and not old for old, new in zip(baseline, candidate, strict=True))
    losses = sum(old and not new for old, new in zip(baseline, candidate, strict=True))
    match alternative:
        case "candidate_better":
            extreme, sides = losses, 1
        case "candidate_worse":
            extreme, sides = wins, 1
        case "two_sided":
            extreme, sides = min(wins, losses), 2
    return min(1.0, sides * float(binom.cdf(extreme, wins + losses, 0.5)))
