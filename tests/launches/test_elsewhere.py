"""Training on shards that lie elsewhere, under a real launcher."""

import time

from faulty_server import serving
from imagesets import idx_files
from test_launches import launch
from tinyruns import beit_arguments, finish, losses, structured, wait_until

from mimetic.data.pack import pack


def test_a_machine_that_loses_its_network_for_20_seconds_goes_on_with_the_exact_order(world, tmp_path):
    pack(idx_files(tmp_path / "idx", *structured(200, 16)), tmp_path / "shards", samples_per_shard=10)
    shard = (tmp_path / "shards/shard-00000.tar").stat().st_size
    settings = {"data__batch_size": 8, "train__steps": 30, "train__log_every": 1, "data__canonical_streams": 1, "data__shuffle_block": 8,
                "data__workers": 1}  # fmt: skip
    here = beit_arguments(world, tmp_path / "here", data__index=tmp_path / "shards", **settings)
    assert finish(launch("ddp", "pretrain/beit.py", *here), 240).returncode == 0
    with serving(tmp_path / "shards") as server:
        port = server.server_address[1]
        there = beit_arguments(world, tmp_path / "there", data__index=server.address, data__cache=tmp_path / "cache",
                               data__cache_gb=8 * shard / 1e9, **settings)  # fmt: skip
        process = launch("ddp", "pretrain/beit.py", *there)
        wait_until(lambda: len(losses(tmp_path / "there")) >= 2 or process.poll() is not None, step=0.005)
    time.sleep(20)
    assert len(losses(tmp_path / "there")) < 30, "it had fetched everything before the network went"
    with serving(tmp_path / "shards", port) as server:
        done = finish(process, 240)
        assert done.returncode == 0, done.stderr
        assert server.asked
    assert losses(tmp_path / "there") == losses(tmp_path / "here")
