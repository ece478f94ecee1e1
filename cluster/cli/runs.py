"""From a command line to a run folder: a new one, or an unfinished one that fits the spec."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from cluster.plan import becomes_free, check_model, check_workflow, plan_run, probe_machine, require_ready
from cluster.records import RunFolder, RunSummary, list_runs, new_run_id
from cluster.spec import SpecSource, WorkflowSpec, leaf_paths, load_spec, override, parse_spec, parse_yaml
from cluster.workflows import known_workflows
from rl_actors.contracts import BadInputError, TamperedError, unknown_name
from rl_actors.durable import write_json

LATEST: Final = "latest"
STAGES_WITH_SERVING: Final = ("", "release")
RESUME_PORT_WAIT_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """Words of a command line. `resume` is empty, a run id, or `latest`."""

    spec: str = ""
    settings: Sequence[str] = ()
    address: str = ""
    run_id: str = ""
    resume: str = ""


def requested_spec(request: RunRequest) -> WorkflowSpec:
    """Return the spec with settings applied. Raises BadInputError."""
    if not request.spec:
        raise BadInputError("SPEC", "", f"name a spec file or a workflow: {', '.join(known_workflows())}")
    settings = list(request.settings)
    if request.address:
        # As JSON: a setting is read as YAML, where a bare word may mean something else.
        settings.append(f"cluster.address={json.dumps(request.address)}")
    spec = load_spec(request.spec)
    spec = override(spec, settings) if settings else spec
    check_model(spec.model.path)
    check_workflow(spec)
    return spec


def open_run(request: RunRequest, home: Path) -> tuple[WorkflowSpec, RunFolder]:
    """Return spec and folder of the run that is asked for.

    Raises:
        BadInputError: the spec, the run id, or a resume that does not fit.
    """
    if request.resume:
        return _resume(request, home)
    spec = requested_spec(request)
    # The folder is made when the run begins: what is refused before leaves nothing behind.
    folder = RunFolder.of(home, request.run_id or new_run_id(spec.workflow.name))
    if folder.spec.exists():
        remedy = f"this run exists; continue it with --resume {folder.run_id}, or choose another id"
        raise BadInputError("--run-id", folder.run_id, remedy)
    return spec, folder


def _resume(request: RunRequest, home: Path) -> tuple[WorkflowSpec, RunFolder]:
    if request.run_id and request.resume not in {LATEST, request.run_id}:
        raise BadInputError("--run-id", request.run_id, f"--resume names another run, {request.resume}; give one")
    wanted = request.run_id or request.resume
    if not request.spec:
        given = [*request.settings, *([f"--address {request.address}"] if request.address else [])]
        if given:
            raise BadInputError("--set", given, "a resumed run keeps its own spec; leave this out, or start a new run")
        folder = _find_unfinished(home, wanted)
        return recorded_spec(folder), folder
    spec = requested_spec(request)
    folder = latest_unfinished(home, spec.workflow.name) if wanted == LATEST else _find_unfinished(home, wanted)
    _refuse_other_spec(spec, folder)
    return spec, folder


def _find_unfinished(home: Path, run_id: str) -> RunFolder:
    """Return the folder of a run, or of the newest unfinished one for `latest`. Raises BadInputError."""
    runs = list_runs(home)
    if run_id == LATEST and runs:
        unfinished = [run for run in runs if not is_finished(RunFolder.of(home, run))]
        run_id = unfinished[-1] if unfinished else LATEST
    folder = RunFolder.of(home, run_id)
    if folder.spec.is_file():
        return folder
    # `--resume SPEC` is the usual slip: a bare --resume takes the word that follows it.
    if run_id in known_workflows() or Path(run_id).is_file():
        raise BadInputError("--resume", run_id, f"is a spec, not a run; write: seatrial run {run_id} --resume")
    hint = unknown_name(run_id, runs[::-1][:5]) if runs else f"{home} has no run yet"
    raise BadInputError("--resume", run_id, f"no such run to resume; {hint}")


def latest_unfinished(home: Path, workflow: str) -> RunFolder:
    """Return the newest run of a workflow that did not reach its end. Raises BadInputError when there is none."""
    for run_id in reversed(list_runs(home)):
        folder = RunFolder.of(home, run_id)
        if not is_finished(folder) and recorded_workflow(folder) == workflow:
            return folder
    raise BadInputError("--resume", LATEST, f"no unfinished run of {workflow} in {home}; leave --resume out")


def recorded_workflow(folder: RunFolder) -> str:
    """Return the name of the workflow that a run was started for."""
    # Not through the whole spec: a run of a workflow's folder that is not named now is skipped, not refused.
    return str(parse_yaml(folder.spec.read_text(encoding="utf-8"), str(folder.spec)).value("workflow.name"))


def recorded_spec(folder: RunFolder) -> WorkflowSpec:
    """Return the spec a run was started with."""
    return parse_spec(folder.spec.read_text(encoding="utf-8"), str(folder.spec))


def _refuse_other_spec(spec: WorkflowSpec, folder: RunFolder) -> None:
    asked = SpecSource(name="", tree=spec.model_dump(mode="json"))
    recorded = SpecSource(name="", tree=recorded_spec(folder).model_dump(mode="json"))
    differing = [knob for knob in leaf_paths(WorkflowSpec) if asked.value(knob) != recorded.value(knob)]
    if not differing:
        return
    changes = ", ".join(f"{knob} (was {recorded.value(knob)!r}, now {asked.value(knob)!r})" for knob in differing)
    remedy = f"run {folder.run_id} was started with another spec: {changes}; resume with the same, or start a new run"
    raise BadInputError(differing[0], asked.value(differing[0]), remedy)


def require_machine(spec: WorkflowSpec, home: Path, until: str = "", *, is_resumed: bool = False) -> None:
    """Refuse a machine that cannot finish. Raises InfrastructureError naming each missing item and its remedy."""
    machine = probe_machine(spec, home)
    if until not in STAGES_WITH_SERVING:
        machine = replace(machine, port_is_free=True)
    elif is_resumed and not machine.port_is_free:
        # The process that was killed may have left its gateway there, which Ray ends when it notices.
        machine = replace(machine, port_is_free=becomes_free(spec.cluster.serve_port, timeout_s=RESUME_PORT_WAIT_S))
    require_ready(spec, machine, home, plan_run(spec).peak_memory_bytes)


def record_spec(spec: WorkflowSpec, folder: RunFolder) -> None:
    """Write the resolved spec, by which a folder is a run."""
    if not folder.spec.exists():
        write_json(folder.spec, spec.model_dump(mode="json"))


def load_summary(folder: RunFolder) -> RunSummary | None:
    """Return how a run ended, or None for an unfinished one. Raises TamperedError for an unreadable summary."""
    if not folder.summary.exists():
        return None
    try:
        return RunSummary.from_json(json.loads(folder.summary.read_text(encoding="utf-8")))
    except ValueError as error:
        raise TamperedError(f"{folder.summary} is not a run summary ({error}); run again with --resume") from error


def is_finished(folder: RunFolder) -> bool:
    """Whether a run reached its end."""
    summary = load_summary(folder)
    # One that `train` or `eval` stopped early has a summary, too, but nothing stable.
    return summary is not None and bool(summary.stable_policy)


def find_run(home: Path, run_id: str = "") -> RunFolder:
    """Return a run by id, or the newest. Raises BadInputError."""
    runs = list_runs(home)
    if not run_id and not runs:
        raise BadInputError("RUN_ID", "", f"{home} has no run yet; start one: seatrial run support_desk")
    folder = RunFolder.of(home, run_id or runs[-1])
    if not folder.spec.is_file():
        raise BadInputError("RUN_ID", run_id, unknown_name(run_id, runs[::-1][:5]))
    return folder
