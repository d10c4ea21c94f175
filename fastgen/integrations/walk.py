"""What there is in a model or a pipeline, by name, and which stand-in each module could have."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from . import (
    compressai,
    conditioners,
    denoising_diffusion,
    diffusers,
    freia,
    generic,
    guided_diffusion,
    imagen,
    k_diffusion,
    latent_diffusion,
    lightning_tutorial,
    make_a_video,
    nflows,
    normflows,
    pixel_cnn_pp,
    pytorch_generative,
    zuko,
)
from .forwards import Forward
from .stand_in import StandIn, base_of, mixin_of, refusals, resembles, unfit

# By the name of the class that each stands in for. More than one project may have a class of a name.
STAND_INS: dict[str, list[type[StandIn]]] = {}


def register(*mixins: type[StandIn]) -> None:
    """Have `accelerate` know these too, and before those that it knows of the same name.

    Raises:
        TypeError: one is no subclass of :class:`StandIn`, or does not say what it stands in for and what it does.
    """
    for mixin in mixins:
        if not (isinstance(mixin, type) and issubclass(mixin, StandIn)):
            raise TypeError(f"a stand-in must be a subclass of StandIn, got {mixin!r}")
        if missing := [name for name in ("of", "project", "does") if not isinstance(getattr(mixin, name, None), str)]:
            raise TypeError(f"{mixin.__name__} must say {', '.join(missing)}")
        known = STAND_INS.setdefault(mixin.of, [])
        if mixin not in known:
            known.insert(0, mixin)


for _project in (
    generic, diffusers, guided_diffusion, latent_diffusion, denoising_diffusion, k_diffusion, imagen, make_a_video,
    pytorch_generative, pixel_cnn_pp, lightning_tutorial, compressai, nflows, normflows, zuko, freia, conditioners,
):  # fmt: skip
    register(*_project.STAND_INS)


def parts(model: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a pipeline with their names, or the model itself under the name ``""``.

    Raises:
        TypeError: it is neither a module nor something with ``components``.
    """
    if isinstance(model, nn.Module):
        yield "", model
        return
    components = getattr(model, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"model must be a torch.nn.Module or a pipeline with components, got {type(model).__name__}")
    yield from components.items()


def modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a model or a pipeline, once, with its name, its children before itself."""
    for prefix, part in parts(model):
        if isinstance(part, nn.Module):
            for name, module in reversed(list(part.named_modules())):
                yield ".".join(filter(None, (prefix, name))), module


def stand_in_for(module: nn.Module) -> tuple[type[StandIn] | None, list[str]]:
    """The stand-in that a module has or can have; or None and, where one comes near, why it cannot."""
    if (mixin := mixin_of(module)) is not None:
        return mixin, []
    near: list[str] = []
    for cls in type(module).__mro__:
        if cls.__module__.partition(".")[0] == "fastgen":
            return None, []  # one of ours
        for mixin in STAND_INS.get(cls.__name__, ()):
            if base_of(type(module), mixin) is not cls or not mixin.concerns(module):
                continue
            why = refusals(mixin, module)
            if not why:
                return mixin, []
            near += [sentence for sentence in why if sentence not in near and resembles(mixin, module)]
    if Forward.concerns(module):
        why = unfit(Forward, module)
        if not why:
            return Forward, []
        near += [sentence for sentence in why if sentence not in near]
    return None, near
