"""What ends a job before its time."""


class JobError(RuntimeError):
    """A job cannot be begun, or not be ended; the message is one line."""


class OtherJob(JobError):
    """The folder holds another job; the message names the first differences."""


class StoppedElsewhere(JobError):
    """Another rank has failed, or refuses, and says why itself: this one ends without a word. The message is the other's."""


class Terminated(SystemExit):
    """SIGTERM came, of a pre-empted node say: the process ends with the status that the signal would have given it."""

    def __init__(self) -> None:
        super().__init__(128 + 15)
