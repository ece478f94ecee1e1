"""Refuse to start on a machine that cannot finish: every check names what is missing and its remedy.

Each check is a function of what was found, so that a test can break it; `probe_machine` is the only one that looks.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.plan.workload import measure_workload, require_workload
from cluster.spec import NUM_RELEASES, WorkflowSpec
from cluster.workflows import find_workflow, most_tasks
from rl_actors.contracts import BadInputError, InfrastructureError, Outcome, unknown_name
from rl_actors.environment import RolloutView, Workflow
from rl_actors.ports import listen_error

GIB = 1024**3


PYTHONS = ((3, 11), (3, 12))


MIN_DISK_BYTES = 2 * GIB


MIN_SHM_BYTES = 256 * 1024**2


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightItem:
    """One check: what was found, and what to do when that is not enough (empty when it is)."""

    name: str
    ok: bool
    found: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What preflight looks at. Bytes are free or available ones; `gpus` counts what nvidia-smi lists."""

    python: tuple[int, int]
    compiler: str
    ninja: str
    disk_bytes: int
    memory_bytes: int
    shm_bytes: int
    gpus: int
    port_is_free: bool
    home_is_writable: bool


def probe_machine(spec: WorkflowSpec, home: Path) -> Machine:
    """Look at this machine."""
    existing = next(path for path in (home, *home.parents) if path.exists())
    return Machine(
        python=sys.version_info[:2],
        compiler=shutil.which(os.environ.get("CXX") or "c++") or "",
        ninja=find_ninja(),
        disk_bytes=shutil.disk_usage(existing).free,
        memory_bytes=available_memory(),
        shm_bytes=free_bytes(Path("/dev/shm")),
        gpus=count_gpus(),
        port_is_free=listen_error(spec.cluster.serve_port) is None,
        home_is_writable=is_writable(home),
    )


def check_machine(spec: WorkflowSpec, machine: Machine, home: Path, memory_needed: int) -> list[PreflightItem]:
    """Return every check's result. Pure. A GPU is looked for here only when Ray is started on this machine."""
    port, gpus_wanted = spec.cluster.serve_port, spec.cluster.uses_gpu and not spec.cluster.address
    python = ".".join(map(str, machine.python))
    return [
        _item("python", machine.python in PYTHONS, python, "install Python 3.11 or 3.12 and run make with PYTHON=..."),
        _item("c++ compiler", bool(machine.compiler), machine.compiler, "install g++ (Debian: apt-get install g++)"),
        _item("ninja", bool(machine.ninja), machine.ninja, "install it into the environment: pip install ninja"),
        _item("SEATRIAL_HOME", machine.home_is_writable, str(home), "set SEATRIAL_HOME to a directory you can write"),
        _bytes_item("disk", machine.disk_bytes, MIN_DISK_BYTES, f"free space on the disk of {home}"),
        _bytes_item("memory", machine.memory_bytes, memory_needed, "close programs, or lower the batch or model size"),
        _bytes_item("/dev/shm", machine.shm_bytes, MIN_SHM_BYTES, "give the container more (docker run --shm-size=2g)"),
        _item(
            f"port {port}",
            machine.port_is_free,
            "free" if machine.port_is_free else "in use",
            "stop what listens there or set cluster.serve_port",
        ),
        _item(
            "gpu",
            machine.gpus > 0 or not gpus_wanted,
            f"{machine.gpus} GPUs",
            "the spec asks for GPUs: set cluster.gpus_per_learner and cluster.gpus_per_rollout_worker to 0, or name a "
            "GPU cluster in cluster.address",
        ),
    ]


def _item(name: str, ok: bool, found: str, remedy: str) -> PreflightItem:
    return PreflightItem(name=name, ok=ok, found=found or "not found", remedy="" if ok else remedy)


def _bytes_item(name: str, found: int, needed: int, remedy: str) -> PreflightItem:
    text = f"{found / GIB:.1f} GiB free, {needed / GIB:.1f} GiB needed"
    return _item(name, found >= needed, text, remedy)


def require_ready(spec: WorkflowSpec, machine: Machine, home: Path, memory_needed: int) -> list[PreflightItem]:
    """Return the checks' results when all hold.

    Raises:
        BadInputError: the model directory is not complete.
        InfrastructureError: names every failed check, what was found and the remedy.
    """
    check_model(spec.model.path)
    items = check_machine(spec, machine, home, memory_needed)
    failed = [f"{item.name}: {item.found}; {item.remedy}" for item in items if not item.ok]
    if failed:
        raise InfrastructureError("preflight refused to start. " + " | ".join(failed))
    return items


