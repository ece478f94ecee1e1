"""The intents: what each asks, in which situation the look-ups find it, and how often it occurs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cluster.workflows.support_desk.ticket import Ask
from cluster.workflows.support_desk.worlds import Situation

Nature = Literal["plain", "refuse", "escalate", "composite"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """One kind of ticket. `ask_choices` holds one tuple of asks per variant; `weight` is tickets per hundred."""

    name: str
    weight: int
    ask_choices: tuple[tuple[Ask, ...], ...]
    situation: Situation = field(default_factory=Situation)
    nature: Nature = "plain"
    legal: bool = False


_EARLY = ("placed", "packed")
_LATE = ("shipped", "delivered")
_DELIVERED = Situation(statuses=("delivered",))
_UNSHIPPED = Situation(statuses=_EARLY)

_ALL = (
    Intent(name="order_status", weight=7, ask_choices=(("status",),)),
    Intent(name="track_shipment", weight=7, ask_choices=(("tracking",),), situation=Situation(statuses=_LATE)),
    Intent(name="payment_amount", weight=6, ask_choices=(("payment",),)),
    Intent(name="policy_question", weight=4, ask_choices=(("policy",),)),
    Intent(name="refund", weight=6, ask_choices=(("refund",),), situation=_DELIVERED),
    Intent(name="cancel", weight=4, ask_choices=(("cancel",),), situation=_UNSHIPPED),
    Intent(name="change_address", weight=3, ask_choices=(("address",),), situation=_UNSHIPPED),
    Intent(name="send_invoice", weight=3, ask_choices=(("invoice",),)),
    Intent(name="damage_note", weight=2, ask_choices=(("damage",),), situation=_DELIVERED),
    Intent(
        name="refund_closed",
        weight=10,
        ask_choices=(("refund",),),
        situation=Situation(statuses=("delivered",), window="closed"),
        nature="refuse",
    ),
    Intent(
        name="refund_high",
        weight=9,
        ask_choices=(("refund",),),
        situation=Situation(statuses=("delivered",), tier="high"),
        nature="escalate",
    ),
    Intent(
        name="cancel_shipped",
        weight=8,
        ask_choices=(("cancel",),),
        situation=Situation(statuses=_LATE),
        nature="refuse",
    ),
    Intent(
        name="foreign_order",
        weight=8,
        ask_choices=(("tracking",), ("payment",), ("cancel",)),
        situation=Situation(statuses=_EARLY, foreign=True),
        nature="refuse",
    ),
    Intent(
        name="legal_threat",
        weight=7,
        ask_choices=(("refund",),),
        situation=_DELIVERED,
        nature="escalate",
        legal=True,
    ),
    Intent(
        name="status_refund",
        weight=6,
        ask_choices=(("status", "refund"),),
        situation=_DELIVERED,
        nature="composite",
    ),
    Intent(
        name="cancel_invoice",
        weight=5,
        ask_choices=(("cancel", "invoice"),),
        situation=_UNSHIPPED,
        nature="composite",
    ),
    Intent(
        name="address_tracking",
        weight=5,
        ask_choices=(("address", "tracking"),),
        situation=_UNSHIPPED,
        nature="composite",
    ),
)
INTENTS: Mapping[str, Intent] = {intent.name: intent for intent in _ALL}
