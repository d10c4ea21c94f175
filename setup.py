"""Builds the compiled libraries with ninja; everything declarative is in pyproject.toml.

`build_ext` writes one `build.ninja` and runs it: an op library for every instruction set variant (LibTorch stable ABI, no
Python symbol, so one build serves every torch >= 2.11), the CUDA library where asked for, and a small pybind11 module with
CPU detection. Environment: `FASTGEN_ISA_BUILD=avx512,avx2` restricts the variants of a developer's build; `FASTGEN_CUDA=1`
or `0` builds the CUDA library or not (default: if nvcc is found and torch is a CUDA build); `FASTGEN_CUDA_ARCHS=80;90;100`.
"""

import functools
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from setuptools import Distribution, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
CPU_SOURCES = sorted(ROOT.glob("csrc/cpu/*.cpp"))
CUDA_SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))

PRECOMPILED = ROOT / "csrc/common/precompiled.h"

# The oldest torch whose stable ABI the op libraries may use: 2.11, as major << 56 | minor << 48.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", *AVX512],
    "avx512_bf16": ["-mavx2", "-mfma", "-mf16c", *AVX512, "-mavx512bf16"],
    "amx": ["-mavx2", "-mfma", "-mf16c", *AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
# The sources with kernels over matrix tiles (csrc/common/simd/matrix_tiles.h). No compiler makes such code by itself, so that of
# the others is that of avx512_bf16, and the variant amx takes their objects.
TILED = ("attention", "attention_bwd", "conv2d", "geglu", "upsample_conv2d")
# The sources that store no bfloat16 and multiply none, for which alone avx512_bf16 has instructions: it takes their objects from
# avx512. The compiler refuses one that does (csrc/common/shared.h).
SHARED = (
    "_masked_network", "_product", "actnorm_statistics", "categorical_sample", "causal_transformer_inverse", "group_norm_affine",
    "incremental", "incremental_program", "invertible_conv1x1_log_det", "logistic_mixture_sample", "masked_conv2d_bwd",
    "philox_normal", "squeeze",
)  # fmt: skip
# KiB of memory that gcc fills before it looks for garbage, a tenth of its time; most sources need less.
COMPILER_HEAP = 2**19
if platform.machine() not in ("x86_64", "AMD64"):
    ISA_FLAGS = {"portable": []}


def fail(message: str) -> NoReturn:
    """One clear line on what to install, and no traceback below it."""
    sys.exit(f"fastgen: cannot build: {message}")


def torch_root() -> Path:
    spec = importlib.util.find_spec("torch")  # found, not imported: an import costs two seconds at every start
    if spec is None or spec.origin is None:
        fail("torch is not installed in this environment (pip install torch, then pip install --no-build-isolation .)")
    return Path(spec.origin).parent


def torch_is_cuda_build() -> bool:
    return 'cuda: Optional[str] = "' in (torch_root() / "version.py").read_text().replace("'", '"')


def find_compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        fail("no C++ compiler on PATH (Debian/Ubuntu: apt-get install g++)")
    return compiler


@functools.cache
def is_gcc(compiler: str) -> bool:
    """Whether the compiler takes gcc's parameters, and precompiled headers as gcc finds them."""
    version = subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True, check=False).stdout
    return "Free Software Foundation" in version


def optimization(isa: str) -> str:
    """-O3 costs a sixth of a compilation; beside AVX2 no machine that has a choice takes the variant without it."""
    return "-O2" if isa == "portable" and "avx2" in ISA_FLAGS else "-O3"


def find_ninja() -> list[str] | None:
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    return ["ninja"] if shutil.which("ninja") else None


def pybind11_include() -> Path:
    """The headers of pybind11, or the copy that every torch carries."""
    spec = importlib.util.find_spec("pybind11")
    own = Path(spec.origin).parent / "include" if spec is not None and spec.origin else None
    for include in (own, torch_root() / "include"):
        if include is not None and (include / "pybind11/pybind11.h").exists():
            return include
    fail("pybind11 is missing (pip install pybind11)")


def selected_isas() -> list[str]:
    names = os.environ.get("FASTGEN_ISA_BUILD", "").replace(";", ",").split(",")
    names = [name.strip() for name in names if name.strip()] or list(ISA_FLAGS)
    for name in names:
        if name not in ISA_FLAGS:
            fail(f"FASTGEN_ISA_BUILD names {name!r}; the variants are {', '.join(ISA_FLAGS)}")
    return names


