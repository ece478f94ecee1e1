"""Checks that must all hold before a reply is released. They know prompt, calls and reply; no goal, no state."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cluster.workflows.support_desk.claims import EFFECT_TOOLS, claimed_effects, words_of
from rl_actors.environment import RolloutView

MAX_WORDS, MAX_CHARS = 60, 400
_CUSTOMER = re.compile(r"\bC\d{2}_\d{2}\b", re.IGNORECASE)
_MARKUP = re.compile(r"<\||\|>|[{}]|\b[a-z]+_[a-z]+\b|</?\w+>")


def check_reply(reply: str, run: RolloutView) -> Mapping[str, bool]:
    """Return name -> holds, for every check."""
    return {
        "non_empty": bool(words_of(reply)),
        "within_length": len(reply) <= MAX_CHARS and len(reply.split()) <= MAX_WORDS,
        "no_internal_markup": _MARKUP.search(reply) is None,
        "no_foreign_customer_id": _customers(reply) <= _customers(run.task.prompt.partition(":")[0]),
        "no_unapproved_promises": _promised_tools(reply) <= _successful_tools(run),
    }


def _customers(text: str) -> set[str]:
    return {match.upper() for match in _CUSTOMER.findall(text)}


def _promised_tools(reply: str) -> set[str]:
    """Return the tools without which what the reply claims cannot be true."""
    return {EFFECT_TOOLS[kind] for kind in claimed_effects(reply)}


def _successful_tools(run: RolloutView) -> set[str]:
    """Return the tools that took effect; the agent loop leaves refused calls out of `tool_calls`."""
    return {name for name, _ in run.tool_calls}
