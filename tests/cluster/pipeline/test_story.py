"""The whole story with every stage replaced by a line: order, early ends, resume after any failure, one at a time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.pipeline import evaluation, preferences, records, release, training
from cluster.pipeline import story as pipeline
from cluster.pipeline.run import Learned, Run
from cluster.pipeline.story import run_pipeline
from cluster.plan.placement import Placement
from cluster.records.bundle import MEMBERS, Bundle, Component, load_bundle
from cluster.records.frozen import freeze_policy, fresh
from cluster.records.journal import Journal
from cluster.records.run_folder import RunFolder
from cluster.records.summary import ReleaseOutcome, RunSummary
from cluster.registry.entries import ModelVersion
from cluster.spec.spec import WorkflowSpec, load_spec, override
from rl_actors.contracts.errors import (
    BadInputError,
    InfrastructureError,
    InstabilityError,
    StageRefusedError,
    TamperedError,
)
from rl_actors.contracts.reports import EvalReport
from rl_actors.contracts.versions import DataSnapshot, PolicyVersion, RewardModelVersion
from serving.contracts.gates import GateResult
from serving.contracts.release import ReleasePlan
from tests.cluster.pipeline.fakes import CALIBRATION, FakeRegistry, RecordingWatch, make_result
from tests.serving.fakes import make_report

LEARNING = ["snapshot", "base", "sft", "preferences", "reward_model", "ppo"]
RELEASING = ["degrade", "canary", "failback_drill"]
ALL = [*LEARNING, "offline_eval", "offline_gates", *RELEASING]
PASSED = (GateResult(gate="no_safety_regression", verdict="pass", evidence={}, reason="none"),)


@dataclass
class Story:
    """Every stage as one line in `log`. `failures` raise instead; what a stage was handed is in `given`."""

    log: list[str] = field(default_factory=list)
    given: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    outcome: str = "promoted"
    ray: list[str] = field(default_factory=list)
    registry: FakeRegistry = field(default_factory=FakeRegistry)

    def happen(self, name: str, *given: Any) -> None:
        self.given[name] = given
        if name in self.failures:
            raise self.failures[name]
        self.log.append(name)

    def directory(self, path: Path) -> Path:
        """A finished directory; its content, and so its hash, is the stage's text."""
        (fresh(path) / "model.bin").write_text(self.texts.get(path.name, path.name))
        return path

    # --- one method per stage function ----------------------------------------------------------------------------

    def freeze_snapshot(self, _workflow: Any, num_tasks: Any, seed: int, directory: Path) -> DataSnapshot:
        self.happen("snapshot", num_tasks, seed)
        path = self.directory(directory / "snapshot")
        rows = {"tasks": 3, "demonstrations": 2}
        return DataSnapshot(path=str(path), sha256="d" * 64, num_rows=rows, num_tasks={"train": 2})

    def build_base(self, _model: Any, _seed: int, _prompt: str, snapshot: Any, directory: Path) -> PolicyVersion:
        self.happen("base", snapshot)
        return freeze_policy("base", "base", self.directory(directory), "")

    def train_baseline(self, _spec: Any, folder: RunFolder, _prompt: str, *given: Any) -> PolicyVersion:
        self.happen("sft", *given)
        return freeze_policy("sft", "sft", self.directory(folder.models / "sft"), given[1].sha256)

    def collect_preferences(self, _spec: Any, folder: RunFolder, _workflow: Any, *given: Any) -> DataSnapshot:
        self.happen("preferences", *given[:2])
        path = self.directory(folder.models / "preferences")
        rows = {"rollouts": 8, "preferences": 6}
        return DataSnapshot(path=str(path), sha256="e" * 64, num_rows=rows, num_tasks={})

    def read_pairs(self, ranked: DataSnapshot, _rubric: Any, split: str) -> tuple[str, str]:
        return (ranked.sha256, split)

    def train_reward_model(self, _spec: Any, folder: RunFolder, _rubric: Any, *given: Any) -> RewardModelVersion:
        self.happen("reward_model", *given)
        path = self.directory(folder.models / "reward")
        return RewardModelVersion(name="rm", path=str(path), sha256="f" * 64, calibration=CALIBRATION)

    def train_policy(self, _spec: Any, folder: RunFolder, _prompt: str, *given: Any) -> PolicyVersion:
        self.happen("ppo", *given[:3])
        return freeze_policy("ppo", "ppo", self.directory(folder.models / "ppo"), given[1].sha256)

    def read_suites(self, snapshot: DataSnapshot) -> str:
        return f"suites of {snapshot.sha256}"

    def evaluate(self, _spec: Any, *given: Any) -> EvalReport:
        self.happen("offline_eval", *given)
        return make_report()

    def require_offline_gates(self, *given: Any) -> tuple[GateResult, ...]:
        self.happen("offline_gates", *given)
        return PASSED

    def make_bundle(self, _spec: Any, _workflow: Any, suites: str, learned: Learned) -> Bundle:
        self.given["bundle"] = (suites, learned)
        members = {name: Component(version=name, sha256="1" * 64) for name in MEMBERS}
        return Bundle(**{**members, "policy": Component(version="ppo", sha256=learned.candidate.sha256)})

    @contextmanager
    def bench(self, _spec: Any, _folder: Any, _workflow: Any, *given: Any) -> Iterator[str]:
        self.given["bench"] = given
        yield "bench"

    def release_all(self, run: Run, *given: Any) -> tuple[ReleaseOutcome, ReleaseOutcome]:
        self.given["release"] = given

        def step(name: str, outcome: str) -> ReleaseOutcome:
            def compute() -> ReleaseOutcome:
                self.happen(name)
                return make_result(outcome=outcome)

            return run.stage(name, {}, compute, ReleaseOutcome)

        step("degrade", "promoted")
        return step("canary", self.outcome), step("failback_drill", "rolled_back")

    def finish(self, run: Run, spec: WorkflowSpec, *given: Any) -> RunSummary:
        self.happen("finish", *given)
        return replace(records.summarise(run, spec, (), report=given[3], releases=given[4]), stable_policy="ppo")

    @contextmanager
    def registry_of(self, _run: Run, _spec: WorkflowSpec) -> Iterator[FakeRegistry]:
        yield self.registry

    def require_room(self, _spec: Any, _folder: Any, until: str) -> None:
        self.given["room"] = (until,)

    @contextmanager
    def connected(self, address: str, placement: Placement) -> Iterator[None]:
        assert placement.bundles("sft")
        self.ray.append(f"up {address}".strip())
        try:
            yield
        finally:
            self.ray.append("down")


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Story:
    monkeypatch.setenv("SEATRIAL_HOME", str(tmp_path / "home"))
    told = Story()
    places: dict[Any, tuple[str, ...]] = {
        training: ("build_base", "train_baseline", "train_reward_model", "train_policy"),
        preferences: ("collect_preferences", "read_pairs"),
        evaluation: ("evaluate", "read_suites", "require_offline_gates"),
        release: ("release_all", "require_room"),
        records: ("make_bundle", "finish", "registry_of"),
        pipeline: ("connected", "freeze_snapshot"),
    }
    for module, names in places.items():
        for name in names:
            monkeypatch.setattr(module, name, getattr(told, name))
    monkeypatch.setattr(release, "ReleaseBench", told.bench)
    return told


