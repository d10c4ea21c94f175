"""A run: the cases it finds, what it saves and when, how it ends in time, and what it refuses to write."""

import subprocess

import pytest
import torch

from benchmarks import cases, machine, pictures, results, run
from benchmarks.cases import Case, Provider, Workload
from benchmarks.verify import Values

RIGHT = torch.linspace(1, 2, 64)


def fake(mode, build=None, allowed=None):
    def right(allow_compile):
        if allowed is not None:
            allowed.append(allow_compile)
        providers = [Provider("fastgen", RIGHT.clone, "fastgen"), Provider("eager", RIGHT.clone)]
        return Workload(providers, (Values(lambda: [RIGHT], tolerance=1e-6),), min_bytes=1, flops=1)

    return Case("toy", mode, (64,), "fp32", build or right, "toys")


@pytest.fixture
def toys(monkeypatch):
    """Runs `benchmarks.run` over the cases it is given, at a commit without changes; no limits are measured, no pictures drawn."""
    monkeypatch.setattr(machine, "commit", lambda: {"id": "0" * 40, "dirty": False, "time": None})
    monkeypatch.setattr(machine, "gemm_rates", lambda device: {"fp32": 1e11})
    monkeypatch.setattr(pictures, "draw", lambda documents, out: None)

    def start(*listed, argv=(), families=None):
        monkeypatch.setattr(run, "collect", lambda *args: (families or {"toy": list(listed)}, []))
        return run.main(["--seconds", "0", "--no-compile", *argv])

    return start


def modes(folder):
    return [row["mode"] for row in results.load(folder / "toy.json")["rows"]]


# ---- what there is ----------------------------------------------------------------------------------------------------------


def test_every_benchmark_file_is_found_by_its_name():
    names = [name.rpartition(".")[2] for name in cases.modules()]
    assert (
        sorted(names) == sorted(path.stem for path in cases.FOLDER.rglob("bench_*.py")) and "bench_group_norm" in names
    )


def test_ids_are_unique_and_have_five_parts():
    for full in (False, True):
        families, _ = cases.collect(torch.device("cpu"), full)
        ids = [case.id for listed in families.values() for case in listed]
        assert len(ids) == len(set(ids)) and {name.count("/") for name in ids} == {4}


def test_families_and_cases_are_chosen_by_name():
    families, _ = cases.collect(torch.device("cpu"), False, "x_t/", ["q_sample", "dispatch"])
    assert list(families) == ["q_sample"] and all("/x_t/" in case.id for case in families["q_sample"])
    with pytest.raises(ValueError, match=r"no such family: nothing; there are .*group_norm"):
        cases.collect(torch.device("cpu"), False, None, ["nothing"])


def test_as_used_comes_first_and_group_norm_first_on_a_gpu():
    families, _ = cases.collect(torch.device("cpu"), False, None, ["schedulers"])
    how = [case.how for case in families["schedulers"]]
    assert how == sorted(how) and set(how) == {"as used", "first in a process", "with seeds"}
    assert next(iter(cases.collect(torch.device("cuda"), False)[0])) == "group_norm"


# ---- saving and stopping ----------------------------------------------------------------------------------------------------


def test_a_run_that_is_cut_off_keeps_the_cases_before(toys, tmp_path):
    def interrupted(allow_compile):
        raise KeyboardInterrupt

    assert toys(fake("one"), fake("two"), fake("three", interrupted), argv=["--out", str(tmp_path)]) == 1
    assert modes(tmp_path) == ["one", "two"]
    assert (tmp_path / "report.md").exists()


def test_a_killed_run_has_saved_each_case_as_it_ended(toys, tmp_path):
    seen = []

    def looks(allow_compile):
        seen.append(modes(tmp_path))
        raise RuntimeError("looked")

    toys(fake("one"), fake("two", looks), fake("three", looks), argv=["--out", str(tmp_path)])
    assert seen == [["one"], ["one", "two"]]


def test_resume_measures_what_is_missing(toys, tmp_path):
    where = ["--out", str(tmp_path), "--allow-dirty"]
    toys(fake("one"), argv=where)
    before = results.load(tmp_path / "toy.json")["rows"][0]
    toys(fake("one"), fake("two"), argv=[*where, "--resume"])
    assert modes(tmp_path) == ["one", "two"] and results.load(tmp_path / "toy.json")["rows"][0] == before


def test_resume_begins_anew_at_another_commit(toys, tmp_path, monkeypatch):
    toys(fake("one"), argv=["--out", str(tmp_path)])
    monkeypatch.setattr(machine, "commit", lambda: {"id": "f" * 40, "dirty": False, "time": None})
    toys(fake("two"), argv=["--out", str(tmp_path), "--resume"])
    assert modes(tmp_path) == ["two"]


def test_a_family_ends_with_its_budget_and_says_so(toys, tmp_path, monkeypatch):
    clock = iter(float(k) for k in range(1000))  # a second passes each time it is asked
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    toys(*(fake(f"m{k}") for k in range(50)), argv=["--out", str(tmp_path), "--budget", "10"])
    document = results.load(tmp_path / "toy.json")
    assert 1 < len(document["rows"]) < 20 and document["cases"] == 50
    assert "cases were not measured: the time was spent" in document["notes"][0]


def test_a_deadline_ends_the_family_it_falls_into(toys, tmp_path, monkeypatch):
    clock = iter(float(k) for k in range(1000))
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    toys(*(fake(f"m{k}") for k in range(50)), argv=["--out", str(tmp_path), "--deadline", "10"])
    document = results.load(tmp_path / "toy.json")
    assert 1 < len(document["rows"]) < 20 and "the time was spent" in document["notes"][0]


