"""Model directories of a run: emptied before a stage writes, then frozen, hashed and named by their hash."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

from rl_actors.contracts import Calibration, PolicyKind, PolicyVersion, StageRefusedError, TamperedError
from rl_actors.durable import sha256_directory

CALIBRATION_FILE: Final = "calibration.json"


def fresh(directory: Path) -> Path:
    """Return the directory, empty: what a killed attempt left there is removed first."""
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    return directory


def freeze(directory: Path) -> str:
    """Take the right to write from every file of a finished model, and return the hash of its content."""
    for file in directory.rglob("*"):
        if file.is_file():
            file.chmod(0o444)
    return sha256_directory(directory)


def freeze_policy(name: str, kind: PolicyKind, directory: Path, parent_sha256: str) -> PolicyVersion:
    """Freeze a finished policy and return its version, whose name carries the hash."""
    # Two contents never share a name: stamps, aliases and pins go by it.
    digest = freeze(directory)
    unique = f"{name}-{digest[:8]}"
    return PolicyVersion(name=unique, kind=kind, path=str(directory), sha256=digest, parent_sha256=parent_sha256)


def require_untouched(version: PolicyVersion) -> None:
    """Prove that a frozen policy is what it was. Raises TamperedError."""
    found = sha256_directory(Path(version.path))
    if found != version.sha256:
        raise TamperedError(f"{version.path}: sha256 is {found[:16]}, frozen as {version.sha256[:16]}; start a new run")


def copy_tokenizer(source: str, target: Path) -> None:
    """Put a model's tokenizer beside other weights: engines load both from one directory."""
    # By name: a whole directory would bring the other model's configuration along.
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        file = Path(source) / name
        if file.exists():
            shutil.copyfile(file, target / name)


def read_calibration(directory: Path) -> Calibration:
    """Read what a reward model was measured on. Raises OSError, ValueError or TypeError where that cannot be read."""
    return Calibration(**json.loads((directory / CALIBRATION_FILE).read_text(encoding="utf8")))


def require_calibrated(calibration: Calibration, *, max_ece: float, min_pair_accuracy: float) -> None:
    """Refuse a miscalibrated or useless reward model. Raises StageRefusedError."""
    # Asked as "not <=": a NaN is refused too. PPO would climb whatever errors pass here.
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
