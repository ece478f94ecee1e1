"""`seatrial`: the command line, one file a command."""

from cluster.cli.app import main
