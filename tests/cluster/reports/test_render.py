"""The finished page: the same numbers in every locale, all sections, one page, nothing without a row."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.records.bundle import MEMBERS, build_bundle, component_of
from cluster.reports.brief import BriefInput, collect_brief_input
from cluster.reports.locales import LOCALES, LocaleName, Phrasebook, strings_of
from cluster.reports.plots import draw_figures
from cluster.reports.render import (
    PAGE_LINES,
    check_length,
    check_numbers,
    check_sections,
    page_lines,
    render,
    write_brief,
)
from cluster.reports.view import SECTIONS, Section, view_of
from rl_actors.contracts.errors import StageRefusedError
from serving.contracts.gates import GateResult
from tests.cluster.reports.run_folders import write_run

EACH = pytest.mark.parametrize("locale", LOCALES)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> BriefInput:
    run, ledger = write_run(tmp_path_factory.mktemp("home"))
    return collect_brief_input(run, ledger=ledger)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> BriefInput:
    return collect_brief_input(tmp_path_factory.mktemp("empty-run"))


@pytest.fixture(scope="module")
def written(brief: BriefInput, tmp_path_factory: pytest.TempPathFactory) -> dict[LocaleName, tuple[Path, Path]]:
    return written_to(tmp_path_factory.mktemp("report"), brief)


def written_to(directory: Path, brief: BriefInput) -> dict[LocaleName, tuple[Path, Path]]:
    write_brief(brief, directory)
    return {name: (directory / f"brief.{name}.md", directory / f"brief.{name}.html") for name in LOCALES}


def crowded(brief: BriefInput) -> BriefInput:
    """As much as a page must hold: every part changed, long names and reasons, more suites and releases than shown."""
    assert brief.report is not None
    old, new = (build_bundle({m: component_of(f"{age}-{m * 4}", age) for m in MEMBERS}) for age in ("old", "new"))
    bad = replace(brief.other_releases[0], reason="a reason " * 60, candidate="ppo-" + "0123456789abcdef" * 4)
    before, after = brief.report.baseline, brief.report.candidate
    more = [f"suite_{letter}" for letter in "abc"]
    report = replace(
        brief.report,
        baseline={**before, **dict.fromkeys(more, before["capability"])},
        candidate={**after, **dict.fromkeys(more, after["capability"])},
    )
    answers = {"workload": "WORK " * 60, "constraints": "MUST " * 60, "rollback_path": "BACK " * 60}
    crowd = replace(brief, bundle=new, previous=old, report=report, tickets_per_s=7.5, **answers)
    # The gates of the page are the full ones; the bad release brings its long reason.
    return replace(crowd, release=replace(bad, gates=brief.release.gates), other_releases=(bad,) * 5)  # type: ignore[union-attr]


def page(brief: BriefInput, locale: LocaleName, suffix: str = "md") -> str:
    book = Phrasebook(locale)
    return render(view_of(brief, book), {}, book, suffix)


def values_of(text: str, locale: LocaleName) -> list[float]:
    """Every number of a page as a value, whatever marks its market uses."""
    thousands, decimal = ("\u202f", ",") if locale == "fr" else (",", ".")
    without_names = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    found = re.findall(r"\d(?:[\d.,\u202f]*\d)?", without_names)
    return sorted(float(number.replace(thousands, "").replace(decimal, ".")) for number in found)


# --- golden numbers ---------------------------------------------------------------------------------------------------


def test_all_locales_show_the_same_numbers(written: dict[LocaleName, tuple[Path, Path]]):
    numbers = {locale: values_of(paths[0].read_text(), locale) for locale, paths in written.items()}
    assert len(numbers["fr"]) > 100
    assert numbers["en-US"] == numbers["en-GB"] == numbers["fr"]


def test_markdown_and_html_show_the_same_numbers(brief: BriefInput):
    for locale in LOCALES:
        html = page(brief, locale, "html")
        visible = re.sub(r"<style.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL)
        assert values_of(visible, locale) == values_of(page(brief, locale), locale)


@pytest.mark.parametrize(
    ("locale", "parts"),
    [
        (
            "en-US",
            ("89.2%", "+18.0\u00a0points", "November 22, 2026", "0.967", "0.61\u00a0s", "Promoted", "1,842 → 1,499"),
        ),
        ("en-GB", ("89.2%", "22 November 2026", "0.42\u00a0s", "frozen baseline")),
        ("fr", ("89,2\u00a0%", "22 novembre 2026", "0,967", "0,61\u00a0s", "Promu", "1\u202f842 → 1\u202f499")),
    ],
)
def test_golden_values(brief: BriefInput, locale: LocaleName, parts: tuple[str, ...]):
    text = page(brief, locale)
    assert [part for part in parts if part not in text] == []


@EACH
def test_the_page_is_the_golden_page(brief: BriefInput, locale: LocaleName):
    """To accept a change of wording or layout, look at the difference and run once with SEATRIAL_UPDATE_GOLDEN=1."""
    path = Path(__file__).parent / "golden" / f"brief.{locale}.md"
    if os.environ.get("SEATRIAL_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(page(brief, locale), encoding="utf-8")
    assert page(brief, locale) == path.read_text(encoding="utf-8")


@EACH
def test_a_changed_row_changes_the_page(brief: BriefInput, locale: LocaleName):
    assert brief.release is not None
    slower = replace(brief, other_releases=(replace(brief.other_releases[0], time_to_recovery_s=123.4),))
    assert "123" in page(slower, locale)
    assert "123" not in page(brief, locale)


# --- nothing without a row --------------------------------------------------------------------------------------------


@EACH
def test_every_number_of_the_page_has_a_row(brief: BriefInput, locale: LocaleName):
    book = Phrasebook(locale)
    texts = {suffix: render(view_of(brief, book), draw_figures(brief, book), book, suffix) for suffix in ("md", "html")}
    check_numbers(texts, book)


@pytest.mark.parametrize("suffix", ["md", "html"])
def test_a_number_that_a_template_makes_up_is_refused(brief: BriefInput, suffix: str):
    book = Phrasebook("en-US")
    view = view_of(brief, book)
    invented = replace(view, outcome=f"{view.outcome}, 99.9% safe")
    with pytest.raises(StageRefusedError, match=r"\['99\.9'\] come from no row"):
        check_numbers({suffix: render(invented, {}, book, suffix)}, book)


def test_templates_hold_no_number_of_their_own():
    for locale in LOCALES:
        book = Phrasebook(locale)
        view = view_of(EMPTY, book)
        for suffix in ("md", "html"):
            assert book.unsourced_numbers(render(view, {}, book, suffix)) == []


EMPTY = BriefInput(
    run_id="run",
    workflow="",
    workload="",
    constraints="",
    rollback_path="",
    tickets_per_s=None,
    written_at=None,
    bundle=None,
    previous=None,
    report=None,
    reward_model="",
    calibration=None,
    arms=(),
    offline_gates=(),
    release=None,
    other_releases=(),
    triggers=(),
    learning=(),
)


@EACH
def test_an_unmeasured_run_shows_no_number_at_all(locale: LocaleName):
    text, footer = page(EMPTY, locale).split("`success_rate`")
    assert values_of(text, locale) == []
    assert set(values_of(footer, locale)) == {1.0}, "the 1 of the formula 1 - rate"
    assert text.count(strings_of(locale)["not_measured"]) >= 10
    assert all(strings_of(locale)[f"section.{name}"] in text for name in SECTIONS)


def test_an_unmeasured_run_is_still_a_whole_brief(empty: BriefInput, tmp_path: Path):
    paths = written_to(tmp_path, empty)
    assert set(paths) == set(LOCALES)
    assert "not measured" in paths["en-US"][1].read_text()


# --- sections ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SECTIONS)
def test_no_section_is_optional(brief: BriefInput, name: str):
    view = view_of(brief, Phrasebook("fr"))
    check_sections(view)
    gone = {key: section for key, section in view.sections.items() if key != name}
    with pytest.raises(StageRefusedError, match=f"{name}; no section is optional"):
        check_sections(replace(view, sections=gone))
    blank = Section(title="", tables=((("a",),),), lines=("  ",))
    with pytest.raises(StageRefusedError, match=name):
        check_sections(replace(view, sections={**view.sections, name: blank}))


def test_performance_and_control_are_separate_sections(brief: BriefInput):
    sections = view_of(brief, Phrasebook("en-US")).sections
    assert len(sections["tested"].tables) == 2
    assert len(sections["gates"].tables[0][1:]) == 9
    assert "0.42" in sections["rollback"].lines[0]


@EACH
def test_simulated_annotators_are_disclosed(locale: LocaleName):
    limits = view_of(EMPTY, Phrasebook(locale)).sections["limits"].lines
    assert strings_of(locale)["limit.annotators"] in limits


def test_a_planted_change_appears(brief: BriefInput):
    assert brief.bundle is not None
    old, new = component_of("tools-8", "eight"), component_of("tools-9", "nine")
    planted = replace(brief, bundle=replace(brief.bundle, tool_set=new), previous=replace(brief.bundle, tool_set=old))
    section = view_of(planted, Phrasebook("en-GB")).sections["changed"]
    assert section.tables[0][1:] == (("tool set", f"tools-8 ({old.sha256[:8]})", f"tools-9 ({new.sha256[:8]})"),)
    assert [line.partition(":")[0] for line in section.lines] == ["Unchanged"]
    none = view_of(replace(brief, previous=brief.bundle), Phrasebook("en-GB")).sections["changed"]
    assert none.lines[0] == "No part changed."


@pytest.mark.parametrize(
    ("locale", "workload"),
    [
        ("en-US", ("Workload", "order support tickets: look-ups, refunds, cancellations; 7.6 tickets/s in the canary")),
        (
            "fr",
            (
                "Charge de travail",
                "order support tickets: look-ups, refunds, cancellations ; 7,6 tickets/s pendant le canari",
            ),
        ),
    ],
)
def test_the_charters_answers_stand_at_the_head(brief: BriefInput, locale: LocaleName, workload: tuple[str, str]):
    view = view_of(brief, Phrasebook(locale))
    assert view.charter[0] == workload
    assert view.charter[1][1].startswith("at most 6 tool calls, 96 tokens a turn and 30 s a request; every reply")
    assert not view.charter[1][1].endswith("…")
    assert view.charter[2][1] == "all sessions back to sft_checkpoint_v1 at once"
    for suffix in ("md", "html"):
        assert all(label in page(brief, locale, suffix) for label, _ in view.charter)


def test_an_older_runs_charter_was_not_asked(empty: BriefInput):
    charter = view_of(empty, Phrasebook("en-US")).charter
    assert charter == tuple((name, "not measured") for name in ("Workload", "Constraints", "Rollback path"))


@EACH
def test_an_answer_is_one_line_however_long(brief: BriefInput, locale: LocaleName):
    for label, answer in view_of(crowded(brief), Phrasebook(locale)).charter:
        assert page_lines(f"- **{label}** {answer}") == 1
        assert "…" in answer


def gates_section(brief: BriefInput, result: GateResult, locale: LocaleName = "en-US") -> tuple[str, ...]:
    return view_of(replace(brief, offline_gates=(result,)), Phrasebook(locale)).sections["gates"].tables[0][1]


def test_a_verdict_without_known_numbers_keeps_its_recorded_sentence(brief: BriefInput):
    result = GateResult(
        gate="tone_of_voice", verdict="inconclusive", evidence={"critical": "x"}, reason="12 of 50 runs"
    )
    assert gates_section(brief, result) == ("tone_of_voice", "offline", "inconclusive", "12 of 50 runs")


def test_too_few_runs_are_said_in_the_readers_language(brief: BriefInput):
    evidence = {"candidate_runs": 12, "stable_runs": 1300}
    result = GateResult(gate="cost_per_success_not_worse", verdict="inconclusive", evidence=evidence, reason="few")
    assert gates_section(brief, result, "fr")[2:] == (
        "non concluant",
        "requêtes candidat 12, requêtes stable 1\u202f300",
    )


def test_infinite_evidence_is_a_sign(brief: BriefInput):
    result = GateResult(gate="cost_per_success_not_worse", verdict="fail", evidence={"ratio": "inf"}, reason="")
    assert gates_section(brief, result)[3] == "ratio ∞"


@EACH
def test_a_gate_without_words_is_shown_by_its_name(brief: BriefInput, locale: LocaleName):
    """Whoever adds a gate owes no translation: its name stands in its row, and where it decided."""
    assert brief.release is not None
    name = "replies_not_longer"
    result = replace(brief.offline_gates[0], gate=name)
    release = replace(brief.release, state="RolledBack", decision="RollBack", deciding_gates=(name,))
    view = view_of(replace(brief, offline_gates=(result,), release=release), Phrasebook(locale))
    assert gates_section(brief, result, locale)[0] == name
    assert any(name in line for line in view.sections["decision"].lines)
    assert not any(name in text for text in strings_of(locale).values())


@pytest.mark.parametrize(
    ("state", "decision", "gates", "expected"),
    [
        ("RolledBack", "RollBack", ("task_success_not_worse",), "Deciding gates: task success not worse."),
        ("Halted", "Halt", ("latency_delta_lt_15_percent",), "Deciding gates: latency within its limit."),
        ("Canary", "Hold", (), "Not decided yet: Canary."),
        ("RolledBack", "RollBack", (), "Rolled back: the stable policy carries all traffic."),
    ],
)
def test_other_endings_say_what_happened(
    brief: BriefInput, state: str, decision: str, gates: tuple[str, ...], expected: str
):
    assert brief.release is not None
    release = replace(brief.release, state=state, decision=decision, deciding_gates=gates)
    view = view_of(replace(brief, release=release), Phrasebook("en-US"))
    assert expected in view.sections["decision"].lines
    assert view.tone == {"RolledBack": "bad", "Halted": "bad"}.get(state, "open")


# --- one page ---------------------------------------------------------------------------------------------------------


def test_each_brief_fits_on_one_page(written: dict[LocaleName, tuple[Path, Path]]):
    for markdown, _ in written.values():
        assert page_lines(markdown.read_text()) <= PAGE_LINES


def test_a_longer_page_is_refused(written: dict[LocaleName, tuple[Path, Path]], brief: BriefInput, tmp_path: Path):
    text = written["fr"][0].read_text()
    with pytest.raises(StageRefusedError, match=rf"one page holds {PAGE_LINES}"):
        check_length(text + "another line\n\n" * PAGE_LINES)
    too_much = replace(brief, offline_gates=brief.offline_gates * 18)
    with pytest.raises(StageRefusedError, match="shorten"):
        write_brief(too_much, tmp_path / "report")
    assert not (tmp_path / "report").exists(), "nothing half-written"


def test_lines_are_counted_as_they_wrap():
    assert page_lines("# a\n\n| --- | --- |\n\nb\n") == 2
    assert page_lines("x" * 151) == 2
    assert page_lines("![a](b.png) ![c](d.png)") == 12


def test_what_does_not_fit_is_named_not_dropped(brief: BriefInput):
    sections = view_of(crowded(brief), Phrasebook("en-US")).sections
    assert len(sections["changed"].tables[0][1:]) == 7
    assert sections["changed"].lines == ("Also changed: policy checks, spec, code revision, seed.",)
    assert "Also tested: suite_b, suite_c." in sections["tested"].lines
    assert len(sections["rollback"].lines) == 4


@EACH
def test_a_crowded_brief_still_fits(brief: BriefInput, locale: LocaleName):
    assert page_lines(page(crowded(brief), locale)) + 12 <= PAGE_LINES


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to print with")
@pytest.mark.parametrize("is_crowded", [False, True])
@EACH
def test_a_browser_prints_exactly_one_page(brief: BriefInput, locale: LocaleName, is_crowded: bool, tmp_path: Path):
    written, pdf = written_to(tmp_path, crowded(brief) if is_crowded else brief), tmp_path / "brief.pdf"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--no-pdf-header-footer", f"--print-to-pdf={pdf}"]
    command = [str(CHROMIUM), *options, written[locale][1].as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert len(re.findall(rb"/Type\s*/Page\b(?!s)", pdf.read_bytes())) == 1


# --- files ------------------------------------------------------------------------------------------------------------


def test_figures_lie_beside_the_markdown_and_inside_the_html(written: dict[LocaleName, tuple[Path, Path]]):
    for locale, (markdown, html) in written.items():
        links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", markdown.read_text())
        assert links == [f"figures/{name}.{locale}.png" for name in ("learning", "intents", "canary")]
        titles = [strings_of(locale)[f"figure.{name}"] for name in ("learning", "intents", "canary")]
        assert re.findall(r"!\[([^\]]+)\]", markdown.read_text()) == titles
        assert all((markdown.parent / link).read_bytes().startswith(b"\x89PNG") for link in links)
        assert html.read_text().count("data:image/png;base64,") == 3
        assert "figures/" not in html.read_text()


def test_html_names_its_language_and_paper(written: dict[LocaleName, tuple[Path, Path]]):
    for locale, paper in (("en-US", "Letter"), ("en-GB", "A4"), ("fr", "A4")):
        text = written[locale][1].read_text()  # type: ignore[index]
        assert f'<html lang="{locale}">' in text
        assert f"@page {{ size: {paper} portrait" in text


def test_recorded_text_cannot_break_the_page(brief: BriefInput):
    assert brief.release is not None
    hostile = replace(brief, release=replace(brief.release, reason="<script>alert(1)</script> a | b\nc"))
    assert "<script>alert" not in page(hostile, "en-US", "html")
    assert "a \\| b c" in page(hostile, "en-US")


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_differ_by_what_was_measured(brief: BriefInput):
    book = Phrasebook("en-US")
    full, blank = draw_figures(brief, book), draw_figures(EMPTY, book)
    assert list(full) == ["learning", "intents", "canary"]
    assert all(full[name] != blank[name] for name in full)
    assert all(len(png) < 80_000 for png in full.values())


def test_pictures_speak_the_readers_language(brief: BriefInput):
    american, french = (draw_figures(brief, Phrasebook(locale)) for locale in ("en-US", "fr"))
    assert all(american[name] != french[name] for name in american)


def test_pictures_bear_gaps_and_the_infinite(brief: BriefInput):
    assert brief.release is not None
    points = tuple(replace(point, share=None, log10_e_fail=-float("inf")) for point in brief.release.points)
    release = replace(brief.release, points=points, fail_limit=None)
    learning = tuple(replace(point, kl=None) for point in brief.learning)
    figures = draw_figures(replace(brief, release=release, learning=learning), Phrasebook("en-GB"))
    assert all(png.startswith(b"\x89PNG") for png in figures.values())
