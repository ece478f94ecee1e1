"""The order database: real SQLite, private in memory for a task or one shared file for live traffic."""

from __future__ import annotations

import functools
import sqlite3
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_actors.environment import ToolFailure

# The same in every world, and one short fact each: a reply can be held to it.
ARTICLES: Mapping[str, str] = {
    "returns": "Returns are accepted for 30 days.",
    "warranty": "The warranty lasts 24 months.",
    "shipping": "Shipping takes 4 days.",
    "cancellation": "Orders can be cancelled until they ship.",
    "gifts": "Gift wrap costs 5 euros.",
}
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "customers": ("customer_id", "email"),
    "orders": ("order_id", "customer_id", "status", "days", "return_window", "tier", "total", "address"),
    "shipments": ("order_id", "tracking", "remark"),
    "payments": ("order_id", "amount", "status", "refunded", "invoices"),
    "notes": ("order_id", "author", "text"),
    "escalations": ("order_id", "reason"),
    "audit": ("session", "tool", "order_id"),
}
_SCHEMA = """
CREATE TABLE customers (customer_id TEXT PRIMARY KEY, email TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE orders (order_id TEXT PRIMARY KEY, customer_id TEXT NOT NULL, status TEXT NOT NULL, days INTEGER NOT NULL,
  return_window TEXT NOT NULL, tier TEXT NOT NULL, total INTEGER NOT NULL, address TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE shipments (order_id TEXT PRIMARY KEY, tracking TEXT NOT NULL, remark TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE payments (order_id TEXT PRIMARY KEY, amount INTEGER NOT NULL, status TEXT NOT NULL,
  refunded INTEGER NOT NULL, invoices INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE notes (note_id INTEGER PRIMARY KEY, order_id TEXT NOT NULL, author TEXT NOT NULL, text TEXT NOT NULL);
CREATE TABLE escalations (case_id INTEGER PRIMARY KEY, order_id TEXT NOT NULL, reason TEXT NOT NULL);
CREATE TABLE audit (entry_id INTEGER PRIMARY KEY, session TEXT NOT NULL, tool TEXT NOT NULL, order_id TEXT NOT NULL);
CREATE TABLE policy_articles (topic TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX notes_by_order ON notes (order_id);
CREATE INDEX escalations_by_order ON escalations (order_id);
CREATE INDEX audit_by_session ON audit (session);
CREATE INDEX audit_by_order ON audit (order_id);
"""
BUSY_TIMEOUT_S = 5.0  # several live agents write to one file


@dataclass(frozen=True, slots=True)
class Desk:
    """An open database and the session under which its audit log records this rollout."""

    connection: sqlite3.Connection
    session: str


def open_desk(world: Mapping[str, Any]) -> Desk:
    """Open a private desk from a task's rows, or the live one from `{"database": path, "session": name}`.

    Raises:
        sqlite3.OperationalError: there is no live database at that path.
    """
    if "database" in world:
        # `mode=rw`: a missing file is an error, not a new and empty database.
        connection = _connect(f"{Path(str(world['database'])).resolve().as_uri()}?mode=rw", uri=True)
        connection.execute("PRAGMA synchronous=NORMAL")
        # By its session's name a run is verified from outside: who opens the desk under it reads the same audit rows.
        return Desk(connection, str(world.get("session") or uuid.uuid4().hex))
    connection = _connect(":memory:")
    connection.deserialize(_empty_database())
    insert_rows(connection, world)
    return Desk(connection, "private")


def create_live_database(worlds: Sequence[Mapping[str, Any]], path: str) -> None:
    """Write a new live database that holds the rows of all these worlds, in WAL mode.

    Raises:
        sqlite3.IntegrityError: two worlds share an order or a customer.
        sqlite3.OperationalError: the file already holds tables.
    """
    connection = _connect(path)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        _create_schema(connection)
        with transaction(connection):
            for world in worlds:
                insert_rows(connection, world)
    finally:
        connection.close()


def insert_rows(connection: sqlite3.Connection, world: Mapping[str, Any]) -> None:
    """Insert a world's rows, table by table; tables a world does not name stay as they are."""
    for table, columns in COLUMNS.items():
        rows = world.get(table, ())
        if rows:
            marks = ", ".join("?" * len(columns))
            statement = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})"
            connection.executemany(statement, [tuple(row[column] for column in columns) for row in rows])


def read_rows(desk: Desk, orders: Sequence[str], customers: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return every row of these orders and customers, and every audit row of this session or of these orders."""
    state = {"customers": _select(desk, "customers", "customer_id", customers)}
    for table in ("orders", "shipments", "payments", "notes", "escalations"):
        state[table] = _select(desk, table, "order_id", orders)
    state["audit"] = _select(desk, "audit", "order_id", orders, also="session = ?", value=desk.session)
    return state


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Take the write lock at once, so that no other agent comes between a check and its update.

    Raises:
        ToolFailure: other agents held the lock for the whole busy timeout.
    """
    # The tool host's time limit may raise at any line: whatever happens, no transaction stays open.
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("COMMIT")
    except sqlite3.OperationalError as error:
        raise (ToolFailure("busy") if "locked" in str(error) else error) from error
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _select(
    desk: Desk, table: str, key: str, values: Sequence[str], also: str = "", value: str = ""
) -> list[dict[str, Any]]:
    """Return the rows whose key is among the values (or that satisfy `also`), in key order, as dictionaries."""
    columns, marks = COLUMNS[table], ", ".join("?" * len(values))
    where = f"{key} IN ({marks})" + (f" OR {also}" if also else "")
    statement = f"SELECT {', '.join(columns)} FROM {table} WHERE {where} ORDER BY {', '.join(columns)}"
    rows = desk.connection.execute(statement, [*values, *([value] if also else [])])
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _connect(path: str, *, uri: bool = False) -> sqlite3.Connection:
    # Autocommit, since transactions are explicit here; and a tool host may hand a world from thread to thread.
    return sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, uri=uri)


def _create_schema(connection: sqlite3.Connection) -> None:
    connection.executescript(_SCHEMA)
    connection.executemany("INSERT INTO policy_articles VALUES (?, ?)", list(ARTICLES.items()))


@functools.cache
def _empty_database() -> bytes:
    # Loading an image is several times faster than creating the tables, and every task opens a database.
    connection = _connect(":memory:")
    _create_schema(connection)
    image = connection.serialize()
    connection.close()
    return image
