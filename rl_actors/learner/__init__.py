"""One rank's update: batch, targets, loss, tripwires and the engine that steps."""

from rl_actors.learner.batch import MAX_WASTE_FRACTION
from rl_actors.learner.engine import (
    OptimizerSettings,
    accumulate_and_step,
    build_engine,
    ensure_operators,
    scale_learning_rate,
)
from rl_actors.learner.objective import PpoSettings
from rl_actors.learner.ranks import summed
from rl_actors.learner.update import PpoLearner
