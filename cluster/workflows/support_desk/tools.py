"""The desk's ten tools over its database, and the world that holds both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cluster.workflows.support_desk.database import BUSY_TIMEOUT_S, Desk, open_desk, read_rows, transaction
from rl_actors.environment import SideEffect, ToolFailure, ToolSpec

_ORDER = {"type": "string", "pattern": "^O[0-9]{2}-[0-9]{3}$"}
_CUSTOMER = {"type": "string", "pattern": "^C[0-9]{2}_[0-9]{2}$"}
# SQLite cannot store lone surrogates or very large integers: refused as bad arguments, before a tool sees them.
_TEXT = {"type": "string", "pattern": "^[^\\ud800-\\udfff]{1,120}$"}
_AMOUNT = {"type": "integer", "minimum": 1, "maximum": 1_000_000}
# Longer than the database's busy timeout, so that a busy database is answered and not cut off.
_TIMEOUT_S = BUSY_TIMEOUT_S + 1.0
_REASON = {"type": "string", "enum": ["limit", "legal", "other"]}


def get_order(desk: Desk, order_id: str, customer_id: str) -> dict[str, Any]:
    """Return an order, or only `owner: no` when this customer does not own it."""
    # The newest note goes into the observation as it is: that is how planted texts reach the policy.
    columns = "customer_id, status, return_window, tier, total"
    owner, status, window, tier, total = _one(desk, f"SELECT {columns} FROM orders WHERE order_id = ?", order_id)
    if owner != customer_id:
        return {"owner": "no"}
    newest = "SELECT text FROM notes WHERE order_id = ? ORDER BY note_id DESC LIMIT 1"
    note = desk.connection.execute(newest, (order_id,)).fetchone()
    known = {"owner": "yes", "status": status, "window": window, "tier": tier, "total": total}
    return known | {"note": note[0] if note else ""}


def get_shipment(desk: Desk, order_id: str) -> dict[str, Any]:
    """Return tracking code and the carrier's remark; the read is audited, because it is personal data."""
    # Looked up before the write lock is asked for: an unknown order is refused without waiting for other agents.
    tracking, remark = _one(desk, "SELECT tracking, remark FROM shipments WHERE order_id = ?", order_id)
    with _audited(desk, "get_shipment", order_id):
        return {"tracking": tracking, "remark": remark}


def get_payment(desk: Desk, order_id: str) -> dict[str, Any]:
    """Return amount and payment status; the read is audited, because it is personal data."""
    amount, status = _one(desk, "SELECT amount, status FROM payments WHERE order_id = ?", order_id)
    with _audited(desk, "get_payment", order_id):
        return {"amount": amount, "status": status}


def search_policy(desk: Desk, topic: str) -> dict[str, Any]:
    """Return the policy article on a topic."""
    row = desk.connection.execute(
        "SELECT text FROM policy_articles WHERE topic = ?", (topic.strip().lower(),)
    ).fetchone()
    if row is None:
        raise ToolFailure("no article")
    return {"text": row[0]}


def refund_order(desk: Desk, order_id: str, amount: int) -> dict[str, Any]:
    """Pay money back; refuses a second refund and an amount above what was paid."""
    # Tools check what a database can know, not company policy: a bad refund is possible, and the verifier sees it.
    with _audited(desk, "refund_order", order_id):
        paid, status = _one(desk, "SELECT amount, status FROM payments WHERE order_id = ?", order_id)
        if status != "paid":
            raise ToolFailure("already refunded")
        if amount > paid:
            raise ToolFailure("amount above payment")
        statement = "UPDATE payments SET status = 'refunded', refunded = ? WHERE order_id = ?"
        desk.connection.execute(statement, (amount, order_id))
    return {"refunded": amount}


def cancel_order(desk: Desk, order_id: str) -> dict[str, Any]:
    """Cancel an order that has not left the warehouse."""
    with _audited(desk, "cancel_order", order_id):
        _require_not_shipped(desk, order_id)
        desk.connection.execute("UPDATE orders SET status = 'cancelled' WHERE order_id = ?", (order_id,))
    return {"status": "cancelled"}


def change_address(desk: Desk, order_id: str, address: str) -> dict[str, Any]:
    """Change where an order that has not left the warehouse will go."""
    with _audited(desk, "change_address", order_id):
        _require_not_shipped(desk, order_id)
        desk.connection.execute("UPDATE orders SET address = ? WHERE order_id = ?", (address, order_id))
    return {"address": "updated"}


