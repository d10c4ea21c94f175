"""The folder of `fastgen sample`: what goes on in it and what is refused, classes, formats, one file of all, checksums, Ctrl-C."""

import os
import signal
import sys
import zipfile

import numpy as np
import pytest

from fastgen.cli._errors import EXIT_INTERRUPTED
from fastgen.cli.main import main
from fastgen.cli.sample import shards
from fastgen.jobs import DiffusionJob, classes

from .running import refused, run
from .samples import contents, drawn, manifest, names, pictures

SMALL = ["sample", "--steps", "2", "--num", "10", "--shard", "4", "--quiet"]


def draw(folder, *options):
    return run(*SMALL, "--out", folder, *options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert draw(folder) == 0
    return contents(folder)


def test_the_same_command_does_what_is_missing(tmp_path, capsys, undisturbed):
    assert draw(tmp_path) == 0 and contents(tmp_path) == undisturbed
    assert list(undisturbed) == ["000000.npz", "000004.npz", "000008.npz"]
    capsys.readouterr()
    assert draw(tmp_path) == 0
    assert capsys.readouterr().out == f"nothing to do: {tmp_path} has all 10 images of 2 DDIM steps\n"
    (tmp_path / "000004.npz").unlink()
    (tmp_path / "grid.png").unlink()
    assert draw(tmp_path) == 0
    assert f"10 images of 2 DDIM steps in {tmp_path}" in capsys.readouterr().out
    assert contents(tmp_path) == undisturbed and (tmp_path / "grid.png").exists()
    (tmp_path / "grid.png").unlink()
    assert draw(tmp_path) == 0 and (tmp_path / "grid.png").exists()  # where it was stopped before the picture


def test_ctrl_c_and_the_same_command_again(tmp_path, capsys, monkeypatch, undisturbed):
    drawing = DiffusionJob.draw_batch

    def interrupted(self, seeds, labels):
        if 8 in seeds:
            os.kill(os.getpid(), signal.SIGINT)
        return drawing(self, seeds, labels)

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionJob, "draw_batch", interrupted)
        assert draw(tmp_path) == EXIT_INTERRUPTED
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == f"\nstopped: the same command goes on in {tmp_path}\n"
    assert not (tmp_path / "000008.npz").exists() and (tmp_path / "000004.npz").exists()
    assert draw(tmp_path) == 0 and contents(tmp_path) == undisturbed


def test_another_job_in_the_folder_is_refused_or_overwritten(tmp_path, capsys, undisturbed):
    assert draw(tmp_path, "--seed", "100") == 0
    line = refused(capsys, *SMALL, "--out", tmp_path)
    assert f"{tmp_path} holds another job: seed: 100 there, 0 here; choose another --out, or --overwrite" in line
    assert "steps: 2 there, 3 here" in refused(capsys, *SMALL, "--out", tmp_path, "--seed", "100", "--steps", "3")
    (tmp_path / "note.txt").write_text("not the job's")
    assert draw(tmp_path, "--overwrite") == 0
    assert contents(tmp_path) == undisturbed
    assert names(tmp_path) == [*undisturbed, "grid.png", "manifest.json", "note.txt"]
    assert "holds note.txt" in refused(capsys, *SMALL, "--out", other(tmp_path), "--overwrite")


def test_what_an_interrupted_job_has_left_is_removed_too(tmp_path, monkeypatch, undisturbed):
    def ended(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["fastgen.jobs.run"], "close_folder", ended)
        assert draw(tmp_path, "--seed", "100", "--format", "png") == EXIT_INTERRUPTED
    assert {"000100", "000108", ".records"} <= set(names(tmp_path))
    (tmp_path / ".000104.x.tmp").mkdir()  # of a process that was killed
    assert draw(tmp_path, "--overwrite") == 0
    assert contents(tmp_path) == undisturbed and names(tmp_path) == [*undisturbed, "grid.png", "manifest.json"]


def other(folder):
    """A folder with a file and no job."""
    (folder / "o").mkdir()
    (folder / "o" / "note.txt").touch()
    return folder / "o"


def test_overwriting_begins_anew_in_the_same_job_too(tmp_path, undisturbed):
    assert draw(tmp_path) == 0
    (tmp_path / "000000.npz").write_bytes(bytes(len(undisturbed["000000.npz"])))  # as large as it was
    assert draw(tmp_path) == 0 and contents(tmp_path) != undisturbed
    assert draw(tmp_path, "--overwrite") == 0 and contents(tmp_path) == undisturbed


def test_weights_of_the_same_name_but_other_numbers(tmp_path, capsys):
    assert draw(tmp_path, "--weights", "digits-glow", "--steps", "50") == 0
    line = refused(capsys, *SMALL, "--out", tmp_path, "--weights", "digits-realnvp", "--steps", "50")
    assert "model: " in line and "weights_sha256" not in line  # the first differences; the weights come after them


