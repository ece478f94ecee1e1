"""Files and plain data from which a gateway starts: places of one home, stamps of each version, settings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rl_actors.contracts import AgentLimits, BadInputError, CostModel, EngineError, TamperedError
from rl_actors.durable import disk_errors, write_atomic
from rl_actors.environment import WorkflowRef
from serving.contracts import STALE_AFTER_S


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiLimits:
    """Bounds checked before any work: bytes of a body, messages in it, characters of all their text."""

    max_body_bytes: int = 262_144
    max_messages: int = 64
    max_text_chars: int = 65_536


_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,251}[A-Za-z0-9_.])?")
# What a header can carry as it is: a line break in a stamp would add headers to every response.
_STAMP = re.compile(r"[!-~]{1,256}")


class ReleaseFiles:
    """Where a serving home keeps its state. Example: ReleaseFiles(root=home / "serving").ledger"""

    def __init__(self, *, root: Path) -> None:
        self.root = root
        self.ledger = root / "ledger.sqlite"
        self.split = root / "split"  # directory of the split record
        self.acks = root / "acks"  # one file per gateway: the split epoch it routes by
        self.traces = root / "traces.jsonl"  # sampled requests from within
        self.served = root / "served"  # one file per policy version: its stamps


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedPolicy:
    """One policy version and the stamps that every response of it carries. `path` is a model directory."""

    version: str
    path: str
    model_version: str
    reward_model_version: str
    bundle_id: str

    def __post_init__(self) -> None:
        if not _VERSION.fullmatch(self.version):
            raise BadInputError("policy.version", self.version, "use letters, digits, '.', '_', '-', at most 100")
        for name, value in asdict(self).items():
            if not value or (name != "path" and not _STAMP.fullmatch(value)):
                remedy = "every response is stamped: give a version of 1 to 256 printable ASCII characters"
                raise BadInputError(f"policy.{name}", value, remedy)


def application_of(version: str) -> str:
    """Return the name of a version's Serve application."""
    # It carries the version, so that it is never reused: Serve would update the old one in place.
    return f"policy-{version}"


class ServedPolicies:
    """The stamps of every version ever served, one file each."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def add(self, policy: ServedPolicy) -> None:
        """Record a version; the same again changes nothing. Raises BadInputError for other stamps under its name."""
        path = self._path(policy.version)
        if not path.exists():
            write_atomic(path, json.dumps(asdict(policy)))
        # A version means the same bytes for ever: a ledger row names nothing else.
        elif self.find(policy.version) != policy:
            raise BadInputError("policy.version", policy.version, f"{path} has other stamps; give a new name")

    def find(self, version: str) -> ServedPolicy:
        """Return a version's stamps. Raises EngineError for one that was never deployed."""
        path = self._path(version)
        if not path.exists():
            raise EngineError(f"policy {version!r} was never deployed here; call deploy_policy first")
        try:
            with disk_errors(path):
                return ServedPolicy(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, BadInputError) as error:
            raise TamperedError(f"{path} does not hold a policy's stamps ({error}); deploy it again") from error

    def _path(self, version: str) -> Path:
        return self._directory / f"{version}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """How a gateway serves one workflow. Plain data: it crosses process borders."""

    root: str
    workflow: WorkflowRef
    live_world: Mapping[str, Any]
    limits: AgentLimits
    api: ApiLimits = field(default_factory=ApiLimits)
    temperature: float = 0.0
    max_concurrency: int = 32
    engine_timeout_s: float = 15.0
    check_timeout_s: float = 5.0
    poll_s: float = 0.2
    stale_after_s: float = STALE_AFTER_S  # age at which a split record counts as share 0
    num_tool_hosts: int = 2
    cost_model: CostModel = field(default_factory=CostModel)
    fallback_text: str = "Sorry, I cannot complete this here. A person will take over."
    critic_application: str = ""
    critic_queue_size: int = 1000
    trace_fraction: float = 0.1  # share of requests whose prompts and tool actions are kept
    # Beside IP addresses, localhost and the machine's own names: host names under which clients reach the gateway.
    allowed_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for host in self.allowed_hosts:
            if not _HOST_NAME.fullmatch(host):
                remedy = "give each host as its bare name, such as gateway.example.org, without scheme, port or pattern"
                raise BadInputError("gateway.allowed_hosts", host, remedy)

    @property
    def files(self) -> ReleaseFiles:
        """The home's files."""
        return ReleaseFiles(root=Path(self.root))
