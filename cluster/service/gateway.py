"""The gateway of a service: the run to serve, and the one call that serves its stable policy."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.records import RunFolder, list_runs, recorded_gateway
from cluster.registry import Store, store_of
from cluster.service.processes import http_ok
from rl_actors.contracts import BadInputError, InfrastructureError


def servable_run(home: Path, run_id: str = "") -> RunFolder | None:
    """Return the run to serve: the named one, else of those that finished and served the one whose policy is stable.

    Where the registry names no stable policy, or one of no run here, it is the newest.
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
    # By the registry's alias: a later run that was rolled back must not displace the one that is stable.
    wanted = (ended[newest].get("workflow"), stable_by_registry(str(ended[newest].get("workflow", "")), store_of(home)))
    named = (folder for folder, end in ended.items() if (end.get("workflow"), end.get("stable_policy")) == wanted)
    return next(named, newest)


def _ending(folder: RunFolder) -> Mapping[str, Any]:
    """Return a run's summary; one that cannot be read names no policy."""
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
    # MLflow itself would create a missing database, and ask a missing server for minutes.
    if store.is_server:
        return http_ok(f"{store.public_uri}/health")
    path = store.uri.removeprefix("sqlite:///")
    return path == store.uri or Path(path).exists()


def serve_stable(folder: RunFolder, *, ray_address: str, port: int, gpus_per_policy: float) -> str:
    """Serve the stable policy of a run on the Ray at `ray_address`; returns the version that is served.

    Raises:
        BadInputError: nothing was ever served there, or the port is in use.
        InfrastructureError: it did not start in time.
    """
    config = recorded_gateway(folder)
    # Serve connects to the cluster this names; nothing here starts a second one.
    os.environ["RAY_ADDRESS"] = ray_address
    from cluster.ray_cluster import join

    join(ray_address)
    from serving.platform import PlatformConfig, ServePlatform
    from serving.split import SplitStore
    from serving.store import ServedPolicies

    # The split says which version is stable, also after releases that came later than this run's.
    split = SplitStore(config.files.split).read()
    if split is None:
        raise BadInputError("RUN_ID", folder.run_id, f"no split record in {config.files.split}; resume the run")
    stable = ServedPolicies(config.files.served).find(split.stable)
    settings = PlatformConfig(http_port=port, gpus_per_policy=gpus_per_policy, owner="service")
    # The critic only scores for the log; a service that only serves goes without it.
    ServePlatform(replace(config, critic_application=""), settings).start(stable)
    return stable.version
