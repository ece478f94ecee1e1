"""Ray actors of training, the vLLM engine they drive, and the weight sync between them."""
