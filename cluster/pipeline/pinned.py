"""Versions that a spec pins: copied from where they were registered, proved to be what was registered, then used.

A run keeps its own copy, for its journal vouches for what lies in its folder and for nothing else.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

from cluster.pipeline import training
from cluster.pipeline.run import Run, make_read_only
from cluster.registry import BASELINE, REWARD_MODEL, ModelEntry, Pins, Registry, resolve_pins
from rl_actors.contracts import (
    BadInputError,
    Calibration,
    DataSnapshot,
    InfrastructureError,
    PolicyVersion,
    RewardModelVersion,
    StageRefusedError,
    TamperedError,
)
from rl_actors.durable import sha256_directory, sha256_file

_TOKENIZER: Final = "tokenizer.json"


def resolve(run: Run, registry: Registry) -> Pins:
    """Look up what the spec pins, and refuse before any stage what a stage would refuse later.

    Raises:
        BadInputError: a version that is unknown, gone, of another kind, too short, or of another tokenizer.
        StageRefusedError: a reward model whose stored calibration is worse than the spec allows, or missing.
        TamperedError: a version that is not what was registered.
    """
    pins = resolve_pins(run.spec.workflow, registry.versions)
    adopted = {record.stage for record in run.journal.records}  # from then on the journal vouches for the copy
    if pins.baseline and "sft" not in adopted:
        require_registered(registered_directory(BASELINE, pins.baseline), pins.baseline)
        require_long_enough(pins.baseline, run.spec.model.max_length)
    if pins.reward_model and "reward_model" not in adopted:
        require_registered(registered_directory(REWARD_MODEL, pins.reward_model), pins.reward_model)
        accepted_calibration(run, pins.reward_model, Path(pins.reward_model.path))
        if pins.baseline and "sft" not in adopted:
            require_same_tokenizer(pins.reward_model, Path(pins.reward_model.path), Path(pins.baseline.path))
    return pins


def detail(pin: ModelEntry | None, training_detail: str) -> str:
    """Return what a stage that trains, or adopts a version instead, tells the person who watches."""
    return f"{pin.name}: pinned, not trained" if pin else training_detail


def baseline_of(run: Run, pins: Pins, snapshot: DataSnapshot, base: PolicyVersion) -> PolicyVersion:
    """Return the frozen baseline: the version the spec pins, or one trained from the base model."""
    entry, reward = pins.baseline, pins.reward_model
    if entry is None:
        if reward is not None:  # a trained baseline will have the base model's tokenizer
            require_same_tokenizer(reward, registered_directory(REWARD_MODEL, reward), Path(base.path))
        return training.train_baseline(run, snapshot, base)
    if not entry.parent_sha256:
        run.watch.note(f"{entry.name} was registered without its base model; the bundle names this run's")
    path = str(adopt(run, BASELINE, entry, "models/sft"))
    return PolicyVersion(name=entry.name, kind="sft", path=path, sha256=entry.sha256, parent_sha256=entry.parent_sha256)


def reward_model_of(run: Run, pins: Pins, baseline: PolicyVersion, ranked: DataSnapshot) -> RewardModelVersion:
    """Return the reward model: the version the spec pins, or one trained on the ranked rollouts of the baseline.

    Raises:
        BadInputError: its tokenizer is not the baseline's, or its directory is gone.
        StageRefusedError: it is not calibrated.
    """
    entry = pins.reward_model
    if entry is None:
        return training.train_reward_model(run, baseline, ranked)
    directory = adopt(run, REWARD_MODEL, entry, "models/reward")
    calibration = accepted_calibration(run, entry, directory)
    require_same_tokenizer(entry, directory, Path(baseline.path))
    return RewardModelVersion(name=entry.name, path=str(directory), sha256=entry.sha256, calibration=calibration)


def adopt(run: Run, field: str, entry: ModelEntry, name: str) -> Path:
    """Copy a registered version into the run as `name`, read-only; nothing is there before the copy is proved.

    The copy comes first: the version may be the very one that this run left at `name`.
    """
    source = registered_directory(field, entry)
    copy = run.fresh(f"{name}.pinned")
    try:
        shutil.copytree(source, copy, dirs_exist_ok=True)
    except OSError as error:
        raise InfrastructureError(f"{entry.name}: {source} cannot be copied to {copy}: {error}; free space") from error
    require_registered(copy, entry)
    make_read_only(copy)
    return copy.replace(run.fresh(name))


def registered_directory(field: str, entry: ModelEntry) -> Path:
    """Return where a version's weights lie. Raises BadInputError when they are gone."""
    path = Path(entry.path)
    if not path.is_dir():
        remedy = f"its weights are gone from {path}; restore that directory, or give a name without hash to train one"
        raise BadInputError(field, entry.name, remedy)
    return path


def require_registered(directory: Path, entry: ModelEntry) -> None:
    """Prove that a directory holds what was registered. Raises TamperedError."""
    found = sha256_directory(directory)
    if found != entry.sha256:
        raise TamperedError(
            f"{entry.path}: sha256 is {found[:16]}, {entry.name} was registered with {entry.sha256[:16]}; "
            "restore it or pin another version"
        )


def accepted_calibration(run: Run, entry: ModelEntry, directory: Path) -> Calibration:
    """Return a reward model's stored calibration, which the spec's limits must allow. Raises StageRefusedError."""
    limits = run.spec.reward
    try:
        calibration = training.read_calibration(directory)
    except (OSError, ValueError, TypeError) as error:
        raise StageRefusedError(
            f"reward model {entry.name} is uncalibrated: no {training.CALIBRATION_FILE} to believe in {entry.path} "
            f"({type(error).__name__}); pin a calibrated version, or give a name without hash to train one"
        ) from error
    training.require_calibrated(calibration, max_ece=limits.max_ece, min_pair_accuracy=limits.min_pair_accuracy)
    return calibration


def require_same_tokenizer(entry: ModelEntry, directory: Path, other: Path) -> None:
    """Refuse a reward model whose token ids mean something else to the baseline. Raises BadInputError."""
    files = (directory / _TOKENIZER, other / _TOKENIZER)
    if not all(file.is_file() for file in files) or sha256_file(files[0]) != sha256_file(files[1]):
        remedy = (
            f"its {_TOKENIZER} is not the baseline's ({other}), so it would score other texts than it reads; "
            "pin the baseline it was trained on, or give a name without hash to train one"
        )
        raise BadInputError(REWARD_MODEL, entry.name, remedy)


def require_long_enough(entry: ModelEntry, max_length: int) -> None:
    """Refuse a baseline that cannot read a whole rollout; a model that names no limit has none."""
    file = Path(entry.path) / "config.json"
    config = json.loads(file.read_text(encoding="utf8")) if file.is_file() else {}
    limit = config.get("max_position_embeddings", max_length)
    if limit < max_length:
        remedy = f"reads at most {limit} tokens, model.max_length is {max_length}; lower that, or pin another version"
        raise BadInputError(BASELINE, entry.name, remedy)
