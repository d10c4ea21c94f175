"""Jobs: many examples drawn in shards by one process or by many that a launcher started, to the same bytes, and over restarts.

What is drawn is a :class:`Job`: of the library's models :class:`DiffusionJob`, :class:`AutoregressiveJob` and :class:`FlowJob`,
with :mod:`classes`, or one of your own. :func:`run` draws what of it is missing in a folder, :func:`verify` reads it all again.
"""

from . import classes
from .autoregressive import AutoregressiveJob
from .diffusion import DiffusionJob
from .errors import JobError, OtherJob, StoppedElsewhere, Terminated
from .flow import FlowJob
from .formats import FORMATS, Csv, Format
from .job import Drawn, Job, Shard
from .manifest import Identity, Manifest, ShardRecord
from .model_job import ModelJob
from .run import Summary, run
from .tarflow import TarFlowJob
from .verify import Verification, verify

__all__ = [
    "FORMATS",
    "AutoregressiveJob",
    "Csv",
    "DiffusionJob",
    "Drawn",
    "FlowJob",
    "Format",
    "Identity",
    "Job",
    "JobError",
    "Manifest",
    "ModelJob",
    "OtherJob",
    "Shard",
    "ShardRecord",
    "StoppedElsewhere",
    "Summary",
    "TarFlowJob",
    "Terminated",
    "Verification",
    "classes",
    "run",
    "verify",
]
