"""The ONLY file that imports mlflow: runs, curves, models, lineage, aliases and the trace mirror.

One experiment per workflow, a parent run per pipeline run and a child run per stage. Every write is idempotent, so that
a resumed run repeats it harmlessly. Every MLflow failure raises InfrastructureError with the remedy; only lost traces
do not: they are counted, for gates read our own ledger and never MLflow.

MLflow is imported on first use. That costs about 4 s, and the first migration of a new SQLite store about 3 s of
processor time; `connect_in_background` hides both behind the first stages.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cluster.registry_entries import (
    Lineage,
    Links,
    ModelEntry,
    StageLog,
    is_number,
    metric_points,
    params_of,
    version_description,
    version_tags,
)
from cluster.registry_store import Store, quieten
from cluster.registry_traces import MirrorReport, SampledTrace, TraceSpan, feedback_rows, root_span, trace_tags
from rl_actors.contracts import DataSnapshot, PolicyVersion, RewardModelVersion
from rl_actors.errors import InfrastructureError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LiveSpan, Metric, Run
    from mlflow.entities.model_registry import ModelVersion
