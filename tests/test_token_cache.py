"""The token cache: what it holds is what training would have drawn and encoded, and whatever is not that is refused."""

import dataclasses
import hashlib
import json
import multiprocessing
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from imagesets import as_npy, encoded, folder_of, noise
from tinyruns import TINY, beit_arguments, flip_byte, lines, losses, make_world, run_here
from webdataset import autodecode, tariterators

from mimetic.cli import dispatch
from mimetic.data.index import open_index
from mimetic.data.pack import pack
from mimetic.data.picture import in_unit_range
from mimetic.data.stream import ShardStream
from mimetic.engine.config import parse
from mimetic.engine.errors import CheckpointError, DataError, MimeticError, SettingError
from mimetic.pretrain import screening
from mimetic.pretrain.beit import build
from mimetic.pretrain.recipe import BeitRecipe
from mimetic.pretrain.tokens import cache_tokens
from mimetic.tokenizers import caching
from mimetic.tokenizers.files import open_tokenizer
from mimetic.tokenizers.token_cache import TokenCache, read_contents

VIEWS, BATCH, SAMPLES = 2, 16, 200
CPU = torch.device("cpu")
SETTINGS = {
    "data": {"batch_size": BATCH}, "train": {"steps": 1}, "optim": {"lr": 1e-3}, "tokenizer": {"path": "unset"}, "seed": 3,
    "backbone": {"name": "vit_tiny_patch16_224", "image_size": 16, "overrides": TINY}, "mask": {"count": 8, "min_block": 2},
    "views": {"crop_low": 0.3, "shift": 2, "jitter": 0.4},
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images, tokenizer, recipe, and a cache of two views in `tokens`."""
    torch.set_num_threads(1)
    folder = make_world(tmp_path_factory.mktemp("cache"))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(SETTINGS))
    make(folder, folder / "tokens")
    return folder


def make(world: Path, out: Path, views: int = VIEWS, *settings: str, workers: int = 1, **named: Path) -> Path:
    places = {"tokenizer": world / "tokenizer", "shards": world / "data", "config": world / "recipe.yaml"} | named
    cache_tokens(str(places["tokenizer"]), str(places["shards"]), out, views=views, config=places["config"], batch_size=None,
                 workers=workers, settings=settings)  # fmt: skip
    return out


def recipe_of(world: Path, *settings: str) -> BeitRecipe:
    words = ["--config", world / "recipe.yaml", "--data.index", world / "data", "--tokenizer.path", world / "tokenizer", "--out", "none"]
    return parse(BeitRecipe, example="", argv=[*map(str, words), *settings]).recipe


def batches_of(world: Path, steps: int, *settings: str, workers: int = 0, rank: int = 0, of: int = 1) -> list[dict]:
    recipe = recipe_of(world, *settings)
    index = open_index(recipe.data.index)
    stream = ShardStream(index, BATCH // of, seed=recipe.seed, tail="drop", transform=build(recipe, index, CPU).training, workers=workers,
                         rank=rank, world=of, **recipe.data.shuffling)  # fmt: skip
    return list(stream.run(steps))


def contents_of(cache: Path) -> dict[str, str]:
    """The sha256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in cache.iterdir() if not path.name.startswith(".")}


def by_webdataset(tar: Path) -> list[tuple[str, np.ndarray]]:
    """Keys and arrays, by its reader of tars and its decoder."""
    with tar.open("rb") as file:
        samples = list(tariterators.group_by_keys(tariterators.tar_file_expander([{"url": tar.name, "stream": file}])))
    return [(sample["__key__"], autodecode.basichandlers(".tokens.npy", sample["tokens.npy"])) for sample in samples]


def cached(world: Path, name: str = "tokens") -> tuple[str, str]:
    return "--tokenizer.cache", str(world / name)


