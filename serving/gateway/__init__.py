"""From an HTTP request to a released reply."""

from serving.gateway.answer import LiveRequests
from serving.gateway.critic_queue import Critic, CriticQueue
from serving.gateway.http import build_app
from serving.gateway.ports import LivePolicy, LivePorts
