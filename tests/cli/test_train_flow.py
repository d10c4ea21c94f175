"""`fastgen train` of flows: tiny runs, their files, and what is said of data not trained on."""

import dataclasses
import json

import pytest
import torch

from fastgen.cli._flow_recipes import FLOW_RECIPES
from fastgen.cli.main import main
from fastgen.data import load_digits, to_levels
from fastgen.models import Glow, load_state, read_metadata
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


def test_a_glow_of_three_factors(tmp_path, capsys):
    assert main(command("digits-glow", tmp_path, "--steps", "2", "--parametrization", "plu")) == 0
    model = Glow.load(tmp_path / "w.safetensors")
    assert model.config["parametrization"] == "plu"
    assert any(key.endswith("log_diagonal") for key in model.state_dict())
    assert "--parametrization" in refused(capsys, *command("digits-realnvp", tmp_path, "--parametrization", "plu"))