def test_views_masks_and_ids_are_those_of_training_without_a_cache(world):
    steps = VIEWS * (SAMPLES // BATCH)
    tokenizer, seen = open_tokenizer(world / "tokenizer"), 0
    for online, kept in zip(batches_of(world, steps), batches_of(world, steps, *cached(world)), strict=True):
        assert online["keys"] == kept["keys"]
        for name in ("image", "hidden", "valid", "sample", "label"):
            assert torch.equal(online[name], kept[name])
        assert "target" not in kept
        assert kept["ids"].dtype == torch.int64
        assert torch.equal(kept["ids"], tokenizer.encode(in_unit_range(online["target"])))
        seen += len(online["keys"])
    assert seen == VIEWS * (SAMPLES // BATCH) * BATCH


def test_later_epochs_see_the_views_again_under_masks_of_their_own(world):
    steps = SAMPLES // BATCH
    batches = batches_of(world, 3 * steps, *cached(world))
    online = batches_of(world, 3 * steps)

    def by_key(epoch: int, name: str) -> dict[str, torch.Tensor]:
        return {key: value for batch in batches[epoch * steps : (epoch + 1) * steps] for key, value in zip(batch["keys"], batch[name])}  # noqa: B905

    first, second, third = (by_key(epoch, "image") for epoch in range(3))
    both = first.keys() & third.keys()
    assert len(both) > 150
    assert all(torch.equal(first[key], third[key]) for key in both)
    assert not any(torch.equal(first[key], second[key]) for key in first.keys() & second.keys())
    ids, masks = [by_key(epoch, "ids") for epoch in (0, 2)], [by_key(epoch, "hidden") for epoch in (0, 2)]
    assert all(torch.equal(ids[0][key], ids[1][key]) for key in both)
    assert sum(torch.equal(masks[0][key], masks[1][key]) for key in both) < 20
    assert all(torch.equal(a["hidden"], b["hidden"]) for a, b in zip(batches, online, strict=True))


@pytest.mark.parametrize(("workers", "of"), [(2, 1), (0, 2)])
def test_neither_workers_nor_processes_change_what_is_read(world, workers, of):
    whole = batches_of(world, 14, *cached(world))
    parts = [batches_of(world, 14, *cached(world), workers=workers, rank=rank, of=of) for rank in range(of)]
    for number, batch in enumerate(whole):
        for name in ("image", "ids", "hidden"):
            assert torch.equal(batch[name], torch.cat([part[number][name] for part in parts]))


def test_photographs_are_cropped_alike_whatever_their_size_and_turn(world, tmp_path):
    """JPEGs larger than the views, which are decoded at a part of their size; coloured, so with a tokenizer of their own."""
    from tinyruns import DVAE, save_tokenizer

    for i in range(20):
        pixels = np.kron(noise(i, 5 + i % 3, 6, 3), np.ones((24, 24, 1), np.uint8))
        folder_of(tmp_path / "photos", {f"{i:02d}.jpg": encoded(pixels, "jpeg")})
    pack(tmp_path / "photos", tmp_path / "data", samples_per_shard=8)
    torch.manual_seed(0)
    save_tokenizer(DVAE(300, 4, 3, width=16, code_width=8), tmp_path / "tokenizer")  # more codes than a byte holds
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(SETTINGS | {"views": {"crop_low": 0.1, "jitter": 0.4}}))
    make(tmp_path, tmp_path / "tokens", 3)
    tokenizer, largest = open_tokenizer(tmp_path / "tokenizer"), 0
    for online, kept in zip(batches_of(tmp_path, 3), batches_of(tmp_path, 3, *cached(tmp_path)), strict=True):
        assert torch.equal(online["image"], kept["image"])
        assert torch.equal(kept["ids"], tokenizer.encode(in_unit_range(online["target"])))
        largest = max(largest, int(kept["ids"].max()))
    assert largest > 255


def test_losses_of_a_training_are_the_same_to_the_bit_with_and_without_it(world, tmp_path):
    changes = {"train__steps": 2 * (SAMPLES // BATCH) + 2, "train__log_every": 1, "evaluate_on": world / "held-out", "seed": 3,
               "views__crop_low": 0.3, "views__shift": 2}  # fmt: skip
    online = run_here("beit", beit_arguments(world, tmp_path / "online", **changes))
    kept = run_here("beit", beit_arguments(world, tmp_path / "cached", **changes, tokenizer__cache=world / "tokens"))
    assert losses(online)[:-2] == losses(kept)[:-2]
    assert losses(online)[-2:] != losses(kept)[-2:]  # the third epoch: other views online, the first ones again cached
    accuracy = [[record["value"] for record in lines(run, "records.jsonl")] for run in (online, kept)]
    assert accuracy[0] != accuracy[1]
    assert all(len(values) == 2 for values in accuracy)


def test_training_with_it_never_runs_the_tokenizer(world, tmp_path, monkeypatch):
    from mimetic.tokenizers.dvae import DVAE

    def encode(self, image_BCHW):
        raise AssertionError

    monkeypatch.setattr(DVAE, "encode", encode)
    monkeypatch.setattr(screening, "look_at_tokenizer", lambda *given: None)  # the look before the first step runs it
    arguments = beit_arguments(world, tmp_path / "run", seed=3, views__crop_low=0.3, views__shift=2, train__steps=3, train__picture_every=9,
                               tokenizer__cache=world / "tokens")  # fmt: skip
    with pytest.raises(AssertionError):  # the picture at the end shows true tokens of held-out images
        run_here("beit", arguments)
    assert len(losses(tmp_path / "run")) == 3


def test_beit_v2_learns_the_same_with_a_cache_of_its_own_views(world, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(SETTINGS | {"aggregation": {"layer": 1, "head_layers": 1}}))
    make(world, tmp_path / "tokens", config=tmp_path / "recipe.yaml")
    assert "next: pretrain/beit2.py" in capsys.readouterr().out
    make(world, tmp_path / "same", VIEWS, "--aggregation.layer", "1")
    assert contents_of(tmp_path / "same") == contents_of(tmp_path / "tokens")
    words = ["--config", str(tmp_path / "recipe.yaml"), "--data.index", str(world / "data"), "--tokenizer.path", str(world / "tokenizer"),
             "--train.steps", "15", "--train.log_every", "1"]  # fmt: skip
    online = run_here("beit2", [*words, "--out", str(tmp_path / "online")])
    kept = run_here("beit2", [*words, "--out", str(tmp_path / "kept"), "--tokenizer.cache", str(tmp_path / "tokens")])
    assert losses(online) == losses(kept)
    with pytest.raises(SettingError, match="interpolation lanczos there, bicubic here"):
        run_here("beit2", [*words, "--out", str(tmp_path / "beits"), *cached(world)])


def test_numpy_and_webdataset_read_it_as_it_is(world):
    index, contents = open_index(world / "data"), read_contents(world / "tokens")
    keys, place = index.keys(np.arange(len(index))), 0
    samples, views = np.repeat(np.arange(len(index)), VIEWS), np.tile(np.arange(VIEWS), len(index))
    drawn, ids_BPQ = TokenCache(world / "tokens", index, contents).read(samples, views)
    for file in contents.parts[0].files.values():
        for key, rows in by_webdataset(world / "tokens" / file.name):
            assert key == keys[place]
            assert np.array_equal(rows["ids"], ids_BPQ[VIEWS * place : VIEWS * (place + 1)])
            assert np.array_equal(rows["box"], drawn.boxes_B4[VIEWS * place : VIEWS * (place + 1)])
            place += 1
    assert place == len(index)


def test_long_and_foreign_keys_are_found_too(world, tmp_path):
    tars = tmp_path / "tars"
    names = [f"{'folder-' * 20}{number}/ä{number}" if number % 2 else f"{number}" for number in range(9)]
    folder_of(tmp_path / "images", {f"{name}.npy": as_npy(noise(number, 16, 16)) for number, name in enumerate(names)})
    pack(tmp_path / "images", tars)
    make(world, tmp_path / "tokens", shards=tars)
    index, contents = open_index(tars), read_contents(tmp_path / "tokens")
    assert contents.parts[0].files[0].record % 512 == 0
    order = np.random.default_rng(0).permutation(9)
    _, ids_BPQ = TokenCache(tmp_path / "tokens", index, contents).read(order, order % VIEWS)
    read = {key: rows["ids"] for key, rows in by_webdataset(tmp_path / "tokens" / contents.parts[0].files[0].name)}
    assert list(read) == index.keys(np.arange(9))
    assert max(map(len, read)) > 100
    for sample, key, ids_PQ in zip(order, index.keys(order), ids_BPQ, strict=True):
        assert np.array_equal(read[key][sample % VIEWS], ids_PQ)


def test_views_that_are_added_are_those_of_a_cache_made_at_once(world, tmp_path):
    grown = shutil.copytree(world / "tokens", tmp_path / "grown")
    before = contents_of(grown)
    make(world, grown, 5)
    after, once = contents_of(grown), make(world, tmp_path / "once", 5)
    assert {name for name in before if after[name] != before[name]} == {"tokens.json"}
    assert len(after) == 2 * len(before) - 1
    index = open_index(world / "data")
    samples, views = np.repeat(np.arange(SAMPLES), 5), np.tile(np.arange(5), SAMPLES)
    (drawn, ids), (drawn_once, ids_once) = (TokenCache(cache, index, read_contents(cache)).read(samples, views) for cache in (grown, once))
    assert np.array_equal(ids, ids_once)
    assert all(np.array_equal(a, b) for a, b in zip(drawn, drawn_once, strict=True))
    make(world, grown, 1)
    assert contents_of(grown) == after


def test_many_views_go_to_several_files(world, tmp_path, monkeypatch):
    make(world, tmp_path / "whole", 5)
    monkeypatch.setattr(caching, "VIEWS_A_FILE", 2)
    make(world, tmp_path / "tokens", 5)
    assert [(part.first, part.last) for part in read_contents(tmp_path / "tokens").parts] == [(0, 2), (2, 4), (4, 5)]
    index, samples = open_index(world / "data"), np.repeat(np.arange(SAMPLES), 5)
    (drawn, ids_BPQ), (whole, whole_BPQ) = (TokenCache(folder, index, read_contents(folder)).read(samples, np.tile(np.arange(5), SAMPLES))
                                            for folder in (tmp_path / "tokens", tmp_path / "whole"))  # fmt: skip
    assert np.array_equal(ids_BPQ, whole_BPQ)
    assert all(map(np.array_equal, drawn, whole))


def test_a_job_that_was_killed_goes_on_and_ends_with_the_same_bytes(world, tmp_path, monkeypatch):
    whole, written = contents_of(world / "tokens"), []

    def dies_after_two(path, content, write=caching.write_atomically):
        if len(written) == 2:
            path.with_name(f".{path.name}.abc").write_bytes(content[:100])
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(caching, "write_atomically", dies_after_two)
        with pytest.raises(KeyboardInterrupt):
            make(world, tmp_path / "tokens")
    with pytest.raises(DataError, match="holds views 0 to 1 of 2 of 4 shards; give the same `mimetic tokens` again"):
        batches_of(world, 1, *cached(tmp_path))
    with pytest.raises(SettingError, match="was begun with 2 views, and is not complete; --views is 1: give 2 or more"):
        make(world, tmp_path / "tokens", 1)
    encoded_now = []
    monkeypatch.setattr(caching.CacheWriter, "_keep", lambda self, task, rows, keep=caching.CacheWriter._keep:
                        (encoded_now.append(task.name), keep(self, task, rows)))  # fmt: skip
    make(world, tmp_path / "tokens", workers=2)
    assert contents_of(tmp_path / "tokens") == whole
    assert not set(written) & set(encoded_now)
    assert len(encoded_now) == 2
    assert not list((tmp_path / "tokens").glob(".tokens-*"))


def test_a_disk_without_room_is_told_before_anything_is_written(world, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(caching.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1e5))
        with pytest.raises(DataError, match=r"the tokens take \d MiB, the disk has 0 MiB left; free some space, or give fewer --views"):
            make(world, tmp_path / "tokens", 100)
    assert not contents_of(tmp_path / "tokens")
    make(world, tmp_path / "tokens")
    assert contents_of(tmp_path / "tokens") == contents_of(world / "tokens")


def test_processes_of_a_launcher_share_the_shards(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        make(world, tmp_path / "tokens")
        assert sum(name.endswith(".tar") for name in contents_of(tmp_path / "tokens")) == 2 * int(rank) + 2
    assert contents_of(tmp_path / "tokens") == contents_of(world / "tokens")


def test_damage_is_named_when_it_is_read_and_mended_by_the_same_command(world, tmp_path):
    cache = shutil.copytree(world / "tokens", tmp_path / "tokens")
    file = cache / "tokens-00001-views-0000-0001.tar"
    entry = read_contents(cache).parts[0].files[1]
    record, data = entry.record, entry.data
    content = bytearray(file.read_bytes())
    content[5 * record + data + 90] ^= 1  # in the ids of the second view: of epoch 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"{file}: the tokens of \S+ are damaged; give the same `mimetic tokens` again"):
        batches_of(world, 2 * (SAMPLES // BATCH), *cached(tmp_path), workers=1)
    assert not multiprocessing.active_children()  # they heed no signal, and would be waited for at the program's end
    file.write_bytes(bytes(content[:-512]))
    with pytest.raises(DataError, match=rf"{file} has \d+ bytes, tokens.json says \d+"):
        batches_of(world, 1, *cached(tmp_path))
    make(world, cache)
    assert contents_of(cache) == contents_of(world / "tokens")
    content = file.read_bytes()
    file.write_bytes(content[record : 2 * record] + content[:record] + content[2 * record :])  # each image's tokens at another's place
    with pytest.raises(DataError, match="are damaged"):
        batches_of(world, SAMPLES // BATCH, *cached(tmp_path))
    flip_byte(file)
    make(world, cache)
    assert contents_of(cache) == contents_of(world / "tokens")


@pytest.mark.parametrize(("settings", "words"), [
    (("--seed", "4"), "seed 3 there, 4 here"),
    (("--views.jitter", "0.3"), "views.jitter 0.4 there, 0.3 here"),
    (("--views.crop_low", "0.2", "--views.shift", "0"), "views.crop_low 0.3 there, 0.2 here; views.shift 2 there, 0 here"),
    (("--backbone.image_size", "32", "--views.target_size", "16"), "backbone.image_size 16 there, 32 here"),
])  # fmt: skip
def test_another_recipe_is_refused_with_both_values(world, tmp_path, settings, words):
    cache = str(shutil.copytree(world / "tokens", tmp_path / "tokens"))
    overrides = ("--backbone.overrides", json.dumps(TINY | {"patch_size": 8})) if "32" in settings else ()
    for use in (lambda: batches_of(world, 1, "--tokenizer.cache", cache, *settings, *overrides),
                lambda: make(world, Path(cache), 3, *settings, *overrides)):  # fmt: skip
        with pytest.raises(SettingError) as refusal:
            use()
        assert f"({words}): use what it was made with, or make tokens for this recipe" in str(refusal.value)
    assert contents_of(Path(cache)) == contents_of(world / "tokens")


def test_another_tokenizer_other_images_and_mixtures_are_refused(world, tmp_path):
    from tinyruns import make_data, make_tokenizer

    other = make_tokenizer(tmp_path / "tokenizer", world / "data", codes=17)
    with pytest.raises(SettingError, match=r"tokenizer.path [0-9a-f]{12} there, [0-9a-f]{12} here"):
        batches_of(world, 1, *cached(world), "--tokenizer.path", str(other))
    images = make_data(tmp_path / "data", seed=9)
    with pytest.raises(SettingError, match=r"data.index [0-9a-f]{12} there, [0-9a-f]{12} here"):
        batches_of(world, 1, *cached(world), "--data.index", str(images))
    recipe = recipe_of(world, *cached(world))
    mixed = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, index=None, mix={str(world / "data"): 1.0}, epoch_samples=64))
    from mimetic.data.opening import open_data

    with pytest.raises(SettingError, match=r"holds the tokens of one set of shards, data\.mix names 1"):
        build(mixed, open_data(mixed.data), CPU)


def test_folders_that_hold_something_else_are_left_alone(world, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/a.txt").write_text("dear")
    with pytest.raises(SettingError, match=r"letters holds a.txt and no tokens.json"):
        make(world, tmp_path / "letters")
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["a.txt"]
    with pytest.raises(SettingError, match=r"a.txt is a file"):
        make(world, tmp_path / "letters/a.txt")
    for use in ((lambda: batches_of(world, 1, *cached(tmp_path, "none"))), (lambda: batches_of(world, 1, *cached(tmp_path, "letters")))):
        with pytest.raises(DataError, match=r"no tokens.json there; make it with `mimetic tokens`"):
            use()
    for text in ("{", "[]", '{"version": 1}', '{"version": 1, "made_with": {}, "grid": [4, 4], "parts": [{"views": [1, 2], "files": {}}]}'):
        (tmp_path / "letters/tokens.json").write_text(text)
        with pytest.raises(DataError, match=r"tokens.json is damaged"):
            batches_of(world, 1, *cached(tmp_path, "letters"))
    (tmp_path / "letters/tokens.json").write_text('{"version": 9}')
    with pytest.raises(DataError, match="version 9, this program reads version 1"):
        make(world, tmp_path / "letters")


def test_more_codes_than_16_bits_tell_apart_are_refused(world, tmp_path):
    from tinyruns import DVAE, save_tokenizer

    save_tokenizer(DVAE(65537, 4, 1, width=8, code_width=2), tmp_path / "tokenizer")
    with pytest.raises(SettingError, match=r"has 65537 codes, a cache of 16-bit ids holds 65536"):
        make(world, tmp_path / "tokens", tokenizer=tmp_path / "tokenizer")
    assert not (tmp_path / "tokens").exists()


def test_a_training_goes_on_only_with_the_tokens_it_began_with(world, tmp_path):
    shutil.copytree(world / "tokens", tmp_path / "tokens")
    arguments = beit_arguments(world, tmp_path / "run", seed=3, views__crop_low=0.3, views__shift=2, train__steps=4,
                               tokenizer__cache=tmp_path / "tokens")  # fmt: skip
    run_here("beit", arguments)
    make(world, tmp_path / "tokens", 3)
    longer = ["8" if word == "4" else word for word in arguments]
    with pytest.raises(CheckpointError, match=r"tokenizer.cache \S+ is not what it was then"):
        run_here("beit", [*longer, "--allow", "train.steps"])
    run_here("beit", [*longer, "--allow", "train.steps", "--allow", "tokenizer.cache"])


@pytest.mark.parametrize(("words", "line"), [
    (["--views", "0"], "--views is 0; it must be 1 or more"),
    (["--views", "2", "--views.crop_lo", "1"], "unknown setting --views.crop_lo (did you mean views.crop_low?)"),
    (["--views", "2", "--workers", "0"], "--workers is 0; it must be 1 or more"),
    *((["--views", "2", *words], f"{words[0].partition('=')[0]} is nothing that `mimetic tokens` takes: TOKENIZER, SHARDS, OUT and "
       "--config say what it reads and writes; leave it out")
      for words in (["--tokenizer.path", "a"], ["--data.index=a"], ["--dry-run"], ["--tokenizer.cache", "a"], ["--out", "a"])),
])  # fmt: skip
def test_the_command_answers_in_one_line(world, tmp_path, monkeypatch, words, line):
    monkeypatch.setattr("sys.argv", ["mimetic", "tokens", str(world / "tokenizer"), str(world / "data"), str(tmp_path / "out"),
                                     "--config", str(world / "recipe.yaml"), *words])  # fmt: skip
    with pytest.raises(MimeticError) as refusal:
        dispatch()
    assert str(refusal.value) == line
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_takes_and_how_to_go_on(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mimetic", "tokens", str(world / "tokenizer"), str(world / "data"), str(tmp_path / "out"),
                                     "--views", "3", "--config", str(world / "recipe.yaml"), "--workers", "1",
                                     "--views.flip", "0"])  # fmt: skip
    dispatch()
    told = capsys.readouterr().out.splitlines()
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    assert told[0].startswith("tokens of 600 views in 4 files, ")
    assert "a batch of 16 takes" in told[0]
    assert told[1] == f"3 views of 200 images in {tmp_path}/out: 4 files, {size / 1e6:.1f} MB"
    assert f"--tokenizer.cache {tmp_path}/out --views.flip 0; 3 epochs see each view once" in told[2]
    assert read_contents(tmp_path / "out").terms["views.flip"] == 0.0
    assert abs(float(told[0].split("files, ")[1].split(" MB")[0]) - size / 1e6) < 0.1
