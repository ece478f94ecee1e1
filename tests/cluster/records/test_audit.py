"""The audit: a run as it was left verifies, and whatever is done to its records afterwards is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest
from typer.testing import CliRunner, Result

from cluster.cli.app import app
from cluster.cli.runs import record_spec
from cluster.records.audit import Finding, audit_run, chain_heads, chained_files, head_tags, read_anchors, tagged_heads
from cluster.records.bundle import MEMBERS, Bundle, build_bundle, component_of
from cluster.records.journal import Journal
from cluster.records.run_folder import RunFolder
from cluster.spec.spec import WorkflowSpec, load_spec
from rl_actors.contracts.errors import InfrastructureError, TamperedError
from rl_actors.durable.files import ChainedLog, append_row, write_json
from serving.contracts.release import SplitRecord
from serving.split.record import SplitStore
from serving.store.served import ReleaseFiles
from tests.cluster.cli.test_cli import ending

CHAINED = (
    "journal.jsonl",
    "tripwires.jsonl",
    "serving/split/split_history.jsonl",
    "release/decisions.jsonl",
    "release_drill/decisions.jsonl",
)
SPLIT = SplitRecord(epoch=1, stable="sft-a", candidate="ppo-b", share=0.0, salt="r1", updated_at=1e9)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEATRIAL_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "home"


@cache
def spec() -> WorkflowSpec:
    return load_spec("support_desk")


def begin(home: Path, run_id: str) -> RunFolder:
    folder = RunFolder.of(home, run_id)
    record_spec(spec(), folder)
    return folder


def bundle_of(policy: str) -> Bundle:
    return build_bundle({name: component_of(policy if name == "policy" else name, name) for name in MEMBERS})


def write_model(folder: RunFolder, stage: str, text: str) -> str:
    model = folder.root / "models" / stage
    model.mkdir(parents=True, exist_ok=True)
    (model / "weights.bin").write_text(text)
    (model / "config.json").write_text("{}")
    return str(model)


def run_stages(folder: RunFolder, *stages: str) -> None:
    journal = Journal(folder.journal)
    for stage in stages:
        journal.run_stage(stage, {"seed": 7}, lambda name=stage: write_model(folder, name, name), str, lambda at: (at,))


def write_summary(folder: RunFolder) -> None:
    summary = replace(ending(folder), bundle_id=bundle_of("ppo").id, heads=chain_heads(folder))
    write_json(folder.summary, summary.to_json())


def write_running(home: Path, run_id: str) -> RunFolder:
    """A run that has everything but an ending."""
    folder = begin(home, run_id)
    run_stages(folder, "sft", "ppo")
    for step in range(3):
        ChainedLog(folder.tripwires).append({"stage": "ppo", "step": step, "trip": "kl: é"})
        for release in ("release", "release_drill"):
            ChainedLog(folder.root / release / "decisions.jsonl").append({"at": step, "decision": "Hold"})
    splits = SplitStore(ReleaseFiles(root=folder.root / "serving").split)
    for epoch in (1, 2, 3):
        splits.compare_and_set(replace(SPLIT, epoch=epoch))
    bundle_of("ppo").write(folder.bundle)
    return folder


@pytest.fixture
def running(home: Path) -> RunFolder:
    return write_running(home, "r1")


@pytest.fixture
def ended(running: RunFolder) -> RunFolder:
    write_summary(running)
    return running


def seatrial(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def verdicts(folder: RunFolder) -> dict[str, str]:
    return {finding.file: finding.verdict for finding in audit_run(folder)}


def unsound(folder: RunFolder) -> list[Finding]:
    return [finding for finding in audit_run(folder) if not finding.is_sound]


# --- a run as it was left ---------------------------------------------------------------------------------------------


def test_an_ended_run_verifies_to_the_last_file(ended: RunFolder):
    assert verdicts(ended) == dict.fromkeys(
        (*CHAINED, "artifacts of sft", "artifacts of ppo", "bundle.json"), "verified"
    )
    assert chained_files(ended) == CHAINED


def test_a_finding_says_how_much_there_is_and_how_it_is_called(ended: RunFolder):
    findings = {finding.file: finding for finding in audit_run(ended)}
    last = json.loads((ended.root / "release" / "decisions.jsonl").read_text().splitlines()[-1])
    assert (findings["release/decisions.jsonl"].rows, findings["release/decisions.jsonl"].head) == (3, last["chain"])
    journal = Journal(ended.journal).records
    assert (findings["journal.jsonl"].rows, findings["journal.jsonl"].head) == (2, journal[-1].chain)
    sft = findings["artifacts of sft"]
    assert (sft.rows, sft.head) == (2, journal[0].artifacts["models/sft/"])
    assert (findings["bundle.json"].rows, findings["bundle.json"].head) == (len(MEMBERS), bundle_of("ppo").id)


def test_a_run_under_way_is_sound_but_nothing_holds_its_ends(running: RunFolder):
    found = verdicts(running)
    assert {found[name] for name in (*CHAINED, "bundle.json")} == {"not anchored"}
    assert unsound(running) == []


def test_a_run_that_has_just_begun_has_nothing_to_verify(home: Path):
    assert audit_run(begin(home, "new")) == ()
    result = seatrial("audit")
    assert result.exit_code == 0
    assert "nothing to verify" in result.stdout


def test_rows_after_the_ending_are_no_tampering(ended: RunFolder):
    """`seatrial up` after a run, or a resume of one that `train` stopped, goes on with the same files."""
    ChainedLog(ended.root / "release" / "decisions.jsonl").append({"at": 9, "decision": "Hold"})
    run_stages(ended, "offline_eval")
    assert unsound(ended) == []


@pytest.mark.parametrize("name", CHAINED)
def test_a_torn_last_line_is_no_tampering(ended: RunFolder, name: str):
    with (ended.root / name).open("ab") as file:
        file.write(b'{"at": 4, "deci')
    assert unsound(ended) == []


def test_a_stage_that_was_done_again_is_held_to_what_it_left_last(ended: RunFolder):
    Journal(ended.journal).run_stage(
        "ppo", {"seed": 8}, lambda: write_model(ended, "ppo", "another"), str, lambda at: (at,)
    )
    assert unsound(ended) == []


def test_auditing_writes_nothing(ended: RunFolder):
    def state() -> dict[Path, tuple[bytes, int]]:
        files = [path for path in ended.root.rglob("*") if path.is_file()]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = state()
    audit_run(ended)
    assert state() == before


# --- each kind of tampering -------------------------------------------------------------------------------------------

Change = Callable[[list[str]], list[str]]
IN_THE_CHAIN: dict[str, Change] = {
    "a removed line": lambda f: f[1:],
    "swapped lines": lambda f: [f[1], f[0], *f[2:]],
    "a line without a chain": lambda f: [*f, json.dumps({"at": 9})],
}


def rewrite(path: Path, change: Change) -> None:
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))


@pytest.mark.parametrize("name", CHAINED)
@pytest.mark.parametrize("kind", IN_THE_CHAIN)
def test_lines_that_were_tampered_with_are_named(ended: RunFolder, name: str, kind: str):
    rewrite(ended.root / name, IN_THE_CHAIN[kind])
    finding = next(finding for finding in unsound(ended) if finding.file == name)
    assert finding.verdict == "changed"
    assert f"{ended.root / name}, line" in finding.detail
    assert "restore" in finding.detail


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("journal.jsonl", '"stage": "sft"', '"stage": "base"'),
        ("tripwires.jsonl", '"step": 1', '"step": 7'),
        ("serving/split/split_history.jsonl", '"epoch": 2', '"epoch": 7'),
        ("release/decisions.jsonl", "Hold", "Promote"),
        ("release_drill/decisions.jsonl", "Hold", "RollBack"),
    ],
)
def test_a_changed_value_is_named(ended: RunFolder, name: str, before: str, after: str):
    path = ended.root / name
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    assert next(finding.verdict for finding in unsound(ended) if finding.file == name) == "changed"


@pytest.mark.parametrize("name", CHAINED)
def test_a_cut_off_end_is_seen_once_the_run_has_ended(ended: RunFolder, name: str):
    rows = (ended.root / name).read_text().count("\n")
    rewrite(ended.root / name, lambda lines: lines[:-1])
    finding = next(finding for finding in unsound(ended) if finding.file == name)
    assert finding.verdict == "cut off"
    assert f"holds {rows - 1} rows, {rows} when the run ended" in finding.detail
    ended.summary.unlink()
    assert verdicts(ended)[name] == "not anchored", "without an ending nobody can tell"


@pytest.mark.parametrize("name", CHAINED)
def test_a_file_that_is_gone_is_named(ended: RunFolder, name: str):
    (ended.root / name).unlink()
    assert verdicts(ended)[name] == "gone"


def test_a_file_written_anew_with_a_good_chain_is_seen(ended: RunFolder):
    """Whoever can write the file can chain it; not make it what the ending kept."""
    path = ended.root / "release" / "decisions.jsonl"
    rows = ChainedLog(path).rows()
    path.unlink()
    for row in rows:
        ChainedLog(path).append({**row, "decision": "Promote"})
    (finding,) = unsound(ended)
    assert (finding.file, finding.verdict) == ("release/decisions.jsonl", "changed")
    assert "row 3 has chain" in finding.detail
    assert "written anew" in finding.detail


def test_all_chains_taken_off_is_seen(ended: RunFolder):
    path = ended.root / "release" / "decisions.jsonl"
    rows = ChainedLog(path).rows()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (finding,) = unsound(ended)
    assert finding.verdict == "changed"
    assert "row 3 has chain none" in finding.detail


def test_a_changed_artifact_is_named(ended: RunFolder):
    (ended.root / "models" / "ppo" / "weights.bin").write_text("other weights")
    (finding,) = unsound(ended)
    assert (finding.file, finding.verdict) == ("artifacts of ppo", "changed")
    assert "models/ppo/weights.bin" in finding.detail


def test_a_lost_artifact_and_an_added_one_are_named(ended: RunFolder):
    (ended.root / "models" / "sft" / "config.json").unlink()
    (ended.root / "models" / "ppo" / "extra.bin").write_text("x")
    lost, added = unsound(ended)
    assert (lost.file, added.file) == ("artifacts of sft", "artifacts of ppo")
    assert "is gone" in lost.detail
    assert "other files" in added.detail


def test_a_changed_journal_says_that_artifacts_were_not_checked(ended: RunFolder):
    rewrite(ended.journal, lambda lines: lines[1:])
    journal, artifacts = unsound(ended)
    assert (journal.file, artifacts.file) == ("journal.jsonl", "artifacts")
    assert "were not checked" in artifacts.detail


def edit_bundle(path: Path, edit: Callable[[dict], object]) -> None:
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))


def test_a_changed_bundle_is_named(ended: RunFolder):
    edit_bundle(ended.bundle, lambda tree: tree["policy"].update(version="other"))
    (finding,) = unsound(ended)
    assert (finding.file, finding.verdict) == ("bundle.json", "changed")
    assert "content hashes to" in finding.detail


def test_a_bundle_that_is_none_is_named(ended: RunFolder):
    ended.bundle.write_text("{}")
    assert verdicts(ended)["bundle.json"] == "changed"


def test_another_good_bundle_is_not_this_runs(ended: RunFolder):
    ended.bundle.unlink()
    bundle_of("another").write(ended.bundle)
    (finding,) = unsound(ended)
    assert (finding.file, finding.verdict) == ("bundle.json", "changed")
    assert bundle_of("ppo").id[:12] in finding.detail


def test_a_lost_bundle_is_named(ended: RunFolder):
    ended.bundle.unlink()
    assert verdicts(ended)["bundle.json"] == "gone"


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"heads": 3}'])
def test_an_unreadable_ending_is_named_and_the_rest_is_still_checked(ended: RunFolder, text: str):
    ended.summary.write_text(text)
    (ended.root / "models" / "ppo" / "weights.bin").write_text("other weights")
    assert [finding.file for finding in unsound(ended)] == ["summary.json", "artifacts of ppo"]


@pytest.mark.parametrize("rows", [-1, 0, 4, 10**9])
def test_an_ending_that_counts_otherwise_is_not_believed(ended: RunFolder, rows: int):
    tree = json.loads(ended.summary.read_text())
    tree["heads"]["release/decisions.jsonl"]["rows"] = rows
    ended.summary.write_text(json.dumps(tree))
    (finding,) = unsound(ended)
    assert (finding.file, finding.verdict) == ("release/decisions.jsonl", "changed" if rows < 4 else "cut off")


# --- older runs -------------------------------------------------------------------------------------------------------


def unchain(path: Path) -> None:
    rows = ChainedLog(path).rows()
    path.unlink()
    for row in rows:
        append_row(path, row)


def test_rows_of_an_older_version_are_counted_and_do_not_verify(running: RunFolder):
    unchain(running.decisions)
    ChainedLog(running.decisions).append({"at": 9, "decision": "Promote"})
    (finding,) = unsound(running)
    assert (finding.verdict, finding.rows, finding.num_unchained) == ("not chained", 4, 3)
    assert "3 rows without a chain" in finding.detail


def test_an_older_run_can_end_and_its_length_is_held_from_then_on(running: RunFolder):
    unchain(running.decisions)
    write_summary(running)
    assert verdicts(running)["release/decisions.jsonl"] == "not chained"
    rewrite(running.decisions, lambda lines: lines[:-1])
    assert verdicts(running)["release/decisions.jsonl"] == "cut off"


def test_a_summary_of_an_older_version_is_read(ended: RunFolder):
    tree = json.loads(ended.summary.read_text())
    del tree["heads"]
    ended.summary.write_text(json.dumps(tree))
    assert verdicts(ended)["journal.jsonl"] == "not anchored"
    assert verdicts(ended)["bundle.json"] == "verified"


# --- the heads that an ending keeps -----------------------------------------------------------------------------------


def test_heads_survive_the_summary_and_the_tags(ended: RunFolder):
    heads = chain_heads(ended)
    assert set(heads) == set(CHAINED)
    assert heads["release/decisions.jsonl"].rows == 3
    assert read_anchors(ended) == heads
    tags = head_tags(heads)
    assert tags["seatrial.audit.journal.jsonl"] == f"2 {heads['journal.jsonl'].chain}"
    assert tagged_heads({**tags, "seatrial.stage": "pipeline"}) == heads


@pytest.mark.parametrize("value", ["", "x", "three abc", "-1 abc"])
def test_a_tag_that_is_no_head_is_named(value: str):
    with pytest.raises(TamperedError, match=r"seatrial\.audit\.journal\.jsonl"):
        tagged_heads({"seatrial.audit.journal.jsonl": value})


def test_a_resumed_run_does_not_make_a_cut_off_file_good(ended: RunFolder):
    rewrite(ended.decisions, lambda lines: lines[:-1])
    with pytest.raises(TamperedError, match="holds 2 rows, 3 when the run ended"):
        chain_heads(ended)


def test_a_resumed_run_moves_its_heads_on(ended: RunFolder):
    ChainedLog(ended.decisions).append({"at": 9, "decision": "Hold"})
    assert chain_heads(ended)["release/decisions.jsonl"].rows == 4


def test_tags_count_more_than_the_summary_beside_the_files(ended: RunFolder):
    """Whoever cuts a file off and edits `summary.json` to match has not edited MLflow."""
    tagged = tagged_heads(head_tags(chain_heads(ended)))
    ended.summary.unlink()
    rewrite(ended.decisions, lambda lines: lines[:-1])
    write_summary(ended)
    assert unsound(ended) == []
    (finding,) = [finding for finding in audit_run(ended, tagged) if not finding.is_sound]
    assert (finding.file, finding.verdict) == ("release/decisions.jsonl", "cut off")


# --- the command ------------------------------------------------------------------------------------------------------


def test_an_ended_run_is_shown_in_a_table_with_exit_code_0(ended: RunFolder):
    result = seatrial("audit")
    assert result.exit_code == 0
    head = chain_heads(ended)["journal.jsonl"].chain
    for text in ("Audit of r1", "journal.jsonl", head[:12], "bundle.json", "all 8 verify"):
        assert text in result.stdout
    assert head[:13] not in result.stdout


def test_latest_is_the_newest_run_and_an_id_is_that_run(home: Path, ended: RunFolder):
    newer = write_running(home, "r2")
    shutil.copyfile(newer.spec, newer.spec.with_suffix(".tmp"))
    newer.spec.with_suffix(".tmp").replace(newer.spec)
    for words, run_id in ((("audit",), "r2"), (("audit", "latest"), "r2"), (("audit", "r1"), "r1")):
        assert json.loads(seatrial(*words, "--json").stdout)["run_id"] == run_id


def test_a_tampered_run_ends_in_exit_code_1_and_says_what_to_do(ended: RunFolder):
    rewrite(ended.decisions, lambda lines: lines[:-1])
    (ended.root / "models" / "ppo" / "weights.bin").write_text("other weights")
    result = seatrial("audit", "r1")
    assert result.exit_code == 1
    for text in ("cut off", "changed", "2 of 8 do not verify", "restore it from a copy"):
        assert text in result.stdout
    assert str(ended.decisions) in result.stdout, "a path is never wrapped"


def test_a_machine_gets_every_finding(ended: RunFolder):
    answer = json.loads(seatrial("audit", "--json").stdout)
    assert (answer["ok"], answer["exit_code"], answer["run_id"]) == (True, 0, "r1")
    assert [finding["file"] for finding in answer["findings"]][: len(CHAINED)] == list(CHAINED)
    ended.bundle.unlink()
    result = seatrial("audit", "--json")
    answer = json.loads(result.stdout)
    assert (result.exit_code, answer["ok"]) == (1, False)
    assert [f["verdict"] for f in answer["findings"] if f["file"] == "bundle.json"] == ["gone"]


def test_an_older_run_is_shown_with_the_number_of_its_rows(running: RunFolder):
    unchain(running.decisions)
    result = seatrial("audit")
    assert result.exit_code == 1
    assert "not chained (3 rows)" in result.stdout


def test_a_run_under_way_says_what_cannot_be_seen_yet(running: RunFolder):
    result = seatrial("audit")
    assert result.exit_code == 0
    assert "not anchored: no ending of the run kept this" in result.stdout


@pytest.mark.parametrize("words", [["nonsense"], ["../x"]])
def test_an_unknown_run_is_bad_input(ended: RunFolder, words: list[str]):
    result = seatrial("audit", *words, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["value"] == words[0]


def test_no_run_at_all_is_bad_input(home: Path):
    assert seatrial("audit", "--json").exit_code == 2


class Tags:
    """An MLflow that knows the parent run's tags."""

    tags: ClassVar[Mapping[str, str] | InfrastructureError] = {}

    def __init__(self, workflow: str, run_id: str, *, store: object) -> None:
        assert (workflow, run_id) == ("support_desk", "r1")
        self.store = store

    def parent_tags(self) -> Mapping[str, str]:
        if isinstance(self.tags, InfrastructureError):
            raise self.tags
        return self.tags


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> type[Tags]:
    monkeypatch.setattr("cluster.registry.Registry", Tags)
    monkeypatch.setattr(Tags, "tags", {})
    return Tags


