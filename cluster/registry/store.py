"""Where MLflow keeps things, and what it raises, turned into one error that says what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

from rl_actors.contracts import InfrastructureError, SeatrialError

Parameters = ParamSpec("Parameters")


Result = TypeVar("Result")


def reported(call: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Turn whatever MLflow raises into InfrastructureError: what was tried, what it said, what to do.

    For methods of objects with a `store`. MLflow lets SQLAlchemy's, requests' and its own errors through alike.
    """

    @wraps(call)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return call(*args, **kwargs)
        except SeatrialError:
            raise
        except Exception as error:
            store = getattr(args[0], "store", None)
            said = without_credentials(str(error).strip().partition("\n")[0]) or type(error).__name__
            remedy = store.remedy if isinstance(store, Store) else "check the MLflow store"
            raise InfrastructureError(f"MLflow, {call.__name__.strip('_')}: {said}; {remedy}") from error

    return guarded


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
