"""`fastgen sample` of autoregressive models: the pixels of `fastgen.autoregressive.sample`, its options, and what it refuses."""

import numpy as np
import pytest
import torch

from fastgen.autoregressive import sample
from fastgen.cli.main import main
from fastgen.models import GatedPixelCNN, PixelCNN, WaveNet, find_weights

from .running import refused
from .samples import drawn

TINY = {"channels": 4, "levels": 4}


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ([], {}),
        (["--temperature", "0.5", "--top-k", "3"], {"temperature": 0.5, "top_k": 3}),
        (["--top-p", "0.8"], {"top_p": 0.8}),
    ],
)
def test_the_pixels_are_those_of_the_library(tmp_path, capsys, options, arguments):
    command = ["sample", "--weights", "digits-pixelcnn", "--num", "12", "--seed", "5", "--batch-size", "5"]
    assert main([*command, "--out", str(tmp_path), *options]) == 0
    assert "12 images drawn pixel after pixel at temperature " in capsys.readouterr().out
    model = GatedPixelCNN.load(find_weights("digits-pixelcnn"), dtype=torch.float32)
    labels = torch.arange(12) % 10  # they take turns
    images = sample(model, (12, 1, 8, 8), condition=labels, seeds=range(5, 17), **arguments)
    arrays = drawn(tmp_path)
    assert np.array_equal(arrays["labels"], labels)
    assert np.array_equal(arrays["arr_0"], ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1))


def test_a_mixture_and_a_class(tmp_path, capsys):
    command = ["sample", "--weights", "digits-pixelcnn++", "--num", "3", "--out", str(tmp_path)]
    assert main([*command, "--class", "4", "--temperature", "0.9"]) == 0
    assert drawn(tmp_path)["labels"].tolist() == [4, 4, 4]
    assert "--top-k cuts levels, and digits-pixelcnn++ draws from a mixture" in refused(capsys, *command, "--top-k", 2)


def test_weights_that_say_nothing_and_sizes(tmp_path, capsys):
    PixelCNN(**TINY).eval().save(tmp_path / "plain")
    WaveNet(channels=4, skip_channels=4, dilations=[1, 2], levels=4).save(tmp_path / "wave")
    GatedPixelCNN(**TINY, dilations=[1], condition_channels=2).save(tmp_path / "map")
    out = ["sample", "--num", "2", "--out", str(tmp_path / "o"), "--weights"]
    assert "--size is needed" in refused(capsys, *out, tmp_path / "plain")
    assert "draws nothing without a map beside the image" in refused(capsys, *out, tmp_path / "map")
    assert "--size: WaveNet: x must be of height 1" in refused(capsys, *out, tmp_path / "wave", "--size", 2, 8)
    assert main([*out, str(tmp_path / "wave"), "--size", "1", "8"]) == 0
    assert drawn(tmp_path / "o")["arr_0"].shape == (2, 1, 8, 1)
    assert main([*out, str(tmp_path / "plain"), "--size", "3", "5", "--overwrite"]) == 0
    assert drawn(tmp_path / "o")["arr_0"].shape == (2, 3, 5, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--steps", "9"],
            "--steps is for diffusion models: digits-pixelcnn is an autoregressive model, drawn pixel after",
        ),
        (["--class", "10"], "--class must be in [0, 10), got 10"),
        (["--temperature", "-1"], "--temperature must not be negative, got -1"),
        (["--top-k", "0"], "--top-k: must be at least 1, got 0"),
        (["--top-p", "0"], "--top-p must be in (0, 1], got 0"),
        (["--top-p", "1.5"], "--top-p must be in (0, 1], got 1.5"),
    ],
)
def test_refusals_are_one_line(tmp_path, capsys, options, message):
    assert message in refused(capsys, "sample", "--weights", "digits-pixelcnn", "--out", tmp_path / "o", *options)
    assert not (tmp_path / "o").exists()
