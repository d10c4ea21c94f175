"""Saving and loading a `UNet`: what comes back, what a crash leaves, and what a bad file says."""

import json
import os

import pytest
import torch

from fastgen.models import CheckpointError, UNet, checkpoint, load_state, read_metadata, save_state
from fastgen.nn import PlainGroupNorm

from ..modules import randomize

OPTIONS = {"channel_mult": [1, 2], "num_res_blocks": 1, "num_groups": 4, "num_classes": 3}


@pytest.fixture
def model():
    return randomize(UNet(1, 16, **OPTIONS)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(model, tmp_path, dtype):
    model.to(dtype)
    path = tmp_path / "new" / "unet.safetensors"
    model.save(path, {"training": "by hand"})
    twin = UNet.load(path)
    assert twin.config == model.config and not twin.training
    assert all(p.requires_grad for p in twin.parameters())
    for (name, ours), (twin_name, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert name == twin_name and torch.equal(ours, theirs) and ours.dtype == theirs.dtype == dtype
    assert read_metadata(path)["training"] == "by hand"
    assert json.loads(read_metadata(path)["config"]) == model.config
    plain = UNet.load(path, norm=PlainGroupNorm)
    assert type(plain.out_norm) is PlainGroupNorm


def test_channels_last_weights_come_back(model, tmp_path):
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(memory_format=torch.channels_last).save(tmp_path / "unet.safetensors")
    state, _ = load_state(tmp_path / "unet.safetensors")
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_failed_write_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "unet.safetensors"
    model.save(path)
    before = path.read_bytes()

    def half(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        model.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_it_waits_for_the_disk(model, tmp_path, monkeypatch):
    forced = []
    monkeypatch.setattr(os, "fsync", lambda handle: forced.append(os.readlink(f"/proc/self/fd/{handle}")))
    model.save(tmp_path / "unet.safetensors")
    file, folder = forced
    assert file.endswith(".tmp/unet.safetensors") and folder == str(tmp_path)


def test_the_file_has_the_usual_permissions(model, tmp_path):
    model.save(tmp_path / "unet.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "unet.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: no such checkpoint file"):
        UNet.load(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: no such checkpoint file"):
        read_metadata(tmp_path / "none.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_a_cut_file(model, tmp_path, keep):
    path = tmp_path / "unet.safetensors"
    model.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"unet\.safetensors: not a readable safetensors file"):
        UNet.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": None}, r"no 'config' in the metadata \(found: format, model\)"),
        ({"config": "{"}, r"'config' in the metadata is not JSON"),
        ({"config": "[" * 100_000}, r"'config' in the metadata is not JSON"),
        ({"config": "[]"}, r"'config' in the metadata must be a JSON object, got list"),
        ({"config": '{"depth": 3}'}, r"the config in the metadata is not valid: .*unknown keys \['depth'\]"),
        ({"config": '{"model_channels": "x"}'}, r"the config in the metadata is not valid: .*model_channels must be"),
        ({"config": '{"num_groups": 4}'}, r"the weights do not fit the config: (.|\n)*Missing key"),
        ({"model": "PixelCNN"}, r"the file holds a PixelCNN, not a UNet"),
    ],
)
def test_bad_metadata(model, tmp_path, change, message):
    path = tmp_path / "unet.safetensors"
    metadata = {"model": "UNet", "config": json.dumps(model.config), **change}
    save_state(path, model.state_dict(), {key: value for key, value in metadata.items() if value is not None})
    with pytest.raises(CheckpointError, match=rf"unet\.safetensors: {message}"):
        UNet.load(path)
