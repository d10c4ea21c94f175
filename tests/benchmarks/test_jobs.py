"""What is measured of jobs: the store of many ranks, and the calls of the file system that a shard takes."""

from benchmarks.jobs import file_operations, store_load


def test_the_simulation_of_the_store():
    found = store_load.measure(clients=6, processes=2, seconds=0.05, rounds=2, fast_shards=3)
    assert [job["shards"] for job in found["jobs"]] == [12, 18]
    assert found["files_a_client"] == 1 and found["files_of_the_server"] > 6
    for job in found["jobs"]:
        assert job["shards_a_second"] > 0 and job["server_cpu_share"] >= 0
        assert 0 < job["latencies"]["claim"]["median"] <= job["latencies"]["claim"]["max"]
    assert "| none: as fast as they can | 18 |" in store_load.markdown(found)


def test_calls_are_counted_by_what_they_do():
    lines = [
        '7 mkdir("/tmp/job", 0777) = -1 EEXIST (File exists)',
        '7 openat(AT_FDCWD</home>, "/tmp/job/.a.tmp/a", O_WRONLY|O_CREAT, 0666) = 3</tmp/job/.a.tmp/a>',
        '7 openat(AT_FDCWD</home>, "/etc/hosts", O_RDONLY) = 4</etc/hosts>',
        "8 fsync(3</tmp/job/.a.tmp/a> <unfinished ...>",
        "8 <... fsync resumed>) = 0",
        '7 rename("/tmp/job/.a.tmp/a", "/tmp/job/a") = 0',
    ]
    counted = file_operations.counted(lines, "/tmp/job")
    assert counted == {"mkdir, failed": 1, "openat, new": 1, "fsync": 1, "rename": 1}
    assert file_operations.changes(counted) == 2
