"""Stages 2 to 4: jobs get what the spec says, a model that cannot be believed is refused, the frozen stays frozen."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.console import metrics_line
from cluster.pipeline import sampling, training
from cluster.pipeline.preferences import read_pairs
from cluster.pipeline.run import _step_metrics
from cluster.pipeline.snapshot import read_tasks, write_snapshot
from cluster.pipeline.training import (
    DRILL_FRACTION,
    copy_drills,
    ppo_settings,
    report_trips,
    train_baseline,
    train_policy,
    train_resources,
    train_reward_model,
)
from cluster.plan.placement import NUM_THREADS
from cluster.records.frozen import copy_tokenizer, freeze_policy, require_untouched
from cluster.registry.entries import metric_points
from cluster.reports.brief import read_learning
from rl_actors.actors.train_jobs import RewardJob, SftJob, TrainResources
from rl_actors.agent.renderers.harmony import HARMONY_TOKENS, HarmonyRenderer
from rl_actors.contracts.errors import InstabilityError, StageRefusedError, TamperedError
from rl_actors.contracts.recipe import MICROBATCH_TOKENS, RECIPES, RESAMPLE_ROUNDS
from rl_actors.contracts.versions import Calibration, DataSnapshot, PolicyVersion, RewardModelVersion
from rl_actors.durable.files import ChainedLog
from rl_actors.durable.hashing import sha256_directory
from rl_actors.durable.metrics_log import read_metrics
from rl_actors.learner import PpoSettings
from rl_actors.training.ppo import LoopState, PpoPorts, PpoSchedule
from rl_actors.training.sft import Example
from tests.cluster.pipeline.fakes import CALIBRATION, NUM_TASKS, DeskRun, Places, make_reward_model, make_run, watch_of

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


def baseline_from(run: DeskRun, snapshot: DataSnapshot, base: PolicyVersion) -> PolicyVersion:
    return train_baseline(run.spec, run.folder, run.prompt, snapshot, base)


def test_the_baseline_learns_every_demonstration(
    run: DeskRun, snapshot: DataSnapshot, base: PolicyVersion, sft_jobs: list[tuple[SftJob, TrainResources]]
):
    baseline_from(run, snapshot, base)
    ((job, _),) = sft_jobs
    assert len(job.examples) == NUM_TASKS["train"]
    for example in job.examples:
        assert any(example.loss_mask)
        assert not example.loss_mask[0]
    assert (job.base, job.metrics) == (base.path, str(run.folder.metrics))


def test_the_loss_is_on_the_assistants_own_tokens(
    run: DeskRun, snapshot: DataSnapshot, base: PolicyVersion, sft_jobs: list[tuple[SftJob, TrainResources]]
):
    baseline_from(run, snapshot, base)
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
    baseline_from(run, snapshot, base)
    ((job, resources),) = sft_jobs
    found = asdict(job.settings)
    assert {name: found[name] for name in ("epochs", "learning_rate", "batch_tokens", "max_grad_norm", "seed")} == {
        "epochs": 5,
        "learning_rate": 0.01,
        "batch_tokens": 512,
        "max_grad_norm": 0.5,
        "seed": 7,
    }
    assert resources == resources_of(run)
    assert (resources.num_workers, resources.num_threads, resources.gpus_per_worker) == (2, NUM_THREADS // 2, 0.0)
    assert Path(resources.storage).is_relative_to(run.folder.root)


def test_the_baseline_is_named_by_the_spec_has_a_tokenizer_and_is_frozen(
    home: Path, snapshot: DataSnapshot, base: PolicyVersion, sft_jobs: list[tuple[SftJob, TrainResources]]
):
    run = make_run(home, "workflow.baseline=mine")
    version = baseline_from(run, snapshot, base)
    assert version.name == f"mine-{version.sha256[:8]}"
    assert (version.kind, version.parent_sha256) == ("sft", base.sha256)
    assert {path.name for path in Path(version.path).iterdir()} >= {*TOKENIZER_FILES, "model.safetensors"}
    require_untouched(version)


def resources_of(run: DeskRun) -> TrainResources:
    return train_resources(run.spec, run.folder)


def test_gpus_of_the_spec_reach_ray_train(home: Path):
    assert resources_of(make_run(home, "cluster.gpus_per_learner=0.5")).gpus_per_worker == 0.5


# --- copy drills ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def renderer(base: PolicyVersion) -> HarmonyRenderer:
    return HarmonyRenderer.from_directory(base.path)


EXAMPLES = tuple(Example(token_ids=(9,) * 300, loss_mask=(True,) * 300) for _ in range(30))


def test_a_model_from_nothing_gets_drills(home: Path, renderer: HarmonyRenderer):
    run = make_run(home, "sft.epochs=1", "sft.batch_tokens=1000")
    drills = copy_drills(run.spec, renderer, EXAMPLES)
    assert len(drills) == int(9_000 / 1_000 * DRILL_FRACTION) == 1
    ids = {token for batch in drills for example in batch for token in example.token_ids}
    assert min(ids) >= len(HARMONY_TOKENS)
    assert max(ids) < len(renderer.vocabulary)


def test_a_model_that_exists_gets_none(home: Path, base: PolicyVersion, renderer: HarmonyRenderer):
    run = make_run(home, "sft.epochs=1", "sft.batch_tokens=1000", f"model.path={base.path}")
    assert copy_drills(run.spec, renderer, EXAMPLES) == ()


def test_drills_are_the_same_for_the_same_seed(home: Path, renderer: HarmonyRenderer):
    settings = ("sft.epochs=1", "sft.batch_tokens=1000")
    first, again = (copy_drills(make_run(home, *settings).spec, renderer, EXAMPLES) for _ in range(2))
    other = copy_drills(make_run(home, *settings, "seed=8", run_id="run-2").spec, renderer, EXAMPLES)
    assert first == again
    assert first != other


def test_drills_reach_the_job(
    home: Path, snapshot: DataSnapshot, base: PolicyVersion, sft_jobs: list[tuple[SftJob, TrainResources]]
):
    baseline_from(make_run(home, "sft.batch_tokens=512", run_id="run-1"), snapshot, base)
    baseline_from(make_run(home, "sft.batch_tokens=512", f"model.path={base.path}", run_id="run-2"), snapshot, base)
    assert [bool(job.drills) for job, _ in sft_jobs] == [True, False]


# --- the reward model -------------------------------------------------------------------------------------------------


@pytest.fixture
def ranked(run: DeskRun) -> DataSnapshot:
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
    return write_snapshot(run.folder.snapshots, tables)


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


def reward_model_from(run: DeskRun, base: PolicyVersion, ranked: DataSnapshot) -> RewardModelVersion:
    rubric = run.workflow.rubric
    pairs, held_out = (read_pairs(ranked, rubric, split) for split in ("train", "calibration"))
    return train_reward_model(run.spec, run.folder, rubric, pairs, held_out, base)


def test_calibration_pairs_never_train(
    run: DeskRun, base: PolicyVersion, ranked: DataSnapshot, reward_jobs: RewardJobs
):
    reward_model_from(run, base, ranked)
    (job,) = reward_jobs.seen
    assert [pair.task_id for pair in job.pairs] == ["t"]
    assert [pair.task_id for pair in job.calibration_pairs] == ["k"]
    assert (job.backbone, job.criteria) == (base.path, tuple(c.name for c in run.workflow.rubric))


def test_the_reward_model_carries_the_calibration_it_was_accepted_on(
    run: DeskRun, base: PolicyVersion, ranked: DataSnapshot, reward_jobs: RewardJobs
):
    version = reward_model_from(run, base, ranked)
    assert version.calibration == CALIBRATION
    assert version.name == f"{run.spec.workflow.reward_model}-{version.sha256[:8]}"
    assert version.sha256 == sha256_directory(Path(version.path))


def test_a_miscalibrated_reward_model_stops_the_run(
    run: DeskRun, base: PolicyVersion, ranked: DataSnapshot, reward_jobs: RewardJobs
):
    reward_jobs.calibration = replace(CALIBRATION, ece=run.spec.reward.max_ece + 0.01)
    with pytest.raises(StageRefusedError, match="miscalibrated"):
        reward_model_from(run, base, ranked)


# --- PPO --------------------------------------------------------------------------------------------------------------


def test_every_ppo_setting_comes_from_the_spec(home: Path):
    given = {
        "learning_rate": 1e-5, "kl_coef": 0.03, "lam": 0.9, "epochs": 2, "max_grad_norm": 0.7, "temperature": 0.8,
    }  # fmt: skip
    run = make_run(home, *(f"ppo.{name}={value}" for name, value in given.items()), "ppo.clip=0.1", "ppo.minibatches=3")
    found = asdict(ppo_settings(run.spec))
    assert ppo_settings(make_run(home, "ppo.target_kl=0.2", run_id="run-2").spec).limits.max_kl == 0.2
    assert {name: found[name] for name in given} == given
    assert (found["clip_low"], found["clip_high"], found["num_minibatches"]) == (0.1, 0.1, 3)
    assert (found["gamma"], found["seed"]) == (1.0, 7)
    assert found["microbatch_tokens"] == MICROBATCH_TOKENS


def test_no_ppo_setting_of_the_spec_is_forgotten(run: DeskRun):
    """Each number that shares its name with a setting has its default's value there: nothing is crossed over."""
    names = {field.name for field in fields(PpoSettings)} & set(type(run.spec.ppo).model_fields) - {"recipe"}
    assert len(names) >= 6
    assert {n: getattr(ppo_settings(run.spec), n) for n in names} == {n: getattr(run.spec.ppo, n) for n in names}


