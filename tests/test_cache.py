"""Shards from elsewhere: fetched once, whole and unchanged, whatever the network does, into a folder that stays within its bounds."""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import fsspec
import numpy as np
import pytest
from faulty_server import FaultyServer, serving, start_elsewhere
from imagesets import grey_folder
from tinyruns import files_of_at_most, wait_until

from mimetic.data import cache as cache_module
from mimetic.data import fetch as fetch_module
from mimetic.data import index as index_module
from mimetic.data.cache import ShardCache
from mimetic.data.fetch import fetch
from mimetic.data.index import Index, open_index
from mimetic.data.order import Shuffled
from mimetic.data.pack import pack
from mimetic.data.readahead import read_at_once
from mimetic.data.stream import ShardStream
from mimetic.engine.errors import DataError, SettingError

MB = 1_000_000
ROOT = Path(__file__).resolve().parent.parent


def content(number: int, size: int = 300_000) -> bytes:
    return np.random.default_rng(number).bytes(size)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_module, "STALL", 0.5)
    monkeypatch.setattr(fetch_module, "WAITS", (0.01, 0.05))
    monkeypatch.setattr(fetch_module, "PATIENCE", 3.0)
    (tmp_path / "served").mkdir()
    for number in range(8):
        (tmp_path / "served" / f"{number}.tar").write_bytes(content(number))
    with serving(tmp_path / "served") as faulty:
        yield faulty


def of(number: int, size: int = 300_000) -> dict:
    return {"size": size, "sha256": hashlib.sha256(content(number, size)).hexdigest()}


# One file


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(
    "faults", [[], ["500"], ["500", "500", "503"], ["drop"], ["short", "short"], ["stall"], ["drop", "500", "short", "429"]]
)
def test_a_file_arrives_whole_whatever_happens_on_the_way(server, tmp_path, faults, ranges):
    server.faults, server.ranges = list(faults), ranges
    assert fetch(f"{server.address}/1.tar", tmp_path / "part", **of(1)) == of(1)["sha256"]
    assert (tmp_path / "part").read_bytes() == content(1)
    assert not server.faults
    broken = sum(fault in ("drop", "short", "stall") for fault in faults)
    assert server.asked["1.tar"] + server.again["1.tar"] == broken + 1
    if ranges and "drop" not in faults:  # a reset may take back what had come
        assert server.again["1.tar"] == broken, "what came is gone on with, not fetched again"


@pytest.mark.parametrize("faults", [[], ["short"]])
def test_a_file_of_unknown_size_is_fetched_to_the_end_that_the_server_tells(server, tmp_path, faults):
    server.faults = list(faults)
    assert fetch(f"{server.address}/2.tar", tmp_path / "part") == of(2)["sha256"]


def test_a_file_of_another_length_is_named_at_once(server, tmp_path):
    for size in (299_999, 300_001):
        with pytest.raises(DataError, match=rf"1.tar has 300,000 bytes, the index says {size:,}; index it again"):
            fetch(f"{server.address}/1.tar", tmp_path / str(size), size, of(1)["sha256"])


def test_a_server_that_always_breaks_off_before_the_end_is_given_up(server, tmp_path, monkeypatch):
    """It sends the same bytes again and again: nothing is gained by that."""
    monkeypatch.setattr(fetch_module, "PATIENCE", 0.5)
    server.ranges, server.faults = False, ["short"] * 10_000
    with pytest.raises(DataError, match="no byte for 0 s"):
        fetch(f"{server.address}/1.tar", tmp_path / "part", **of(1))


def test_what_lies_here_and_is_no_beginning_of_what_lies_there_is_fetched_anew(server, tmp_path):
    (tmp_path / "part").write_bytes(content(1) + b"more")
    assert fetch(f"{server.address}/1.tar", tmp_path / "part") == of(1)["sha256"]
    (tmp_path / "part").write_bytes(b"rubbish")
    assert fetch(f"{server.address}/1.tar", tmp_path / "part", **of(1)) == of(1)["sha256"]


def test_addresses_may_have_spaces_letters_and_a_signature_that_is_not_told(server, tmp_path):
    (tmp_path / "served/ein Bär.tar").write_bytes(content(1))
    server.query = "sig=s%3Dcret"
    assert fetch(f"{server.address}/ein Bär.tar?sig=s%3Dcret", tmp_path / "part", **of(1)) == of(1)["sha256"]
    with pytest.raises(DataError, match="403") as caught:
        fetch(f"{server.address}/ein Bär.tar?sig=wrong", tmp_path / "other")
    assert "wrong" not in str(caught.value)


