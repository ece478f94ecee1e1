"""The agent loop, shared by training and serving: one loop, so nothing differs between the two."""
