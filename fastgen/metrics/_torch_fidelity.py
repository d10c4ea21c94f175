"""torch-fidelity's Inception v3, without the rest of torch-fidelity and without a download.

The package imports torchvision, which this network does not need, and which is often not there or of another torch. So where it is
missing the one module is imported alone.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

PACKAGE = "torch_fidelity"
MODULE = f"{PACKAGE}.feature_extractor_inceptionv3"
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
HASH = "6726825d"  # the beginning of its SHA-256, which torch.hub's convention puts into the name
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
INSTALL = "pip install --no-deps torch-fidelity"  # with them it would bring a torchvision, and that another torch


def inception(weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """torch-fidelity's ``FeatureExtractorInceptionV3``: [N, 3, H, W] uint8 -> a tuple with [N, 2048], in evaluation mode.

    Args:
        weights: the file of its weights; where None, the one in the folder that torch.hub downloads to.

    Raises:
        ImportError: torch-fidelity is not installed; the message says how to install it.
        ValueError: there are no weights, or the file is another.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise ImportError(f"the features of Inception come from torch-fidelity, which is not installed: {INSTALL}")
    path = Path(weights) if weights is not None else Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{path}: no weights of Inception there, and nothing is downloaded: fetch {URL}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(HASH):  # a pickle, which torch-fidelity executes: it must be that one
        raise ValueError(f"{path}: must be {WEIGHTS}, whose SHA-256 begins with {HASH}, got {found[:8]}: fetch {URL}")
    with _importable():
        network = importlib.import_module(MODULE).FeatureExtractorInceptionV3
    return network("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """torch_fidelity as it is; where its ``__init__`` does not load, a stand-in for it that knows where its modules are."""
    before = {name for name in sys.modules if name.split(".")[0] == PACKAGE}
    try:
        importlib.import_module(PACKAGE)
    except ImportError:
        _forget(before)
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.submodule_search_locations is None:
            raise
        package = types.ModuleType(PACKAGE)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[PACKAGE] = package
        try:
            yield
        finally:
            _forget(before)  # another import shall find the package, or its own error
    else:
        yield


def _forget(kept: set[str]) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE and name not in kept]:
        del sys.modules[name]
