"""Preflight: each check is broken once, and says what was found and what to do."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cluster.plan.preflight import (
    GIB,
    Machine,
    available_memory,
    becomes_free,
    check_machine,
    check_model,
    count_gpus,
    find_ninja,
    free_bytes,
    is_writable,
    probe_machine,
    require_ready,
)
from cluster.spec.spec import WorkflowSpec, load_spec, override
from rl_actors.contracts.errors import BadInputError, InfrastructureError

HOME = Path("/home/me/.seatrial")
GOOD = Machine(
    python=(3, 11),
    compiler="/usr/bin/c++",
    ninja="/usr/bin/ninja",
    disk_bytes=10 * GIB,
    memory_bytes=16 * GIB,
    shm_bytes=1 * GIB,
    gpus=1,
    port_is_free=True,
    home_is_writable=True,
)


def spec_with(*settings: str) -> WorkflowSpec:
    return override(load_spec("support_desk"), list(settings))


def test_a_good_machine_passes():
    items = require_ready(spec_with("cluster.gpus_per_learner=1"), GOOD, HOME, 8 * GIB)
    assert len(items) == 9
    assert all(item.ok and item.found and not item.remedy for item in items)


@pytest.mark.parametrize(
    ("change", "name", "found", "remedy"),
    [
        ({"python": (3, 13)}, "python", "3.13", "3.11 or 3.12"),
        ({"python": (3, 10)}, "python", "3.10", "3.11 or 3.12"),
        ({"compiler": ""}, "c++ compiler", "not found", "apt-get install g++"),
        ({"ninja": ""}, "ninja", "not found", "pip install ninja"),
        ({"disk_bytes": GIB}, "disk", "1.0 GiB free, 2.0 GiB needed", "free space"),
        ({"memory_bytes": 4 * GIB}, "memory", "4.0 GiB free, 8.0 GiB needed", "lower the batch"),
        ({"shm_bytes": 64 * 1024**2}, "/dev/shm", "0.1 GiB free", "--shm-size"),
        ({"gpus": 0}, "gpu", "0 GPUs", "cluster.gpus_per_learner"),
        ({"port_is_free": False}, "port 8000", "in use", "cluster.serve_port"),
        ({"home_is_writable": False}, "SEATRIAL_HOME", str(HOME), "set SEATRIAL_HOME"),
    ],
)
def test_each_check_fires_alone(change: dict, name: str, found: str, remedy: str):
    machine = dataclasses.replace(GOOD, **change)
    spec = spec_with("cluster.gpus_per_learner=1")
    (failed,) = [item for item in check_machine(spec, machine, HOME, 8 * GIB) if not item.ok]
    assert failed.name == name
    assert found in failed.found
    assert remedy in failed.remedy
    with pytest.raises(InfrastructureError, match="preflight refused to start") as caught:
        require_ready(spec, machine, HOME, 8 * GIB)
    assert name in str(caught.value)
    assert remedy in str(caught.value)


def test_all_failures_are_told_at_once():
    machine = dataclasses.replace(GOOD, compiler="", disk_bytes=0)
    with pytest.raises(InfrastructureError, match=r"compiler.*disk"):
        require_ready(spec_with(), machine, HOME, 0)


def test_a_gpu_is_needed_here_only_when_ray_starts_here():
    machine = dataclasses.replace(GOOD, gpus=0)
    for settings in ([], ["cluster.gpus_per_learner=1", "cluster.address=ray://head:10001"]):
        assert all(item.ok for item in check_machine(spec_with(*settings), machine, HOME, 0))


def write_model(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"w")
    return directory


def test_a_complete_model_a_hub_id_and_no_model_pass(tmp_path: Path):
    check_model(str(write_model(tmp_path / "m")))
    check_model("openai/gpt-oss-20b")
    check_model("")
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    check_model(str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("damage", "remedy"),
    [
        (lambda m: (m / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda m: (m / "config.json").unlink(), "no readable config.json"),
        (lambda m: (m / "config.json").write_text("{"), "no readable config.json"),
        (lambda m: (m / "config.json").write_text("[]"), "no readable config.json"),
        (lambda m: (m / "model.safetensors").unlink(), "has no weights"),
        (lambda m: (m / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x-2"}}'), "first x-2"),
        (lambda m: (m / "model.safetensors.index.json").write_text("?"), "not a JSON object"),
    ],
)
def test_an_incomplete_model_is_bad_input(tmp_path: Path, damage: Callable[[Path], object], remedy: str):
    damage(write_model(tmp_path / "m"))
    spec = spec_with(f"model.path={tmp_path / 'm'}")
    with pytest.raises(BadInputError) as caught:
        require_ready(spec, GOOD, HOME, 0)
    assert (caught.value.field, caught.value.value) == ("model.path", str(tmp_path / "m"))
    assert remedy in caught.value.remedy


def test_a_misspelled_local_path_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_model(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    for path in ("./n", "/nowhere/at/all", "m/x", "n", "~/nowhere-at-all"):
        with pytest.raises(BadInputError, match="no such directory"):
            check_model(path)


def test_writable_means_that_a_file_was_made(tmp_path: Path):
    assert is_writable(tmp_path / "new" / "home")
    assert list((tmp_path / "new" / "home").iterdir()) == []
    (tmp_path / "file").write_text("")
    assert not is_writable(tmp_path / "file")
    assert not is_writable(tmp_path / "file" / "below")


def test_memory_is_the_machines_or_the_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4000 * 1024))
    assert available_memory(tmp_path) == 4000 * 1024
    for name, text in (("memory.max", "1000000"), ("memory.current", "700000"), ("memory.stat", "inactive_file 50000")):
        (tmp_path / name).write_text(text + "\n")
    assert available_memory(tmp_path) == 350_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) == 4000 * 1024


def test_gpus_are_counted_or_zero():
    assert count_gpus(["printf", "GPU 0: H100 (UUID: GPU-1)\nGPU 1: H100 (UUID: GPU-2)\n"]) == 2
    assert count_gpus(["false"]) == 0
    assert count_gpus(["no-such-command-at-all"]) == 0
    assert count_gpus(["sleep", "5"], timeout_s=0.05) == 0


def test_ninja_is_found_beside_an_interpreter_that_was_not_activated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert find_ninja(str(tmp_path / "python")) == ""
    (tmp_path / "ninja").write_text("")
    assert find_ninja(str(tmp_path / "python")) == str(tmp_path / "ninja")


def test_a_missing_file_system_has_no_room(tmp_path: Path):
    assert free_bytes(tmp_path / "none") == 0
    assert free_bytes(tmp_path) > 0


def test_this_machine_can_be_probed(tmp_path: Path):
    machine = probe_machine(spec_with(), tmp_path / "not" / "yet")
    assert machine.python[0] == 3
    assert min(machine.disk_bytes, machine.memory_bytes) > 0
    assert machine.home_is_writable


class Clock:
    """Time that passes by sleeping only; after `frees_at` seconds the listener closes."""

    def __init__(self, listener: socket.socket, frees_at: float) -> None:
        self.now, self.listener, self.frees_at = 0.0, listener, frees_at

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self.frees_at:
            self.listener.close()


@pytest.mark.parametrize(("frees_at", "is_free"), [(3.0, True), (30.0, False)])
def test_a_port_that_a_killed_run_left_is_waited_for_with_a_bound(frees_at: float, is_free: bool):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        clock = Clock(listener, frees_at)
        port = listener.getsockname()[1]
        assert becomes_free(port, timeout_s=10.0, clock=clock, sleep=clock.sleep) is is_free
        assert clock.now <= 10.0
