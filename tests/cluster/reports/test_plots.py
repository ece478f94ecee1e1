"""The pictures: what they draw, in whose language, and in colours that everyone can tell apart."""

from __future__ import annotations

import struct
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as Canvas

from cluster.reports import plots
from cluster.reports.brief import BriefInput, collect_brief_input
from cluster.reports.locales import Phrasebook
from tests.cluster.reports.run_folders import write_run


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> BriefInput:
    run, ledger = write_run(tmp_path_factory.mktemp("home"))
    return collect_brief_input(run, ledger=ledger)


@pytest.fixture
def axes() -> Axes:
    return Canvas(figsize=(3, 2)).subplots()


def ticks(axes: Axes, which: str = "y") -> list[str]:
    axes.figure.canvas.draw()
    axis = axes.yaxis if which == "y" else axes.xaxis
    return [label.get_text() for label in axis.get_ticklabels()]


def test_the_learning_curve_is_the_rows(brief: BriefInput, axes: Axes):
    assert plots._draw_learning(axes, brief, Phrasebook("en-US"))
    (success,) = axes.get_lines()
    assert list(success.get_xdata()) == [point.step for point in brief.learning]
    assert list(success.get_ydata()) == [point.success for point in brief.learning]
    (right,) = [other for other in axes.figure.axes if other is not axes]
    (kl,) = right.get_lines()
    assert list(kl.get_ydata()) == [point.kl for point in brief.learning]
    assert kl.get_linestyle() != success.get_linestyle(), "told apart without colour"


def test_intents_are_pairs_of_baseline_and_candidate(brief: BriefInput, axes: Axes):
    assert plots._draw_intents(axes, brief, Phrasebook("en-US"))
    baseline, candidate = axes.collections
    assert [x for x, _ in baseline.get_offsets()] == [before for _, before, _ in brief.intents]
    assert [x for x, _ in candidate.get_offsets()] == [after for _, _, after in brief.intents]
    assert ticks(axes)[0] == brief.intents[0][0].replace("_", " ")


def test_many_intents_keep_the_picture_readable(brief: BriefInput, axes: Axes):
    assert brief.report is not None
    before, after = (dict(policy) for policy in (brief.report.baseline, brief.report.candidate))
    before["capability"] = replace(before["capability"], success_by_intent={f"intent_{i}": 0.2 for i in range(40)})
    gains = {f"intent_{i}": 0.2 + i / 100 for i in range(40)}
    after["capability"] = replace(after["capability"], success_by_intent=gains)
    many = replace(brief, report=replace(brief.report, baseline=before, candidate=after))
    assert plots._draw_intents(axes, many, Phrasebook("fr"))
    assert len(ticks(axes)) == 12


def test_the_canary_shows_both_hypotheses_limits_and_share(brief: BriefInput, axes: Axes):
    canary = brief.release
    assert canary is not None
    assert plots._draw_canary(axes, brief, Phrasebook("en-US"))
    worse, not_worse, fail_limit, pass_limit = axes.get_lines()
    assert list(worse.get_ydata()) == pytest.approx([point.log10_e_fail for point in canary.points])
    assert list(not_worse.get_ydata()) == pytest.approx([point.log10_e_pass for point in canary.points])
    assert set(fail_limit.get_ydata()) == {canary.fail_limit}
    assert set(pass_limit.get_ydata()) == {canary.pass_limit}
    assert worse.get_marker() != not_worse.get_marker(), "told apart without colour"
    (right,) = [other for other in axes.figure.axes if other is not axes]
    (share,) = right.get_lines()
    assert list(share.get_ydata()) == [point.share for point in canary.points]


def test_extreme_evidence_is_clipped_to_the_picture(brief: BriefInput, axes: Axes):
    assert brief.release is not None
    points = tuple(replace(point, log10_e_pass=float("inf")) for point in brief.release.points)
    extreme = replace(brief, release=replace(brief.release, points=points))
    assert plots._draw_canary(axes, extreme, Phrasebook("en-US"))
    assert set(axes.get_lines()[1].get_ydata()) == {12.0}


@pytest.mark.parametrize(("locale", "shown"), [("en-US", "20%"), ("fr", "20\u00a0%")])
def test_axes_write_numbers_as_the_market_does(brief: BriefInput, axes: Axes, locale: str, shown: str):
    plots._draw_learning(axes, brief, Phrasebook(locale))  # type: ignore[arg-type]
    assert shown in ticks(axes)


@pytest.mark.parametrize("painter", [plots._draw_learning, plots._draw_intents, plots._draw_canary])
def test_nothing_measured_draws_nothing(painter, axes: Axes):
    empty = collect_brief_input(Path("/nonexistent/run"))
    assert not painter(axes, empty, Phrasebook("en-US"))
    assert not axes.get_lines()


def test_pictures_are_small_and_sharp_enough_for_print(brief: BriefInput):
    for png in plots.draw_figures(brief, Phrasebook("fr")).values():
        width, height = struct.unpack(">II", png[16:24])
        assert 450 <= width <= 800
        assert 250 <= height <= 500
        assert len(png) < 60_000


def test_drawing_leaves_the_global_state_of_matplotlib_alone(brief: BriefInput):
    import matplotlib
    from matplotlib import pyplot

    before, open_figures = matplotlib.rcParams["font.size"], pyplot.get_fignums()
    plots.draw_figures(brief, Phrasebook("en-GB"))
    assert matplotlib.rcParams["font.size"] == before
    assert pyplot.get_fignums() == open_figures


def luminance(colour: str) -> float:
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), channels, strict=True))


def seen_without_red_cones(colour: str) -> tuple[float, float]:
    """A coarse protanope: red and green collapse into one channel beside blue."""
    red, green, blue = to_rgb(colour)
    return 0.11 * red + 0.89 * green, blue


def test_colours_can_be_told_apart_by_everyone():
    colours = (plots._BLUE, plots._ORANGE, plots._GREEN)
    for one, other in combinations(colours, 2):
        (a, b), (c, d) = seen_without_red_cones(one), seen_without_red_cones(other)
        assert abs(a - c) + abs(b - d) > 0.2, f"{one} and {other}"


def test_colours_stand_out_from_white_paper():
    for colour in (plots._BLUE, plots._ORANGE, plots._GREEN, plots._GREY):
        contrast = 1.05 / (luminance(colour) + 0.05)
        assert contrast >= 3.0, f"{colour}: {contrast:.1f}"
