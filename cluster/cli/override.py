"""`override`: records that a human overrode the reply to a request, at the gateway or, without one, in its ledger."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

import httpx

from cluster.cli.runs import load_summary
from cluster.records import RunFolder, list_runs
from cluster.service import load_service
from rl_actors.contracts import BadInputError, InfrastructureError

DEFAULT_GATEWAY: Final = "http://127.0.0.1:8000/v1"


TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """A human's override of the reply to a request. `url` empty asks the gateway of `seatrial up`."""

    request_id: str
    actor: str
    reason: str
    url: str = ""


def record_override(override: Override, home: Path) -> str:
    """Record it once; returns where.

    Raises:
        BadInputError: no such request, or an empty actor or reason.
        InfrastructureError: a gateway named by `url` does not answer, or there is neither gateway nor ledger.
    """
    for field in ("request_id", "actor", "reason"):
        if not getattr(override, field).strip():
            raise BadInputError(field, getattr(override, field), "must say something: it is kept for the audit")
    gateway = load_service(home).find("gateway")
    url = override.url or (gateway.url if gateway else DEFAULT_GATEWAY)
    try:
        _post(override, url)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        if override.url:
            raise InfrastructureError(f"gateway {url} did not take the override: {error}; check --url") from error
        return _write_to_ledger(override, home)
    return f"gateway {url}"


def _post(override: Override, url: str) -> None:
    body = {"actor": override.actor, "reason": override.reason}
    target = f"{url.rstrip('/').removesuffix('/v1')}/v1/requests/{quote(override.request_id, safe='')}/override"
    # Proxies of the environment are for the outside world; a gateway is ours.
    reply = httpx.post(target, json=body, timeout=TIMEOUT_S, follow_redirects=True, trust_env=False)
    said = reply.text[:2000]
    if reply.status_code in {400, 404, 422}:
        raise BadInputError("REQUEST_ID", override.request_id, f"the gateway refuses it ({said}); copy the id")
    if not reply.is_success:
        raise InfrastructureError(f"gateway {url}: status {reply.status_code}: {said}; see `seatrial status`")


def _write_to_ledger(override: Override, home: Path) -> str:
    """Find the ledger that holds the request, newest first."""
    # Imported here: with a gateway nobody needs it.
    from serving.store import RequestLedger

    for path in _ledgers(home):
        ledger = RequestLedger(path, owner="seatrial-override")
        try:
            record = ledger.find(override.request_id.removeprefix("run-"))
            if record is not None:
                ledger.override(record.run_id, actor=override.actor, reason=override.reason, at=time.time())
                return f"ledger {path}"
        finally:
            ledger.close()
    raise BadInputError("REQUEST_ID", override.request_id, f"no gateway answers and no ledger under {home} holds it")


def _ledgers(home: Path) -> list[Path]:
    summaries = [load_summary(RunFolder.of(home, run_id)) for run_id in reversed(list_runs(home))]
    paths = [Path(summary.paths.ledger) for summary in summaries if summary and summary.paths.ledger]
    return [path for path in dict.fromkeys(paths) if path.exists()]
