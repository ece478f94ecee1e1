"""What is loaded to train goes through our paths, and a model whose sinks do nothing is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rl_actors.contracts.errors import AttestationError
from rl_actors.models import loading
from rl_actors.models.experts import SORTED_EXPERTS
from rl_actors.models.loading import load_backbone, load_causal_lm
from rl_actors.models.sinks import SINK_ATTENTION


@pytest.mark.parametrize("load", [load_causal_lm, load_backbone])
def test_gpt_oss_goes_through_our_paths(load: Any, tiny_dir: Path):
    config = load(tiny_dir).config
    assert (config._attn_implementation, config._experts_implementation) == (SINK_ATTENTION, SORTED_EXPERTS)


@pytest.mark.parametrize("load", [load_causal_lm, load_backbone])
def test_a_kernel_that_knows_no_sinks_is_refused_at_load(load: Any, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch):
    def deaf(module: Any, query: Any, key: Any, value: Any, mask: Any, **arguments: Any) -> Any:
        arguments.pop("s_aux")
        return sdpa_attention_forward(module, query, key, value, mask, **arguments)

    ALL_ATTENTION_FUNCTIONS.register("deaf", deaf)
    monkeypatch.setattr(loading, "use_sink_attention", lambda model: model.set_attn_implementation("deaf"))
    with pytest.raises(AttestationError, match="bends the sinks"):
        load(tiny_dir)
