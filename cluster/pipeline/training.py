"""Stages 1 to 4: the base model, the SFT baseline, the reward model on its own rollouts, and PPO against both."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.pipeline.sampling import open_pool
from cluster.pipeline.snapshot import read_demonstrations, read_tasks
from cluster.plan import NUM_THREADS, place, shape_of, threads_each, zero_stage
from cluster.ray_cluster import placed
from cluster.records import (
    RunFolder,
    copy_tokenizer,
    freeze,
    freeze_policy,
    fresh,
    read_calibration,
    require_calibrated,
    require_untouched,
)
from cluster.spec import ModelSection, WorkflowSpec
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
from rl_actors.agent import (
    HARMONY_TOKENS,
    Renderer,
    demonstration_arrays,
    demonstration_texts,
    renderer_of,
    train_tokenizer,
)
from rl_actors.algorithms import RewardMix, StabilityLimits
from rl_actors.contracts import (
    BATCH_PAIRS,
    MICROBATCH_TOKENS,
    RESAMPLE_ROUNDS,
    DataSnapshot,
    PolicyVersion,
    RewardModelVersion,
)
from rl_actors.durable import ChainedLog, MetricsLog
from rl_actors.environment import RubricCriterion
from rl_actors.learner import PpoSettings
from rl_actors.training import (
    Example,
    PpoPorts,
    PpoSchedule,
    PreferencePair,
    RewardSettings,
    SftSettings,
    drill_batches,
    run_ppo,
)

NUM_PROBES = 4
TIMEOUTS_A_STEP = 10  # longest wait for the rollouts of a step, in time-outs of one request
DRILL_FRACTION = 0.15  # of the batches of demonstrations


def build_base(
    model: ModelSection, seed: int, system_prompt: str, snapshot: DataSnapshot, directory: Path
) -> PolicyVersion:
    """Return the base model with a Harmony tokenizer: the tiny GPT-OSS, or the model the spec names."""
    fresh(directory)
    if model.path:
        _adopt_model(model.path, str(directory), seed)
    else:
        texts = [text for item in read_demonstrations(snapshot) for text in demonstration_texts(system_prompt, item)]
        _build_tiny(model, seed, texts, str(directory))
    return freeze_policy("base", "base", directory, "")


def _build_tiny(shape: ModelSection, seed: int, texts: list[str], directory: str) -> None:
    # Imported here: transformers and torch take seconds, and a resumed run has its base model already.
    from rl_actors.models import build_tiny_model, tiny_config

    tokenizer = train_tokenizer(texts, vocab_size=shape.vocab_size)
    config = tiny_config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_experts=shape.num_experts,
        max_length=shape.max_length,
        eos_token_id=int(tokenizer.eos_token_id),  # pyright: ignore[reportArgumentType]
    )
    build_tiny_model(config, seed=seed).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _adopt_model(path: str, directory: str, seed: int) -> None:
    """Copy a Hugging Face causal LM, adding the Harmony tokens its tokenizer lacks with embeddings drawn by `seed`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    missing = [token for token in HARMONY_TOKENS if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
        # By the spec's seed, and without moving the generator: whoever samples next must not notice.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def train_baseline(
    spec: WorkflowSpec, folder: RunFolder, system_prompt: str, snapshot: DataSnapshot, base: PolicyVersion
) -> PolicyVersion:
    """Fine-tune on the expert's demonstrations; the result is frozen: it is the KL reference from here on."""
    renderer = renderer_of(base.path)
    arrays = [demonstration_arrays(renderer, system_prompt, item) for item in read_demonstrations(snapshot)]
    examples = tuple(Example(token_ids=tuple(ids), loss_mask=tuple(mask)) for ids, mask in arrays)
    directory, sft = fresh(folder.models / "sft"), spec.sft
    settings = SftSettings(
        epochs=sft.epochs,
        learning_rate=sft.learning_rate,
        batch_tokens=sft.batch_tokens,
        max_grad_norm=spec.ppo.max_grad_norm,
        seed=spec.seed,
        # Muon is for a model that is built from nothing; one given by path is never trained by it.
        muon_learning_rate=0.0 if spec.model.path else sft.muon_learning_rate,
    )
    job = SftJob(
        base=base.path,
        output=str(directory),
        metrics=str(folder.metrics),
        examples=examples,
        settings=settings,
        drills=copy_drills(spec, renderer, examples),
    )
    run_sft_job(job, train_resources(spec, folder))
    # The job writes weights only, and an engine loads weights and tokenizer from one directory.
    copy_tokenizer(base.path, directory)
    return freeze_policy(spec.workflow.baseline, "sft", directory, base.sha256)