@pytest.mark.parametrize("address", ["http:///x.tar", "http://127.0.0.1:port/x.tar", "https://[x/y.tar"])
def test_what_is_no_address_is_said_at_once(tmp_path, address):
    with pytest.raises(DataError, match="address"):
        fetch(address, tmp_path / "part")


def test_what_a_killed_process_left_is_gone_on_with(server, tmp_path):
    (tmp_path / "part").write_bytes(content(3)[:123_456])
    fetch(f"{server.address}/3.tar", tmp_path / "part", **of(3))
    assert (tmp_path / "part").read_bytes() == content(3)
    assert (server.asked["3.tar"], server.again["3.tar"]) == (0, 1)


def test_a_file_of_another_hash_is_fetched_again_and_then_refused_by_name(server, tmp_path):
    server.faults = ["garbage"]
    fetch(f"{server.address}/1.tar", tmp_path / "part", **of(1))
    assert (tmp_path / "part").read_bytes() == content(1)
    (tmp_path / "part").unlink()
    server.asked.clear()
    with pytest.raises(DataError, match=rf"{server.address}/1.tar: sha256 .* the index says {of(2)['sha256'][:12]}.*twice"):
        fetch(f"{server.address}/1.tar", tmp_path / "part", **of(2))
    assert server.asked["1.tar"] == 2


@pytest.mark.parametrize(("fault", "told"), [("404", "404"), ("403", "403")])
def test_what_will_not_pass_is_said_at_once(server, tmp_path, fault, told):
    server.faults = [fault]
    with pytest.raises(DataError, match=rf"{server.address}/1.tar: .*{told}"):
        fetch(f"{server.address}/1.tar", tmp_path / "part")


def test_a_server_that_stays_away_is_told_of_and_named_after_a_while(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch_module, "PATIENCE", 0.5)
    monkeypatch.setattr(fetch_module, "TELL", 0.1)
    monkeypatch.setattr(fetch_module, "WAITS", (0.05,))
    with pytest.raises(DataError, match=r"http://127.0.0.1:9/x.tar cannot be fetched: no byte for 0 s .*refused"):
        fetch("http://127.0.0.1:9/x.tar", tmp_path / "part")
    assert capsys.readouterr().out.count("waiting up to 0 s for http://127.0.0.1:9/x.tar (") == 1


def test_fsspec_reads_other_places_and_names_those_it_cannot(tmp_path, monkeypatch):
    with fsspec.open("memory://shards/5.tar", "wb") as file:
        file.write(content(5))
    (tmp_path / "part").write_bytes(content(5)[:1000])
    fetch("memory://shards/5.tar", tmp_path / "part", **of(5))
    assert (tmp_path / "part").read_bytes() == content(5)
    with pytest.raises(DataError, match=r"memory://shards/6.tar: there is no such file"):
        fetch("memory://shards/6.tar", tmp_path / "other")
    with pytest.raises(DataError, match=r"nowhere://x: nowhere:// cannot be read .* known are http"):
        fetch("nowhere://x", tmp_path / "other")


# The cache


def test_a_shard_is_fetched_once_by_however_many_processes(server, tmp_path):
    server.pace = 0.005
    cache = ShardCache(tmp_path / "cache")
    context = get_context("spawn")
    with ThreadPoolExecutor(8) as threads:
        processes = [context.Process(target=fetch_all, args=(cache, server.address)) for _ in range(2)]
        for process in processes:
            process.start()
        files = list(threads.map(lambda number: cache.fetched(f"{server.address}/{number % 4}.tar", **of(number % 4)), range(16)))
        for process in processes:
            process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert {file.read_bytes() for file in files} == {content(number) for number in range(4)}
    assert server.asked == dict.fromkeys(("0.tar", "1.tar", "2.tar", "3.tar"), 1)
    assert len(list((tmp_path / "cache").glob("*"))) == 5, "four shards, and the lock of evictions"


def fetch_all(cache: ShardCache, address: str) -> None:
    for number in (3, 2, 1, 0):
        cache.fetched(f"{address}/{number}.tar", **of(number))


def test_the_least_recently_read_give_way_and_the_bound_holds(server, tmp_path):
    cache = ShardCache(tmp_path / "cache", limit=1 * MB)
    for number in (0, 1, 2, 0, 3, 0, 4):
        cache.fetched(f"{server.address}/{number}.tar", **of(number))
        assert sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.tar")) <= MB
        time.sleep(0.01)  # file systems tell times apart by some milliseconds
    assert server.asked["0.tar"] == 1
    kept = {file.read_bytes() for file in (tmp_path / "cache").glob("*.tar")}
    assert kept == {content(number) for number in (0, 3, 4)}