SPEC = load_spec("support_desk")


def folder_of(tmp_path: Path) -> RunFolder:
    return RunFolder.of(tmp_path / "home", "run-1")


def tell(tmp_path: Path, spec: WorkflowSpec = SPEC, until: str = "") -> tuple[RunSummary, RecordingWatch]:
    watch = RecordingWatch()
    return run_pipeline(spec, folder_of(tmp_path), watch, until=until), watch


def journaled(tmp_path: Path) -> list[str]:
    return [record.stage for record in Journal(folder_of(tmp_path).journal).records]


# --- the order --------------------------------------------------------------------------------------------------------


def test_every_stage_runs_once_in_the_order_of_the_design(tmp_path: Path, story: Story):
    summary, watch = tell(tmp_path)
    assert story.log == [*ALL, "finish"]
    assert journaled(tmp_path) == ALL
    assert [name for name, _ in watch.started] == [name for name, _, _ in watch.finished] == ALL
    assert [line.name for line in summary.stages] == ALL
    assert not any(line.resumed for line in summary.stages)
    assert summary.exit_code == 0


def test_each_stage_is_handed_what_the_ones_before_it_made(tmp_path: Path, story: Story):
    tell(tmp_path)
    snapshot, base = story.given["sft"]
    assert (snapshot.sha256, base.kind) == ("d" * 64, "base")
    _, baseline = story.given["preferences"]
    assert (baseline.kind, baseline.parent_sha256) == ("sft", base.sha256)
    ranked = "e" * 64
    assert story.given["reward_model"] == ((ranked, "train"), (ranked, "calibration"), baseline)
    assert story.given["ppo"][:2] == (snapshot, baseline)
    reward_model = story.given["ppo"][2]
    assert reward_model.name == "rm"
    suites, _, candidate, _, file = story.given["offline_eval"]
    assert (candidate.kind, candidate.parent_sha256, file.name) == ("ppo", baseline.sha256, "candidate.json")
    learned = Learned(snapshot=snapshot, base=base, baseline=baseline, reward_model=reward_model, candidate=candidate)
    assert story.given["bundle"] == (suites, learned)
    assert story.given["bench"][:3] == (snapshot, story.registry.versions, reward_model.path)
    assert story.given["release"][2] == learned
    assert story.given["release"][4:] == (story.registry.versions, "bench")


