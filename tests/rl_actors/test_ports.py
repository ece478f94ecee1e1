"""Ports: taken, silent and free ones are told apart."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from rl_actors.ports import free_port, listen_error, listens


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server


def test_a_listening_port_is_not_free(listener: socket.socket):
    port = listener.getsockname()[1]
    error = listen_error(port)
    assert error is not None
    assert error.errno == errno.EADDRINUSE
    listener.close()
    assert listen_error(port) is None


def test_an_address_of_another_machine_is_not_ours_to_listen_on():
    error = listen_error(8000, "203.0.113.7")
    assert error is not None
    assert error.errno == errno.EADDRNOTAVAIL


def test_who_listens_is_heard_and_a_number_that_is_no_port_is_nobody(listener: socket.socket):
    port = listener.getsockname()[1]
    assert listens("127.0.0.1", port, 2.0)
    assert not listens("127.0.0.1", 99_999, 2.0)
    listener.close()
    assert not listens("127.0.0.1", port, 2.0)


def test_a_free_port_can_be_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        port = taken.getsockname()[1]
        assert 1024 <= port < 65536
        assert free_port() != port
