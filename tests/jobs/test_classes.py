"""The classes of a job: in turn, each from its own seed, and from files of two kinds."""

import numpy as np
import pytest
import torch

from fastgen.jobs import classes
from fastgen.ops import categorical_sample


def test_balanced():
    assert classes.balanced(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_random_by_seed_alone():
    labels = classes.random(range(-5, 20), 10)
    assert labels.dtype == torch.int64 and torch.equal(labels[8:11], classes.random([3, 4, 5], 10))
    assert labels.tolist() == [*labels[:5].tolist(), *classes.random(range(20), 10).tolist()]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 3, -(2**63), 2**63 - 1])
def test_random_by_whole_numbers(seed):
    words, keys = [0, 0, 0, 2], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):  # Philox4x32, as in its paper
        a, b = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [b >> 32 ^ words[1] ^ keys[0], b & 0xFFFFFFFF, a >> 32 ^ words[3] ^ keys[1], a & 0xFFFFFFFF]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    assert classes.random([seed], 1000).tolist() == [words[0] * 1000 >> 32]


@pytest.mark.parametrize("num_classes", [1, 2, 10, 1000])
def test_random_classes_are_equally_likely(num_classes):
    n = 100_000
    counts = torch.bincount(classes.random(range(n), num_classes), minlength=num_classes).double()
    assert len(counts) == num_classes
    expected = n / num_classes
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    freedom = num_classes - 1
    assert chi_squared <= freedom + 5 * (2 * freedom) ** 0.5 + 1e-9


def test_random_classes_are_not_those_of_the_pixels():
    """The first uniform that an image is drawn by is another word: counters differ."""
    seeds = list(range(2000))
    pixels = categorical_sample(torch.zeros(2000, 10), seeds=seeds)
    assert (pixels == classes.random(seeds, 10)).double().mean().item() == pytest.approx(0.1, abs=0.03)


def test_files(tmp_path):
    numbers = [3, 1, 4, 1, 5]
    (tmp_path / "a.txt").write_text("".join(f" {k}\n" for k in numbers))
    np.save(tmp_path / "b.npy", np.array(numbers, dtype=np.uint8))
    for name in ("a.txt", "b.npy"):
        labels = classes.read(tmp_path / name, 4, 6)
        assert labels.dtype == torch.int64 and labels.tolist() == [3, 1, 4, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n2\n", "must hold a class for each of 3 examples, got 2"),
        ("1\n2\nthree\n", "line 3 must be an integer, got 'three'"),
        ("1\n\n2\n0\n", "line 2 must be an integer, got ''"),
        ("1\n5\n2\n", r"classes must be in \[0, 5\), got 5 for example 1"),
        ("1\n-1\n2\n", r"classes must be in \[0, 5\), got -1 for example 1"),
        (f"1\n{2**70}\n2\n", "all classes must be 64-bit integers"),
        ("\x00\xff", "line 1 must be an integer"),
    ],
)
def test_text_that_is_refused(tmp_path, text, message):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        classes.read(path, 3, 5)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), r"must be an array \[M\] of integers, got float64 of shape \(3,\)"),
        (np.zeros((3, 1), int), r"must be an array \[M\] of integers, got int64 of shape \(3, 1\)"),
        (np.array([1, None]), "not a readable .npy file"),
    ],
)
def test_arrays_that_are_refused(tmp_path, array, message):
    path = tmp_path / "classes.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        classes.read(path, 3, 5)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"^{path}: not a readable .npy file"):
        classes.read(path, 3, 5)
