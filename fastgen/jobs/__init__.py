"""Jobs: many examples drawn in shards by one process or by many that a launcher started, to the same bytes, and over restarts.

What is drawn is a :class:`Job`; :func:`run` draws what of it is missing in a folder, :func:`verify` reads it all again.
"""

from .errors import JobError, StoppedElsewhere, Terminated
from .formats import FORMATS, Csv, Format
from .job import Drawn, Job, Shard
from .manifest import Identity, Manifest, ShardRecord
from .run import Summary, run
from .verify import Verification, verify

__all__ = [
    "FORMATS",
    "Csv",
    "Drawn",
    "Format",
    "Identity",
    "Job",
    "JobError",
    "Manifest",
    "Shard",
    "ShardRecord",
    "StoppedElsewhere",
    "Summary",
    "Terminated",
    "Verification",
    "run",
    "verify",
]
