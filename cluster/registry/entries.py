"""What goes into the registry, as plain values: stages, models, lineage. Pure; `registry.py` writes them to MLflow."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from rl_actors.contracts import DataSnapshot, PolicyVersion, RewardModelVersion

ModelKind = Literal["base", "sft", "reward_model", "policy"]


_NOT_METRICS: Final = frozenset({"stage", "step", "at"})


_BAD_KEY: Final = re.compile(r"[^\w\-./: ]")


_BAD_NAME: Final = re.compile(r"""[/:.%"']""")


_MAX_PARAM: Final = 6000


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """A model that a stage read or made. `sha256` identifies it; the weights stay where `path` says.

    `parent_sha256` is the model a policy was trained from, "" where there is none or nobody wrote it down.
    """

    name: str
    kind: ModelKind
    path: str
    sha256: str
    parent_sha256: str = ""

    @classmethod
    def of_policy(cls, policy: PolicyVersion) -> ModelEntry:
        """Return the entry of a policy; base model and SFT baseline are told apart from trained policies."""
        kind: ModelKind = policy.kind if policy.kind == "base" or policy.kind == "sft" else "policy"
        parent = policy.parent_sha256
        return cls(name=policy.name, kind=kind, path=policy.path, sha256=policy.sha256, parent_sha256=parent)

    @classmethod
    def of_reward_model(cls, model: RewardModelVersion) -> ModelEntry:
        """Return the entry of a reward model."""
        return cls(name=model.name, kind="reward_model", path=model.path, sha256=model.sha256)


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
    inputs: tuple[ModelEntry, ...] = ()
    outputs: tuple[ModelEntry, ...] = ()
    snapshot: DataSnapshot | None = None


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


def version_tags(entry: ModelEntry, lineage: Lineage, run_id: str) -> dict[str, str]:
    """Return the machine-readable links of a registered version."""
    return {
        "seatrial.version": entry.name,
        "seatrial.kind": entry.kind,
        "seatrial.sha256": entry.sha256,
        "seatrial.parent_sha256": entry.parent_sha256,
        "seatrial.bundle_id": lineage.bundle_id,
        "seatrial.snapshot_sha256": lineage.snapshot_sha256,
        "seatrial.reward_model_version": lineage.reward_model,
        "seatrial.run_id": run_id,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Addresses inside the MLflow UI for one registered version; empty where there is nothing to link."""

    run: str
    logged_model: str
    reward_model: str = ""
    policies: Mapping[str, str] = field(default_factory=dict)


def version_description(entry: ModelEntry, lineage: Lineage, run_id: str, links: Links) -> str:
    """Return the Markdown a human reads on the version's page: MLflow draws no such links by itself."""
    reward = f"[version {lineage.reward_model}]({links.reward_model})" if lineage.reward_model else "none"
    policies = ", ".join(f"[{name}]({address})" for name, address in links.policies.items()) or "none yet"
    partner = f"policies trained on it: {policies}" if entry.kind == "reward_model" else f"reward model: {reward}"
    return "\n".join(
        [
            f"{entry.name} ({entry.kind}), content sha256 `{entry.sha256}`",
            "",
            f"- pipeline run: [{run_id}]({links.run})",
            f"- logged model: [{entry.name}]({links.logged_model})",
            f"- {partner}",
            f"- data snapshot sha256: `{lineage.snapshot_sha256}`",
            f"- bundle: `{lineage.bundle_id}`",
            f"- weights: `{entry.path}`",
        ]
    )
