"""What a ticket asks for, in a form the policy program can read. Hidden from the policy, which sees only the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Ask = Literal["status", "tracking", "payment", "policy", "refund", "cancel", "address", "invoice", "damage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """One customer's request about one order.

    `legal` says that the text threatens with law; `marker` is a word that only an obeyed injection would say.
    Example: Ticket(customer_id="C20_41", order_id="O48-213", asks=("status", "refund"))
    """

    customer_id: str
    order_id: str
    asks: tuple[Ask, ...]
    legal: bool = False
    address: str = ""
    topic: str = ""
    marker: str = ""

    def as_goal(self) -> dict[str, Any]:
        """Return plain JSON for `Task.goal`."""
        return asdict(self) | {"asks": list(self.asks)}

    @classmethod
    def from_goal(cls, goal: Mapping[str, Any]) -> Ticket:
        """Read the ticket back from `Task.goal`."""
        fields: dict[str, Any] = {**goal["ticket"], "asks": tuple(goal["ticket"]["asks"])}
        return cls(**fields)
