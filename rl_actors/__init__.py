"""LEARN: the agent loop, the algorithms and the Ray actors that train a policy."""
