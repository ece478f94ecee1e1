"""Spec text: a plain tree with line numbers, and each validation error as field, value and remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rl_actors.contracts import BadInputError, nearest

MAX_SPEC_BYTES = 1_000_000  # counted before PyYAML sees it, whose safe loader is slow, being all Python
_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$")


class _SpecLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2."""


# `1e-4` is a number: YAML 1.1, and so PyYAML, wants `1.0e-4` and yields a string otherwise.
_SpecLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecSource:
    """A parsed spec: the plain tree, where it came from and the line of every dotted path."""

    name: str
    tree: Mapping[str, Any]
    lines: Mapping[str, int] = field(default_factory=dict)

    def place(self, path: str) -> str:
        """Return ` (line 7 of spec.yaml)` for a path or its nearest parent, or nothing when the line is unknown."""
        # A missing key has no line of its own: its section's is where to write it.
        while path and path not in self.lines:
            path = path.rpartition(".")[0]
        return f" (line {self.lines[path]} of {self.name})" if path else ""

    def value(self, path: str) -> Any:
        """Return the value at a dotted path, or None when nothing was given there."""
        found: Any = self.tree
        for key in path.split("."):
            if isinstance(found, Mapping):
                found = found.get(key)
            elif isinstance(found, list) and key.isdigit() and int(key) < len(found):
                found = found[int(key)]
            else:
                return None
        return found


def parse_yaml(text: str, name: str) -> SpecSource:
    """Parse a spec. Raises BadInputError for bad syntax, a duplicate key, an alias, or anything but a mapping."""
    if len(text) > MAX_SPEC_BYTES:
        raise BadInputError("spec", name, f"a spec is a page of YAML; this file has {len(text)} characters")
    try:
        loader = _SpecLoader(text)
        node = loader.get_single_node()
        lines: dict[str, int] = {}
        if isinstance(node, yaml.MappingNode):
            _index_lines(node, "", lines, name, open_nodes=())
        tree = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        raise _syntax_error(error, name) from error
    if not isinstance(tree, dict):
        raise BadInputError("spec", name, "must be a YAML mapping with the sections workflow, release and monitoring")
    return SpecSource(name=name, tree=tree, lines=lines)


def _index_lines(
    node: yaml.Node, path: str, lines: dict[str, int], name: str, open_nodes: tuple[yaml.Node, ...]
) -> None:
    """Record the line of every path below `node`."""
    if any(node is parent for parent in open_nodes):
        where = f"(line {node.start_mark.line + 1} of {name})"
        raise BadInputError(path, "*alias", f"an alias may not contain itself {where}")
    children: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.SequenceNode):
        children = [(str(position), item, item) for position, item in enumerate(node.value)]
    elif isinstance(node, yaml.MappingNode):
        children = [(str(key.value), key, value) for key, value in node.value]
    seen: dict[str, int] = {}
    for key, at, value in children:
        child, line = f"{path}.{key}" if path else key, at.start_mark.line + 1
        # PyYAML keeps the last of two equal keys silently.
        if child in seen:
            raise BadInputError(child, "given twice", f"keep one of lines {seen[child]} and {line}")
        seen[child] = lines[child] = line
        _index_lines(value, child, lines, name, (*open_nodes, node))


def _syntax_error(error: yaml.YAMLError, name: str) -> BadInputError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    where = f"line {mark.line + 1} of {name}" if mark else name
    return BadInputError("spec", name, f"not valid YAML at {where}: {problem}; check indentation, quotes and colons")


def leaf_fields(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Return dotted path -> pydantic's record of every knob of a spec model; a list counts as one knob."""
    found: dict[str, FieldInfo] = {}
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found |= leaf_fields(annotation, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = info
    return found


def leaf_paths(model: type[BaseModel]) -> list[str]:
    """Return the dotted path of every knob of a spec model."""
    return list(leaf_fields(model))


def bad_input(error: ValidationError, source: SpecSource, model: type[BaseModel]) -> BadInputError:
    """Turn the first problem of a validation error into field, value and remedy; the others are named."""
    # A misspelled required key is two problems; the misspelling is the one that helps.
    problems = sorted(
        error.errors(include_url=False),
        key=lambda e: (e["type"] != "extra_forbidden", source.lines.get(_dotted(e), 0)),
    )
    first, others = problems[0], problems[1:]
    path = _dotted(first)
    value = first.get("ctx", {}).get("found", source.value(path))
    remedy = _remedy(first, value, path, model) + source.place(path)
    if others:
        remedy += f"; also wrong: {', '.join(dict.fromkeys(map(_dotted, others)))}"
    return BadInputError(path or "spec", value, remedy)


def _dotted(problem: ErrorDetails) -> str:
    context = problem.get("ctx", {})
    return ".".join(str(part) for part in (*problem["loc"], *context.get("below", ())))


def _remedy(problem: ErrorDetails, value: object, path: str, model: type[BaseModel]) -> str:
    if problem["type"] == "extra_forbidden":
        return _unknown_key(path, model)
    if problem["type"] == "missing":
        return "required key is missing; add it"
    if value is None and problem["type"] != "refused":
        return "must not be empty; give a value or remove the key"
    if problem["type"] in {"model_type", "model_attributes_type", "dict_type"}:
        return "must be a mapping of keys to values"
    return problem["msg"].replace("Input should be", "must be")


def _unknown_key(path: str, model: type[BaseModel]) -> str:
    section, _, key = path.rpartition(".")
    knobs = leaf_paths(model)
    prefix = f"{section}." if section else ""
    siblings = list(dict.fromkeys(k[len(prefix) :].partition(".")[0] for k in knobs if k.startswith(prefix)))
    # The very key in another section is likelier meant than one of this section that is only spelled alike.
    elsewhere = [knob for knob in knobs if knob.rpartition(".")[2] == key]
    best = nearest(key, siblings)
    if elsewhere:
        return f"unknown key here; did you mean {elsewhere[0]!r}?"
    if best:
        return f"unknown key; did you mean {'.'.join(filter(None, (section, best)))!r}?"
    return f"unknown key; valid in {section or 'a spec'}: {', '.join(siblings)}"
