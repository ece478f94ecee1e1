"""Whose application a Serve application is: every deployment of ours carries, in its name, who started it and for what.

The mark lives in Serve itself, so it lasts exactly as long as what it marks, through any kill and restart of ours.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rl_actors.contracts import BadInputError
from rl_actors.ports import listen_error

Owner = Literal["run", "service"]


PORT_FIELD = "cluster.serve_port"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSite:
    """One serving home behind one port, and who starts applications for it: a run, which ends, or a service.

    Example: ServeSite(root="/home/runs/r1/serving", port=8000, owner="run").deployment("Gateway")
    gives "Gateway-run-8000-1f0c9a5be2d4".
    """

    root: str
    port: int
    owner: Owner

    @property
    def mark(self) -> str:
        """What the names of its deployments end with, whoever started them."""
        return f"-{self.port}-{hashlib.sha256(str(Path(self.root).resolve()).encode()).hexdigest()[:12]}"

    def deployment(self, kind: str) -> str:
        """Return the name of a deployment."""
        return f"{kind}-{self.owner}{self.mark}"

    def is_started_here(self, deployments: Iterable[str]) -> bool:
        """Whether this owner started an application with these deployments, now or before a restart."""
        return any(name.endswith(f"-{self.owner}{self.mark}") for name in deployments)

    def is_strange(self, deployments: Iterable[str]) -> bool:
        """Whether an application belongs to another home or port; one that has no deployments yet cannot be told."""
        names = tuple(deployments)
        return bool(names) and not any(name.endswith(self.mark) for name in names)


def require_free_port(host: str, port: int) -> None:
    """Raise BadInputError when nobody could listen there."""
    error = listen_error(port, host)
    if error is not None:
        remedy = "already in use; end what listens there, or set cluster.serve_port"
        if error.errno != errno.EADDRINUSE:
            remedy = f"cannot listen there ({error.strerror}); choose another host or port"
        raise BadInputError(PORT_FIELD, f"{host}:{port}", remedy) from error


def require_serve_there(host: str, port: int) -> None:
    """Raise BadInputError when Serve runs, but nobody listens at the port that is ours: it has another one."""
    if listen_error(port, host) is None:
        remedy = "Serve runs on this Ray behind another port; give that port, or first end it: serve shutdown -y"
        raise BadInputError(PORT_FIELD, f"{host}:{port}", remedy)
