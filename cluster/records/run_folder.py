"""Where things live on disk."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rl_actors.contracts import BadInputError

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def seatrial_home(environ: Mapping[str, str] = os.environ) -> Path:
    """Return `SEATRIAL_HOME`, by default `~/.seatrial`. Not created here."""
    return Path(environ.get("SEATRIAL_HOME") or "~/.seatrial").expanduser().absolute()


def new_run_id(workflow: str, now: datetime | None = None, suffix: str | None = None) -> str:
    """Return a run id that sorts by time, such as `support_desk-20261122-183000-1f3a`."""
    moment = now or datetime.now(UTC)
    return f"{workflow}-{moment:%Y%m%d-%H%M%S}-{suffix or secrets.token_hex(2)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """The files of one run. Example: RunFolder.of(seatrial_home(), run_id).journal"""

    root: Path

    @classmethod
    def of(cls, home: Path, run_id: str) -> RunFolder:
        """Return the folder of a run. Raises BadInputError for an id that could leave `runs/`."""
        if not RUN_ID.fullmatch(run_id):
            raise BadInputError(
                "run_id", run_id, "use letters, digits, '.', '_' and '-', starting with a letter or digit"
            )
        return cls(root=home / "runs" / run_id)

    @property
    def run_id(self) -> str:
        """The run's id: the folder's name."""
        return self.root.name

    @property
    def spec(self) -> Path:
        """The spec with every default filled in."""
        return self.root / "spec.resolved.json"

    @property
    def journal(self) -> Path:
        """Finished stages."""
        return self.root / "journal.jsonl"

    @property
    def bundle(self) -> Path:
        """The manifest of frozen versions."""
        return self.root / "bundle.json"

    @property
    def metrics(self) -> Path:
        """Training metrics, one JSON object a line."""
        return self.root / "metrics.jsonl"

    @property
    def tripwires(self) -> Path:
        """What tripped in training, one JSON object a line: step, reason code, metric, value and limit."""
        return self.root / "tripwires.jsonl"

    @property
    def snapshots(self) -> Path:
        """Parent of the frozen datasets."""
        return self.root / "snapshots"

    @property
    def evaluations(self) -> Path:
        """Parent of the evaluation reports."""
        return self.root / "eval"

    @property
    def decisions(self) -> Path:
        """The release controller's decisions."""
        return self.root / "release" / "decisions.jsonl"

    @property
    def split_history(self) -> Path:
        """Every traffic split that was in force in the run's releases; the serving side writes it."""
        return self.root / "serving" / "split" / "split_history.jsonl"

    @property
    def report(self) -> Path:
        """Parent of the briefs."""
        return self.root / "report"

    @property
    def summary(self) -> Path:
        """The run's ending, for machines."""
        return self.root / "summary.json"


def list_runs(home: Path) -> list[str]:
    """Return the ids of all runs that have a resolved spec, oldest first."""
    found = [path.parent for path in (home / "runs").glob("*/spec.resolved.json")]
    return [path.name for path in sorted(found, key=lambda path: (path.stat().st_mtime, path.name))]
