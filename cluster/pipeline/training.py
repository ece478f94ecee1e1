"""Stages 2 to 4: the SFT baseline, the reward model on its own rollouts, and PPO against both."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cluster.pipeline.data import read_demonstrations, read_tasks
from cluster.pipeline.preferences import read_pairs
from cluster.pipeline.run import Run, make_read_only
from cluster.plan import NUM_THREADS, shape_of, threads_each, zero_stage
from cluster.ray_cluster import placed
from rl_actors.actors import (
    AttestedSync,
    LearnerGroup,
    Options,
    RewardJob,
    RolloutPool,
    ScorerPool,
    SftJob,
    TrainResources,
    run_reward_job,
    run_sft_job,
)
from rl_actors.agent import HARMONY_TOKENS, Renderer, demonstration_arrays, renderer_of
from rl_actors.algorithms import RewardMix, StabilityLimits
from rl_actors.contracts import (
    BATCH_PAIRS,
    MICROBATCH_TOKENS,
    RESAMPLE_ROUNDS,
    Calibration,
    DataSnapshot,
    PolicyVersion,
    RewardModelVersion,
    StageRefusedError,
    TamperedError,
)
from rl_actors.durable import ChainedLog, MetricsLog, sha256_directory
from rl_actors.learner import PpoSettings
from rl_actors.training import Example, PpoPorts, PpoSchedule, RewardSettings, SftSettings, drill_batches, run_ppo

NUM_PROBES = 4


CALIBRATION_FILE = "calibration.json"


DRILL_FRACTION = 0.15  # of the batches of demonstrations


def train_baseline(run: Run, snapshot: DataSnapshot, base: PolicyVersion) -> PolicyVersion:
    """Fine-tune on the expert's demonstrations; the result is frozen: it is the KL reference from here on."""
    renderer = renderer_of(base.path)
    system = run.workflow.system_prompt
    arrays = [demonstration_arrays(renderer, system, item) for item in read_demonstrations(snapshot)]
    examples = tuple(Example(token_ids=tuple(ids), loss_mask=tuple(mask)) for ids, mask in arrays)
    directory = run.fresh("models/sft")
    sft = run.spec.sft
    settings = SftSettings(
        epochs=sft.epochs,
        learning_rate=sft.learning_rate,
        batch_tokens=sft.batch_tokens,
        max_grad_norm=run.spec.ppo.max_grad_norm,
        seed=run.spec.seed,
        muon_learning_rate=0.0 if run.spec.model.path else sft.muon_learning_rate,
    )
    job = SftJob(
        base=base.path,
        output=str(directory),
        metrics=str(run.folder.metrics),
        examples=examples,
        settings=settings,
        drills=copy_drills(run, renderer, examples),
    )
    run_sft_job(job, train_resources(run))
    copy_tokenizer(base.path, directory)
    return run.policy(run.spec.workflow.baseline, "sft", directory, base.sha256)


def copy_drills(run: Run, renderer: Renderer, examples: Sequence[Example]) -> tuple[list[Example], ...]:
    """Return copy drills for the first batches of a model built from nothing; none for any other."""
    if run.spec.model.path:
        return ()
    num_tokens = sum(len(example.token_ids) for example in examples) * run.spec.sft.epochs
    count = int(num_tokens / run.spec.sft.batch_tokens * DRILL_FRACTION)
    rng = random.Random(run.spec.seed)
    vocabulary = renderer.vocabulary
    return tuple(drill_batches(count, run.spec.sft.batch_tokens, vocabulary, len(HARMONY_TOKENS), rng))


