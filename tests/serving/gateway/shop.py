"""A workflow of two tools, light enough for a tool-host process: `look` reads, `pay` writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl_actors.environment.tools import ToolSpec
from rl_actors.environment.workflow import RolloutView

_ORDER = {"type": "string"}
TOOLS = (
    ToolSpec(
        name="look",
        description="Look.",
        parameters={"type": "object", "properties": {"order": _ORDER}, "required": ["order"]},
        side_effect="read",
    ),
    ToolSpec(
        name="pay",
        description="Pay.",
        parameters={"type": "object", "properties": {"order": _ORDER}, "required": ["order"]},
        side_effect="write",
    ),
)


@dataclass
class ShopWorkflow:
    """The part of a workflow that serving asks for; `checks` decides on a reply and may raise or sleep."""

    checks: Callable[[str, RolloutView], Any] = lambda reply, run: {"non_empty": bool(reply)}
    views: list[RolloutView] = field(default_factory=list)
    name: str = "shop"
    system_prompt: str = "system"
    tools_module: str = "tests.serving.gateway.shop"
    intents: Sequence[str] = ("pay",)

    def check_reply(self, reply: str, run: RolloutView) -> Any:
        self.views.append(run)
        return self.checks(reply, run)


@dataclass
class ShopWorld:
    """The shop's tools over a live file that holds one line per payment."""

    tools: Sequence[ToolSpec] = TOOLS
    functions: Mapping[str, Callable[..., Any]] = field(
        default_factory=lambda: {"look": lambda handle, order: {"order": order}, "pay": _pay}
    )

    def open(self, world: Mapping[str, Any]) -> Mapping[str, Any]:
        return world

    def read_state(self, handle: Mapping[str, Any], selector: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"lines": Path(handle["database"]).read_text().splitlines()}

    def close(self, handle: Mapping[str, Any]) -> None:
        return


def _pay(handle: Mapping[str, Any], order: str) -> dict[str, str]:
    with Path(handle["database"]).open("a") as file:
        file.write(f"{handle['session']} paid {order}\n")
    return {"paid": order}


WORLD = ShopWorld()
WORKFLOW = ShopWorkflow()
