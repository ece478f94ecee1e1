"""The training loops: SFT, reward model, PPO. They know protocols, not processes."""

from rl_actors.training.ppo import DivergenceWatch, LoopState, PpoPorts, PpoSchedule, run_ppo, run_step
from rl_actors.training.reward_model import PreferencePair, RewardSettings, calibrate, train_reward_model
from rl_actors.training.sft import Example, SftSettings, drill_batches, train_sft
