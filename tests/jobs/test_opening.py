"""What a start makes of a folder: other people's, another job's, half of its own, and what killed processes have left in it."""

import json
import random
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastgen.jobs import JobError, Manifest, run, verify
from fastgen.jobs.manifest import ShardRecord

from .launching import check_complete, contents
from .tiny_job import TinyJob

NUM = 22


def tiny(**options):
    return TinyJob(**{"num": NUM, "shard_size": 4, "batch_size": 3, "labels": torch.arange(NUM) % 10, **options})


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The files of an undisturbed run, by format."""
    found = {}
    for name in ("npz", "png"):
        folder = tmp_path_factory.mktemp(name)
        assert run(tiny(), folder, format=name, progress=False).drawn == 6
        found[name] = contents(folder)
    return found


def start(folder, format="npz", **options):
    return run(tiny(**options), folder, format=format, progress=False)


def test_shards_are_what_the_job_draws(tmp_path, expected):
    start(tmp_path / "made" / "here")
    check_complete(tmp_path / "made" / "here", expected["npz"])
    job = tiny()
    with np.load(tmp_path / "made" / "here" / "000020.npz") as last:
        drawn = job.draw(job.shard(5))
        assert np.array_equal(last["arr_0"], drawn.data) and last["seeds"].tolist() == [20, 21]
        assert last["labels"].tolist() == [0, 1]


def test_the_manifest_says_what_is_there(tmp_path):
    start(tmp_path)
    text = json.loads((tmp_path / "manifest.json").read_text())
    assert list(text) == ["format_version", "settings", "weights_sha256", "versions", "complete", "shards"]
    assert (
        text["complete"] is True and text["settings"].items() >= {"job": "TinyJob", "num": NUM, "format": "npz"}.items()
    )
    assert text["versions"]["torch"] == torch.__version__
    assert [shard["first_seed"] for shard in text["shards"]] == [0, 4, 8, 12, 16, 20]
    assert [shard["num"] for shard in text["shards"]] == [4, 4, 4, 4, 4, 2]
    assert all(shard["bytes"] == (tmp_path / shard["name"]).stat().st_size for shard in text["shards"])
    assert (tmp_path / "manifest.json").read_text().count('\n  {"name"') == 6  # a line each


def test_what_is_there_is_not_drawn_again(tmp_path, expected):
    start(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert start(tmp_path).drawn == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    (tmp_path / "000008.npz").unlink()
    (tmp_path / "000012.npz").write_bytes(b"cut off")
    assert start(tmp_path).drawn == 2
    check_complete(tmp_path, expected["npz"])


def test_a_lost_list_of_classes_is_written_again(tmp_path, expected):
    start(tmp_path, "png")
    (tmp_path / "dataset.json").unlink()
    assert start(tmp_path, "png").drawn == 0
    check_complete(tmp_path, expected["png"])


@pytest.mark.parametrize(
    ("options", "format", "difference"),
    [
        ({"seed": 1}, "npz", "seed: 0 there, 1 here"),
        ({"num": 21, "labels": torch.arange(21)}, "npz", "num: 22 there, 21 here; labels_sha256: .* there, .* here"),
        ({"labels": None}, "npz", "labels_sha256: [0-9a-f]{12}... there, null here"),
        ({"weight": 0.25}, "npz", "weights_sha256: [0-9a-f]{12}... there, [0-9a-f]{12}... here"),
        ({}, "png", 'format: "npz" there, "png" here; versions.zlib: nothing there, "[0-9.a-z-]+" here'),
        (
            {"seed": 1, "shard_size": 5, "batch_size": 2, "weight": 0.25},
            "npz",
            "seed: 0 there, 1 here; shard_size: 4 there, 5 here; batch_size: 3 there, 2 here, and 1 more",
        ),
    ],
)
def test_another_job_is_refused_with_what_differs(tmp_path, options, format, difference):
    start(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(JobError, match=f"holds another job: {difference}$"):
        start(tmp_path, format, **options)
    assert contents(tmp_path) == before


def test_another_version_is_refused(tmp_path):
    start(tmp_path)
    manifest = Manifest.read(tmp_path)
    old = replace(
        manifest, identity=replace(manifest.identity, versions={**manifest.identity.versions, "torch": "1.0"})
    )
    old.write(tmp_path)
    with pytest.raises(JobError, match=r'versions\.torch: "1.0" there, "[^"]+" here$'):
        start(tmp_path)


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(JobError, match=r"holds photo.jpg and no manifest.json: a new job needs a folder of its own"):
        start(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_hidden_files_do_no_harm(tmp_path, expected):
    (tmp_path / ".DS_Store").touch()
    (tmp_path / ".cache.x.tmp").mkdir()  # not of a shard
    start(tmp_path)
    assert contents(tmp_path) == {**expected["npz"], ".DS_Store": b""} and (tmp_path / ".cache.x.tmp").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1}', '{"format_version": 2}', "\xff"])
def test_a_manifest_that_is_none(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(JobError, match=r"manifest.json: (not a manifest of fastgen|format_version must be 1)"):
        start(tmp_path)
    with pytest.raises(JobError, match=r"manifest.json: "):
        verify(tmp_path)


def break_off(folder, rng, format):
    """Leave ``folder`` as a job does that is killed: some records told, some torn, some shards without one, half-written ones."""
    manifest = Manifest.read(folder)
    rng.shuffle(manifest.shards)
    known, told, silent, lost = (manifest.shards[part::4] for part in range(4))
    replace(manifest, complete=False, shards=known).write(folder)
    (folder / ".records").mkdir()
    lines = [json.dumps(vars(shard)) + "\n" for shard in told]
    torn = json.dumps(vars(silent[0]))[: rng.randrange(1, 100)] if silent else ""
    (folder / ".records" / "rank-0000-x.jsonl").write_text("".join(lines) + torn)
    (folder / ".records" / "rank-0001-x.jsonl").touch()
    for shard in lost:
        path = folder / shard.name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        half = folder / f".{shard.name}.abc123.tmp"
        half.mkdir()
        (half / "half").write_bytes(b"half")
    (folder / ".manifest.json.abc123.tmp").mkdir()
    if format == "png":
        (folder / "dataset.json").unlink()
        next((folder / told[0].name).iterdir()).unlink()  # the machine died before this picture was on the disk
        return len(silent) + len(lost) + 1
    return len(silent) + len(lost)


@pytest.mark.parametrize("format", ["npz", "png"])
@pytest.mark.parametrize("number", range(5))
def test_half_a_job_is_completed(tmp_path, expected, format, number):
    start(tmp_path, format)
    missing = break_off(tmp_path, random.Random(number), format)
    verification = verify(tmp_path, progress=False)
    assert not verification.ok and verification.missing > 0
    assert start(tmp_path, format).drawn == missing
    check_complete(tmp_path, expected[format])


def test_where_two_records_differ_the_file_decides(tmp_path, expected):
    """A survivor of an earlier start, on other hardware, has written the same shard to other bytes."""
    start(tmp_path)
    manifest = Manifest.read(tmp_path)
    wrong = [replace(manifest.shards[k], sha256="0" * 64, drawn_on="elsewhere") for k in (0, 1)]
    (tmp_path / ".records").mkdir()
    (tmp_path / ".records" / "x.jsonl").write_text("".join(json.dumps(vars(shard)) + "\n" for shard in wrong))
    replace(manifest, complete=False).write(tmp_path)
    (tmp_path / "000004.npz").unlink()
    assert start(tmp_path).drawn == 1
    check_complete(tmp_path, expected["npz"])
    assert Manifest.read(tmp_path).shards[0] == manifest.shards[0]


def test_a_shard_that_no_record_fits_is_drawn_again(tmp_path, expected):
    start(tmp_path)
    manifest = Manifest.read(tmp_path)
    (tmp_path / "000004.npz").write_bytes(bytes(manifest.shards[1].bytes))
    (tmp_path / ".records").mkdir()
    wrong = replace(manifest.shards[1], sha256="0" * 64)
    (tmp_path / ".records" / "x.jsonl").write_text(json.dumps(vars(wrong)) + "\n")
    assert start(tmp_path).drawn == 1
    check_complete(tmp_path, expected["npz"])


def test_a_start_asks_the_file_system_little(tmp_path):
    """A folder of many shards is listed once, and no shard is opened: 156,000 of them are at hand within a second or two."""
    asked = []

    def note(event, args):
        if asking and event in ("open", "os.scandir", "os.listdir"):
            asked.append(args[0])

    sys.addaudithook(note)
    counts = []
    for num in (8, 80):
        asking = False
        folder = tmp_path / str(num)
        run(TinyJob(num, shard_size=2), folder, progress=False)
        asking = True
        asked.clear()
        assert run(TinyJob(num, shard_size=2), folder, progress=False).drawn == 0
        counts.append(len(asked))
    asking = False
    assert counts[0] == counts[1] > 2


def test_verify_names_what_is_not_as_it_was(tmp_path):
    start(tmp_path, "png")
    assert verify(tmp_path, progress=False) == verify(tmp_path) and verify(tmp_path).ok
    picture = tmp_path / "000004" / "000005.png"
    picture.write_bytes(picture.read_bytes()[:-1] + b"x")
    (tmp_path / "000008" / "000008.png").unlink()
    shutil.rmtree(tmp_path / "000012")
    found = verify(tmp_path, progress=False)
    assert not found.ok and found.shards == 6 and found.missing == 0
    assert [line.split(": ", 1)[0] for line in found.bad] == ["000004", "000008", "000012"]
    assert found.bad[0] == "000004: its bytes have changed" and found.bad[2] == "000012: No such file or directory"
    assert re.fullmatch(r"000008: [0-9]+ bytes, [0-9]+ were written", found.bad[1])
    with pytest.raises(FileNotFoundError):
        verify(tmp_path / "000004")


def test_a_record_is_a_line_of_json():
    record = ShardRecord("000000.npz", 0, 4, "0" * 64, 12, "here")
    assert ShardRecord(**json.loads(json.dumps(vars(record)))) == record
