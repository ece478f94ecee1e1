"""What a run leaves on disk: folder, journal, bundle, summary; and its audit."""

from cluster.records.audit import SOUND, Finding, Verdict, audit_run, chain_heads, head_tags, tagged_heads
from cluster.records.bundle import (
    MEMBERS,
    Bundle,
    Component,
    build_bundle,
    code_component,
    component_of,
    diff_bundles,
    load_bundle,
)
from cluster.records.gateway_file import record_gateway, recorded_gateway, settings_file
from cluster.records.journal import Journal, lock_run
from cluster.records.run_folder import RunFolder, list_runs, new_run_id, seatrial_home
from cluster.records.summary import ReleaseLine, ReleaseOutcome, RunPaths, RunSummary, StageLine, SuiteLine, TrainedLine
