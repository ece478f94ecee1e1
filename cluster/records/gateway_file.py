"""The settings a run's gateway was started with, kept for `seatrial up` and `serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cluster.records.run_folder import RunFolder
from rl_actors.contracts import BadInputError, TamperedError
from rl_actors.durable import decode, encode, write_json

if TYPE_CHECKING:
    from serving.store import GatewayConfig


GATEWAY_FILE: Final = "gateway.json"


def record_gateway(folder: RunFolder, config: GatewayConfig) -> None:
    """Keep the settings a run's gateway was started with, for `seatrial up` and `serve`."""
    write_json(settings_file(folder), encode(config))


def recorded_gateway(folder: RunFolder) -> GatewayConfig:
    """Return a run's gateway settings. Prices per token, as older runs recorded them, are left aside.

    Raises:
        BadInputError: the run never served.
        TamperedError: the file is not what `record_gateway` wrote.
    """
    # Imported here: what is served pulls in the agent loop, which `status` and `down` do not need.
    from serving.store import GatewayConfig

    path = settings_file(folder)
    if not path.exists():
        raise BadInputError("RUN_ID", folder.run_id, "this run served no policy yet; run it up to its release first")
    try:
        return decode(GatewayConfig, json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise TamperedError(f"{path} does not hold a gateway's settings ({error}); resume the run") from error


def settings_file(folder: RunFolder) -> Path:
    """Return where a run keeps the settings of its gateway."""
    return folder.decisions.parent / GATEWAY_FILE