def train_reward_model(run: Run, baseline: PolicyVersion, preferences: DataSnapshot) -> RewardModelVersion:
    """Train on pairs and rubric labels, calibrate on the calibration split, refuse a model that cannot be believed."""
    directory = run.fresh("models/reward")
    reward = run.spec.reward
    criteria = tuple(criterion.name for criterion in run.workflow.rubric)
    job = RewardJob(
        backbone=baseline.path,
        output=str(directory),
        metrics=str(run.folder.metrics),
        criteria=criteria,
        pairs=read_pairs(preferences, run.workflow.rubric, "train"),
        calibration_pairs=read_pairs(preferences, run.workflow.rubric, "calibration"),
        settings=RewardSettings(
            epochs=reward.epochs, learning_rate=reward.learning_rate, batch_pairs=BATCH_PAIRS, seed=run.spec.seed
        ),
    )
    run_reward_job(job, train_resources(run))
    calibration = read_calibration(directory)
    require_calibrated(calibration, max_ece=reward.max_ece, min_pair_accuracy=reward.min_pair_accuracy)
    copy_tokenizer(baseline.path, directory)  # a model of token ids means nothing without what made them
    make_read_only(directory)
    digest = sha256_directory(directory)
    unique = f"{run.spec.workflow.reward_model}-{digest[:8]}"
    return RewardModelVersion(name=unique, path=str(directory), sha256=digest, calibration=calibration)


def read_calibration(directory: Path) -> Calibration:
    """Read what a reward model was measured on. Raises OSError, ValueError or TypeError where that cannot be read."""
    return Calibration(**json.loads((directory / CALIBRATION_FILE).read_text(encoding="utf8")))


def require_calibrated(calibration: Calibration, *, max_ece: float, min_pair_accuracy: float) -> None:
    """Refuse a miscalibrated or useless reward model: PPO would climb its errors."""
    if not calibration.ece <= max_ece:
        raise StageRefusedError(
            f"reward model is miscalibrated: expected calibration error {calibration.ece:.3f} on "
            f"{calibration.num_pairs} held-out pairs, reward.max_ece is {max_ece}; "
            "add calibration pairs or fewer epochs"
        )
    if not calibration.pair_accuracy >= min_pair_accuracy:
        raise StageRefusedError(
            f"reward model is useless: it ranks {calibration.pair_accuracy:.1%} of held-out pairs as the annotators "
            f"do, reward.min_pair_accuracy is {min_pair_accuracy}; add pairs (reward.num_pairs) or check the labels"
        )


def train_policy(
    run: Run, snapshot: DataSnapshot, baseline: PolicyVersion, reward_model: RewardModelVersion
) -> PolicyVersion:
    """Run PPO from the baseline, with the baseline as KL reference; resumes from its newest checkpoint."""
    ppo = run.spec.ppo
    tasks, probes = read_tasks(snapshot, "train"), probe_sequences(run, snapshot, baseline)
    log = MetricsLog(run.folder.metrics, "ppo")
    checkpoints = run.folder.root / "checkpoints" / "ppo"
    checkpoints.mkdir(parents=True, exist_ok=True)

    def report(step: int, metrics: Mapping[str, float]) -> None:
        log.write(step, {"num_steps": ppo.num_steps, **metrics})

    directory = run.fresh("models/ppo")
    with placed(run.placement, "ppo") as options:
        learners, scorers, pool = _start_actors(run, baseline, reward_model, checkpoints, options)
        sync = AttestedSync(learners, pool, probes, tolerance=ppo.attestation_tolerance)
        start, loop_state = learners.load_newest_checkpoint()
        # A row of its own: the first rollouts are sampled by weights that were proved too.
        report(start, {"attestation_gap": sync.publish(start), "weights_version": float(start)})
        ports = PpoPorts(
            source=pool, scorer=scorers, learner=learners, sync=sync, report=report, report_trips=report_trips(run)
        )
        run_ppo(tasks, ppo_plan(run), ports, stability_limits(run), start=start, loop_state=loop_state)
        learners.save_policy(str(directory))
        for group in (pool, scorers, learners):
            group.close()
    require_untouched(baseline)
    copy_tokenizer(baseline.path, directory)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return run.policy("ppo_v1", "ppo", directory, baseline.sha256)


def report_trips(run: Run) -> Callable[[int, Sequence[str]], None]:
    """Return what writes tripwires down, with metric, value and limit, and shows them; MLflow gets the file too."""

    def tripped(step: int, trips: Sequence[str]) -> None:
        for trip in trips:
            ChainedLog(run.folder.tripwires).append({"stage": "ppo", "step": step, "at": time.time(), "trip": trip})
            run.watch.note(f"ppo step {step}: tripwire {trip}")

    return tripped


