"""The story of a run on one page, and its stages."""

from cluster.pipeline.bench import gateway_config, platform_config
from cluster.pipeline.data import read_tasks
from cluster.pipeline.run import Run
from cluster.pipeline.story import run_pipeline
from cluster.pipeline.watch import Silent, Watch