def test_the_gates_are_asked_before_any_traffic_with_the_rules_of_the_spec(tmp_path: Path, story: Story):
    tell(tmp_path, override(SPEC, ["release.alpha=0.01"]))
    report, plan = story.given["offline_gates"]
    assert isinstance(plan, ReleasePlan)
    assert (plan.alpha, plan.may_promote) == (0.01, True)
    assert report == make_report()
    assert story.log.index("offline_gates") < story.log.index("canary")


def test_what_each_stage_says_is_about_its_result(tmp_path: Path, story: Story):
    _, watch = tell(tmp_path)
    lines = {name: line for name, line, _ in watch.finished}
    assert lines["snapshot"] == "3 tasks, 2 demonstrations"
    assert lines["preferences"] == "8 rollouts, 6 choices"
    assert lines["reward_model"] == "pair accuracy 80.0%, ECE 0.050"
    assert lines["sft"].endswith("frozen as the KL reference")
    assert lines["offline_eval"] == "success +0.0% (p = 1)"
    assert lines["offline_gates"] == "no_safety_regression pass"


def test_the_bundle_is_written_before_the_release(tmp_path: Path, story: Story):
    story.failures["degrade"] = InfrastructureError("disk full")
    with pytest.raises(InfrastructureError):
        tell(tmp_path)
    assert load_bundle(folder_of(tmp_path).bundle).policy.sha256 == story.given["bundle"][-1].candidate.sha256


# --- early ends and summaries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("until", "stages"), [("ppo", LEARNING), ("eval", [*LEARNING, "offline_eval"])])
def test_a_run_can_stop_early(tmp_path: Path, story: Story, until: str, stages: list[str]):
    summary, _ = tell(tmp_path, until=until)
    assert story.log == stages
    assert (summary.stable_policy, summary.releases, summary.exit_code) == ("", (), 0)
    assert [line.name.partition("-")[0] for line in summary.trained] == ["sft", "rm", "ppo"]
    assert summary.trained[0].sha256 == story.given["ppo"][1].sha256
    assert bool(summary.offline) == (until == "eval")


def test_an_early_end_is_continued_without_doing_anything_again(tmp_path: Path, story: Story):
    for until in ("ppo", "eval", "release"):
        summary, _ = tell(tmp_path, until=until)
    assert story.log == [*ALL, "finish"]
    assert [line.resumed for line in summary.stages] == [name not in ALL[-4:] for name in ALL]


