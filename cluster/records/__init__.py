"""What a run leaves on disk: folder, journal, frozen models, bundle, summary; and its audit."""

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
from cluster.records.frozen import (
    CALIBRATION_FILE,
    copy_tokenizer,
    freeze,
    freeze_policy,
    fresh,
    read_calibration,
    require_calibrated,
    require_untouched,
)
from cluster.records.journal import Journal, lock_run
from cluster.records.run_folder import (
    RunFolder,
    list_runs,
    new_run_id,
    record_gateway,
    recorded_gateway,
    seatrial_home,
)
from cluster.records.summary import ReleaseEnding, ReleaseOutcome, RunPaths, RunSummary, StageLine, TrainedLine
