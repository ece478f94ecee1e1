"""The only room that imports mlflow: versions, lineage, aliases, traces."""

from cluster.registry.connection import Store, quieten, store_of, without_credentials
from cluster.registry.entries import Lineage, ModelVersion, StageLinks, StageLog
from cluster.registry.registry import Registry
from cluster.registry.traces import sampled_traces
from cluster.registry.versions import BASELINE, NO_PINS, REWARD_MODEL, Pins, RegisteredVersions, resolve_pins
