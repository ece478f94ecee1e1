"""Every Ray call of training: actors, their pools, and the attested publish of weights."""

from rl_actors.actors.attested_sync import AttestedSync, attestation_gap, require_attested
from rl_actors.actors.learner_actor import LearnerRank, join_process_group
from rl_actors.actors.pools import LearnerGroup, Options, RolloutPool, ScorerPool
from rl_actors.actors.rollout_worker import RolloutBatch, RolloutWorkerSettings
from rl_actors.actors.train_jobs import RewardJob, SftJob, TrainResources, run_reward_job, run_sft_job
from rl_actors.actors.vllm_engine import VllmEngine
