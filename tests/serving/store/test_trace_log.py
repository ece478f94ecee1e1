"""The trace log keeps a share of runs exactly as they were, and never costs anybody an answer."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from rl_actors.contracts.rollouts import Completion, ToolCall, ToolResult, Turn
from serving.store.trace_log import LiveTrace, TraceLog, read_traces
from tests.serving.gateway.live_fakes import HELLO, PAY, PROMPT, STABLE, Rig, Step, body, engine_error, make_rig


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


# --- how a run ended does not decide whether it is kept ---------------------------------------------------------------


def served(rig: Rig, num_requests: int = 1) -> list[int]:
    """Ask so often, one request after the other; returns the status codes."""

    async def ask() -> list[int]:
        async with rig.client() as client:
            answers = [await client.post("/v1/chat/completions", json=body()) for _ in range(num_requests)]
            return [answer.status_code for answer in answers]

    return asyncio.run(ask())


def kept(rig: Rig) -> list[LiveTrace]:
    return list(read_traces(rig.ports.config.files.traces))


@pytest.mark.parametrize(
    ("script", "status", "kinds"),
    [
        (HELLO, "ok", ["final"]),
        ((("plan", 3), ("junk", "")), "truncated", ["plan", "malformed"]),
        ((("plan", 3), *[("call", ("look", {"order": "1"}))] * 4), "tool_budget", ["plan", *["tool"] * 4]),
    ],
    ids=["ok", "truncated", "tool_budget"],
)
def test_runs_that_failed_are_kept_too_with_what_the_user_was_told(
    tmp_path: Path, script: tuple[Step, ...], status: str, kinds: list[str]
):
    rig = make_rig(tmp_path, scripts={STABLE: script}, config={"trace_fraction": 1.0})
    assert served(rig) == [200]
    (trace,), (row,) = kept(rig), rig.rows()
    assert (row.status, row.run_id) == (status, trace.run_id)
    assert [turn.kind for turn in trace.turns] == kinds
    told = "Hello there." if status == "ok" else rig.ports.config.fallback_text
    assert trace.response == told


def test_a_blocked_reply_is_kept_as_what_was_released_instead(tmp_path: Path):
    """The turns still hold what the policy wanted to say: that is what an analyst looks for."""
    rig = make_rig(tmp_path, scripts={STABLE: HELLO}, config={"trace_fraction": 1.0})
    rig.workflow.checks = lambda reply, run: {"no_greetings": False}
    assert served(rig) == [200]
    (trace,) = kept(rig)
    assert trace.response == rig.ports.config.fallback_text
    assert trace.turns[-1].kind == "final"
    assert rig.rows()[0].policy_checks == {"no_greetings": False}


def test_a_run_whose_engine_died_leaves_a_row_and_no_trace(tmp_path: Path):
    """There is nothing to show: no turn was finished by anybody."""
    rig = make_rig(tmp_path, scripts={STABLE: (engine_error(),)}, config={"trace_fraction": 1.0})
    assert served(rig) == [503]
    assert kept(rig) == []
    assert [row.status for row in rig.rows()] == ["engine_error"]


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (1.0, 6)])
def test_every_sampled_run_has_a_ledger_row_and_none_is_kept_twice(tmp_path: Path, fraction: float, expected: int):
    rig = make_rig(tmp_path, scripts={STABLE: HELLO}, config={"trace_fraction": fraction})
    assert served(rig, 6) == [200] * 6
    names = [trace.run_id for trace in kept(rig)]
    assert len(names) == len(set(names)) == expected
    assert set(names) <= {row.run_id for row in rig.rows()}


def test_lines_of_many_threads_do_not_mix(tmp_path: Path):
    """Long traces from several handlers at once: every line must still be one trace."""
    log = TraceLog(tmp_path / "traces.jsonl", 1.0)
    long = replace(make_trace(0), request="x" * 50_000)

    def write(number: int) -> None:
        for part in range(5):
            log.write(replace(long, run_id=f"run-{number}-{part}"))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = sorted(trace.run_id for trace in read_traces(tmp_path / "traces.jsonl"))
    assert found == sorted(f"run-{number}-{part}" for number in range(8) for part in range(5))
    assert log.num_lost == 0