@pytest.mark.parametrize("until", ["ppo", "eval", ""])
def test_the_ending_is_written_for_machines(tmp_path: Path, story: Story, until: str):
    summary, _ = tell(tmp_path, until=until)
    written = json.loads(folder_of(tmp_path).summary.read_text())
    assert RunSummary.from_json(written) == summary
    assert written["run_id"] == "run-1"
    assert written["paths"]["folder"] == str(folder_of(tmp_path).root)


@pytest.mark.parametrize(("outcome", "exit_code"), [("promoted", 0), ("rolled_back", 1), ("halted", 1)])
def test_a_release_that_was_lost_is_a_no(tmp_path: Path, story: Story, outcome: str, exit_code: int):
    story.outcome = outcome
    summary, _ = tell(tmp_path)
    assert summary.exit_code == exit_code
    assert [line.outcome for line in summary.releases] == [outcome, "rolled_back"]


# --- failures and resume ----------------------------------------------------------------------------------------------

ERRORS: dict[str, Exception] = {
    "reward_model": StageRefusedError("miscalibrated"),
    "ppo": InstabilityError("kl: 9"),
    "offline_gates": StageRefusedError("worse"),
}


@pytest.mark.parametrize("broken", [*ALL, "finish"])
def test_a_stage_that_fails_leaves_the_earlier_ones_and_the_next_process_goes_on_there(
    tmp_path: Path, story: Story, broken: str
):
    error = ERRORS.get(broken, InfrastructureError("machine lost"))
    story.failures[broken] = error
    before = ALL[: ALL.index(broken)] if broken in ALL else ALL
    with pytest.raises(type(error), match=str(error)):
        tell(tmp_path)
    assert story.log == before
    assert journaled(tmp_path) == before
    assert not folder_of(tmp_path).summary.exists()
    assert story.ray[-1] == "down"

    story.failures.clear()
    story.log.clear()
    summary, watch = tell(tmp_path)
    assert story.log == [*ALL[len(before) :], "finish"]
    assert [line.resumed for line in summary.stages] == [name in before for name in ALL]
    assert [(name, seconds) for name, _, seconds in watch.finished][: len(before)] == [(name, 0.0) for name in before]
    assert folder_of(tmp_path).summary.exists()


def test_a_finished_run_told_again_computes_nothing(tmp_path: Path, story: Story):
    first, _ = tell(tmp_path)
    story.log.clear()
    second, _ = tell(tmp_path)
    assert story.log == ["finish"]
    assert all(line.resumed for line in second.stages)
    assert [line.line for line in second.stages] == [line.line for line in first.stages]


def redone(tmp_path: Path, story: Story, *settings: str) -> list[str]:
    """Which stages a change of these settings computes again."""
    tell(tmp_path)
    story.log.clear()
    story.texts = {name: f"{name} anew" for name in ("base", "sft", "ppo")}
    tell(tmp_path, override(SPEC, list(settings)), until="eval")
    return story.log


@pytest.mark.parametrize(
    ("setting", "stages"),
    [
        ("data.num_train=7", ["snapshot"]),
        ("model.num_layers=2", ["base", *LEARNING[2:], "offline_eval"]),
        ("sft.epochs=9", [*LEARNING[2:], "offline_eval"]),
        ("ppo.num_steps=9", ["ppo", "offline_eval"]),
        ("seed=9", [*LEARNING, "offline_eval"]),
        ("monitoring=[human_override_rate]", []),
        ("charter.constraints=own words", []),
    ],
)
def test_a_changed_setting_redoes_what_stands_on_it_and_no_more(
    tmp_path: Path, story: Story, setting: str, stages: list[str]
):
    assert redone(tmp_path, story, setting) == stages


def test_a_changed_artifact_stops_the_resume(tmp_path: Path, story: Story):
    tell(tmp_path, until="ppo")
    weights = folder_of(tmp_path).root / "models" / "sft" / "model.bin"
    weights.chmod(0o644)
    weights.write_text("somebody else's")
    with pytest.raises(TamperedError, match="'sft' left"):
        tell(tmp_path)


