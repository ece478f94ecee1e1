"""RUN: the pipeline, its command line, and everything a run leaves behind."""
