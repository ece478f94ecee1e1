"""The answers a charter needs beside the workload, which is `workflow.target`: constraints and rollback path.

Nobody has to write them: what is left out is said by the spec itself, from the numbers that a run is held to.


The workflow spec: what the human asked for, read from YAML and closed to unknown keys. At most 60 knobs in all.

The article's block is a whole spec: `workflow` says what is trained, `release` how it may reach users, `monitoring`
what is watched. Everything else has a default that runs on one CPU machine; see `cluster/spec/sections.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from cluster.spec.errors import SpecSource, bad_input, parse_yaml
from cluster.spec.recipe_choice import chosen_recipe
from cluster.spec.sections import (
    ALGORITHMS,
    MONITORS,
    AgentSection,
    CharterSection,
    ClusterSection,
    DataSection,
    ModelSection,
    MonitorName,
    PpoSection,
    ReleaseSection,
    RewardSection,
    Section,
    SftSection,
    WorkflowSection,
    closed_list,
    refuse,
)
from cluster.workflows import PATH_VARIABLE, SPEC_FILE, known_workflows, spec_file
from rl_actors.contracts import BadInputError, Recipe, Split, require_batch_choices, unknown_name

if TYPE_CHECKING:
    pass


MAX_ROLLBACK_S: Final = 300.0
"""Longest way back to stable: the article's five minutes, and the limit of the gate that times the drill."""


def default_charter(spec: WorkflowSpec) -> dict[str, str]:
    """Return the sentences that follow from a spec, by field of the charter."""
    agent = spec.agent
    budget = f"{agent.tool_calls} tool calls, {agent.max_tokens_per_turn} tokens a turn and {agent.timeout_s:g} s"
    rules = f"every reply passes all policy checks, a release all {len(spec.release.gates)} gates"
    return {
        "constraints": f"at most {budget} a request; {rules}",
        "rollback_path": f"all sessions back to the stable policy (first {spec.workflow.baseline}) by one split "
        f"record, within {MAX_ROLLBACK_S:g} s",
    }


def charter_answers(spec: WorkflowSpec) -> Mapping[str, str]:
    """Return the three answers by question: none is ever empty, the spec refuses that."""
    charter = spec.charter
    return {
        "workload": spec.workflow.target,
        "constraints": charter.constraints,
        "rollback_path": charter.rollback_path,
    }


__all__ = [
    "ALGORITHMS",
    "MONITORS",
    "ModelSection",
    "WorkflowSpec",
    "load_spec",
    "override",
    "parse_spec",
    "spec_to_yaml",
]


class WorkflowSpec(Section):
    """A whole spec. `WorkflowSpec.model_validate` raises pydantic's error; `load_spec` raises BadInputError."""

    workflow: WorkflowSection
    release: ReleaseSection
    charter: CharterSection = CharterSection()
    monitoring: tuple[MonitorName, ...] = Field(default=MONITORS, strict=False, min_length=1)
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    sft: SftSection = SftSection()
    reward: RewardSection = RewardSection()
    ppo: PpoSection = PpoSection()
    agent: AgentSection = AgentSection()
    cluster: ClusterSection = ClusterSection()
    seed: int = Field(0, ge=0)

    @field_validator("monitoring", mode="before")
    @classmethod
    def _monitors_are_known(cls, names: object) -> object:
        return closed_list(names, MONITORS)

    @model_validator(mode="after")
    def _recipe_is_sound(self) -> WorkflowSpec:
        ppo = self.ppo
        try:
            require_batch_choices(
                self.recipe,
                kl_coef=ppo.kl_coef,
                epochs=ppo.epochs,
                num_minibatches=ppo.minibatches,
                group_size=ppo.rollouts_per_task,
                num_rollouts=ppo.rollouts_per_step,
            )
        except BadInputError as error:
            path = error.field if error.field.startswith("ppo.") else f"ppo.{error.field}"
            raise refuse(error.remedy, *path.split("."), found=error.value) from error
        return self

    @model_validator(mode="after")
    def _charter_is_answered(self) -> WorkflowSpec:
        # As for the ramp: an answer that follows from the spec stays "unset", so that overriding a knob moves it too.
        answers = default_charter(self)
        given = {name for name in self.charter.model_fields_set if getattr(self.charter, name) != answers[name]}
        answers |= {name: getattr(self.charter, name) for name in given}
        object.__setattr__(self, "charter", CharterSection.model_construct(given, **answers))
        return self

    @property
    def recipe(self) -> Recipe:
        """How PPO updates the policy. Raises BadInputError for changes that contradict each other."""
        return chosen_recipe(self.workflow.policy_training, self.ppo.recipe)

    @property
    def num_tasks(self) -> dict[Split, int]:
        """Tasks to build by split."""
        return {split: getattr(self.data, f"num_{split}") for split in get_args(Split)}


def load_spec(path_or_name: str | Path) -> WorkflowSpec:
    """Read a spec from a YAML file, a folder with `spec.yaml`, or by a workflow's name, a user's own included.

    Raises:
        BadInputError: with the field's dotted path, the value found and the remedy, line number included.
    """
    path = _locate(path_or_name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError("spec", str(path), f"cannot be read as UTF-8 text: {error}") from error
    return parse_spec(text, path.name)


def parse_spec(text: str, name: str = "spec.yaml") -> WorkflowSpec:
    """Parse and check a spec's YAML text. Raises BadInputError as `load_spec` does."""
    return _validated(parse_yaml(text, name))


def override(spec: WorkflowSpec, settings: Sequence[str]) -> WorkflowSpec:
    """Return the spec with `key.path=value` settings applied and everything checked again.

    Example: override(spec, ["ppo.num_steps=2", "release.ramp=[5, 50]"])
    """
    tree = spec.model_dump(mode="json", exclude_unset=True)
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals or not path.strip():
            raise BadInputError("--set", setting, "write key=value, for example ppo.num_steps=2")
        _assign(tree, path.strip().split("."), parse_yaml(f"value: {value}", "--set").tree["value"])
    return _validated(SpecSource(name="--set", tree=tree))


def _assign(tree: dict[str, Any], path: Sequence[str], value: object) -> None:
    for key in path[:-1]:
        below = tree.setdefault(key, {})
        if not isinstance(below, dict):
            raise BadInputError(".".join(path), value, f"{key} is a value, not a section")
        tree = below
    tree[path[-1]] = value


def _locate(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    if path.is_file():
        return path
    if (path / SPEC_FILE).is_file():
        return path / SPEC_FILE
    name, known = str(path_or_name), known_workflows()
    if name not in known:
        remedy = f"no such file or workflow; {unknown_name(name, known)}; add folders of your own with {PATH_VARIABLE}"
        raise BadInputError("spec", name, remedy)
    if not spec_file(name).is_file():
        raise BadInputError("spec", name, f"this workflow brings no spec; write {spec_file(name)}, or name a spec file")
    return spec_file(name)


def _validated(source: SpecSource) -> WorkflowSpec:
    try:
        return WorkflowSpec.model_validate(source.tree)
    except ValidationError as error:
        raise bad_input(error, source, WorkflowSpec) from error


def spec_to_yaml(spec: WorkflowSpec) -> str:
    """Return the spec with every default filled in, as YAML that `parse_spec` reads back to an equal spec."""
    tree: Mapping[str, Any] = spec.model_dump(mode="json")
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)
