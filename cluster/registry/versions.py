"""Registered versions of one workflow, the aliases that name the one in force, and the versions that a spec pins.

A name in a spec that ends in `-` and 8 hex digits, the first of the version's sha256, is a pinned one: it exists
already (`sft_checkpoint_v1-c188eaca`), and the run uses it. Any other (`sft_checkpoint_v1`) is to be trained.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cluster.registry.connection import PARENT, Connection, reported
from cluster.registry.entries import (
    POLICY_TAG,
    Lineage,
    ModelKind,
    ModelVersion,
    kind_of,
    version_description,
    version_of,
    version_tags,
)
from cluster.spec import WorkflowSection, is_pinned
from rl_actors.contracts import (
    BadInputError,
    InfrastructureError,
    PolicyVersion,
    RewardModelVersion,
    TamperedError,
    nearest,
)

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion as RegisteredVersion

BASELINE: Final = "workflow.baseline"
REWARD_MODEL: Final = "workflow.reward_model"
_NUM_SHOWN: Final = 5


class RegisteredVersions:
    """`<workflow>-policy` and `<workflow>-reward-model`. The release controller's `Aliases` for policies.

    Versions are known by the names their makers gave them (`PolicyVersion.name`); MLflow's numbers stay inside.
    """

    def __init__(self, connection: Connection) -> None:
        """Name the two registered models; they are created with their first version."""
        self._connection, self.store = connection, connection.store
        self.policy_model = f"{connection.workflow}-policy"
        self.reward_model = f"{connection.workflow}-reward-model"

    @reported
    def register(self, version: ModelVersion, lineage: Lineage) -> str:
        """Register a version and return its number. Registering the same content again changes nothing.

        A policy is linked with its reward model in both directions.
        """
        model = self.reward_model if isinstance(version, RewardModelVersion) else self.policy_model
        known = self._find(model, version.name, f"tags.`seatrial.sha256` = '{version.sha256}'")
        number = str(known.version) if known else self._create(model, version, lineage)
        if lineage.reward_model:
            tag, client = f"{POLICY_TAG}{number}", self._connection.connect()
            client.set_model_version_tag(self.reward_model, lineage.reward_model, tag, version.name)
            self._describe(self.reward_model, lineage.reward_model)
        return number

    def _create(self, model: str, version: ModelVersion, lineage: Lineage) -> str:
        client = self._connection.connect()
        if not client.search_registered_models(f"name = '{model}'", max_results=1):
            about = f"{self._connection.workflow}: every version names the versions, data and bundle it stands on."
            client.create_registered_model(model, description=about)
        mlflow_run = self._connection.open_run(lineage.stage or PARENT, time.time())
        model_id = self._connection.log_model(version, mlflow_run)
        tags = version_tags(version, lineage, self._connection.run_id) | {"seatrial.logged_model_id": model_id}
        source = Path(version.path).absolute().as_uri()
        if self.store.is_server:  # it cannot see our directories and refuses them: the weights are uploaded, once
            client.log_model_artifacts(model_id, version.path)
            source = f"models:/{model_id}"
        made = client.create_model_version(model, source, run_id=mlflow_run, tags=tags, model_id=model_id)
        self._describe(model, str(made.version))
        return str(made.version)

    def _describe(self, model: str, number: str) -> None:
        """Write the links a human follows."""
        # MLflow draws none between versions, runs and models.
        client = self._connection.connect()
        found = client.get_model_version(model, number)
        experiment_id, workflow = self._connection.experiment_id, self._connection.workflow
        text = version_description(found.tags, experiment_id, str(found.run_id), workflow)
        client.update_model_version(model, number, description=text)

    @reported
    def entries(self, model: str) -> tuple[ModelVersion, ...]:
        """Return what is registered under `policy_model` or `reward_model`, newest first; nothing before the first."""
        found = self._connection.connect().search_model_versions(f"name = '{model}'")
        return tuple(version_of(one.tags) for one in sorted(found, key=lambda one: -int(one.version)))

    def _find(self, model: str, name: str, condition: str = "") -> RegisteredVersion | None:
        """Return the newest version of that name, of this pipeline run if there is one."""
        wanted = f"name = '{model}' and tags.`seatrial.version` = '{name}'" + (f" and {condition}" if condition else "")
        found = self._connection.connect().search_model_versions(wanted)
        # Two runs may use one name, and each means the version it registered itself.
        own = [version for version in found if version.tags.get("seatrial.run_id") == self._connection.run_id]
        return max(own or found, key=lambda version: int(version.version), default=None)

    @reported
    def move(self, alias: str, version: str) -> None:
        """Let an alias (`stable`, `candidate`) name a policy version. Idempotent."""
        found = self._find(self.policy_model, version)
        if found is None:
            raise InfrastructureError(f"{self.policy_model} has no version {version!r}; register the policy first")
        self._connection.connect().set_registered_model_alias(self.policy_model, alias, str(found.version))

    @reported
    def clear(self, alias: str) -> None:
        """Let an alias name nothing. Idempotent, also before the first version."""
        # Asked first: MLflow raises for a model that has no version yet.
        if self._number(alias):
            self._connection.connect().delete_registered_model_alias(self.policy_model, alias)

    @reported
    def alias_version(self, alias: str) -> str:
        """Return the name of the policy version an alias names; empty for none."""
        number = self._number(alias)
        if not number:
            return ""
        return self._connection.connect().get_model_version(self.policy_model, number).tags["seatrial.version"]

    def _number(self, alias: str) -> str:
        found = self._connection.connect().search_registered_models(f"name = '{self.policy_model}'", max_results=1)
        return str(found[0].aliases.get(alias, "")) if found else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """The registered versions a run uses instead of training its own; None where it trains."""

    baseline: PolicyVersion | None = None
    reward_model: RewardModelVersion | None = None

    @property
    def of_baseline(self) -> Mapping[str, str]:
        """What the baseline's stage depends on besides the spec; nothing where it is trained."""
        return {"pinned": self.baseline.sha256} if self.baseline else {}

    @property
    def of_reward_model(self) -> Mapping[str, str]:
        """What the reward model's stage depends on besides the spec; nothing where it is trained."""
        return {"pinned": self.reward_model.sha256} if self.reward_model else {}

    @property
    def need_rollouts(self) -> bool:
        """Whether the baseline is sampled: to train a reward model, and to see what a baseline trained here does."""
        return self.baseline is None or self.reward_model is None


