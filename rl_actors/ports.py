"""TCP ports of a machine: could one listen there, does somebody, and which is free."""

from __future__ import annotations

import socket


def listen_error(port: int, host: str = "127.0.0.1") -> OSError | None:
    """Return why this process could not listen there; None when it could."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a connection in TIME_WAIT does not block the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def listens(host: str, port: int, timeout_s: float) -> bool:
    """Return True when somebody accepts connections there in time."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s):
            return True
    except (OSError, OverflowError):
        return False


def free_port() -> int:
    """Return a port that is free now on every interface of this machine."""
    # The system picks it; held no longer, it may be taken before its user binds it, so ask as late as possible.
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
