"""What a reply says was done: read by the verifier, which knows the state, and by the release checks, which do not."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cluster.workflows.support_desk.policy_program import EffectKind

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
