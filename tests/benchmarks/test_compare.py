"""Two runs against each other."""

from benchmarks.compare import is_checkout, rows_at, runs
from benchmarks.machine import ROOT
from benchmarks.results import save

from ..backends import requires_checkout
from .documents import document, row

NAME = "group_norm/silu/1x8x4x4/NCHW/fp32"


def test_the_drift_of_the_baselines_is_divided_out():
    old = [row(NAME, {"fastgen": [4.0], "eager": [8.0]})]
    new = [row(NAME, {"fastgen": [1.0], "eager": [4.0]})]  # the machine itself became twice as fast
    table = runs(old, new)
    line = next(line for line in table.splitlines() if NAME in line)
    assert [cell.strip() for cell in line.split("|")[4:7]] == ["4.00", "2.00", "2.00"]
    assert "geometric mean 2.000 over 1 cases; 0 rows have no partner" in table


def test_rows_without_a_partner_are_counted():
    old = [row(NAME, {"fastgen": [4.0], "eager": [8.0]})]
    new = [row(NAME.replace("fp32", "bf16"), {"fastgen": [1.0], "eager": [4.0]})]
    assert "over 0 cases; 2 rows have no partner" in runs(old, new)


@requires_checkout
def test_a_folder_of_results_and_a_checkout_are_told_apart(tmp_path):
    made = document(row(NAME, {"fastgen": [4.0], "eager": [8.0]}))
    path = save(made, tmp_path)
    assert rows_at(tmp_path) == rows_at(path) == made["rows"]
    assert is_checkout(ROOT) and not is_checkout(tmp_path)
