"""Workflows by name: packages in this folder, and in the folders that SEATRIAL_WORKFLOWS names."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path

from rl_actors.contracts import BadDataError, BadInputError, Split
from rl_actors.environment import Workflow, WorkflowRef

PATH_VARIABLE = "SEATRIAL_WORKFLOWS"
SPEC_FILE = "spec.yaml"
_PACKAGED = Path(__file__).parent


def known_workflows(environ: Mapping[str, str] = os.environ) -> dict[str, WorkflowRef]:
    """Return workflow name -> where it lives. Raises BadInputError as `user_folders` does."""
    # A packaged workflow wins over a user's, an earlier folder over a later: nobody takes a name over.
    known = {name: WorkflowRef(module=f"{__name__}.{name}") for name in _packages(_PACKAGED)}
    for folder in user_folders(environ):
        for name in _packages(folder):
            known.setdefault(name, WorkflowRef(module=name, search_path=str(folder)))
    return known


def locate_workflow(name: str, environ: Mapping[str, str] = os.environ) -> WorkflowRef:
    """Return where a workflow lives, as plain data that crosses process borders.

    Raises:
        BadInputError: no such workflow; lists the nearest known names.
    """
    known = known_workflows(environ)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or sorted(known)
        remedy = f"no such workflow; nearest known: {', '.join(nearest)}; add folders with {PATH_VARIABLE}"
        raise BadInputError("workflow", name, remedy)
    return known[name]


def spec_file(name: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Return where a workflow's own spec belongs, whether it has one or not. Raises BadInputError for no workflow."""
    return Path(locate_workflow(name, environ).search_path or _PACKAGED) / name / SPEC_FILE


def find_workflow(name: str, environ: Mapping[str, str] = os.environ) -> Workflow:
    """Import the workflow of that name and return its `WORKFLOW`.

    Raises:
        BadInputError: no such workflow.
        BadDataError: the package cannot be imported, has no `WORKFLOW`, or one of another name.
    """
    try:
        workflow = locate_workflow(name, environ).load()
    except AttributeError as error:
        raise BadDataError("workflow", name, f"its package must define WORKFLOW ({error})") from error
    except (ImportError, SyntaxError) as error:
        raise BadDataError("workflow", name, f"its package cannot be imported: {error}; correct it") from error
    # Registry, tickets and traces go by the workflow's own name: a foreign name would move that workflow's aliases.
    own_name = getattr(workflow, "name", "")
    if own_name != name:
        remedy = f"its WORKFLOW.name is {own_name!r}; a workflow is called as its folder is"
        raise BadDataError("workflow", name, remedy)
    return workflow


def most_tasks(workflow: Workflow) -> Mapping[Split, int]:
    """Return how many tasks of a split a workflow can build, whatever the seed; a split left out has no bound."""
    # Not in the protocol: a workflow whose tasks do not run out need not say so.
    return getattr(workflow, "most_tasks", {})


def user_folders(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Return the folders that the environment names, as absolute paths. Raises BadInputError for a missing one."""
    folders = [Path(entry).resolve() for entry in environ.get(PATH_VARIABLE, "").split(os.pathsep) if entry]
    for folder in folders:
        if not folder.is_dir():
            raise BadInputError(PATH_VARIABLE, str(folder), "not a folder; name folders that hold workflow packages")
    return folders


def _packages(folder: Path) -> list[str]:
    """Return the names of the packages directly in a folder that also hold a `tools` module."""
    return sorted(path.parent.name for path in folder.glob("*/__init__.py") if (path.parent / "tools.py").is_file())
