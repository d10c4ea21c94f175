"""What is printed: every row, the losing ones too, each mean of what belongs together, and targets read off the same figures."""

import itertools

import pytest
import torch
from PIL import Image, ImageColor

from benchmarks import peer_unets, pictures, report, results, tables, targets
from benchmarks.cases import collect

from .documents import LOSES, RED, WINS, document, row


def test_every_row_is_in_the_table_with_its_ratio():
    lines = [line for line in report.markdown([document(WINS, LOSES, RED)]).splitlines() if "| group_norm silu" in line]
    assert len(lines) == 3
    assert "3.00 (2.50 to 3.50)" in lines[0] and "| 2.00 |" in lines[0]  # of floor: 1, 1, 2 over 0.5 -> 2
    assert "0.75 (0.625 to 0.775)" in lines[1] or "0.75 (0.62 to 0.78)" in lines[1]
    assert "**red**" in lines[2] and "off by 1" in lines[2]


def test_means_count_the_rows_that_lose_and_the_red_ones():
    fp32 = tables.means([WINS, LOSES]).splitlines()[2]
    assert "1.50" in fp32 and "0.75" in fp32 and "1 of 2" in fp32  # sqrt(3 * 0.75)
    red = row(RED["id"].replace("bf16", "fp32"), {}, green=False)
    assert tables.means([WINS, LOSES, red]).splitlines()[2].endswith("| 1 | 1 |")


@pytest.mark.parametrize(
    "other",
    [
        row(LOSES["id"], {"fastgen": [1.0], "eager": [9.0]}, group="another"),
        row(LOSES["id"], {"fastgen": [1.0], "eager": [9.0]}, how="with seeds"),
        row(RED["id"], {"fastgen": [1.0], "eager": [9.0]}),  # another dtype
    ],
)
def test_what_does_not_belong_together_has_no_common_mean(other):
    assert [len(group.rows) for group in tables.groups([WINS, other])] == [1, 1]
    assert tables.headlines([WINS, other]).count("3.00") == 2  # over eager, and over the fastest, which is eager


def test_the_headline_is_against_the_fastest_and_a_slow_peer_is_no_baseline():
    slow_peer = row(WINS["id"], {"fastgen": [1.0], "eager": [2.0], "compile": [5.0], "diffusers": [9.0]})
    assert results.fastest_baseline(slow_peer) == "eager" and results.speedup(slow_peer, "fastest") == 2.0
    line = tables.headlines([slow_peer]).splitlines()[-1]
    assert line.split("|")[3:7] == [" 2.00 ", " 5.00 ", " diffusers: 9.00 ", " 2.00 "]


def test_targets_are_met_missed_or_not_measured():
    verdicts = {v.target.text: v for v in targets.judge([WINS, LOSES])}
    mean = verdicts["group_norm + SiLU, inference, geometric mean over eager"]
    assert mean.verdict == "missed" and mean.figure.value == pytest.approx(1.5)
    lowest = verdicts["no group_norm row slower than the better baseline (lowest row)"]
    assert lowest.verdict == "missed" and lowest.figure.value == 0.75 and lowest.figure.detail == LOSES["id"]
    assert verdicts["DDPM step at 16x3x256x256 over diffusers"].verdict == "not measured"
    name = "sampler_step/ddpm, with seeds/16x3x256x256/NCHW/fp32"
    step = row(name, {"fastgen": [1.0], "diffusers": [8.5], "copy": [0.6]})
    verdicts = {v.target.text: v.verdict for v in targets.judge([step])}
    assert verdicts["DDPM step at 16x3x256x256 over diffusers"] == "met"
    assert verdicts["large DDPM step within 2x of its memory floor plus the noise"] == "met"


def test_a_red_row_misses_the_targets_that_read_it():
    winning = row("group_norm/silu/1x8x4x4/NCHW/fp32", {"fastgen": [1.0], "eager": [9.0]})
    verdicts = {v.target.text: v.verdict for v in targets.judge([winning, RED])}
    assert verdicts["group_norm + SiLU, inference, geometric mean over eager"] == "missed"
    assert verdicts["no group_norm row slower than the better baseline (lowest row)"] == "missed"
    assert verdicts["with scale and shift, geometric mean over eager"] == "not measured"


