"""What holds for every renderer: a demonstration's mask, the choice by model directory, and a loop that knows none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rl_actors.agent import demonstration_arrays, renderer_of, run_agent
from rl_actors.agent.renderers.harmony import HarmonyRenderer
from rl_actors.agent.renderers.renderer import ParsedTurn
from rl_actors.contracts import BadDataError, Demonstration, DemonstrationTurn, SamplingParams, ToolCall
from tests.rl_actors.agent.renderers.test_harmony import DEMONSTRATION
from tests.rl_actors.fakes import LIMITS, PROMPT, FakeWorld, ScriptedEngine, executor, renderer


def test_the_mask_of_a_demonstration_holds_exactly_the_assistants_tokens():
    ids, mask = demonstration_arrays(renderer(), "Be brief.", DEMONSTRATION)
    said = [token for token, own in zip(ids, mask, strict=True) if own]
    assert said == [token for one in DEMONSTRATION.turns for token in renderer().completion(one)]
    heard = renderer().decode([token for token, own in zip(ids, mask, strict=True) if not own])
    assert PROMPT in heard
    assert '{"status":"open"}' in heard
    assert "It is open." not in heard


def test_a_demonstration_ends_with_the_answer():
    ids, mask = demonstration_arrays(renderer(), "", DEMONSTRATION)
    assert ids[-1] == renderer().stop_token_ids[1]
    assert mask[-1]


# --- the choice -----------------------------------------------------------------------------------


def test_a_model_directory_with_harmony_tokens_gets_harmony(tmp_path: Path):
    renderer()._tokenizer.save_pretrained(tmp_path)
    chosen = renderer_of(str(tmp_path))
    assert isinstance(chosen, HarmonyRenderer)
    assert chosen.vocabulary == renderer().vocabulary


def test_a_model_directory_of_another_format_is_refused(tmp_path: Path):
    from tokenizers import Tokenizer, models

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))).save_pretrained(
        tmp_path
    )
    with pytest.raises(BadDataError, match="add them before SFT"):
        renderer_of(str(tmp_path))


# --- another format -------------------------------------------------------------------------------


class LetterRenderer:
    """A format of our own: one id a letter; `name{...}` is a call, `!text` an answer, 0 ends both."""

    stop_token_ids = (0,)

    @property
    def vocabulary(self) -> dict[str, int]:
        return {}

    def prompt(self, system: str, messages: Sequence[tuple[str, str]]) -> list[int]:
        return [ord(letter) for letter in system + "".join(text for _, text in messages)]

    def completion(self, turn: DemonstrationTurn) -> list[int]:
        text = f"!{turn.text}" if turn.kind == "final" else f"{turn.tool or 'plan'}{json.dumps(turn.arguments)}"
        return [*map(ord, text), 0]

    def observation(self, tool: str, content: str) -> list[int]:
        return [ord(letter) for letter in f"{tool}:{content}"]

    def parse(self, token_ids: Sequence[int]) -> ParsedTurn:
        text = "".join(map(chr, token_ids)).removesuffix("\0")
        if text.startswith("!"):
            return ParsedTurn(kind="final", tool_call=None, text=text[1:])
        name, brace, rest = text.partition("{")
        if not brace:
            return ParsedTurn(kind="malformed", tool_call=None, text=text)
        call = ToolCall(name=name, arguments=json.loads(brace + rest), raw=brace + rest)
        return ParsedTurn(kind="plan" if name == "plan" else "tool", tool_call=call, text=text)


def said(text: str) -> list[int]:
    return [*map(ord, text), 0]


def run_letters(*texts: str) -> tuple[Any, ScriptedEngine, FakeWorld]:
    letters, world = LetterRenderer(), FakeWorld(content='{"status":"open"}')
    engine = ScriptedEngine([said(text) for text in texts])
    run = asyncio.run(
        run_agent(
            letters.prompt("", [("user", PROMPT)]), renderer=letters, generate=engine, executor=executor(world),
            sampling=SamplingParams(max_tokens=64), limits=LIMITS,
        )
    )  # fmt: skip
    return run, engine, world


def test_the_loop_runs_over_any_format():
    plan = 'plan{"steps": [], "tool_budget": 1}'
    run, engine, world = run_letters(plan, 'look{"order": "48213"}', "!It is open.")
    assert (run.status, run.reply) == ("ok", "It is open.")
    assert world.calls == [("look", {"order": "48213"})]
    assert "".join(map(chr, engine.prompts[-1])).endswith('look:{"status":"open"}')


def test_what_another_format_cannot_read_is_malformed_there_too():
    run, engine, _ = run_letters("mumble", "!Sorry.")
    assert [turn.kind for turn in run.turns] == ["malformed", "final"]
    assert "".join(map(chr, engine.prompts[-1])).endswith('none:{"error":"malformed"}')


def test_a_demonstration_in_another_format_has_a_mask_too():
    ids, mask = demonstration_arrays(LetterRenderer(), "", DEMONSTRATION)
    own = "".join(chr(token) for token, is_own in zip(ids, mask, strict=True) if is_own)
    assert own.count("\0") == len(DEMONSTRATION.turns)
    assert own.endswith("!It is open.\0")
    assert PROMPT not in own


def test_a_demonstration_without_turns_is_its_prompt():
    bare = Demonstration(task_id="t", prompt=PROMPT, turns=())
    ids, mask = demonstration_arrays(LetterRenderer(), "", bare)
    assert (len(ids), any(mask)) == (len(PROMPT), False)