NO_PINS: Final = Pins()


def resolve_pins(workflow: WorkflowSection, versions: RegisteredVersions) -> Pins:
    """Look up what the spec pins; the registry is asked only where it pins something.

    Raises:
        BadInputError: a pinned name that is not registered, or that is a version of another kind.
        InfrastructureError: the registry does not answer.
        TamperedError: the registry names another content than the pinned name does.
    """
    policies, rewards = versions.policy_model, versions.reward_model
    baseline = _resolve(BASELINE, workflow.baseline, "sft", policies, versions)
    reward_model = _resolve(REWARD_MODEL, workflow.reward_model, "reward_model", rewards, versions)
    return Pins(
        baseline=baseline if isinstance(baseline, PolicyVersion) else None,
        reward_model=reward_model if isinstance(reward_model, RewardModelVersion) else None,
    )


def _resolve(field: str, name: str, kind: ModelKind, model: str, versions: RegisteredVersions) -> ModelVersion | None:
    if not is_pinned(name):
        return None
    entries = versions.entries(model)
    usable = [entry.name for entry in entries if kind_of(entry) == kind and is_pinned(entry.name)]
    found = next((entry for entry in entries if entry.name == name), None)
    if found is None:
        raise BadInputError(field, name, f"not registered as a version of {model}; {_choices(name, kind, usable)}")
    if kind_of(found) != kind:
        remedy = f"is a version of kind {kind_of(found)!r}; pin one of kind {kind!r}; {_choices(name, kind, usable)}"
        raise BadInputError(field, name, remedy)
    # Tags can be edited in MLflow's own pages; the name that the spec pins carries the hash.
    if not found.sha256.startswith(name[-8:]):
        raise TamperedError(f"{model} says that {name} has sha256 {found.sha256[:16]}; its tag was changed, restore it")
    return found


def _choices(name: str, kind: ModelKind, usable: Iterable[str]) -> str:
    """Return the nearest and the newest names that could be pinned, and the way without a pin."""
    names = list(dict.fromkeys(usable))
    best = nearest(name, names)
    hint = f"did you mean {best!r}? " if best else ""
    shown = f"newest of kind {kind!r}: {', '.join(names[:_NUM_SHOWN])}" if names else f"none of kind {kind!r} is there"
    return f"{hint}{shown}; a name that does not end in '-' and 8 hex digits is trained instead"
