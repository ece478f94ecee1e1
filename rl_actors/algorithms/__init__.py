"""Pure tensor functions of the learner: no process, no engine, no file. Signatures: design, section 4."""
