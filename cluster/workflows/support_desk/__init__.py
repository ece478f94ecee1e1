"""Order support: tickets about orders, answered with ten tools over a SQLite database."""

from __future__ import annotations

from cluster.workflows.support_desk.desk import SupportDesk
from rl_actors.environment import Workflow

WORKFLOW: Workflow = SupportDesk()