def find_nvcc() -> str | None:
    """The nvcc to build the CUDA library with, or None where it is not wanted."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc") or (shutil.which(f"{home}/bin/nvcc") if home else None)
    wanted = os.environ.get("FASTGEN_CUDA")
    if wanted == "1" and nvcc is None:
        fail("FASTGEN_CUDA=1, but nvcc is neither on PATH nor in CUDA_HOME")
    if not CUDA_SOURCES or wanted == "0" or (wanted != "1" and not torch_is_cuda_build()):
        return None
    return nvcc


class Ninja:
    """Collects rules and build edges and writes them to a file, which changes only if they do."""

    def __init__(self, directory: Path) -> None:
        self.lines: list[str] = ["ninja_required_version = 1.5", f"builddir = {directory}", ""]
        self.targets: list[str] = []
        self.made: set[str] = set()
        self.rules: dict[str, str] = {}
        self.compilations: list[tuple[str, str]] = []  # what it makes, and the command
        self.links: list[tuple[str, str]] = []

    def rule(self, name: str, command: str, depfile: bool = False) -> None:
        self.rules[name] = command
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]
        self.lines.append("")

    def build(
        self, out: Path | str, rule: str, inputs: list[Path | str], implicit: list[Path] | None = None, **variables: str
    ) -> str:
        """One step, said once however often it is asked for; returns what it makes."""
        if str(out) in self.made:
            return str(out)
        self.made.add(str(out))
        escaped = [str(path).replace(" ", "$ ") for path in inputs]
        after = f" | {' '.join(map(str, implicit))}" if implicit else ""
        self.lines.append(f"build {str(out).replace(' ', '$ ')}: {rule} {' '.join(escaped)}{after}")
        self.lines += [f"  {key} = {value}" for key, value in variables.items()]
        command = self.rules[rule].replace("$in", " ".join(shlex.quote(str(path)) for path in inputs))
        command = command.replace("$out", shlex.quote(str(out))).replace("$flags", variables.get("flags", ""))
        if Path(out).suffix != ".gch":  # only saves time
            (self.compilations if Path(out).suffix == ".o" else self.links).append((str(out), command))
        return str(out)

    def library(self, out: Path, rule: str, inputs: list[Path | str], **kwargs: object) -> None:
        self.targets.append(self.build(out, rule, inputs, **kwargs))

    def write(self, path: Path) -> None:
        text = "\n".join([*self.lines, "", f"default {' '.join(self.targets)}", ""])
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(text)
            temporary.replace(path)

    def run_plainly(self) -> int:
        """Everything anew, without ninja: compilations over all cores, then links. Returns the number of failures."""

        def run(step: tuple[str, str]) -> bool:
            out, command = step
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            return subprocess.run(command, shell=True, cwd=ROOT).returncode != 0

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return sum(pool.map(run, self.compilations)) or sum(pool.map(run, self.links))


def hidden_paths(compiler_includes: list[Path]) -> str:
    """Flags by which no library says where it was built: paths in messages and debug information begin below these.

    The compiler shortens the paths of system headers, so one below a link may appear by the place that the link leads to.
    """
    names = dict.fromkeys(name for path in (ROOT, *compiler_includes) for name in (path, path.resolve()))
    return " ".join(f"-ffile-prefix-map={name}/=" for name in names)


def variant_of(source: str, isa: str) -> str:
    """The variant whose object of a source the library of ``isa`` takes."""
    if isa == "amx" and source not in TILED:
        isa = "avx512_bf16"
    return "avx512" if isa == "avx512_bf16" and source in SHARED else isa


def describe_build(package: Path, objects: Path) -> Ninja:
    """All compile and link steps that leave ``package/lib/libfastgen_*.so`` and ``package/_cpu*.so``."""
    ninja, torch, compiler = Ninja(objects), torch_root(), find_compiler()
    includes = f"-I{ROOT / 'csrc'} -isystem {torch / 'include'} -isystem {torch / 'include/torch/csrc/api/include'}"
    common = "-std=c++20 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -fno-math-errno -fno-trapping-math"
    common += f" {hidden_paths([torch / 'include'])}"
    if is_gcc(compiler):
        common += f" --param ggc-min-heapsize={COMPILER_HEAP}"
    # gcc 12 warns of its own AVX-512 header (gcc bug 105593).
    warnings = "-Wall -Wextra -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized"
    symbols = ROOT / "csrc/common/hidden.map"  # exports no C++: variants must never share an inline function
    # libstdc++ first: libtorch_cpu exports some of its symbols by accident, and a later torch may not.
    torch_link = f"-L{torch / 'lib'} -Wl,--as-needed -lstdc++ -ltorch_cpu -lc10"
    extra = os.environ.get("FASTGEN_CXXFLAGS", "")  # sanitizers, debug information

    ninja.rule("compile", f"{compiler} $flags {extra} -MMD -MF $out.d -c $in -o $out", depfile=True)
    ninja.rule("precompile", f"{compiler} $flags {extra} -MMD -MF $out.d -x c++-header $in -o $out", depfile=True)
    ninja.rule("link", f"{compiler} -shared {extra} $in -o $out $flags")
    for isa in selected_isas():
        compiled = []
        for source in CPU_SOURCES:
            of = variant_of(source.stem, isa)
            flags = " ".join([common, optimization(of), warnings, TORCH_TARGET, includes, *ISA_FLAGS[of]])
            # What all sources read is read once a variant: gcc takes `precompiled.h.gch` where it finds one that fits, in the first
            # folder, and any compiler the header itself in the second.
            first, read_first = "", []
            if of != "amx" and is_gcc(compiler):  # which has four sources
                first = f"-I{objects / of}"
                read_first = [
                    ninja.build(objects / of / "common/precompiled.h.gch", "precompile", [PRECOMPILED], flags=flags)
                ]
            flags = f"{first} {flags} -include common/precompiled.h"
            if of == "avx512" and source.stem in SHARED:
                flags += " -include common/shared.h"
            compiled.append(
                ninja.build(objects / of / f"{source.stem}.o", "compile", [source], implicit=read_first, flags=flags)
            )
        ninja.library(
            package / "lib" / f"libfastgen_{isa}.so", "link", list(compiled), implicit=[symbols],
            flags=f"-Wl,--version-script={symbols} {torch_link}",
        )  # fmt: skip

    python_include = Path(sysconfig.get_paths()["include"])
    if not (python_include / "Python.h").exists():
        fail("Python.h is missing (Debian/Ubuntu: apt-get install python3-dev)")
    flags = f"-std=c++17 -O2 -fPIC -fvisibility=hidden -isystem {python_include} -isystem {pybind11_include()}"
    flags += f" {hidden_paths([python_include, pybind11_include()])}"
    record = f"-DFASTGEN_BUILT_ISAS='\"{','.join(selected_isas())}\"'"
    module = ninja.build(
        objects / "python/cpu.o", "compile", [ROOT / "csrc/python/cpu.cpp"], flags=f"{flags} {warnings} {record}"
    )
    ninja.library(package / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}", "link", [module], flags="")

    nvcc = find_nvcc()
    if nvcc is not None:
        archs = [
            arch for arch in os.environ.get("FASTGEN_CUDA_ARCHS", "80;90;100").replace(",", ";").split(";") if arch
        ]
        generate = " ".join(f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs)
        generate += f" -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"
        flags = f"-std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden {TORCH_TARGET} {generate} {includes}"
        flags += f" -Xcompiler {hidden_paths([torch / 'include']).replace(' ', ',')}"
        ninja.rule("nvcc", f"{nvcc} -ccbin {compiler} $flags -MMD -MF $out.d -c $in -o $out", depfile=True)
        ninja.rule("nvlink", f"{nvcc} -ccbin {compiler} -shared --cudart static $in -o $out $flags")
        compiled = [ninja.build(objects / "cuda" / f"{s.stem}.o", "nvcc", [s], flags=flags) for s in CUDA_SOURCES]
        link = f"-Xlinker --version-script={symbols} -L{torch / 'lib'} -Xlinker --as-needed -lstdc++ -ltorch_cpu -lc10"
        ninja.library(package / "lib/libfastgen_cuda.so", "nvlink", list(compiled), implicit=[symbols], flags=link)
    return ninja


class BuildExt(build_ext):
    """The whole native build: one ninja file, over all cores."""

    def run(self) -> None:
        package = ROOT / "fastgen" if self.inplace else Path(self.build_lib).resolve() / "fastgen"
        # One object directory per Python: objects do not depend on where the libraries go.
        objects = ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI') or platform.machine()}"
        if shutil.disk_usage(ROOT).free < 900 * 2**20:
            fail(f"less than 900 MiB free on the disk of {ROOT}")
        file = objects / ("inplace.ninja" if self.inplace else "package.ninja")
        build = describe_build(package, objects)
        build.write(file)
        (package / "lib").mkdir(parents=True, exist_ok=True)
        ninja = find_ninja()
        if ninja is None:
            print("fastgen: ninja is missing (pip install ninja): compiling everything anew", file=sys.stderr)
            failures = build.run_plainly()
        else:
            failures = subprocess.run(
                [*ninja, "-f", str(file), *(["--quiet"] if not self.verbose else [])], cwd=ROOT
            ).returncode
        if failures:
            fail("the compiler reported the errors above")

    def get_source_files(self) -> list[str]:
        files = [*ROOT.glob("csrc/**/*"), *ROOT.glob("kernels/*.py")]
        return [str(path.relative_to(ROOT)) for path in files if path.is_file()]

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "fastgen"
        return [str(path) for path in (*package.glob("lib/*.so"), *package.glob("_cpu*.so"))]


class BuildPy(build_py):
    """`kernels/` has no `__init__.py` (it would shadow other projects' `kernels`) and installs as `fastgen.kernels`."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source in sorted(ROOT.glob("kernels/*.py")):
            target = Path(self.build_lib) / "fastgen/kernels" / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(source), str(target))


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_ext": BuildExt, "build_py": BuildPy}, distclass=BinaryDistribution)
