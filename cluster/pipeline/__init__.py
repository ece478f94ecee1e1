"""The story of a run on one page, and its stages."""

from cluster.pipeline.release import gateway_config, platform_config
from cluster.pipeline.run import Silent, Watch
from cluster.pipeline.snapshot import read_tasks
from cluster.pipeline.story import run_pipeline
