"""The process sandbox against real processes: hangs, deaths, secrets and descriptors."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from rl_actors.contracts.errors import ToolHostError
from rl_actors.sandbox.process import ProcessSandbox, ProcessWorld, ToolHostProcess, host_command, host_environment
from rl_actors.sandbox.tool_host import MEMORY_LIMIT_BYTES

MODULE = "tests.rl_actors.sandbox.strange_world"
WAIT_S = 30.0
Test = Callable[[ProcessSandbox], Awaitable[Any]]


def with_pool(test: Test, *, num_hosts: int = 1, wait_s: float = WAIT_S) -> Any:
    """Run a test on a pool of real hosts and stop them."""

    async def run() -> Any:
        pool = ProcessSandbox(MODULE, num_hosts=num_hosts, wait_s=wait_s)
        try:
            return await test(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


async def ask(world: ProcessWorld, tool: str, **arguments: Any) -> Any:
    """Call a tool that must succeed; returns its JSON value."""
    result = await world.call(tool, arguments)
    assert result.error == "", result
    return json.loads(result.content)


async def pid_of(world: ProcessWorld) -> int:
    return int((await ask(world, "whereabouts"))["pid"])


def is_running(pid: int) -> bool:
    """False for a zombie too: nobody may be left to run tools."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


# --- calls ----------------------------------------------------------------------------------------


def test_a_world_is_opened_used_read_and_closed():
    async def test(pool: ProcessSandbox) -> None:
        async with await pool.open({"said": ["first"]}) as world:
            result = await world.call("echo", {"text": "é\n"})
            assert (result.content, result.error) == ('{"text":"é\\n"}', "")
            assert result.duration_ms > 0.0
            assert (await world.read_state({}))["said"] == ["first", "é\n"]
        with pytest.raises(ToolHostError, match="tool host failed: KeyError"):
            await world.read_state({})
        await ask(await pool.open({}), "echo", text="the host itself is well")

    with_pool(test)


def test_expected_failures_are_results():
    async def test(pool: ProcessSandbox) -> dict[str, str]:
        world = await pool.open({})
        calls: dict[str, dict[str, Any]] = {
            "refuse": {"reason": "shipped"},
            "sleep": {"seconds": 20},
            "big": {"size": 30_000},
            "eat": {"megabytes": (MEMORY_LIMIT_BYTES >> 20) + 1},
        }
        return {tool: (await world.call(tool, arguments)).error for tool, arguments in calls.items()}

    assert with_pool(test) == {
        "refuse": "tool_failure", "sleep": "timeout", "big": "output_too_large", "eat": "memory",
    }  # fmt: skip


def test_many_worlds_at_once_get_their_own_answers():
    async def test(pool: ProcessSandbox) -> None:
        async def one(number: int) -> list[str]:
            async with await pool.open({}) as world:
                for step in range(3):
                    await ask(world, "echo", text=f"{number}.{step}")
                return (await world.read_state({}))["said"]

        said = await asyncio.gather(*(one(number) for number in range(20)))
        assert said == [[f"{number}.{step}" for step in range(3)] for number in range(20)]

    with_pool(test, num_hosts=2)


def test_worlds_are_spread_over_the_hosts():
    async def test(pool: ProcessSandbox) -> list[int]:
        worlds = [await pool.open({}) for _ in range(4)]
        return [await pid_of(world) for world in worlds]

    pids = with_pool(test, num_hosts=2)
    assert pids[0] == pids[2] != pids[1] == pids[3]
    assert os.getpid() not in pids
    assert not any(is_running(pid) for pid in pids), "close left a host running"


def test_what_a_tool_prints_is_no_reply():
    """Negative control: the same text as a real reply would settle the very next request."""

    async def test(pool: ProcessSandbox) -> None:
        world = await pool.open({})
        forged = json.dumps({"id": 2, "value": {"content": '"forged"', "error": ""}})
        assert await ask(world, "shout", text=forged) == "ok"
        assert await ask(world, "echo", text="true") == {"text": "true"}

    with_pool(test)


# --- a host that hangs or dies --------------------------------------------------------------------


