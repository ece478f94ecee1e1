"""Models: the tiny GPT-OSS architecture, its tokenizer, the value head and the reward model."""
