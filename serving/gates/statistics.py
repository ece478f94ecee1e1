"""Statistics of a canary: pure functions over counts and samples; nothing here knows a process or a clock.

Two kinds of validity under repeated looks. Event counts use e-processes (valid at every look by Ville's inequality).
Latency and cost use fixed-sample intervals at doubling sample sizes, each look spending its own part of alpha
(`look_at`), so that ticking more often changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import scipy
from numpy.typing import NDArray

from serving.contracts import RequestSample

_SERIES_TERMS: Final = 8192
_BOOTSTRAP_DRAWS: Final = 2000
_MAX_BOOTSTRAP_UNITS: Final = 256  # bounds the time and memory of a look, however many sessions there are
_MAX_EXPONENT: Final = 700.0  # exp overflows above 709.8

LogTail = Callable[[float, float, float], float]
"""(a, b, x) -> natural log of the part of Beta(a, b) on one side of x."""


class EventEProcess:
    """Sequential comparison of bad events between arms, valid at every look (design: event e-process).

    Given that a bad event happened, under "canary no worse" it is the canary's with probability at most w, its share of
    traffic, whatever the base rate does over the day. After n events, k of them the canary's, with prior
    Beta(a = c w, b = c (1 - w)) restricted to theta > w:

        e_fail = [B(a+k, b+n-k) / B(a, b)] [1 - I_w(a+k, b+n-k)] / [1 - I_w(a, b)] / (w^k (1-w)^(n-k))

    `e_pass` is the mirror image on theta < w_m, with w_m = w (1+m) / (w (1+m) + 1 - w) at relative non-inferiority
    margin m. Feed at most one event per session: sticky routing puts all events of a session into the same arm.
    """

    def __init__(self, canary_share: float, margin: float = 0.0, concentration: float = 20.0) -> None:
        """Start at `canary_share` in (0, 1) with relative margin >= 0 and prior concentration > 0."""
        if margin < 0.0 or concentration <= 0.0:
            raise ValueError(f"margin {margin} must be >= 0 and concentration {concentration} > 0")
        self._share, self._margin, self._concentration = _checked_share(canary_share), margin, concentration
        # By share, for each has a factor of its own, and factors multiply: an event that becomes known after the share
        # was raised still counts at the share it happened at.
        self._counts: dict[float, tuple[int, int]] = {}

    def observe(self, is_canary: bool, share: float | None = None) -> None:
        """Count one bad event; `share` is the canary's share when its run was routed (None: as before)."""
        self._share = self._share if share is None else _checked_share(share)
        num_canary, num_stable = self._counts.get(self._share, (0, 0))
        self._counts[self._share] = (num_canary + is_canary, num_stable + (not is_canary))

    @property
    def num_events(self) -> int:
        """Events seen, over both arms and all shares."""
        return sum(map(sum, self._counts.values()))

    @property
    def num_canary_events(self) -> int:
        """Events of the canary, over all shares."""
        return sum(num_canary for num_canary, _ in self._counts.values())

    @property
    def log_e_fail(self) -> float:
        """Natural log of `e_fail`; 0 before the first event."""
        return self._log_evidence(log_betaincc, lambda share: share)

    @property
    def log_e_pass(self) -> float:
        """Natural log of `e_pass`; 0 before the first event."""
        return self._log_evidence(
            log_betainc, lambda share: share * (1 + self._margin) / (share * (1 + self._margin) + 1 - share)
        )

    @property
    def e_fail(self) -> float:
        """Evidence that the canary is worse; by Ville's inequality ever >= 1/alpha with probability <= alpha."""
        return math.exp(min(self.log_e_fail, _MAX_EXPONENT))

    @property
    def e_pass(self) -> float:
        """Evidence that the canary is not worse by more than the margin."""
        return math.exp(min(self.log_e_pass, _MAX_EXPONENT))

    def _log_evidence(self, log_tail: LogTail, limit_of: Callable[[float], float]) -> float:
        c = self._concentration
        return sum(
            _log_e_value(c * share, c * (1 - share), num_canary, num_stable, limit_of(share), log_tail)
            for share, (num_canary, num_stable) in self._counts.items()
        )


def _log_e_value(a: float, b: float, num_hits: int, num_misses: int, w: float, log_tail: LogTail) -> float:
    """Log evidence of theta ~ Beta(a, b), restricted to one side of `w` by its log tail, against theta = w."""
    log_restriction = log_tail(a + num_hits, b + num_misses, w) - log_tail(a, b, w)
    return _log_mixture(a, b, num_hits, num_misses, w) + log_restriction


def _log_mixture(a: float, b: float, num_hits: int, num_misses: int, w: float) -> float:
    """Log likelihood ratio of theta ~ Beta(a, b) against theta = w after the given hits and misses."""
    log_evidence = float(scipy.special.betaln(a + num_hits, b + num_misses) - scipy.special.betaln(a, b))
    return log_evidence - num_hits * math.log(w) - num_misses * math.log1p(-w)


def _checked_share(share: float) -> float:
    if not 0.0 < share < 1.0:
        raise ValueError(f"share {share}: events compare arms only where both have traffic, 0 < share < 1")
    return share


