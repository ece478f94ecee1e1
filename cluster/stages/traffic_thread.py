"""Users of a release: tickets over HTTP from a thread of their own, until the release is over."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from cluster.traffic import TrafficDriver, TrafficProgress, run_traffic
from rl_actors.contracts import Task
from rl_actors.errors import InfrastructureError, SeatrialError

Report = Callable[[str, int, int, Mapping[str, float]], None]
_STAGES = ("canary", "failback_drill")


class TrafficThread(threading.Thread):
    """Users: tickets over HTTP until the release is over."""

    def __init__(
        self, driver: TrafficDriver, tasks: Sequence[Task], over: threading.Event, report: Report, index: int
    ) -> None:
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
        """Raise when the driver itself broke: silence of our own making is no evidence."""
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