def copy_drills(spec: WorkflowSpec, renderer: Renderer, examples: Sequence[Example]) -> tuple[list[Example], ...]:
    """Return copy drills for the first batches of a model built from nothing; none for any other."""
    if spec.model.path:
        return ()
    # A model that exists has learned to copy; one from nothing answers no ticket before it can repeat a number.
    num_tokens = sum(len(example.token_ids) for example in examples) * spec.sft.epochs
    count = int(num_tokens / spec.sft.batch_tokens * DRILL_FRACTION)
    rng = random.Random(spec.seed)
    return tuple(drill_batches(count, spec.sft.batch_tokens, renderer.vocabulary, len(HARMONY_TOKENS), rng))


def train_reward_model(
    spec: WorkflowSpec,
    folder: RunFolder,
    rubric: Sequence[RubricCriterion],
    pairs: Sequence[PreferencePair],
    calibration_pairs: Sequence[PreferencePair],
    baseline: PolicyVersion,
) -> RewardModelVersion:
    """Train on pairs and rubric labels, calibrate on other pairs, refuse a model that cannot be believed."""
    directory, reward = fresh(folder.models / "reward"), spec.reward
    job = RewardJob(
        backbone=baseline.path,
        output=str(directory),
        metrics=str(folder.metrics),
        criteria=tuple(criterion.name for criterion in rubric),
        pairs=tuple(pairs),
        calibration_pairs=tuple(calibration_pairs),
        settings=RewardSettings(
            epochs=reward.epochs, learning_rate=reward.learning_rate, batch_pairs=BATCH_PAIRS, seed=spec.seed
        ),
    )
    run_reward_job(job, train_resources(spec, folder))
    # Refused before it is frozen: a stage that raises leaves nothing in the journal.
    calibration = read_calibration(directory)
    require_calibrated(calibration, max_ece=reward.max_ece, min_pair_accuracy=reward.min_pair_accuracy)
    copy_tokenizer(baseline.path, directory)  # a model of token ids means nothing without what made them
    digest = freeze(directory)
    unique = f"{spec.workflow.reward_model}-{digest[:8]}"
    return RewardModelVersion(name=unique, path=str(directory), sha256=digest, calibration=calibration)


def train_policy(
    spec: WorkflowSpec,
    folder: RunFolder,
    system_prompt: str,
    snapshot: DataSnapshot,
    baseline: PolicyVersion,
    reward_model: RewardModelVersion,
    note: Callable[[str], None],
) -> PolicyVersion:
    """Run PPO from the baseline, with the baseline as KL reference; resumes from its newest checkpoint."""
    ppo = spec.ppo
    tasks, probes = read_tasks(snapshot, "train"), probe_sequences(system_prompt, snapshot, baseline)
    log = MetricsLog(folder.metrics, "ppo")
    checkpoints = folder.root / "checkpoints" / "ppo"
    # Kept when training fails, for whoever looks; a finished policy needs none.
    checkpoints.mkdir(parents=True, exist_ok=True)

    def report(step: int, metrics: Mapping[str, float]) -> None:
        log.write(step, {"num_steps": ppo.num_steps, **metrics})

    directory = fresh(folder.models / "ppo")
    with placed(place(spec), "ppo") as options:
        learners, scorers, pool = _start_actors(spec, baseline, reward_model, checkpoints, options)
        sync = AttestedSync(learners, pool, probes, tolerance=ppo.attestation_tolerance)
        start, loop_state = learners.load_newest_checkpoint()
        # A row of its own: the first rollouts are sampled by weights that were proved too.
        report(start, {"attestation_gap": sync.publish(start), "weights_version": float(start)})
        tripped = report_trips(folder.tripwires, note)
        ports = PpoPorts(source=pool, scorer=scorers, learner=learners, sync=sync, report=report, report_trips=tripped)
        run_ppo(tasks, ppo_plan(spec), ports, stability_limits(spec), start=start, loop_state=loop_state)
        learners.save_policy(str(directory))
        # Before their places are given back, last opened first: the pool's engines hold the most memory.
        for group in (pool, scorers, learners):
            group.close()
    # The learner holds the KL reference in its own process: had it moved, the penalty would have meant nothing.
    require_untouched(baseline)
    copy_tokenizer(baseline.path, directory)
    # Optimizer states are several times the policy, and nobody resumes a stage that has finished.
    shutil.rmtree(checkpoints, ignore_errors=True)
    return freeze_policy("ppo_v1", "ppo", directory, baseline.sha256)


