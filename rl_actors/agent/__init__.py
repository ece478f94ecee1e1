"""The one agent loop, shared by training and serving, so that nothing differs between the two."""

from rl_actors.agent.executor import Executor, Toolset, ToolWorld
from rl_actors.agent.loop import AgentResult, Generate, run_agent
from rl_actors.agent.renderers.harmony import HarmonyRenderer, demonstration_arrays, demonstration_texts
from rl_actors.agent.renderers.tokenizer import HARMONY_TOKENS, train_tokenizer
from rl_actors.agent.rollout import (
    RolloutPorts,
    rollout_token_ids,
    rollout_view,
    run_rollout,
    successful_calls,
    training_sample,
)
