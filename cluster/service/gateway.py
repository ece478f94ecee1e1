"""The gateway of a service: which policy to serve, from what a run left, and the one call that serves it.

A run records its gateway's settings (`release/gateway.json`, by `record_gateway`); the split record of the serving home
says which version is stable, also after releases that came later.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.records import RunFolder, list_runs, recorded_gateway
from cluster.registry import Store, store_of
from cluster.service.processes import http_ok
from rl_actors.contracts import BadInputError, InfrastructureError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayRequest:
    """What to serve, where: a run's gateway on a running Ray."""

    folder: RunFolder
    ray_address: str
    port: int
    gpus_per_policy: float = 0.0


def servable_run(home: Path, run_id: str = "") -> RunFolder | None:
    """Return the run to serve: the named one, else of those that finished and served the one whose policy is stable.

    Stable is what the registry's alias names: a later run that was rolled back must not displace it. Where the registry
    does not say, or names a policy of no run here, it is the newest.
    """
    if run_id:
        folder = RunFolder.of(home, run_id)
        recorded_gateway(folder)
        return folder
    folders = [RunFolder.of(home, name) for name in reversed(list_runs(home))]
    ended = {folder: _ending(folder) for folder in folders if folder.summary.exists() and folder.gateway.exists()}
    newest = next(iter(ended), None)
    if newest is None or len({end.get("stable_policy") for end in ended.values()}) == 1:
        return newest
    wanted = (ended[newest].get("workflow"), stable_by_registry(str(ended[newest].get("workflow", "")), store_of(home)))
    named = (folder for folder, end in ended.items() if (end.get("workflow"), end.get("stable_policy")) == wanted)
    return next(named, newest)


def _ending(folder: RunFolder) -> Mapping[str, Any]:
    """Return a run's summary as it lies there; one that cannot be read names no policy."""
    try:
        found = json.loads(folder.summary.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def stable_by_registry(workflow: str, store: Store) -> str:
    """Return the policy that the alias `stable` of a workflow names; empty when none, or when no registry answers."""
    if not workflow or not _is_there(store):
        return ""
    # Imported here: MLflow loads for seconds, and most homes have one run to serve.
    from cluster.registry import Registry

    try:
        return Registry(workflow, "up", store=store).versions.alias_version("stable")
    except InfrastructureError:
        return ""


def _is_there(store: Store) -> bool:
    """Look before MLflow does: it would create a missing database, and ask a missing server for minutes."""
    if store.is_server:
        return http_ok(f"{store.public_uri}/health")
    path = store.uri.removeprefix("sqlite:///")
    return path == store.uri or Path(path).exists()


def serve_stable(request: GatewayRequest) -> str:
    """Serve the stable policy of a run on the Ray at `ray_address`; returns the version that is served.

    Raises:
        BadInputError: nothing was ever served there, or the port is in use.
        InfrastructureError: it did not start in time.
    """
    config = recorded_gateway(request.folder)
    # Serve connects to the cluster this names; nothing here starts a second one.
    os.environ["RAY_ADDRESS"] = request.ray_address
    from cluster.ray_cluster import join

    join(request.ray_address)
    from serving.platform import PlatformConfig, ServePlatform
    from serving.split import SplitStore
    from serving.store import ServedPolicies

    split = SplitStore(config.files.split).read()
    if split is None:
        raise BadInputError("RUN_ID", request.folder.run_id, f"no split record in {config.files.split}; resume the run")
    stable = ServedPolicies(config.files.served).find(split.stable)
    settings = PlatformConfig(http_port=request.port, gpus_per_policy=request.gpus_per_policy, owner="service")
    # The critic only scores for the log; a service that only serves goes without it.
    ServePlatform(replace(config, critic_application=""), settings).start(stable)
    return stable.version
