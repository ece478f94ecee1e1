"""The workflow spec: read from YAML, overridden knob by knob, and closed to unknown keys.

The article's block is a whole spec: `workflow` says what is trained, `release` how it may reach users, `monitoring`
what is watched. Everything else has a default that runs on one CPU machine; see `cluster/spec/sections.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from cluster.spec.errors import SpecSource, bad_input, parse_yaml
from cluster.spec.sections import (
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
from rl_actors.contracts import RECIPES, BadInputError, Recipe, Split, require_batch_choices, unknown_name

MAX_ROLLBACK_S: Final = 300.0
"""Longest way back to stable: the article's five minutes, and the limit of the gate that times the drill."""
# As `rl_actors.algorithms` checks them, but before hours of training instead of after.
_LIMITED: Final[Mapping[str, Any]] = {
    "dual_clip": Annotated[float | None, Field(gt=1)],
    "value_clip": Annotated[float | None, Field(gt=0)],
    "correction_cap": Annotated[float, Field(ge=1)],
    "correction_floor": Annotated[float | None, Field(ge=0, le=1)],
    "veto": Annotated[float | None, Field(gt=0, lt=1)],
}
_STRICT: Final = ConfigDict(strict=True, allow_inf_nan=False)
_HINTS: Final[Mapping[str, Any]] = get_type_hints(Recipe)
_FIELDS: Final[Mapping[str, TypeAdapter[Any]]] = {
    name: TypeAdapter(_LIMITED.get(name, hint), config=_STRICT) for name, hint in _HINTS.items()
}


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
    # Only what was set: a ramp or charter that follows from other knobs must follow the new ones.
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
    # A path wins over a name: a file called like a workflow is what the working directory shows.
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


def default_charter(spec: WorkflowSpec) -> dict[str, str]:
    """Return the sentences that follow from a spec, by field of the charter."""
    # Nobody has to write a charter: what is left out is said from the numbers that a run is held to.
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
    return {"workload": spec.workflow.target, **spec.charter.model_dump()}


def chosen_recipe(name: str, changes: Mapping[Any, Any]) -> Recipe:
    """Return a named recipe with fields changed.

    Raises:
        BadInputError: An unknown field, a value that the field does not take, or choices that contradict each other.
    """
    return replace(RECIPES[name], **{field: _checked(field, value) for field, value in changes.items()})


def _checked(field: Any, value: object) -> Any:
    if field not in _FIELDS:
        raise BadInputError(f"recipe.{field}", value, unknown_name(str(field), _FIELDS))
    try:
        return _FIELDS[field].validate_python(value)
    except ValidationError as error:
        raise BadInputError(f"recipe.{field}", value, _recipe_remedy(_HINTS[field], value, error)) from error


def _recipe_remedy(hint: Any, value: object, error: ValidationError) -> str:
    """Name the nearest choice and all others, or the type or limit; null where it is a way out."""
    if choices := _choices(hint):
        return unknown_name(str(value), choices)
    remedy = error.errors()[0]["msg"].replace("Input should be", "must be")
    return f"{remedy}, or null to turn it off" if type(None) in get_args(hint) else remedy


def _choices(hint: Any) -> tuple[str, ...]:
    """Return the names in a Literal or in a union of them."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(name for part in get_args(hint) for name in _choices(part))
