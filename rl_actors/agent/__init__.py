"""The one agent loop, shared by training and serving, so that nothing differs between the two."""

from rl_actors.agent.executor import Executor, Toolset
from rl_actors.agent.loop import AgentEvent, AgentResult, Generate, ToolAnswered, ToolCalled, TurnSampled, run_agent
from rl_actors.agent.renderers import Renderer, renderer_of
from rl_actors.agent.renderers.harmony import HARMONY_TOKENS, demonstration_texts, train_tokenizer
from rl_actors.agent.renderers.renderer import demonstration_arrays
from rl_actors.agent.rollout import (
    RolloutPorts,
    rollout_token_ids,
    rollout_view,
    run_rollout,
    successful_calls,
    training_sample,
)
