"""The only room that imports mlflow: versions, lineage, aliases, traces."""

from cluster.registry.entries import Lineage, ModelEntry, StageLog
from cluster.registry.pins import BASELINE, NO_PINS, REWARD_MODEL, Pins, resolve_pins
from cluster.registry.registry import Registry
from cluster.registry.store import Store, quieten, store_of, without_credentials
from cluster.registry.traces import sampled_traces