def check_model(path: str) -> None:
    """Refuse a model directory without config, tokenizer or weights. Raises BadInputError.

    An empty path (the tiny model is built) and a hub id such as `openai/gpt-oss-20b` pass.
    """
    directory = Path(path).expanduser()
    if not path or (_is_hub_id(path) and not directory.exists()):
        return
    if not directory.is_dir():
        raise BadInputError("model.path", path, "no such directory; give a Hugging Face model directory or a hub id")
    config = directory / "config.json"
    if not config.is_file() or not _is_json_object(config):
        raise BadInputError("model.path", path, "has no readable config.json; save the model with save_pretrained")
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        remedy = f"has no tokenizer ({', '.join(TOKENIZER_FILES[:3])}); save it with tokenizer.save_pretrained"
        raise BadInputError("model.path", path, remedy)
    if not any(True for pattern in WEIGHT_PATTERNS for _ in directory.glob(pattern)):
        raise BadInputError("model.path", path, f"has no weights ({', '.join(WEIGHT_PATTERNS)}); copy them there")
    _check_shards(directory, path)


def check_workflow(spec: WorkflowSpec) -> None:
    """Refuse a workflow that cannot be loaded, that has too few tasks, or whose workload cannot carry a release.

    Raises:
        BadInputError: names the workflow, what it declares wrongly, or the knob and the largest value that every seed
            can serve.
    """
    workflow = find_workflow(spec.workflow.name)
    for split, largest in most_tasks(workflow).items():
        times = NUM_RELEASES if split == "live" else 1
        asked = spec.num_tasks[split]
        if asked * times > largest:
            remedy = f"{spec.workflow.name} has tasks for at most {largest // times}; lower it"
            raise BadInputError(f"data.num_{split}", asked, remedy)
    check_critical(workflow)
    require_workload(spec, measure_workload(spec, workflow))


def check_critical(workflow: Workflow) -> None:
    """Refuse a critical check that the workflow never reports: it would guard nothing.

    Raises:
        BadInputError: names the check and the nearest one that there is.
    """
    named: object = getattr(workflow, "critical_checks", None)
    if not isinstance(named, tuple | list):
        remedy = f"{workflow.name} must name its critical checks, () where it has none"
        raise BadInputError("critical_checks", named, remedy)
    (task,) = workflow.build_tasks("train", 1, 0)
    empty = RolloutView(task=task, tool_calls=(), reply="", outcome=Outcome(success=False, violations=(), reasons=()))
    reported = workflow.check_reply("", empty)
    for name in named:
        if name not in reported:
            remedy = f"{workflow.name} reports no such policy check; {unknown_name(str(name), reported)}"
            raise BadInputError("critical_checks", name, remedy)


def _check_shards(directory: Path, path: str) -> None:
    """A half-copied model has its index but not all shards."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return
    if not _is_json_object(index):
        raise BadInputError("model.path", path, f"{index.name} is not a JSON object; copy it again")
    shards = set(json.loads(index.read_text()).get("weight_map", {}).values())
    missing = sorted(shard for shard in shards if not (directory / shard).is_file())
    if missing:
        raise BadInputError(
            "model.path", path, f"lacks {len(missing)} weight files, first {missing[0]}; copy them there"
        )


def _is_hub_id(path: str) -> bool:
    """`owner/name` whose owner is no directory here: a misspelled local path must not turn into a download."""
    owner, slash, name = path.partition("/")
    return bool(slash and owner and name) and "/" not in name and owner[0].isalnum() and not Path(owner).exists()


def _is_json_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def find_ninja(interpreter: str = sys.executable) -> str:
    """Return ninja on the path or beside the interpreter (an environment that was not activated)."""
    beside = Path(interpreter).parent / "ninja"
    return shutil.which("ninja") or (str(beside) if beside.is_file() else "")


def becomes_free(
    port: int,
    *,
    timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> bool:
    """Wait for a port: after a kill -9, the killed run's own gateway listens until its Ray has noticed."""
    deadline = clock() + timeout_s
    while listen_error(port):
        if clock() >= deadline:
            return False
        sleep(0.5)
    return True


def is_writable(directory: Path) -> bool:
    """Return whether a file can be made in a directory, which is created when missing."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe-{secrets.token_hex(4)}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError:
        return False
    return True


def free_bytes(directory: Path) -> int:
    """Return the free bytes of a file system, 0 when the directory does not exist."""
    return shutil.disk_usage(directory).free if directory.is_dir() else 0


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes this process may still use: the machine's, or the container's when that is less."""
    machine = psutil.virtual_memory().available
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        # Page cache counts as used in a cgroup but is given back on demand.
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        free = int(limit) - int(used) + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return machine
    return min(machine, free)


def count_gpus(command: Sequence[str] = ("nvidia-smi", "-L"), timeout_s: float = 10.0) -> int:
    """Return how many GPUs nvidia-smi lists; 0 when it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return done.stdout.count("GPU ") if done.returncode == 0 else 0
