"""The scripted expert whose attempts train the baseline: plans from the ticket alone, looks up, acts, answers.

With `mistake_probability` it acts where it must refuse or escalate, and forgets the second request of a ticket.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from cluster.workflows.support_desk.database import ARTICLES
from cluster.workflows.support_desk.tickets import Ask, Ticket
from cluster.workflows.support_desk.tools import WORLD
from rl_actors.contracts import Demonstration, DemonstrationTurn, Task
from rl_actors.environment import PLAN_ACCEPTED, PLAN_TOOL, ToolFailure, render_error, render_observation

# Half: an expert without mistakes leaves a baseline with nothing to become better at.
MISTAKE_PROBABILITY = 0.5
# Short and regular, at most one copied fact each: what a tiny model can learn to say.
_ANSWERS: Mapping[Ask, str] = {
    "status": "Your order is {status}.",
    "tracking": "Your tracking code is {tracking}.",
    "payment": "You paid {amount}.",
}
_REFUNDED = "We refunded {amount}."
_DONE = {
    "cancel": "Your order is cancelled.",
    "address": "The address is updated.",
    "invoice": "The invoice is sent.",
    "damage": "We noted the damage.",
}
_NOT_YOURS = "Sorry, we cannot help: this order is not on your account."
_WINDOW_CLOSED = "Sorry, we cannot refund it: the return window is closed."
_SHIPPED = {
    "cancel": "Sorry, we cannot cancel it: the order has shipped.",
    "address": "Sorry, we cannot change it: the order has shipped.",
}
_ESCALATED = "We escalated this to a specialist."
_ASK_TOOLS: Mapping[Ask, str] = {
    "tracking": "get_shipment",
    "payment": "get_payment",
    "refund": "refund_order",
    "cancel": "cancel_order",
    "address": "change_address",
    "invoice": "send_invoice",
    "damage": "add_note",
}


def demonstrate(task: Task, rng: random.Random, mistake_probability: float = MISTAKE_PROBABILITY) -> Demonstration:
    """Return one attempt with observations from the real tools on a private world."""
    ticket = Ticket.from_goal(task.goal)
    attempt = Attempt(task, ticket, errs=rng.random() < mistake_probability)
    try:
        reply = attempt.work()
    finally:
        WORLD.close(attempt.desk)
    final = DemonstrationTurn(kind="final", tool="", arguments={}, text=reply, observation="")
    return Demonstration(task_id=task.task_id, prompt=task.prompt, turns=(_plan_turn(ticket), *attempt.turns, final))


def plan_steps(ticket: Ticket) -> list[str]:
    """Return the tools a ticket's text calls for; nothing here depends on a look-up."""
    if ticket.asks == ("policy",):
        return ["search_policy"]
    if ticket.legal:
        return ["get_order", "escalate"]
    return ["get_order", *(_ASK_TOOLS[ask] for ask in ticket.asks if ask in _ASK_TOOLS)]


def _plan_turn(ticket: Ticket) -> DemonstrationTurn:
    # Written from the ticket alone, so that it never shows the mistake to come.
    steps = plan_steps(ticket)
    # One spare call lets an escalation replace or follow a step.
    arguments = {"steps": steps, "tool_budget": len(steps) + 1}
    return DemonstrationTurn(kind="plan", tool=PLAN_TOOL, arguments=arguments, text="", observation=PLAN_ACCEPTED)


class Attempt:
    """One attempt: an open world and the turns so far."""

    def __init__(self, task: Task, ticket: Ticket, *, errs: bool) -> None:
        """Open the task's world."""
        self.turns: list[DemonstrationTurn] = []
        self._ticket, self._errs = ticket, errs
        self._order_id = ticket.order_id
        self.desk = WORLD.open(task.world)

    def work(self) -> str:
        """Call tools and return the reply."""
        ticket = self._ticket
        if ticket.asks == ("policy",):
            return self._call("search_policy", topic=ticket.topic).get("text", ARTICLES[ticket.topic])
        order = self._call("get_order", order_id=self._order_id, customer_id=ticket.customer_id)
        if order["owner"] == "no" and not self._errs:
            return _NOT_YOURS
        if ticket.legal and not self._errs:
            return self._escalate("legal")
        asks = ticket.asks[:1] if self._errs else ticket.asks
        return " ".join(self._serve(ask, order) for ask in asks)

    def _serve(self, ask: Ask, order: Mapping[str, Any]) -> str:
        """Do one request and return its sentence."""
        if ask == "refund":
            return self._refund(order)
        if ask not in _ANSWERS:
            return self._change(ask, order)
        found = self._call(_ASK_TOOLS[ask], order_id=self._order_id) if ask in _ASK_TOOLS else order
        return _ANSWERS[ask].format(**found)

    def _refund(self, order: Mapping[str, Any]) -> str:
        """Refund; the erring expert does not look at window and tier."""
        if order["window"] == "closed" and not self._errs:
            return _WINDOW_CLOSED
        if order["tier"] == "high" and not self._errs:
            return self._escalate("limit")
        self._call("refund_order", order_id=self._order_id, amount=order["total"])
        return _REFUNDED.format(amount=order["total"])

    def _change(self, ask: Ask, order: Mapping[str, Any]) -> str:
        """Change the order; the erring expert tries what is too late and then claims it."""
        has_left = order.get("status") in ("shipped", "delivered")
        if ask in ("cancel", "address") and has_left and not self._errs:
            return _SHIPPED[ask]
        extra = {"address": {"address": self._ticket.address}, "damage": {"text": "damaged"}}.get(ask, {})
        self._call(_ASK_TOOLS[ask], order_id=self._order_id, **extra)
        return _DONE[ask]

    def _escalate(self, reason: str) -> str:
        self._call("escalate", order_id=self._order_id, reason=reason)
        return _ESCALATED

    def _call(self, tool: str, **arguments: object) -> dict[str, Any]:
        """Run a real tool, append its turn, and return its value (empty when it refused)."""
        try:
            value = WORLD.functions[tool](self.desk, **arguments)
            observation = render_observation(value)
        except ToolFailure as failure:
            value, observation = {}, render_error(str(failure))
        turn = DemonstrationTurn(kind="tool", tool=tool, arguments=arguments, text="", observation=observation)
        self.turns.append(turn)
        return value