# --- pinned versions --------------------------------------------------------------------------------------------------


def registered(tmp_path: Path, story: Story, name: str, text: str = "old", *, is_reward: bool = False) -> str:
    """Put a version into the registry, as an earlier run left it; returns the name to pin."""
    directory = tmp_path / "earlier" / f"{name}-{text}"
    directory.mkdir(parents=True)
    (directory / "model.bin").write_text(text)
    (directory / "tokenizer.json").write_text("{}")
    if is_reward:
        (directory / "calibration.json").write_text(json.dumps(asdict(CALIBRATION)))
    version: ModelVersion = freeze_policy(name, "sft", directory, "9" * 64)
    versions, model = story.registry.versions, story.registry.versions.policy_model
    if is_reward:
        model = versions.reward_model
        version = RewardModelVersion(
            name=version.name, path=version.path, sha256=version.sha256, calibration=CALIBRATION
        )
    versions.known[model] = (*versions.entries(model), version)
    return version.name


def test_a_pinned_baseline_is_frozen_as_it_was_registered_and_not_trained(tmp_path: Path, story: Story):
    name = registered(tmp_path, story, "sft_v1")
    summary, watch = tell(tmp_path, override(SPEC, [f"workflow.baseline={name}"]))
    assert story.log == [*(stage for stage in ALL if stage != "sft"), "finish"]
    baseline = story.given["ppo"][1]
    assert (baseline.name, baseline.kind, baseline.parent_sha256) == (name, "sft", "9" * 64)
    assert Path(baseline.path) == folder_of(tmp_path).root / "models" / "sft"
    assert (Path(baseline.path) / "model.bin").read_text() == "old"
    assert ("sft", f"{name}: pinned, not trained") in watch.started
    assert summary.stages[2].line == f"{name}, frozen as the KL reference"


def test_a_resumed_run_takes_its_pinned_versions_from_the_journal(tmp_path: Path, story: Story):
    pins = [
        f"workflow.baseline={registered(tmp_path, story, 'sft_v1')}",
        f"workflow.reward_model={registered(tmp_path, story, 'rm_v1', is_reward=True)}",
    ]
    story.failures["ppo"] = InfrastructureError("machine lost")
    with pytest.raises(InfrastructureError):
        tell(tmp_path, override(SPEC, pins))
    story.failures.clear()
    shutil.rmtree(tmp_path / "earlier")
    summary, _ = tell(tmp_path, override(SPEC, pins), until="ppo")
    assert [line.resumed for line in summary.stages] == [True] * 4 + [False]


def test_another_pin_is_another_baseline_and_a_plain_name_trains_again(tmp_path: Path, story: Story):
    first, second = (registered(tmp_path, story, "sft_v1", text) for text in ("old", "older"))
    told: list[list[str]] = []
    for name in (first, first, second, "sft"):
        story.log.clear()
        tell(tmp_path, override(SPEC, [f"workflow.baseline={name}"]), until="ppo")
        told.append(story.log.copy())
        assert story.given["ppo"][1].name.startswith(name)
    again = LEARNING[3:]
    assert told == [[*LEARNING[:2], *again], [], again, ["sft", *again]]


def test_two_pinned_versions_need_no_rollouts_of_the_baseline(tmp_path: Path, story: Story):
    baseline, reward = (
        registered(tmp_path, story, "sft_v1"),
        registered(tmp_path, story, "rm_v1", is_reward=True),
    )
    spec = override(SPEC, [f"workflow.baseline={baseline}", f"workflow.reward_model={reward}"])
    summary, _ = tell(tmp_path, spec, until="ppo")
    assert story.log == ["snapshot", "base", "ppo"]
    assert journaled(tmp_path) == ["snapshot", "base", "sft", "reward_model", "ppo"]
    assert story.given["ppo"][2].name == reward
    assert [line.name.partition("-")[0] for line in summary.trained] == ["ppo"]


