"""Finding workflows by name, packaged and the user's own."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from cluster.workflows import PATH_VARIABLE, find_workflow, known_workflows, locate_workflow, most_tasks, spec_file
from rl_actors.contracts.errors import BadDataError, BadInputError
from rl_actors.environment.workflow import Workflow


def named(name: str) -> str:
    """The body of a package with the smallest workflow."""
    return f"from types import SimpleNamespace\nWORKFLOW = SimpleNamespace(name={name!r})\n"


def write_package(folder: Path, name: str, body: str, *, has_tools: bool = True) -> None:
    """Write a minimal workflow package."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(body)
    if has_tools:
        (folder / name / "tools.py").write_text("WORLD = None\n")


def test_packaged_workflow_is_found() -> None:
    workflow: Workflow = find_workflow("support_desk", {})
    assert workflow.name == "support_desk"
    assert workflow.tools_module == "cluster.workflows.support_desk.tools"


@pytest.mark.parametrize("name", ["suport_desk", "SupportDesk", "desk"])
def test_unknown_name_lists_the_nearest(name: str) -> None:
    with pytest.raises(BadInputError) as caught:
        find_workflow(name, {})
    assert caught.value.field == "workflow"
    assert caught.value.value == name
    assert "support_desk" in caught.value.remedy
    assert PATH_VARIABLE in caught.value.remedy


def test_user_folder_is_searched(tmp_path: Path) -> None:
    write_package(tmp_path / "a", "my_flow_a", named("my_flow_a"))
    write_package(tmp_path / "b", "my_flow_b", named("my_flow_b"))
    environ = {PATH_VARIABLE: os.pathsep.join([str(tmp_path / "a"), "", str(tmp_path / "b")])}
    assert find_workflow("my_flow_a", environ).name == "my_flow_a"
    assert find_workflow("my_flow_b", environ).name == "my_flow_b"
    assert set(known_workflows(environ)) >= {"support_desk", "my_flow_a", "my_flow_b"}


def test_location_crosses_a_process_border(tmp_path: Path) -> None:
    write_package(tmp_path, "my_flow_c", "WORKFLOW = 'c'\n")
    located = locate_workflow("my_flow_c", {PATH_VARIABLE: str(tmp_path)})
    assert located.search_path == str(tmp_path)
    assert pickle.loads(pickle.dumps(located)).load() == "c"


def test_packaged_name_cannot_be_taken_over(tmp_path: Path) -> None:
    write_package(tmp_path, "support_desk", "WORKFLOW = 'impostor'\n")
    assert find_workflow("support_desk", {PATH_VARIABLE: str(tmp_path)}).name == "support_desk"


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="nowhere"):
        find_workflow("support_desk", {PATH_VARIABLE: str(tmp_path / "nowhere")})


def test_package_without_workflow_is_bad_data(tmp_path: Path) -> None:
    write_package(tmp_path, "my_flow_d", "")
    with pytest.raises(BadDataError, match="WORKFLOW"):
        find_workflow("my_flow_d", {PATH_VARIABLE: str(tmp_path)})


@pytest.mark.parametrize(
    ("name", "body", "reason"),
    [
        ("my_flow_f", named("support_desk"), "WORKFLOW.name is 'support_desk'"),
        ("my_flow_g", "WORKFLOW = 3\n", "WORKFLOW.name is ''"),
        ("my_flow_h", "import no_such_module_at_all\n", "no_such_module_at_all"),
        ("my_flow_i", "WORKFLOW = = 3\n", "invalid syntax"),
    ],
)
def test_a_package_that_would_break_a_run_is_bad_data(tmp_path: Path, name: str, body: str, reason: str) -> None:
    write_package(tmp_path, name, body)
    with pytest.raises(BadDataError) as caught:
        find_workflow(name, {PATH_VARIABLE: str(tmp_path)})
    assert (caught.value.field, caught.value.value, caught.value.exit_code) == ("workflow", name, 2)
    assert reason in caught.value.remedy


def test_a_workflows_spec_lies_in_its_package(tmp_path: Path) -> None:
    write_package(tmp_path, "my_flow_j", named("my_flow_j"))
    assert spec_file("my_flow_j", {PATH_VARIABLE: str(tmp_path)}) == tmp_path / "my_flow_j" / "spec.yaml"
    assert spec_file("support_desk", {}).is_file()
    with pytest.raises(BadInputError, match="no such workflow"):
        spec_file("my_flow_j", {})


def test_a_workflow_need_not_say_how_many_tasks_it_has(tmp_path: Path) -> None:
    write_package(tmp_path, "my_flow_k", named("my_flow_k"))
    assert most_tasks(find_workflow("my_flow_k", {PATH_VARIABLE: str(tmp_path)})) == {}
    assert most_tasks(find_workflow("support_desk", {}))["live"] > 8000


def test_package_without_tools_is_no_workflow(tmp_path: Path) -> None:
    write_package(tmp_path, "my_flow_e", "WORKFLOW = 'e'\n", has_tools=False)
    assert "my_flow_e" not in known_workflows({PATH_VARIABLE: str(tmp_path)})
