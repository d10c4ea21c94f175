"""`DigitClassifier`: its form, its file, and the shipped weights."""

import hashlib

import pytest
import torch

from fastgen.models import CheckpointError, DigitClassifier, UNet, find_weights

SHIPPED = find_weights("mnist-classifier")


def test_logits_and_what_is_read():
    torch.manual_seed(0)
    model = DigitClassifier(4).eval()
    images = torch.randn(7, 1, 28, 28)
    logits = model(images.clamp(-1, 1))
    assert logits.shape == (7, 10)
    assert torch.equal(model.read(images, batch_size=3), logits.argmax(1))
    with pytest.raises(ValueError, match=r"x must be \[N, 1, 28, 28\], got shape \(7, 1, 8, 8\)"):
        model(torch.zeros(7, 1, 8, 8))


def test_a_file_and_back(tmp_path):
    model = DigitClassifier(4, dropout=0.5).eval()
    model.save(tmp_path / "c.safetensors", {"note": "x"})
    other = DigitClassifier.load(tmp_path / "c.safetensors")
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(other(x), model(x)) and other.dropout.p == 0.5 and not other.training
    assert DigitClassifier.load(tmp_path / "c.safetensors", dtype=torch.float64).linear.weight.dtype == torch.float64


def test_a_file_of_another_model(tmp_path):
    with pytest.raises(CheckpointError, match="the file holds a UNet, not a DigitClassifier"):
        DigitClassifier.load(find_weights("digits-ddpm"))
    with pytest.raises(CheckpointError, match="the file holds a DigitClassifier, not a UNet"):
        UNet.load(SHIPPED)


def test_size_and_papers():
    assert SHIPPED.stat().st_size <= 200_000
    papers = SHIPPED.with_suffix(".md").read_text()
    assert hashlib.sha256(SHIPPED.read_bytes()).hexdigest() in papers
    assert DigitClassifier.load(SHIPPED).linear.weight.dtype == torch.float16


def test_noise_and_paper_are_no_digit_in_particular():
    """Not a judge that says yes to everything: of noise it reads a tenth as asked."""
    model = DigitClassifier.load(SHIPPED, dtype=torch.float32)
    noise = torch.randn(500, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert (model.read(noise) == torch.arange(500) % 10).double().mean() < 0.3
