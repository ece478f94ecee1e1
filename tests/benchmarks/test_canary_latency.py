"""What `benchmarks/canary_latency.py` says of two arms; the platform itself is not started here."""

from __future__ import annotations

import io

import canary_latency
import pytest
from canary_latency import Ticket, over_limit, summary
from rich.console import Console


def tickets(arm: str, duration_ms: float, count: int = 100, tokens_out: int = 50) -> list[Ticket]:
    return [
        Ticket(
            arm=arm, duration_ms=duration_ms, started_at=i, completed_at=i + duration_ms / 1e3, tokens_out=tokens_out
        )
        for i in range(count)
    ]


def test_equal_arms_have_ratio_one_and_no_window_over_the_limit() -> None:
    row = summary([*tickets("general", 400.0), *tickets("canary", 400.0)], draw=50)
    assert (row["p95_ratio"], row["speed_ratio"], row["over_limit"]) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize(("canary_ms", "share"), [(455.0, 0.0), (465.0, 1.0), (340.0, 1.0)])
def test_a_window_beyond_the_limit_on_either_side_counts(canary_ms: float, share: float) -> None:
    assert summary([*tickets("general", 400.0), *tickets("canary", canary_ms)], draw=50)["over_limit"] == share


def test_open_tickets_and_speed_are_those_of_the_arm() -> None:
    row = summary([*tickets("general", 1000.0), *tickets("canary", 500.0, tokens_out=100)], draw=50)
    assert row["general"]["mean_open"] == pytest.approx(1.0)
    assert row["canary"]["mean_open"] == pytest.approx(0.5)
    assert row["speed_ratio"] == pytest.approx(0.25)


def test_too_few_tickets_are_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = {"general": tickets("general", 400.0), "canary": tickets("canary", 400.0, count=20)}
    assert over_limit(arms, draw=50) is None
    printed = io.StringIO()
    monkeypatch.setattr(canary_latency, "Console", lambda **options: Console(file=printed, width=options.get("width")))
    row = summary([*arms["general"], *arms["canary"]], draw=50)
    canary_latency.show([{"concurrency": 4, "share": 0.05, "tickets_per_s": 10.0, **row}])
    assert "│ -" in printed.getvalue()
