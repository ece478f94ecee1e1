"""A renderer as the agent knows it: one message format over one tokenizer, text to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rl_actors.contracts import Demonstration, DemonstrationTurn, ToolCall, TurnKind
from rl_actors.environment import PLAN_TOOL


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedTurn:
    """A completion as read: a plan, a tool call, a final answer, or nothing that can be understood.

    `reasoning` is what the policy said before it, on channels that no user sees.
    """

    kind: TurnKind
    tool_call: ToolCall | None
    text: str
    reasoning: str = ""


class Renderer(Protocol):
    """Stateless, so one instance serves many conversations at once. A completion ends with one of `stop_token_ids`.

    Text from users and tools never becomes a special token: nobody can forge a message.
    """

    stop_token_ids: tuple[int, ...]

    @property
    def vocabulary(self) -> dict[str, int]:
        """Return token text -> id."""
        ...

    def prompt(self, system: str, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Return the ids of system text and (role, text) messages, open for the assistant's next turn."""
        ...

    def completion(self, turn: DemonstrationTurn) -> list[int]:
        """Return the ids a policy would have sampled to say this turn."""
        ...

    def observation(self, tool: str, content: str) -> list[int]:
        """Return the ids of a tool's reply, open for the assistant's next turn."""
        ...

    def parse(self, token_ids: Sequence[int]) -> ParsedTurn:
        """Read one completion; what is no message is `malformed`, never an error."""
        ...


def demonstration_arrays(renderer: Renderer, system: str, demonstration: Demonstration) -> tuple[list[int], list[bool]]:
    """Return (token ids, loss mask) of a whole demonstration; the mask is True on the assistant's own tokens."""
    ids = renderer.prompt(system, [("user", demonstration.prompt)])
    mask = [False] * len(ids)
    for turn in demonstration.turns:
        completion = renderer.completion(turn)
        observation: list[int] = []
        if turn.kind != "final":
            observation = renderer.observation(PLAN_TOOL if turn.kind == "plan" else turn.tool, turn.observation)
        ids += [*completion, *observation]
        mask += [True] * len(completion) + [False] * len(observation)
    return ids, mask