def probe_sequences(run: Run, snapshot: DataSnapshot, baseline: PolicyVersion) -> list[list[int]]:
    """Return the token sequences that every engine must score as the learner does, after each publish."""
    renderer, system = renderer_of(baseline.path), run.workflow.system_prompt
    return [demonstration_arrays(renderer, system, item)[0] for item in read_demonstrations(snapshot)[:NUM_PROBES]]


def _start_actors(
    run: Run, baseline: PolicyVersion, reward_model: RewardModelVersion, checkpoints: Path, options: Options
) -> tuple[LearnerGroup, ScorerPool, RolloutPool]:
    """Start learners, scorers and rollout workers where placement puts them."""
    ppo = run.spec.ppo
    learners = LearnerGroup(
        baseline.path,
        baseline.path,
        ppo_settings(run),
        num_ranks=ppo.num_learners,
        num_threads=threads_each(ppo.num_learners),
        options=options,
        checkpoints=checkpoints,
    )
    mix = RewardMix(outcome_weight=ppo.outcome_weight)
    scorers = ScorerPool(
        reward_model.path, reward_model.name, mix, num_scorers=1, num_threads=NUM_THREADS, options=options
    )
    # Last, because it waits for its engines: learners and scorers load meanwhile.
    pool = RolloutPool(
        baseline.path,
        replace(
            run.worker_settings,
            wants_routes=run.spec.recipe.routing == "replay",
            num_threads=threads_each(ppo.num_rollout_workers),
        ),
        num_workers=ppo.num_rollout_workers,
        options=options,
        timeout_s=run.spec.agent.timeout_s * 10,
    )
    return learners, scorers, pool


def ppo_plan(run: Run) -> PpoSchedule:
    """Return the loop's plan from the spec."""
    ppo = run.spec.ppo
    return PpoSchedule(
        num_steps=ppo.num_steps,
        tasks_per_step=ppo.tasks_per_step,
        rollouts_per_task=ppo.rollouts_per_task,
        checkpoint_every=ppo.checkpoint_every,
        seed=run.spec.seed,
        temperature=ppo.temperature,
        resample_rounds=RESAMPLE_ROUNDS if run.spec.recipe.drop_flat_groups else 0,
    )


def require_untouched(version: PolicyVersion) -> None:
    """Prove that a frozen policy is what it was. Raises TamperedError."""
    found = sha256_directory(Path(version.path))
    if found != version.sha256:
        raise TamperedError(f"{version.path}: sha256 is {found[:16]}, frozen as {version.sha256[:16]}; start a new run")


def ppo_settings(run: Run) -> PpoSettings:
    """Return the update's settings from the spec."""
    ppo, recipe = run.spec.ppo, run.spec.recipe
    return PpoSettings(
        learning_rate=ppo.learning_rate,
        kl_coef=ppo.kl_coef,
        clip_low=ppo.clip,
        clip_high=ppo.clip if recipe.clip_high is None else recipe.clip_high,
        gamma=ppo.gamma,
        lam=ppo.lam,
        epochs=ppo.epochs,
        num_minibatches=ppo.minibatches,
        max_grad_norm=ppo.max_grad_norm,
        temperature=ppo.temperature,
        microbatch_tokens=MICROBATCH_TOKENS,
        seed=run.spec.seed,
        recipe=recipe,
        zero_stage=zero_stage(shape_of(run.spec.model).params, ppo.num_learners),
        limits=stability_limits(run),
    )


def stability_limits(run: Run) -> StabilityLimits:
    """Return the tripwires' limits: the spec's own KL bound, and defaults for the others."""
    return StabilityLimits(max_kl=run.spec.ppo.target_kl)


def train_resources(run: Run) -> TrainResources:
    """Return what a Ray Train job reserves."""
    return TrainResources(
        num_workers=run.spec.ppo.num_learners,
        num_threads=threads_each(run.spec.ppo.num_learners),
        gpus_per_worker=run.spec.cluster.gpus_per_learner,
        storage=str(run.folder.root / "ray_train"),
    )


def copy_tokenizer(source: str, target: Path) -> None:
    """Put the base model's tokenizer beside trained weights: engines load both from one directory."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        file = Path(source) / name
        if file.exists():
            shutil.copyfile(file, target / name)
