"""Reaching a Ray cluster: connection, placement groups, jobs."""

from cluster.ray_cluster.connection import connected, has_room, join, offer_token, placed
from cluster.ray_cluster.jobs import connect, entrypoint, follow, submit
