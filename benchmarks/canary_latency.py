"""How much the latencies of two arms depend on their load, and on each other: a canary of one policy against itself.

python benchmarks/canary_latency.py RUN_FOLDER [--shares 0.05 0.5] [--concurrency 4 8] [--tickets 700]
                                    [--candidate sft] [--out benchmarks/results/canary_latency.json]

RUN_FOLDER is a finished run of this home (`~/.seatrial/runs/RUN_ID`); it is only read. Its SFT policy (or the one that
`--candidate` names) answers in both arms, each behind an engine of its own, on the real gateway with Ray Serve, under
the run's own traffic driver. So every difference between the arms is the measurement's fault: at a small share, that
an engine with less to do answers faster; at one half, chance. A latency gate must survive both.

For each share and concurrency: tickets per second, p95 of both arms and their ratio, the ratio of milliseconds per
sampled token, tickets open in each arm on average, and in how many windows of `--draw` consecutive candidate tickets
p95 would have differed by 15 % or more from that of the stable tickets beside them.
"""

from __future__ import annotations

import argparse
import math
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from record import write_results
from rich.console import Console
from rich.table import Table

from cluster.pipeline import gateway_config, platform_config, read_tasks
from cluster.plan import place
from cluster.ray_cluster import connected
from cluster.records import Journal, RunFolder
from cluster.simulation import TicketBook, TrafficConfig, TrafficDriver, run_traffic
from cluster.spec import WorkflowSpec, load_spec
from cluster.workflows import find_workflow
from rl_actors.contracts import DataSnapshot, PolicyVersion, Task
from rl_actors.durable import decode
from serving.gates import quantile
from serving.platform import ServePlatform
from serving.split import SplitStore
from serving.store import ServedPolicy

LIMIT = 1.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """One finished run of the ledger; times in seconds since the epoch."""

    arm: str
    duration_ms: float
    started_at: float
    completed_at: float
    tokens_out: int


def main() -> None:
    """Measure every combination on one platform, print the table, write the figures."""
    options = parse_arguments()
    spec = load_spec(options.run / "spec.resolved.json")
    with tempfile.TemporaryDirectory() as scratch, connected("", place(spec)):
        os.environ["SEATRIAL_HOME"] = scratch
        site = Site(options.run, spec, Path(scratch), options.candidate)
        try:
            rows = [
                site.measure(share, concurrency, options)
                for _ in range(options.rounds)
                for concurrency in options.concurrency
                for share in options.shares
            ]
        finally:
            site.platform.shutdown()
    show(rows)
    if options.out:
        write_results(options.out, f"{os.cpu_count()} cores", {"draw": options.draw, "rows": rows})


class Site:
    """Gateway and two engines with the same weights, and the live tickets of a finished run."""

    def __init__(self, source: Path, spec: WorkflowSpec, home: Path, candidate: str) -> None:
        """Start both arms and wait until they answer."""
        outputs = {record.stage: record.output for record in Journal(source / "journal.jsonl").records}
        snapshot = decode(DataSnapshot, outputs["snapshot"])
        stable, other = (decode(PolicyVersion, outputs[name]) for name in ("sft", candidate))
        folder = RunFolder(root=home / "runs" / "canary-latency")
        folder.root.mkdir(parents=True)
        self._folder, self._workflow = folder, find_workflow(spec.workflow.name)
        self.config = replace(gateway_config(spec, folder), critic_application="", stale_after_s=3600.0)
        live = read_tasks(snapshot, "live")
        Path(self.config.root).mkdir()
        self._workflow.build_live_database(live, self.config.live_world["database"])
        self._tickets: Iterator[Task] = iter(live)
        self.platform = ServePlatform(self.config, platform_config(spec))
        self._splits = SplitStore(self.config.files.split)
        self.platform.start(served("stable", stable), served("candidate", other))
        self._rounds = 0
        self._send(1, 16)  # warm up

    def measure(self, share: float, concurrency: int, options: argparse.Namespace) -> dict[str, Any]:
        """Send tickets at one share and concurrency."""
        record = self._splits.read()
        assert record is not None
        epoch = record.epoch + 1
        split = replace(
            record, epoch=epoch, candidate="candidate", share=share, salt=f"s{epoch}", updated_at=time.time()
        )
        self._splits.compare_and_set(split)
        time.sleep(1.0)
        seconds = self._send(concurrency, options.tickets)
        tickets = read_tickets(self.config.files.ledger, epoch)
        row = summary(tickets, options.draw)
        return {"concurrency": concurrency, "share": share, "tickets_per_s": len(tickets) / seconds, **row}

    def _send(self, concurrency: int, count: int) -> float:
        self._rounds += 1
        config = TrafficConfig(
            url=self.platform.url, live_world=self.config.live_world, run_name=f"r{self._rounds}",
            concurrency=concurrency,
        )  # fmt: skip
        book = TicketBook(self._folder.root / f"tickets-{self._rounds}.jsonl")
        driver = TrafficDriver(self._workflow, config, book)
        return run_traffic(driver, list(islice(self._tickets, count))).seconds


