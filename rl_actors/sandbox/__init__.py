"""Where tools run, apart from the engine, every wait bounded."""

from rl_actors.sandbox.process import ProcessSandbox
from rl_actors.sandbox.protocol import Sandbox, ToolWorld, WorldSession
