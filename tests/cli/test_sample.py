"""`fastgen sample` on the shipped weights: files, seeds, samplers by name and their options, and what it refuses."""

import argparse
import json

import numpy as np
import pytest
import torch

from fastgen.cli.main import main
from fastgen.cli.sample import add_parser
from fastgen.cli.sample.solvers import SAMPLERS, build_solver
from fastgen.models import UNet, find_weights, load_state, save_state
from fastgen.samplers import DDIM, DDPM, DPMSolverPP, Euler
from fastgen.training import TrainingRecord

from ..modules import randomize
from .running import refused
from .samples import drawn, names, pictures

TINY = {"model_channels": 8, "channel_mult": (1, 1), "num_res_blocks": 1, "attention_resolutions": (), "num_groups": 4}


def arguments(folder, *options: str) -> list[str]:
    return ["sample", "--steps", "4", "--quiet", "--out", str(folder), *options]


def draw(folder, *options: str) -> int:
    return main(arguments(folder, *options))


def tiny(path, metadata=None, **config):
    """The file of a small model with weights that answer something."""
    randomize(UNet(**{"in_channels": 1, **TINY, **config})).save(path, metadata)
    return str(path)


def solver_for(*options, record=None, learned=False):
    args = add_parser(argparse.ArgumentParser().add_subparsers()).parse_args(list(options))
    return build_solver(args, record or TrainingRecord(), learned)


def test_an_image_depends_on_its_seed_alone(tmp_path, capsys):
    assert draw(tmp_path / "a", "--class", "7", "--num", "5", "--seed", "10", "--batch-size", "2") == 0
    assert draw(tmp_path / "b", "--weights", "digits-ddpm", "--class", "7", "--num", "2", "--seed", "12") == 0
    a, b = (drawn(tmp_path / name) for name in "ab")
    assert a["arr_0"].shape == (5, 8, 8, 1) and a["arr_0"].dtype == np.uint8
    assert a["seeds"].tolist() == [10, 11, 12, 13, 14] and a["labels"].tolist() == [7] * 5
    np.testing.assert_allclose(a["arr_0"][2:4].astype(int), b["arr_0"], atol=1)
    assert names(tmp_path / "b") == ["000012.npz", "grid.png", "manifest.json"]
    assert "2 images of 4 DDIM steps" in capsys.readouterr().out


def test_alone_it_draws_the_shipped_digits_into_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "--steps", "2"]) == 0
    assert names(tmp_path / "samples") == ["000000.npz", "grid.png", "manifest.json"] and names(tmp_path) == ["samples"]
    printed = capsys.readouterr()
    assert printed.err == ""  # no terminal, no bar
    assert printed.out == "16 images of 2 DDIM steps in samples, together in samples/grid.png\n"
    assert len(drawn(tmp_path / "samples")["arr_0"]) == 16 and "labels" not in drawn(tmp_path / "samples")


def test_digits_are_ink_on_paper_and_large_enough_to_see(tmp_path):
    assert draw(tmp_path, "--class", "1", "--num", "4", "--steps", "20") == 0
    images = drawn(tmp_path)["arr_0"]
    assert images.mean() < 127  # mostly paper, which is 0 in the shards as in the data
    shown = pictures(tmp_path, 8, 8, 4)
    assert min(shown[0].shape[:2]) >= 64 and shown[0].mean() > 0.5
    for picture, image in zip(shown, images, strict=True):
        np.testing.assert_allclose(picture[::8, ::8, 0], 1 - image[..., 0] / 255, atol=1e-6)


def test_photographs_are_not_turned_into_negatives(tmp_path):
    weights = tiny(tmp_path / "w.safetensors")
    assert draw(tmp_path / "o", "--weights", weights, "--size", "4", "6", "--num", "3") == 0
    images = drawn(tmp_path / "o")["arr_0"]
    assert images.shape == (3, 4, 6, 1)
    for picture, image in zip(pictures(tmp_path / "o", 4, 6, 3), images, strict=True):
        np.testing.assert_allclose(picture[::16, ::16, 0], image[..., 0] / 255, atol=1e-6)