def served(version: str, policy: PolicyVersion) -> ServedPolicy:
    """Return a policy under a version name of its own."""
    stamp = policy.sha256[:16]
    return ServedPolicy(
        version=version, path=policy.path, model_version=stamp, reward_model_version="none", bundle_id=f"b-{version}"
    )


def read_tickets(ledger: Path, epoch: int) -> list[Ticket]:
    """Return the finished runs of one split epoch."""
    sql = """SELECT release_channel, duration_ms, started_at, completed_at, tokens_out FROM runs
        WHERE split_epoch = ? AND status <> 'running' ORDER BY started_at"""
    with closing(sqlite3.connect(ledger)) as database:
        return [
            Ticket(arm=a, duration_ms=d, started_at=s, completed_at=c, tokens_out=t)
            for a, d, s, c, t in database.execute(sql, (epoch,))
        ]


def summary(tickets: Sequence[Ticket], draw: int) -> dict[str, Any]:
    """Return p95, load and speed of both arms, and how often chance alone would cross the limit."""
    arms = {arm: [t for t in tickets if t.arm == arm] for arm in ("general", "canary")}
    span = max(t.completed_at for t in tickets) - min(t.started_at for t in tickets)
    figures: dict[str, Any] = {}
    for arm, mine in arms.items():
        durations = [t.duration_ms for t in mine]
        figures[arm] = {
            "tickets": len(mine),
            "median_ms": statistics.median(durations),
            "p95_ms": quantile(durations, 0.95),
            "ms_per_token": sum(durations) / sum(t.tokens_out for t in mine),
            "mean_open": sum(durations) / 1000.0 / span,
        }
    figures["p95_ratio"] = figures["canary"]["p95_ms"] / figures["general"]["p95_ms"]
    figures["speed_ratio"] = figures["canary"]["ms_per_token"] / figures["general"]["ms_per_token"]
    figures["over_limit"] = over_limit(arms, draw)
    return figures


def over_limit(arms: Mapping[str, Sequence[Ticket]], draw: int) -> float | None:
    """Return the share of windows of `draw` consecutive candidate tickets with a p95 ratio of at least 1.15, or 1/1.15.

    None where no window has half as many stable tickets beside it.
    """
    canary, general = arms["canary"], arms["general"]
    hits = []
    for start in range(0, len(canary) - draw + 1, max(draw // 10, 1)):
        window = canary[start : start + draw]
        beside = [t for t in general if window[0].started_at <= t.started_at <= window[-1].started_at]
        if len(beside) >= draw // 2:
            p95 = [quantile([t.duration_ms for t in arm], 0.95) for arm in (window, beside)]
            hits.append(abs(math.log(p95[0] / p95[1])) >= math.log(LIMIT))
    return sum(hits) / len(hits) if hits else None


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one line for each combination."""
    names = ("open", "share", "tickets/s", "p95 stable", "p95 candidate", "ratio", "ms/token", "open by arm", "> 15 %")
    table = Table(*names)
    for row in rows:
        general, canary = row["general"], row["canary"]
        table.add_row(
            str(row["concurrency"]),
            f"{row['share']:.0%}",
            f"{row['tickets_per_s']:.1f}",
            f"{general['p95_ms']:.0f} ms",
            f"{canary['p95_ms']:.0f} ms",
            f"{row['p95_ratio']:.2f}",
            f"{row['speed_ratio']:.2f}",
            f"{general['mean_open']:.1f} / {canary['mean_open']:.1f}",
            "-" if row["over_limit"] is None else f"{row['over_limit']:.0%}",
        )
    Console(width=max(120, Console().width)).print(table)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.5])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--tickets", type=int, default=700)
    parser.add_argument("--draw", type=int, default=100, help="tickets an arm that the gate looks at")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--candidate", default="sft", help="stage whose policy is the candidate: sft or ppo")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
