"""Stages 2 to 4: jobs get what the spec says, a model that cannot be believed is refused, the frozen stays frozen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.console import metrics_line
from cluster.pipeline import training
from cluster.pipeline.data import read_tasks
from cluster.pipeline.preferences import TABLES
from cluster.pipeline.run import Run, _step_metrics
from cluster.pipeline.snapshot import write_snapshot
from cluster.pipeline.training import (
    DRILL_FRACTION,
    copy_drills,
    copy_tokenizer,
    ppo_settings,
    require_calibrated,
    require_untouched,
    train_baseline,
    train_policy,
    train_resources,
    train_reward_model,
)
from cluster.plan.placement import NUM_THREADS
from cluster.registry.entries import metric_points
from cluster.reports.brief import read_learning
from rl_actors.actors.train_jobs import RewardJob, SftJob, TrainResources
from rl_actors.agent.renderers.harmony import HARMONY_TOKENS, HarmonyRenderer
from rl_actors.contracts.errors import InstabilityError, StageRefusedError, TamperedError
from rl_actors.contracts.recipe import MICROBATCH_TOKENS, RECIPES, RESAMPLE_ROUNDS
from rl_actors.contracts.versions import Calibration, DataSnapshot, PolicyVersion
from rl_actors.durable.hashing import sha256_directory
from rl_actors.durable.metrics_log import read_metrics
from rl_actors.learner import PpoSettings
from rl_actors.training.ppo import LoopState, PpoPorts, PpoSchedule
from rl_actors.training.sft import Example
from tests.cluster.pipeline.fakes import CALIBRATION, NUM_TASKS, Places, make_reward_model, make_run, watch_of

TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}


def write_model(directory: str | Path, text: str = "weights") -> None:
    """What a training job leaves: weights and a configuration, no tokenizer."""
    (Path(directory) / "config.json").write_text(json.dumps({"model_type": "gpt_oss", "of": text}))
    (Path(directory) / "model.safetensors").write_text(text)


# --- SFT --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sft_jobs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[SftJob, TrainResources]]:
    """Ray Train jobs that only write files."""
    jobs: list[tuple[SftJob, TrainResources]] = []

    def run_sft_job(job: SftJob, resources: TrainResources) -> None:
        jobs.append((job, resources))
        write_model(job.output)

    monkeypatch.setattr(training, "run_sft_job", run_sft_job)
    return jobs


def test_the_baseline_learns_every_demonstration(
    run: Run, snapshot: DataSnapshot, base: PolicyVersion, sft_jobs: list[tuple[SftJob, TrainResources]]
):
    train_baseline(run, snapshot, base)
    ((job, _),) = sft_jobs
    assert len(job.examples) == NUM_TASKS["train"]
    for example in job.examples:
        assert any(example.loss_mask)
        assert not example.loss_mask[0]
    assert (job.base, job.metrics) == (base.path, str(run.folder.metrics))


def test_the_loss_is_on_the_assistants_own_tokens(
    run: Run, snapshot: DataSnapshot, base: PolicyVersion, sft_jobs: list[tuple[SftJob, TrainResources]]
):
    train_baseline(run, snapshot, base)
    renderer = HarmonyRenderer.from_directory(base.path)
    example = sft_jobs[0][0].examples[0]
    prompt = renderer.prompt(run.workflow.system_prompt, [("user", read_tasks(snapshot, "train")[0].prompt)])
    assert list(example.token_ids[: len(prompt)]) == prompt
    assert not any(example.loss_mask[: len(prompt)])
    assert example.loss_mask[len(prompt)]
    assert example.loss_mask[-1]


def test_sft_follows_the_spec(
    home: Path, snapshot: DataSnapshot, base: PolicyVersion, sft_jobs: list[tuple[SftJob, TrainResources]]
):
    sft = ("sft.epochs=5", "sft.learning_rate=0.01", "sft.batch_tokens=512")
    run = make_run(home, *sft, "ppo.max_grad_norm=0.5", "ppo.num_learners=2")
    train_baseline(run, snapshot, base)
    ((job, resources),) = sft_jobs
    found = asdict(job.settings)
    assert {name: found[name] for name in ("epochs", "learning_rate", "batch_tokens", "max_grad_norm", "seed")} == {
        "epochs": 5,
        "learning_rate": 0.01,
        "batch_tokens": 512,
        "max_grad_norm": 0.5,
        "seed": 7,
    }
    assert resources == train_resources(run)
    assert (resources.num_workers, resources.num_threads, resources.gpus_per_worker) == (2, NUM_THREADS // 2, 0.0)
    assert Path(resources.storage).is_relative_to(run.folder.root)


def test_the_baseline_is_named_by_the_spec_has_a_tokenizer_and_is_frozen(
    home: Path, snapshot: DataSnapshot, base: PolicyVersion, sft_jobs: list[tuple[SftJob, TrainResources]]
):
    run = make_run(home, "workflow.baseline=mine")
    version = train_baseline(run, snapshot, base)
    assert version.name == f"mine-{version.sha256[:8]}"
    assert (version.kind, version.parent_sha256) == ("sft", base.sha256)
    assert {path.name for path in Path(version.path).iterdir()} >= {*TOKENIZER_FILES, "model.safetensors"}
    require_untouched(version)


def test_gpus_of_the_spec_reach_ray_train(home: Path):
    assert train_resources(make_run(home, "cluster.gpus_per_learner=0.5")).gpus_per_worker == 0.5


# --- copy drills ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def renderer(base: PolicyVersion) -> HarmonyRenderer:
    return HarmonyRenderer.from_directory(base.path)


EXAMPLES = tuple(Example(token_ids=(9,) * 300, loss_mask=(True,) * 300) for _ in range(30))


def test_a_model_from_nothing_gets_drills(home: Path, renderer: HarmonyRenderer):
    run = make_run(home, "sft.epochs=1", "sft.batch_tokens=1000")
    drills = copy_drills(run, renderer, EXAMPLES)
    assert len(drills) == int(9_000 / 1_000 * DRILL_FRACTION) == 1
    ids = {token for batch in drills for example in batch for token in example.token_ids}
    assert min(ids) >= len(HARMONY_TOKENS)
    assert max(ids) < len(renderer.vocabulary)


def test_a_model_that_exists_gets_none(home: Path, base: PolicyVersion, renderer: HarmonyRenderer):
    run = make_run(home, "sft.epochs=1", "sft.batch_tokens=1000", f"model.path={base.path}")
    assert copy_drills(run, renderer, EXAMPLES) == ()


def test_drills_are_the_same_for_the_same_seed(home: Path, renderer: HarmonyRenderer):
    settings = ("sft.epochs=1", "sft.batch_tokens=1000")
    first, again = (copy_drills(make_run(home, *settings), renderer, EXAMPLES) for _ in range(2))
    other = copy_drills(make_run(home, *settings, "seed=8", run_id="run-2"), renderer, EXAMPLES)
    assert first == again
    assert first != other


def test_drills_reach_the_job(
    home: Path, snapshot: DataSnapshot, base: PolicyVersion, sft_jobs: list[tuple[SftJob, TrainResources]]
):
    train_baseline(make_run(home, "sft.batch_tokens=512", run_id="run-1"), snapshot, base)
    train_baseline(make_run(home, "sft.batch_tokens=512", f"model.path={base.path}", run_id="run-2"), snapshot, base)
    assert [bool(job.drills) for job, _ in sft_jobs] == [True, False]


# --- the reward model -------------------------------------------------------------------------------------------------


@pytest.fixture
def ranked(run: Run) -> DataSnapshot:
    """Pairs of one train task and of one calibration task."""
    rollouts = [
        {"rollout_id": f"{task}{side}", "task_id": task, "split": split, "success": 1, "token_ids": [1, side]}
        for task, split in (("t", "train"), ("k", "calibration"))
        for side in (0, 1)
    ]
    choices = [
        {"task_id": t, "first_rollout_id": f"{t}0", "second_rollout_id": f"{t}1", "annotator": 0, "prefers_first": 1}
        for t in ("t", "k")
    ]
    labels = [
        {"task_id": r["task_id"], "rollout_id": r["rollout_id"], "criterion": c.name, "annotator": 0, "label": c.low}
        for r in rollouts
        for c in run.workflow.rubric
    ]
    tables = {"rollouts": rollouts, "preferences": choices, "rubric_labels": labels}
    return write_snapshot(run.folder.snapshots, tables, TABLES)


@dataclass
class RewardJobs:
    """Reward jobs that only write files, with the calibration the test says."""

    calibration: Calibration = CALIBRATION
    seen: list[RewardJob] = field(default_factory=list)

    def __call__(self, job: RewardJob, _resources: TrainResources) -> None:
        self.seen.append(job)
        write_model(job.output)
        (Path(job.output) / "calibration.json").write_text(json.dumps(asdict(self.calibration)))


@pytest.fixture
def reward_jobs(monkeypatch: pytest.MonkeyPatch) -> RewardJobs:
    jobs = RewardJobs()
    monkeypatch.setattr(training, "run_reward_job", jobs)
    return jobs


def test_calibration_pairs_never_train(run: Run, base: PolicyVersion, ranked: DataSnapshot, reward_jobs: RewardJobs):
    train_reward_model(run, base, ranked)
    (job,) = reward_jobs.seen
    assert [pair.task_id for pair in job.pairs] == ["t"]
    assert [pair.task_id for pair in job.calibration_pairs] == ["k"]
    assert (job.backbone, job.criteria) == (base.path, tuple(c.name for c in run.workflow.rubric))


def test_the_reward_model_carries_the_calibration_it_was_accepted_on(
    run: Run, base: PolicyVersion, ranked: DataSnapshot, reward_jobs: RewardJobs
):
    version = train_reward_model(run, base, ranked)
    assert version.calibration == CALIBRATION
    assert version.name == f"{run.spec.workflow.reward_model}-{version.sha256[:8]}"
    assert version.sha256 == sha256_directory(Path(version.path))


def test_a_miscalibrated_reward_model_stops_the_run(
    run: Run, base: PolicyVersion, ranked: DataSnapshot, reward_jobs: RewardJobs
):
    reward_jobs.calibration = replace(CALIBRATION, ece=run.spec.reward.max_ece + 0.01)
    with pytest.raises(StageRefusedError, match="miscalibrated"):
        train_reward_model(run, base, ranked)


def test_a_good_calibration_passes_and_its_bounds_are_inclusive():
    require_calibrated(CALIBRATION, max_ece=0.1, min_pair_accuracy=0.6)
    require_calibrated(CALIBRATION, max_ece=CALIBRATION.ece, min_pair_accuracy=CALIBRATION.pair_accuracy)


@pytest.mark.parametrize("ece", [0.1001, 0.5, math.nan, math.inf])
def test_a_bad_calibration_error_is_refused_with_its_numbers(ece: float):
    with pytest.raises(StageRefusedError) as caught:
        require_calibrated(replace(CALIBRATION, ece=ece), max_ece=0.1, min_pair_accuracy=0.6)
    text = str(caught.value)
    assert "miscalibrated" in text
    assert f"{ece:.3f} on 40 held-out pairs, reward.max_ece is 0.1" in text
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("accuracy", [0.599, 0.0, math.nan])
def test_a_useless_ranking_is_refused_with_its_numbers(accuracy: float):
    with pytest.raises(StageRefusedError) as caught:
        require_calibrated(replace(CALIBRATION, pair_accuracy=accuracy), max_ece=0.1, min_pair_accuracy=0.6)
    text = str(caught.value)
    assert "useless" in text
    assert f"{accuracy:.1%} of held-out pairs" in text
    assert "reward.min_pair_accuracy is 0.6" in text


# --- PPO --------------------------------------------------------------------------------------------------------------


def test_every_ppo_setting_comes_from_the_spec(home: Path):
    given = {
        "learning_rate": 1e-5, "kl_coef": 0.03, "lam": 0.9, "epochs": 2, "max_grad_norm": 0.7, "temperature": 0.8,
    }  # fmt: skip
    run = make_run(home, *(f"ppo.{name}={value}" for name, value in given.items()), "ppo.clip=0.1", "ppo.minibatches=3")
    found = asdict(ppo_settings(run))
    assert ppo_settings(make_run(home, "ppo.target_kl=0.2", run_id="run-2")).limits.max_kl == 0.2
    assert {name: found[name] for name in given} == given
    assert (found["clip_low"], found["clip_high"], found["num_minibatches"]) == (0.1, 0.1, 3)
    assert (found["gamma"], found["seed"]) == (1.0, 7)
    assert found["microbatch_tokens"] == MICROBATCH_TOKENS


def test_no_ppo_setting_of_the_spec_is_forgotten(run: Run):
    """Each number that shares its name with a setting has its default's value there: nothing is crossed over."""
    names = {field.name for field in fields(PpoSettings)} & set(type(run.spec.ppo).model_fields) - {"recipe"}
    assert len(names) >= 6
    assert {n: getattr(ppo_settings(run), n) for n in names} == {n: getattr(run.spec.ppo, n) for n in names}


