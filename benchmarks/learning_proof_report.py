"""Tables and plot of the learning proof, from its results as plain JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Rows = Mapping[str, Mapping[str, Any]]
LAST = 20  # steps at the end of a run that a mean is taken over


def print_report(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print one table per experiment."""
    console = console or Console(width=132)
    for name, rows in results["experiments"].items():
        console.print(_TABLES[name](rows, results))


def proof_table(rows: Rows, results: Mapping[str, Any]) -> Table:
    """Final mean reward of each seed against the optimum."""
    game, budget = results["game"], results["budget"]
    about = f"Optimum {game['optimum']:.3f}, demonstrator {game['demonstrator_reward']:.3f}"
    title = f"{about}; {budget['rollouts']:,} rollouts a run"
    table = _table(title, "recipe", "first step", "final reward by seed", "median", "of optimum", "greedy", "verdict")
    for name, row in rows.items():
        median = statistics.median(row["sampled"])
        share = median / game["optimum"]
        verdict = "reached" if share >= budget["required_share"] else "MISSED"
        greedy = statistics.median(row["greedy"])
        first = f"{row['curves']['success'][0]:.3f}"
        table.add_row(name, first, _numbers(row["sampled"]), f"{median:.3f}", f"{share:.1%}", f"{greedy:.3f}", verdict)
    return table


def kl_table(rows: Rows, results: Mapping[str, Any]) -> Table:
    """Final KL by coefficient, beside that of the best play on the leash."""
    columns = (
        "recipe, coefficient",
        "final KL, nats a rollout",
        "mean",
        "falls",
        "reward",
        "best on leash: KL",
        "reward",
    )
    table = _table("KL to the reference falls with the coefficient", *columns)
    before = {}
    for name, row in rows.items():
        recipe, coefficient = name.split()
        mean = statistics.mean(row["kl"])
        falls = "" if recipe not in before else "yes" if mean < before[recipe] else "NO"
        before[recipe] = mean
        best = results["game"]["leashed"][coefficient]
        exact = (f"{best['kl']:.3f}", f"{best['reward']:.3f}") if recipe == "ppo_kl" else ("-", "-")
        reward = f"{statistics.mean(row['sampled']):.3f}"
        table.add_row(name, _numbers(row["kl"]), f"{mean:.3f}", falls, reward, *exact)
    return table


def hack_table(rows: Rows, results: Mapping[str, Any]) -> Table:
    """What stopped each run, when, and what the policy was worth then."""
    columns = ("run", "stopped", "reason", "at step", "largest divergence", "reward paid", "verified success")
    table = _table(f"Reward hacking; best honest success {results['game']['optimum']:.3f}", *columns)
    for name, row in rows.items():
        stopped = [steps for steps, text in zip(row["steps"], row["stopped"], strict=True) if text]
        table.add_row(
            name,
            f"{len(stopped)} of {len(row['steps'])}",
            ", ".join(_reasons(row)) or "-",
            " ".join(map(str, stopped)) or "-",
            f"{max(row['divergence']):.2f}",
            f"{statistics.mean(row['paid']):.3f}",
            f"{statistics.mean(row['sampled']):.3f}",
        )
    return table


def ablation_table(rows: Rows, results: Mapping[str, Any]) -> Table:
    """Reward, gradient norm and engine-learner gap with and without sinks and correction."""
    columns = ("learner", "final reward by seed", "mean", "KL", "steps", "grad norm", "|dlogp| first", "last 20")
    table = _table(f"Attention sinks and correction (grpo); optimum {results['game']['optimum']:.3f}", *columns)
    for name, row in rows.items():
        curves = row["curves"]
        table.add_row(
            name,
            _numbers(row["sampled"]),
            f"{statistics.mean(row['sampled']):.3f}",
            f"{statistics.mean(row['kl']):.2f}",
            " ".join([*map(str, sorted(set(row["steps"]))), *_reasons(row)]),
            f"{statistics.mean(curves['grad_norm'][-LAST:]):.3f}",
            f"{curves['mismatch_abs_mean'][0]:.2g}",
            f"{statistics.mean(curves['mismatch_abs_mean'][-LAST:]):.2g}",
        )
    return table


_TABLES: Mapping[str, Callable[[Rows, Mapping[str, Any]], Table]] = {
    "proof": proof_table,
    "kl": kl_table,
    "hack": hack_table,
    "ablation": ablation_table,
}


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _reasons(row: Mapping[str, Any]) -> list[str]:
    return sorted({text.partition(":")[0] for text in row["stopped"] if text})


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def save_plot(path: Path, results: Mapping[str, Any]) -> None:
    """Draw the ablation's curves, means over the seeds, as a small PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"success": "verified success", "grad_norm": "gradient norm", "mismatch_abs_mean": "mean |dlogp|, nats"}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 3.4))
    for axis, (metric, label) in zip(axes, panels.items(), strict=True):
        for name, row in results["experiments"]["ablation"].items():
            if "tripwires" not in name:
                style = "--" if "no correction" in name else "-"  # two curves lie on each other where nothing differs
                axis.plot(row["curves"][metric], style, label=name, linewidth=1.2)
        axis.set_xlabel("step")
        axis.set_title(label, fontsize=10)
        axis.set_yscale("log" if metric == "grad_norm" else "linear")
    axes[0].axhline(results["game"]["optimum"], color="grey", linestyle=":", linewidth=1.0)
    axes[0].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
