"""Features of images, what the metrics here compare: those of Inception, of the shipped digit classifier, or of a user's network.

The numbers of one kind of features say nothing beside those of another, so each says what it is and results carry it.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.image_sets import ImageSet
from ..models import DigitClassifier, find_weights
from ._torch_fidelity import inception

DIGITS = "digits"
INCEPTION = "inception"
JUDGE = "mnist-classifier"  # the shipped weights whose features DIGITS are

RANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "uint8": lambda images: images,
    "float255": lambda images: images.float(),
    "unit": lambda images: images.float().div_(255),
    "signed": lambda images: images.float().div_(127.5).sub_(1),
}


class FeatureError(ValueError):
    """Features cannot be had: of these images, or from this file; the message says why."""


class Network(ABC):
    """Images [N, C, H, W] uint8 -> numbers [N, D] float32: features, or the logits of classes.

    Attributes:
        name: what results call it; two of the same name give the same numbers.
        text: what it is, for a person.
    """

    name: str
    text: str

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Raises FeatureError where the network does not take ``images``."""

    def check(self, images: ImageSet) -> None:  # noqa: B027  (most take any)
        """Raise FeatureError, naming the set, where the network does not take its images."""


class DigitFeatures(Network):
    """What the classifier of digits sees before it decides: the 576 inputs of its linear layer.

    Of images of 1 x 28 x 28 alone. Smaller digits, those of 8 x 8 among them, are refused rather than enlarged: the classifier has
    never seen any, and what it would make of them is no measure.

    Args:
        weights: a file of :class:`~fastgen.models.DigitClassifier`, or shipped weights by name.
        device: where it runs.
    """

    shape = (1, 28, 28)

    def __init__(self, weights: str | os.PathLike[str] = JUDGE, *, device: torch.device | str = "cpu") -> None:
        path = find_weights(weights)
        self._device = device
        self._model = DigitClassifier.load(path, dtype=torch.float32).to(device)
        self.linear, self._model.linear = self._model.linear, nn.Identity()  # type: ignore[assignment]
        shipped = str(weights) == JUDGE
        self.name = DIGITS if shipped else f"{DIGITS}, {_named(path)}"
        self.text = f"the {self.linear.in_features} inputs of the linear layer of {JUDGE if shipped else path}"

    def __call__(self, images: Tensor) -> Tensor:
        return self._model(RANGES["signed"](images.to(self._device)))

    def check(self, images: ImageSet) -> None:
        if images.shape != self.shape:
            raise FeatureError(
                f"{images.name}: the digit classifier takes images of {_times(self.shape)}, got {_times(images.shape)}"
            )


class DigitClasses(Network):
    """The logits of the ten digits. Where ``features`` are computed for the same images already, the linear layer is left to do."""

    def __init__(self, features: DigitFeatures, weights: str | os.PathLike[str] = JUDGE) -> None:
        self.features = features
        self.name = self.text = JUDGE if str(weights) == JUDGE else _named(Path(weights))

    def __call__(self, images: Tensor) -> Tensor:
        return self.of_features(self.features(images))

    def of_features(self, features: Tensor) -> Tensor:
        return self.features.linear(features)

    def check(self, images: ImageSet) -> None:
        self.features.check(images)


