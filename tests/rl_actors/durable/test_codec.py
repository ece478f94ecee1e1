"""Every value that a run keeps comes back from JSON as it was."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rl_actors.contracts.reports import EvalReport, Interval, SuiteResult
from rl_actors.contracts.versions import Calibration, PolicyVersion, RewardModelVersion
from rl_actors.durable.codec import decode, encode
from rl_actors.durable.hashing import canonical_json


def interval() -> Interval:
    return Interval(mean=0.5, low=0.4, high=0.6)


def test_every_stage_output_goes_to_json_and_back():
    suite = SuiteResult(
        suite="held_out",
        suite_sha256="a",
        policy="p",
        num_tasks=1,
        success=interval(),
        success_by_intent={"refund": 1.0},
        tasks_by_intent={"refund": 1},
        violations=0,
        tokens_in=1,
        tokens_out=2,
        tool_calls=3,
        tool_errors=0,
        cost_per_success=math.inf,
        p95_duration_ms=1.5,
        success_by_task={"t": True},
        violations_by_task={"t": ("leak",)},
    )
    calibration = Calibration(
        num_pairs=1, pair_accuracy=0.7, ece=0.1, brier=0.2, temperature=1.0, criterion_mae={"tone": 0.5}
    )
    values = [
        EvalReport(baseline={"held_out": suite}, candidate={}, success_gain=0.1, p_value=0.5),
        RewardModelVersion(name="rm", path="p", sha256="s", calibration=calibration),
        PolicyVersion(name="p", kind="ppo", path="p", sha256="s", parent_sha256="b"),
    ]
    for value in values:
        assert decode(type(value), json.loads(json.dumps(encode(value), allow_nan=False))) == value


@given(st.dictionaries(st.text(max_size=5), st.lists(st.floats(allow_nan=False)), max_size=3))
def test_any_floats_survive(metrics: dict[str, list[float]]):
    data = json.loads(canonical_json(encode(metrics)))
    assert decode(Mapping[str, tuple[float, ...]], data) == {key: tuple(value) for key, value in metrics.items()}


def test_nan_and_sets_have_a_json_form():
    assert math.isnan(decode(float, encode(math.nan)))
    assert encode({"b", "a"}) == ["a", "b"]


@pytest.mark.parametrize("value", [{1: 2}, object(), b"bytes", [object()]])
def test_what_would_not_come_back_is_refused(value: object):
    with pytest.raises(TypeError):
        encode(value)


def test_a_value_outside_its_literal_is_refused():
    data = encode(PolicyVersion(name="p", kind="sft", path="p", sha256="s", parent_sha256=""))
    with pytest.raises(ValidationError):
        decode(PolicyVersion, {**data, "kind": "magic"})


@pytest.mark.parametrize("text", ["nan", "NaN", "inf", "Infinity", "-inf", "-Infinity"])
def test_every_spelling_that_a_file_may_hold_is_read(text: str):
    """Metrics and decisions of older versions spell them as Python does."""
    found = decode(float, text)
    assert math.isnan(found) if text.lower() == "nan" else found == float(text)