def test_mlflow_holds_a_run_whose_summary_was_edited_too(ended: RunFolder, mlflow: type[Tags]):
    mlflow.tags = head_tags(chain_heads(ended))
    assert seatrial("audit", "--mlflow").exit_code == 0
    ended.summary.unlink()
    rewrite(ended.decisions, lambda lines: lines[:-1])
    write_summary(ended)
    assert seatrial("audit").exit_code == 0
    result = seatrial("audit", "--mlflow")
    assert result.exit_code == 1
    assert "cut off" in result.stdout


@pytest.mark.parametrize(
    ("tags", "verdict", "said"),
    [
        ({"seatrial.stage": "pipeline"}, "gone", "has no audit tags of r1"),
        ({"seatrial.audit.journal.jsonl": "many"}, "changed", "is no head of a chain"),
    ],
)
def test_an_mlflow_without_good_tags_is_a_finding(
    ended: RunFolder, mlflow: type[Tags], tags: Mapping[str, str], verdict: str, said: str
):
    mlflow.tags = tags
    result = seatrial("audit", "--mlflow", "--json")
    first = json.loads(result.stdout)["findings"][0]
    assert (result.exit_code, first["file"], first["verdict"]) == (1, "MLflow", verdict)
    assert said in first["detail"]


def test_an_mlflow_that_does_not_answer_is_infrastructure(ended: RunFolder, mlflow: type[Tags]):
    mlflow.tags = InfrastructureError("MLflow does not answer")
    assert seatrial("audit", "--mlflow").exit_code == 3