def log_betainc(a: float, b: float, x: float) -> float:
    """Natural log of the regularized incomplete beta I_x(a, b), right where I_x itself underflows."""
    value = float(scipy.special.betainc(a, b, x))
    if value > 0.5:
        return math.log1p(-float(scipy.special.betaincc(a, b, x)))
    return math.log(value) if value > 1e-290 else _log_lower_tail(a, b, x, math.log1p(-x))


def log_betaincc(a: float, b: float, x: float) -> float:
    """Natural log of 1 - I_x(a, b), right where it underflows: the lower tail of the mirrored distribution."""
    value = float(scipy.special.betaincc(a, b, x))
    if value > 0.5:
        return math.log1p(-float(scipy.special.betainc(a, b, x)))
    return math.log(value) if value > 1e-290 else _log_lower_tail(b, a, 1.0 - x, math.log(x))


def _log_lower_tail(a: float, b: float, x: float, log_complement: float) -> float:
    """x^a (1-x)^b / (a B(a, b)) * 2F1(a+b, 1; a+1; x) (DLMF 8.17.8); `log_complement` is log(1 - x), not rounded."""
    # The series converges fast exactly where the tail is far, and it is used only there.
    steps = np.arange(_SERIES_TERMS)
    series = 1.0 + float(np.cumprod((a + b + steps) / (a + 1.0 + steps) * x).sum())
    return a * math.log(x) + b * log_complement - math.log(a) - float(scipy.special.betaln(a, b)) + math.log(series)


def sample_ratio_check(num_canary: int, num_total: int, share: float, *, concentration: float = 100.0) -> float:
    """p-value, valid at every look, that sessions were split as declared.

    p = min(1, 1/e) with the two-sided beta-binomial e-process e = B(a+k, b+n-k) / B(a, b) / (w^k (1-w)^(n-k)) for
    n sessions, k of them canary (mixture martingale; Ville's inequality gives P(ever p <= alpha) <= alpha).
    """
    # Sessions, not requests, are counted: sticky routing makes the requests of one session one draw.
    if not 0 <= num_canary <= num_total:
        raise ValueError(f"{num_canary} canary sessions of {num_total}")
    w = _checked_share(share)
    log_e = _log_mixture(concentration * w, concentration * (1 - w), num_canary, num_total - num_canary, w)
    return math.exp(-max(log_e, 0.0))


def rate_below_e_value(num_events: int, num_trials: int, limit: float, *, concentration: float = 20.0) -> float:
    """Evidence, valid at every look, that a rate lies below `limit`; 1 without trials.

    The mirror image of the event e-process on a single arm: prior Beta(c limit, c (1 - limit)) restricted to
    theta < limit, against theta = limit. At limit 5 % and alpha 5 %, 82 clean trials are enough.
    """
    a, b, num_clean = concentration * limit, concentration * (1 - limit), num_trials - num_events
    return math.exp(min(_log_e_value(a, b, num_events, num_clean, limit, log_betainc), _MAX_EXPONENT))


