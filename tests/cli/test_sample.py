"""`fastgen sample` on the shipped weights: files, seeds, refusals."""

import numpy as np
import pytest
import torch

from fastgen.cli.main import main
from fastgen.cli.sample import grid, to_pixels
from fastgen.models import UNet


def draw(tmp_path, *options: str) -> int:
    fast = ["--steps", "4", "--quiet", "--out", str(tmp_path)]
    return main(["sample", "--weights", "digits-ddpm", *fast, *options])


def test_an_image_depends_on_its_seed_alone(tmp_path, capsys):
    assert draw(tmp_path / "a", "--class", "7", "--num", "5", "--seed", "10", "--batch-size", "2") == 0
    assert draw(tmp_path / "b", "--class", "7", "--num", "2", "--seed", "12") == 0
    a, b = (np.load(tmp_path / name / "samples.npz") for name in "ab")
    assert a["images"].shape == (5, 1, 8, 8) and a["seeds"].tolist() == [10, 11, 12, 13, 14] and a["label"] == 7
    np.testing.assert_allclose(a["images"][2:4], b["images"], atol=1e-5)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["000012.png", "000013.png", "grid.png", "samples.npz"]
    assert "2 images of 4 DDIM steps" in capsys.readouterr().out


def test_ddpm_guidance_and_no_class(tmp_path):
    assert draw(tmp_path / "a", "--class", "3", "--num", "1", "--sampler", "ddpm", "--guidance-scale", "2") == 0
    assert draw(tmp_path / "b", "--num", "1") == 0
    assert (tmp_path / "a" / "grid.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--class", "10"], "--class must be in [0, 10), got 10"), (["--class", "-1"], "--class must be in")],
)
def test_refusals_are_one_line(tmp_path, capsys, options, message):
    assert draw(tmp_path / "out", *options) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_and_weights_that_say_nothing(tmp_path, capsys):
    assert main(["sample", "--weights", str(tmp_path / "no"), "--out", str(tmp_path)]) == 1
    assert "no such checkpoint file" in capsys.readouterr().err
    model = UNet(
        in_channels=2, model_channels=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4
    )
    model.save(tmp_path / "w.safetensors")
    arguments = [
        "sample",
        "--weights",
        str(tmp_path / "w.safetensors"),
        "--out",
        str(tmp_path / "o"),
        "--quiet",
        "--steps",
        "2",
    ]
    assert main(arguments) == 1
    assert "--size is needed" in capsys.readouterr().err
    assert main([*arguments, "--size", "4", "6", "--num", "3"]) == 0
    assert np.load(tmp_path / "o" / "samples.npz")["images"].shape == (3, 2, 4, 6)


def test_pixels_and_grid():
    images = torch.tensor([-2.0, -1.0, 0.0, 1.0]).reshape(1, 1, 2, 2).expand(5, 1, 2, 2)
    pixels = to_pixels(images)
    assert pixels.shape == (5, 2, 2, 3) and pixels[0, :, :, 0].tolist() == [[0, 0], [128, 255]]
    assert to_pixels(images.expand(5, 2, 2, 2))[0, 1, 1].tolist() == [255, 255, 0]
    with pytest.raises(ValueError, match="1, 2 or 3 channels"):
        to_pixels(images.expand(5, 4, 2, 2))
    assert grid(pixels).shape == (2 * 3 + 1, 3 * 3 + 1, 3)


@pytest.mark.parametrize("name", ["dpmpp_2m", "heun", "pndm", "euler_ancestral"])
def test_other_samplers_by_name(tmp_path, name):
    assert draw(tmp_path / "a", "--class", "3", "--num", "2", "--steps", "5", "--sampler", name) == 0
    assert len(list((tmp_path / "a").glob("*.png"))) >= 2
