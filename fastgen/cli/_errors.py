"""What a sub-command raises where the user can mend it, and the exit statuses: `main` prints one line, without a traceback."""

import contextlib
from collections.abc import Iterator

from ..models import CheckpointError

EXIT_FAILURE = 1
EXIT_USAGE = 2  # as argparse counts
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count

# Seconds that a rank with nothing to say lets the one that speaks go first: a launcher ends all ranks when one has ended.
PRECEDENCE = 1.0


class UsageError(ValueError):
    """An option does not fit the others, or the file it names."""


@contextlib.contextmanager
def argument_errors(option: str = "") -> Iterator[None]:
    """What the library says of a bad value, as a UsageError that begins with ``option``.

    It stands around the calls that check values given by the user and around nothing else: an error of the same type from
    anywhere else is a defect, and keeps its traceback.
    """
    try:
        yield
    except (CheckpointError, UsageError):
        raise
    except (OverflowError, TypeError, ValueError) as error:
        raise UsageError(f"{option}: {error}" if option else str(error)) from error
