"""Submit the same pipeline as a Ray job: ship the three packages and the spec, follow the log, stop it."""

from __future__ import annotations

import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cluster.ray_cluster.connection import TOKEN_REMEDY
from rl_actors.contracts import InfrastructureError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


PACKAGES = ("rl_actors", "serving", "cluster")
PROJECT_ROOT = Path(__file__).resolve().parents[2]
SPEC_FILE = "spec.submitted.yaml"
FINAL_STATUSES = ("SUCCEEDED", "FAILED", "STOPPED")
MAX_MISSED_POLLS = 5
SUBMIT_ATTEMPTS, SUBMIT_PAUSE_S = 12, 5.0  # a cluster that has just started gets a minute to find its agent
_NO_AGENT_YET = "No available agent"  # in Ray's own words, for some seconds after `ray start`
_NO_MODULE = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")


class JobClient(Protocol):
    """The part of Ray's JobSubmissionClient that following a job needs."""

    def get_job_status(self, job_id: str) -> str:
        """Return PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
        ...

    def get_job_logs(self, job_id: str) -> str:
        """Return the whole log so far."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnding:
    """How a followed job ended."""

    job_id: str
    status: str
    missing_module: str = ""  # what the cluster's python could not import before the run began

    @property
    def succeeded(self) -> bool:
        """True only for a job that ran to its end and exited with 0."""
        return self.status == "SUCCEEDED"


def connect(address: str) -> JobSubmissionClient:
    """Connect to a cluster's job server, such as `http://127.0.0.1:8265`. Raises InfrastructureError."""
    # Imported here: Ray takes two seconds to import, and most commands need none of it.
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise InfrastructureError(f"the Ray job server at {address} asks for a token; {TOKEN_REMEDY}") from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        message = f"no Ray job server at {address}: {reason}; start one (ray start --head) or correct --address"
        raise InfrastructureError(message) from error


def stage_working_dir(spec_text: str, target: Path, root: Path = PROJECT_ROOT) -> Path:
    """Copy the three packages and the spec to `target`: what a job ships, and nothing else (no .venv, no .git)."""
    # Ray uploads the folder as it is: no .venv and no .git, which are larger than its limit.
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    for package in PACKAGES:
        shutil.copytree(root / package, target / package, ignore=ignore)
    (target / SPEC_FILE).write_text(spec_text, encoding="utf-8")
    return target


def entrypoint(python: str = "python", extra: tuple[str, ...] = ()) -> str:
    """Return the command the job runs on the cluster's head."""
    return shlex.join([python, "-m", "cluster.cli", "run", SPEC_FILE, "--address", "auto", *extra])


def submit(
    client: JobSubmissionClient,
    spec_text: str,
    command: str,
    env: dict[str, str] | None = None,
    *,
    sleep: Callable[[float], object] = time.sleep,
) -> str:
    """Submit a run with its spec as YAML, a command from `entrypoint` and the variables in `env`; return its job id.

    Raises:
        InfrastructureError: The cluster refuses it.
    """
    with tempfile.TemporaryDirectory(prefix="seatrial-job-") as folder:
        working_dir = stage_working_dir(spec_text, Path(folder))
        runtime_env = {"working_dir": str(working_dir), "env_vars": env or {}}
        return _insist(lambda: client.submit_job(entrypoint=command, runtime_env=runtime_env), sleep)


def _insist(submit_job: Callable[[], str], sleep: Callable[[float], object]) -> str:
    for attempts_left in reversed(range(SUBMIT_ATTEMPTS)):
        try:
            return submit_job()
        except (ConnectionError, RuntimeError) as error:
            if _NO_AGENT_YET not in str(error) or not attempts_left:
                raise InfrastructureError(f"the cluster refused the job: {error}") from error
        sleep(SUBMIT_PAUSE_S)
    raise AssertionError("unreachable: the last attempt returns or raises")


def follow(
    client: JobClient,
    job_id: str,
    write: Callable[[str], object],
    *,
    timeout_s: float,
    poll_s: float = 2.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> JobEnding:
    """Print a job's log as it grows until the job ends.

    Raises:
        InfrastructureError: after `timeout_s`, or when the job server stops answering. The job itself goes on.
    """
    deadline, shown, missed = clock() + timeout_s, 0, 0
    while clock() < deadline:
        try:
            # Status first: a log read after the final status is complete.
            status, log = str(client.get_job_status(job_id)), client.get_job_logs(job_id)
        except (ConnectionError, RuntimeError, OSError) as error:
            missed += 1
            if missed >= MAX_MISSED_POLLS:
                message = f"job {job_id}: the job server did not answer {missed} times ({error}); the job may still run"
                raise InfrastructureError(message) from error
            sleep(poll_s)
            continue
        missed = 0
        if log[shown:]:
            write(log[shown:])
        shown = len(log)
        if status in FINAL_STATUSES:
            return JobEnding(job_id=job_id, status=status, missing_module=missing_module(log))
        sleep(poll_s)
    remedy = f"it goes on: follow it with `ray job logs {job_id} --follow`, stop it with `ray job stop {job_id}`"
    raise InfrastructureError(f"job {job_id} did not end within {timeout_s:g} s; {remedy}")


def missing_module(log: str) -> str:
    """Return the module that the job's python lacks, when that is what ended it; otherwise nothing."""
    # Only as the last line: a run that began reports its own errors, and goes on after some of them.
    last = log.rstrip().rpartition("\n")[2]
    found = _NO_MODULE.match(last)
    return found[1] if found else ""
