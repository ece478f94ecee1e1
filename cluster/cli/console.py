"""A run for people: a bar with a live line of metrics while it goes, tables when it is over.

On a terminal the running stage redraws itself; in a log (CI, a Ray job) the same facts come as plain lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cluster.records import ReleaseOutcome, RunSummary
from rl_actors.contracts import SuiteResult

LINE_EVERY_S: Final = 2.0

# Measures of a learning curve come first, then where the seconds went; other metrics only fill what is left.
STEP_METRICS: Final[Mapping[str, str]] = {
    "reward": "reward",
    "success": "success",
    "kl_to_reference": "KL",
    "kl": "KL",
    "loss": "loss",
    "tokens_per_s": "tokens/s",
    "generate_s": "generate",
    "score_s": "score",
    "train_s": "train",
    "sync_s": "sync",
}
MAX_OTHER_METRICS: Final = 4
PERCENTS: Final = ("success", "share")
OUTCOME_STYLES: Final = {"promoted": "green", "rolled_back": "yellow", "failed_back": "yellow", "halted": "red"}


def metrics_line(metrics: Mapping[str, float], separator: str = "  ") -> str:
    """Return a step's metrics, the known ones first; `separator` stands before the seconds.

    Example: "reward 0.61  success 58 %  KL 0.031  tokens/s 3,410  generate 2.1 s  train 1.4 s"
    """
    known = [name for name in STEP_METRICS if name in metrics]
    others = [name for name in metrics if name not in STEP_METRICS][: 0 if known else MAX_OTHER_METRICS]
    shown = {name: f"{STEP_METRICS.get(name, spoken(name))} {_amount(name, metrics[name])}" for name in known + others}
    curve = "  ".join(text for name, text in shown.items() if not _is_seconds(name))
    seconds = "  ".join(text for name, text in shown.items() if _is_seconds(name))
    return separator.join(part for part in (curve, seconds) if part)


def _is_seconds(name: str) -> bool:
    return name.endswith("_s") and not name.endswith("_per_s")


def _amount(name: str, value: float) -> str:
    if name in PERCENTS or name.endswith(("_rate", "_fraction")):
        return percent(value)
    if name.endswith("_per_s"):
        return f"{value:,.0f}"
    return f"{value:.1f} s" if _is_seconds(name) else f"{value:.3g}"


def percent(fraction: float) -> str:
    """Return a fraction as a percentage, with one decimal below 10 %."""
    return f"{100 * fraction:.1f} %" if abs(fraction) < 0.0995 else f"{100 * fraction:.0f} %"


def duration(seconds: float) -> str:
    """Return seconds as a human says them: `0.3 s`, `42 s`, `3 min 05 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    # Whole seconds are rounded before they are split, or 119.6 would become "1 min 60 s".
    return f"{int(seconds + 0.5) // 60} min {int(seconds + 0.5) % 60:02d} s"


class RichWatch:
    """Watches on a terminal. A context manager: the terminal is given back however the run ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            expand=True,
        )
        self._below = Text("", style="cyan", overflow="fold")
        # Transient: what stays on the screen are the lines of finished stages.
        self._live = Live(Group(self._progress, self._below), console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> RichWatch:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def stage_started(self, name: str, detail: str) -> None:
        """Show a bar for the stage; it pulses until the first progress."""
        self._clear()
        self._progress.add_task(f"{name}: {detail}" if detail else name, total=None)

    def stage_finished(self, name: str, line: str, seconds: float) -> None:
        """Replace the bar by the stage's line of result."""
        self._clear()
        self._console.print(stage_text(name, line, seconds))

    def progress(self, name: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Move the bar and replace the line of metrics."""
        if not self._progress.task_ids:
            self.stage_started(name, "")
        self._progress.update(self._progress.task_ids[-1], completed=done, total=total)
        # Two lines: the seconds would wrap in the middle of a number on 80 columns.
        self._below.plain = "  " + metrics_line(metrics, separator="\n  ") if metrics else ""

    def note(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(Text(f"  {line}", style="dim"))

    def _clear(self) -> None:
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._below.plain = ""


class PlainWatch:
    """Watches into a log: one line per event, progress at most every `LINE_EVERY_S` seconds, the last step always."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._next_line_at = -float("inf")

    def __enter__(self) -> PlainWatch:
        return self

    def __exit__(self, *_: object) -> None:
        pass  # nothing was taken from the terminal

    def stage_started(self, name: str, detail: str) -> None:
        """Print what begins."""
        self._next_line_at = -float("inf")  # a stage's first step comes at once
        self._line(f"... {name}: {detail}" if detail else f"... {name}")

    def stage_finished(self, name: str, line: str, seconds: float) -> None:
        """Print the result."""
        self._line(stage_text(name, line, seconds).plain)

    def progress(self, name: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Print the step unless the last line is too young."""
        # The last step always: a log must not end before the stage did.
        if self._clock() < self._next_line_at and done < total:
            return
        self._next_line_at = self._clock() + LINE_EVERY_S
        self._line(f"    {name} {done}/{total}  {metrics_line(metrics)}".rstrip())

    def note(self, line: str) -> None:
        """Print it."""
        self._line(f"    {line}")

    def _line(self, line: str) -> None:
        # A log is read by grep: never wrapped, never coloured, flushed at once.
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()


def watch_for(console: Console) -> RichWatch | PlainWatch:
    """Return the watch that suits where the console writes to."""
    return RichWatch(console) if console.is_terminal and not console.is_dumb_terminal else PlainWatch(console)


def stage_text(name: str, line: str, seconds: float) -> Text:
    """Return a finished stage's line. Zero seconds: an earlier process had finished it."""
    took = duration(seconds) if seconds > 0 else "kept"
    return Text.assemble(("ok ", "green"), (f"{name:<13}", "bold"), f" {took:>11}  ", line)


# --- the ending -------------------------------------------------------------------------------------------------------
def render_summary(console: Console, summary: RunSummary) -> None:
    """Print what was trained, what was tested, what was decided and why, and where to look next."""
    console.print()
    for table in (_trained(summary), _tested(summary.offline), _decided(summary.releases)):
        if table.row_count:
            console.print(table)
    for line in (*_reasons(summary.releases), _ending(summary)):
        console.print(line)
    for label, value in _next_places(summary):
        # Not in a table: a path or command must survive being copied from a narrow terminal.
        console.print(Text.assemble((f"  {label:<16}", "bold"), value), soft_wrap=True)


def _table(title: str, columns: Mapping[str, str]) -> Table:
    """Columns by name: `<` text, `>` number."""
    table = Table(title=title, title_justify="left", title_style="bold", expand=False)
    for name, side in columns.items():
        table.add_column(name, justify="right" if side == ">" else "left", overflow="fold")
    return table


def _trained(summary: RunSummary) -> Table:
    table = _table("What was trained", {"version": "<", "sha256": "<", "": "<"})
    for line in summary.trained:
        mark = "now stable" if line.name == summary.stable_policy else ""
        table.add_row(Text(line.name), line.sha256[:12], mark)
    return table


def _tested(suites: Sequence[tuple[SuiteResult, SuiteResult]]) -> Table:
    columns = {"suite": "<", "baseline": ">", "candidate": ">", "gain": ">", "violations": ">"}
    table = _table("What was tested: success and violations", columns)
    for baseline, candidate in suites:
        gain = candidate.success.mean - baseline.success.mean
        table.add_row(
            baseline.suite,
            f"{100 * baseline.success.mean:.1f} %",
            f"{100 * candidate.success.mean:.1f} %",
            Text(f"{100 * gain:+.1f} pt", style="green" if gain > 0 else "red" if gain < 0 else ""),
            f"{baseline.violations} -> {candidate.violations}",
        )
    return table


def _decided(releases: Sequence[ReleaseOutcome]) -> Table:
    columns = {"candidate": "<", "decision": "<", "canary runs": ">", "share": ">", "recovery": ">"}
    table = _table("What was decided", columns)
    for line in releases:
        recovery = duration(line.time_to_recovery_s) if line.time_to_recovery_s > 0 else "-"
        outcome = Text(spoken(line.outcome), style=OUTCOME_STYLES[line.outcome])
        runs = f"{line.canary_requests:,}"
        table.add_row(Text(line.candidate), outcome, runs, percent(line.observed_share), recovery)
    return table


def _reasons(releases: Sequence[ReleaseOutcome]) -> list[Text]:
    """Below the table, not in it: a reason is a sentence, and a narrow column breaks it into words."""
    return [Text(f"  {line.candidate} {spoken(line.outcome)}: {line.reason}") for line in releases]


def spoken(name: str) -> str:
    """Return a name as people write it, with spaces."""
    return name.replace("_", " ")


def _ending(summary: RunSummary) -> Text:
    ran = [stage for stage in summary.stages if not stage.resumed]
    kept = len(summary.stages) - len(ran)
    slowest = max(ran, key=lambda stage: stage.seconds, default=None)
    verdict = ("done", "bold green") if summary.exit_code == 0 else ("refused", "bold red")
    parts = [f" in {duration(sum(stage.seconds for stage in ran))}"]
    parts += [f"longest: {slowest.name}, {duration(slowest.seconds)}"] if slowest else []
    parts += [f"{kept} stage{'s' * (kept > 1)} kept from before"] if kept else []
    parts += [f"stable policy: {summary.stable_policy}"] if summary.stable_policy else []
    return Text.assemble(verdict, "; ".join(parts))


def _next_places(summary: RunSummary) -> list[tuple[str, str]]:
    """Where to look next; what the run did not reach is left out."""
    paths = summary.paths
    places = [
        ("run folder", paths.folder),
        ("brief", paths.brief_html or paths.brief_md),
        ("run ledger", paths.ledger),
        ("bundle", summary.bundle_id[:12]),
        ("MLflow", f"seatrial ui   ({paths.mlflow_uri})" if paths.mlflow_uri else ""),
        ("endpoint", summary.endpoint),
        ("serve it", "seatrial serve" if summary.stable_policy and not summary.endpoint else ""),
    ]
    return [(label, value) for label, value in places if value]
