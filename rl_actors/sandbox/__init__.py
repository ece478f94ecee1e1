"""Where tools run, apart from the engine, every wait bounded."""

from rl_actors.sandbox.tool_client import SANDBOX_LEVEL, ToolHostPool
