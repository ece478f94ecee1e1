"""The gateway of a service: which policy to serve, from what a run left, and the one call that serves it.

A run records its gateway's settings (`release/gateway.json`, by `record_gateway`); the split record of the serving home
says which version is stable, also after releases that came later.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cluster.codec import decode, encode
from cluster.paths import RunFolder, list_runs, write_json
from rl_actors.errors import BadInputError, TamperedError

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
    """Return a run's gateway settings.

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
    """Return the run to serve: the named one, else the newest that finished and served; None when there is none."""
    if run_id:
        folder = RunFolder.of(home, run_id)
        recorded_gateway(folder)
        return folder
    folders = (RunFolder.of(home, name) for name in reversed(list_runs(home)))
    return next((folder for folder in folders if folder.summary.exists() and _file(folder).exists()), None)


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
    settings = PlatformConfig(http_port=request.port, gpus_per_policy=request.gpus_per_policy)
    # The critic only scores for the log; a service that only serves goes without it.
    ServePlatform(replace(config, critic_application=""), settings).start(stable)
    return stable.version


def _file(folder: RunFolder) -> Path:
    return folder.decisions.parent / GATEWAY_FILE
