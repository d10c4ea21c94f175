"""The built libraries and the wheel."""
