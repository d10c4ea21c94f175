"""What is printed: every row, the losing ones too, and targets read off the same figures."""

import itertools
import json

import pytest

from benchmarks import pictures, report, results, targets

from .documents import LOSES, RED, WINS, document, row


def test_every_row_is_in_the_table_with_its_ratio():
    lines = [line for line in report.markdown(document(WINS, LOSES, RED)).splitlines() if "| group_norm silu" in line]
    every_case = [line for line in lines if "1x8x4x4" in line]
    assert len(every_case) == 3
    assert "3.00 (2.50 to 3.50)" in every_case[0] and "| 2.00 |" in every_case[0]  # of floor: 1, 1, 2 over 0.5 -> 2
    assert "0.75 (0.62 to 0.78)" in every_case[1]
    assert "**red**" in every_case[2] and "off by 1" in every_case[2]


def test_means_count_the_rows_that_lose():
    means = report.markdown(document(WINS, LOSES, RED)).split("## Geometric means")[1].split("##")[0]
    assert "1.50" in means  # sqrt(3 * 0.75)
    assert "0.75" in means and "1 of 2" in means


def test_targets_are_met_missed_or_not_measured():
    verdicts = {v.target.text: v for v in targets.judge(document(WINS, LOSES))}
    mean = verdicts["group_norm + SiLU, inference, geometric mean over eager"]
    assert mean.verdict == "missed" and mean.figure.value == pytest.approx(1.5)
    lowest = verdicts["no group_norm row slower than the better baseline (lowest row)"]
    assert lowest.verdict == "missed" and lowest.figure.value == 0.75 and lowest.figure.detail == LOSES["id"]
    assert verdicts["DDPM step at 16x3x256x256 over diffusers"].verdict == "not measured"
    step = row("sampler_step/ddpm/16x3x256x256/NCHW/fp32", {"fastgen": [1.0], "diffusers": [8.5], "copy": [0.6]})
    verdicts = {v.target.text: v.verdict for v in targets.judge(document(step))}
    assert verdicts["DDPM step at 16x3x256x256 over diffusers"] == "met"
    assert verdicts["large DDPM step within 2x of its memory floor plus the noise"] == "met"


def test_a_red_row_misses_the_targets_that_read_it():
    winning = row("group_norm/silu/1x8x4x4/NCHW/fp32", {"fastgen": [1.0], "eager": [9.0]})
    verdicts = {v.target.text: v.verdict for v in targets.judge(document(winning, RED))}
    assert verdicts["group_norm + SiLU, inference, geometric mean over eager"] == "missed"
    assert verdicts["with scale and shift, geometric mean over eager"] == "not measured"


def test_every_target_reads_cases_that_exist():
    import torch

    from benchmarks.cases import collect

    cases, notes = collect(torch.device("cpu"), full=False)
    assert cases and not notes
    names = {"group_norm": "eager", "sampler_step": "diffusers", "philox_normal": "eager", "dispatch": "eager"}
    one = {"median": 1.0, "q1": 1.0, "q3": 1.0}
    rows = []
    for case in cases:
        family, mode, shape, layout, dtype = case.id.split("/")
        rows.append(
            {"id": case.id, "family": family, "mode": mode, "shape": shape, "layout": layout, "dtype": dtype, "green": True,
             "ratios": dict.fromkeys([*names.values(), "compile", "randn", "floor"], one),
             "providers": {"fastgen": {"median": 1.0}}}
        )  # fmt: skip
    unread = [target.text for target in targets.TARGETS if target.measure(rows).value is None]
    assert unread == []


def test_written_files_are_whole_and_read_back(tmp_path):
    made = document(WINS, LOSES, RED)
    results.save(made, tmp_path / "results.json")
    assert results.load(tmp_path / "results.json") == made
    assert report.write(made, tmp_path) == []
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "report.md", "bars.png", "roofline.png"}
    assert (tmp_path / "report.md").read_text() == report.markdown(made)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    results.save(document(WINS), path)

    def no_space(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError, match="no space"):
        results.save(document(LOSES), path)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert results.load(path)["rows"] == [WINS]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("versions"), "versions is missing"),
        (lambda d: d.update(schema=99), "schema 99"),
        (lambda d: d["rows"][0].update(green=False), "red, so it must have no ratios"),
        (lambda d: d["rows"][0]["providers"]["eager"].update(median="fast"), "median must be float"),
    ],
)
def test_a_document_that_is_not_one_is_refused(tmp_path, change, message):
    broken = json.loads(json.dumps(document(WINS)))
    change(broken)
    (tmp_path / "results.json").write_text(json.dumps(broken))
    with pytest.raises(results.ResultError, match=message):
        results.load(tmp_path / "results.json")


def test_half_a_file_is_refused(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(document(WINS))[:100])
    with pytest.raises(results.ResultError, match="not JSON"):
        results.load(tmp_path / "results.json")


def test_pytest_benchmark_can_read_the_rounds():
    converted = results.to_pytest_benchmark(document(WINS, RED))
    assert [b["name"] for b in converted["benchmarks"]] == [f"{WINS['id']}[{p}]" for p in ("fastgen", "eager", "copy")]
    assert converted["benchmarks"][1]["stats"]["data"] == [2.0, 3.0, 8.0]
    assert converted["benchmarks"][1]["stats"]["median"] == 3.0


def test_ticks_of_the_bars_never_touch():
    for low, high in [(0.7, 1.6), (0.9, 4.0), (0.95, 1.3), (0.5, 30.0), (0.9, 900.0)]:
        ticks = pictures._log_ticks(low, high)
        assert len(ticks) >= 2 and all(low <= t <= high for t in ticks)
        gaps = [b / a for a, b in itertools.pairwise(ticks)]
        assert min(gaps) >= (high / low) ** 0.13