def test_ddpm_guidance_and_no_class(tmp_path):
    assert draw(tmp_path / "a", "--class", "3", "--num", "1", "--sampler", "ddpm", "--guidance-scale", "2") == 0
    assert draw(tmp_path / "b", "--num", "1") == 0
    assert (tmp_path / "a" / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert (drawn(tmp_path / "a")["arr_0"] != drawn(tmp_path / "b")["arr_0"]).any()


@pytest.mark.parametrize("name", ["dpmpp_2m", "heun", "pndm", "euler_ancestral"])
def test_other_samplers_by_name(tmp_path, name):
    assert draw(tmp_path / "a", "--class", "3", "--num", "2", "--steps", "5", "--sampler", name) == 0
    assert names(tmp_path / "a") == ["000000.npz", "grid.png", "manifest.json"]


def test_help_lists_the_samplers(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    text = " ".join(capsys.readouterr().out.replace(",", " ").split())
    assert "digits-ddpm" in text and "samplers: " + " ".join(SAMPLERS) in text


def test_options_of_the_sampler():
    solver = solver_for("--sampler", "ddim", "--eta", "0.5", "--set", "timestep_spacing=trailing")
    assert isinstance(solver, DDIM) and solver.eta == 0.5 and solver.timestep_spacing == "trailing"
    assert solver.use_clipped_model_output
    solver = solver_for("--sampler", "dpmpp_2m", "--set", "order=3", "--set", "clip_sample=false", "--set", "rho=5")
    assert isinstance(solver, DPMSolverPP) and solver.order == 3 and not solver.clip_sample and solver.rho == 5.0
    assert solver_for("--sampler", "euler", "--set", "s_tmax=inf", "--set", "s_churn=4").s_churn == 4.0
    assert isinstance(solver_for("--sampler", "ddpm", learned=True), DDPM)


def test_what_the_file_says_is_the_default_and_an_option_overrules_it():
    record = TrainingRecord("digits-ddpm", "squared_cosine", 500, "v_prediction", (1, 8, 8))
    solver = solver_for("--sampler", "euler", record=record)
    assert isinstance(solver, Euler) and len(solver.betas) == 500 and solver.prediction_type == "v_prediction"
    solver = solver_for("--timesteps", "20", "--prediction-type", "sample", "--schedule", "linear", record=record)
    assert len(solver.betas) == 20 and solver.prediction_type == "sample" and solver.betas[1] > solver.betas[0]


REFUSED = [
    (["--class", "10"], "--class must be in [0, 10), got 10"),
    (["--class", "-1"], "--class must be in [0, 10), got -1"),
    (["--steps", "2000"], "steps must be in [1, 1000], got 2000"),
    (["--steps", "0"], "--steps: must be at least 1, got 0"),
    (["--timesteps", "2"], "steps must be in [1, 2], got 4"),
    (["--timesteps", "1"], "--timesteps must be at least 2, got 1"),
    (["--eta", "5"], "eta must be in [0, 1], got 5.0"),
    (["--eta", "nan"], "--eta: must be finite, got nan"),
    (["--size", "7", "7"], "--size must be divisible by 2 for this model, got 7 7"),
    (["--size", "0", "8"], "--size: must be at least 1, got 0"),
    (["--guidance-scale", "nan", "--class", "1"], "--guidance-scale: must be finite, got nan"),
    (["--guidance-scale", "2"], "--guidance-scale 2 needs a --class"),
    (["--class", "1", "--classes", "random"], "--classes: not allowed with argument --class"),
    (["--classes", "no.txt"], "No such file or directory: 'no.txt'"),
    (
        ["--temperature", "0.5"],
        "--temperature is for flows, transformer flows and autoregressive models: digits-ddpm is a diffusion model",
    ),
    (["--top-k", "3"], "--top-k is for autoregressive models: digits-ddpm is a diffusion model, see --eta and --guid"),
    (["--format", "csv"], "--format csv: format 'csv' is for rows of numbers, not for images"),
    (["--format", "png", "--gather", "x.npz"], "--gather puts shards of --format npz together, these are of png"),
    (["--verify", "--overwrite"], "--overwrite: not allowed with argument --verify"),
    (["--threads", "0"], "--threads: must be at least 1, got 0"),
    (["--weights", "mnist-classifier"], "holds a DigitClassifier; drawn from are GatedPixelCNN, Glow, IAF,"),
    (["--seed", str(2**63)], "--seed: must be at least -2^63 and below 2^63"),
    (["--seed", str(2**63 - 1), "--num", "2"], "that of the last image, SEED + 1, must be below 2^63"),
    (["--num", "-3"], "--num: must be at least 1, got -3"),
    (["--device", "cuda:99"], "--device cuda:99: torch finds"),
    (["--device", "cpu:1"], "--device: must be cpu, cuda or cuda:N, got 'cpu:1'"),
    (["--device", "abacus"], "--device: must be cpu, cuda or cuda:N, got 'abacus'"),
    (["--sampler", "euler", "--eta", "0.5"], "--sampler euler has no option 'eta'; its options are clip_sample, "),
    (
        ["--sampler", "ddim", "--set", "s_churn=1"],
        "--sampler ddim has no option 's_churn'; its options are clip_sample, ",
    ),
    (
        ["--sampler", "dpmpp_3m", "--set", "order=2"],
        "--sampler dpmpp_3m has no option 'order'; its options are algorithm",
    ),
    (["--set", "eta"], "--set takes NAME=VALUE, got 'eta'"),
    (["--set", "eta=much"], "--set eta: must be a number, got 'much'"),
    (["--set", "eta=nan"], "--set eta: must be a number, got 'nan'"),
    (["--set", "clip_sample=1"], "--set clip_sample: must be true or false, got '1'"),
    (["--set", "steps_offset=1.5"], "--set steps_offset: must be an integer, got '1.5'"),
    (["--set", "timestep_spacing=odd"], "spacing must be one of"),
    (["--sampler", "dpmpp_2m", "--set", "order=7"], "--sampler dpmpp_2m: order must be one of (1, 2, 3), got 7"),
    (
        ["--sampler", "pndm", "--prediction-type", "sample"],
        "prediction_type must be 'epsilon' or 'v_prediction' for PNDM",
    ),
    (["--sampler", "paint"], "--sampler: invalid choice: 'paint'"),
    (["--out", ""], "--out: must be the name of a file or folder, got ''"),
    (
        ["--weights", "digits"],
        "digits: no such checkpoint file (and no weights of the package: breast-cancer-maf, diabetes-spline, digits-ddpm",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_refusals_are_one_line(tmp_path, capsys, options, message):
    assert message in refused(capsys, *arguments(tmp_path / "out", *options))
    assert not (tmp_path / "out" / "grid.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(tmp_path, capsys):
    line = refused(capsys, *arguments(tmp_path, "--device", "cuda"))
    assert "--device cuda: torch finds no CUDA device here; `fastgen doctor` says more" in line


def test_an_unwritable_folder_is_found_before_anything_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastgen.jobs.diffusion.sample", lambda *args, **options: pytest.fail("something was drawn"))
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(capsys, *arguments(tmp_path / "file"))
    assert "cannot be written" in refused(capsys, *arguments(tmp_path / "file" / "out"))
    assert "cannot be written" in refused(capsys, *arguments(tmp_path / "out"), "--gather", tmp_path / "file" / "x.npz")


def test_weights_that_say_nothing_and_models_of_other_kinds(tmp_path, capsys):
    out = arguments(tmp_path / "o")
    assert "--size is needed" in refused(capsys, *out, "--weights", tiny(tmp_path / "a"))
    assert "images of 4 channels; 1, 2 or 3 can be drawn" in refused(
        capsys, *out, "--size", 4, 4, "--weights", tiny(tmp_path / "b", in_channels=4)
    )
    learned = tiny(tmp_path / "c", learn_sigma=True)
    assert "use --sampler ddpm" in refused(capsys, *out, "--size", 4, 4, "--weights", learned)
    assert main([*out, "--size", "4", "4", "--weights", learned, "--sampler", "ddpm", "--num", "1"]) == 0
    classes = tiny(tmp_path / "d", num_classes=3)
    assert "--class is needed" in refused(capsys, *out, "--size", 4, 4, "--weights", classes)
    assert "--guidance-scale must be 1" in refused(
        capsys, *out, "--size", 4, 4, "--weights", classes, "--class", 1, "--guidance-scale", 2
    )


def altered(path, change):
    """The shipped weights with a change of (tensors, metadata)."""
    tensors, metadata = load_state(find_weights("digits-ddpm"))
    change(tensors, metadata)
    save_state(path, tensors, metadata)
    return str(path)


def set_nan(tensors, metadata):
    tensors["out_conv.bias"][0] = torch.nan


def make_integers(tensors, metadata):
    tensors["out_conv.bias"] = tensors["out_conv.bias"].int()


def mix_dtypes(tensors, metadata):
    tensors["out_conv.bias"] = tensors["out_conv.bias"].half()


def drop(tensors, metadata):
    del tensors["out_conv.bias"], tensors["out_conv.weight"]


def retrain(**fields):
    def change(tensors, metadata):
        metadata["training"] = json.dumps({**json.loads(metadata["training"]), **fields})

    return change


def rebuild(**fields):
    def change(tensors, metadata):
        metadata["config"] = json.dumps({**json.loads(metadata["config"]), **fields})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_nan, "'out_conv.bias' has values that are not finite"),
        (make_integers, "'out_conv.bias' must be of one of"),
        (mix_dtypes, "all weights must be of one dtype, got torch.float16, torch.float32"),
        (drop, "the weights do not fit the config"),
        (retrain(schedule="cubic"), "'schedule' of the training must be one of"),
        (retrain(timesteps="x"), "'timesteps' of the training must be a positive integer, got 'x'"),
        (retrain(image_shape=[8]), "'image_shape' of the training must be three positive integers, got [8]"),
        (retrain(prediction_type=7), "'prediction_type' of the training must be one of"),
        (rebuild(num_res_blocks="x"), "the config in the metadata is not valid"),
        (rebuild(attention_resolutions=[[2]]), "the config in the metadata is not valid"),
        (rebuild(num_classes=1.5), "the config in the metadata is not valid"),
    ],
)
def test_damaged_weights_are_one_line_that_names_the_file(tmp_path, capsys, change, message):
    weights = altered(tmp_path / "w.safetensors", change)
    line = refused(capsys, *arguments(tmp_path / "o", "--weights", weights))
    assert f"{tmp_path}/w.safetensors: {message}" in line
    assert not (tmp_path / "o").exists()


def test_images_that_are_not_finite_are_not_written(tmp_path, capsys):
    def explode(tensors, metadata):
        tensors["out_conv.weight"][:] = 3e38  # finite, as every weight

    weights = altered(tmp_path / "w.safetensors", explode)
    line = refused(capsys, *arguments(tmp_path / "o", "--weights", weights, "--set", "clip_sample=false", "--seed", 5))
    assert "16 of 16 examples are not finite, that of seed 5 the first" in line
    assert not list((tmp_path / "o").glob("*.npz")) and not (tmp_path / "o" / "grid.png").exists()