def test_a_hanging_host_is_killed_and_replaced():
    async def test(pool: ProcessSandbox) -> None:
        world = await pool.open({})
        pid = await pid_of(world)
        world._wait_s = 1.0
        with pytest.raises(ToolHostError, match=r"did not answer 'call' within 1.0 s"):
            await world.call("hang", {})
        with pytest.raises(ToolHostError):
            await world.read_state({})
        fresh = await pool.open({"said": ["anew"]})
        assert await pid_of(fresh) != pid
        assert (await fresh.read_state({}))["said"] == ["anew"]
        assert not is_running(pid)

    with_pool(test)


def test_a_host_that_dies_takes_its_worlds_and_only_its_worlds():
    async def test(pool: ProcessSandbox) -> None:
        doomed, neighbour, elsewhere = [await pool.open({}) for _ in range(3)]
        doomed, elsewhere, neighbour = doomed, neighbour, elsewhere  # host 0, host 1, host 0
        with pytest.raises(ToolHostError, match="died before it answered"):
            await doomed.call("die", {})
        with pytest.raises(ToolHostError):
            await neighbour.call("echo", {"text": "x"})
        assert await ask(elsewhere, "echo", text="well") == {"text": "well"}
        again = await pool.open({})
        await ask(again, "echo", text="well")

    with_pool(test, num_hosts=2)


def test_everybody_who_waits_on_a_killed_host_hears_of_it():
    async def test(pool: ProcessSandbox) -> None:
        worlds = [await pool.open({}) for _ in range(3)]
        pid = await pid_of(worlds[0])
        waiting = [asyncio.create_task(world.call("sleep", {"seconds": 0.2})) for world in worlds]
        await asyncio.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, ToolHostError)

    with_pool(test)


def test_closing_a_world_on_a_dead_host_hides_no_other_error():
    async def test(pool: ProcessSandbox) -> None:
        async with await pool.open({}) as world:
            os.kill(await pid_of(world), signal.SIGKILL)
            raise ValueError("what really happened")

    with pytest.raises(ValueError, match="what really happened"):
        with_pool(test)


def test_a_defect_of_the_host_is_an_infrastructure_error():
    async def test(pool: ProcessSandbox) -> None:
        world = await pool.open({})
        with pytest.raises(ToolHostError, match="RuntimeError: a defect of the tool"):
            await world.call("crash", {})
        with pytest.raises(ToolHostError, match="KeyError"):
            await pool.open({"broken": True})
        assert await ask(world, "echo", text="still here") == {"text": "still here"}

    with_pool(test)


def test_a_reply_too_long_for_the_pipe_ends_that_host():
    """Half a reply cannot be resynchronised; a process left behind would never end."""

    async def test(pool: ProcessSandbox) -> None:
        world = await pool.open({})
        pid = await pid_of(world)
        with pytest.raises(ToolHostError):
            await world.read_state({"padding": 5 << 20})
        fresh = await pool.open({})
        assert await pid_of(fresh) != pid
        for _ in range(100):
            if not is_running(pid):
                break
            await asyncio.sleep(0.02)
        assert not is_running(pid)

    with_pool(test)


def test_a_late_reply_is_dropped_and_the_next_one_is_right():
    async def test(pool: ProcessSandbox) -> None:
        world = await pool.open({})
        late = asyncio.create_task(world.call("sleep", {"seconds": 0.15}))
        await asyncio.sleep(0.05)
        late.cancel()
        assert await ask(world, "echo", text="next") == {"text": "next"}
        with pytest.raises(asyncio.CancelledError):
            await late

    with_pool(test)


def test_a_module_that_does_not_exist_is_an_infrastructure_error():
    async def test() -> None:
        pool = ProcessSandbox("tests.rl_actors.agent.no_such_world", num_hosts=1, wait_s=WAIT_S)
        with pytest.raises(ToolHostError, match="died"):
            await pool.open({})
        await pool.close()

    asyncio.run(test())


def test_a_request_to_a_closed_host_is_refused_at_once():
    async def test() -> None:
        host = await ToolHostProcess.start(host_command(MODULE))
        assert await host.request(WAIT_S, op="ping") == "pong"
        assert host.alive
        await host.close()
        assert not host.alive
        with pytest.raises(ToolHostError, match="has died"):
            await host.request(WAIT_S, op="ping")
        await host.close()

    asyncio.run(test())


def test_a_host_ends_when_its_input_ends():
    """A worker that is killed cannot kill its hosts: the closed pipe must."""
    ping = '{"id":1,"op":"ping"}\n'
    done = subprocess.run(
        host_command(MODULE),
        input=ping,
        capture_output=True,
        text=True,
        env=host_environment(),
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, '{"id":1,"value":"pong"}\n'), done.stderr


