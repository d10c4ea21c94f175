"""One binary for every torch >= 2.11: the stable ABI, no symbol of Python, and no word of the machine that built it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fastgen
from fastgen import _library

from ..backends import requires_cpu

PACKAGE = Path(fastgen.__file__).parent
LIBRARIES = sorted((PACKAGE / "lib").glob("libfastgen_*.so"))

# The C interface of the stable ABI as torch 2.11 has it (its stable headers call these), and the system's own libraries.
STABLE = {
    "aoti_torch_abi_version", "aoti_torch_aten_narrow",
    "aoti_torch_call_dispatcher", "aoti_torch_copy_", "aoti_torch_delete_library_object", "aoti_torch_delete_tensor_object",
    "aoti_torch_device_type_cpu", "aoti_torch_device_type_cuda", "aoti_torch_dtype_bfloat16", "aoti_torch_dtype_float16",
    "aoti_torch_dtype_float32", "aoti_torch_dtype_float64", "aoti_torch_dtype_int64", "aoti_torch_empty_strided",
    "aoti_torch_get_current_stream", "aoti_torch_get_data_ptr", "aoti_torch_get_device_index", "aoti_torch_get_device_type",
    "aoti_torch_get_dim", "aoti_torch_get_dtype", "aoti_torch_get_numel", "aoti_torch_get_size", "aoti_torch_get_sizes",
    "aoti_torch_get_stride", "aoti_torch_get_strides", "aoti_torch_is_contiguous", "aoti_torch_library_init_impl",
    "aoti_torch_new_uninitialized_tensor",
    "aoti_torch_new_tensor_handle", "torch_call_dispatcher", "torch_delete_list", "torch_delete_string",
    "torch_get_const_data_ptr", "torch_get_mutable_data_ptr", "torch_get_num_threads", "torch_library_impl",
    "torch_list_get_item", "torch_list_push_back", "torch_list_set_item", "torch_list_size", "torch_new_list_reserve_size",
    "torch_parallel_for",
}  # fmt: skip
DTYPES = re.compile(r"(aoti_)?torch_dtype_\w+")
SYSTEM = re.compile(r"@+(GLIBC|GLIBCXX|CXXABI|GCC)_")  # nm prints the version of what libc, libstdc++ and libgcc give
WEAK = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__cxa_finalize"}


def undefined(library: Path) -> list[str]:
    """What the library takes from others, without what the system's own libraries give."""
    lines = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-1] for line in lines.splitlines()]
    return [symbol for symbol in symbols if not SYSTEM.search(symbol) and symbol not in WEAK]


@requires_cpu
def test_there_are_libraries_and_nm():
    assert f"libfastgen_{_library.ISA}.so" in [path.name for path in LIBRARIES]
    assert shutil.which("nm") is not None


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_undefined_symbols_are_of_the_stable_abi(library):
    symbols = undefined(library)
    assert "torch_library_impl" in symbols
    assert [s for s in symbols if s not in STABLE and not DTYPES.fullmatch(s)] == []


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_no_cpp_is_exported(library):
    """Variants share inline functions by name: an exported one could be taken by another variant, and trap."""
    lines = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    exported = {line.split()[-1] for line in lines.splitlines() if line.strip()}
    assert exported <= {"fastgen_sampler_step"}  # which is C, and looked up in the one library that is loaded


@pytest.mark.parametrize("library", [*LIBRARIES, *sorted(PACKAGE.glob("_cpu*.so"))], ids=lambda path: path.name)
def test_no_path_of_the_machine_that_built_it(library):
    """Sources and headers are named from the roots of their trees: csrc/cpu/q_sample.cpp, torch/csrc/stable/library.h."""
    found = re.findall(rb"[\w./+-]*\.(?:cpp|cu|cuh|h|hpp)\b", library.read_bytes())
    named = {path.decode() for path in found if b"/" in path}
    assert any(path.startswith(("csrc/", "pybind11/")) for path in named)
    assert sorted(path for path in named if path.startswith("/")) == []
    for root in (PACKAGE.parent, Path(torch.__file__).parent.parent):
        assert str(root).encode() not in library.read_bytes()
