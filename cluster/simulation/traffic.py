"""Simulated users of a live workflow: send tickets over HTTP, check what became true, label it, complain when wrong."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from cluster.simulation.ticket_book import TicketBook, TicketResult
from rl_actors.contracts import InfrastructureError, Outcome, SeatrialError, Task, ToolHostError
from rl_actors.environment import Workflow
from rl_actors.sandbox import ProcessSandbox

Report = Callable[[str, int, int, Mapping[str, float]], None]

ACTOR: Final = "simulated-user"
# A ticket that was served before a kill: a resumed driver sends it again, and the gateway runs nothing twice.
ALREADY_RAN: Final = "already_ran"
# Tickets in a row that no gateway answered at all: a silence of our own making, which says nothing of a candidate.
MAX_UNREACHED: Final = 20
_MAX_TRIES: Final = 20
_RETRY_S: Final = 0.25
_STAGES: Final = ("canary", "failback_drill")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficConfig:
    """How hard users press. `live_world` opens the live database; `run_name` keeps request ids of two runs apart."""

    url: str
    live_world: Mapping[str, Any]
    run_name: str
    concurrency: int = 4
    timeout_s: float = 90.0


@dataclass(slots=True, kw_only=True)
class TrafficProgress:
    """Counts so far. `num_failed` is what users would call an outage: no 200 after all polite retries.

    What earlier, killed drivers of the same release sent is in all counts but `seconds`; `num_before` answers are
    theirs. `num_repeated` counts tickets in flight when one was killed, which had run: their users saw nothing of it,
    so they are neither answered nor failed.
    """

    num_sent: int = 0
    num_repeated: int = 0
    num_answered: int = 0
    num_failed: int = 0
    num_throttled: int = 0
    num_unlabelled: int = 0
    num_before: int = 0
    seconds: float = 0.0
    successes: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    durations_ms: list[float] = field(default_factory=list)

    @property
    def requests_per_s(self) -> float:
        """Answered tickets over wall time, both of this driver alone."""
        return (self.num_answered - self.num_before) / self.seconds if self.seconds else 0.0

    @property
    def num_requests(self) -> int:
        """Tickets that ever went out, whatever became of them."""
        return self.num_sent + self.num_repeated

    def success_rate(self, channel: str) -> float:
        """Verified successes over answered tickets of a release channel; 0 without any."""
        return self.successes[channel] / self.answered[channel] if self.answered[channel] else 0.0

    def add(self, result: TicketResult) -> None:
        """Count one finished ticket."""
        if result.failure == ALREADY_RAN:
            self.num_repeated += 1
            return
        self.num_sent += 1
        if result.failure:
            self.num_failed += 1
            self.failures[result.failure] += 1
            return
        self.num_answered += 1
        self.answered[result.release_channel] += 1
        self.durations_ms.append(result.duration_ms)
        self.num_unlabelled += result.outcome is None
        self.successes[result.release_channel] += result.outcome is not None and result.outcome.success


class TrafficDriver:
    """Sends tickets with bounded concurrency until told to stop or out of tickets."""

    def __init__(
        self,
        workflow: Workflow,
        config: TrafficConfig,
        book: TicketBook,
        *,
        client: httpx.AsyncClient | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Count what the book holds, send nothing yet. A `client` given is used as it is and left open."""
        self._workflow, self._config, self._book, self._client, self._clock = workflow, config, book, client, clock
        self.progress = TrafficProgress()
        for result in book.ended:
            self.progress.add(result)
        self.progress.num_before = self.progress.num_answered

    async def drive(self, tasks: Iterable[Task], is_over: Callable[[], bool]) -> AsyncIterator[TicketResult]:
        """Yield results as tickets finish. Once `is_over`, no new ticket is sent; those in flight are finished.

        Raises:
            InfrastructureError: `MAX_UNREACHED` tickets in a row reached nobody. Their end is in no book, so that a
                resumed driver sends them again.
        """
        started, waiting = self._clock(), iter(self._book.waiting(tasks))
        unreached: list[TicketResult] = []
        async with self._open() as desk:
            # All that was in flight at a kill, even where no new ticket would be sent: it may have left a row.
            pending = self._send(desk, waiting, max(self._config.concurrency, self._book.num_in_flight))
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                ended, over = list(settle(unreached, [finished.result() for finished in done])), is_over()
                # A gateway that restarts must not be met by all tickets at once.
                await asyncio.sleep(_RETRY_S if unreached and not over else 0.0)
                pending |= set() if over else self._send(desk, waiting, len(done))
                for result in ended:
                    self._end(result, desk, started)
                    yield result
                if not over:
                    self._require_reached(unreached)
            for result in unreached:
                self._end(result, desk, started)
                yield result

    def _end(self, result: TicketResult, desk: _Desk, started: float) -> None:
        """Write down and count how a ticket ended."""
        self._book.end(result)
        self.progress.add(result)
        self.progress.num_throttled = desk.num_throttled
        self.progress.seconds = self._clock() - started

    def _require_reached(self, unreached: Sequence[TicketResult]) -> None:
        if len(unreached) >= MAX_UNREACHED:
            raise InfrastructureError(
                f"{len(unreached)} tickets in a row reached no gateway at {self._config.url} (the last: "
                f"{unreached[-1].failure}); see that it listens there, then go on with --resume"
            )

    def _send(self, desk: _Desk, waiting: Iterator[Task], count: int) -> set[asyncio.Task[TicketResult]]:
        """Let up to `count` tickets go out, each written into the book before."""
        fresh = [task for _, task in zip(range(count), waiting, strict=False)]
        for task in fresh:
            self._book.send(task.task_id)
        return {asyncio.create_task(desk.serve(task)) for task in fresh}

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[_Desk]:
        """Open a client and the tool host that reads final states."""
        config = self._config
        limits = httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
        # trust_env: a proxy of this machine must not stand between users and the gateway.
        client = self._client or httpx.AsyncClient(
            base_url=config.url, timeout=config.timeout_s, limits=limits, trust_env=False
        )
        hosts = ProcessSandbox(self._workflow.tools_module, num_hosts=1)
        try:
            yield _Desk(self._workflow, config, client, hosts, self._clock)
        finally:
            await hosts.close()
            if self._client is None:
                await client.aclose()


