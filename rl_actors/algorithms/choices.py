"""Names of the alternatives of every algorithm; free of torch, because a spec is checked before anything is loaded."""

from __future__ import annotations

from typing import Literal, get_args

from rl_actors.errors import BadInputError

GroupAdvantageKind = Literal["grpo", "dr_grpo", "rloo"]
PolicyLossKind = Literal["ppo", "gspo", "cispo"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum"]
KLKind = Literal["k1", "k2", "k3"]
CorrectionMode = Literal["none", "token_tis", "sequence_tis", "sequence_mask", "token_icepop"]

MAX_RELATIVE_KL_ERROR = 0.2
"""The adaptive KL coefficient's error is clipped to this (arXiv 1909.08593 section 2.2)."""


def require_choice(field: str, value: str, choices: object) -> None:
    """Refuse a value that is not one of the alternatives of a `Literal`.

    Raises:
        BadInputError: names the field, the value and the alternatives.
    """
    if value not in get_args(choices):
        raise BadInputError(field, value, f"choose one of {', '.join(get_args(choices))}")