def send_invoice(desk: Desk, order_id: str) -> dict[str, Any]:
    """Mail the invoice to the address on file of the order's owner."""
    with _audited(desk, "send_invoice", order_id):
        _one(desk, "SELECT 1 FROM payments WHERE order_id = ?", order_id)
        desk.connection.execute("UPDATE payments SET invoices = invoices + 1 WHERE order_id = ?", (order_id,))
    return {"invoice": "sent"}


def add_note(desk: Desk, order_id: str, text: str) -> dict[str, Any]:
    """Add an agent's note to an order."""
    with _audited(desk, "add_note", order_id):
        _one(desk, "SELECT 1 FROM orders WHERE order_id = ?", order_id)
        desk.connection.execute("INSERT INTO notes (order_id, author, text) VALUES (?, 'agent', ?)", (order_id, text))
    return {"note": "saved"}


def escalate(desk: Desk, order_id: str, reason: str) -> dict[str, Any]:
    """Hand the ticket to a person."""
    with _audited(desk, "escalate", order_id):
        _one(desk, "SELECT 1 FROM orders WHERE order_id = ?", order_id)
        desk.connection.execute("INSERT INTO escalations (order_id, reason) VALUES (?, ?)", (order_id, reason))
    return {"case": "open"}


def _one(desk: Desk, statement: str, order_id: str) -> tuple[Any, ...]:
    """Return the row of an order, or refuse."""
    row = desk.connection.execute(statement, (order_id,)).fetchone()
    if row is None:
        raise ToolFailure("order not found")
    return row


def _require_not_shipped(desk: Desk, order_id: str) -> None:
    """Refuse what is too late."""
    (status,) = _one(desk, "SELECT status FROM orders WHERE order_id = ?", order_id)
    if status == "cancelled":
        raise ToolFailure("already cancelled")
    if status not in ("placed", "packed"):
        raise ToolFailure("already shipped")


@contextmanager
def _audited(desk: Desk, tool: str, order_id: str) -> Iterator[None]:
    """Run a transaction whose last row says who touched or read what; a refusal inside leaves no trace."""
    with transaction(desk.connection):
        yield
        statement = "INSERT INTO audit (session, tool, order_id) VALUES (?, ?, ?)"
        desk.connection.execute(statement, (desk.session, tool, order_id))


def _tool(
    function: Callable[..., dict[str, Any]], description: str, side_effect: SideEffect, **properties: Mapping[str, Any]
) -> tuple[ToolSpec, Callable[..., dict[str, Any]]]:
    """Describe a function as the tool of its name, all of whose arguments are required."""
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    spec = ToolSpec(
        name=function.__name__,
        description=description,
        parameters=parameters,
        side_effect=side_effect,
        timeout_s=_TIMEOUT_S,
    )
    return spec, function


# In this order the policy reads them in its prompt: another order is another prompt.
_TOOLS = (
    _tool(get_order, "Order and owner check.", "read", order_id=_ORDER, customer_id=_CUSTOMER),
    _tool(get_shipment, "Tracking code.", "read", order_id=_ORDER),
    _tool(get_payment, "Amount paid.", "read", order_id=_ORDER),
    _tool(search_policy, "Policy article by topic.", "read", topic=_TEXT),
    _tool(refund_order, "Pay money back.", "write", order_id=_ORDER, amount=_AMOUNT),
    _tool(cancel_order, "Cancel before shipping.", "write", order_id=_ORDER),
    _tool(change_address, "Change delivery address.", "write", order_id=_ORDER, address=_TEXT),
    _tool(send_invoice, "Mail the invoice.", "write", order_id=_ORDER),
    _tool(add_note, "Note on an order.", "write", order_id=_ORDER, text=_TEXT),
    _tool(escalate, "Hand over to a person.", "write", order_id=_ORDER, reason=_REASON),
)
TOOLS: tuple[ToolSpec, ...] = tuple(spec for spec, _ in _TOOLS)
FUNCTIONS: Mapping[str, Callable[..., dict[str, Any]]] = {spec.name: function for spec, function in _TOOLS}


class SupportDeskWorld:
    """The order database behind the tools; lives in a tool-host process."""

    tools: Sequence[ToolSpec] = TOOLS
    functions: Mapping[str, Callable[..., Any]] = FUNCTIONS

    def open(self, world: Mapping[str, Any]) -> Desk:
        """Open a private desk from rows, or the shared live one from `{"database": path, "session": name}`."""
        return open_desk(world)

    def read_state(self, handle: Desk, selector: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return all rows of the selector's `orders` and `customers`, and this session's audit rows."""
        return read_rows(handle, selector["orders"], selector["customers"])

    def close(self, handle: Desk) -> None:
        """Close the connection; a private world is gone."""
        handle.connection.close()


WORLD = SupportDeskWorld()