def test_an_unknown_pin_begins_nothing(tmp_path: Path, story: Story):
    name = registered(tmp_path, story, "sft_v1")
    begun: list[str] = []
    unknown = override(SPEC, ["workflow.baseline=sft_v1-00000000"])
    with pytest.raises(BadInputError, match=f"did you mean '{name}'") as caught:
        run_pipeline(unknown, folder_of(tmp_path), RecordingWatch(), begin=lambda: begun.append("begun"))
    assert (caught.value.field, caught.value.value) == ("workflow.baseline", "sft_v1-00000000")
    assert (begun, story.log) == ([], [])
    assert not folder_of(tmp_path).journal.exists()


# --- before anything starts -------------------------------------------------------------------------------------------


def test_rules_no_release_can_follow_are_refused_before_training(tmp_path: Path, story: Story):
    with pytest.raises(BadInputError, match="plan"):
        tell(tmp_path, override(SPEC, ["release.alpha=0.7"]))
    assert story.log == []


@pytest.mark.parametrize("is_there", [True, False])
def test_a_run_begins_once_ray_has_answered(
    tmp_path: Path, story: Story, monkeypatch: pytest.MonkeyPatch, is_there: bool
):
    @contextmanager
    def connected(_address: str, _placement: object) -> Iterator[None]:
        if not is_there:
            raise InfrastructureError("no Ray cluster answers there")
        story.ray.append("up")
        yield

    def begin() -> None:
        story.ray.append("begin")
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "connected", connected)
    with pytest.raises(KeyboardInterrupt if is_there else InfrastructureError):
        pipeline.run_pipeline(SPEC, RunFolder.of(tmp_path, "run-9"), RecordingWatch(), begin=begin)
    assert story.ray == (["up", "begin"] if is_there else [])
    assert story.log == []


def test_the_run_connects_to_the_address_of_the_spec_and_leaves(tmp_path: Path, story: Story):
    tell(tmp_path, override(SPEC, ["cluster.address=ray://head:10001"]), until="ppo")
    assert story.ray == ["up ray://head:10001", "down"]


def test_a_broken_journal_is_refused(tmp_path: Path, story: Story):
    tell(tmp_path, until="ppo")
    path = folder_of(tmp_path).journal
    path.write_text(path.read_text().replace('"stage": "sft"', '"stage": "sfx"'))
    story.log.clear()
    with pytest.raises(TamperedError, match="line 3"):
        tell(tmp_path)
    assert story.log == []


# --- one at a time ----------------------------------------------------------------------------------------------------

_HOLDER = """
import sys
from pathlib import Path
from cluster.records.journal import lock_run
with lock_run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Hold the run folder from another process; how many are started is up to the test."""
    held: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _HOLDER, str(folder_of(tmp_path).root)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(pipeline.__file__).parents[2]
        )
        held.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in held:
        process.kill()
        process.communicate()


def test_a_run_that_another_process_holds_is_refused_and_not_touched(
    tmp_path: Path, story: Story, hold: Callable[[], subprocess.Popen[str]]
):
    other = hold()
    with pytest.raises(InfrastructureError, match=f"in use by process {other.pid}"):
        tell(tmp_path)
    assert (story.log, story.ray) == ([], [])
    assert not folder_of(tmp_path).journal.exists()
    other.kill()
    other.wait()
    summary, _ = tell(tmp_path, until="ppo")
    assert summary.exit_code == 0


def test_the_lock_is_held_while_stages_run_and_free_afterwards(tmp_path: Path, story: Story):
    seen: list[str] = []

    def try_again() -> None:
        with pytest.raises(InfrastructureError, match=f"in use by process {os.getpid()}"):
            tell(tmp_path)
        seen.append("refused")

    happen = story.happen
    story.happen = lambda name, *given: (try_again() if name == "sft" else None, happen(name, *given))[1]  # type: ignore[method-assign]
    tell(tmp_path, until="ppo")
    assert seen == ["refused"]
    tell(tmp_path, until="ppo")
