"""`fastgen demo`: one file a demonstration, beside what they share: pictures, report, scores and the plain way to compare with."""

from .digits import add_parser, run

__all__ = ["add_parser", "run"]
