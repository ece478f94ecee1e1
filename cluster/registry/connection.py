"""Where MLflow keeps a workflow's experiment, the client that reaches it, and one error for whatever it raises.

MLflow is imported on first use: 3 s of processor time, and 2.5 s more for the first migration of a new SQLite store
(6 s together on two idle cores, 11 s on busy ones); `connect_in_background` hides both behind the first stages.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

from cluster.registry.entries import ModelVersion, kind_of, model_name
from rl_actors.contracts import InfrastructureError, SeatrialError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# The "stage" of the MLflow run that stands for a whole pipeline run.
PARENT: Final = "pipeline"

# Read by MLflow at import. Trace export must be synchronous: its queue holds 1,000 and drops silently when full.
_ENVIRONMENT: Final = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
# A password may hold any character but a space, as SQLAlchemy reads it: rather too much is cut than too little.
_USERINFO: Final = re.compile(r"(?<=://)[^/?#\s:@]*(?::\S*)?@")
_SECRET_PARAMETER: Final = re.compile(r"(?i)([?&][\w.-]*(?:password|passwd|pwd|token|secret)[\w.-]*=)[^&#\s]*")


def reported(call: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Turn whatever MLflow raises into InfrastructureError: what was tried, what it said, what to do.

    For methods of objects with a `store`.
    """

    @wraps(call)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return call(*args, **kwargs)
        except SeatrialError:
            raise
        # MLflow lets SQLAlchemy's, requests' and its own errors through alike: no narrower class covers them.
        except Exception as error:
            store = getattr(args[0], "store", None)
            said = without_credentials(str(error).strip().partition("\n")[0]) or type(error).__name__
            remedy = store.remedy if isinstance(store, Store) else "check the MLflow store"
            raise InfrastructureError(f"MLflow, {call.__name__.strip('_')}: {said}; {remedy}") from error

    return guarded


def without_credentials(text: str) -> str:
    """Return a URI, or a text with URIs in it, without users, passwords and tokens: fit for screens and files."""
    return _SECRET_PARAMETER.sub(r"\1***", _USERINFO.sub("", text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """A tracking store. `artifacts` is None where a server decides where artifacts go.

    `uri` may hold a password and is for connecting only; what is printed or written down is `public_uri`.
    """

    uri: str
    artifacts: Path | None

    @property
    def is_server(self) -> bool:
        """Whether a tracking server is asked, which cannot see this machine's directories."""
        return self.uri.startswith(("http://", "https://"))

    @property
    def public_uri(self) -> str:
        """The URI without credentials."""
        return without_credentials(self.uri)

    @property
    def remedy(self) -> str:
        """What a human does when the store fails."""
        if self.is_server:
            server = f"the MLflow server at {self.public_uri}"
            return f"check that {server} answers, or unset MLFLOW_TRACKING_URI for the embedded one"
        store = self.public_uri
        return f"check that {store} can be written and its disk has space, and that no other process holds it locked"


def store_of(home: Path, environ: Mapping[str, str] = os.environ) -> Store:
    """Return the store in force: `MLFLOW_TRACKING_URI`, else SQLite with local artifacts under `home`/mlflow."""
    uri = environ.get("MLFLOW_TRACKING_URI", "").strip()
    root = home.absolute() / "mlflow"
    if uri:
        return Store(uri=uri, artifacts=None if uri.startswith("http") else root / "artifacts")
    return Store(uri=f"sqlite:///{root / 'mlflow.db'}", artifacts=root / "artifacts")


def quieten(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what MLflow must find in its environment before it is imported; what a human set stays."""
    for name, value in _ENVIRONMENT.items():
        environ.setdefault(name, value)


class Connection:
    """The experiment of one workflow, seen by one pipeline run: its client, its MLflow runs, its logged models."""

    def __init__(self, workflow: str, run_id: str, store: Store) -> None:
        """Touch nothing: the first call connects."""
        self.workflow, self.run_id, self.store = workflow, run_id, store
        self.experiment_id = ""
        self._client: MlflowClient | None = None
        self._lock = threading.RLock()

    def connect_in_background(self) -> threading.Thread:
        """Import MLflow and migrate the store beside other work. A failure shows again at the first real call."""

        def connect() -> None:
            with suppress(InfrastructureError):
                self.connect()

        thread = threading.Thread(target=connect, name="mlflow-connect", daemon=True)
        thread.start()
        return thread

    @reported
    def connect(self) -> MlflowClient:
        """Return the client, with store and experiment in place. Idempotent and thread-safe."""
        with self._lock:
            if self._client is None:
                self._client = self._open()
            return self._client

    def _open(self) -> MlflowClient:
        quieten()  # before the import, which reads the environment once
        import mlflow

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        if self.store.artifacts is not None:
            self.store.artifacts.mkdir(parents=True, exist_ok=True)
        # The client has its own address; traces and feedback go by these, which are global to the process.
        mlflow.set_tracking_uri(self.store.uri)
        mlflow.set_registry_uri(self.store.uri)
        client = mlflow.MlflowClient(self.store.uri, self.store.uri)
        experiment = client.get_experiment_by_name(self.workflow)
        place = str(self.store.artifacts / self.workflow) if self.store.artifacts else None
        self.experiment_id = experiment.experiment_id if experiment else client.create_experiment(self.workflow, place)
        return client

    def open_run(self, stage: str, started_at: float) -> str:
        """Return the id of a stage's MLflow run, created at first: a resumed run goes on in those it had."""
        found = self.find_run(stage)
        if found is not None:
            return found.info.run_id
        tags = {"seatrial.run_id": self.run_id, "seatrial.stage": stage}
        if stage != PARENT:
            tags["mlflow.parentRunId"] = self.open_run(PARENT, started_at)
        name = self.run_id if stage == PARENT else stage
        at_ms = int(started_at * 1000)
        made = self.connect().create_run(self.experiment_id, start_time=at_ms, tags=tags, run_name=name)
        return made.info.run_id

    def find_run(self, stage: str) -> Run | None:
        """Return the MLflow run of a stage of this pipeline run, if there is one."""
        client = self.connect()
        wanted = f"tags.`seatrial.run_id` = '{self.run_id}' and tags.`seatrial.stage` = '{stage}'"
        found = client.search_runs([self.experiment_id], wanted, max_results=1)
        return found[0] if found else None

    def log_model(self, version: ModelVersion, mlflow_run: str) -> str:
        """Find or create the LoggedModel of this content; the weights are not copied."""
        # By content and name: equal weights under two names are two versions to people.
        client = self.connect()
        wanted = f"tags.`seatrial.sha256` = '{version.sha256}' and tags.`seatrial.version` = '{version.name}'"
        found = client.search_logged_models([self.experiment_id], wanted, max_results=1)
        if found:
            return found[0].model_id
        model = client.create_logged_model(
            self.experiment_id,
            name=model_name(version.name),
            source_run_id=mlflow_run,
            tags={"seatrial.sha256": version.sha256, "seatrial.version": version.name, "seatrial.run_id": self.run_id},
            params={"path": version.path, "sha256": version.sha256},
            model_type=kind_of(version),
        )
        client.finalize_logged_model(model.model_id, "READY")
        return model.model_id
