"""`python -m cluster.cli`: what a Ray job runs."""

from cluster.cli.app import main

main()
