"""Training loops. They know tensors and protocols; which process runs them is decided in `rl_actors.actors`."""