def settle(unreached: list[TicketResult], results: Sequence[TicketResult]) -> Iterator[TicketResult]:
    """Yield results whose end is certain; the others wait in `unreached`."""
    # A ticket that reached nobody ended in an outage only if a later one got through: else the gateway is simply gone.
    for result in results:
        if is_unreached(result):
            unreached.append(result)
            continue
        yield from unreached
        unreached.clear()
        yield result


def is_unreached(result: TicketResult) -> bool:
    """Whether a ticket got no HTTP answer at all."""
    # Its failure is then named after the error of the connection; a status has a name that httpx does not know.
    kind = getattr(httpx, result.failure, None)
    return isinstance(kind, type) and issubclass(kind, httpx.TransportError)


def run_traffic(
    driver: TrafficDriver,
    tasks: Iterable[Task],
    *,
    is_over: Callable[[], bool] = lambda: False,
    on_progress: Callable[[TrafficProgress], None] = lambda progress: None,
) -> TrafficProgress:
    """Drive all tickets from a thread without an event loop; `on_progress` is called after each."""

    async def drive() -> None:
        async for _ in driver.drive(tasks, is_over):
            on_progress(driver.progress)

    asyncio.run(drive())
    return driver.progress


class _Desk:
    """One user at a time: ask, look at the database, say how it went."""

    def __init__(
        self,
        workflow: Workflow,
        config: TrafficConfig,
        client: httpx.AsyncClient,
        hosts: ProcessSandbox,
        clock: Callable[[], float],
    ) -> None:
        self._workflow, self._config, self._client, self._hosts, self._clock = workflow, config, client, hosts, clock
        self.num_throttled = 0

    async def serve(self, task: Task) -> TicketResult:
        """Send one ticket and report its outcome."""
        started = self._clock()
        key = request_id(self._config.run_name, task)
        response, failure = await self._ask(task, key)
        duration_ms = (self._clock() - started) * 1000.0
        headers = response.headers if response is not None else {}
        outcome = None
        if response is not None and not failure:
            outcome = await self._judge(task, key, response)
        return TicketResult(
            task_id=task.task_id,
            run_id=headers.get("x-seatrial-run-id", ""),
            release_channel=headers.get("x-seatrial-release-channel", ""),
            policy_version=headers.get("x-seatrial-policy-version", ""),
            failure=failure,
            outcome=outcome,
            duration_ms=duration_ms,
        )

    async def _ask(self, task: Task, key: str) -> tuple[httpx.Response | None, str]:
        """Post the ticket, again after each 429. Returns (reply, failure)."""
        body = {
            "model": self._workflow.name,
            "messages": [{"role": "user", "content": task.prompt}],
            "user": key,
            "seed": task.seed,
            "metadata": {"task_id": task.task_id, "intent": task.intent},
        }
        failure = "never sent"
        for _ in range(_MAX_TRIES):
            try:
                response = await self._client.post("/v1/chat/completions", json=body, headers={"idempotency-key": key})
            except httpx.HTTPError as error:
                return None, type(error).__name__
            if response.status_code == httpx.codes.OK:
                return response, ""
            failure = _failure_of(response)
            if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
                return response, failure
            # After a 429 nothing was started, so asking again runs nothing twice.
            self.num_throttled += 1
            await asyncio.sleep(_RETRY_S)
        return None, failure

    async def _judge(self, task: Task, key: str, response: httpx.Response) -> Outcome | None:
        """Verify from outside and report it. None when the database or the gateway could not be reached for it."""
        # From outside: the state of the database decides, not what the reply claims.
        reply = response.json()["choices"][0]["message"]["content"]
        try:
            async with await self._hosts.open({**self._config.live_world, "session": key}) as world:
                state = await world.read_state(task.goal["selector"])
            outcome = self._workflow.verify(task, state, reply)
            await self._report(response.headers["x-seatrial-run-id"], outcome)
        except (ToolHostError, httpx.HTTPError):
            return None
        return outcome

    async def _report(self, run_id: str, outcome: Outcome) -> None:
        """Label the request; a wrong outcome is also overridden by a human."""
        reason = ", ".join((*outcome.violations, *outcome.reasons))[:1000] or "verified"
        body = {"actor": ACTOR, "reason": reason}
        label = await self._client.post(f"/v1/runs/{run_id}/outcome", json={**body, "success": outcome.success})
        label.raise_for_status()
        if not outcome.success:
            (await self._client.post(f"/v1/runs/{run_id}/override", json=body)).raise_for_status()


