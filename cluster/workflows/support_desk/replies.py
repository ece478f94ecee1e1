"""Replies: the changes they claim, and the checks that must all hold before one is released."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cluster.workflows.support_desk.policy_program import EffectKind
from rl_actors.environment import RolloutView

MAX_WORDS, MAX_CHARS = 60, 400
_CUSTOMER = re.compile(r"\bC\d{2}_\d{2}\b", re.IGNORECASE)
_MARKUP = re.compile(r"<\||\|>|[{}]|\b[a-z]+_[a-z]+\b|</?\w+>")
# A sentence claims an effect when it holds all words of one of its sets and no negation.
_CLAIMS: Mapping[EffectKind, tuple[frozenset[str], ...]] = {
    "refund": (frozenset({"refunded"}), frozenset({"refund", "issued"}), frozenset({"refund", "sent"})),
    "cancel": (frozenset({"cancelled"}), frozenset({"canceled"})),
    "address": (frozenset({"address", "updated"}), frozenset({"address", "changed"})),
    "invoice": (frozenset({"invoice", "sent"}),),
    "note": (frozenset({"noted"}),),
    "escalate": (frozenset({"escalated"}), frozenset({"handed", "specialist"})),
}
_NEGATIONS = frozenset({"not", "cannot", "can't", "unable", "never", "can", "if", "until", "no"})
EFFECT_TOOLS: Mapping[EffectKind, str] = {
    "refund": "refund_order",
    "cancel": "cancel_order",
    "address": "change_address",
    "invoice": "send_invoice",
    "note": "add_note",
    "escalate": "escalate",
}


def words_of(text: str) -> list[str]:
    """Return the lower-case words and numbers of a text."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower())


def says(text: str, phrases: tuple[str, ...]) -> bool:
    """Return whether a text holds at least one of the phrases, as whole words."""
    flat = f" {' '.join(words_of(text))} "
    return any(f" {' '.join(words_of(phrase))} " in flat for phrase in phrases)


def claimed_effects(reply: str) -> frozenset[EffectKind]:
    """Return the kinds of change that the reply says were made."""
    sentences = [frozenset(words_of(sentence)) for sentence in re.split(r"[.!?:;\n]", reply)]
    plain = [sentence for sentence in sentences if not sentence & _NEGATIONS]
    return frozenset(kind for kind, sets in _CLAIMS.items() if any(each <= words for each in sets for words in plain))


def check_reply(reply: str, run: RolloutView) -> Mapping[str, bool]:
    """Return name -> holds, for every check."""
    # A live ticket has no goal and its database is shared, so the checks know only prompt, calls and reply. A refused
    # call is not among `tool_calls`: the agent loop leaves it out.
    promised = {EFFECT_TOOLS[kind] for kind in claimed_effects(reply)}
    return {
        "non_empty": bool(words_of(reply)),
        "within_length": len(reply) <= MAX_CHARS and len(reply.split()) <= MAX_WORDS,
        "no_internal_markup": _MARKUP.search(reply) is None,
        "no_foreign_customer_id": _customers(reply) <= _customers(run.task.prompt.partition(":")[0]),
        "no_unapproved_promises": promised <= {name for name, _ in run.tool_calls},
    }


def _customers(text: str) -> set[str]:
    return {match.upper() for match in _CUSTOMER.findall(text)}
