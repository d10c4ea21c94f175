"""The trained weights that come with the package, by name: `fastgen/weights/NAME.safetensors`, with its papers in `NAME.md`."""

import os
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "weights"
SHIPPED = tuple(sorted(path.stem for path in FOLDER.glob("*.safetensors")))


def find_weights(name: str | os.PathLike[str]) -> Path:
    """The file of shipped weights for one of the names :data:`SHIPPED`; anything else is a path and comes back as one.

    Raises:
        FileNotFoundError: it is neither such a name nor a file.
    """
    if str(name) in SHIPPED:
        return FOLDER / f"{name}.safetensors"
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such checkpoint file (and no weights of the package: {', '.join(SHIPPED) or 'it has none'})"
        )
    return path
