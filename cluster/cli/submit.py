"""`submit`: the same pipeline as a Ray job, with its log and its exit code."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from rich.text import Text

from cluster.cli.answer import Reply, Scene
from cluster.ray_cluster import connect, entrypoint, follow, submit
from cluster.spec import WorkflowSpec, spec_to_yaml
from cluster.workflows import PATH_VARIABLE, user_folders
from rl_actors.contracts import InfrastructureError

SHIPPED_VARIABLES: Final = ("SEATRIAL_HOME", "MLFLOW_TRACKING_URI")


def submit_and_follow(
    spec: WorkflowSpec, address: str, scene: Scene, *, write: Callable[[str], None], timeout_s: float
) -> Reply:
    """Submit a run, write its log as it grows, and answer with the job's own exit code.

    Raises InfrastructureError when the cluster does not take the job or stops answering; the job itself goes on.
    """
    client = connect(address)
    job_id = submit(client, spec_to_yaml(spec), entrypoint(), shipped_variables())
    # Ctrl-C ends the following, not the job.
    scene.resume = f"the job goes on; ray job logs {job_id} --address {address} --follow"
    write(f"job {job_id} on {address}\n")
    ending = follow(client, job_id, write, timeout_s=timeout_s)
    if ending.missing_module:
        raise InfrastructureError(
            f"job {job_id}: the cluster's python has no {ending.missing_module!r}; start Ray from an activated "
            "environment with seatrial's dependencies (source .venv/bin/activate; ray start --head), on every node"
        )
    code = exit_code_of(client, job_id, ending.succeeded)
    line = f"job {job_id}: {ending.status.lower()}, exit code {code}"
    style = "green" if code == 0 else "red"
    return Reply(data={"job_id": job_id, "status": ending.status}, show=Text(line, style=style), exit_code=code)


def shipped_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that go with a job. Folders of workflows must lie at the same path on the cluster.

    Raises:
        BadInputError: a folder that SEATRIAL_WORKFLOWS names does not exist here.
    """
    shipped = {name: environ[name] for name in SHIPPED_VARIABLES if environ.get(name)}
    # Absolute: the job starts in a working directory of its own, and a relative folder would be looked for there.
    folders = [str(folder) for folder in user_folders(environ)]
    return {**shipped, PATH_VARIABLE: os.pathsep.join(folders)} if folders else shipped


def exit_code_of(client: Any, job_id: str, succeeded: bool) -> int:
    """Return the job's exit code; 1 for a job that failed without one."""
    # A job that was stopped, or whose node died, has none.
    if succeeded:
        return 0
    try:
        code = client.get_job_info(job_id).driver_exit_code
    except (ConnectionError, RuntimeError):
        return 1
    return code if code is not None and code > 0 else 1
