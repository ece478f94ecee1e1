"""Values that cross borders in training and evaluation, and every exception raised on purpose."""

from rl_actors.contracts.errors import (
    AttestationError,
    BadDataError,
    BadInputError,
    EngineError,
    InfrastructureError,
    InstabilityError,
    SeatrialError,
    StageRefusedError,
    TamperedError,
    ToolHostError,
    nearest,
    unknown_name,
)
from rl_actors.contracts.recipe import (
    BATCH_PAIRS,
    CALIBRATION_FRACTION,
    LOGIT_CHUNK_VALUES,
    MAX_IN_FLIGHT,
    MAX_RELATIVE_KL_ERROR,
    MICROBATCH_TOKENS,
    RECIPES,
    RESAMPLE_ROUNDS,
    Aggregation,
    CorrectionMode,
    GroupAdvantageKind,
    KLKind,
    PolicyLossKind,
    Recipe,
    require_batch_choices,
    require_choice,
)
from rl_actors.contracts.reports import CostModel, EvalReport, Interval, SuiteResult
from rl_actors.contracts.rollouts import (
    Completion,
    Demonstration,
    DemonstrationTurn,
    LearnerUpdate,
    Outcome,
    PlanCause,
    PlanRevision,
    Rollout,
    RolloutStatus,
    Routes,
    SamplingParams,
    Score,
    ToolCall,
    ToolResult,
    TrainingSample,
    Turn,
    TurnKind,
)
from rl_actors.contracts.tasks import AgentLimits, RolloutRequest, Split, Task
from rl_actors.contracts.versions import Calibration, DataSnapshot, PolicyKind, PolicyVersion, RewardModelVersion
