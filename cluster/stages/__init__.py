"""The stages of the pipeline: functions from frozen values to a frozen value. `cluster.pipeline` tells the order."""
