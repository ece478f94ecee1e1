"""Numbers of a benchmark as JSON, with date, commit and hardware."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def write_results(path: Path, hardware: str, results: Mapping[str, Any]) -> None:
    """Write results as JSON; a commit that the working tree has moved away from is marked `-dirty`."""
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _git("describe", "--always", "--dirty", "--abbrev=40"),
        "hardware": f"{platform.machine()}, {hardware}",
        "torch": torch.__version__,
    }
    path.write_text(json.dumps({**about, **results}, indent=1) + "\n", encoding="utf8")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()
