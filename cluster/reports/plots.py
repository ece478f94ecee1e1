"""The three small pictures of a brief, in the colour-blind safe palette of Okabe and Ito, told apart by shape too."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from cluster.reports.brief import BriefInput, EvidencePoint
from cluster.reports.locales import Phrasebook

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE: Final = (3.1, 1.8)
_DPI: Final = 170
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#6E7781"
_MAX_INTENTS: Final = 12
_MAX_EVIDENCE: Final = 12.0  # beyond a factor of a million millions a curve says nothing more


def draw_figures(brief: BriefInput, book: Phrasebook) -> dict[str, bytes]:
    """Draw learning curve, success by intent and canary evidence as PNG by name; without rows a picture says so."""
    painters = {"learning": _draw_learning, "intents": _draw_intents, "canary": _draw_canary}
    return {name: _draw_figure(book.say(f"figure.{name}"), draw, brief, book) for name, draw in painters.items()}


def _draw_figure(
    title: str, painter: Callable[[Axes, BriefInput, Phrasebook], bool], brief: BriefInput, book: Phrasebook
) -> bytes:
    # Imported here: only the pictures need Matplotlib.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Never on pyplot's global figure: reports may be made in threads.
    with rc_context({"font.size": 6.5, "axes.spines.top": False, "axes.linewidth": 0.6, "lines.linewidth": 1.2}):
        canvas = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
        axes = canvas.subplots()
        axes.set_title(title, fontsize=7.5, loc="left", fontweight="bold")
        if not painter(axes, brief, book):
            axes.set_axis_off()
            axes.text(0.5, 0.5, book.not_measured, ha="center", va="center", transform=axes.transAxes)
        buffer = io.BytesIO()
        FigureCanvasAgg(canvas).print_png(buffer)
    return buffer.getvalue()


def _draw_learning(axes: Axes, brief: BriefInput, book: Phrasebook) -> bool:
    """Success per PPO step on the left axis, KL to the frozen baseline on the right one."""
    if not brief.learning:
        return False
    steps = [point.step for point in brief.learning]
    success = axes.plot(steps, [point.success for point in brief.learning], color=_BLUE, label=book.say("axis.success"))
    axes.set_xlabel(book.say("axis.step"))
    axes.set_ylim(0, 1)
    _percent_axis(axes, book)
    right = axes.twinx()
    kl = [math.nan if point.kl is None else point.kl for point in brief.learning]
    divergence = right.plot(steps, kl, color=_ORANGE, linestyle="--", label=book.say("axis.kl"))
    right.yaxis.set_major_formatter(lambda value, _: book.decimal(value, 2))
    right.set_ylim(bottom=0)
    axes.legend(handles=[*success, *divergence], loc="lower right", frameon=False)
    return True


def _draw_intents(axes: Axes, brief: BriefInput, book: Phrasebook) -> bool:
    """A line from baseline (ring) to candidate (dot) per intent, the least gain first."""
    if not brief.intents:
        return False
    names, before, after = zip(*brief.intents[-_MAX_INTENTS:], strict=True)
    heights = range(len(names))
    for height in heights:
        axes.plot([before[height], after[height]], [height, height], color=_GREY, linewidth=0.8, zorder=1)
    baseline, candidate = book.say("column.baseline"), book.say("column.candidate")
    axes.scatter(before, heights, s=14, facecolors="white", edgecolors=_ORANGE, label=baseline, zorder=2)
    axes.scatter(after, heights, s=14, color=_BLUE, label=candidate, zorder=3)
    axes.set_yticks(list(heights), [name.replace("_", " ") for name in names], fontsize=5.2)
    axes.set_xlim(-0.03, 1.03)
    _percent_axis(axes, book, horizontal=True)
    axes.legend(loc="lower left", frameon=False, fontsize=5.5)
    return True


def _draw_canary(axes: Axes, brief: BriefInput, book: Phrasebook) -> bool:
    """log10 e-values against time with the limits they must cross; the share in force as steps on the right axis."""
    release = brief.release
    if release is None or not release.points:
        return False
    points = release.points
    minutes = [point.minutes for point in points]
    curves = (
        ("legend.e_fail", [point.log10_e_fail for point in points], _ORANGE, "o"),
        ("legend.e_pass", [point.log10_e_pass for point in points], _BLUE, "s"),
    )
    for label, values, colour, marker in curves:
        clipped = [max(-_MAX_EVIDENCE, min(_MAX_EVIDENCE, value)) for value in values]
        axes.plot(minutes, clipped, color=colour, marker=marker, markersize=2, label=book.say(label))
    limits = (("fail_limit", release.fail_limit, _ORANGE), ("pass_limit", release.pass_limit, _BLUE))
    for name, limit, colour in limits:
        if limit is not None:
            axes.axhline(limit, color=colour, linestyle=":", linewidth=0.9, label=book.say(f"legend.{name}"))
    axes.set_xlabel(book.say("axis.minutes"))
    axes.set_ylabel(book.say("axis.evidence"))
    axes.xaxis.set_major_formatter(lambda value, _: book.decimal(value, 1))
    axes.yaxis.set_major_formatter(lambda value, _: book.decimal(value, 1))
    _draw_share(axes, [point for point in points if point.share is not None], book)
    axes.legend(loc="upper left", fontsize=5, framealpha=0.85, edgecolor="none").set_zorder(5)
    return True


def _draw_share(axes: Axes, points: Sequence[EvidencePoint], book: Phrasebook) -> None:
    if not points:
        return
    right = axes.twinx()
    right.set_zorder(axes.get_zorder() - 1)  # behind the curves and their legend
    axes.patch.set_visible(False)
    shares = [point.share or 0.0 for point in points]
    right.step([point.minutes for point in points], shares, where="post", color=_GREEN, linewidth=0.9, alpha=0.8)
    right.set_ylim(0, 1)
    right.set_ylabel(book.say("axis.share"), color=_GREEN)
    right.yaxis.set_major_formatter(lambda value, _: book.percent(value, 0))


def _percent_axis(axes: Axes, book: Phrasebook, *, horizontal: bool = False) -> None:
    axis = axes.xaxis if horizontal else axes.yaxis
    axis.set_major_formatter(lambda value, _: book.percent(value, 0))
