"""The release controller, its pure state machine, and the monitors that watch a canary besides the gates."""

from serving.release.controller import Aliases, ReleaseController, open_release
from serving.release.state_machine import HEALTHY, TERMINAL
