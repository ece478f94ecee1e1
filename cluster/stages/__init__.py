"""The stages of the pipeline, each a function from frozen values to a frozen value. `cluster.pipeline` tells the order."""
