"""Features: of the classifier, of files that get exactly the range they ask for, of Inception; and why there are none."""

import sys

import pytest
import torch
from torch import nn

from fastgen.data import TensorImages
from fastgen.metrics import DigitFeatures, FeatureError, FileNetwork, load_classifier, load_features
from fastgen.metrics import _torch_fidelity as fidelity
from fastgen.metrics.features import RANGES
from fastgen.models import DigitClassifier, find_weights

from ..backends import import_peer
from .networks import Flat, Rows, Statistics, exported, script


def pixels(n=6, shape=(1, 28, 28)):
    return torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_digits_are_what_the_classifier_sees_before_it_decides():
    features = load_features("digits")
    found = features(pixels())
    assert found.shape == (6, 576) and found.dtype == torch.float32
    model = DigitClassifier.load(find_weights("mnist-classifier"), dtype=torch.float32)
    expected = model(pixels().float() / 127.5 - 1)
    torch.testing.assert_close(features.linear(found), expected, rtol=0, atol=1e-5)
    for classifier in (
        load_classifier(features=features),
        load_classifier(),
        load_classifier(str(find_weights("mnist-classifier"))),
    ):
        torch.testing.assert_close(classifier(pixels()), expected, rtol=0, atol=1e-5)
    assert load_classifier(features=features).features is features
    assert (features.name, load_classifier().name) == ("digits", "mnist-classifier")


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (1, 32, 32)])
def test_images_that_are_no_digits_of_28_are_refused_and_not_resized(shape):
    images = TensorImages("mine", pixels(2, shape))
    for network in (DigitFeatures(), load_classifier()):
        with pytest.raises(
            FeatureError, match=f"mine: .* takes images of 1 x 28 x 28, got {' x '.join(map(str, shape))}"
        ):
            network.check(images)


@pytest.mark.parametrize("kind", ["script", "export"])
@pytest.mark.parametrize("value_range", RANGES)
def test_a_file_gets_the_range_it_asks_for(tmp_path, kind, value_range):
    images = pixels(5, (3, 4, 4))
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 0, 255
    example = RANGES[value_range](images)
    if kind == "script":
        path = script(tmp_path / "net.pt", Statistics())
    else:
        path = exported(tmp_path / "net.pt2", Statistics(), example)
    network = FileNetwork(path, value_range)
    found = network(images)
    low, high = {"uint8": (0, 255), "float255": (0, 255), "unit": (0, 1), "signed": (-1, 1)}[value_range]
    assert found.shape == (5, 4) and found.dtype == torch.float32
    assert found[0, :2].tolist() == [low, high]
    assert found[:, 3].tolist() == [float(value_range == "uint8")] * 5
    torch.testing.assert_close(found[:, 2], images.float().flatten(1).mean(1) / 255 * (high - low) + low)
    assert len(network(images[:2])) == 2
    assert network.name.startswith("net.pt") and network.name.endswith(f", {value_range}")


def test_two_networks_of_one_name_are_told_apart(tmp_path):
    names = set()
    for k, network in enumerate((Flat(), Statistics())):
        (tmp_path / str(k)).mkdir()
        names.add(FileNetwork(script(tmp_path / str(k) / "net.pt", network)).name)
    assert len(names) == 2


def test_a_file_that_is_no_network(tmp_path):
    for name, kind in (("net.pt", "TorchScript"), ("net.pt2", "a program of torch.export")):
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file of a network"):
            load_features(str(tmp_path / name))
        for content in (b"", b"nothing of the kind", b"PK\x03\x04" + bytes(100)):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(FeatureError, match=f"{name}: cannot be loaded as {kind}") as caught:
                load_features(str(tmp_path / name))
            assert "\n" not in str(caught.value)
    with pytest.raises(FeatureError, match="value_range must be one of uint8, float255, unit, signed, got 'bytes'"):
        FileNetwork(tmp_path / "net.pt", "bytes")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("maps", r"must return \[N, D\] of images \[6, 1, 4, 4\] torch.uint8, got a tensor \[6, 1, 4, 4\]"),
        ("integers", "must return floating-point numbers an image, got 16 of torch.int64"),
        ("one row", r"must return \[N, D\] of .*, got a tensor \[1, 16\]"),
    ],
)
def test_what_a_file_returns_is_looked_at(tmp_path, kind, message):
    network = FileNetwork(script(tmp_path / "net.pt", Rows(kind)))
    with pytest.raises(FeatureError, match=f"net.pt: {message}"):
        network(pixels(6, (1, 4, 4)))


def test_the_number_of_features_may_not_change(tmp_path):
    network = FileNetwork(script(tmp_path / "net.pt", Rows("as many")))
    images = pixels(6, (1, 4, 4))
    images[0, 0, 0, 0] = 5
    assert network(images).shape == (6, 5)
    images[0, 0, 0, 0] = 6
    with pytest.raises(FeatureError, match="must return 5 floating-point numbers an image, got 6"):
        network(images)


def test_a_network_that_fails_says_so_in_one_line(tmp_path):
    network = FileNetwork(script(tmp_path / "net.pt", Flat(nn.Linear(3, 2))), "unit")
    with pytest.raises(FeatureError, match=r"net.pt: fails on images \[6, 1, 4, 4\] torch.float32: .*mat1") as caught:
        network(pixels(6, (1, 4, 4)))
    assert "\n" not in str(caught.value)
    fixed = FileNetwork(exported(tmp_path / "net.pt2", Flat(), pixels(6, (1, 4, 4)), dynamic=False))
    assert fixed(pixels(6, (1, 4, 4))).shape == (6, 16)
    with pytest.raises(FeatureError, match=r"net.pt2: fails on images \[5, 1, 4, 4\] torch.uint8"):
        fixed(pixels(5, (1, 4, 4)))


# Inception


def test_without_torch_fidelity_the_way_to_it_is_said(monkeypatch):
    monkeypatch.setattr(fidelity.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FeatureError, match="not installed: pip install --no-deps torch-fidelity"):
        load_features("inception")


def test_nothing_is_downloaded_and_nothing_else_is_loaded(monkeypatch, tmp_path):
    import_peer("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    with pytest.raises(
        FeatureError, match=f"{fidelity.WEIGHTS}: no weights of Inception there, and nothing is downloaded"
    ):
        load_features("inception")
    (tmp_path / "w.pth").write_bytes(b"a pickle of somebody's")
    with pytest.raises(FeatureError, match="whose SHA-256 begins with 6726825d, got "):
        load_features("inception", inception_weights=tmp_path / "w.pth")


@pytest.mark.long
def test_inception_is_that_of_torch_fidelity(monkeypatch, tmp_path):
    """With made-up weights: the published ones are not here."""
    module = import_peer("torch_fidelity.feature_extractor_inceptionv3")
    network = module.FeatureExtractorInceptionV3
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **options: {})
        patch.setattr(network, "load_state_dict", lambda self, state: None)
        theirs = network("inception-v3-compat", ["2048"])
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    monkeypatch.setattr(fidelity, "HASH", "")
    features = load_features("inception", inception_weights=tmp_path / "w.pth")
    grey, colour = pixels(2), pixels(2, (3, 20, 30))
    with torch.inference_mode():
        assert torch.equal(features(colour), theirs(colour)[0]) and features(colour).shape == (2, 2048)
        assert torch.equal(features(grey), theirs(grey.repeat(1, 3, 1, 1))[0])
    features.check(TensorImages("grey", grey))
    with pytest.raises(FeatureError, match="takes images of 1 or 3 channels, got 2"):
        features.check(TensorImages("two", pixels(2, (2, 8, 8))))
    assert not [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]  # no stand-in is left