def report_trips(file: Path, note: Callable[[str], None]) -> Callable[[int, Sequence[str]], None]:
    """Return a function that writes tripwires, with metric, value and limit, into `file` and shows them."""

    def tripped(step: int, trips: Sequence[str]) -> None:
        for trip in trips:
            ChainedLog(file).append({"stage": "ppo", "step": step, "at": time.time(), "trip": trip})
            note(f"ppo step {step}: tripwire {trip}")

    return tripped


def probe_sequences(system_prompt: str, snapshot: DataSnapshot, baseline: PolicyVersion) -> list[list[int]]:
    """Return the token sequences that every engine must score as the learner does, after each publish."""
    renderer = renderer_of(baseline.path)
    return [
        demonstration_arrays(renderer, system_prompt, item)[0] for item in read_demonstrations(snapshot)[:NUM_PROBES]
    ]


def _start_actors(
    spec: WorkflowSpec,
    baseline: PolicyVersion,
    reward_model: RewardModelVersion,
    checkpoints: Path,
    options: Options,
) -> tuple[LearnerGroup, ScorerPool, RolloutPool]:
    """Start learners, scorers and rollout workers where placement puts them."""
    ppo = spec.ppo
    learners = LearnerGroup(
        baseline.path,
        baseline.path,
        ppo_settings(spec),
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
    pool = open_pool(
        spec,
        baseline,
        options,
        num_threads=threads_each(ppo.num_rollout_workers),
        wants_routes=spec.recipe.routing == "replay",
        num_timeouts=TIMEOUTS_A_STEP,
    )
    return learners, scorers, pool


def ppo_plan(spec: WorkflowSpec) -> PpoSchedule:
    """Return the loop's plan from the spec."""
    ppo = spec.ppo
    return PpoSchedule(
        num_steps=ppo.num_steps,
        tasks_per_step=ppo.tasks_per_step,
        rollouts_per_task=ppo.rollouts_per_task,
        checkpoint_every=ppo.checkpoint_every,
        seed=spec.seed,
        temperature=ppo.temperature,
        resample_rounds=RESAMPLE_ROUNDS if spec.recipe.drop_flat_groups else 0,
    )


def ppo_settings(spec: WorkflowSpec) -> PpoSettings:
    """Return the update's settings from the spec."""
    ppo, recipe = spec.ppo, spec.recipe
    return PpoSettings(
        learning_rate=ppo.learning_rate,
        kl_coef=ppo.kl_coef,
        clip_low=ppo.clip,
        # DAPO's "clip higher": a recipe may let rare tokens rise further than others fall.
        clip_high=ppo.clip if recipe.clip_high is None else recipe.clip_high,
        gamma=ppo.gamma,
        lam=ppo.lam,
        epochs=ppo.epochs,
        num_minibatches=ppo.minibatches,
        max_grad_norm=ppo.max_grad_norm,
        temperature=ppo.temperature,
        microbatch_tokens=MICROBATCH_TOKENS,
        seed=spec.seed,
        recipe=recipe,
        zero_stage=zero_stage(shape_of(spec.model).params, ppo.num_learners),
        limits=stability_limits(spec),
    )


def stability_limits(spec: WorkflowSpec) -> StabilityLimits:
    """Return the tripwires' limits: the spec's own KL bound, and defaults for the others."""
    return StabilityLimits(max_kl=spec.ppo.target_kl)


def train_resources(spec: WorkflowSpec, folder: RunFolder) -> TrainResources:
    """Return what a Ray Train job reserves."""
    return TrainResources(
        num_workers=spec.ppo.num_learners,
        num_threads=threads_each(spec.ppo.num_learners),
        gpus_per_worker=spec.cluster.gpus_per_learner,
        storage=str(folder.root / "ray_train"),
    )
