"""The ONLY file that imports mlflow: runs, curves, models, lineage, aliases and the trace mirror.

One experiment per workflow, a parent run per pipeline run and a child run per stage. Every write is idempotent, so that
a resumed run repeats it harmlessly. Every MLflow failure raises InfrastructureError with the remedy; only lost traces
do not: they are counted, for gates read our own ledger and never MLflow.

MLflow is imported on first use: 3 s of processor time, and 2.5 s more for the first migration of a new SQLite store
(6 s together on two idle cores, 11 s on busy ones); `connect_in_background` hides both behind the first stages.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cluster.registry.entries import ModelEntry, StageLog, flatten, is_number, metric_points, model_name, params_of
from cluster.registry.store import Store, quieten, reported
from cluster.registry.traces import MirrorReport, SampledTrace, TraceSpan, feedback_rows, root_span, trace_tags
from cluster.registry.versions import PARENT, RegisteredVersions
from rl_actors.contracts import DataSnapshot, InfrastructureError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LiveSpan, Run


_BATCH: Final = 1000


_PARAM_BATCH: Final = 100


_DIGEST_LENGTH: Final = 36


class Registry:
    """Everything one pipeline run tells MLflow; `versions` holds the registered versions and the aliases port.

    Example: Registry("support_desk", run_id, store=store_of(seatrial_home())).versions.move("stable", "sft-1a2b")
    """

    def __init__(self, workflow: str, run_id: str, *, store: Store) -> None:
        """Touch nothing: the first call connects."""
        self.workflow, self.run_id, self.store = workflow, run_id, store
        self.versions = RegisteredVersions(self)
        self._lock = threading.RLock()
        self._client: MlflowClient | None = None
        self.experiment_id = ""

    # --- connection ---------------------------------------------------------------------------------------------------

    def connect_in_background(self) -> threading.Thread:
        """Import MLflow and migrate the store beside other work. A failure shows again at the first real call."""

        def connect() -> None:
            with suppress(InfrastructureError):
                self.connect()

        thread = threading.Thread(target=connect, name="mlflow-connect", daemon=True)
        thread.start()
        return thread

    @reported
    def connect(self) -> MlflowClient:
        """Return the client, with store and experiment in place. Idempotent and thread-safe."""
        with self._lock:
            if self._client is None:
                self._client = self._connected()
            return self._client

    def _connected(self) -> MlflowClient:
        quieten()
        import mlflow

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        if self.store.artifacts is not None:
            self.store.artifacts.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(self.store.uri)
        mlflow.set_registry_uri(self.store.uri)
        client = mlflow.MlflowClient(self.store.uri, self.store.uri)
        experiment = client.get_experiment_by_name(self.workflow)
        place = str(self.store.artifacts / self.workflow) if self.store.artifacts else None
        self.experiment_id = experiment.experiment_id if experiment else client.create_experiment(self.workflow, place)
        return client

    # --- runs ---------------------------------------------------------------------------------------------------------

    @reported
    def start_run(self, *, spec: Mapping[str, Any], started_at: float, tags: Mapping[str, str] | None = None) -> str:
        """Open (or, on resume, reopen) the parent run of this pipeline run; returns MLflow's run id."""
        run_id = self.run(PARENT, started_at).info.run_id
        self.connect().set_terminated(run_id, status="RUNNING", end_time=None)
        self._log_params(run_id, spec)
        for key, value in (tags or {}).items():
            self.connect().set_tag(run_id, key, value)
        return run_id

    @reported
    def end_run(
        self, *, finished_at: float, is_success: bool, metrics: Mapping[str, Any], tags: Mapping[str, str] | None = None
    ) -> None:
        """Close the parent run with its final numbers."""
        run_id = self.run(PARENT, finished_at).info.run_id
        self._log_metrics(run_id, metrics, finished_at)
        for key, value in (tags or {}).items():
            self.connect().set_tag(run_id, key, value)
        status = "FINISHED" if is_success else "FAILED"
        self.connect().set_terminated(run_id, status=status, end_time=int(finished_at * 1000))

    @reported
    def log_stage(self, log: StageLog) -> str:
        """Write a finished stage as a child run with parameters, curves, artifacts and model edges."""
        run_id = self.run(log.stage, log.started_at).info.run_id
        self._log_params(run_id, log.params)
        self._log_metrics(run_id, log.metrics, log.finished_at)
        self._log_curves(run_id, log)
        for path in log.artifacts:
            self._log_path(run_id, path)
        if log.snapshot is not None:
            self._log_snapshot(run_id, log.snapshot)
        self._log_edges(run_id, log)
        self.connect().set_terminated(run_id, status="FINISHED", end_time=int(log.finished_at * 1000))
        return run_id

    @reported
    def log_report(self, directory: Path) -> None:
        """Attach the briefs and their figures to the parent run."""
        run_id = self.run(PARENT, time.time()).info.run_id
        self.connect().log_artifacts(run_id, str(directory), "report")

    def run(self, stage: str, started_at: float) -> Run:
        """Find or create the run of a stage: a resumed pipeline goes on in the runs it had."""
        client = self.connect()
        found = self._found(stage)
        if found is not None:
            return found
        tags = {"seatrial.run_id": self.run_id, "seatrial.stage": stage}
        if stage != PARENT:
            tags["mlflow.parentRunId"] = self.run(PARENT, started_at).info.run_id
        name = self.run_id if stage == PARENT else stage
        return client.create_run(self.experiment_id, start_time=int(started_at * 1000), tags=tags, run_name=name)

    def _found(self, stage: str) -> Run | None:
        client = self.connect()
        wanted = f"tags.`seatrial.run_id` = '{self.run_id}' and tags.`seatrial.stage` = '{stage}'"
        found = client.search_runs([self.experiment_id], wanted, max_results=1)
        return found[0] if found else None

    @reported
    def parent_tags(self) -> Mapping[str, str]:
        """Return the tags of the parent run; none when MLflow does not have it, and then none is created."""
        found = self._found(PARENT)
        return dict(found.data.tags) if found else {}

    def _log_params(self, run_id: str, tree: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in params_of(tree).items()]
        for start in range(0, len(params), _PARAM_BATCH):
            self.connect().log_batch(run_id, params=params[start : start + _PARAM_BATCH])

    def _log_metrics(self, run_id: str, tree: Mapping[str, Any], at: float) -> None:
        for key, value in flatten(tree).items():
            if is_number(value):
                self.connect().log_metric(run_id, key, float(value), timestamp=int(at * 1000))

    def _log_curves(self, run_id: str, log: StageLog) -> None:
        from mlflow.entities import Metric

        points: list[Metric] = [Metric(p.key, p.value, p.at_ms, p.step) for p in metric_points(log.rows, log.stage)]
        for start in range(0, len(points), _BATCH):
            self.connect().log_batch(run_id, metrics=points[start : start + _BATCH])

    def _log_path(self, run_id: str, path: Path) -> None:
        if path.is_dir():
            self.connect().log_artifacts(run_id, str(path), path.name)
        else:
            self.connect().log_artifact(run_id, str(path))

    def _log_snapshot(self, run_id: str, snapshot: DataSnapshot) -> None:
        """Log the data as a dataset input; MLflow's digest holds 36 characters, so the whole hash is a tag."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=f"{self.workflow}-snapshot",
            digest=snapshot.sha256[:_DIGEST_LENGTH],
            source_type="local",
            source=json.dumps({"uri": Path(snapshot.path).absolute().as_uri()}),
            profile=json.dumps({"num_rows": dict(snapshot.num_rows), "num_tasks": dict(snapshot.num_tasks)}),
        )
        tags = [InputTag("mlflow.data.context", "training"), InputTag("seatrial.sha256", snapshot.sha256)]
        self.connect().log_inputs(run_id, datasets=[DatasetInput(dataset, tags)])
        self.connect().set_tag(run_id, "seatrial.snapshot_sha256", snapshot.sha256)

    # --- logged models ------------------------------------------------------------------------------------------------

    def _log_edges(self, run_id: str, log: StageLog) -> None:
        """Draw model -> stage -> model; an edge that is there already must not be drawn again (a unique key)."""
        from mlflow.entities import LoggedModelInput, LoggedModelOutput

        client, run = self.connect(), self.connect().get_run(run_id)
        has_inputs = {edge.model_id for edge in (run.inputs.model_inputs if run.inputs else [])}
        has_outputs = {edge.model_id for edge in (run.outputs.model_outputs if run.outputs else [])}
        read = {self.logged_model(entry, run_id) for entry in log.inputs} - has_inputs
        made = {self.logged_model(entry, run_id) for entry in log.outputs} - has_outputs
        if read:
            client.log_inputs(run_id, models=[LoggedModelInput(model_id) for model_id in sorted(read)])
        if made:
            client.log_outputs(run_id, [LoggedModelOutput(model_id, 0) for model_id in sorted(made)])

    def logged_model(self, entry: ModelEntry, run_id: str | None = None) -> str:
        """Find or create the LoggedModel of this content; the weights are not copied."""
        client = self.connect()
        wanted = f"tags.`seatrial.sha256` = '{entry.sha256}' and tags.`seatrial.version` = '{entry.name}'"
        found = client.search_logged_models([self.experiment_id], wanted, max_results=1)
        if found:
            return found[0].model_id
        model = client.create_logged_model(
            self.experiment_id,
            name=model_name(entry.name),
            source_run_id=run_id,
            tags={"seatrial.sha256": entry.sha256, "seatrial.version": entry.name, "seatrial.run_id": self.run_id},
            params={"path": entry.path, "sha256": entry.sha256},
            model_type=entry.kind,
        )
        client.finalize_logged_model(model.model_id, "READY")
        return model.model_id

    # --- trace mirror -------------------------------------------------------------------------------------------------

    def mirror(self, traces: Iterable[SampledTrace]) -> MirrorReport:
        """Copy sampled runs with their feedback; a lost one is counted and never stops anything."""
        report = MirrorReport()
        for trace in traces:
            try:
                report = self._mirrored(report, trace)
            except InfrastructureError as error:
                report = replace(report, lost=report.lost + 1, first_error=report.first_error or str(error))
        return report

    def _mirrored(self, report: MirrorReport, trace: SampledTrace) -> MirrorReport:
        if self._has_trace(trace.record.run_id):
            return replace(report, already_there=report.already_there + 1)
        self._log_trace(trace)
        return replace(report, written=report.written + 1)

    @reported
    def _has_trace(self, run_id: str) -> bool:
        client, wanted = self.connect(), f"tags.`seatrial.run_id` = '{run_id}'"
        return bool(client.search_traces(locations=[self.experiment_id], filter_string=wanted, max_results=1))

    @reported
    def _log_trace(self, trace: SampledTrace) -> None:
        """Write one trace. Export swallows its errors, so the trace is read back before it counts as written."""
        self.connect()
        import mlflow
        from mlflow.entities import AssessmentSource

        mlflow.set_tracking_uri(self.store.uri)  # global to the process: another registry may have moved it
        tags, source = trace_tags(trace.record), {"mlflow.sourceRun": self.run(PARENT, time.time()).info.run_id}
        root = self._write_span(root_span(trace), None, tags=tags, metadata=source)
        if not self._has_trace(trace.record.run_id):
            raise InfrastructureError(f"MLflow did not keep the trace of {trace.record.run_id}; {self.store.remedy}")
        for row in feedback_rows(trace):
            by = AssessmentSource(source_type=row.source_kind, source_id=row.source)
            rationale = row.rationale or None
            mlflow.log_feedback(trace_id=root.trace_id, name=row.name, value=row.value, source=by, rationale=rationale)

    def _write_span(
        self,
        span: TraceSpan,
        parent: LiveSpan | None,
        *,
        tags: dict[str, str] | None = None,
        metadata: dict[str, str] | None = None,
    ) -> LiveSpan:
        import mlflow

        start_ns = int(span.started_at * 1e9)
        live = mlflow.start_span_no_context(
            span.name,
            span_type=span.kind,
            parent_span=parent,
            inputs=span.inputs,
            attributes=dict(span.attributes),
            tags=tags,
            metadata=metadata,
            experiment_id=None if parent else self.experiment_id,  # below the root MLflow would drop the span
            start_time_ns=start_ns,
        )
        for child in span.children:
            self._write_span(child, live)
        if span.error:
            live.set_attribute("error", span.error)
        status = "ERROR" if span.error else "OK"
        live.end(outputs=span.outputs, status=status, end_time_ns=start_ns + int(span.duration_ms * 1e6))
        return live
