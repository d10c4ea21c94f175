"""`fastgen evaluate` on made-up digits: its table and JSON, what it leaves out and why, refusals of one line, several ranks."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastgen.cli import _evaluation_report
from fastgen.data import open_image_set
from fastgen.metrics import Gaussian, frechet_distance, kernel_distance, load_features, precision_recall

from ..data.image_files import images, png, write_job
from ..metrics.networks import Flat, Statistics, script
from ..mnist_files import digits, write_mnist
from .running import refused, run

SMALL = ("--features", "digits", "--quiet", "--kid-subsets", "5", "--kid-subset-size", "20")


@pytest.fixture
def sets(tmp_path):
    """(folder of a job of 28 x 28 digits with labels, name of the reference)."""
    write_mnist(tmp_path / "mnist", 40)
    pixels, labels = digits("test", 30)
    folder = write_job(tmp_path / "job", "npz", pixels[..., None].numpy(), labels.numpy(), shard=7)
    return folder, f"mnist:{tmp_path}/mnist:train"


def evaluated(capsys, *arguments):
    """(the table as rows of words, what is in the JSON file)."""
    path = arguments[arguments.index("--json") + 1]
    capsys.readouterr()
    assert run("evaluate", *arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""  # no terminal, no bar
    return printed.out.splitlines(), json.loads(path.read_text())


def test_all_metrics_are_those_of_the_library(sets, tmp_path, capsys):
    folder, reference = sets
    lines, found = evaluated(capsys, folder, "--reference", reference, *SMALL, "--json", tmp_path / "r.json")
    features = load_features("digits")
    with torch.no_grad():
        rows = [features(opened.read(0, len(opened))) for opened in map(open_image_set, (folder, reference))]
    gaussians = [Gaussian(x.double().mean(0), torch.from_numpy(np.cov(x.double().numpy(), rowvar=False))) for x in rows]
    metrics = found["metrics"]
    assert metrics["fid"] == pytest.approx(frechet_distance(*gaussians), rel=1e-6)
    kid = kernel_distance(*rows, subsets=5, subset_size=20)
    assert metrics["kid"]["mean"] == pytest.approx(kid.mean, rel=1e-6)
    assert (metrics["precision"], metrics["recall"]) == precision_recall(*rows)
    assert metrics["accuracy"]["count"] == 30 and metrics["reference_accuracy"]["count"] == 40
    assert found["not_computed"] == {} and found["versions"]["torch"] == torch.__version__
    assert found["settings"]["kid_subset_size"] == 20 and found["ranks"] == 1
    text = "\n".join(lines)
    assert f"{metrics['fid']:.6g}" in text and f"{metrics['precision']:.4f}" in text
    for said in (
        f"{folder}", "30 of 1x28x28", "40 images", "not Inception's", "fewer images (30) than features (576)",
        "5 times 20 images", "k = 3", "read by mnist-classifier; of the reference",
    ):  # fmt: skip
        assert said in text, said
    assert [line.split()[0] for line in lines if line.strip()][-5:] == ["FID", "KID", "precision", "recall", "accuracy"]


@pytest.mark.parametrize("form", ["webdataset", "png"])
def test_the_layout_changes_nothing(sets, tmp_path, capsys, form):
    folder, reference = sets
    pixels, labels = digits("test", 30)
    other = write_job(tmp_path / "other", form, pixels[..., None].numpy(), labels.numpy())
    found = [
        evaluated(capsys, name, "--reference", reference, *SMALL, "--json", tmp_path / "r.json")[1]["metrics"]
        for name in (folder, other)
    ]
    assert found[0] == found[1]


def test_a_set_measured_against_itself(sets, tmp_path, capsys):
    folder, _ = sets
    _, found = evaluated(capsys, folder, "--reference", folder, *SMALL, "--json", tmp_path / "r.json")
    metrics = found["metrics"]
    assert metrics["fid"] < 1e-9 and (metrics["precision"], metrics["recall"]) == (1, 1)
    assert metrics["accuracy"] == metrics["reference_accuracy"]


def test_statistics_are_written_and_are_a_reference(sets, tmp_path, capsys):
    folder, reference = sets
    written = tmp_path / "reference.npz"
    assert run("evaluate", reference, "--features", "digits", "--save-statistics", written) == 0
    assert sorted(np.load(written)) == ["count", "features", "mu", "sigma"]
    _, of_images = evaluated(capsys, folder, "--reference", reference, *SMALL, "--json", tmp_path / "r.json")
    lines, found = evaluated(capsys, folder, "--reference", written, *SMALL, "--json", tmp_path / "r.json")
    assert found["metrics"]["fid"] == pytest.approx(of_images["metrics"]["fid"], rel=1e-9)
    reason = f"{written} has statistics, it takes images"
    assert found["not_computed"] == {"kid": reason, "precision-recall": reason}
    assert "statistics of 40 images" in "\n".join(lines) and sum("not computed" in line for line in lines) == 2
    path = script(tmp_path / "net.pt", Flat())
    line = refused(capsys, "evaluate", folder, "--reference", written, "--features", path)
    assert "reference.npz: statistics of the features 'digits', not of 'net.pt " in line


def test_a_reference_batch_of_adm_has_both(sets, tmp_path, capsys):
    """FID is against its statistics, as ADM's evaluator has it, the rest against its images."""
    folder, reference = sets
    opened = open_image_set(reference)
    pixels = opened.read(0, 25).permute(0, 2, 3, 1).numpy()
    np.savez(
        tmp_path / "adm.npz", arr_0=pixels, mu=np.zeros(576), sigma=np.eye(576), mu_s=np.zeros(3), sigma_s=np.eye(3)
    )
    lines, found = evaluated(capsys, folder, "--reference", tmp_path / "adm.npz", *SMALL, "--json", tmp_path / "r.json")
    features = load_features("digits")
    with torch.no_grad():
        rows = features(open_image_set(folder).read(0, 30)).double()
    own = Gaussian(rows.mean(0), torch.from_numpy(np.cov(rows.numpy(), rowvar=False)))
    unit = Gaussian(torch.zeros(576).double(), torch.eye(576).double())
    assert found["metrics"]["fid"] == pytest.approx(frechet_distance(own, unit), rel=1e-6)
    assert "precision" in found["metrics"] and "kid" in found["metrics"] and "accuracy" in found["metrics"]
    assert "reference_accuracy" not in found["metrics"]  # no labels there
    assert any("statistics and 25 images" in line for line in lines)


