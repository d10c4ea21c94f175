"""The configuration of a scheduler: a read-only mapping with attributes, saved and loaded as diffusers does."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG_NAME = "scheduler_config.json"


class Config(dict[str, Any]):
    """A scheduler's arguments by name, also as attributes; it cannot be changed."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the configuration has no {name!r}, it has {sorted(self)}") from None

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a configuration cannot be changed: make a scheduler with other arguments")

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = _refuse
    pop = popitem = clear = setdefault = update = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return Config, (dict(self),)


def save(config: Mapping[str, Any], directory: str | os.PathLike[str], class_name: str) -> None:
    """Write ``scheduler_config.json`` into ``directory``, which is made where it is not there; whole or not at all."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: _plain(value) for name, value in config.items() if not name.startswith("_")}
    text = json.dumps({"_class_name": class_name, **values}, indent=2, sort_keys=True) + "\n"
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=CONFIG_NAME, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, folder / CONFIG_NAME)


def load(directory: str | os.PathLike[str], subfolder: str | None = None) -> dict[str, Any]:
    """Read what `save`, or diffusers, has written.

    Raises:
        FileNotFoundError: there is no such file; names of the hub are not looked up here.
    """
    folder = Path(directory) / subfolder if subfolder else Path(directory)
    path = folder if folder.is_file() else folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: from_pretrained takes a folder on this machine; for a name of the hub, load the scheduler "
            "with diffusers and give it to fastgen.samplers.from_diffusers"
        )
    with path.open(encoding="utf-8") as file:
        return dict(json.load(file))


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if callable(value):
        raise TypeError(f"a configuration with the function {value!r} cannot be saved")
    return value