@pytest.mark.parametrize(("isa", "asked"), [("amx", "1.2x"), ("avx512_bf16", "1.8x")])
def test_matrix_tiles_are_asked_for_other_figures(isa, asked):
    name = "attention/self/2x8x256x256x40/NLHE/bf16"
    made = document(row(name, {"fastgen": [1.0], "eager": [1.5]}), family="attention")
    made["fastgen"]["isa"] = isa
    lines = [line for line in report.target_table([made]).splitlines() if "160, bf16" in line]
    assert len(lines) == 1 and f"| at least {asked} | 1.50x | {'met' if isa == 'amx' else 'missed'} |" in lines[0]


def test_every_target_reads_cases_that_exist(monkeypatch):
    monkeypatch.setattr(peer_unets, "there", lambda build: True)  # of projects that are not installed here, too
    families, notes = collect(torch.device("cpu"), full=False)
    assert families and not notes
    flows = ("nflows", "zuko", "flowjax", "normflows", "FrEIA", "ml-tarflow", "stored")
    others = ("eager", "compile", "openvino", "diffusers", "randn", targets.NAIVE, "copy")
    rounds = {name: [1.0] for name in ("fastgen", *others, *flows)}
    rows = [row(case.id, rounds, how=case.how) for cases in families.values() for case in cases]
    unread = [target.text for target in targets.TARGETS if target.measure(rows).value is None]
    assert unread == []


def test_written_files_are_whole_and_read_back(tmp_path):
    made = document(WINS, LOSES, RED)
    results.save(made, tmp_path)
    assert results.load_all(tmp_path) == [made]
    assert report.write([made], tmp_path) == []
    assert {p.name for p in tmp_path.iterdir()} == {"group_norm.json", "report.md", "group_norm.png", "roofline.png"}
    assert (tmp_path / "report.md").read_text() == report.markdown([made])


def test_a_family_of_sixty_rows_is_a_small_file(tmp_path):
    rounds = {name: [1.23456789e-4 * (k + 1) for k in range(30)] for name in ("fastgen", "eager", "compile", "copy")}
    made = document(*(row(f"group_norm/silu/{n}x128x32x32/NCHW/fp32", rounds) for n in range(60)))
    assert results.save(made, tmp_path).stat().st_size < 60 * 580


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"versions"', '"version"'), "versions is missing"),
        (lambda text: text.replace('"schema": 2', '"schema": 99'), "schema 99"),
        (lambda text: text.replace('"green":true', '"green":false'), "red, so it must have no figures"),
        (lambda text: text.replace('"eager":[3.0', '"eager":["fast"'), "must be \\[median, q1, q3\\]"),
        (lambda text: text[:100], "not JSON"),
    ],
)
def test_a_document_that_is_not_one_is_refused(tmp_path, change, message):
    path = results.save(document(WINS), tmp_path)
    path.write_text(change(path.read_text()))
    with pytest.raises(results.ResultError, match=message):
        results.load(path)


def readmes(root):
    (root / "benchmarks").mkdir(parents=True)
    (root / "README.md").write_text("before\n<!-- table: begin -->\nold\n<!-- table: end -->\nafter\n")
    (root / "benchmarks" / "README.md").write_text("<!-- results: begin -->\nold\n<!-- results: end -->\n")


def test_one_command_writes_the_tables_of_both_readmes(tmp_path):
    readmes(tmp_path)
    results.save(document(WINS, LOSES), tmp_path / "benchmarks" / "results" / "a-cpu-2-threads")
    assert report.publish(tmp_path) == []
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n<!-- table: begin -->\n") and text.endswith("<!-- table: end -->\nafter\n")
    assert "old" not in text and "0123456789ab" in text and "| as used | 1.50 (0.75 to 3.00) |" in text
    page = (tmp_path / "benchmarks" / "README.md").read_text()
    assert "](results/a-cpu-2-threads/group_norm.png)" in page and "not measured" in page  # the targets too
    once = text
    report.publish(tmp_path)
    assert (tmp_path / "README.md").read_text() == once


