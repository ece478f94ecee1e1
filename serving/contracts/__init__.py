"""Values that cross borders in release: requests, gate results, plans, states, decisions."""

from serving.contracts.gates import ARTICLE_GATES, Evidence, GateResult, Verdict
from serving.contracts.release import (
    STALE_AFTER_S,
    Advance,
    Canary,
    Decision,
    Drill,
    Drilling,
    Ending,
    FailedBack,
    Halt,
    Halted,
    Hold,
    Preparing,
    Promote,
    Promoted,
    Promoting,
    RampStep,
    Release,
    ReleasePlan,
    ReleaseState,
    Restoring,
    RollBack,
    RolledBack,
    SplitRecord,
)
from serving.contracts.requests import (
    UNSCORED,
    EventKind,
    ReleaseChannel,
    RequestEvent,
    RequestRecord,
    RequestSample,
    RequestStatus,
    Success,
    TrafficWindow,
)