@pytest.mark.parametrize("arriving", ["in any order", "the later the smaller the name"])
def test_the_bound_holds_when_several_fetch_at_once_and_none_waits_for_ever(server, tmp_path, arriving):
    server.pace = 0.002
    (tmp_path / "cache").mkdir()
    cache, most = ShardCache(tmp_path / "cache", limit=700_000), 0
    shards = [number % 8 for number in range(24)]
    if arriving != "in any order":
        shards = sorted(range(8), key=lambda number: of(number)["sha256"], reverse=True)
    with ThreadPoolExecutor(6) as threads:
        work = []
        while len(work) < len(shards) or not all(one.done() for one in work):
            if len(work) < len(shards):
                number = shards[len(work)]
                work.append(threads.submit(cache.fetched, f"{server.address}/{number}.tar", **of(number)))
            with cache._counting():  # nothing comes, goes or is renamed between the first file that is looked at and the last
                most = max(most, sum(map(size_or_none, (tmp_path / "cache").glob("*.*"))))
            time.sleep(0.005)
    assert all(one.result() for one in work)
    assert most <= 700_000 + 300_000


def size_or_none(file: Path) -> int:
    """An unfinished copy without content goes at any time."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def test_files_of_other_people_in_the_folder_are_left_alone(server, tmp_path):
    (tmp_path / "cache").mkdir()
    theirs = dict.fromkeys(("photos.tar", "Download.part", "0123.tar", "a.5.part"), b"x" * 900000)
    for name, there in theirs.items():
        (tmp_path / "cache" / name).write_bytes(there)
    for number in range(5):
        ShardCache(tmp_path / "cache", 700_000).fetched(f"{server.address}/{number}.tar", **of(number))
    assert {name: (tmp_path / "cache" / name).read_bytes() for name in theirs} == theirs


def test_what_killed_processes_left_gives_way_and_what_living_ones_are_at_does_not(server, tmp_path):
    cache = ShardCache(tmp_path / "cache", 650_000)
    (tmp_path / "cache").mkdir()
    dead, living = (cache.file("", digit * 64).with_suffix(".300000.part") for digit in "ab")
    for part in (dead, living):
        part.write_bytes(bytes(1000))
    with living.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        cache.fetched(f"{server.address}/1.tar", **of(1))
    assert living.exists()
    assert not dead.exists()


def test_a_copy_of_somebody_else_is_read_though_it_cannot_be_touched(server, tmp_path, monkeypatch):
    cache = ShardCache(tmp_path / "cache")
    file = cache.fetched(f"{server.address}/1.tar", **of(1))

    def refuse(*_: object) -> None:
        raise PermissionError(1, "not yours")

    monkeypatch.setattr(os, "utime", refuse)
    assert cache.fetched(f"{server.address}/1.tar", **of(1)) == file


def test_a_shard_larger_than_the_cache_is_refused(server, tmp_path):
    with pytest.raises(SettingError, match=r"data.cache_gb is 0.0002, but .*1.tar alone has 0.0003 GB"):
        ShardCache(tmp_path / "cache", limit=200_000).fetched(f"{server.address}/1.tar", **of(1))


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match=r"file/cache cannot be written .*; give data.cache another folder"):
        ShardCache(tmp_path / "file/cache").fetched(f"{server.address}/1.tar", **of(1))


def test_a_full_disk_is_told_and_leaves_nothing(server, tmp_path):
    cache = ShardCache(tmp_path / "cache")
    with files_of_at_most(100_000), pytest.raises(DataError, match=r"cache: the disk is full; free some space, or give data.cache"):
        cache.fetched(f"{server.address}/1.tar", **of(1))
    assert not list((tmp_path / "cache").glob("*.tar"))
    assert sum(file.stat().st_size for file in (tmp_path / "cache").iterdir()) == 0
    assert cache.fetched(f"{server.address}/1.tar", **of(1)).read_bytes() == content(1)


# A whole set of shards


@pytest.fixture
def packed(server, tmp_path) -> Index:
    """60 images in 12 shards, served."""
    pack(grey_folder(tmp_path / "src", 60), tmp_path / "served/set", samples_per_shard=5)
    return open_index(tmp_path / "served/set")


def keys_of(stream: ShardStream) -> list[list[str]]:
    return [batch["keys"] for batch in stream]


def elsewhere(server: FaultyServer, tmp_path: Path, limit: int = 10**9) -> Index:
    return open_index(f"{server.address}/set", ShardCache(tmp_path / "cache", limit))


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_elsewhere_give_the_same_batches_and_are_fetched_once(server, packed, tmp_path, workers):
    index = elsewhere(server, tmp_path)
    assert index.fingerprint == packed.fingerprint
    for epoch in range(2):
        there, here = (ShardStream(source, 7, workers=workers, seed=3, epoch=epoch) for source in (index, packed))
        assert keys_of(there) == keys_of(here)
    shards = {f"set/{shard['name']}" for shard in index.shards}
    assert {name: count for name, count in server.asked.items() if name in shards} == dict.fromkeys(shards, 1)


def test_no_copy_changes_its_name_while_another_process_counts_them(server, tmp_path, monkeypatch):
    cache, whole, counting = ShardCache(tmp_path / "cache"), threading.Event(), threading.Event()

    def fetch_and_wait(*what):
        fetch(*what)
        whole.set()
        counting.wait(30)

    monkeypatch.setattr(cache_module, "fetch", fetch_and_wait)
    with ThreadPoolExecutor(1) as pool:
        fetched = pool.submit(cache.fetched, f"{server.address}/0.tar", **of(0))
        assert whole.wait(30)
        with (cache.folder / "evicting").open("ab") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            counting.set()
            time.sleep(0.3)
            assert not list(cache.folder.glob("*.tar"))
        assert fetched.result(30).read_bytes() == content(0)


@pytest.mark.parametrize("factor", [1.05, 2])
def test_a_small_cache_fetches_each_shard_once_an_epoch_and_stays_exact(server, tmp_path, factor):
    pack(grey_folder(tmp_path / "src", 300), tmp_path / "served/set", samples_per_shard=3)
    options = {"canonical_streams": 2, "shuffle_block": 4}
    here = open_index(tmp_path / "served/set")
    needed = 2 * read_at_once(here, ShardStream(here, 6, **options).plan)
    there = open_index(f"{server.address}/set", ShardCache(tmp_path / "cache", int(factor * needed)))
    for epoch in range(2):
        server.asked.clear()
        fetched, local = (keys_of(ShardStream(source, 6, seed=3, epoch=epoch, **options)) for source in (there, here))
        assert fetched == local
        assert max(server.asked.values()) == 1
        assert len(server.asked) >= 100 - factor * needed // here.shards[0]["bytes"]
        assert sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.tar")) <= factor * needed


def test_shards_are_fetched_before_they_are_read_and_reading_ends_without_threads(server, packed, tmp_path):
    batches = iter(ShardStream(elsewhere(server, tmp_path), 2, canonical_streams=1, shuffle_block=2))
    next(batches)
    wait_until(lambda: len(server.asked) >= 3 + 12, 10)  # the index's three files, and all shards
    assert sum(thread.name.startswith("read-ahead") for thread in threading.enumerate()) >= 1
    batches.close()
    wait_until(lambda: not any(thread.name.startswith("read-ahead") for thread in threading.enumerate()), 10)


def test_workers_that_are_forked_while_another_stream_fetches_do_not_wait_for_ever(server, packed, tmp_path):
    """They inherit its open files, locks included."""
    server.pace = 0.3
    first, second = (ShardStream(elsewhere(server, tmp_path), 3, seed=seed, workers=1) for seed in (1, 2))
    both = [(one["keys"], other["keys"]) for one, other in zip(first, second, strict=True)]
    assert len(both) == 20


def test_what_was_evicted_is_not_kept_open(server, packed, tmp_path):
    """An unlinked file takes its place on the disk until it is closed."""
    index = elsewhere(server, tmp_path, 4 * packed.shards[0]["bytes"])
    assert [index.read(i) for i in range(60)] == [packed.read(i) for i in range(60)]
    kept = [opened for known, opened in index_module._descriptors.items() if known[0] == index.cache.folder]
    assert 1 <= len(kept) <= 4
    assert all(os.fstat(opened).st_nlink for opened in kept)


def test_a_subset_needs_no_more_than_its_own_shards(server, packed, tmp_path):
    shard = packed.shards[0]["bytes"]
    side_files = sum(file.stat().st_size for file in (tmp_path / "served/set").glob("*.*") if file.suffix in (".npy", ".txt"))
    stream = ShardStream(elsewhere(server, tmp_path, 3 * shard + side_files), 4, subset=np.array([0, 1, 2, 7, 8]))
    assert sum(batch["valid"].sum() for batch in stream) == 5


def test_a_signed_address_signs_all_files_of_a_set(server, packed, tmp_path):
    server.query = "token=abc"
    for name in ("set", "set/index.json"):
        index = open_index(f"{server.address}/{name}?token=abc", ShardCache(tmp_path / name.replace("/", "-")))
        assert keys_of(ShardStream(index, 7)) == keys_of(ShardStream(packed, 7))


def test_a_cache_that_cannot_hold_what_is_read_at_once_is_refused_before_it_thrashes(server, packed, tmp_path):
    index = elsewhere(server, tmp_path, 3 * max(shard["bytes"] for shard in packed.shards))
    with pytest.raises(SettingError, match=r"data.cache_gb is \S+, but the shards .* have \S+ GB; raise it, or lower data.canonical"):
        next(iter(ShardStream(index, 6)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_network_that_is_away_for_a_while_changes_nothing(server, packed, tmp_path, monkeypatch, workers):
    """The server is killed in mid-epoch and comes back at the same place."""
    monkeypatch.setattr(fetch_module, "PATIENCE", 60.0)
    expected = keys_of(ShardStream(packed, 3, seed=3))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    servers = [start_elsewhere(tmp_path / "served", port)]
    index = open_index(f"http://127.0.0.1:{port}/set", ShardCache(tmp_path / "cache"))
    batches = iter(ShardStream(index, 3, seed=3, workers=workers))
    found = [next(batches)["keys"]]
    servers[0].kill()
    servers[0].wait()
    comes_back = threading.Timer(2, lambda: servers.append(start_elsewhere(tmp_path / "served", port)))
    comes_back.start()
    found += [batch["keys"] for batch in batches]
    comes_back.join()
    for process in servers:
        process.kill()
        process.wait()
    assert found == expected


def test_a_damaged_shard_is_named_where_it_is_met(server, packed, tmp_path):
    shard = tmp_path / "served/set/shard-00003.tar"
    shard.write_bytes(shard.read_bytes()[:-10] + b"0123456789")
    with pytest.raises(DataError, match=r"shard-00003.tar: sha256 .*fetched twice; it has changed or is damaged"):
        keys_of(ShardStream(elsewhere(server, tmp_path), 6))


def test_an_index_names_no_commands_and_no_files_of_ours(server, packed, tmp_path):
    folder = tmp_path / "served/set"
    text = (folder / "index.json").read_text()
    refused = {"pipe:touch /tmp/x": "an index never runs a command", "/etc/passwd": "which lies on this machine",
               "file:///etc/passwd": "it may name http", "simplecache::http://x/y": "it may name http"}  # fmt: skip
    for name, told in refused.items():
        (folder / "index.json").write_text(text.replace('"shard-00000.tar"', f'"{name}"'))
        with pytest.raises(DataError, match=told):
            elsewhere(server, tmp_path)
    shutil.rmtree(folder)


def test_an_index_that_is_not_there_is_named(server, tmp_path):
    with pytest.raises(DataError, match=rf"{server.address}/other/index.json: the answer is 404"):
        open_index(f"{server.address}/other", ShardCache(tmp_path / "cache"))


def test_opening_shards_by_address_needs_no_more_than_the_address(server, packed, tmp_path):
    code = f"import mimetic; print(sum(len(b['keys']) for b in mimetic.open_shards('{server.address}/set', 6, workers=1)))"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert (done.stdout, done.returncode) == ("60\n", 0), done.stderr
    assert len(list((tmp_path / "home/mimetic/shards").glob("*.tar"))) == 12 + 2


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_what_the_simulation_says_of_each_machine_is_what_it_fetches(server, packed, tmp_path, world):
    """Each rank is a machine here, with a cache of its own."""
    spec = importlib.util.spec_from_file_location("stream_benchmark", ROOT / "benchmarks/stream.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    options = {"canonical_streams": 4, "shuffle_block": 4}
    order = Shuffled(np.diff(packed.starts), 3, streams=4, block=4)
    batch, steps = 12 // world, 5
    said = benchmark.walk(order, world, batch, 0, steps)
    weight = np.array([shard["bytes"] for shard in packed.shards], float)
    for rank in range(world):
        index = open_index(f"{server.address}/set", ShardCache(tmp_path / f"cache-{rank}"))
        assert len(keys_of(ShardStream(index, batch, rank=rank, world=world, seed=3, tail="drop", **options))) == steps
        fetched = {shard for shard, entry in enumerate(index.shards) if index.cache.file("", entry["sha256"]).exists()}
        assert fetched == set(np.flatnonzero(said.first[rank] >= 0).tolist())
        assert said.fetched(weight)[rank] == sum(index.shards[shard]["bytes"] for shard in fetched)
    if world in (2, 4):
        assert said.fetched(weight).max() < 1.4 * weight.sum() / world, "the streams divide: each machine keeps to its own"
