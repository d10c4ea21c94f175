"""`fastgen doctor` says what the library itself says."""

import importlib
import json

import torch

from fastgen import _dispatch, _library, _schema
from fastgen.cli import doctor
from fastgen.cli.main import main

from .. import fresh
from ..backends import requires_cpu


def test_json(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cpu"]["isa"] == _library.ISA
    assert set(report["backends"]) == set(_schema.SCHEMAS)
    assert report["failures"] == _library.FAILURES
    assert report["versions"]["torch"]


@requires_cpu
def test_text_names_the_variant_and_why(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"instruction set variant: {_library.ISA}" in text and _library.ISA_REASON in text
    assert f"CPU tensors\n    C++ ({_library.ISA}): {next(iter(_schema.SCHEMAS))}, " in text
    assert "triton: " in text or "there is no CUDA device" in text


def test_a_reason_is_said_once(capsys, monkeypatch):
    monkeypatch.setattr(_library, "FAILURES", {"cuda": "no compiler of CUDA"})
    monkeypatch.setattr(
        _dispatch, "cuda_reasons", lambda op: {"cuda": ["no compiler of CUDA"], "triton": ["no Triton"]}
    )
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.count("no compiler of CUDA") == 1 and text.count("no Triton") == 1
    assert text.count("there is no CUDA device") <= 2  # under GPU, and as the reason against both
    assert "not cuda: no compiler of CUDA" in text and "cuda: see above" in text
    assert all(family in text for family in _schema.SCHEMAS)


def test_a_reason_of_some_families_names_them():
    found = {"cpu": {"backend": "C++ (avx2)", "refused": {}}, "cuda": {"backend": "triton", "refused": {}}}
    refused = {**found, "cuda": {"backend": "none", "refused": {"cuda": ["broken"], "triton": ["broken", "too old"]}}}
    assert doctor._backend_lines({"group_norm": found, "q_sample": refused}) == [
        "CPU tensors",
        "  C++ (avx2): group_norm, q_sample",
        "CUDA tensors",
        "  triton: group_norm",
        "  none: q_sample",
        "    not cuda nor triton (q_sample): broken",
        "    not triton (q_sample): too old",
    ]


@requires_cpu
def test_a_family_that_leaves_its_calls_to_torch_says_so(monkeypatch):
    """On a GPU in silence, for there is nothing else; on the CPU with its reasons, and for some dtypes beside the kernel."""
    sentences = {torch.float32: [], torch.float16: ["this torch draws other float16 normals"]}

    def reasons(dtype=None):
        return sentences[dtype] if dtype is not None else [why for each in sentences.values() for why in each]

    monkeypatch.setattr(importlib.import_module("fastgen.ops.generator_normal"), "reasons", reasons)
    found = doctor._backends("generator_normal")
    assert found["cuda"] == doctor.TORCHS
    assert found["cpu"]["refused"] == {"C++": ["this torch draws other float16 normals"]}
    assert found["cpu"]["backend"] == (f"C++ ({_library.ISA})" if _library.ISA else "reference")
    sentences[torch.float32] = ["it cannot read the generators"]
    assert doctor._backends("generator_normal")["cpu"]["backend"] == "torch"
    elsewhere = {"cpu": {"backend": "C++", "refused": {}}, "cuda": {"backend": "none", "refused": {"cuda": ["broken"]}}}
    lines = doctor._backend_lines({"q_sample": elsewhere, "generator_normal": found})
    assert lines[-4:] == ["CUDA tensors", "  none: q_sample", "  torch: generator_normal", "    not cuda: broken"]


def run_with(isa: str) -> tuple[dict, str]:
    result = fresh.run("from fastgen.cli.main import main; main(['doctor', '--json'])", FASTGEN_ISA=isa)
    return json.loads(result.stdout), result.stderr


@requires_cpu
def test_the_override_is_obeyed_and_an_impossible_one_reported():
    report, _ = run_with("portable")
    assert report["cpu"]["isa"] == "portable" and report["cpu"]["isa_reason"] == "FASTGEN_ISA=portable"
    report, _ = run_with("reference")
    assert report["cpu"]["isa"] is None and report["backends"]["group_norm"]["cpu"]["backend"] == "reference"
    report, warning = run_with("mmx")
    assert report["cpu"]["isa"] is not None and "FASTGEN_ISA=mmx" in report["failures"]["mmx"] and "mmx" in warning
