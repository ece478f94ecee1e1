"""The agent loop over a scripted engine: every ending, and the token-in, token-out chain."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_actors.agent.executor import PLAN_ACCEPTED, Executor
from rl_actors.agent.loop import (
    AgentEvent,
    AgentResult,
    ToolAnswered,
    ToolCalled,
    TurnSampled,
    run_agent,
    turn_sampling,
)
from rl_actors.agent.renderers.renderer import demonstration_arrays
from rl_actors.contracts import AgentLimits, Demonstration, DemonstrationTurn
from rl_actors.contracts.errors import EngineError, ToolHostError
from rl_actors.contracts.rollouts import SamplingParams
from tests.rl_actors.fakes import (
    LIMITS,
    PROMPT,
    FakeWorld,
    ScriptedEngine,
    Step,
    call,
    executor,
    final,
    plan,
    renderer,
)

SAMPLING = SamplingParams(max_tokens=64, temperature=0.7, seed=11)
START = renderer().prompt("Be brief.", [("user", PROMPT)])
LOOK = call("look", order="48213")
JUNK = final("done")[1:]  # the first token is lost: ends with a stop token, but is no message


def attempt(
    script: Sequence[Step],
    *,
    limits: AgentLimits = LIMITS,
    world: FakeWorld | None = None,
    one: Executor | None = None,
    sampling: SamplingParams = SAMPLING,
    on_event: Callable[[AgentEvent], None] = lambda event: None,
) -> tuple[AgentResult, ScriptedEngine]:
    engine = ScriptedEngine(script)
    run = asyncio.run(
        run_agent(
            START,
            renderer=renderer(),
            generate=engine,
            executor=one or executor(world, max_tool_calls=limits.max_tool_calls),
            sampling=sampling,
            limits=limits,
            on_event=on_event,
        )
    )
    return run, engine


# --- the endings ----------------------------------------------------------------------------------


def test_plan_look_answer():
    world = FakeWorld(content='{"status":"open"}')
    run, engine = attempt([plan(2), LOOK, final("It is open.")], world=world)
    assert (run.status, run.reply) == ("ok", "It is open.")
    assert [turn.kind for turn in run.turns] == ["plan", "tool", "final"]
    assert world.calls == [("look", {"order": "48213"})]
    assert [turn.tool_result.content if turn.tool_result else None for turn in run.turns] == [
        PLAN_ACCEPTED, '{"status":"open"}', None,
    ]  # fmt: skip
    assert len(engine.prompts) == 3


def test_an_answer_at_once_needs_no_plan():
    run, _ = attempt([final("Hello.")])
    assert (run.status, run.reply, len(run.turns)) == ("ok", "Hello.", 1)


@pytest.mark.parametrize(
    "cut", [final("It is open.")[:-1], LOOK[:-1], [], START[:3]], ids=["final", "call", "no", "junk"]
)
def test_a_completion_that_ran_out_of_tokens_is_truncated(cut: list[int]):
    run, _ = attempt([plan(2), cut])
    assert (run.status, run.reply) == ("truncated", "")
    assert len(run.turns) == 2
    assert run.turns[-1].tool_result is None
    assert run.turns[-1].completion.token_ids == tuple(cut)


def test_too_many_turns_are_truncated():
    run, engine = attempt([plan(1)] * 5, limits=replace(LIMITS, max_turns=3))
    assert (run.status, run.reply) == ("truncated", "")
    assert len(run.turns) == len(engine.prompts) == 3


def test_a_full_context_is_truncated_without_asking_the_engine():
    limits = replace(LIMITS, max_context_tokens=len(START) + 1)
    run, engine = attempt([final("x")], limits=limits)
    assert (run.status, run.turns, engine.prompts) == ("truncated", (), [])
    run, _ = attempt([final("x")], limits=replace(limits, max_context_tokens=len(START) + 2))
    assert run.status == "ok"


def test_one_call_more_than_the_hard_cap_ends_the_run():
    world = FakeWorld()
    limits = replace(LIMITS, max_tool_calls=2)
    run, _ = attempt([plan(2), LOOK, LOOK, LOOK, final("never asked")], limits=limits, world=world)
    assert (run.status, run.reply) == ("tool_budget", "")
    assert [turn.kind for turn in run.turns] == ["plan", "tool", "tool", "tool"]
    assert run.turns[-1].tool_result is None
    assert len(world.calls) == 2


def test_at_the_hard_cap_an_answer_still_counts():
    run, _ = attempt([plan(1), LOOK, final("It is open.")], limits=replace(LIMITS, max_tool_calls=1))
    assert run.status == "ok"


def test_at_the_hard_cap_a_plan_is_no_call():
    run, _ = attempt([plan(1), LOOK, plan(9), final("Fine.")], limits=replace(LIMITS, max_tool_calls=1))
    assert (run.status, run.reply) == ("ok", "Fine.")


def test_an_engine_that_never_answers_is_a_timeout():
    run, _ = attempt([plan(2), LOOK, None], limits=replace(LIMITS, timeout_s=0.2))
    assert (run.status, run.reply) == ("timeout", "")
    assert [turn.kind for turn in run.turns] == ["plan", "tool"], "what was finished is kept"


def test_a_tool_that_never_answers_is_a_timeout():
    run, _ = attempt([plan(2), LOOK], world=FakeWorld(hangs=True), limits=replace(LIMITS, timeout_s=0.2))
    assert (run.status, [turn.kind for turn in run.turns]) == ("timeout", ["plan"])


def test_a_turn_that_is_no_message_is_answered_and_goes_on():
    run, engine = attempt([JUNK, final("Sorry.")])
    assert (run.status, run.reply) == ("ok", "Sorry.")
    assert run.turns[0].kind == "malformed"
    assert run.turns[0].tool_result is not None
    assert run.turns[0].tool_result.error == "malformed"
    heard = renderer().decode(engine.prompts[1][len(START) + len(JUNK) :])
    assert "functions.none to=assistant" in heard
    assert '{"error":"malformed"}' in heard


def test_a_malformed_turn_at_the_hard_cap_ends_the_run():
    run, _ = attempt([JUNK, final("never asked")], limits=replace(LIMITS, max_tool_calls=0))
    assert run.status == "tool_budget"


def test_a_refused_call_is_heard_and_the_run_goes_on():
    run, engine = attempt([LOOK, plan(1), call("refund", order="1"), final("I cannot.")])
    assert run.status == "ok"
    observed = [json.loads(turn.tool_result.content) for turn in run.turns if turn.tool_result]
    assert observed == [{"error": "no_plan"}, {"plan": "accepted"}, {"error": "over_budget"}]
    assert '{"error":"over_budget"}' in renderer().decode(engine.prompts[-1])


def test_a_replan_is_logged():
    one = executor()
    run, _ = attempt([plan(1), LOOK, plan(3), LOOK, final("ok")], one=one)
    assert (run.status, len(one.plans) - 1, one.tool_calls_count, one.tool_error_count) == ("ok", 1, 2, 0)


@pytest.mark.parametrize("error", [EngineError("gone"), ToolHostError("gone")])
def test_infrastructure_is_never_a_status(error: Exception):
    with pytest.raises(type(error), match="gone"):
        attempt([plan(1), error])


def test_a_cancelled_request_is_cancelled_and_not_a_timeout():
    async def cancelled() -> None:
        engine = ScriptedEngine([None])
        task = asyncio.create_task(
            run_agent(
                START, renderer=renderer(), generate=engine, executor=executor(), sampling=SAMPLING, limits=LIMITS
            )
        )
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())


# --- events ---------------------------------------------------------------------------------------


def test_events_come_in_order_and_say_what_happened():
    events: list[AgentEvent] = []
    script = [JUNK, plan(1), LOOK, call("refund", order="1"), final("It is open.")]
    run, engine = attempt(script, world=FakeWorld(content='{"status":"open"}'), on_event=events.append)
    assert [type(event) for event in events] == [
        TurnSampled,  # no message: nothing was called
        TurnSampled, ToolCalled, ToolAnswered,
        TurnSampled, ToolCalled, ToolAnswered,
        TurnSampled, ToolCalled, ToolAnswered,
        TurnSampled,
        AgentResult,
    ]  # fmt: skip
    sampled = [event for event in events if isinstance(event, TurnSampled)]
    assert [event.prompt_token_ids for event in sampled] == engine.prompts
    assert [event.completion for event in sampled] == [turn.completion for turn in run.turns]
    assert [event.parsed.kind for event in sampled] == [turn.kind for turn in run.turns]
    assert [event.call.name for event in events if isinstance(event, ToolCalled)] == ["plan", "look", "refund"]
    answers = [(event.call.name, event.result.error) for event in events if isinstance(event, ToolAnswered)]
    assert answers == [("plan", ""), ("look", ""), ("refund", "over_budget")]
    assert events[-1] is run


def test_an_event_comes_before_what_follows_it():
    """A call is announced before it runs: who shows a run while it happens sees what it waits for."""
    world = FakeWorld()
    calls_seen: list[int] = []

    def count(event: AgentEvent) -> None:
        if isinstance(event, ToolCalled | ToolAnswered):
            calls_seen.append(len(world.calls))

    attempt([plan(1), LOOK, final("ok")], world=world, on_event=count)
    assert calls_seen == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("script", "limits", "kinds"),
    [
        ([plan(2), LOOK[:-1]], LIMITS, [TurnSampled, ToolCalled, ToolAnswered, TurnSampled, AgentResult]),
        ([LOOK], replace(LIMITS, max_tool_calls=0), [TurnSampled, AgentResult]),
        ([None], replace(LIMITS, timeout_s=0.1), [AgentResult]),
        ([], replace(LIMITS, max_context_tokens=1), [AgentResult]),
    ],
    ids=["cut", "budget", "timeout", "no room"],
)
def test_every_ending_is_the_last_event(script: list[Step], limits: AgentLimits, kinds: list[type]):
    events: list[AgentEvent] = []
    run, _ = attempt(script, limits=limits, on_event=events.append)
    assert [type(event) for event in events] == kinds
    assert events[-1] is run


def test_a_run_that_raises_has_no_last_event():
    events: list[AgentEvent] = []
    with pytest.raises(EngineError):
        attempt([plan(1), EngineError("gone")], on_event=events.append)
    assert [type(event) for event in events] == [TurnSampled, ToolCalled, ToolAnswered]


@pytest.mark.parametrize("error", [ValueError("broken"), TimeoutError(), EngineError("not the engine's")])
@pytest.mark.parametrize("at", range(8))
def test_a_hook_that_raises_changes_nothing_and_hears_no_more(
    error: Exception, at: int, caplog: pytest.LogCaptureFixture
):
    """Whichever event it fails at, the run is the one that nobody watched, and the log says so once."""
    heard: list[AgentEvent] = []

    def fail(event: AgentEvent) -> None:
        heard.append(event)
        if len(heard) == at + 1:
            raise error

    script = [plan(1), LOOK, final("It is open.")]
    unwatched, _ = attempt(script)
    watched, _ = attempt(script, on_event=fail)
    assert watched == unwatched
    assert len(heard) == at + 1
    assert [record.message for record in caplog.records if record.name == "rl_actors.agent.loop"] == [
        "an event hook failed and hears no more of this run"
    ]


def test_one_broken_hook_leaves_the_next_run_its_own():
    events: list[AgentEvent] = []

    def fail_once(event: AgentEvent) -> None:
        events.append(event)
        if len(events) == 1:
            raise ValueError

    attempt([final("a")], on_event=fail_once)
    attempt([final("b")], on_event=fail_once)
    assert len(events) == 3


# --- token in, token out --------------------------------------------------------------------------

steps = st.lists(
    st.sampled_from([plan(0), plan(3), LOOK, call("refund", note="<|end|>"), JUNK, list(range(8))]), max_size=7
)


@settings(deadline=None, max_examples=50)
@given(script=steps, content=st.text(max_size=20))
def test_every_prompt_begins_with_all_that_was_seen_and_sampled(script: list[list[int]], content: str):
    """The property that makes samples trainable: prompt k+1 = prompt k + completion k + observation k, id by id."""
    script = [*script, final("end")]
    run, engine = attempt(script, world=FakeWorld(content=json.dumps(content)))
    assert engine.prompts[0] == tuple(START)
    for turn, prompt in zip(run.turns, engine.prompts, strict=True):
        assert turn.prompt_token_ids == prompt
    for turn, after in zip(run.turns, run.turns[1:], strict=False):
        sofar = (*turn.prompt_token_ids, *turn.completion.token_ids)
        assert after.prompt_token_ids[: len(sofar)] == sofar
        assert turn.tool_result is not None
        name = turn.tool_call.name if turn.tool_call else "none"
        assert list(after.prompt_token_ids[len(sofar) :]) == renderer().observation(name, turn.tool_result.content)


def test_sampled_ids_are_kept_even_where_the_tokenizer_would_write_them_otherwise():
    """A policy may spell a word in odd pieces; tokenising its text again would give other ids."""
    odd = [*final("")[:-1], *(token for letter in "order" for token in renderer()._encode(letter)), final("")[-1]]
    assert renderer().parse(odd).text == "order"
    assert odd != final("order"), "else this test proves nothing"
    run, _ = attempt([odd])
    assert run.turns[0].completion.token_ids == tuple(odd)
    assert run.reply == "order"


def test_a_replayed_demonstration_gives_the_very_ids_it_is_trained_on():
    """No skew between SFT and rollouts: the expert's tokens, said by an engine, build the same sequence."""
    turns = (
        _turn("plan", "", {"steps": ["look"], "tool_budget": 1}, PLAN_ACCEPTED),
        _turn("tool", "look", {"order": "48213"}, '{"status":"open"}'),
        DemonstrationTurn(kind="final", tool="", arguments={}, text="It is open.", observation=""),
    )
    demonstration = Demonstration(task_id="t", prompt=PROMPT, turns=turns)
    ids, mask = demonstration_arrays(renderer(), "Be brief.", demonstration)
    script = [renderer().completion(turn) for turn in turns]
    run, _ = attempt(script, world=FakeWorld(content='{"status":"open"}'))
    last = run.turns[-1]
    assert [*last.prompt_token_ids, *last.completion.token_ids] == ids
    assert sum(mask) == sum(len(turn.completion.token_ids) for turn in run.turns)


