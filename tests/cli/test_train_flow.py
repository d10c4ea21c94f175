"""`fastgen train` and `fastgen sample` of flows: tiny runs, their files, what is said of data not trained on, and draws."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch

from fastgen.cli._flow_recipes import FLOW_RECIPES
from fastgen.cli.main import main
from fastgen.data import load_digits, load_table, to_levels
from fastgen.models import load_state, read_metadata
from fastgen.training import mean_score

from ..backends import import_peer
from ..mnist_files import write_mnist
from .running import refused

import_peer("sklearn")

SMALLER = {
    "digits-realnvp": {"hidden_channels": 4},
    "digits-glow": {"num_steps": 1, "hidden_channels": 4},
    "mnist-glow": {"num_steps": 1, "hidden_channels": 4},
    "breast-cancer-maf": {"num_transforms": 2, "hidden_features": 8},
    "diabetes-spline": {"num_transforms": 2, "hidden_features": 8},
}


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    """The recipes with models that take no time."""
    for name, config in SMALLER.items():
        recipe = FLOW_RECIPES[name]
        monkeypatch.setitem(FLOW_RECIPES, name, dataclasses.replace(recipe, config={**recipe.config, **config}))


def command(name, folder, *arguments):
    options = ["--batch-size", "4", "--warmup", "1", "--quiet", "--out", str(folder / "w.safetensors")]
    return ["train", name, *options, *arguments]


def test_every_recipe_has_a_smaller_one():
    assert SMALLER.keys() == FLOW_RECIPES.keys()


@pytest.mark.parametrize("name", ["digits-realnvp", "digits-glow", "breast-cancer-maf", "diabetes-spline"])
def test_a_resumed_run_is_the_uninterrupted_one_and_says_its_score(tmp_path, capsys, name):
    recipe, parts, long = FLOW_RECIPES[name], tmp_path / "parts", tmp_path / "long"
    assert main(command(name, parts, "--steps", "2", "--lr-decay", "none")) == 0
    torch.manual_seed(1234)
    assert main(command(name, parts, "--steps", "4", "--lr-decay", "none", "--resume")) == 0
    capsys.readouterr()
    assert main(command(name, long, "--steps", "4", "--lr-decay", "none")) == 0
    said = capsys.readouterr()
    assert said.err == "" and len(said.out.splitlines()) == 2
    (ours, metadata), (theirs, other_metadata) = (load_state(folder / "w.safetensors") for folder in (parts, long))
    assert metadata == other_metadata and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert {x.dtype for x in ours.values()} == {getattr(torch, recipe.weights_dtype)}

    model = recipe.model.load(long / "w.safetensors", dtype=torch.float32)
    training = json.loads(read_metadata(long / "w.safetensors")["training"])
    others = recipe.examples_of("held_out", None)
    score = mean_score(model, others.data, others.labels, levels=recipe.options.levels)
    what, key = ("bits a dimension", "bits_per_dim") if recipe.kind == "images" else ("nats", "nats")
    assert training[key] == pytest.approx(score, rel=1e-5)
    assert f"{training[key]:.4f} {what} on {len(others.data)} {recipe.kind} not trained on" in said.out
    assert training["recipe"] == name and training["evaluated_on"] == "held_out" and training["steps"] == 4
    if recipe.kind == "rows":
        assert training["columns"] == list(others.table.columns)
        assert training["mean"] == others.table.mean.tolist() and "image_shape" not in training


def test_mnist_from_a_folder(tmp_path, capsys):
    data = write_mnist(tmp_path / "data", n=12, packed=True)
    assert main(command("mnist-glow", tmp_path / "run", "--steps", "2", "--data", str(data))) == 0
    assert "on 12 images not trained on" in capsys.readouterr().out
    assert json.loads(read_metadata(tmp_path / "run" / "w.safetensors")["training"])["levels"] == 256
    assert "the following arguments are required: --data" in refused(capsys, "train", "mnist-glow")


@pytest.fixture
def glow(tmp_path):
    assert main(command("digits-glow", tmp_path / "g", "--steps", "2")) == 0
    return str(tmp_path / "g" / "w.safetensors")


def drawn(folder):
    return np.load(folder / "samples.npz")["images"]


def test_an_image_depends_on_its_seed_class_and_temperature_alone(tmp_path, capsys, glow):
    def draw(name, *options):
        assert main(["sample", "--weights", glow, "--out", str(tmp_path / name), *options]) == 0
        return torch.from_numpy(drawn(tmp_path / name))

    capsys.readouterr()
    a = draw("a", "--num", "5", "--seed", "10", "--batch-size", "2", "--class", "7")
    assert capsys.readouterr().out.startswith(
        f"5 images in {tmp_path}/a, together in {tmp_path}/a/grid.png, drawn at temp"
    )
    b = draw("b", "--num", "2", "--seed", "12", "--class", "7")
    assert a.shape == (5, 1, 8, 8) and torch.equal(a[2:4], b)
    assert torch.equal(to_levels(a, 17) / 8 - 1, a)  # levels of digits
    assert not torch.equal(a, draw("c", "--num", "5", "--seed", "10", "--class", "7", "--temperature", "0.5"))
    cold = draw("d", "--num", "12", "--temperature", "0")
    assert torch.equal(cold[:2], cold[10:])  # the classes take turns
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "000012.png",
        "000013.png",
        "grid.png",
        "samples.npz",
    ]


def test_rows_are_in_the_units_of_the_table(tmp_path, capsys):
    assert main(command("diabetes-spline", tmp_path, "--steps", "2")) == 0
    weights = ["--weights", str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "o")]
    assert main(["sample", *weights, "--num", "200", "--batch-size", "64", "--seed", "-3"]) == 0
    assert f"200 rows in {tmp_path}/o/samples.csv" in capsys.readouterr().out
    names, *lines = csv.reader((tmp_path / "o" / "samples.csv").open())
    table = load_table("diabetes")
    assert tuple(names) == table.columns and len(lines) == 200
    rows = torch.tensor([[float(x) for x in line] for line in lines], dtype=torch.float64)
    assert ((rows.mean(0) - table.mean) / table.scale).abs().max() < 0.5
    model = FLOW_RECIPES["diabetes-spline"].model.load(tmp_path / "w.safetensors")
    expected = table.in_units(model.sample(200, seeds=[k - 3 for k in range(200)]))
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--class", "10"], "--class must be in [0, 10), got 10"),
        (["--temperature", "-1"], "--temperature must not be negative, got -1"),
        (["--temperature", "nan"], "--temperature: must be finite, got nan"),
        (["--steps", "20"], "--steps is for diffusion models: "),
        (["--guidance-scale", "2"], "--guidance-scale is for diffusion models: "),
        (["--seed", str(2**63 - 1)], "that of the last image, SEED + 15, must be below 2^63"),
    ],
)
def test_refusals_are_one_line(tmp_path, capsys, glow, options, message):
    assert message in refused(capsys, "sample", "--weights", glow, "--out", tmp_path / "o", *options)
    assert not (tmp_path / "o").exists()


def test_a_diffusion_model_has_no_temperature(tmp_path, capsys):
    line = refused(capsys, "sample", "--weights", "digits-ddpm", "--out", tmp_path, "--temperature", "0.5")
    assert "--temperature is for flows: digits-ddpm is a diffusion model" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clip-norm", "-1"], "clip_norm must be finite and not negative, got -1.0"),
        (["--steps", "1"], "--steps must be more than --warmup 1 for --lr-decay cosine, got 1"),
        (["--resume"], "w.checkpoint.safetensors: no such checkpoint file"),
        (["--channels", "4"], "unrecognized arguments: --channels 4"),
    ],
)
def test_train_refuses(tmp_path, capsys, arguments, message):
    assert message in refused(capsys, *command("digits-glow", tmp_path, *arguments))


def test_the_levels_are_those_of_the_digits():
    assert FLOW_RECIPES["digits-glow"].options.levels == int(to_levels(load_digits().images, 17).max()) + 1
