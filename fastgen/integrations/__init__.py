"""`accelerate`: other people's models with fastgen's kernels, what it did to them (`report`), and back (`restore`).

A file here is a project's, or torch's (`generic`): a stand-in for each class of its modules that can be faster.
"""

from .accelerate import accelerate, restore
from .report import Report, report
from .stand_in import StandIn
from .walk import register

__all__ = ["Report", "StandIn", "accelerate", "register", "report", "restore"]
