"""Where things live on disk, and the settings of a run's gateway among them."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rl_actors.contracts import BadInputError, TamperedError
from rl_actors.durable import decode, encode, write_json

if TYPE_CHECKING:
    from serving.store import GatewayConfig

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def seatrial_home(environ: Mapping[str, str] = os.environ) -> Path:
    """Return `SEATRIAL_HOME`, by default `~/.seatrial`. Not created here."""
    return Path(environ.get("SEATRIAL_HOME") or "~/.seatrial").expanduser().absolute()


def new_run_id(workflow: str, now: datetime | None = None, suffix: str | None = None) -> str:
    """Return a run id that sorts by time, such as `support_desk-20261122-183000-1f3a`."""
    moment = now or datetime.now(UTC)
    return f"{workflow}-{moment:%Y%m%d-%H%M%S}-{suffix or secrets.token_hex(2)}"


class _Below:
    """A path below the run folder."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __get__(self, folder: RunFolder, _owner: type[RunFolder]) -> Path:
        return folder.root / self._path


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """The files of one run. Example: RunFolder.of(seatrial_home(), run_id).journal"""

    root: Path

    @classmethod
    def of(cls, home: Path, run_id: str) -> RunFolder:
        """Return the folder of a run. Raises BadInputError for an id that could leave `runs/`."""
        # An id comes from a command line and becomes a path: "../other" must not.
        if not RUN_ID.fullmatch(run_id):
            raise BadInputError(
                "run_id", run_id, "use letters, digits, '.', '_' and '-', starting with a letter or digit"
            )
        return cls(root=home / "runs" / run_id)

    @property
    def run_id(self) -> str:
        """The run's id: the folder's name."""
        return self.root.name

    spec = _Below("spec.resolved.json")
    """The spec with every default filled in."""
    journal = _Below("journal.jsonl")
    """Finished stages."""
    bundle = _Below("bundle.json")
    """The manifest of frozen versions."""
    metrics = _Below("metrics.jsonl")
    """Training metrics, one JSON object a line."""
    tripwires = _Below("tripwires.jsonl")
    """What tripped in training, one JSON object a line: step, reason code, metric, value and limit."""
    models = _Below("models")
    """Parent of the frozen model directories."""
    snapshots = _Below("snapshots")
    """Parent of the frozen datasets."""
    evaluations = _Below("eval")
    """Parent of the evaluation reports."""
    serving = _Below("serving")
    """Home of the gateways and engines on which the run's releases are tried."""
    decisions = _Below("release/decisions.jsonl")
    """The release controller's decisions."""
    gateway = _Below("release/gateway.json")
    """The settings that the run's gateway was started with, for `seatrial up` and `serve`."""
    split_history = _Below("serving/split/split_history.jsonl")
    """Every traffic split that was in force in the run's releases; the serving side writes it."""
    report = _Below("report")
    """Parent of the briefs."""
    summary = _Below("summary.json")
    """The run's ending, for machines."""


def list_runs(home: Path) -> list[str]:
    """Return the ids of all runs that have a resolved spec, oldest first."""
    # A folder without a resolved spec was refused before it began; by time, for a run may be given any id.
    found = [path.parent for path in (home / "runs").glob("*/spec.resolved.json")]
    return [path.name for path in sorted(found, key=lambda path: (path.stat().st_mtime, path.name))]


def record_gateway(folder: RunFolder, config: GatewayConfig) -> None:
    """Keep the settings a run's gateway was started with."""
    write_json(folder.gateway, encode(config))


def recorded_gateway(folder: RunFolder) -> GatewayConfig:
    """Return a run's gateway settings. Prices per token, as older runs recorded them, are left aside.

    Raises:
        BadInputError: the run never served.
        TamperedError: the file is not what `record_gateway` wrote.
    """
    # Imported here: what is served pulls in the agent loop, which `status` and `down` do not need.
    from serving.store import GatewayConfig

    if not folder.gateway.exists():
        raise BadInputError("RUN_ID", folder.run_id, "this run served no policy yet; run it up to its release first")
    try:
        return decode(GatewayConfig, json.loads(folder.gateway.read_text(encoding="utf-8")))
    except ValueError as error:
        raise TamperedError(f"{folder.gateway} does not hold a gateway's settings ({error}); resume the run") from error
