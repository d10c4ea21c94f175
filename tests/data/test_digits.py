"""The digits and their split."""

import sys

import pytest
import torch

from fastgen.data import IMAGE_SHAPE, NUM_CLASSES, load_digits

from ..backends import import_peer

import_peer("sklearn")


def test_shapes_and_range():
    for split, count in (("train", 1497), ("held_out", 300)):
        images, labels = load_digits(split)
        assert images.shape == (count, *IMAGE_SHAPE) and images.dtype == torch.float32
        assert labels.shape == (count,) and labels.dtype == torch.int64
        assert images.min() == -1 and images.max() == 1
        assert labels.unique().tolist() == list(range(NUM_CLASSES))
    assert torch.bincount(labels).tolist() == [30] * NUM_CLASSES


def test_the_split_is_a_partition_and_always_the_same():
    from sklearn.datasets import load_digits as load

    everything = torch.from_numpy(load().images).float().flatten(1) / 8 - 1
    train, held_out = load_digits("train"), load_digits("held_out")
    union = torch.cat([train.images, held_out.images]).flatten(1)
    assert sorted(union.tolist()) == sorted(everything.tolist())
    assert torch.equal(load_digits("held_out").images, held_out.images)


def test_no_held_out_image_is_in_training():
    distances = torch.cdist(load_digits("held_out").images.flatten(1), load_digits("train").images.flatten(1))
    assert distances.min() > 0.1


def test_unknown_split():
    with pytest.raises(ValueError, match=r"split must be one of \('train', 'held_out'\), got 'test'"):
        load_digits("test")


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        load_digits()