# --- what a host may see --------------------------------------------------------------------------


def test_no_secret_of_ours_reaches_a_tool(monkeypatch: pytest.MonkeyPatch):
    secrets = {"OPENAI_API_KEY": "sk-1", "AWS_SECRET_ACCESS_KEY": "s", "MLFLOW_TRACKING_TOKEN": "t", "RAY_ADDRESS": "a"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SEATRIAL_WORKFLOWS", "/flows")

    async def test(pool: ProcessSandbox) -> dict[str, str]:
        return await ask(await pool.open({}), "environment")

    seen = with_pool(test)
    assert not secrets.keys() & seen.keys()
    kept = {"PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "SEATRIAL_WORKFLOWS"}
    assert set(seen) <= {*kept, "PYTHONPATH", "PYTHONHASHSEED", "LC_CTYPE"}
    assert seen["SEATRIAL_WORKFLOWS"] == "/flows"


def test_the_environment_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.delenv("LANG", raising=False)
    monkeypatch.setattr(sys, "path", ["", "/one", "/two"])
    found = host_environment()
    assert (found["PATH"], found["PYTHONPATH"]) == ("/bin", "/one:/two")
    assert "LANG" not in found


def test_no_descriptor_of_ours_reaches_a_tool(tmp_path: Path):
    """A Ray worker has sockets open; an inherited one would be a door out of the sandbox."""
    secret = (tmp_path / "secret").open("w")
    os.set_inheritable(secret.fileno(), True)

    async def test(pool: ProcessSandbox) -> list[str]:
        return await ask(await pool.open({}), "descriptors")

    with secret:
        seen = with_pool(test)
    assert not [name for name in seen if "secret" in name]
    assert not [name for name in seen if int(name.split(":")[0]) > 2 and "socket" in name]


def test_a_host_stands_apart():
    async def test(pool: ProcessSandbox) -> dict[str, Any]:
        return await ask(await pool.open({}), "whereabouts")

    seen = with_pool(test)
    assert seen["session"] == seen["pid"], "a process group of its own: a signal to ours does not reach it"
    folder = Path(seen["folder"])
    assert folder.parent == Path(tempfile.gettempdir()).resolve()
    assert not folder.exists(), "it goes with the host"


def test_a_host_has_a_folder_that_nobody_else_can_write_and_runs_nothing_from_it():
    """In a shared folder such as /tmp anybody could put a `json.py`; it would run with the order desk's rights."""

    async def test(pool: ProcessSandbox) -> Path:
        folder = Path((await ask(await pool.open({}), "whereabouts"))["folder"])
        assert folder.stat().st_mode & 0o077 == 0
        return folder

    with_pool(test)
    assert host_command(MODULE)[1] == "-P"


@pytest.mark.parametrize(("options", "runs"), [(["-P"], False), ([], True)])
def test_a_poisoned_module_beside_a_host_is_not_imported(tmp_path: Path, options: list[str], runs: bool):
    """With the negative control: without -P it is."""
    (tmp_path / "json.py").write_text("import sys\nsys.exit(77)\n")
    command = [sys.executable, *options, "-m", "rl_actors.sandbox.tool_host", MODULE]
    assert host_command(MODULE) == [sys.executable, "-P", *command[len(options) + 1 :]]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=host_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode == 77) is runs


def test_what_a_tool_started_ends_with_its_host():
    async def test(pool: ProcessSandbox) -> int:
        return int((await ask(await pool.open({}), "start_child"))["pid"])

    child = with_pool(test)
    deadline = time.monotonic() + 10.0
    while is_running(child):
        assert time.monotonic() < deadline, "the child outlived its host"
        time.sleep(0.05)


def test_the_level_is_the_kind_of_isolation_that_the_ledger_records():
    assert ProcessSandbox.level == "process"


def test_a_host_starts_without_anything_heavy():
    """Every host pays for its imports in start-up time and in the memory that is left to its tools."""
    probe = "import sys, rl_actors.sandbox.tool_host; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    heavy = {"torch", "transformers", "tokenizers", "numpy", "scipy", "ray", "vllm", "pydantic", "jsonschema", "mlflow"}
    assert not heavy & set(done.stdout.split())
