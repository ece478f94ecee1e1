"""Causal LMs to train: loading, scoring, attention sinks, experts, adapters, and the reward model."""

from rl_actors.models.attachments import PolicyWithValue, TokenOutputs, adapters_off, add_adapters, merged
from rl_actors.models.experts import (
    SORTED_EXPERTS,
    engine_routes,
    freeze_router,
    record_routes,
    replay_routes,
    route_agreement,
    router_parameters,
    sorted_experts,
)
from rl_actors.models.loading import build_tiny_model, load_backbone, load_causal_lm, tiny_config
from rl_actors.models.reward_model import RewardModel, pad_sequences
from rl_actors.models.scoring_head import chunked_token_logprobs_and_entropy, score_tokens
from rl_actors.models.sinks import allowed_pairs, eager_sink_attention, sink_attention, use_sink_attention
