"""The release controller and its pure state machine."""

from serving.release.controller import Aliases, LedgerEvidence, ReleaseController
from serving.release.state_machine import HEALTHY, TERMINAL
