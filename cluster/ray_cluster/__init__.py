"""Reaching a Ray cluster: connection, placement groups, jobs."""

from cluster.ray_cluster.connection import (
    connect,
    connected,
    entrypoint,
    follow,
    has_room,
    join,
    offer_token,
    placed,
    submit,
)