def test_without_results_the_readmes_say_so(tmp_path):
    readmes(tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir()
    assert report.publish(tmp_path) == []
    assert "No results of this version" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match="table: begin"):
        report.publish(tmp_path)


def test_the_markers_of_this_checkout_are_there():
    for path, marker in (("README.md", "table"), ("benchmarks/README.md", "results")):
        text = (report.ROOT / path).read_text()
        assert 0 <= text.find(f"<!-- {marker}: begin -->") < text.find(f"<!-- {marker}: end -->"), path


def test_ticks_of_the_pictures_never_touch():
    for low, high in [(0.7, 1.6), (0.9, 4.0), (0.95, 1.3), (0.5, 30.0), (0.9, 900.0)]:
        ticks = pictures.log_ticks(low, high)
        assert 1.0 in ticks and all(low <= t <= high for t in ticks)
        gaps = [b / a for a, b in itertools.pairwise(ticks)]
        assert min(gaps, default=2.0) >= (high / low) ** 0.11


def fails_where_texts_overlap(figure):
    figure.draw_without_rendering()
    axis = figure.axes[0]
    texts = [*axis.get_yticklabels(), *axis.texts, *axis.get_xticklabels(), axis._left_title]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    boxes += [("legend", legend.get_window_extent()) for legend in figure.legends]
    width, height = figure.bbox.size
    for (a, first), (b, second) in itertools.combinations(boxes, 2):
        assert not first.shrunk(0.98, 0.9).overlaps(second.shrunk(0.98, 0.9)), (a, b)
    outside = [name for name, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]
    assert outside == []
    return [name for name, _ in boxes]


def test_nothing_in_a_picture_overlaps():
    slow = {"fastgen": [1.0, 1.1, 0.9], "eager": [30.0, 31.0, 29.0], "compile": [0.7, 0.8, 0.6], "copy": [0.5] * 3}
    rows = [
        row(
            f"group_norm/scale_shift/{n}x1280x256x256/NHWC/fp32",
            slow,
            group=f"GroupNorm, scale and shift + SiLU, {n % 20}",
        )
        for n in range(40)
    ]
    made = document(*rows, RED)
    assert len(fails_where_texts_overlap(pictures.speed_ups(made))) > 80
    assert len(fails_where_texts_overlap(pictures.roofline([made, document(WINS)]))) > 45


def test_a_family_of_which_nothing_was_measured_has_a_picture_all_the_same():
    assert "red" in fails_where_texts_overlap(pictures.speed_ups(document(RED)))
    fails_where_texts_overlap(pictures.roofline([document(RED)]))


def test_titles_in_the_roofline_are_whole():
    """Such that differ in their last letters alone, over two lines: nothing cut, nothing that overlaps."""
    long = "TarFlow of ml-tarflow's MNIST notebook: 4 blocks of 4 layers of 128 channels, 28x28, patches of 4, batch"
    rounds = {"fastgen": [1.0], "eager": [2.0], "copy": [0.5]}
    rows = [row(f"tarflow/mnist/{n}x1x28x28/NCHW/fp32", rounds, group=f"{long} {n}") for n in (1, 16, 100)]
    figure = pictures.roofline([document(*rows)])
    fails_where_texts_overlap(figure)
    labels = [text.get_text().replace("\n", " ") for text in figure.axes[0].get_yticklabels()]
    assert labels == [f"{long} {n}, fp32" for n in (1, 16, 100)]


def test_a_saved_picture_keeps_its_colours(tmp_path):
    pictures.draw([document(WINS, LOSES, RED)], tmp_path)
    picture = Image.open(tmp_path / "group_norm.png").convert("RGB")
    found = {colour for _, colour in picture.getcolors(picture.width * picture.height)}
    assert {ImageColor.getrgb(colour) for colour in (pictures.COLOURS["eager"], pictures.RED, "#000000")} <= found
