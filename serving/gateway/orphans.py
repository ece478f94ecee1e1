"""Ending the runs that dead gateways left open, at the start of a gateway and as long as it lives.

A gateway that is rescheduled at once finds its predecessor's word still fresh: only a later look can tell that nobody
stands behind it any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from rl_actors.contracts import InfrastructureError
from rl_actors.durable import disk_errors
from serving.split import is_live, read_acks
from serving.store import GatewayConfig, RequestLedger

_LOOKS_PER_STALE_TIME: Final = 6


def end_orphans(ledger: RequestLedger, config: GatewayConfig, clock: Callable[[], float]) -> int:
    """Abort the runs that dead gateways left open, and forget those gateways; returns how many runs.

    `ledger.owner` is never one of them: a gateway whose disk keeps it from acknowledging still answers its users.
    """
    num_ended = 0
    for ack in read_acks(config.files.acks):
        if ack.gateway != ledger.owner and not is_live(ack, clock(), config.stale_after_s):
            num_ended += ledger.abort_orphans(ack.gateway, at=clock())
            path = config.files.acks / f"{ack.gateway}.json"
            with disk_errors(path):
                path.unlink(missing_ok=True)
    return num_ended


async def watch_orphans(ledger: RequestLedger, config: GatewayConfig, clock: Callable[[], float]) -> None:
    """Look until cancelled, six times while a word goes stale: a look reads one small file per gateway."""
    while True:
        # A ledger that is locked or full now may be written at the next look.
        with suppress(InfrastructureError):
            await asyncio.to_thread(end_orphans, ledger, config, clock)
        await asyncio.sleep(config.stale_after_s / _LOOKS_PER_STALE_TIME)
