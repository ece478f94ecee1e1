"""Kill -9 a whole run in SFT, in PPO and in its canary, resume it each time, and check that nothing was lost or redone.

SEATRIAL_HOME=/tmp/drill python benchmarks/kill_and_resume.py [--seed 1]   # as long as a demo; exit code 1 on a finding

`--asleep-s` waits that long before it resumes the killed canary.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SFT_STEPS, PPO_STEPS, CANARY_ROWS = 200, 8, 300
BOUND_S = 3600.0


@dataclass
class Drill:
    """One run, looked at from outside through its files."""

    folder: Path

    def finished(self) -> dict[str, Any]:
        """Return output and artifact hashes of every finished stage."""
        rows = [json.loads(line) for line in _lines(self.folder / "journal.jsonl")]
        return {row["stage"]: (row["output"], row["artifacts"]) for row in rows}

    def steps(self, stage: str) -> int:
        """Return the newest step a training stage has logged."""
        rows = [json.loads(line) for line in _lines(self.folder / "metrics.jsonl")]
        return max((row["step"] for row in rows if row["stage"] == stage), default=0)

    def ledger(self) -> tuple[int, int]:
        """Return (rows, distinct requests) of the run ledger."""
        try:
            with sqlite3.connect(f"file:{self.folder}/serving/ledger.sqlite?mode=ro", uri=True) as ledger:
                return ledger.execute("SELECT COUNT(*), COUNT(DISTINCT request_id) FROM runs").fetchone()
        except sqlite3.Error:
            return 0, 0


def _lines(path: Path) -> list[str]:
    """Return the whole lines of a file; one that is being written is left out."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf8").splitlines(keepends=True) if line.endswith("\n")]


def seatrial(*words: str) -> subprocess.Popen[bytes]:
    """Start the command line of this environment."""
    return subprocess.Popen([str(Path(sys.executable).with_name("seatrial")), *words])


def kill_when(process: subprocess.Popen[bytes], is_time: Callable[[], bool], where: str) -> None:
    """Kill -9 the run's driver at the right moment. Raises SystemExit when the run ends or hangs before it."""
    deadline = time.monotonic() + BOUND_S
    while not is_time():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"the run ended or hung before {where}")
        time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    """Run the drill and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--run-id", default="kill-drill")
    parser.add_argument("--asleep-s", type=float, default=0.0)
    arguments = parser.parse_args()
    home = Path(os.environ.get("SEATRIAL_HOME", "~/.seatrial")).expanduser()
    drill, before = Drill(home / "runs" / arguments.run_id), dict[str, Any]()
    moments: dict[str, Callable[[], bool]] = {
        "sft": lambda: drill.steps("sft") >= SFT_STEPS,
        "ppo": lambda: drill.steps("ppo") >= PPO_STEPS,
        "canary": lambda: drill.ledger()[0] >= CANARY_ROWS,
    }
    process = seatrial("run", "support_desk", "--set", f"seed={arguments.seed}", "--run-id", arguments.run_id)
    findings = []
    for where, is_time in moments.items():
        kill_when(process, is_time, where)
        findings += [f"{stage} changed after {where}" for stage in before if drill.finished()[stage] != before[stage]]
        before = drill.finished()
        print(f"killed in {where}; finished: {', '.join(before)}", flush=True)  # noqa: T201
        time.sleep(arguments.asleep_s if where == "canary" else 0.0)
        process = seatrial("run", "--resume", arguments.run_id)
    code = process.wait(timeout=BOUND_S)
    findings += [f"{stage} changed at the end" for stage in before if drill.finished()[stage] != before[stage]]
    releases = [json.loads((drill.folder / name / "result.json").read_text()) for name in ("release", "release_drill")]
    rows, requests = drill.ledger()
    if not rows == requests == sum(release["requests"] for release in releases):
        findings.append(f"{rows} ledger rows, {requests} distinct requests, {[r['requests'] for r in releases]} sent")
    findings += [f"{r['ledger_rows']} rows in {r['release_id']}" for r in releases if r["ledger_rows"] != r["requests"]]
    findings += [f"{r['failed_requests']} failed in {r['release_id']}" for r in releases if r["failed_requests"]]
    print(f"run ended with exit code {code}; {rows} rows, {requests} requests; findings: {findings or 'none'}")  # noqa: T201
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
