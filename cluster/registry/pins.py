"""Names of versions in a spec: `sft_checkpoint_v1` is to be trained, `sft_checkpoint_v1-c188eaca` exists already.

A pinned name is one that `seatrial status`, the brief and MLflow show: it ends in the first 8 hex digits of the
version's sha256. It is looked up in the registry before a run begins, and the run uses that version.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from cluster.registry.entries import ModelEntry, ModelKind
from cluster.registry.versions import RegisteredVersions
from cluster.spec import WorkflowSection, is_pinned
from rl_actors.contracts import BadInputError, TamperedError, nearest

BASELINE: Final = "workflow.baseline"


REWARD_MODEL: Final = "workflow.reward_model"


_NUM_SHOWN: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """The registered versions a run uses instead of training its own; None where it trains."""

    baseline: ModelEntry | None = None
    reward_model: ModelEntry | None = None

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
    policy, reward = versions.policy_model, versions.reward_model
    return Pins(
        baseline=_resolved(BASELINE, workflow.baseline, "sft", policy, versions),
        reward_model=_resolved(REWARD_MODEL, workflow.reward_model, "reward_model", reward, versions),
    )


def _resolved(field: str, name: str, kind: ModelKind, model: str, versions: RegisteredVersions) -> ModelEntry | None:
    if not is_pinned(name):
        return None
    entries = versions.entries(model)
    usable = [entry.name for entry in entries if entry.kind == kind and is_pinned(entry.name)]
    found = next((entry for entry in entries if entry.name == name), None)
    if found is None:
        raise BadInputError(field, name, f"not registered as a version of {model}; {_choices(name, kind, usable)}")
    if found.kind != kind:
        remedy = f"is a version of kind {found.kind!r}; pin one of kind {kind!r}; {_choices(name, kind, usable)}"
        raise BadInputError(field, name, remedy)
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
