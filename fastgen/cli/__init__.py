"""The `fastgen` command: one file a sub-command, imported only when that sub-command runs."""
