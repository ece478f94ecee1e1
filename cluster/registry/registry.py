"""What one pipeline run tells MLflow: runs, curves, models and sampled traces.

One experiment per workflow, a parent run per pipeline run and a child run per stage. Every write is idempotent, so that
a resumed run repeats it harmlessly. Every MLflow failure raises InfrastructureError with the remedy; only lost traces
do not: they are counted, for gates read our own ledger and never MLflow.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cluster.registry.connection import PARENT, Connection, Store, reported
from cluster.registry.entries import StageLinks, StageLog, flatten, is_number, metric_points, params_of
from cluster.registry.traces import MirrorReport, SampledTrace, TraceSpan, feedback_rows, root_span, trace_tags
from cluster.registry.versions import RegisteredVersions
from rl_actors.contracts import DataSnapshot, InfrastructureError

if TYPE_CHECKING:
    from mlflow.entities import LiveSpan

# Most that MLflow takes in one log_batch, and the characters of a dataset's digest that it keeps.
_BATCH: Final = 1000
_PARAM_BATCH: Final = 100
_DIGEST_LENGTH: Final = 36


class Registry(Connection):
    """Everything one pipeline run tells MLflow; `versions` holds the registered versions and the aliases port.

    Example: Registry("support_desk", run_id, store=store_of(seatrial_home())).versions.move("stable", "sft-1a2b")
    """

    def __init__(self, workflow: str, run_id: str, *, store: Store) -> None:
        """Touch nothing: the first call connects."""
        super().__init__(workflow, run_id, store)
        self.versions = RegisteredVersions(self)

    @reported
    def start_run(self, *, spec: Mapping[str, Any], started_at: float) -> str:
        """Open (or, on resume, reopen) the parent run of this pipeline run; returns MLflow's run id."""
        mlflow_run = self.open_run(PARENT, started_at)
        # A run that was stopped and goes on is marked as failed until now.
        self.connect().set_terminated(mlflow_run, status="RUNNING", end_time=None)
        self._log_params(mlflow_run, spec)
        return mlflow_run

    @reported
    def end_run(
        self, *, finished_at: float, is_success: bool, metrics: Mapping[str, Any], tags: Mapping[str, str] | None = None
    ) -> None:
        """Close the parent run with its final numbers."""
        mlflow_run = self.open_run(PARENT, finished_at)
        self._log_metrics(mlflow_run, metrics, finished_at)
        for key, value in (tags or {}).items():
            self.connect().set_tag(mlflow_run, key, value)
        status = "FINISHED" if is_success else "FAILED"
        self.connect().set_terminated(mlflow_run, status=status, end_time=int(finished_at * 1000))

    @reported
    def log_stage(self, log: StageLog) -> str:
        """Write a finished stage as a child run with parameters, curves, artifacts and model edges."""
        mlflow_run = self.open_run(log.stage, log.started_at)
        self._log_params(mlflow_run, log.params)
        self._log_metrics(mlflow_run, log.metrics, log.finished_at)
        self._log_curves(mlflow_run, log)
        for path in log.artifacts:
            self.connect().log_artifact(mlflow_run, str(path))
        if log.links.snapshot is not None:
            self._log_snapshot(mlflow_run, log.links.snapshot)
        self._log_edges(mlflow_run, log.links)
        self.connect().set_terminated(mlflow_run, status="FINISHED", end_time=int(log.finished_at * 1000))
        return mlflow_run

    @reported
    def log_report(self, directory: Path) -> None:
        """Attach the briefs and their figures to the parent run."""
        self.connect().log_artifacts(self.open_run(PARENT, time.time()), str(directory), "report")

    @reported
    def parent_tags(self) -> Mapping[str, str]:
        """Return the tags of the parent run; none when MLflow does not have it, and then none is created."""
        found = self.find_run(PARENT)
        return dict(found.data.tags) if found else {}

    def _log_params(self, mlflow_run: str, tree: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in params_of(tree).items()]
        for start in range(0, len(params), _PARAM_BATCH):
            self.connect().log_batch(mlflow_run, params=params[start : start + _PARAM_BATCH])

    def _log_metrics(self, mlflow_run: str, tree: Mapping[str, Any], at: float) -> None:
        for key, value in flatten(tree).items():
            if is_number(value):
                self.connect().log_metric(mlflow_run, key, float(value), timestamp=int(at * 1000))

    def _log_curves(self, mlflow_run: str, log: StageLog) -> None:
        from mlflow.entities import Metric

        points: list[Metric] = [Metric(p.key, p.value, p.at_ms, p.step) for p in metric_points(log.rows, log.stage)]
        for start in range(0, len(points), _BATCH):
            self.connect().log_batch(mlflow_run, metrics=points[start : start + _BATCH])

    def _log_snapshot(self, mlflow_run: str, snapshot: DataSnapshot) -> None:
        """Log the data as a dataset input."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=f"{self.workflow}-snapshot",
            digest=snapshot.sha256[:_DIGEST_LENGTH],
            source_type="local",
            source=json.dumps({"uri": Path(snapshot.path).absolute().as_uri()}),
            profile=json.dumps({"num_rows": dict(snapshot.num_rows), "num_tasks": dict(snapshot.num_tasks)}),
        )
        tags = [InputTag("mlflow.data.context", "training"), InputTag("seatrial.sha256", snapshot.sha256)]
        self.connect().log_inputs(mlflow_run, datasets=[DatasetInput(dataset, tags)])
        # MLflow's digest holds 36 characters: the whole hash is a tag.
        self.connect().set_tag(mlflow_run, "seatrial.snapshot_sha256", snapshot.sha256)

    def _log_edges(self, mlflow_run: str, links: StageLinks) -> None:
        """Draw model -> stage -> model."""
        from mlflow.entities import LoggedModelInput, LoggedModelOutput

        # An edge that is there already must not be drawn again: MLflow's table has a unique key.
        client, run = self.connect(), self.connect().get_run(mlflow_run)
        has_inputs = {edge.model_id for edge in (run.inputs.model_inputs if run.inputs else [])}
        has_outputs = {edge.model_id for edge in (run.outputs.model_outputs if run.outputs else [])}
        read = {self.log_model(version, mlflow_run) for version in links.inputs} - has_inputs
        made = {self.log_model(version, mlflow_run) for version in links.outputs} - has_outputs
        if read:
            client.log_inputs(mlflow_run, models=[LoggedModelInput(model_id) for model_id in sorted(read)])
        if made:
            client.log_outputs(mlflow_run, [LoggedModelOutput(model_id, 0) for model_id in sorted(made)])

    def mirror(self, traces: Iterable[SampledTrace]) -> MirrorReport:
        """Copy sampled runs with their feedback; a lost one is counted and never stops anything."""
        report = MirrorReport()
        for trace in traces:
            try:
                report = self._copy(report, trace)
            except InfrastructureError as error:
                # A picture less, and no decision: gates read our own ledger.
                report = replace(report, lost=report.lost + 1, first_error=report.first_error or str(error))
        return report

    def _copy(self, report: MirrorReport, trace: SampledTrace) -> MirrorReport:
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
        """Write one trace with its feedback."""
        self.connect()
        import mlflow
        from mlflow.entities import AssessmentSource

        mlflow.set_tracking_uri(self.store.uri)  # global to the process: another registry may have moved it
        tags, source = trace_tags(trace.record), {"mlflow.sourceRun": self.open_run(PARENT, time.time())}
        root = self._write_span(root_span(trace), None, tags=tags, metadata=source)
        # Export swallows its errors: only what is read back counts as written.
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
