"""The trace log keeps a share of runs exactly as they were, and never costs anybody an answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rl_actors.contracts import Completion, ToolCall, ToolResult, Turn
from serving.trace_log import LiveTrace, TraceLog, read_traces
from tests.serving.live_fakes import PAY, PROMPT, STABLE, body, make_rig


def make_trace(number: int) -> LiveTrace:
    completion = Completion(token_ids=(4, 5), logprobs=(-0.1, -0.25), weights_version=2, finished=True, cached_tokens=1)
    turn = Turn(
        kind="tool",
        prompt_token_ids=(1, 2, 3),
        completion=completion,
        tool_call=ToolCall(name="pay", arguments={"order": "O1"}, raw='{"order":"O1"}'),
        tool_result=ToolResult(content="{}", error="", duration_ms=2.5),
    )
    final = Turn(kind="final", prompt_token_ids=(1,), completion=completion, tool_call=None, tool_result=None)
    return LiveTrace(run_id=f"run-{number}", request='h\u00e9 "q"\nnext', response="done", turns=(turn, final))


def test_a_trace_comes_back_as_it_was(tmp_path: Path):
    log = TraceLog(tmp_path / "traces.jsonl", 1.0)
    for number in range(3):
        log.write(make_trace(number))
    assert list(read_traces(tmp_path / "traces.jsonl")) == [make_trace(number) for number in range(3)]


def test_a_line_that_a_kill_cut_off_is_skipped(tmp_path: Path):
    path = tmp_path / "traces.jsonl"
    TraceLog(path, 1.0).write(make_trace(0))
    with path.open("a") as file:
        file.write('{"run_id": "run-1", "req')
    assert [trace.run_id for trace in read_traces(path)] == ["run-0"]
    assert list(read_traces(tmp_path / "none.jsonl")) == []


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
def test_the_sample_has_its_size_and_is_the_same_everywhere(tmp_path: Path, fraction: float):
    one, other = (TraceLog(tmp_path / name, fraction) for name in ("a", "b"))
    wanted = [one.wants(f"run-{number}") for number in range(4000)]
    assert sum(wanted) / 4000 == pytest.approx(fraction, abs=0.02)
    assert wanted == [other.wants(f"run-{number}") for number in range(4000)]


def test_what_cannot_be_written_is_counted(tmp_path: Path):
    log = TraceLog(tmp_path, 1.0)  # a directory, not a file
    log.write(make_trace(0))
    assert log.num_lost == 1


def test_a_gateway_keeps_prompt_tool_actions_and_what_was_released(tmp_path: Path):
    rig = make_rig(tmp_path, scripts={STABLE: PAY}, config={"trace_fraction": 1.0})

    async def ask() -> str:
        async with rig.client() as client:
            return (await client.post("/v1/chat/completions", json=body())).headers["x-seatrial-run-id"]

    run_id = asyncio.run(ask())
    (trace,) = read_traces(rig.ports.config.files.traces)
    assert (trace.run_id, trace.request, trace.response) == (run_id, PROMPT, "It is paid.")
    assert [turn.kind for turn in trace.turns] == ["plan", "tool", "final"]
    assert trace.turns[1].tool_call is not None
    assert trace.turns[1].tool_call.arguments == {"order": "48213"}


@pytest.mark.parametrize("break_it", [False, True])
def test_a_full_disk_costs_a_trace_and_no_answer(tmp_path: Path, break_it: bool):
    rig = make_rig(tmp_path, scripts={STABLE: PAY}, config={"trace_fraction": 1.0})
    if break_it:
        rig.ports.config.files.traces.mkdir()

    async def ask() -> tuple[int, int]:
        async with rig.client() as client:
            answered = await client.post("/v1/chat/completions", json=body())
            return answered.status_code, (await client.get("/healthz")).json()["traces_lost"]

    assert asyncio.run(ask()) == (200, int(break_it))
