"""The text a policy reads after a tool ran: one function for demonstrations, training and serving."""

from __future__ import annotations

import json


def render_observation(value: object) -> str:
    """Return a tool's JSON value as compact JSON; keys keep the order in which the tool wrote them."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def render_error(message: str) -> str:
    """Return the observation of a refused or failed call: `{"error":"..."}`."""
    return render_observation({"error": message})


def render_plan_accepted() -> str:
    """Return the observation that answers an accepted `plan` turn."""
    return render_observation({"plan": "accepted"})
