"""From an HTTP request to a released reply."""

from serving.gateway.critic_queue import Critic, CriticQueue
from serving.gateway.http import build_app
from serving.gateway.orphans import end_orphans
from serving.gateway.ports import LivePolicy, LivePorts
