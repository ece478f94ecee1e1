"""Message formats: from a conversation to token ids and back."""

from rl_actors.agent.renderers.harmony import HarmonyRenderer
from rl_actors.agent.renderers.renderer import Renderer


def renderer_of(model_path: str) -> Renderer:
    """Return the renderer of a model directory. Raises BadDataError when its tokenizer lacks a token of the format."""
    # The one place that chooses: Harmony is the only format so far.
    return HarmonyRenderer.from_directory(model_path)
