"""Who is served by whom: the split record, sticky routing, and its acknowledgement."""

from serving.split.record import Route, SplitStore
from serving.split.watch import SplitWatcher, acknowledged_epoch, is_live, read_acks
