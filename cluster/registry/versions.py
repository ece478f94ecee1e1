"""Registered versions of one workflow and the aliases that name the version in force; without importing mlflow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from cluster.registry.entries import Lineage, Links, ModelEntry, version_description, version_tags
from cluster.registry.store import reported
from rl_actors.contracts import InfrastructureError, PolicyVersion, RewardModelVersion

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from cluster.registry.entries import ModelKind
    from cluster.registry.registry import Registry


PARENT: Final = "pipeline"


_POLICY_TAG: Final = "seatrial.policy."


class RegisteredVersions:
    """`<workflow>-policy` and `<workflow>-reward-model`. The release controller's `Aliases` for policies.

    Versions are known by the names their makers gave them (`PolicyVersion.name`); MLflow's numbers stay inside.
    """

    def __init__(self, registry: Registry) -> None:
        """Name the two registered models; they are created with their first version."""
        self._registry, self.store = registry, registry.store
        self.policy_model = f"{registry.workflow}-policy"
        self.reward_model = f"{registry.workflow}-reward-model"

    # --- versions -----------------------------------------------------------------------------------------------------

    @reported
    def register_reward_model(self, model: RewardModelVersion, lineage: Lineage) -> str:
        """Register a reward model; returns its version number. Registering the same content again changes nothing."""
        version = self._register(self.reward_model, ModelEntry.of_reward_model(model), lineage)
        for name in ("num_pairs", "pair_accuracy", "ece", "brier", "temperature"):
            value = f"{getattr(model.calibration, name):g}"
            self._registry.connect().set_model_version_tag(self.reward_model, version, f"seatrial.{name}", value)
        return version

    @reported
    def register_policy(self, policy: PolicyVersion, lineage: Lineage) -> str:
        """Register a policy, linked with its reward model in both directions; returns its version number."""
        version = self._register(self.policy_model, ModelEntry.of_policy(policy), lineage)
        if lineage.reward_model:
            tag, client = f"{_POLICY_TAG}{version}", self._registry.connect()
            client.set_model_version_tag(self.reward_model, lineage.reward_model, tag, policy.name)
            self._describe(self.reward_model, lineage.reward_model)
        return version

    def _register(self, model: str, entry: ModelEntry, lineage: Lineage) -> str:
        client = self._registry.connect()
        known = self._find(model, entry.name, f"tags.`seatrial.sha256` = '{entry.sha256}'")
        if known is not None:
            return str(known.version)
        self._ensure(model)
        run_id = self._registry.run(lineage.stage or PARENT, time.time()).info.run_id
        model_id = self._registry.logged_model(entry, run_id)
        tags = version_tags(entry, lineage, self._registry.run_id)
        tags |= {"seatrial.logged_model_id": model_id, "seatrial.path": entry.path}
        source = self._source(entry, model_id)
        created = client.create_model_version(model, source, run_id=run_id, tags=tags, model_id=model_id)
        self._describe(model, str(created.version))
        return str(created.version)

    def _source(self, entry: ModelEntry, model_id: str) -> str:
        """Point at the directory; a server cannot see it and refuses, so there the weights are uploaded, once."""
        if not self.store.is_server:
            return Path(entry.path).absolute().as_uri()
        self._registry.connect().log_model_artifacts(model_id, entry.path)
        return f"models:/{model_id}"

    def _ensure(self, model: str) -> None:
        client = self._registry.connect()
        if client.search_registered_models(f"name = '{model}'", max_results=1):
            return
        about = f"{self._registry.workflow}: every version names the versions, data and bundle it stands on."
        client.create_registered_model(model, description=about)

    def _describe(self, model: str, version: str) -> None:
        """Write the links a human follows: MLflow draws none between versions, runs and models."""
        client = self._registry.connect()
        found = client.get_model_version(model, version)
        tags: Mapping[str, Any] = found.tags
        experiment = f"#/experiments/{self._registry.experiment_id}"
        reward = tags["seatrial.reward_model_version"]
        policies = {key.removeprefix(_POLICY_TAG): name for key, name in tags.items() if key.startswith(_POLICY_TAG)}
        links = Links(
            run=f"{experiment}/runs/{found.run_id}",
            logged_model=f"{experiment}/models/{tags['seatrial.logged_model_id']}",
            reward_model=f"#/models/{self.reward_model}/versions/{reward}",
            policies={name: f"#/models/{self.policy_model}/versions/{number}" for number, name in policies.items()},
        )
        entry = _entry_of(tags)
        lineage = Lineage(
            bundle_id=tags["seatrial.bundle_id"],
            snapshot_sha256=tags["seatrial.snapshot_sha256"],
            reward_model=reward,
        )
        text = version_description(entry, lineage, tags["seatrial.run_id"], links)
        client.update_model_version(model, version, description=text)

    @reported
    def entries(self, model: str) -> tuple[ModelEntry, ...]:
        """Return what is registered under `policy_model` or `reward_model`, newest first; nothing before the first."""
        found = self._registry.connect().search_model_versions(f"name = '{model}'")
        return tuple(_entry_of(one.tags) for one in sorted(found, key=lambda one: -int(one.version)))

    def _find(self, model: str, name: str, condition: str = "") -> ModelVersion | None:
        """Return the newest version of that name, of this pipeline run if there is one."""
        wanted = f"name = '{model}' and tags.`seatrial.version` = '{name}'" + (f" and {condition}" if condition else "")
        found = self._registry.connect().search_model_versions(wanted)
        own = [version for version in found if version.tags.get("seatrial.run_id") == self._registry.run_id]
        return max(own or found, key=lambda version: int(version.version), default=None)

    # --- aliases ------------------------------------------------------------------------------------------------------

    @reported
    def move(self, alias: str, version: str) -> None:
        """Let an alias (`stable`, `candidate`) name a policy version. Idempotent."""
        found = self._find(self.policy_model, version)
        if found is None:
            raise InfrastructureError(f"{self.policy_model} has no version {version!r}; register the policy first")
        self._registry.connect().set_registered_model_alias(self.policy_model, alias, str(found.version))

    @reported
    def clear(self, alias: str) -> None:
        """Let an alias name nothing. Idempotent, also before the first version."""
        if self._alias_number(alias):
            self._registry.connect().delete_registered_model_alias(self.policy_model, alias)

    @reported
    def alias_version(self, alias: str) -> str:
        """Return the name of the policy version an alias names; empty for none."""
        number = self._alias_number(alias)
        if not number:
            return ""
        return self._registry.connect().get_model_version(self.policy_model, number).tags["seatrial.version"]

    def _alias_number(self, alias: str) -> str:
        found = self._registry.connect().search_registered_models(f"name = '{self.policy_model}'", max_results=1)
        return str(found[0].aliases.get(alias, "")) if found else ""


def _entry_of(tags: Mapping[str, Any]) -> ModelEntry:
    """Return the model that the tags of a registered version name."""
    return ModelEntry(
        name=tags["seatrial.version"],
        kind=cast("ModelKind", tags["seatrial.kind"]),
        path=tags["seatrial.path"],
        sha256=tags["seatrial.sha256"],
        parent_sha256=tags.get("seatrial.parent_sha256", ""),
    )
