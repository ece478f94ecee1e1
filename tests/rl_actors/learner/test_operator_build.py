"""The operator's build: a killed builder leaves nothing that a later run waits for, and no wait is without a bound."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rl_actors.contracts.errors import InfrastructureError
from rl_actors.learner.engine import DIRECTORY_VARIABLE, build_lock, ensure_operators, extensions_directory

HOLDER = (
    "import sys, time; from pathlib import Path; from rl_actors.learner.engine import build_lock\n"
    "with build_lock(Path(sys.argv[1]), timeout_s=1.0): print('held', flush=True); time.sleep(60)"
)


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Another process holds the lock inside the context, and is killed at its end."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(directory)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield
        finally:
            process.kill()


@pytest.mark.slow
def test_waiting_for_another_builder_ends_with_its_name(tmp_path: Path):
    named = rf"{tmp_path}/build\.lock: in use by process \d+ \(waited 0\.3 s\); end it, or .*EXTENS"
    with held(tmp_path), pytest.raises(InfrastructureError, match=named), build_lock(tmp_path, timeout_s=0.3):
        pass


@pytest.mark.slow
def test_a_killed_builder_holds_nothing(tmp_path: Path):
    with held(tmp_path):
        pass
    with build_lock(tmp_path, timeout_s=0.0):
        pass


@pytest.mark.slow
def test_a_lock_file_that_a_killed_process_left_is_cleared_away():
    """With torch alone, this waits for ever: its lock is the file's existence."""
    ensure_operators()
    left_behind = extensions_directory() / "deepspeed_shm_comm" / "lock"
    left_behind.touch()
    code = "from rl_actors.learner.engine import ensure_operators; ensure_operators(); print('loaded')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert found.stdout.endswith("loaded\n")
    assert not left_behind.exists()


def test_each_environment_builds_in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = extensions_directory()
    assert own.parent == tmp_path / "seatrial" / "torch_extensions"
    monkeypatch.setattr(sys, "prefix", "/another/environment")
    assert extensions_directory() != own


def test_the_users_own_folder_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "mine"))
    assert extensions_directory() == tmp_path / "mine"