def test_other_features_and_another_classifier(sets, tmp_path, capsys):
    folder, reference = sets
    network = script(tmp_path / "net.pt", Statistics())
    classifier = script(tmp_path / "classes.pt", Flat(torch.nn.Linear(784, 10)))
    lines, found = evaluated(
        capsys, folder, "--reference", reference, "--features", network, "--feature-range", "signed",
        "--classifier", classifier, "--classifier-range", "unit", "--metrics", "fid", "accuracy", "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert sorted(found["metrics"]) == ["accuracy", "fid", "reference_accuracy"]
    assert found["features"]["number"] == 4 and found["features"]["name"].endswith(", signed")
    assert found["classifier"].startswith("classes.pt ") and found["classifier"].endswith(", unit")
    text = "\n".join(lines)
    assert "not Inception's" in text and "fewer images" not in text and "not computed" not in text


def test_what_cannot_be_had_is_said(tmp_path, capsys):
    """Colour images without labels, few of them: FID alone is left."""
    for name, seed in (("a", 0), ("b", 1)):
        np.savez(tmp_path / f"{name}.npz", images(3, seed=seed)[0])
    network = script(tmp_path / "net.pt", Flat())
    lines, found = evaluated(
        capsys,
        tmp_path / "a.npz",
        "--reference",
        tmp_path / "b.npz",
        "--features",
        network,
        "--json",
        tmp_path / "r.json",
    )
    assert sorted(found["metrics"]) == ["fid"]
    assert found["not_computed"] == {
        "accuracy": f"{tmp_path}/a.npz has no labels",
        "kid": "subsets of 1,000 images of 3 and 3: see --kid-subset-size",
        "precision-recall": "3 neighbours among 3 images: see --neighbours",
    }
    assert sum("not computed: " in line for line in lines) == 3
    for metric, why in found["not_computed"].items():
        line = refused(
            capsys,
            "evaluate",
            tmp_path / "a.npz",
            "--reference",
            tmp_path / "b.npz",
            "--features",
            network,
            "--metrics",
            metric,
        )
        assert f"--metrics {metric}: {why}" in line


def test_labels_of_images_that_the_shipped_classifier_does_not_take(tmp_path, capsys):
    pixels, labels = images(8, (1, 8, 8))
    np.savez(tmp_path / "a.npz", arr_0=pixels, labels=labels)
    network = script(tmp_path / "net.pt", Flat())
    _, found = evaluated(
        capsys,
        tmp_path / "a.npz",
        "--save-statistics",
        tmp_path / "s.npz",
        "--features",
        network,
        "--json",
        tmp_path / "r.json",
    )
    assert (
        found["not_computed"]["accuracy"]
        == "the shipped mnist-classifier takes digits of 1x28x28, not 1x8x8: see --classifier"
    )
    assert found["reference"] is None and found["metrics"] == {}
    line = refused(
        capsys,
        "evaluate",
        tmp_path / "a.npz",
        "--metrics",
        "accuracy",
        "--features",
        network,
        "--classifier",
        "mnist-classifier",
    )
    assert "a.npz: the digit classifier takes images of 1 x 28 x 28, got 1 x 8 x 8" in line


def test_the_first_images_alone(sets, tmp_path, capsys):
    folder, reference = sets
    lines, found = evaluated(
        capsys, folder, "--reference", reference, "--num", "22", *SMALL, "--json", tmp_path / "r.json"
    )
    assert found["images"] == {"name": str(folder), "count": 22, "of": 30, "shape": [1, 28, 28]}
    assert found["metrics"]["accuracy"]["count"] == 22 and found["metrics"]["reference_accuracy"]["count"] == 40
    assert "22 of 1x28x28, the first of 30" in lines[0]


def test_the_table_says_inception_without_a_warning():
    """Where the features are Inception's nothing is said of others."""
    report = {
        "metrics": {"fid": 3.25}, "not_computed": {"kid": "not asked for"},
        "images": {"name": "a", "count": 50000, "of": 50000, "shape": [3, 32, 32]},
        "reference": {"name": "b.npz", "count": None, "statistics": True, "statistics_count": None},
        "features": {"name": "inception", "text": "the 2,048", "number": 2048, "published": True},
        "classifier": None, "settings": {},
    }  # fmt: skip
    text = _evaluation_report.table(report)
    assert "not Inception's" not in text and "FID        3.25" in text and "KID" not in text


# refusals


def test_refusals_before_anything_is_measured(sets, tmp_path, capsys):
    folder, reference = sets
    np.savez(tmp_path / "large.npz", images(4, (3, 28, 28))[0])
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    write_job(tmp_path / "open", "npz", images(6, (1, 28, 28))[0], complete=False)
    for arguments, message in [
        ([folder], "--reference is needed"),
        ([tmp_path / "none", "--reference", reference], "none: no such folder or file"),
        ([folder, "--reference", tmp_path / "none.npz"], "none.npz: no such folder or file"),
        ([folder, "--reference", tmp_path / "bad.npz"], "bad.npz: cannot be read, it is no npz file"),
        ([folder, "--reference", tmp_path / "large.npz"], f"those of {folder} are 1x28x28, those of {tmp_path}/large.npz 3x28x28"),
        ([tmp_path / "large.npz", "--reference", tmp_path / "large.npz"], "takes images of 1 x 28 x 28, got 3 x 28 x 28"),
        ([tmp_path / "open", "--reference", reference], "has not finished: run it again"),
        ([folder, "--reference", reference, "--num", "31"], "--num must be at most the 30 images"),
        ([folder, "--reference", reference, "--json", tmp_path], "cannot be written: it is a folder"),
        ([folder, "--reference", reference, "--save-statistics", tmp_path / "x.txt"], "must be a file that ends in .npz"),
        ([folder, "--reference", reference, "--features", tmp_path / "none.pt"], "none.pt: no such file of a network"),
        ([folder, "--reference", reference, "--features", folder / "000000.npz"], "cannot be loaded as TorchScript"),
        ([folder, "--reference", reference, "--classifier", "no.safetensors"], "no.safetensors: no such checkpoint file"),
        ([folder, "--reference", reference, "--metrics", "isc"], "invalid choice: 'isc'"),
        ([folder, "--reference", reference, "--kid-seed", "-1"], "must be at least 0 and below 2^32, got -1"),
        ([folder, "--reference", reference, "--feature-range", "bytes"], "invalid choice: 'bytes'"),
    ]:  # fmt: skip
        features = [] if "--features" in arguments else ["--features", "digits"]
        assert message in refused(capsys, "evaluate", *arguments, *features), message
    if not torch.cuda.is_available():
        assert "no CUDA device" in refused(capsys, "evaluate", folder, "--reference", reference, "--device", "cuda")


def test_what_is_there_of_a_job_on_request(tmp_path, capsys):
    folder = write_job(tmp_path / "open", "npz", images(6, (1, 28, 28))[0], complete=False)
    _, found = evaluated(capsys, folder, "--incomplete", "--reference", folder, *SMALL, "--json", tmp_path / "r.json")
    assert found["images"]["count"] == 6


def test_without_inception_it_is_said_and_digits_are_not_taken_instead(sets, capsys, monkeypatch):
    folder, reference = sets
    monkeypatch.setattr("fastgen.metrics._torch_fidelity.PACKAGE", "no_such_package")
    line = refused(capsys, "evaluate", folder, "--reference", reference)
    assert "torch-fidelity, which is not installed: pip install --no-deps torch-fidelity" in line


def test_without_pillow_it_is_said(tmp_path, capsys, monkeypatch):
    (tmp_path / "x.png").write_bytes(png(images(1, (1, 28, 28))[0][0]))
    monkeypatch.setitem(sys.modules, "PIL", None)
    line = refused(capsys, "evaluate", tmp_path, "--reference", tmp_path, "--features", "digits")
    assert "`fastgen evaluate` needs pillow, of the extra 'evaluate': pip install pillow" in line


def test_a_damaged_image_in_the_middle(tmp_path, capsys):
    pixels, _ = images(30, (1, 28, 28))
    for k, image in enumerate(pixels):
        (tmp_path / f"{k}.png").write_bytes(png(image))
    (tmp_path / "20.png").write_bytes(png(pixels[20])[:100])
    line = refused(
        capsys, "evaluate", tmp_path, "--reference", tmp_path, "--features", "digits", "--quiet", "--batch-size", "8"
    )
    assert f"{tmp_path}/20.png: not a readable picture" in line


def test_the_help_says_that_files_are_executed(capsys):
    assert run("evaluate", "--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "loading one executes what its author put into it" in printed and "mnist:FOLDER:test" in printed


# several ranks


def on_ranks(n, *arguments):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(n),
        "-m",
        "fastgen",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300, check=False
    )


@pytest.mark.long
def test_two_ranks_say_what_one_says(sets, tmp_path, capsys):
    folder, reference = sets
    arguments = [
        "evaluate",
        folder,
        "--reference",
        reference,
        *SMALL,
        "--batch-size",
        "4",
        "--json",
        tmp_path / "r.json",
    ]
    lines, one = evaluated(capsys, *arguments[1:])
    ended = on_ranks(2, *arguments)
    assert ended.returncode == 0, ended.stderr
    two = json.loads((tmp_path / "r.json").read_text())
    assert ended.stdout.splitlines() == lines and two["ranks"] == 2
    assert two["metrics"]["fid"] == pytest.approx(
        one["metrics"]["fid"], rel=1e-6
    )  # another number of threads may round otherwise
    assert two["metrics"]["accuracy"] == one["metrics"]["accuracy"]


@pytest.mark.long
def test_an_error_of_one_rank_is_one_line(tmp_path):
    pixels, _ = images(24, (1, 28, 28))
    for k, image in enumerate(pixels):
        (tmp_path / f"{k}.png").write_bytes(png(image))
    (tmp_path / "20.png").write_bytes(png(pixels[20])[:100])
    ended = on_ranks(2, "evaluate", tmp_path, "--reference", tmp_path, "--features", "digits", "--batch-size", "8")
    assert ended.returncode != 0 and ended.stdout == ""
    said = [line for line in ended.stderr.splitlines() if line.startswith("fastgen: ")]
    assert len(said) == 1 and said[0].startswith(
        f"fastgen: error: rank 1: {tmp_path}/20.png: not a readable picture"
    ), ended.stderr
    refusal = on_ranks(2, "evaluate", tmp_path / "none", "--reference", tmp_path, "--features", "digits").stderr
    said = [line for line in refusal.splitlines() if line.startswith("fastgen: ")]
    assert said == [f"fastgen: error: {tmp_path}/none: no such folder or file"], refusal
