"""Intervals and tests for evaluation reports: small samples, paired by task id and seed."""

from __future__ import annotations

import math

import scipy

from rl_actors.contracts import BadDataError, Interval


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
    z = float(scipy.stats.norm.ppf(0.5 + confidence / 2))
    rate, spread = successes / n, z * z / n
    centre = (rate + spread / 2) / (1 + spread)
    half_width = z * math.sqrt(rate * (1 - rate) / n + spread / (4 * n)) / (1 + spread)
    # The ends are exact at 0 and n; rounding must not put the estimate outside its own interval.
    return Interval(
        mean=rate, low=min(max(centre - half_width, 0.0), rate), high=max(min(centre + half_width, 1.0), rate)
    )


def mcnemar_p_value(num_for: int, num_against: int) -> float:
    """Exact one-sided McNemar test: under no difference, each discordant pair is a fair coin (McNemar, 1947).

    Args:
        num_for: pairs that speak for the claim, such as tasks that only the candidate solved.
        num_against: pairs that speak against it. Pairs that agree do not count.

    Returns:
        The p-value; 1.0 when no pair differs, because nothing was then shown.
    """
    return float(scipy.stats.binom.sf(num_for - 1, num_for + num_against, 0.5))