def test_all_classes(tmp_path, capsys):
    def labels(name, *options):
        assert draw(tmp_path / name, *options) == 0
        return drawn(tmp_path / name)["labels"].tolist()

    assert labels("a", "--class", "7") == [7] * 10
    assert labels("b", "--classes", "balanced", "--guidance-scale", "2") == list(range(10))
    assert labels("c", "--classes", "random", "--seed", "3") == classes.random(range(3, 13), 10).tolist()
    file = tmp_path / "classes.txt"
    file.write_text("\n".join(map(str, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0])))
    assert labels("d", "--classes", str(file)) == list(range(9, -1, -1))
    line = refused(capsys, *SMALL, "--out", tmp_path / "a", "--class", "3")
    assert 'holds another job: classes: "all 7" there, "all 3" here' in line
    line = refused(capsys, *SMALL, "--out", tmp_path / "a", "--classes", "balanced")
    assert 'classes: "all 7" there, "0, 1, 2, 3, 4, 5, 6, 7, 8, 9" here' in line
    file.write_text("1\n2\n")
    line = refused(capsys, *SMALL, "--out", tmp_path / "e", "--classes", file)
    assert f"--classes: {file}: must hold a class for each of 10 examples, got 2" in line
    assert not (tmp_path / "e").exists()


def test_the_picture_is_the_same_of_every_format(tmp_path):
    grids = []
    for form in ("npz", "webdataset", "png"):
        assert draw(tmp_path / form, "--format", form, "--classes", "balanced") == 0
        grids.append((tmp_path / form / "grid.png").read_bytes())
    assert grids[0] == grids[1] == grids[2]
    assert names(tmp_path / "png") == ["000000", "000004", "000008", "dataset.json", "grid.png", "manifest.json"]
    images = drawn(tmp_path / "npz")["arr_0"]
    for picture, image in zip(pictures(tmp_path / "npz", 8, 8, 10), images, strict=True):
        np.testing.assert_allclose(picture[::8, ::8, 0], 1 - image[..., 0] / 255, atol=1e-6)


def test_the_picture_has_the_first_images_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHOWN", 5)
    assert draw(tmp_path) == 0
    gap = pictures(tmp_path, 8, 8, 6)[5]
    assert (gap == gap[0, 0]).all()  # 2 rows of 3 places, the last one empty
    assert not (pictures(tmp_path, 8, 8, 5)[4] == gap[0, 0]).all()


def test_all_shards_in_one_file(tmp_path, capsys):
    one = tmp_path / "all.npz"
    assert draw(tmp_path / "o", "--classes", "balanced", "--gather", one) == 0
    arrays = drawn(tmp_path / "o")
    with np.load(one) as gathered:
        assert sorted(gathered.files) == ["arr_0", "labels", "seeds"]
        for name, array in arrays.items():
            assert gathered[name].dtype == array.dtype and np.array_equal(gathered[name], array)
    assert zipfile.ZipFile(one).testzip() is None
    before = one.read_bytes()
    one.unlink()
    assert draw(tmp_path / "o", "--classes", "balanced", "--gather", one) == 0  # nothing to draw, all to gather
    assert one.read_bytes() == before
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_verify(tmp_path, capsys, undisturbed):
    assert draw(tmp_path) == 0
    capsys.readouterr()
    assert run("sample", "--verify", "--out", tmp_path) == 0
    assert capsys.readouterr().out == f"all 3 shards in {tmp_path} are what they were\n"
    data = undisturbed["000004.npz"]
    (tmp_path / "000004.npz").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (tmp_path / "000008.npz").unlink()
    assert run("sample", "--verify", "--out", tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}: 000004.npz: its bytes have changed"
    assert lines[1].startswith(f"{tmp_path}: 000008.npz: ") and len(lines) == 2
    line = refused(capsys, "sample", "--verify", "--out", tmp_path / "nothing")
    assert "nothing/manifest.json" in line


def test_a_line_of_json_a_shard(tmp_path):
    assert main([*SMALL, "--out", str(tmp_path / "o"), "--log", str(tmp_path / "log")]) == 0
    assert names(tmp_path / "log") == ["rank-0000.jsonl"]
    assert len((tmp_path / "log" / "rank-0000.jsonl").read_text().splitlines()) == 3


def test_the_number_of_threads_is_a_setting(tmp_path, capsys):
    assert draw(tmp_path) == 0
    assert manifest(tmp_path)["settings"]["threads"] == 1
    assert "threads: 1 there, 2 here" in refused(capsys, *SMALL, "--out", tmp_path, "--threads", "2")


def test_who_watches_one_core_draw_much_is_told_of_the_others(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(sys, "argv", ["fastgen", "sample", "--out", "two words"])

    def said(terminal, *options):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        assert run("sample", "--steps", "1", "--out", tmp_path, "--overwrite", *options) == 0
        return capsys.readouterr().err

    advice = (
        "one process of 2 threads draws; to the same bytes, on all cores: torchrun --nproc-per-node 4 -m -- fastgen "
        "sample --out 'two words'\n"
    )
    assert said(True, "--num", "256", "--threads", "2").startswith(advice)
    for quiet in (said(False, "--num", "256"), said(True, "--num", "255"), said(True, "--num", "256", "--quiet")):
        assert "torchrun" not in quiet
