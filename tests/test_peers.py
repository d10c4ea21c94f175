"""A missing peer is a skip, and a failure of the whole run where `FASTGEN_REQUIRE` names peers."""

import ast
from pathlib import Path

import pytest

from . import backends, fresh, peers

TESTS = Path(__file__).parent


def test_a_missing_peer_is_a_skip_unless_it_is_required(monkeypatch):
    monkeypatch.setattr(backends, "REQUIRED", [])
    with pytest.raises(pytest.skip.Exception, match="no_such_peer"):
        backends.import_peer("no_such_peer")
    monkeypatch.setattr(backends, "REQUIRED", ["peers"])
    with pytest.raises(ModuleNotFoundError, match="no_such_peer"):
        backends.import_peer("no_such_peer")


def test_every_missing_peer_is_named(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert len(peers.missing()) == len(peers.INSTALL)
    assert "pip install --no-deps k-diffusion" in backends._missing()["peers"]


def test_k_diffusion_names_itself_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    peers.load_k_diffusion.cache_clear()
    try:
        with pytest.raises(ImportError, match="k-diffusion is not installed"):
            peers.load("k_diffusion.sampling")
    finally:
        peers.load_k_diffusion.cache_clear()


@pytest.mark.parametrize(
    ("required", "message"),
    [("gpu", "FASTGEN_REQUIRE names gpu; it may name cpu, triton, cuda, peers"), ("peers", "k-diffusion is not installed")],
)  # fmt: skip
def test_the_run_fails_at_once(required, message, tmp_path):
    """In a process of its own, which cannot find k-diffusion."""
    code = (
        "import importlib.util, sys; found = importlib.util.find_spec;"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'k_diffusion' else found(name, *rest);"
        f"import pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '--collect-only', {__file__!r}]))"
    )
    result = fresh.run(code, check=False, FASTGEN_REQUIRE=required)
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in result.stdout + result.stderr


def test_tests_import_nothing_from_benchmarks():
    """But the tests of the benchmarks: a helper that both need stands in `tests`."""
    for path in TESTS.rglob("*.py"):
        if "benchmarks" in path.relative_to(TESTS).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.split(".")[0] == "benchmarks"], path
