"""The tool host in this process: limits become observations, defects become failures."""

from __future__ import annotations

import io
import json
import signal
import time
from dataclasses import replace
from typing import Any

import pytest

from rl_actors.sandbox.tool_host import CallTimeoutError, ToolHost, serve, time_limit
from tests.rl_actors.sandbox.strange_world import StrangeWorld


class SmallWorld(StrangeWorld):
    """The same, with a tool that fails for want of memory and tight limits."""

    tools = tuple(replace(tool, timeout_s=0.05, max_output_chars=16) for tool in StrangeWorld.tools)

    def starve(self, **_: Any) -> None:
        raise MemoryError


@pytest.fixture
def host() -> ToolHost:
    one = ToolHost(SmallWorld())
    assert one.answer({"id": 0, "op": "open", "world_id": 1, "world": {"said": ["hi"]}}) == {"id": 0, "value": 1}
    return one


def call(host: ToolHost, tool: str, world_id: int = 1, **arguments: Any) -> dict[str, Any]:
    return host.answer({"id": 5, "op": "call", "world_id": world_id, "tool": tool, "arguments": arguments})


def observation(answer: dict[str, Any]) -> tuple[Any, str]:
    assert answer["id"] == 5
    assert "failure" not in answer
    return json.loads(answer["value"]["content"]), answer["value"]["error"]


def test_a_call_answers_with_compact_json(host: ToolHost):
    assert call(host, "echo", text="é") == {"id": 5, "value": {"content": '{"text":"é"}', "error": ""}}


def test_a_refusal_of_the_tool_is_an_observation(host: ToolHost):
    assert observation(call(host, "refuse", reason="no such order")) == ({"error": "no such order"}, "tool_failure")


@pytest.mark.parametrize(("tool", "arguments"), [("sleep", {"seconds": 5.0}), ("spin", {})])
def test_a_slow_tool_is_stopped_at_its_own_limit(host: ToolHost, tool: str, arguments: dict[str, Any]):
    started = time.monotonic()
    assert observation(call(host, tool, **arguments)) == ({"error": "timeout"}, "timeout")
    assert time.monotonic() - started < 3.0
    assert observation(call(host, "echo", text="on")) == ({"text": "on"}, ""), "the host lives on"


def test_a_tool_within_its_limit_is_not_stopped(host: ToolHost):
    assert observation(call(host, "sleep", seconds=0.0)) == ("slept", "")
    time.sleep(0.1)  # an alarm left running would kill the test here
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(("size", "error"), [(14, ""), (15, "output_too_large"), (10_000, "output_too_large")])
def test_output_is_limited_with_its_quotes(host: ToolHost, size: int, error: str):
    value, found = observation(call(host, "big", size=size))
    assert found == error
    assert value == ({"error": "output too large"} if error else "x" * size)


def test_running_out_of_memory_is_an_observation(host: ToolHost, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SmallWorld, "functions", {**StrangeWorld.functions, "eat": SmallWorld.starve})
    assert observation(call(host, "eat")) == ({"error": "out of memory"}, "memory")


@pytest.mark.parametrize(
    "request_",
    [
        {"id": 9, "op": "call", "world_id": 1, "tool": "crash", "arguments": {}},
        {"id": 9, "op": "call", "world_id": 1, "tool": "no_json", "arguments": {}},
        {"id": 9, "op": "call", "world_id": 1, "tool": "echo", "arguments": {"wrong": 1}},
        {"id": 9, "op": "call", "world_id": 1, "tool": "gone", "arguments": {}},
        {"id": 9, "op": "call", "world_id": 2, "tool": "echo", "arguments": {"text": "x"}},
        {"id": 9, "op": "call"},
        {"id": 9, "op": "open", "world_id": 3, "world": {"broken": True}},
        {"id": 9, "op": "read_state", "world_id": 3, "selector": {}},
        {"id": 9, "op": "close", "world_id": 3},
        {"id": 9, "op": "format_disk"},
        {"id": 9},
    ],
    ids=str,
)
def test_a_defect_is_a_failure_and_never_a_value(host: ToolHost, request_: dict[str, Any]):
    """The policy must not learn from a broken host: only a value may become an observation."""
    answer = host.answer(request_)
    assert set(answer) == {"id", "failure"}
    assert answer["id"] == 9
    assert answer["failure"]
    assert host.answer({"id": 10, "op": "ping"}) == {"id": 10, "value": "pong"}


def test_a_request_without_a_number_is_a_failure_too(host: ToolHost):
    assert host.answer({"op": "ping"}) == {"id": None, "failure": "KeyError: 'id'"}


def test_state_is_read_and_gone_after_closing(host: ToolHost):
    call(host, "echo", text="there")
    state = host.answer({"id": 1, "op": "read_state", "world_id": 1, "selector": {}})
    assert state["value"]["said"] == ["hi", "there"]
    assert host.answer({"id": 2, "op": "close", "world_id": 1}) == {"id": 2, "value": True}
    assert "failure" in call(host, "echo", text="late")
    assert "failure" in host.answer({"id": 2, "op": "close", "world_id": 1})


def test_worlds_do_not_mix(host: ToolHost):
    host.answer({"id": 1, "op": "open", "world_id": 2, "world": {}})
    call(host, "echo", world_id=2, text="mine")
    assert host.answer({"id": 1, "op": "read_state", "world_id": 1, "selector": {}})["value"]["said"] == ["hi"]
    assert host.answer({"id": 1, "op": "read_state", "world_id": 2, "selector": {}})["value"]["said"] == ["mine"]


def test_one_line_in_one_line_out(host: ToolHost):
    lines = io.StringIO('{"id":1,"op":"ping"}\n{"id":2,"op":"nope"}\n')
    replies = io.StringIO()
    serve(host, lines, replies)
    assert replies.getvalue() == '{"id":1,"value":"pong"}\n{"id":2,"failure":"KeyError: \'nope\'"}\n'


def test_a_line_break_in_a_value_stays_on_the_line(host: ToolHost):
    replies = io.StringIO()
    request = {"id": 1, "op": "open", "world_id": 7, "world": {"said": ["a\nb\u2028c"]}}
    read = {"id": 2, "op": "read_state", "world_id": 7, "selector": {}}
    serve(host, io.StringIO(f"{json.dumps(request)}\n{json.dumps(read)}\n"), replies)
    assert replies.getvalue().count("\n") == len(replies.getvalue().splitlines()) == 2


def test_the_limit_restores_the_handler_that_was_there():
    def before(*_: object) -> None:
        raise AssertionError

    previous = signal.signal(signal.SIGALRM, before)
    try:
        with pytest.raises(CallTimeoutError), time_limit(0.02):
            time.sleep(5)
        assert signal.getsignal(signal.SIGALRM) is before
    finally:
        signal.signal(signal.SIGALRM, previous)
