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
from typing import Any

import psutil

from cluster.spec import WorkflowSpec
from rl_actors.contracts import BadInputError, InfrastructureError
from rl_actors.ports import listen_error

GIB = 1024**3
PYTHONS = ((3, 11), (3, 12))
MIN_DISK_BYTES = 2 * GIB
MIN_SHM_BYTES = 256 * 1024**2
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightItem:
    """One check: its finding, and the remedy when that is not enough (empty when it is)."""

    name: str
    ok: bool
    found: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine as preflight sees it. Bytes are free or available ones; `gpus` counts those that nvidia-smi lists."""

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
    """Return every check's result. Pure."""
    port = spec.cluster.serve_port
    # A named Ray has GPUs of its own, wherever this machine is.
    gpus_wanted = spec.cluster.uses_gpu and not spec.cluster.address
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
    if _read_object(directory / "config.json") is None:
        raise BadInputError("model.path", path, "has no readable config.json; save the model with save_pretrained")
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        remedy = f"has no tokenizer ({', '.join(TOKENIZER_FILES[:3])}); save it with tokenizer.save_pretrained"
        raise BadInputError("model.path", path, remedy)
    if not any(True for pattern in WEIGHT_PATTERNS for _ in directory.glob(pattern)):
        raise BadInputError("model.path", path, f"has no weights ({', '.join(WEIGHT_PATTERNS)}); copy them there")
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        _check_shards(index, path)


def _check_shards(index: Path, path: str) -> None:
    # A half-copied model has its index but not all shards.
    listed = _read_object(index)
    if listed is None:
        raise BadInputError("model.path", path, f"{index.name} is not a JSON object; copy it again")
    missing = sorted(name for name in set(listed.get("weight_map", {}).values()) if not (index.parent / name).is_file())
    if missing:
        remedy = f"lacks {len(missing)} weight files, first {missing[0]}; copy them there"
        raise BadInputError("model.path", path, remedy)


def _is_hub_id(path: str) -> bool:
    owner, slash, name = path.partition("/")
    # Where the owner is a directory here, it is a misspelled path, which must not turn into a download.
    return bool(slash and owner and name) and "/" not in name and owner[0].isalnum() and not Path(owner).exists()


def _read_object(path: Path) -> dict[str, Any] | None:
    """Return a JSON object; None for a missing file and for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def find_ninja(interpreter: str = sys.executable) -> str:
    """Return where ninja is; empty when it is nowhere."""
    # An environment that was not activated has it beside its interpreter, but not on the path.
    beside = Path(interpreter).parent / "ninja"
    return shutil.which("ninja") or (str(beside) if beside.is_file() else "")


def becomes_free(
    port: int,
    *,
    timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> bool:
    """Wait for a port; returns whether it is free in time."""
    # After a kill -9, the killed run's own gateway listens until its Ray has noticed.
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
