"""Reaching a Ray cluster: connection and token, the place of each actor of a stage, and the pipeline as a Ray job.

Ray is imported where it is used: a token must be offered before that, and most commands never connect.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from cluster.plan import NUM_THREADS, Placement, Role, Stage, check_capacity, local_cpus, reserve
from rl_actors.contracts import BadInputError, InfrastructureError
from rl_actors.ports import listens

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from rl_actors.actors import Options

RESERVE_TIMEOUT_S: Final = 60.0
CONNECT_TIMEOUT_S: Final = 5.0
TOKEN_REMEDY: Final = (
    "copy the cluster's ~/.ray/auth_token here, or set RAY_AUTH_TOKEN (`ray get-auth-token` prints it on the head)"
)
_TOKEN_MODE: Final = "RAY_AUTH_MODE"
_HOST_PORT: Final = re.compile(r"(?:ray://)?(?P<host>[^:/]+):(?P<port>\d+)")

# Serve's controller always ends by `ray.kill`, and what still asked it then "failed".
_GOODBYE: Final = re.compile(r"Task ServeController\.\w+ failed\..* killed by `ray\.kill`")

WORKER_ENVIRONMENT: Final = {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": str(NUM_THREADS),
    "PYTHONWARNINGS": "ignore",
    "RAY_TRAIN_V2_ENABLED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

PACKAGES = ("rl_actors", "serving", "cluster")
PROJECT_ROOT = Path(__file__).resolve().parents[2]
SPEC_FILE = "spec.submitted.yaml"
FINAL_STATUSES = ("SUCCEEDED", "FAILED", "STOPPED")
MAX_MISSED_POLLS = 5
SUBMIT_ATTEMPTS, SUBMIT_PAUSE_S = 12, 5.0  # a cluster that has just started gets a minute to find its agent
_NO_AGENT_YET = "No available agent"  # in Ray's own words, for some seconds after `ray start`
_NO_MODULE = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")


def offer_token(environ: MutableMapping[str, str] | None = None, home: Path | None = None) -> None:
    """Let Ray's clients in this process send a token that lies ready; call it before Ray is imported.

    A mode that somebody chose is left alone. A cluster that asks for no token ignores it.
    """
    # `ray start` asks for a token as soon as the machine has one, so every client must offer what it has.
    variables = os.environ if environ is None else environ
    file = Path(variables.get("RAY_AUTH_TOKEN_PATH") or (home or Path.home()) / ".ray" / "auth_token")
    if _TOKEN_MODE not in variables and (variables.get("RAY_AUTH_TOKEN") or file.is_file()):
        variables[_TOKEN_MODE] = "token"


@contextmanager
def connected(address: str, placement: Placement) -> Iterator[None]:
    """Connect to a cluster, or start a local Ray that ends with the run; refuse a spec it could never place.

    Raises:
        BadInputError: the address is none, or the cluster is too small.
        InfrastructureError: nothing answers at the address.
    """
    import ray

    quieten_libraries()
    # Whoever has connected before us, as tests do, keeps the connection.
    is_ours = not ray.is_initialized()
    if is_ours:
        _initialise(address, placement)
    try:
        check_capacity(placement, ray.cluster_resources())
        yield
    finally:
        if is_ours:
            ray.shutdown()


def join(address: str) -> None:
    """Connect to a running cluster and stay; what its workers print belongs into their logs, not on this screen."""
    quieten_libraries()
    _connect("Ray address", address, ignore_reinit_error=True)


def quieten_libraries() -> None:
    """Keep other libraries' progress bars and chatter off the run's own screen; their warnings stay."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    _put_ray_messages_aside()


def _put_ray_messages_aside() -> None:
    """Let Ray's messages about this job go to stderr, but for goodbyes that mean nothing."""
    # On stdout they would stand in the middle of a `--json` answer. Ray has no option for it: this is its own printer.
    from ray._private import worker as ray_worker

    printing = ray_worker.print_to_stdstream
    if getattr(printing, "is_seatrial", False):
        return

    def print_aside(data: Mapping[str, Any], ignore_prefix: bool) -> None:
        lines = [line for line in data["lines"] if not _GOODBYE.match(line)]
        if lines:
            printing({**data, "lines": lines, "is_err": True}, ignore_prefix=ignore_prefix)

    print_aside.is_seatrial = True  # type: ignore[attr-defined]
    ray_worker.print_to_stdstream = print_aside


def _initialise(address: str, placement: Placement) -> None:
    import ray

    runtime_env = {"env_vars": worker_environment(placement)}
    field = "cluster.address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS", "")
    if address:
        _connect(field, address, runtime_env=runtime_env)
        return
    # One machine is never preempted; the watcher is an actor per job, with three seconds of imports.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    ray.init(
        address="local",  # never a cluster that happens to run on this machine
        num_cpus=local_cpus(placement, os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=512 << 20,  # rollouts and weights are small; Ray would take a third of the memory
        runtime_env=runtime_env,
    )


def _connect(field: str, address: str, **options: Any) -> None:
    """Connect to a running cluster."""
    import ray
    from ray.exceptions import AuthenticationError

    # Asked first: Ray itself tries for minutes and ends in a traceback.
    found = _HOST_PORT.fullmatch(address)
    if found and not listens(found["host"], int(found["port"]), CONNECT_TIMEOUT_S):
        raise _unreachable(field, address, f"nobody listens within {CONNECT_TIMEOUT_S:.0f} s")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except ValueError as error:
        remedy = f"{_first_line(error)}; write host:port, ray://host:port, or auto for the one of this machine"
        raise BadInputError(field, address, remedy) from error
    except AuthenticationError as error:
        raise InfrastructureError(f"{field} = {address!r}: this Ray asks for a token; {TOKEN_REMEDY}") from error
    except (ConnectionError, RuntimeError) as error:
        raise _unreachable(field, address, _first_line(error)) from error


def _unreachable(field: str, address: str, reason: str) -> InfrastructureError:
    remedy = "start one (ray start --head), correct the address, or leave it empty for a Ray of the run's own"
    return InfrastructureError(f"{field} = {address!r}: no Ray cluster answers there ({reason}); {remedy}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def worker_environment(placement: Placement) -> dict[str, str]:
    """Return the environment of every worker process."""
    accelerator = "cuda" if placement.peak["GPU"] else "cpu"
    return {**WORKER_ENVIRONMENT, "DS_ACCELERATOR": accelerator}


def has_room(placement: Placement, stage: Stage, times: int) -> bool:
    """Whether a stage's bundles fit so many times into what the connected cluster has free now."""
    import ray

    # Free now, not in total: other jobs may share the cluster.
    free = ray.available_resources()
    return all(times * needed <= free.get(name, 0.0) for name, needed in placement.demand(stage).items())


@contextmanager
def placed(placement: Placement, stage: Stage) -> Iterator[Options]:
    """Reserve a stage's bundles and yield the function that says where each actor goes."""
    from ray.util.placement_group import remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = reserve(placement, stage, timeout_s=RESERVE_TIMEOUT_S)

    def options(role: str, rank: int) -> Mapping[str, Any]:
        known: Role = role  # pyright: ignore[reportAssignmentType]
        index = placement.index(stage, known, rank)
        bundle = placement.bundles(stage)[index]
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        return {"num_cpus": bundle.cpus, "num_gpus": bundle.gpus, "scheduling_strategy": strategy}

    try:
        yield options
    finally:
        remove_placement_group(group)


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
    # The log is asked for as a whole each time: the job server has no offset to go on from.
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
