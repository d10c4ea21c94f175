"""What a sub-command raises where the user can mend it: `main` prints the message on one line, without a traceback."""


class UsageError(ValueError):
    """An option does not fit the others, or the file it names."""
