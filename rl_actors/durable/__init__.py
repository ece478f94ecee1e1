"""The lowest room with a disk: one JSON codec, content hashes, atomic files, locks, chained logs and metric rows."""

from rl_actors.durable.codec import decode, encode
from rl_actors.durable.files import (
    ChainedLog,
    append_row,
    disk_errors,
    file_lock,
    read_rows,
    shared_rows,
    sync_directory,
    write_atomic,
    write_json,
)
from rl_actors.durable.hashing import file_hashes, sha256_directory, sha256_file, sha256_json, sha256_of_hashes
from rl_actors.durable.metrics_log import MetricsLog, read_metrics