def _turn(kind: Any, tool: str, arguments: dict[str, Any], observation: str) -> DemonstrationTurn:
    return DemonstrationTurn(kind=kind, tool=tool, arguments=arguments, text="", observation=observation)


# --- sampling parameters --------------------------------------------------------------------------


def test_every_turn_has_a_seed_of_its_own_and_equal_requests_have_equal_seeds():
    script = [plan(3), LOOK, final("ok")]
    seeds = [[params.seed for params in attempt(script)[1].sampling] for _ in range(2)]
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 3
    other = attempt(script, sampling=replace(SAMPLING, seed=12))[1].sampling
    assert not set(seeds[0]) & {params.seed for params in other}


@settings(deadline=None)
@given(seed=st.integers(0, 2**31 - 1), index=st.integers(0, 100))
def test_a_turns_seed_fits_the_engine(seed: int, index: int):
    params = turn_sampling(replace(SAMPLING, seed=seed), index, 10, LIMITS, (6, 7))
    assert params.seed is not None
    assert 0 <= params.seed < 2**31


def test_without_a_seed_turns_have_none():
    assert turn_sampling(replace(SAMPLING, seed=None), 3, 10, LIMITS, ()).seed is None


@pytest.mark.parametrize(("room", "expected"), [(2, 2), (63, 63), (64, 64), (1000, 64)])
def test_a_turn_never_samples_past_the_context(room: int, expected: int):
    assert turn_sampling(SAMPLING, 0, room, LIMITS, ()).max_tokens == expected


def test_temperature_and_stop_tokens_reach_the_engine():
    _, engine = attempt([final("ok")])
    assert engine.sampling[0].temperature == 0.7
    assert engine.sampling[0].stop_token_ids == renderer().stop_token_ids
