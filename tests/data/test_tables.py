"""The tables: standardised on their training rows, split by seed, without columns that have no density."""

import sys

import pytest
import torch

from fastgen.data import TABLES, load_table
from fastgen.data.tables import FEWEST_VALUES

from ..backends import import_peer

datasets = import_peer("sklearn.datasets")

SIZES = {"diabetes": (442, 9), "wine": (178, 13), "breast_cancer": (569, 30)}


@pytest.mark.parametrize("name", TABLES)
def test_standardised_on_the_training_rows(name):
    train, held_out = load_table(name), load_table(name, "held_out")
    n, d = SIZES[name]
    assert train.rows.shape == (n - n // 5, d) and held_out.rows.shape == (n // 5, d)
    assert train.rows.dtype == held_out.rows.dtype == torch.float32 and len(train.columns) == d
    assert train.rows.double().mean(0).abs().max() <= 1e-6
    assert (train.rows.double().std(0) - 1).abs().max() <= 1e-6
    assert torch.equal(train.mean, held_out.mean) and torch.equal(train.scale, held_out.scale)
    assert 0 < held_out.rows.mean(0).abs().max() < 1  # not on their own


@pytest.mark.parametrize("name", TABLES)
def test_the_rows_are_those_of_the_table(name):
    bunch = getattr(datasets, f"load_{name}")()
    train, held_out = load_table(name, seed=3), load_table(name, "held_out", seed=3)
    kept = [list(bunch.feature_names).index(column) for column in train.columns]
    theirs = torch.from_numpy(bunch.data[:, kept])
    ours = torch.cat([table.in_units(table.rows) for table in (train, held_out)])
    nearest = torch.cdist(ours / train.scale, theirs / train.scale)
    assert nearest.min(1).values.max() <= 1e-5
    assert sorted(nearest.argmin(1).tolist()) == list(range(len(theirs)))  # each once


def test_columns_without_a_density_are_dropped(monkeypatch):
    assert "sex" not in load_table("diabetes").columns and "sex" in datasets.load_diabetes().feature_names
    bunch = datasets.load_wine()
    bunch.data[:, 2] = 5.0
    bunch.data[:, 4] = range(len(bunch.data))
    bunch.data[:, 4] %= FEWEST_VALUES
    monkeypatch.setattr(datasets, "load_wine", lambda: bunch)
    names = list(bunch.feature_names)
    assert load_table("wine").columns == (*names[:2], *names[3:])
    bunch.data[:, 4] %= FEWEST_VALUES - 1
    assert load_table("wine").columns == (*names[:2], names[3], *names[5:])


def test_the_seed_chooses_the_rows():
    first, again, other = (load_table("diabetes", "held_out", seed).rows for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_refusals(monkeypatch):
    with pytest.raises(
        ValueError, match=r"load_table: name must be one of \('diabetes', 'wine', 'breast_cancer'\), got 'i"
    ):
        load_table("iris")
    with pytest.raises(ValueError, match=r"load_table: split must be one of \('train', 'held_out'\), got 'test'"):
        load_table("wine", "test")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        load_table("wine")
