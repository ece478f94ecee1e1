"""What changed between two states, in the policy program's words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from cluster.workflows.support_desk.policy_program import Effect, EffectKind

_FIELDS: tuple[tuple[str, str, EffectKind], ...] = (
    ("payments", "refunded", "refund"),
    ("orders", "status", "cancel"),
    ("orders", "address", "address"),
    ("payments", "invoices", "invoice"),
)
_ADDITIONS: tuple[tuple[str, str, EffectKind], ...] = (("notes", "text", "note"), ("escalations", "reason", "escalate"))
# Follows from a refund; the row says nothing that the `refund` effect does not say.
_DERIVED = frozenset({("payments", "status")})


def observed_effects(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Effect, ...]:
    """Return every change the tools can make, sorted; two equal notes count twice."""
    effects = [
        Effect(kind, order_id, str(value))
        for table, column, kind in _FIELDS
        for (order_id, value) in _changed(before, after, table, column)
    ]
    for table, column, kind in _ADDITIONS:
        effects += [
            Effect(kind, order_id, _canonical(kind, text)) for order_id, text in _added(before, after, table, column)
        ]
    return tuple(sorted(effects))


def unexplained_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """Return `table.column` of every difference that no tool can make: rows gone or new, other columns changed."""
    found: set[str] = set()
    known = {(table, column) for table, column, _ in _FIELDS} | _DERIVED
    for table, key in (
        ("customers", "customer_id"),
        ("orders", "order_id"),
        ("payments", "order_id"),
        ("shipments", "order_id"),
    ):
        old, new = _by_key(before, table, key), _by_key(after, table, key)
        found |= {f"{table}.{key}" for _ in old.keys() ^ new.keys()}
        found |= {
            f"{table}.{column}"
            for each in old.keys() & new.keys()
            for column in old[each]
            if old[each][column] != new[each][column] and (table, column) not in known
        }
    found |= {f"{table}.{column}" for table, column, _ in _ADDITIONS if _added(after, before, table, column)}
    return tuple(sorted(found))


def _changed(before: Mapping[str, Any], after: Mapping[str, Any], table: str, column: str) -> list[tuple[str, Any]]:
    """Return (order, new value) where a column differs."""
    old, new = _by_key(before, table, "order_id"), _by_key(after, table, "order_id")
    return [
        (order_id, row[column])
        for order_id, row in new.items()
        if order_id in old and old[order_id][column] != row[column]
    ]


def _added(before: Mapping[str, Any], after: Mapping[str, Any], table: str, column: str) -> Iterable[tuple[str, str]]:
    """Return (order, text) of the rows that only `after` has."""
    return list((_multiset(after, table, column) - _multiset(before, table, column)).elements())


def _multiset(state: Mapping[str, Any], table: str, column: str) -> Counter[tuple[str, str]]:
    return Counter((row["order_id"], row[column]) for row in state.get(table, ()))


def _by_key(state: Mapping[str, Any], table: str, key: str) -> dict[str, Mapping[str, Any]]:
    return {row[key]: row for row in state.get(table, ())}


def _canonical(kind: EffectKind, text: str) -> str:
    """A note about damage may be worded freely; a reason may not."""
    return "damaged" if kind == "note" and "damag" in text.lower() else text
