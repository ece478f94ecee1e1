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
from typing import TYPE_CHECKING, Any, Final

from cluster.paths import RunFolder, list_runs
from cluster.registry_store import Store, store_of
from cluster.service_processes import http_ok
from rl_actors.durable.codec import decode, encode
from rl_actors.durable.files import write_json
from rl_actors.errors import BadInputError, InfrastructureError, TamperedError

if TYPE_CHECKING:
    from serving.served import GatewayConfig

GATEWAY_FILE: Final = "gateway.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayRequest:
    """What to serve, where: a run's gateway on a running Ray."""

    folder: RunFolder
    ray_address: str
    port: int
    gpus_per_policy: float = 0.0


def record_gateway(folder: RunFolder, config: GatewayConfig) -> None:
    """Keep the settings a run's gateway was started with, for `seatrial up` and `serve`."""
    write_json(_file(folder), encode(config))


def recorded_gateway(folder: RunFolder) -> GatewayConfig:
    """Return a run's gateway settings. Prices per token, as older runs recorded them, are left aside.

    Raises:
        BadInputError: the run never served.
        TamperedError: the file is not what `record_gateway` wrote.
    """
    # Imported here: what is served pulls in the agent loop, which `status` and `down` do not need.
    from serving.served import GatewayConfig

    path = _file(folder)
    if not path.exists():
        raise BadInputError("RUN_ID", folder.run_id, "this run served no policy yet; run it up to its release first")
    try:
        return decode(GatewayConfig, json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise TamperedError(f"{path} does not hold a gateway's settings ({error}); resume the run") from error


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
    ended = {folder: _ending(folder) for folder in folders if folder.summary.exists() and _file(folder).exists()}
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
    from cluster.stages.ray_runtime import join

    join(request.ray_address)
    from serving.platform import PlatformConfig, ServePlatform
    from serving.served import ServedPolicies
    from serving.split import SplitStore

    split = SplitStore(config.files.split).read()
    if split is None:
        raise BadInputError("RUN_ID", request.folder.run_id, f"no split record in {config.files.split}; resume the run")
    stable = ServedPolicies(config.files.served).find(split.stable)
    settings = PlatformConfig(http_port=request.port, gpus_per_policy=request.gpus_per_policy, owner="service")
    # The critic only scores for the log; a service that only serves goes without it.
    ServePlatform(replace(config, critic_application=""), settings).start(stable)
    return stable.version


def _file(folder: RunFolder) -> Path:
    return folder.decisions.parent / GATEWAY_FILE
