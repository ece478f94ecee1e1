"""Monitors, each one file that registers itself: they watch a canary besides the gates."""

from serving.gates import import_modules
from serving.release.monitors.registry import evaluate_live

import_modules(__path__, __name__)
