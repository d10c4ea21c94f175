"""The benchmark of whole images in small: its baseline is plain torch, one pass of it stands for all, and the floor counts."""

import pytest
import torch

from benchmarks import measure
from benchmarks.cases import FIRST, Case
from benchmarks.models import bench_pixelcnn
from benchmarks.models.bench_pixelcnn import CONFIGS, build, cases, counted
from benchmarks.models.plain_pixelcnn import plain_torch
from benchmarks.targets import NAIVE
from fastgen.autoregressive import plan
from fastgen.models import gated_pixel_cnn

from ..models.small_autoregressive import SMALL
from ..models.small_autoregressive import build as small
from ..models.small_autoregressive import image as small_image
from ..modules import max_difference


@pytest.mark.parametrize("name", SMALL)
def test_the_baseline_is_the_model_in_plain_torch(name):
    model, x = small(name), small_image(name)
    with torch.no_grad():
        expected, ours = model(x), gated_pixel_cnn.gated_activation
        with plain_torch():
            assert gated_pixel_cnn.gated_activation is not ours
            assert max_difference(model(x), expected) <= 1e-12
        assert gated_pixel_cnn.gated_activation is ours


@pytest.mark.parametrize("how", ["as used", FIRST])
def test_one_pass_stands_for_all(how):
    made = Case(
        "pixelcnn",
        "digits",
        (1, 1, 8, 8),
        "fp32",
        lambda _: build(CONFIGS["digits"][:2], how, (1, 1, 8, 8), "fp32", False),
        "x",
        how,
    )
    row = measure.measure(made, torch.device("cpu"), seconds=0.0, min_rounds=1, allow_compile=False, raw=True)
    assert row["green"] and row["red"] == {}, row["red"]
    assert f"{NAIVE} is one call, measured, times 64" in row["notes"]
    assert row["floors"] == ["row products", "pixel weights"] and set(row["ratios"]) == {NAIVE, "floor"}
    (ours,), (naive,) = row["samples"]["fastgen"], row["samples"][NAIVE]
    assert row["ratios"][NAIVE][0] == pytest.approx(naive / ours, rel=1e-3)


def test_the_first_call_plans_again(monkeypatch):
    made = []
    monkeypatch.setattr(bench_pixelcnn, "forget", lambda model: made.append(model))
    for how, count in (("as used", 0), (FIRST, 2)):
        workload = build(CONFIGS["digits"][:2], how, (1, 1, 8, 8), "fp32", False)
        ours = next(provider for provider in workload.providers if provider.role == "fastgen")
        ours.call(), ours.call()
        assert len(made) == count


def test_forgotten_plans_are_made_again():
    model = small("gated")
    first = plan(model, (1, 1, 5, 5))
    assert plan(model, (1, 1, 5, 5)) is first
    bench_pixelcnn.forget(model)
    assert plan(model, (1, 1, 5, 5)) is not first


@pytest.mark.parametrize("name", ["pixel_cnn_plain", "gated", "plus_plus", "snail"])
def test_the_floor_counts_every_weight_once(name):
    """Multiply-adds of rows, and those of pixels, are all there are of the plan."""
    model = small(name)
    shape = (1, *SMALL[name][2])
    made = plan(model, shape)
    rows, reads = counted(made.captured.network)
    assert rows > 0 and reads > 0
    assert rows + reads * shape[2] * shape[3] == pytest.approx(made.work, rel=0.02)


def test_rows():
    listed = [case.id for case in cases(torch.device("cpu"), False)]
    assert (
        "pixelcnn/gated/16x1x28x28/NCHW/bf16" in listed
        and "pixelcnn/plus_plus, first in a process/1x3x32x32/NCHW/fp32" in listed
    )
    assert cases(torch.device("cuda"), False) == []
