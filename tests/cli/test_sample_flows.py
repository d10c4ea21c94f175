"""`fastgen sample` of flows: images of levels, rows in the units of their table, and what it refuses."""

import csv

import numpy as np
import pytest
import torch

from fastgen.cli.main import main
from fastgen.data import load_table
from fastgen.models import MAF, NeuralSplineFlow, TarFlow, find_weights

from ..backends import import_peer
from .running import refused, run
from .samples import drawn, names


def draw(folder, *options, weights="digits-glow"):
    assert main(["sample", "--weights", weights, "--out", str(folder), *options]) == 0
    return drawn(folder)["arr_0"] if weights == "digits-glow" else None


def test_an_image_depends_on_its_seed_class_and_temperature_alone(tmp_path, capsys):
    a = draw(tmp_path / "a", "--num", "5", "--seed", "10", "--batch-size", "2", "--class", "7")
    said = f"5 images drawn at temperature 1 in {tmp_path}/a, together in {tmp_path}/a/grid.png\n"
    assert capsys.readouterr().out == said
    b = draw(tmp_path / "b", "--num", "2", "--seed", "12", "--class", "7")
    assert a.shape == (5, 8, 8, 1) and np.array_equal(a[2:4], b)
    levels = np.rint(np.arange(17) * (255 / 16))  # of digits
    assert np.isin(a, levels).all()
    assert not np.array_equal(
        a, draw(tmp_path / "c", "--num", "5", "--seed", "10", "--class", "7", "--temperature", "0.5")
    )
    cold = draw(tmp_path / "d", "--num", "12", "--temperature", "0")
    assert np.array_equal(cold[:2], cold[10:]) and not np.array_equal(cold[0], cold[1])  # the classes take turns
    assert drawn(tmp_path / "d")["labels"].tolist() == [*range(10), 0, 1]
    assert names(tmp_path / "b") == ["000012.npz", "grid.png", "manifest.json"]


def test_rows_are_in_the_units_of_the_table(tmp_path, capsys):
    import_peer("sklearn")
    draw(tmp_path / "o", "--num", "200", "--batch-size", "64", "--seed", "-3", weights="diabetes-spline")
    assert capsys.readouterr().out == f"200 rows drawn at temperature 1 in {tmp_path}/o\n"
    assert names(tmp_path / "o") == ["-00003.csv", "manifest.json"]
    columns, *lines = csv.reader((tmp_path / "o" / "-00003.csv").open())
    table = load_table("diabetes")
    assert tuple(columns) == table.columns and len(lines) == 200
    rows = torch.tensor([[float(x) for x in line] for line in lines], dtype=torch.float64)
    assert ((rows.mean(0) - table.mean) / table.scale).abs().max() < 0.5
    model = NeuralSplineFlow.load(find_weights("diabetes-spline"))
    expected = table.in_units(model.sample(200, seeds=[k - 3 for k in range(200)]))
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)

    draw(tmp_path / "n", "--num", "200", "--seed", "-3", "--format", "npz", weights="diabetes-spline")
    arrays = drawn(tmp_path / "n")
    assert arrays["arr_0"].dtype == np.float32 and arrays["seeds"].tolist() == list(range(-3, 197))
    np.testing.assert_allclose(arrays["arr_0"], rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--class", "10"], "--class must be in [0, 10), got 10"),
        (["--temperature", "-1"], "--temperature must not be negative, got -1"),
        (["--temperature", "nan"], "--temperature: must be finite, got nan"),
        (["--steps", "20"], "--steps is for diffusion models: digits-glow is a flow, drawn from in one pass"),
        (["--guidance-scale", "2"], "--guidance-scale is for diffusion models and transformer flows: "),
        (["--noise-std", "0.1"], "--noise-std is for transformer flows: "),
        (["--size", "8", "8"], "--size is for diffusion models and autoregressive models: "),
        (["--seed", str(2**63 - 1)], "that of the last image, SEED + 15, must be below 2^63"),
    ],
)
def test_refusals_are_one_line(tmp_path, capsys, options, message):
    assert message in refused(capsys, "sample", "--weights", "digits-glow", "--out", tmp_path / "o", *options)
    assert not (tmp_path / "o").exists()


def test_models_that_lack_something(tmp_path, capsys):
    MAF(4, context_features=3).save(tmp_path / "context")
    MAF(4).save(tmp_path / "plain")
    out = ["sample", "--out", tmp_path / "o", "--weights"]
    assert "draws nothing without a context" in refused(capsys, *out, tmp_path / "context")
    line = refused(capsys, *out, tmp_path / "plain")
    assert f"{tmp_path}/plain: 'columns' of the training must name 4 columns" in line
    assert "--classes random: diabetes-spline has no classes" in refused(
        capsys, *out, "diabetes-spline", "--classes", "random"
    )
    line = refused(capsys, *out, "diabetes-spline", "--format", "png")
    assert "--format png: format 'png' is for images, not for rows of 9 numbers" in line


def test_a_transformer_flow(tmp_path, capsys):
    torch.manual_seed(0)
    for name, num_classes in (("classes", 3), ("none", None)):
        TarFlow(1, 8, 4, 16, num_blocks=2, layers_per_block=1, num_classes=num_classes, head_channels=8).save(
            tmp_path / name
        )
    command = ["sample", "--quiet", "--num", "5", "--out", tmp_path / "o", "--weights"]
    guided = ["--guidance-scale", "2", "--noise-std", "0.1", "--temperature", "0.5"]
    assert run(*command, tmp_path / "classes", *guided) == 0
    assert drawn(tmp_path / "o")["labels"].tolist() == [0, 1, 2, 0, 1]
    assert "5 images drawn patch after patch at temperature 0.5 in " in capsys.readouterr().out
    for weights, options, message in (
        ("none", ["--guidance-scale", "2"], f"must be 1: {tmp_path}/none has no classes to guide towards, got 2"),
        ("classes", ["--guidance-scale", "0.5"], "--guidance-scale must be at least 1, got 0.5"),
        ("classes", ["--noise-std", "-1"], "--noise-std must not be negative, got -1"),
        ("classes", ["--steps", "3"], f"--steps is for diffusion models: {tmp_path}/classes is a transformer flow"),
    ):
        assert message in refused(capsys, *command, tmp_path / weights, "--overwrite", *options)