def test_the_learner_updates_by_the_recipe_that_the_spec_chose_and_changed(home: Path):
    settings = ppo_settings(make_run(home, "workflow.policy_training=gspo", "ppo.recipe.correction=none"))
    assert settings.recipe == replace(RECIPES["gspo"], correction="none")
    assert ppo_settings(make_run(home, run_id="run-2")).recipe == RECIPES["ppo_kl"], "negative control: no changes"


LARGER = ("model.hidden_size=2048", "model.num_experts=2", "model.num_layers=30")


@pytest.mark.parametrize(
    ("settings", "stage"),
    [
        (("ppo.num_learners=2",), 0),
        ((*LARGER, "ppo.num_learners=1"), 0),
        ((*LARGER, "ppo.num_learners=2"), 2),
        (("model.path=openai/gpt-oss-20b", "ppo.num_learners=1"), 0),
        (("model.path=openai/gpt-oss-20b", "ppo.num_learners=2"), 3),
    ],
)
def test_learners_are_sharded_as_far_as_the_model_is_large(home: Path, settings: tuple[str, ...], stage: int):
    assert ppo_settings(make_run(home, *settings)).zero_stage == stage


class Group:
    """One group of actors that writes into the stage's log what happens to it."""

    def __init__(self, stage: PpoStage, kind: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        self.stage, self.kind, self.args, self.options = stage, kind, args, options
        stage.log.append(f"start {kind}")

    def load_newest_checkpoint(self) -> tuple[int, LoopState]:
        return self.stage.checkpoint, self.stage.kept

    def save_policy(self, directory: str) -> None:
        self.stage.log.append("save")
        write_model(directory, "ppo")

    def publish(self, weights_version: int) -> float:
        self.stage.log.append(f"publish {weights_version}")
        return 0.004

    def close(self) -> None:
        self.stage.log.append(f"close {self.kind}")


@dataclass
class PpoStage:
    """All of PPO without an actor: groups that only remember, and a loop that does what the test says."""

    log: list[str] = field(default_factory=list)
    groups: dict[str, Group] = field(default_factory=dict)
    places: Places = field(default_factory=Places)
    checkpoint: int = 0
    kept: LoopState = field(default_factory=dict)
    script: Callable[[PpoPorts], None] = lambda ports: None
    plan: PpoSchedule | None = None
    tasks: Sequence[Any] = ()
    loop_state: LoopState | None = None

    def maker(self, kind: str) -> Callable[..., Group]:
        def make(*args: Any, **options: Any) -> Group:
            self.groups[kind] = Group(self, kind, args, options)
            return self.groups[kind]

        return make

    def run_ppo(
        self,
        tasks: Sequence[Any],
        plan: PpoSchedule,
        ports: PpoPorts,
        _limits: object,
        *,
        start: int,
        loop_state: LoopState,
    ) -> None:
        self.log.append(f"ppo from {start}")
        self.tasks, self.plan, self.loop_state = tasks, plan, loop_state
        self.script(ports)


@pytest.fixture
def ppo(monkeypatch: pytest.MonkeyPatch) -> PpoStage:
    stage = PpoStage()
    for name in ("LearnerGroup", "RolloutPool", "ScorerPool", "AttestedSync"):
        monkeypatch.setattr(training, name, stage.maker(name))
    monkeypatch.setattr(training, "run_ppo", stage.run_ppo)
    monkeypatch.setattr(training, "placed", stage.places)
    return stage


@pytest.fixture
def baseline(run: Run, base: PolicyVersion) -> PolicyVersion:
    """A frozen baseline of this run's own: tests may break it."""
    directory = run.fresh("models/sft")
    write_model(directory, "sft")
    copy_tokenizer(base.path, directory)
    return run.policy("sft", "sft", directory, base.sha256)


def train(run: Run, snapshot: DataSnapshot, baseline: PolicyVersion) -> PolicyVersion:
    return train_policy(run, snapshot, baseline, make_reward_model(run.folder.root / "models/reward"))


def test_ppo_publishes_attested_weights_before_the_first_rollout(
    run: Run, snapshot: DataSnapshot, baseline: PolicyVersion, ppo: PpoStage
):
    train(run, snapshot, baseline)
    assert ppo.log == [
        "start LearnerGroup",
        "start ScorerPool",
        "start RolloutPool",
        "start AttestedSync",
        "publish 0",
        "ppo from 0",
        "save",
        "close RolloutPool",
        "close ScorerPool",
        "close LearnerGroup",
    ]
    assert (ppo.places.stages, ppo.places.open) == (["ppo"], 0)


def test_ppo_goes_on_from_its_newest_checkpoint(
    run: Run, snapshot: DataSnapshot, baseline: PolicyVersion, ppo: PpoStage
):
    ppo.checkpoint, ppo.kept = 15, {"divergence_watch": [[[0.5], [1.0]]]}
    train(run, snapshot, baseline)
    assert [line for line in ppo.log if line.split()[0] in {"publish", "ppo"}] == ["publish 15", "ppo from 15"]
    assert ppo.loop_state == {"divergence_watch": [[[0.5], [1.0]]]}, "what the loop knew when it was stopped"


def test_the_baseline_is_start_and_kl_reference(
    run: Run, snapshot: DataSnapshot, baseline: PolicyVersion, ppo: PpoStage
):
    train(run, snapshot, baseline)
    learner = ppo.groups["LearnerGroup"]
    assert learner.args == (baseline.path, baseline.path, ppo_settings(run))
    assert ppo.groups["RolloutPool"].args == (baseline.path, run.worker_settings)
    assert ppo.groups["ScorerPool"].args[1] == "rm_v1"
    assert ppo.groups["AttestedSync"].options == {"tolerance": run.spec.ppo.attestation_tolerance}
    assert all(len(probe) > 10 for probe in ppo.groups["AttestedSync"].args[2])


def test_ppo_trains_on_train_tasks_as_the_spec_plans(
    home: Path, snapshot: DataSnapshot, base: PolicyVersion, ppo: PpoStage
):
    run = make_run(home, "ppo.num_steps=3", "ppo.tasks_per_step=5", "ppo.rollouts_per_task=2", "ppo.checkpoint_every=2")
    train(run, snapshot, replace(base, kind="sft"))
    assert {task.split for task in ppo.tasks} == {"train"}
    assert ppo.plan == PpoSchedule(num_steps=3, tasks_per_step=5, rollouts_per_task=2, checkpoint_every=2, seed=7)


def test_groups_without_signal_are_sampled_again_where_the_recipe_drops_them(
    home: Path, snapshot: DataSnapshot, base: PolicyVersion, ppo: PpoStage
):
    train(make_run(home, "workflow.policy_training=dapo"), snapshot, replace(base, kind="sft"))
    assert ppo.plan is not None
    assert ppo.plan.resample_rounds == RESAMPLE_ROUNDS > 0


def test_ppo_metrics_can_be_followed(run: Run, snapshot: DataSnapshot, baseline: PolicyVersion, ppo: PpoStage):
    ppo.script = lambda ports: ports.report(3, {"reward": 0.25})
    train(run, snapshot, baseline)
    _, row = [json.loads(line) for line in run.folder.metrics.read_text().splitlines()]
    assert (row["stage"], row["step"], row["num_steps"], row["reward"]) == ("ppo", 3, run.spec.ppo.num_steps, 0.25)
    assert watch_of(run).finished == []


@pytest.mark.parametrize("start", [0, 15])
def test_the_first_attestation_is_a_row_like_all_later_ones(
    run: Run, snapshot: DataSnapshot, baseline: PolicyVersion, ppo: PpoStage, start: int
):
    """Before the loop: also for a run that is stopped in its first step. Readers of learning curves pass it over."""
    ppo.checkpoint = start
    ppo.script = lambda ports: ports.report(start + 1, {"attestation_gap": 0.002, "success": 0.5, "kl": 0.1})
    train(run, snapshot, baseline)
    rows = read_metrics(run.folder.metrics, "ppo")
    assert [(row["step"], row["attestation_gap"]) for row in rows] == [(start, 0.004), (start + 1, 0.002)]
    assert rows[0]["weights_version"] == start
    assert [(point.step, point.success) for point in read_learning(run.folder.metrics)] == [(start + 1, 0.5)]
    gaps = [(point.step, point.value) for point in metric_points(rows, "ppo") if point.key == "attestation_gap"]
    assert gaps == [(start, 0.004), (start + 1, 0.002)], "MLflow draws it from the first"
    assert metrics_line(_step_metrics(rows[0])).startswith("attestation gap 0.004"), "and so does whoever watches"


def test_the_candidate_is_complete_and_its_checkpoints_are_gone(
    run: Run, snapshot: DataSnapshot, baseline: PolicyVersion, ppo: PpoStage
):
    def leave_checkpoint(_ports: PpoPorts) -> None:
        (ppo.groups["LearnerGroup"].options["checkpoints"] / "step_000005").mkdir()

    ppo.script = leave_checkpoint
    version = train(run, snapshot, baseline)
    assert (version.kind, version.parent_sha256) == ("ppo", baseline.sha256)
    assert {path.name for path in Path(version.path).iterdir()} >= {*TOKENIZER_FILES, "model.safetensors"}
    assert version.sha256 == sha256_directory(Path(version.path)) != baseline.sha256
    assert not (run.folder.root / "checkpoints" / "ppo").exists()


def test_unstable_training_keeps_its_checkpoints_for_whoever_looks_and_gives_its_places_back(
    run: Run, snapshot: DataSnapshot, baseline: PolicyVersion, ppo: PpoStage
):
    def diverge(_ports: PpoPorts) -> None:
        (ppo.groups["LearnerGroup"].options["checkpoints"] / "step_000005").mkdir()
        raise InstabilityError("kl: 9.0")

    ppo.script = diverge
    with pytest.raises(InstabilityError, match="kl"):
        train(run, snapshot, baseline)
    assert ppo.places.open == 0
    assert "save" not in ppo.log
    assert (run.folder.root / "checkpoints" / "ppo" / "step_000005").is_dir()


def test_a_baseline_that_changed_during_training_is_found(
    run: Run, snapshot: DataSnapshot, baseline: PolicyVersion, ppo: PpoStage
):
    def tamper(_ports: PpoPorts) -> None:
        file = Path(baseline.path) / "model.safetensors"
        file.chmod(0o644)
        file.write_text("moved with the policy")

    ppo.script = tamper
    with pytest.raises(TamperedError, match="frozen as"):
        train(run, snapshot, baseline)


# --- frozen -----------------------------------------------------------------------------------------------------------


def test_an_untouched_policy_passes(baseline: PolicyVersion):
    require_untouched(baseline)


@pytest.mark.parametrize("change", ["edit", "add", "remove", "rename"])
def test_every_change_of_a_frozen_policy_is_found(baseline: PolicyVersion, change: str):
    file = Path(baseline.path) / "config.json"
    file.chmod(0o644)
    match change:
        case "edit":
            file.write_text(file.read_text() + " ")
        case "add":
            (Path(baseline.path) / "extra.json").write_text("{}")
        case "remove":
            file.unlink()
        case _:
            file.rename(file.with_name("configuration.json"))
    with pytest.raises(TamperedError) as caught:
        require_untouched(baseline)
    assert baseline.path in str(caught.value)
    assert baseline.sha256[:16] in str(caught.value)
    assert caught.value.exit_code == 3


def test_the_tokenizer_is_copied_and_nothing_else(base: PolicyVersion, tmp_path: Path):
    copy_tokenizer(base.path, tmp_path)
    copied = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(copied) >= TOKENIZER_FILES
    assert "config.json" not in copied
    assert not any(name.endswith(".safetensors") for name in copied)
    assert copied["tokenizer.json"] == (Path(base.path) / "tokenizer.json").read_bytes()
    assert HarmonyRenderer.from_directory(str(tmp_path)).stop_token_ids