class FileNetwork(Network):
    """A network that the user has exported: TorchScript, or a program of torch.export where the name ends in ``.pt2``.

    Loading such a file executes what its author put into it.

    Args:
        path: the file. Its network takes images [N, C, H, W], C as in the set, and returns [N, D] of floating-point numbers.
        value_range: what it takes: ``uint8``, 0 to 255, or float32, ``float255``, ``unit``, 0 to 1, or ``signed``, -1 to 1.
        device: where it runs.

    Raises:
        FileNotFoundError: there is no such file.
        FeatureError: it cannot be loaded.
    """

    def __init__(
        self, path: str | os.PathLike[str], value_range: str = "uint8", *, device: torch.device | str = "cpu"
    ) -> None:
        if value_range not in RANGES:
            raise FeatureError(f"value_range must be one of {', '.join(RANGES)}, got {value_range!r}")
        self._path, self._device, self._dim = Path(path), device, 0
        self._prepare = RANGES[value_range]
        if not self._path.is_file():
            raise FileNotFoundError(f"{path}: no such file of a network")
        self.name = f"{_named(self._path)}, {value_range}"
        self.text = f"of the network in {path}, which gets {value_range}"
        try:
            self._network = self._load()
        except Exception as error:  # whatever is in the file, and whatever it does
            raise FeatureError(f"{path}: cannot be loaded as {self._kind}: {last_line(error)}") from error

    def __call__(self, images: Tensor) -> Tensor:
        batch = self._prepare(images.to(self._device))
        said = f"images {list(batch.shape)} {batch.dtype}"
        try:
            found = self._network(batch)
        except Exception as error:
            raise FeatureError(f"{self._path}: fails on {said}: {last_line(error)}") from error
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(images):
            got = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise FeatureError(f"{self._path}: must return [N, D] of {said}, got {got}")
        if not found.is_floating_point() or self._dim not in (0, found.shape[1]):
            wanted = f"{self._dim} floating-point" if self._dim else "floating-point"
            raise FeatureError(
                f"{self._path}: must return {wanted} numbers an image, got {found.shape[1]} of {found.dtype}"
            )
        self._dim = found.shape[1]
        return found.float()

    @property
    def _kind(self) -> str:
        return "a program of torch.export" if self._path.suffix == ".pt2" else "TorchScript"

    def _load(self) -> Any:
        if self._path.suffix == ".pt2":
            return torch.export.load(self._path).module().to(self._device)
        return torch.jit.load(self._path, map_location=self._device).eval()


class InceptionFeatures(Network):
    """The 2,048 features of Inception v3 that published FIDs are of, by torch-fidelity: its network, its weights, its resizing.

    Args:
        weights: the file of the weights; where None, torch.hub's folder is looked into, and nothing is downloaded.
        device: where it runs.

    Raises:
        FeatureError: torch-fidelity is not installed, or there are no such weights.
    """

    def __init__(self, weights: str | os.PathLike[str] | None = None, *, device: torch.device | str = "cpu") -> None:
        try:
            self._network = inception(weights).to(device)
        except (ImportError, ValueError) as error:
            raise FeatureError(str(error)) from error
        self._device = device
        self.name = INCEPTION
        self.text = "the 2,048 of Inception v3 (2015-12-05) by torch-fidelity"

    def __call__(self, images: Tensor) -> Tensor:
        colour = images.to(self._device).expand(-1, 3, -1, -1)  # grey is three channels alike
        return self._network(colour.contiguous())[0]

    def check(self, images: ImageSet) -> None:
        if images.shape[0] not in (1, 3):
            raise FeatureError(f"{images.name}: Inception takes images of 1 or 3 channels, got {images.shape[0]}")


def load_features(
    name: str,
    *,
    value_range: str = "uint8",
    inception_weights: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
) -> Network:
    """``inception``, ``digits``, or those of the network in a file. Raises FeatureError or FileNotFoundError as the classes do."""
    if name == INCEPTION:
        return InceptionFeatures(inception_weights, device=device)
    return DigitFeatures(device=device) if name == DIGITS else FileNetwork(name, value_range, device=device)


def load_classifier(
    name: str = JUDGE,
    features: Network | None = None,
    *,
    value_range: str = "uint8",
    device: torch.device | str = "cpu",
) -> Network:
    """A classifier: ``mnist-classifier``, a safetensors file of another :class:`~fastgen.models.DigitClassifier`, or any network.

    Args:
        name: shipped weights or a file.
        features: those that are computed anyway, shared where they are those of the shipped classifier.
        value_range: what a network of the user's takes, as of :class:`FileNetwork`.
        device: where it runs.

    Raises:
        FileNotFoundError, FeatureError, fastgen.models.CheckpointError: the file is missing or does not load.
    """
    if name == JUDGE and isinstance(features, DigitFeatures):
        return DigitClasses(features)
    if name == JUDGE or name.endswith(".safetensors"):
        return DigitClasses(DigitFeatures(name, device=device), name)
    return FileNetwork(name, value_range, device=device)


def last_line(error: BaseException) -> str:
    """The end of what an error of torch says, which is where the reason is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _named(path: Path) -> str:
    """The name of a file with the beginning of its SHA-256: two networks of one name are told apart."""
    with path.open("rb") as file:
        return f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
