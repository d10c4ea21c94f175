"""The benchmark of TarFlow in small: its baseline is the published algorithm, and every figure is checked first."""

import functools

import pytest
import torch

from benchmarks import measure
from benchmarks.cases import Case, collect
from benchmarks.models.bench_tarflow import CONFIGS, PUBLISHED, build, published_names
from benchmarks.models.plain_tarflow import PlainTarFlow
from fastgen.models import TarFlow

from ..models import foreign_tarflow as published

SMALL = {"in_channels": 1, "image_size": 8, "patch_size": 2, "channels": 64, "num_blocks": 2, "layers_per_block": 1}


@pytest.mark.parametrize("classes", [None, 3])
def test_the_baseline_is_the_published_algorithm(classes):
    state = published.make_state(1, 8, 2, 64, classes=classes or 0, dtype=torch.float32)
    plain = PlainTarFlow(**SMALL, num_classes=classes)
    plain.load_state_dict(published_names(TarFlow.from_state_dict(state).state_dict()))
    noise = torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(0))
    labels = None if classes is None else torch.tensor([2, 0, 1])
    with torch.no_grad():
        for _ in range(2):  # what the first call has kept is gone
            x = plain.reverse(noise, labels)
            torch.testing.assert_close(x, published.reverse(state, noise, labels, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("classes", [None, 3])
def test_a_row(classes):
    make = functools.partial(build, {**SMALL, "num_classes": classes}, 2)
    case = Case("tarflow", "small", (2, 1, 8, 8), "fp32", make, "x")
    row = measure.measure(case, torch.device("cpu"), seconds=0.0, min_rounds=1, allow_compile=False)
    assert row["green"], row["red"]
    assert row["floors"] == ["products"] and set(row["ratios"]) == {PUBLISHED, "floor"}


def test_cases():
    families, _ = collect(torch.device("cpu"), False, None, ["tarflow"])
    ids = [case.id for case in families["tarflow"]]
    assert "tarflow/mnist/100x1x28x28/NCHW/fp32" in ids and len(ids) == 5
    assert {case.mode for case in families["tarflow"]} == set(CONFIGS)