def test_the_learner_updates_by_the_recipe_that_the_spec_chose_and_changed(home: Path):
    settings = ppo_settings(make_run(home, "workflow.policy_training=gspo", "ppo.recipe.correction=none").spec)
    assert settings.recipe == replace(RECIPES["gspo"], correction="none")
    assert ppo_settings(make_run(home, run_id="run-2").spec).recipe == RECIPES["ppo_kl"], "negative control: no changes"


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
    assert ppo_settings(make_run(home, *settings).spec).zero_stage == stage


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
    for module, name in (
        (training, "LearnerGroup"), (sampling, "RolloutPool"), (training, "ScorerPool"), (training, "AttestedSync"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, stage.maker(name))
    monkeypatch.setattr(training, "run_ppo", stage.run_ppo)
    monkeypatch.setattr(training, "placed", stage.places)
    return stage


@pytest.fixture
def baseline(run: DeskRun, base: PolicyVersion) -> PolicyVersion:
    """A frozen baseline of this run's own: tests may break it."""
    directory = run.fresh("models/sft")
    write_model(directory, "sft")
    copy_tokenizer(base.path, directory)
    return freeze_policy("sft", "sft", directory, base.sha256)


def train(run: DeskRun, snapshot: DataSnapshot, baseline: PolicyVersion) -> PolicyVersion:
    reward_model = make_reward_model(run.folder.models / "reward")
    return train_policy(run.spec, run.folder, run.prompt, snapshot, baseline, reward_model, run.watch.note)


def test_ppo_publishes_attested_weights_before_the_first_rollout(
    run: DeskRun, snapshot: DataSnapshot, baseline: PolicyVersion, ppo: PpoStage
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
    run: DeskRun, snapshot: DataSnapshot, baseline: PolicyVersion, ppo: PpoStage
):
    ppo.checkpoint, ppo.kept = 15, {"divergence_watch": [[[0.5], [1.0]]]}
    train(run, snapshot, baseline)
    assert [line for line in ppo.log if line.split()[0] in {"publish", "ppo"}] == ["publish 15", "ppo from 15"]
    assert ppo.loop_state == {"divergence_watch": [[[0.5], [1.0]]]}, "what the loop knew when it was stopped"


def test_the_baseline_is_start_and_kl_reference(
    run: DeskRun, snapshot: DataSnapshot, baseline: PolicyVersion, ppo: PpoStage
):
    train(run, snapshot, baseline)
    learner = ppo.groups["LearnerGroup"]
    assert learner.args == (baseline.path, baseline.path, ppo_settings(run.spec))
    path, settings = ppo.groups["RolloutPool"].args
    assert (path, settings.workflow, settings.limits) == (baseline.path, run.workflow_ref, run.limits)
    assert settings.num_threads == NUM_THREADS
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


def test_ppo_metrics_can_be_followed(run: DeskRun, snapshot: DataSnapshot, baseline: PolicyVersion, ppo: PpoStage):
    ppo.script = lambda ports: ports.report(3, {"reward": 0.25})
    train(run, snapshot, baseline)
    _, row = [json.loads(line) for line in run.folder.metrics.read_text().splitlines()]
    assert (row["stage"], row["step"], row["num_steps"], row["reward"]) == ("ppo", 3, run.spec.ppo.num_steps, 0.25)
    assert watch_of(run).finished == []


@pytest.mark.parametrize("start", [0, 15])
def test_the_first_attestation_is_a_row_like_all_later_ones(
    run: DeskRun, snapshot: DataSnapshot, baseline: PolicyVersion, ppo: PpoStage, start: int
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
    run: DeskRun, snapshot: DataSnapshot, baseline: PolicyVersion, ppo: PpoStage
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
    run: DeskRun, snapshot: DataSnapshot, baseline: PolicyVersion, ppo: PpoStage
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
    run: DeskRun, snapshot: DataSnapshot, baseline: PolicyVersion, ppo: PpoStage
):
    def tamper(_ports: PpoPorts) -> None:
        file = Path(baseline.path) / "model.safetensors"
        file.chmod(0o644)
        file.write_text("moved with the policy")

    ppo.script = tamper
    with pytest.raises(TamperedError, match="frozen as"):
        train(run, snapshot, baseline)


def test_tripwires_are_chained_and_shown(run: DeskRun):
    tripped = report_trips(run.folder.tripwires, run.watch.note)
    tripped(3, ["kl_too_high: kl = 0.9, limit 0.5", "entropy_collapse: entropy = 0.1, limit 0.2"])
    rows = ChainedLog(run.folder.tripwires).rows()
    assert [(row["stage"], row["step"], row["trip"].partition(":")[0]) for row in rows] == [
        ("ppo", 3, "kl_too_high"), ("ppo", 3, "entropy_collapse"),
    ]  # fmt: skip
    assert all(ChainedLog(run.folder.tripwires).chains())
    assert watch_of(run).notes[0] == "ppo step 3: tripwire kl_too_high: kl = 0.9, limit 0.5"


def test_the_tokenizer_is_copied_and_nothing_else(base: PolicyVersion, tmp_path: Path):
    copy_tokenizer(base.path, tmp_path)
    copied = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(copied) >= TOKENIZER_FILES
    assert "config.json" not in copied
    assert not any(name.endswith(".safetensors") for name in copied)
    assert copied["tokenizer.json"] == (Path(base.path) / "tokenizer.json").read_bytes()
    assert HarmonyRenderer.from_directory(str(tmp_path)).stop_token_ids
