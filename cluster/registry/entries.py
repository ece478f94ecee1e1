"""The plain values that are written to MLflow, and their tags, keys and texts. Pure; the connection writes them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from rl_actors.contracts import Calibration, DataSnapshot, PolicyVersion, RewardModelVersion

ModelVersion: TypeAlias = PolicyVersion | RewardModelVersion
ModelKind = Literal["base", "sft", "reward_model", "policy"]

# On a reward model, before the number of a policy that was trained on it.
POLICY_TAG: Final = "seatrial.policy."
_NOT_METRICS: Final = frozenset({"stage", "step", "at"})
_CALIBRATION_TAGS: Final = ("num_pairs", "pair_accuracy", "ece", "brier", "temperature")
_BAD_KEY: Final = re.compile(r"[^\w\-./: ]")
_BAD_NAME: Final = re.compile(r"""[/:.%"']""")
_MAX_PARAM: Final = 6000  # MLflow refuses longer values


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLinks:
    """What a stage read and made, as MLflow draws it."""

    inputs: tuple[ModelVersion, ...] = ()
    outputs: tuple[ModelVersion, ...] = ()
    snapshot: DataSnapshot | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLog:
    """One finished stage. Times are Unix seconds; `rows` are lines of metrics.jsonl, other stages' are left out."""

    stage: str
    started_at: float
    finished_at: float
    params: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    rows: Iterable[Mapping[str, Any]] = ()
    artifacts: tuple[Path, ...] = ()
    links: StageLinks = StageLinks()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """What a registered version stands on. `reward_model` is the version number in the registry, "" for none."""

    bundle_id: str
    snapshot_sha256: str
    reward_model: str = ""
    stage: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricPoint:
    """One point of a curve; `at_ms` in Unix milliseconds."""

    key: str
    value: float
    step: int
    at_ms: int


def metric_points(rows: Iterable[Mapping[str, Any]], stage: str) -> Iterator[MetricPoint]:
    """Yield the numbers in a stage's metric rows; text, flags and non-finite values draw no curve."""
    for row in rows:
        if row.get("stage") != stage:
            continue
        step, at_ms = int(row.get("step", 0)), int(float(row.get("at", 0.0)) * 1000)
        for key, value in flatten(row).items():
            if key not in _NOT_METRICS and is_number(value):
                yield MetricPoint(key=key, value=float(value), step=step, at_ms=at_ms)


def is_number(value: object) -> bool:
    """Whether a value is a finite number and not a flag."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys that MLflow accepts."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = prefix + _BAD_KEY.sub("_", str(name))
        flat |= flatten(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def params_of(tree: Mapping[str, Any]) -> dict[str, str]:
    """Return nested settings as MLflow parameters: dotted keys, text values within MLflow's limit."""
    return {key: str(value)[:_MAX_PARAM] for key, value in flatten(tree).items()}


def model_name(name: str) -> str:
    """Return a version's name without the characters MLflow refuses in a LoggedModel's name."""
    return _BAD_NAME.sub("-", name)


def kind_of(version: ModelVersion) -> ModelKind:
    """Return how the registry calls a version; base model and SFT baseline are told apart from trained policies."""
    if isinstance(version, RewardModelVersion):
        return "reward_model"
    return version.kind if version.kind == "base" or version.kind == "sft" else "policy"


def version_tags(version: ModelVersion, lineage: Lineage, run_id: str) -> dict[str, str]:
    """Return the machine-readable links of a registered version, and how far a reward model can be believed."""
    calibration = version.calibration if isinstance(version, RewardModelVersion) else None
    numbers = {f"seatrial.{name}": f"{getattr(calibration, name):g}" for name in _CALIBRATION_TAGS if calibration}
    return {
        "seatrial.version": version.name,
        "seatrial.kind": kind_of(version),
        "seatrial.path": version.path,
        "seatrial.sha256": version.sha256,
        "seatrial.parent_sha256": version.parent_sha256 if isinstance(version, PolicyVersion) else "",
        "seatrial.bundle_id": lineage.bundle_id,
        "seatrial.snapshot_sha256": lineage.snapshot_sha256,
        "seatrial.reward_model_version": lineage.reward_model,
        "seatrial.run_id": run_id,
        **numbers,
    }


def version_of(tags: Mapping[str, Any]) -> ModelVersion:
    """Return the version that the tags of a registered one name.

    The tags hold a calibration's five figures, rounded: whoever uses the model reads the whole beside the weights.
    """
    kind = tags["seatrial.kind"]
    known = {name: tags[f"seatrial.{name}"] for name in ("path", "sha256")}
    if kind == "reward_model":
        # An earlier seatrial wrote these tags after it had registered the model: a kill in between left it without.
        numbers = {name: float(tags.get(f"seatrial.{name}", "nan")) for name in _CALIBRATION_TAGS[1:]}
        num_pairs = int(float(tags.get("seatrial.num_pairs", "0")))
        calibration = Calibration(num_pairs=num_pairs, **numbers, criterion_mae={})
        return RewardModelVersion(name=tags["seatrial.version"], calibration=calibration, **known)
    # The tag does not tell a degraded policy from a trained one; neither can be pinned.
    policy_kind = "ppo" if kind == "policy" else kind
    parent = tags.get("seatrial.parent_sha256", "")
    return PolicyVersion(name=tags["seatrial.version"], kind=policy_kind, parent_sha256=parent, **known)


def version_description(tags: Mapping[str, str], experiment_id: str, mlflow_run: str, workflow: str) -> str:
    """Return the Markdown a human reads on the version's page: MLflow draws no such links by itself."""
    experiment = f"#/experiments/{experiment_id}"
    name, kind, number = (tags[f"seatrial.{key}"] for key in ("version", "kind", "reward_model_version"))
    reward = f"[version {number}](#/models/{workflow}-reward-model/versions/{number})" if number else "none"
    trained = {key.removeprefix(POLICY_TAG): policy for key, policy in tags.items() if key.startswith(POLICY_TAG)}
    linked = [f"[{policy}](#/models/{workflow}-policy/versions/{number})" for number, policy in trained.items()]
    policies = ", ".join(linked) or "none yet"
    partner = f"policies trained on it: {policies}" if kind == "reward_model" else f"reward model: {reward}"
    return "\n".join(
        [
            f"{name} ({kind}), content sha256 `{tags['seatrial.sha256']}`",
            "",
            f"- pipeline run: [{tags['seatrial.run_id']}]({experiment}/runs/{mlflow_run})",
            f"- logged model: [{name}]({experiment}/models/{tags['seatrial.logged_model_id']})",
            f"- {partner}",
            f"- data snapshot sha256: `{tags['seatrial.snapshot_sha256']}`",
            f"- bundle: `{tags['seatrial.bundle_id']}`",
            f"- weights: `{tags['seatrial.path']}`",
        ]
    )