def request_id(run_name: str, task: Task) -> str:
    """Return the idempotency key of a ticket: the same ticket in the same traffic run is sent once, resume included."""
    return f"{run_name}.{task.task_id.replace('/', '.')}"


def _failure_of(response: httpx.Response) -> str:
    """Name a refusal: its status, or that the ticket was served before."""
    if response.status_code == httpx.codes.CONFLICT and response.json()["error"]["code"] == ALREADY_RAN:
        return ALREADY_RAN
    return f"http_{response.status_code}"


class TrafficThread(threading.Thread):
    """Users: tickets over HTTP until the release is over."""

    def __init__(
        self, driver: TrafficDriver, tasks: Sequence[Task], over: threading.Event, report: Report, index: int
    ) -> None:
        # A daemon: a controller that dies must not be kept alive by its users.
        super().__init__(name="traffic", daemon=True)
        self._driver, self._tasks, self._over, self._report, self._index = driver, tasks, over, report, index
        self._failure: BaseException | None = None
        self.is_finished = False

    @property
    def progress(self) -> TrafficProgress:
        """Counts so far."""
        return self._driver.progress

    def run(self) -> None:
        """Send tickets; what goes wrong is kept for the controller's thread."""
        try:
            run_traffic(self._driver, self._tasks, is_over=self._over.is_set, on_progress=self._show)
        except BaseException as error:  # noqa: BLE001 - raised again by require_healthy
            self._failure = error
        finally:
            self.is_finished = True

    def require_healthy(self) -> None:
        """Raise what broke the driver itself."""
        # Silence of our own making is no evidence against a candidate.
        if isinstance(self._failure, SeatrialError):
            raise self._failure
        if self._failure is not None:
            raise InfrastructureError(f"the traffic driver stopped: {self._failure!r}")

    def _show(self, progress: TrafficProgress) -> None:
        metrics = {
            "requests_per_s": progress.requests_per_s,
            "canary": float(progress.answered["canary"]),
            "stable_success": progress.success_rate("general"),
            "canary_success": progress.success_rate("canary"),
            "failed": float(progress.num_failed),
        }
        self._report(_STAGES[self._index], progress.num_sent, len(self._tasks), metrics)
