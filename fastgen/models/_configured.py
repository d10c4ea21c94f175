"""`Configured`: what models have in common: a config that JSON holds, files, and other projects' names for their weights."""

import inspect
import json
import os
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .checkpoint import load_model, save_model


class Configured(nn.Module):
    """A model whose constructor takes what its config says.

    Args:
        config: the arguments of the class's constructor, ready for JSON.

    State dicts of the projects that a class names load as they are: ``foreign_keys`` translates them,
    :meth:`from_state_dict` finds the config too.
    """

    # Regular expressions, and our names for what they match; "" drops it.
    foreign_keys: ClassVar[tuple[tuple[str, str], ...]] = ()
    # Arguments of the constructor that are code, not config.
    beside_config: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._config = dict(config)
        self.register_load_state_dict_pre_hook(_adopt)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON and for :meth:`from_config`."""
        return json.loads(json.dumps(self._config))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **beside: Any) -> Self:
        """Build a model with fresh weights from :attr:`config`, and what the constructor takes beside it.

        Raises:
            ValueError: ``config`` has a key that the model does not know, or a value out of range.
        """
        known = [name for name in _arguments(cls) if name not in cls.beside_config]
        unknown = sorted(set(config) - set(known))
        if unknown:
            raise ValueError(f"{cls.__name__}.from_config: unknown keys {unknown}; the known ones are {known}")
        return cls(**config, **beside)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], **options: Any) -> Self:
        """The model whose weights these are, a peer's or our own, in evaluation mode, in their dtype and on their device.

        Args:
            state: weights by name, whose shapes say the sizes.
            options: arguments of the constructor that shapes do not say, or say wrongly.

        Raises:
            ValueError: the names are not those of such a model.
            RuntimeError: weights and options do not fit each other, as ``load_state_dict`` says it.
        """
        own = {cls.translated(name): tensor for name, tensor in state.items()}
        beside = {name: options.pop(name) for name in cls.beside_config if name in options}
        try:
            config = cls._config_of(own) | options
        except (KeyError, IndexError) as error:
            raise ValueError(f"{cls.__name__}.from_state_dict: not the weights of such a model: no {error}") from error
        first = next(x for x in state.values() if x.is_floating_point())
        with torch.device("meta"):  # no time for random weights that nobody sees
            model = cls.from_config(config, **beside)
        model = model.to(first.dtype).to_empty(device=first.device)
        model.load_state_dict(state)
        return model.eval()

    @classmethod
    def _config_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the shapes of weights, under our names, say of the config. Raises KeyError for a missing weight."""
        raise NotImplementedError

    @classmethod
    def translated(cls, name: str) -> str:
        """Our name of a weight that another project calls ``name``, "" for what we have no use for; others are as they were."""
        name = name.removeprefix("module.")  # of DataParallel
        for pattern, ours in cls.foreign_keys:
            match = re.fullmatch(pattern, name)
            if match is not None:
                return match.expand(ours)
        return name

    def adopted(self, name: str, ours: str, tensor: Tensor, shape: torch.Size | None) -> Tensor:
        """What another project calls ``name`` as our weight has it, whose shape is ``shape``; None where we have no such weight."""
        return tensor

    def adopted_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``state``, another project's or our own, by our names and in our shapes."""
        shapes = {name: tensor.shape for name, tensor in self.state_dict().items()}
        named = [(name, self.translated(name), tensor) for name, tensor in state.items()]
        return {ours: self.adopted(name, ours, tensor, shapes.get(ours)) for name, ours, tensor in named if ours}

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write weights, and the config as JSON in the metadata, to a safetensors file, atomically.

        Args:
            path: the file.
            metadata: further strings to keep in the header (how it was trained, say).
        """
        save_model(path, self, type(self).__name__, self._config, metadata)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        **beside: Any,
    ) -> Self:
        """Read what :meth:`save` wrote: the model in evaluation mode on ``device``, in ``dtype`` or else that of the file.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the file is damaged, is of another model, does not fit its own config, or its weights are not finite.
        """
        return load_model(
            path, cls.__name__, lambda config: cls.from_config(config, **beside), device=device, dtype=dtype
        )


def _arguments(cls: type) -> list[str]:
    """Of the constructor; of that above it too, where it hands on what it does not name."""
    names: list[str] = []
    for base in (base for base in cls.__mro__ if "__init__" in vars(base)):
        parameters = list(inspect.signature(base).parameters.values())
        names += [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in names]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbers the one group of ``pattern`` takes at the beginning of the names."""
    return len({match[1] for match in (re.match(pattern, name) for name in state) if match})


def check_positive(name: str, config: Mapping[str, Any], *keys: str, optional: bool = False) -> None:
    """Raise ValueError for a value that is no positive integer (nor None, where that is an option)."""
    for key in keys:
        value = config[key]
        if optional and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            wanted = "None or a positive integer" if optional else "a positive integer"
            raise ValueError(f"{name}: {key} must be {wanted}, got {value!r}")


def _adopt(module: Configured, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Before ``load_state_dict``: our names for those of another project, and our shapes."""
    given = {key[len(prefix) :]: state.pop(key) for key in [key for key in state if key.startswith(prefix)]}
    state.update({prefix + ours: tensor for ours, tensor in module.adopted_state(given).items()})
