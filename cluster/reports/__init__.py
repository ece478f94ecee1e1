"""Reports for humans: the Reliability Brief, one page in each locale, every number out of recorded rows."""

from __future__ import annotations

from pathlib import Path

from cluster.reports.render import write_brief
from cluster.reports.rows import collect_brief_input


def write_briefs(run_dir: Path, *, ledger: Path | None = None) -> tuple[Path, ...]:
    """Write a run's briefs in every locale under `report/` and return their paths.

    Raises:
        StageRefusedError: A brief would be empty in a section, too long, or hold a number that no row holds.
    """
    written = write_brief(collect_brief_input(run_dir, ledger=ledger), run_dir / "report")
    return tuple(path for pair in written.values() for path in pair)
