"""Versions that a spec pins: copied from where they were registered, proved to be what was registered, then used.

A run keeps its own copy, for its journal vouches for what lies in its folder and for nothing else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Final

from cluster.records import CALIBRATION_FILE, freeze, fresh, read_calibration, require_calibrated
from cluster.registry import BASELINE, REWARD_MODEL, ModelVersion, Pins, RegisteredVersions, resolve_pins
from cluster.spec import WorkflowSpec
from rl_actors.contracts import (
    BadInputError,
    Calibration,
    InfrastructureError,
    PolicyVersion,
    RewardModelVersion,
    StageRefusedError,
    TamperedError,
)
from rl_actors.durable import sha256_directory, sha256_file

_TOKENIZER: Final = "tokenizer.json"


def resolve(spec: WorkflowSpec, finished: Collection[str], versions: RegisteredVersions) -> Pins:
    """Look up what the spec pins, and refuse before any stage what a stage would refuse later.

    Of a `finished` stage nothing is asked: from then on the journal vouches for the run's own copy.

    Raises:
        BadInputError: a version that is unknown, gone, of another kind, too short, or of another tokenizer.
        StageRefusedError: a reward model whose stored calibration is worse than the spec allows, or missing.
        TamperedError: a version that is not what was registered.
    """
    pins = resolve_pins(spec.workflow, versions)
    baseline = pins.baseline if "sft" not in finished else None
    if baseline:
        require_registered(registered_directory(BASELINE, baseline), baseline)
        require_long_enough(baseline, spec.model.max_length)
    if pins.reward_model and "reward_model" not in finished:
        directory = registered_directory(REWARD_MODEL, pins.reward_model)
        require_registered(directory, pins.reward_model)
        accepted_calibration(spec, pins.reward_model, directory)
        if baseline:
            require_same_tokenizer(pins.reward_model, directory, Path(baseline.path))
    return pins


def detail(pin: ModelVersion | None, training_detail: str) -> str:
    """Return what a stage that trains, or adopts a version instead, tells the person who watches."""
    return f"{pin.name}: pinned, not trained" if pin else training_detail


def baseline_of(
    pins: Pins, base: PolicyVersion, directory: Path, note: Callable[[str], None], train: Callable[[], PolicyVersion]
) -> PolicyVersion:
    """Return the frozen baseline: the version the spec pins, or one trained from the base model."""
    pin, reward = pins.baseline, pins.reward_model
    if pin is None:
        if reward is not None:  # a trained baseline will have the base model's tokenizer
            require_same_tokenizer(reward, registered_directory(REWARD_MODEL, reward), Path(base.path))
        return train()
    # Registered by an older seatrial, which did not write it down; the bundle must name some base model.
    if not pin.parent_sha256:
        note(f"{pin.name} was registered without its base model; the bundle names this run's")
    return replace(pin, path=str(adopt(BASELINE, pin, directory)))


def reward_model_of(
    spec: WorkflowSpec,
    pin: RewardModelVersion | None,
    baseline: PolicyVersion,
    directory: Path,
    train: Callable[[], RewardModelVersion],
) -> RewardModelVersion:
    """Return the reward model: the version the spec pins, or one trained on the ranked rollouts of the baseline.

    Raises:
        BadInputError: its tokenizer is not the baseline's, or its directory is gone.
        StageRefusedError: it is not calibrated.
    """
    if pin is None:
        return train()
    # Of the copy, not of the source: what is read is then what is used.
    adopt(REWARD_MODEL, pin, directory)
    calibration = accepted_calibration(spec, pin, directory)
    require_same_tokenizer(pin, directory, Path(baseline.path))
    return replace(pin, path=str(directory), calibration=calibration)


def adopt(field: str, pin: ModelVersion, directory: Path) -> Path:
    """Copy a registered version to `directory`, read-only; nothing is there before the copy is proved."""
    source = registered_directory(field, pin)
    # Beside it first: the version may be the very one that this run left at `directory`.
    copy = fresh(directory.with_name(f"{directory.name}.pinned"))
    try:
        shutil.copytree(source, copy, dirs_exist_ok=True)
    except OSError as error:
        raise InfrastructureError(f"{pin.name}: {source} cannot be copied to {copy}: {error}; free space") from error
    require_registered(copy, pin)
    freeze(copy)
    return copy.replace(fresh(directory))


def registered_directory(field: str, pin: ModelVersion) -> Path:
    """Return where a version's weights lie. Raises BadInputError when they are gone."""
    path = Path(pin.path)
    if not path.is_dir():
        remedy = f"its weights are gone from {path}; restore that directory, or give a name without hash to train one"
        raise BadInputError(field, pin.name, remedy)
    return path


def require_registered(directory: Path, pin: ModelVersion) -> None:
    """Prove that a directory holds what was registered. Raises TamperedError."""
    found = sha256_directory(directory)
    if found != pin.sha256:
        raise TamperedError(
            f"{pin.path}: sha256 is {found[:16]}, {pin.name} was registered with {pin.sha256[:16]}; "
            "restore it or pin another version"
        )


def accepted_calibration(spec: WorkflowSpec, pin: RewardModelVersion, directory: Path) -> Calibration:
    """Return a reward model's stored calibration, which the spec's limits must allow. Raises StageRefusedError."""
    try:
        calibration = read_calibration(directory)
    except (OSError, ValueError, TypeError) as error:
        raise StageRefusedError(
            f"reward model {pin.name} is uncalibrated: no {CALIBRATION_FILE} to believe in {pin.path} "
            f"({type(error).__name__}); pin a calibrated version, or give a name without hash to train one"
        ) from error
    require_calibrated(calibration, max_ece=spec.reward.max_ece, min_pair_accuracy=spec.reward.min_pair_accuracy)
    return calibration


def require_same_tokenizer(pin: RewardModelVersion, directory: Path, other: Path) -> None:
    """Refuse a reward model whose token ids mean something else to the baseline. Raises BadInputError."""
    files = (directory / _TOKENIZER, other / _TOKENIZER)
    if not all(file.is_file() for file in files) or sha256_file(files[0]) != sha256_file(files[1]):
        remedy = (
            f"its {_TOKENIZER} is not the baseline's ({other}), so it would score other texts than it reads; "
            "pin the baseline it was trained on, or give a name without hash to train one"
        )
        raise BadInputError(REWARD_MODEL, pin.name, remedy)


def require_long_enough(pin: PolicyVersion, max_length: int) -> None:
    """Refuse a baseline that cannot read a whole rollout; a model that names no limit has none."""
    file = Path(pin.path) / "config.json"
    config = json.loads(file.read_text(encoding="utf8")) if file.is_file() else {}
    # Not every architecture has a table of positions.
    limit = config.get("max_position_embeddings", max_length)
    if limit < max_length:
        remedy = f"reads at most {limit} tokens, model.max_length is {max_length}; lower that, or pin another version"
        raise BadInputError(BASELINE, pin.name, remedy)
