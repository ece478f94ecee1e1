"""Reports for humans: the Reliability Brief, one page in each locale, every number out of recorded rows."""

from cluster.reports.render import write_briefs
