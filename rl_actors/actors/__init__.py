"""Every Ray call of training: actors, their pools, and the attested publish of weights."""

from rl_actors.actors.calls import Options
from rl_actors.actors.learners import LearnerGroup, LearnerRank, join_process_group
from rl_actors.actors.publish import AttestedSync, attestation_gap, require_attested
from rl_actors.actors.rollouts import RolloutBatch, RolloutPool, RolloutWorkerSettings, ScorerPool
from rl_actors.actors.train_jobs import RewardJob, SftJob, TrainResources, run_reward_job, run_sft_job
from rl_actors.actors.vllm_engine import VllmEngine