def test_what_a_family_leaves_goes_to_those_after_it(toys, tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(run.time, "monotonic", lambda: float(next(clock)))
    budgets = []
    monkeypatch.setattr(
        run, "run_family", lambda document, cases, device, out, budget: budgets.append(budget) or iter(())
    )
    monkeypatch.setattr(run.results, "load_all", lambda out: [])
    monkeypatch.setattr(run.report, "write", lambda documents, out: [])
    toys(families={name: [fake("one")] for name in "abc"}, argv=["--out", str(tmp_path), "--budget", "10"])
    assert budgets == [29 / 3, 28 / 2, 27 / 1]  # a second each


def test_past_the_deadline_no_family_begins(toys, tmp_path, capsys):
    families = {"toy": [fake("one")]}
    toys(families=families, argv=["--out", str(tmp_path), "--deadline", "-1"])
    assert "deadline is past" in capsys.readouterr().err and not (tmp_path / "toy.json").exists()


def test_compilation_is_spread_over_a_familys_cases(tmp_path, monkeypatch):
    allowed = []
    listed = [fake(f"m{k}", allowed=allowed) for k in range(10)]
    monkeypatch.setattr(machine, "gemm_rates", lambda device: {"fp32": 1e11})
    monkeypatch.setattr(run.results, "save", lambda document, out: None)
    settings = {"seconds": 0.0, "budget": 100.0, "compile": True, "raw": False}
    document = run.document_for("toy", listed, torch.device("cpu"), settings)
    real = run.measure

    def slow_to_compile(case, device, *, allow_compile, **options):
        return real(case, device, allow_compile=allow_compile, **options) | {"set_up_seconds": 12.0 * allow_compile}

    monkeypatch.setattr(run, "measure", slow_to_compile)
    list(run.run_family(document, listed, torch.device("cpu"), tmp_path, 100.0))
    assert allowed[0] and 3 <= sum(allowed) <= 6 and any(allowed[6:])


# ---- what is written where --------------------------------------------------------------------------------------------------


def git(root, *args):
    command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *args]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    for path in ("README.md", "fastgen/code.py", "benchmarks/README.md", "benchmarks/results/a/b.json"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("one\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "all")
    return tmp_path


def test_results_and_pages_made_of_them_are_no_changes(repository):
    assert machine.commit(repository)["dirty"] is False and len(machine.commit(repository)["id"]) == 40
    for path in ("README.md", "benchmarks/README.md", "benchmarks/results/a/b.json", "benchmarks/results/a/new.json"):
        (repository / path).write_text("two\n")
    assert machine.commit(repository)["dirty"] is False


@pytest.mark.parametrize("path", ["fastgen/code.py", "fastgen/new.py"])
def test_code_that_differs_from_the_commit_is_a_change(repository, path):
    (repository / path).write_text("two\n")
    assert machine.commit(repository)["dirty"] is True


def test_stored_results_want_a_tree_without_changes(toys, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(machine, "commit", lambda: {"id": "0" * 40, "dirty": True, "time": None})
    stored = ["--out", str(tmp_path / "results" / "here")]
    assert toys(fake("one"), argv=stored) == 2
    assert "the tree has changes" in capsys.readouterr().err and not (tmp_path / "results").exists()
    assert toys(fake("one"), argv=[*stored, "--allow-dirty"]) == 0
    assert results.load(tmp_path / "results" / "here" / "toy.json")["commit"]["dirty"] is True
    assert toys(fake("one"), argv=["--out", str(tmp_path / "trial")]) == 0
    monkeypatch.setattr(machine, "commit", lambda: {"id": None, "dirty": None, "time": None})
    assert toys(fake("one"), argv=stored) == 2


def test_the_folder_of_a_machine_names_it(monkeypatch):
    facts = {"cpu": "AMD EPYC 7763 64-Core Processor", "cpu_flags": ["avx2"]}
    monkeypatch.setattr(machine, "describe", lambda device: facts)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert machine.name(torch.device("cpu")) == "epyc-avx2-2-threads"
    facts.update(cpu="Intel(R) Xeon(R) Processor", cpu_flags=["avx2", "avx512f", "amx_bf16"])
    assert machine.name(torch.device("cpu")) == "xeon-avx512-2-threads"
    facts.update(cpu="Neoverse-N1", cpu_flags=["asimd"])
    assert machine.name(torch.device("cpu")) == "neoverse-n1-neon-2-threads"


def test_pytest_benchmark_can_read_the_samples(toys, tmp_path):
    pytest.importorskip("pytest_benchmark")
    import json

    assert toys(fake("one"), argv=["--out", str(tmp_path), "--raw"]) == 0
    row = results.load(tmp_path / "toy.json")["rows"][0]
    converted = json.loads((tmp_path / "raw" / "pytest-benchmark.json").read_text())
    assert [b["name"] for b in converted["benchmarks"]] == [f"{row['id']}[fastgen]", f"{row['id']}[eager]"]
    assert converted["benchmarks"][1]["stats"]["data"] == row["samples"]["eager"]


def test_a_folder_that_holds_something_else_is_one_line(toys, tmp_path, capsys):
    (tmp_path / "old.json").write_text('{"schema": 1, "rows": []}')
    assert toys(fake("one"), argv=["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("old.json: schema 1, this program reads 2\n")
    assert toys(fake("one"), argv=["--out", str(tmp_path / "none"), "--deadline", "-1"]) == 2


def test_bad_arguments_are_one_line(capsys, toys):
    assert run.main(["--families", "nothing"]) == 2
    assert run.main(["--cases", "no such case"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("benchmarks: ") for line in lines)