def rate_upper_bound(num_events: int, num_trials: int, alpha: float) -> float:
    """One-sided Clopper-Pearson upper bound of a rate at confidence 1 - alpha; 1 without trials."""
    if num_events >= num_trials:
        return 1.0
    return float(scipy.stats.beta.isf(alpha, num_events + 1, num_trials - num_events))


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One planned look: the first `num_samples` samples of the candidate, with its part of alpha."""

    num_samples: int
    alpha_fraction: float


def look_at(num_candidate: int, first: int) -> Look | None:
    """Return the last planned look reached, at first * 2^j samples with alpha / ((j+1)(j+2)); None before the first.

    The parts sum to at most alpha over infinitely many looks; between looks the last verdict stands.
    """
    if num_candidate < first:
        return None
    index = (num_candidate // first).bit_length() - 1
    return Look(num_samples=first << index, alpha_fraction=1.0 / ((index + 1) * (index + 2)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioEstimate:
    """candidate / stable with one-sided bounds: `low` at 1 - alpha, `high` at 1 - alpha_high (else alpha)."""

    ratio: float
    low: float
    high: float


def mean_log_ratio(stable: Sequence[float], candidate: Sequence[float], *, alpha: float) -> RatioEstimate:
    """Ratio of geometric means (Welch interval on log durations): needs 4.5 times fewer samples than a p95 test."""
    logs = [np.log(np.maximum(np.asarray(values, dtype=np.float64), 1e-9)) for values in (candidate, stable)]
    error = math.sqrt(sum(float(values.var(ddof=1)) / len(values) for values in logs))
    return _log_normal_estimate(float(logs[0].mean() - logs[1].mean()), error, alpha, alpha)


def p95_ratio(
    stable: Sequence[float], candidate: Sequence[float], *, alpha: float, alpha_high: float | None = None
) -> RatioEstimate:
    """Ratio of 95th percentiles (nearest rank); the standard error comes from binomial order statistics."""
    errors = [_log_p95_error(values) for values in (stable, candidate)]
    point = _log_quantile(candidate, 0.95) - _log_quantile(stable, 0.95)
    return _log_normal_estimate(point, math.hypot(*errors), alpha, alpha_high or alpha)


def quantile(values: Sequence[float], q: float) -> float:
    """Nearest-rank quantile, `q` in (0, 1]; NaN without values."""
    ordered = sorted(values)
    return ordered[max(math.ceil(q * len(ordered)) - 1, 0)] if ordered else math.nan


def _log_quantile(values: Sequence[float], q: float) -> float:
    return math.log(max(quantile(values, q), 1e-9))


def _log_p95_error(values: Sequence[float]) -> float:
    """Standard error of log p95, from the order statistics one binomial standard deviation around the rank."""
    n = len(values)
    spread = math.sqrt(0.05 * 0.95 / n)
    if 0.95 + spread > 1.0:
        return math.inf
    return (_log_quantile(values, 0.95 + spread) - _log_quantile(values, 0.95 - spread)) / 2


def _log_normal_estimate(log_ratio: float, error: float, alpha: float, alpha_high: float) -> RatioEstimate:
    low = log_ratio - float(scipy.stats.norm.isf(alpha)) * error
    high = log_ratio + float(scipy.stats.norm.isf(alpha_high)) * error
    return RatioEstimate(ratio=math.exp(log_ratio), low=math.exp(low), high=math.exp(min(high, _MAX_EXPONENT)))


def cost_per_success_ratio(
    stable: Sequence[RequestSample],
    candidate: Sequence[RequestSample],
    *,
    alpha: float,
    rng: np.random.Generator,
    alpha_high: float | None = None,
) -> RatioEstimate:
    """Ratio of costs per successful completion, with percentile-bootstrap bounds over sessions.

    Cost per success = cost per run / success rate of labelled runs, which is sum(cost) / successes when every run has
    a label; infinite without a success, so that the ratio is inf (candidate), 0 (stable) or NaN (both).
    """
    draws = [_cost_draws(samples, rng) for samples in (candidate, stable)]
    points = [_cost_per_success(_session_totals(samples).sum(axis=0)) for samples in (candidate, stable)]
    if not np.isfinite(points).all():
        point = math.nan if points[0] == points[1] else (math.inf if math.isinf(points[0]) else 0.0)
        return RatioEstimate(ratio=point, low=point, high=point)
    with np.errstate(invalid="ignore"):
        ratios = draws[0] / draws[1]  # NaN where neither arm drew a success: it bounds nothing on either side
    low = np.quantile(np.where(np.isnan(ratios), 0.0, ratios), alpha, method="nearest")
    high = np.quantile(np.where(np.isnan(ratios), np.inf, ratios), 1 - (alpha_high or alpha), method="nearest")
    return RatioEstimate(ratio=float(points[0] / points[1]), low=float(low), high=float(high))


def _session_totals(samples: Sequence[RequestSample]) -> NDArray[np.float64]:
    """[S, 4] per session: runs, cost, labelled runs, successes."""
    totals: dict[str, list[float]] = {}
    for sample in samples:
        row = totals.setdefault(sample.session_key, [0.0, 0.0, 0.0, 0.0])
        row[0] += 1
        row[1] += sample.cost
        row[2] += sample.success != "unknown"
        row[3] += sample.success == "yes"
    return np.array(list(totals.values()), dtype=np.float64).reshape(-1, 4)


def _cost_per_success(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cost per success from totals [..., 4]; infinite where nothing succeeded."""
    runs, cost, labelled, successes = np.moveaxis(totals, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(successes > 0, (cost / runs) * (labelled / successes), np.inf)


def _cost_draws(samples: Sequence[RequestSample], rng: np.random.Generator) -> NDArray[np.float64]:
    """Bootstrap cost per success over sessions; many sessions are first pooled into at most 256 units."""
    totals = _session_totals(samples)
    if len(totals) > _MAX_BOOTSTRAP_UNITS:
        units = np.zeros((_MAX_BOOTSTRAP_UNITS, 4))
        np.add.at(units, rng.permutation(len(totals)) % _MAX_BOOTSTRAP_UNITS, totals)
        totals = units
    size = len(totals)
    if not size:
        return np.full(_BOOTSTRAP_DRAWS, np.inf)
    drawn = rng.integers(size, size=(_BOOTSTRAP_DRAWS, size)) + size * np.arange(_BOOTSTRAP_DRAWS)[:, None]
    weights = np.bincount(drawn.ravel(), minlength=_BOOTSTRAP_DRAWS * size).reshape(_BOOTSTRAP_DRAWS, size)
    return _cost_per_success(weights @ totals)


def reliability_score(success_rate: float, human_override_rate: float, tool_error_rate: float) -> float:
    """Reliability = success rate x (1 - human override rate) x (1 - tool error rate) (the article), all in [0, 1]."""
    rates = (success_rate, human_override_rate, tool_error_rate)
    if not all(0.0 <= rate <= 1.0 for rate in rates):
        raise ValueError(f"rates must lie in [0, 1]: {rates}")
    return success_rate * (1.0 - human_override_rate) * (1.0 - tool_error_rate)
