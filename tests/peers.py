"""The libraries that fastgen is compared with, as tests and benchmarks load them.

`load` returns the peer's own module or raises ImportError; `tests.backends.import_peer` turns that into a skip, or into a failure
where `FASTGEN_REQUIRE` names `peers`. Nothing here needs pytest: benchmarks load their peers here too.
"""

import functools
import importlib
import importlib.util
import sys
import types
from typing import Any

INSTALL = {
    "diffusers": "diffusers is not installed (pip install diffusers)",
    "k_diffusion": "k-diffusion is not installed (pip install --no-deps k-diffusion)",
    "nflows": "nflows is not installed (pip install nflows)",
    "normflows": "normflows is not installed (pip install normflows)",
    "zuko": "zuko is not installed (pip install zuko)",
    "FrEIA": "FrEIA is not installed (pip install FrEIA)",
    "torch_fidelity": "torch-fidelity is not installed (pip install --no-deps torch-fidelity)",
    "sklearn": "scikit-learn is not installed (pip install scikit-learn)",
}


def missing() -> list[str]:
    """A sentence for each peer that is not installed."""
    return [sentence for name, sentence in INSTALL.items() if importlib.util.find_spec(name) is None]


def load(module: str) -> Any:
    """``module`` of a peer, such as ``"diffusers.models.resnet"``.

    Raises:
        ImportError: it is not installed, or does not load.
    """
    if module.startswith("torch_fidelity."):
        return load_torch_fidelity(module)
    return load_k_diffusion() if module == "k_diffusion.sampling" else importlib.import_module(module)


@functools.cache
def load_k_diffusion() -> Any:
    """k_diffusion.sampling alone: the package's ``__init__`` and the imports of training want much else."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(INSTALL["k_diffusion"])
    stubs: dict[str, Any] = {
        name: types.ModuleType(name)
        for name in ("torchdiffeq", "torchsde")
        if name not in sys.modules and importlib.util.find_spec(name) is None
    }
    for stub in stubs.values():
        stub.odeint = None
    package: Any = types.ModuleType("k_diffusion_sampling_only")
    package.__path__ = [spec.submodule_search_locations[0]]
    package.utils = types.ModuleType("k_diffusion_sampling_only.utils")
    package.utils.append_dims = lambda x, n: x.reshape(x.shape + (1,) * (n - x.ndim))
    sys.modules[package.__name__] = package
    sys.modules[f"{package.__name__}.utils"] = package.utils
    path = f"{spec.submodule_search_locations[0]}/sampling.py"
    found = importlib.util.spec_from_file_location(f"{package.__name__}.sampling", path)
    if found is None or found.loader is None:
        raise ImportError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(found)
    sys.modules.update(stubs)
    try:
        found.loader.exec_module(module)
    finally:
        for name in stubs:  # diffusers looks for them too, and a stand-in has no spec
            del sys.modules[name]
    return module


@functools.cache
def load_torch_fidelity(module: str) -> Any:
    """A module of torch-fidelity without the package around it, which wants torchvision; what it takes from utils is left empty."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(INSTALL["torch_fidelity"])
    package: Any = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    utils: Any = types.ModuleType("torch_fidelity.utils")
    utils.__getattr__ = lambda name: None  # readers of data sets and caches, which no metric calls
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torch_fidelity"}
    sys.modules.update({"torch_fidelity": package, "torch_fidelity.utils": utils})
    try:
        return importlib.import_module(module)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
            del sys.modules[name]
        sys.modules.update(before)
