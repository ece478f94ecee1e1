"""From a task to a verified rollout, and from a rollout to the arrays that train."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_actors.agent.executor import Toolset
from rl_actors.agent.rollout import (
    RolloutPorts,
    rollout_token_ids,
    rollout_view,
    run_rollout,
    successful_calls,
    training_sample,
)
from rl_actors.contracts import Outcome, RolloutRequest, Task
from rl_actors.contracts.errors import BadInputError, EngineError, ToolHostError
from rl_actors.contracts.rollouts import Rollout, Routes, Turn
from rl_actors.environment.workflow import RolloutView
from tests.rl_actors.fakes import (
    BAD,
    LIMITS,
    PROMPT,
    TOOLS,
    FakeWorld,
    ScriptedEngine,
    Step,
    call,
    final,
    make_rollout,
    make_task,
    make_turn,
    plan,
    renderer,
)

LOOK = call("look", order="48213")
PAY = call("pay", order="48213")


class DeskWorkflow:
    """Succeeds when the state says so; a reply with a card number is held back."""

    name = "desk"
    system_prompt = "Be brief."

    def __init__(self) -> None:
        self.views: list[RolloutView] = []

    def verify(self, task: Task, state: Mapping[str, Any], reply: str) -> Outcome:
        return Outcome(success=state["paid"] and bool(reply), violations=(), reasons=(task.intent,))

    def check_reply(self, reply: str, run: RolloutView) -> Mapping[str, bool]:
        self.views.append(run)
        return {"no_card_number": "4111" not in reply}


@dataclass
class OpenFakeWorld(FakeWorld):
    """A world whose state is whether `pay` was called; remembers that it was closed."""

    selectors: list[Mapping[str, Any]] = field(default_factory=list)
    is_closed: bool = False

    async def read_state(self, selector: Mapping[str, Any]) -> Mapping[str, Any]:
        self.selectors.append(selector)
        return {"paid": any(tool == "pay" for tool, _ in self.calls)}

    async def close(self) -> None:
        self.is_closed = True

    async def __aenter__(self) -> OpenFakeWorld:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


@dataclass
class FakeHosts:
    """Opens one prepared world, or fails."""

    world: OpenFakeWorld
    error: Exception | None = None
    opened: list[Mapping[str, Any]] = field(default_factory=list)

    async def open(self, world: Mapping[str, Any]) -> OpenFakeWorld:
        self.opened.append(world)
        if self.error:
            raise self.error
        return self.world


@dataclass
class Site:
    """Everything around one attempt."""

    script: Sequence[Step]
    workflow: DeskWorkflow = field(default_factory=DeskWorkflow)
    world: OpenFakeWorld = field(default_factory=OpenFakeWorld)
    error: Exception | None = None
    limits: Any = LIMITS

    def __post_init__(self) -> None:
        self.engine, self.hosts = ScriptedEngine(self.script), FakeHosts(self.world, self.error)

    def run(self, task: Task | None = None, *, seed: int = 5, temperature: float = 1.0) -> Rollout:
        ticks: Iterator[float] = iter([100.0, 100.25])
        ports = RolloutPorts(
            workflow=cast(Any, self.workflow),
            renderer=renderer(),
            toolset=Toolset(TOOLS),
            sandbox=cast(Any, self.hosts),
            generate=self.engine,
            limits=self.limits,
            clock=lambda: next(ticks),
        )
        request = RolloutRequest(task=task or make_task(), group_id=3, seed=seed)
        return asyncio.run(run_rollout(request, ports, temperature=temperature))


# --- one attempt ----------------------------------------------------------------------------------


def test_a_rollout_carries_the_verified_outcome():
    site = Site([plan(2), LOOK, PAY, final("It is paid.")])
    rollout = site.run(make_task(goal={"selector": {"orders": ["48213"]}}))
    assert rollout.outcome == Outcome(success=True, violations=(), reasons=("pay",))
    assert (rollout.status, rollout.reply, rollout.rollout_id) == ("ok", "It is paid.", "desk/train/1#3.5")
    assert (rollout.tool_calls_count, rollout.tool_error_count, rollout.duration_ms) == (2, 0, 250.0)
    assert site.world.selectors == [{"orders": ["48213"]}]
    assert site.world.is_closed


def test_a_reply_without_the_deed_is_no_success():
    """Negative control of the one above: what is said counts for nothing, what is true after counts."""
    rollout = Site([plan(2), LOOK, final("It is paid.")]).run()
    assert not rollout.outcome.success


def test_the_prompt_is_the_system_text_and_the_task_and_never_the_goal():
    site = Site([final("hi")])
    site.run(make_task(goal={"selector": {}, "secret": "refuse"}))
    assert site.engine.prompts[0] == tuple(renderer().prompt("Be brief.", [("user", PROMPT)]))
    assert "refuse" not in renderer().decode(site.engine.prompts[0])


def test_the_world_is_opened_from_the_task():
    site = Site([final("hi")])
    site.run(make_task(world={"orders": [{"id": "48213"}]}))
    assert site.hosts.opened == [{"orders": [{"id": "48213"}]}]


def test_checks_see_the_calls_that_took_effect():
    site = Site([LOOK, plan(3), LOOK, call("refund", x=1), final("card 4111")])
    rollout = site.run()
    assert rollout.policy_checks == {"no_card_number": False}
    (view,) = site.workflow.views
    assert view.tool_calls == (("look", {"order": "48213"}),)
    assert (view.reply, view.num_turns, view.outcome) == ("card 4111", 5, rollout.outcome)
    assert (rollout.tool_calls_count, rollout.tool_error_count) == (3, 2)


def test_an_expected_failure_is_a_rollout_with_its_status():
    rollout = Site([plan(3), LOOK[:-1]]).run()
    assert (rollout.status, rollout.reply, rollout.outcome.success) == ("truncated", "", False)


def test_equal_seeds_ask_the_engine_for_the_same():
    first, second, other = Site([plan(1), final("a")]), Site([plan(1), final("a")]), Site([plan(1), final("a")])
    first.run(temperature=0.7)
    second.run(temperature=0.7)
    other.run(seed=6, temperature=0.7)
    assert first.engine.sampling == second.engine.sampling != other.engine.sampling
    assert {params.temperature for params in first.engine.sampling} == {0.7}


@pytest.mark.parametrize("error", [EngineError("gone"), ToolHostError("gone")])
def test_infrastructure_raises_and_the_world_is_closed(error: Exception):
    site = Site([plan(1), error])
    with pytest.raises(type(error)):
        site.run()
    assert site.world.is_closed


def test_a_world_that_cannot_be_opened_asks_no_engine():
    site = Site([final("hi")], error=ToolHostError("no host"))
    with pytest.raises(ToolHostError):
        site.run()
    assert site.engine.prompts == []


def test_an_engine_that_never_says_anything_is_infrastructure():
    """A rollout without a single turn holds nothing to score or train on; it is dropped and re-issued."""
    site = Site([None], limits=replace(LIMITS, timeout_s=0.1))
    with pytest.raises(EngineError, match=r"no turn within 0\.1 s"):
        site.run()


def test_a_prompt_that_leaves_no_room_names_the_limit():
    site = Site([final("hi")], limits=replace(LIMITS, max_context_tokens=12))
    with pytest.raises(BadInputError, match="max_context_tokens = 12"):
        site.run()


def test_a_timeout_after_a_turn_is_a_rollout():
    """Negative control of both guards above."""
    site = Site([plan(1), None], limits=replace(LIMITS, timeout_s=0.1))
    rollout = site.run()
    assert (rollout.status, len(rollout.turns)) == ("timeout", 1)
    assert len(training_sample(rollout, 0.0).token_ids) == len(rollout_token_ids(rollout))


# --- what others see of it ------------------------------------------------------------------------


def test_successful_calls_leave_out_refused_and_failed_ones():
    turns = Site([plan(3), LOOK, call("pay", order=1), PAY, final("It is paid.")]).run().turns
    assert [turn.tool_result.error for turn in turns if turn.tool_result] == ["", "", "bad_arguments", ""]
    assert successful_calls(turns) == (("look", {"order": "48213"}), ("pay", {"order": "48213"}))


def test_a_call_that_nobody_answered_took_no_effect():
    site = Site([plan(3), LOOK, PAY], limits=replace(LIMITS, max_tool_calls=1))
    assert successful_calls(site.run().turns) == (("look", {"order": "48213"}),)


def test_a_finished_rollout_looks_the_same_to_an_annotator_as_to_the_checks():
    site = Site([plan(3), LOOK, call("refund", x=1), PAY, final("It is paid.")])
    task = make_task()
    rollout = site.run(task)
    assert rollout_view(rollout, task) == site.workflow.views[0]


# --- arrays that train ----------------------------------------------------------------------------


def test_a_sample_is_the_last_prompt_and_its_completion():
    sample = training_sample(make_rollout(group_id=4), 0.75)
    assert sample.token_ids == (10, 11, 12, 13, 14, 15, 16, 7)
    assert sample.loss_mask == (False, False, True, True, False, True, True, True)
    assert sample.rollout_logprobs == (0.0, 0.0, -1.0, -1.0, 0.0, -2.0, -2.0, -2.0)
    assert (sample.reward, sample.group_id, sample.truncated) == (0.75, 4, False)


@pytest.mark.parametrize(
    ("status", "is_cut"), [("truncated", True), ("timeout", True), ("tool_budget", False), ("ok", False)]
)
def test_only_what_a_limit_of_ours_cut_short_is_truncated(status: Any, is_cut: bool):
    """A policy that used up its tools ended by itself: its failure is worth what it is, and nothing lies beyond."""
    assert training_sample(make_rollout(status=status, outcome=BAD), 0.0).truncated is is_cut


@pytest.mark.parametrize(
    "second",
    [
        make_turn((10, 11, 12, 99, 14), (15,)),  # a sampled token was replaced
        make_turn((10, 11, 12, 14), (15,)),  # a sampled token was lost
        make_turn((9, 11, 12, 13, 14), (15,)),  # the prompt was replaced
        make_turn((10, 11), (15,)),  # the first turn was forgotten
        make_turn((), ()),
    ],
)
def test_a_broken_token_chain_raises(second: Any):
    rollout = make_rollout(turns=(make_turn((10, 11), (12, 13)), second))
    with pytest.raises(ValueError, match=r"r#0\.1: a turn does not continue"):
        training_sample(rollout, 1.0)


def test_a_real_rollout_gives_a_mask_of_exactly_the_sampled_tokens():
    rollout = Site([plan(3), LOOK, PAY, final("It is paid.")]).run()
    sample = training_sample(rollout, 1.0)
    sampled = [token for turn in rollout.turns for token in turn.completion.token_ids]
    assert [token for token, own in zip(sample.token_ids, sample.loss_mask, strict=True) if own] == sampled
    logprobs = [logprob for turn in rollout.turns for logprob in turn.completion.logprobs]
    assert [x for x, own in zip(sample.rollout_logprobs, sample.loss_mask, strict=True) if own] == logprobs
    assert all(x == 0.0 for x, own in zip(sample.rollout_logprobs, sample.loss_mask, strict=True) if not own)


chains = st.lists(
    st.tuples(st.lists(st.integers(0, 50), min_size=1, max_size=5), st.lists(st.integers(0, 50), max_size=4)),
    min_size=1,
    max_size=5,
)


@settings(deadline=None, max_examples=60)
@given(prompt=st.lists(st.integers(0, 50), min_size=1, max_size=5), chain=chains)
def test_any_chain_of_turns_lays_out_without_loss(prompt: list[int], chain: list[tuple[list[int], list[int]]]):
    context, turns = list(prompt), []
    for completion, observation in chain:
        turns.append(make_turn(context, completion, logprob=-float(len(turns) + 1)))
        context = [*context, *completion, *observation]
    sample = training_sample(make_rollout(turns=tuple(turns)), 0.5)
    assert list(sample.token_ids) == rollout_token_ids(make_rollout(turns=tuple(turns)))
    assert sum(sample.loss_mask) == sum(len(completion) for completion, _ in chain)
    assert not any(sample.loss_mask[: len(prompt)])
    expected = {-float(index + 1) for index in range(len(chain))}
    assert {x for x, own in zip(sample.rollout_logprobs, sample.loss_mask, strict=True) if own} == expected


def routed(turn: Turn, first: int, *, top_k: int = 1) -> Turn:
    """The turn with routes of one layer: token t of it visited expert `first` + t."""
    num_read = len(turn.prompt_token_ids) + len(turn.completion.token_ids) - 1
    routes = Routes(num_layers=1, top_k=top_k, experts=tuple(range(first, first + num_read * top_k)))
    return replace(turn, completion=replace(turn.completion, routes=routes))


def test_each_token_keeps_the_experts_of_the_turn_that_sampled_it():
    """The second turn reads the first one's tokens again; only what it read first counts, its last token never."""
    first, second = make_turn((10, 11), (12, 13)), make_turn((10, 11, 12, 13, 20), (14, 15))
    rollout = make_rollout(turns=(routed(first, 100), routed(second, 200)))
    routes = training_sample(rollout, 1.0).routes
    assert routes.experts == (100, 101, 102, 203, 204, 205)
    assert routes.num_tokens == len(rollout_token_ids(rollout)) - 1


@pytest.mark.parametrize("second", [lambda turn: turn, lambda turn: routed(turn, 200, top_k=2)])
def test_routes_that_do_not_cover_a_rollout_are_left_out(second: Callable[[Turn], Turn]):
    turns = (routed(make_turn((10, 11), (12, 13)), 100), second(make_turn((10, 11, 12, 13, 20), (14, 15))))
    assert training_sample(make_rollout(turns=turns), 1.0).routes == Routes()
