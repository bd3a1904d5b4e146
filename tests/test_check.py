"""`mimetic check` finds what is wrong with shards, each fault by shard and key; the three commands as they are typed."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from faulty_server import serving
from imagesets import encoded, folder_of, grey_folder, noise
from shardreading import assert_sound, keys_of
from test_pack import hashes

from mimetic import cli
from mimetic.data.checking import check_shards
from mimetic.data.index import open_index
from mimetic.data.pack import pack
from mimetic.data.packing import workers as workers_module
from mimetic.data.packing.telling import check_and_tell
from mimetic.data.packing.workers import Tally, run_all
from mimetic.engine.errors import DataError, SettingError


@pytest.fixture
def shards(tmp_path) -> Path:
    """Three shards of 4, 4 and 2 labelled images."""
    source = folder_of(tmp_path / "src", {f"{'ab'[i % 2]}/{i}.png": encoded(noise(i, 8, 8)) for i in range(10)})
    pack(source, tmp_path / "out", samples_per_shard=4)
    return tmp_path / "out"


def spoil(shards: Path, sample: int) -> str:
    """Overwrites an image where it lies; returns its key."""
    index = open_index(shards)
    with index.path(int(index.shard_of(np.array([sample]))[0])).open("r+b") as file:
        file.seek(int(index.rows["offset"][sample]) + 20)
        file.write(b"junk")
    return keys_of(index)[sample]


def changed_rows(shards: Path, **changes) -> None:
    rows = np.load(shards / "samples.npy")
    for name, value in changes.items():
        rows[name][5] = value
    np.save(shards / "samples.npy", rows)


@pytest.mark.parametrize("workers", [1, 2])
def test_sound_shards_are_sound_and_a_spoilt_image_is_named(shards, workers):
    assert check_shards(shards, workers=workers)[1] == []
    key = spoil(shards, 5)
    faults = check_shards(shards / "index.json", workers=workers)[1]
    assert [fault[:2] for fault in faults] == [("shard-00001.tar", ""), ("shard-00001.tar", key)]
    assert re.match(r"sha256 [0-9a-f]{64}, the index says [0-9a-f]{64}", faults[0][2])
    assert faults[1][2].startswith("does not decode: ")


def change_json(shards: Path, **changes) -> None:
    content = json.loads((shards / "index.json").read_text())
    content["shards"][1] |= changes
    (shards / "index.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: changed_rows(f, label=1 - np.load(f / "samples.npy")["label"][5]), r"the label is '.' in the tar, the index says ."),
        (lambda f: changed_rows(f, label=-1), r"the label is '.' in the tar, the index says -1"),
        (lambda f: changed_rows(f, label=99), r"the label is '.' in the tar, the index says 99"),
        (lambda f: changed_rows(f, size=7), r"\d+ bytes in the tar, the index says 7"),
        (lambda f: changed_rows(f, offset=8), r"no image begins at byte 8 of the tar"),
        (lambda f: (f / "keys.txt").write_bytes((f / "keys.txt").read_bytes().replace(b"/", b"_")), r"the key is '././' in the tar"),
        (lambda f: change_json(f, bytes=5), r"bytes \d+, the index says 5"),
        (lambda f: change_json(f, sha256="0" * 64), r"sha256 .*, the index says 0{64}"),
        (lambda f: (f / "shard-00001.tar").unlink(), "shard-00001.tar: No such file"),
        (lambda f: os.truncate(f / "shard-00001.tar", 1500), "breaks at byte"),
        (lambda f: (f / "shard-00001.tar").write_bytes(b""), "breaks at byte 0 of 0: empty file"),
        (lambda f: (f / "shard-00001.tar").write_bytes((f / "shard-00000.tar").read_bytes()), "the key is"),
        (lambda f: change_json(f, name="../src/a/0.png"), "breaks at byte 0"),
    ],
    ids=["label", "no-label", "no-such-label", "size", "offset", "keys", "bytes", "sha256", "missing", "cut", "empty", "another", "no-tar"],
)  # fmt: skip
def test_what_does_not_agree_is_named(shards, damage, message):
    damage(shards)
    _, faults = check_shards(shards)
    assert any(re.match(message.replace("'././'", "'./.'"), reason) for _, _, reason in faults), faults
    with pytest.raises(DataError, match=r"\d+ faults?, in \d+ of 10 images and \d of 3 shards"):
        check_and_tell(shards, 1, None)


# As they are typed


def typed(monkeypatch, capsys, *words: str | Path) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["mimetic", *map(str, words)])
    cli.dispatch()
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def test_the_commands_say_what_they_do_and_what_comes_next(tmp_path, monkeypatch, capsys):
    source = grey_folder(tmp_path / "src", 30)
    (source / "bad.png").write_bytes(b"rubbish")
    said = typed(monkeypatch, capsys, "pack", source, tmp_path / "out", "--val", "0.3", "--max-bad", "0.1", "--workers", "1")
    assert said[0] == f"packing {source} into shards in {tmp_path}/out, 1 process"
    assert re.match(r"31 inputs, 0\.\d MB", said[1])
    assert said[-1] == f"check them with `mimetic check {tmp_path}/out/train`, train on --data.index {tmp_path}/out/train"
    assert sum(int(line.split()[0]) for line in said if "images, no labels" in line) == 30
    tar = tmp_path / "out/train/shard-00000.tar"
    said = typed(monkeypatch, capsys, "index", tar, "--out", tmp_path / "index")
    assert said[0] == f"indexing {tar}"
    assert re.match(rf"\d+ images, no labels, 1 shard: {tmp_path}/index/index\.json", said[-1])
    said = typed(monkeypatch, capsys, "check", tmp_path / "index")
    assert re.match(rf"{tmp_path}/index: sound, \d+ images in 1 shard", said[-1])
    spoil(tmp_path / "index", 3)
    with pytest.raises(DataError, match=r"index: 2 faults, in 1 of \d+ images and 1 of 1 shard; all are in .*faults\.tsv; pack or fetch"):
        typed(monkeypatch, capsys, "check", tmp_path / "index", "--out", tmp_path / "faults.tsv")
    assert len((tmp_path / "faults.tsv").read_text().splitlines()) == 2
    with pytest.raises(SettingError, match="--workers is 0"):
        typed(monkeypatch, capsys, "check", tmp_path / "index", "--workers", "0")


def test_progress_has_rates_and_the_time_left(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 10.0, 11.0])
    monkeypatch.setattr(workers_module.time, "perf_counter", lambda: next(clock))
    tell = workers_module.Teller()
    for done in (100, 110, 600, 700):
        tell(done, done * 10**6, 1000, 10**9)
    assert capsys.readouterr().out == "600/1,000  50 images/s  50.0 MB/s  8 s left\n"
    clock = iter([0.0, 10.0])
    tell = workers_module.Teller()
    for done in (0, 600):
        tell(done, done * 10**6, 0, 0)
    assert capsys.readouterr().out == "600 samples  60 images/s  60.0 MB/s\n"


# Several processes


def test_shards_do_not_depend_on_how_many_processes_write_them(tmp_path):
    files = {f"{'ab'[i % 2]}/{i}.png": encoded(noise(i, 8, 8, 3)) for i in range(40)} | {"a/bad.png": b"rubbish", "b/bad.png": b""}
    source = folder_of(tmp_path / "src", files)
    for workers in (1, 2, 3):
        pack(source, tmp_path / f"out-{workers}", samples_per_shard=4, workers=workers, max_bad=0.1, val=0.2)
    for side in ("train", "val"):
        assert_sound(open_index(tmp_path / "out-1" / side))
        assert hashes(tmp_path / "out-1" / side) == hashes(tmp_path / "out-2" / side) == hashes(tmp_path / "out-3" / side)


def test_too_many_bad_images_stop_all_processes_and_leave_nothing(tmp_path):
    source = grey_folder(tmp_path / "src", 20)
    for i in range(0, 20, 2):
        (source / f"{i:04d}.png").write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"^5 unreadable images, 4 are tolerated"):
        pack(source, tmp_path / "out", max_bad=0.2, samples_per_shard=2, workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def killed_by_the_system(task: int, tally: Tally) -> int:
    if task == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_a_worker_that_is_killed_is_one_line_and_no_hang():
    with pytest.raises(DataError, match=r"one of 2 workers was killed \(by lack of memory\?\); give fewer --workers"):
        run_all(killed_by_the_system, [0, 1, 2, 3], 2)


KILLED = """
import os, signal, sys
from pathlib import Path
from mimetic.data.pack import pack
source, out, workers, bytes_done = sys.argv[1:]
def told(images, size, *_):
    if size >= int(bytes_done) and list(Path(out).parent.glob(".out.packing/done/*.json")):
        print(images, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
pack(Path(source), Path(out), samples_per_shard=10, workers=int(workers), dedup=True, progress=told)
"""


def processes_in(group: int) -> list[str]:
    told = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return [line for line in told.splitlines() if line.split()[0] == str(group) and "Z" not in line]


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_while_packing_the_same_command_goes_on_with_the_missing_shards(tmp_path, workers):
    source = grey_folder(tmp_path / "src", 3000, side=24)
    command = [sys.executable, "-c", KILLED, source, tmp_path / "out", str(workers), "300000"]
    with subprocess.Popen(list(map(str, command)), start_new_session=True, stdout=subprocess.PIPE) as process:
        assert process.wait(60) == -signal.SIGKILL
    for _ in range(100):
        if not processes_in(process.pid):
            break
        workers_module.time.sleep(0.1)
    assert not processes_in(process.pid), "no worker goes on without its parent"
    work = tmp_path / ".out.packing"
    assert not (tmp_path / "out").exists()
    names = [f"{path.stem.removeprefix('result-')}.tar" for path in (work / "done").glob("*.json")]
    done = {name: os.stat(work / "result" / name).st_mtime_ns for name in names}
    assert 0 < len(done) < 300
    pack(source, tmp_path / "out", samples_per_shard=10, dedup=True)
    assert {name: os.stat(tmp_path / "out" / name).st_mtime_ns for name in done} == done, "what was finished is not written again"
    pack(source, tmp_path / "whole", samples_per_shard=10, dedup=True)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src", "whole"]


def interrupted(source: Path, out: Path, after: int, **options) -> None:
    def told(images, *_):
        if images == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, out, samples_per_shard=2, progress=told, **options)


@pytest.mark.parametrize("change", ["bytes", "stamp", "another", "settings", "tolerance"])
def test_a_source_or_setting_that_changed_starts_over(tmp_path, change):
    source = grey_folder(tmp_path / "src", 12)
    interrupted(source, tmp_path / "out", 7)
    done = tmp_path / ".out.packing/done"
    assert len(list(done.iterdir())) == 3
    options = {"settings": {"channels": 3}, "tolerance": {"max_bad": 0.5}}.get(change, {})
    if change == "bytes":
        (source / "0003.png").write_bytes(encoded(noise(99, 8, 8)))
    elif change == "stamp":
        os.utime(source / "0003.png", (1, 1))
    elif change == "another":
        (source / "more.png").write_bytes(encoded(noise(98, 8, 8)))
    told = []
    pack(source, tmp_path / "out", samples_per_shard=2, progress=lambda images, *_: told.append(images), **options)
    assert told[0] == (6 if change == "tolerance" else 0)
    pack(source, tmp_path / "whole", samples_per_shard=2, **options)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_what_a_stricter_start_finds_in_finished_shards_counts(tmp_path):
    source = grey_folder(tmp_path / "src", 12)
    for path in source.iterdir():
        if int(path.stem) % 3 == 0:
            path.write_bytes(b"rubbish")
    interrupted(source, tmp_path / "out", 11, max_bad=0.5)
    with pytest.raises(DataError, match=r"\d unreadable images, 0 are tolerated"):
        pack(source, tmp_path / "out", samples_per_shard=2, max_bad=0)


def test_two_processes_do_not_pack_into_one_folder(tmp_path):
    source = grey_folder(tmp_path / "src", 6)

    def told(images, *_):
        if images == 3:
            with pytest.raises(SettingError, match="out is being packed by another process; wait for it or end it"):
                pack(source, tmp_path / "out")

    pack(source, tmp_path / "out", progress=told)
    assert len(open_index(tmp_path / "out")) == 6


def test_shards_at_an_address_are_checked(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with serving(shards) as server:
        said = typed(monkeypatch, capsys, "check", server.address, "--workers", "1")
        assert said[-1] == f"{server.address}: sound, 10 images in 3 shards"
        with pytest.raises(DataError, match=rf"^{server.address}/none/index.json: the answer is 404"):
            typed(monkeypatch, capsys, "check", f"{server.address}/none")
