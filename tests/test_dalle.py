"""DALL-E's dVAE against the package dall_e and transformers' FLAVA, and files of it from anywhere, hostile ones included."""

import collections
import copy
import hashlib
import json
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dall_e
import pytest
import torch
from attack_pickles import Calls, as_legacy, as_zip, attacks, global_pickle
from faulty_server import serving
from safetensors.torch import save_file
from tinyruns import beit_arguments, flip_byte, losses, run_here
from torch import nn
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig
from transformers.modeling_utils import PreTrainedModel  # noqa: F401  # loaded before warnings are errors in a test

import mimetic
from mimetic import cli
from mimetic.engine.errors import CheckpointError, MimeticError, SettingError
from mimetic.tokenizers import published
from mimetic.tokenizers.contract import EncodesInAnyPrecision, ImageTokenizer, check_image_fits
from mimetic.tokenizers.dalle import DalleTokenizer, DalleVAE
from mimetic.tokenizers.dvae import DVAE
from mimetic.tokenizers.files import open_tokenizer, save_tokenizer, tokenizer_hash
from mimetic.tokenizers.importing import import_tokenizer, read_state

SMALL = {"n_hid": 64, "n_blk_per_group": 1, "vocab_size": 512}  # the least that dall_e allows


def perturbed(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of a scale at which every path matters, biases that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 1 else 1.6 / p[0].numel() ** 0.5))
    return module.eval()


def images(count: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Patches of colour, so that cells differ, and some noise."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(count, channels, -(-height // 6), -(-width // 6), generator=generator).round()
    wide = patches.repeat_interleave(6, 2).repeat_interleave(6, 3)[..., :height, :width]
    return 0.9 * wide + 0.1 * torch.rand(count, channels, height, width, generator=generator)


@pytest.fixture(scope="module")
def theirs() -> tuple[nn.Module, nn.Module]:
    return perturbed(dall_e.Encoder(**SMALL), 1), perturbed(dall_e.Decoder(n_init=32, **SMALL), 2)


@pytest.fixture(scope="module")
def pickles(theirs, tmp_path_factory) -> Path:
    """A folder with encoder.pkl and decoder.pkl, as OpenAI's are: pickled modules."""
    folder = tmp_path_factory.mktemp("pickles")
    for name, module in zip(("encoder", "decoder"), theirs, strict=True):
        torch.save(module, folder / f"{name}.pkl")
    return folder


@pytest.fixture(scope="module")
def imported(pickles, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "dalle"
    import_tokenizer(pickles / "encoder.pkl", out)
    return out


def test_ids_logits_and_pictures_are_those_of_dall_e(theirs, imported):
    encoder, decoder = theirs
    ours = open_tokenizer(imported)
    image_BCHW = images(3, 3, 40, 24)
    with torch.no_grad():
        logits_BVPQ = encoder(dall_e.map_pixels(image_BCHW))
    assert logits_BVPQ.std() > 0.1
    assert (ours.logits(image_BCHW).movedim(-1, 1) - logits_BVPQ).abs().max() < 1e-4
    ids_BPQ = ours.encode(image_BCHW)
    assert ids_BPQ.dtype == torch.int64
    assert torch.equal(ids_BPQ, logits_BVPQ.argmax(1))
    assert ids_BPQ.unique().numel() > 5
    with torch.no_grad():
        one_hot_BVPQ = nn.functional.one_hot(ids_BPQ, 512).movedim(-1, 1).float()
        statistics = decoder(one_hot_BVPQ)
        expected = dall_e.unmap_pixels(torch.sigmoid(statistics[:, :3]).float())
    assert (ours.draw(ids_BPQ) - statistics).abs().max() < 1e-4
    assert (ours.decode(ids_BPQ) - expected).abs().max() < 1e-4
    assert expected.std() > 0.05


def test_the_published_size_has_the_published_names_and_shapes():
    """At full size only shapes: what the network computes does not depend on it."""
    with torch.device("meta"):
        ours = DalleVAE()
    assert sum(p.numel() for p in ours.encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in ours.decoder.parameters()) == 43_829_766
    for side, kind in (("encoder", dall_e.Encoder), ("decoder", dall_e.Decoder)):
        theirs = {name: p.shape for name, p in kind(device=torch.device("meta")).named_parameters()}
        found = {name: p.shape for name, p in getattr(ours, side).named_parameters()}
        assert {f"blocks.{name.replace('weight', 'w').replace('bias', 'b')}": shape for name, shape in found.items()} == theirs


def test_ids_are_those_of_flava(tmp_path):
    config = FlavaImageCodebookConfig(vocab_size=300, hidden_size=16, num_blocks_per_group=2)
    flava = perturbed(FlavaImageCodebook(config), 3)
    files = {
        "model.safetensors": lambda path: save_file({f"image_codebook.{k}": v for k, v in flava.state_dict().items()}
                                                    | {"flava.logit_scale": torch.ones(1)}, path),
        "own.safetensors": lambda path: save_file(flava.state_dict(), path),
        "pytorch_model.bin": lambda path: torch.save({f"image_codebook.{k}": v for k, v in flava.state_dict().items()}, path),
        "before-2020.bin": lambda path: torch.save(flava.state_dict(), path, _use_new_zipfile_serialization=False),
    }  # fmt: skip
    image_BCHW = images(2, 3, 32, 32)
    expected_BPQ = flava.get_codebook_indices(dall_e.map_pixels(image_BCHW))
    assert expected_BPQ.unique().numel() > 5
    for name, write in files.items():
        folder = tmp_path / f"of-{name}"
        folder.mkdir()
        write(folder / name)
        ours = import_tokenizer(folder if name in ("model.safetensors", "pytorch_model.bin") else folder / name, tmp_path / f"out-{name}")
        assert torch.equal(ours.encode(image_BCHW), expected_BPQ), name
        assert not hasattr(ours, "decode")
        assert type(open_tokenizer(tmp_path / f"out-{name}")) is DalleTokenizer


def test_safetensors_with_the_names_of_dall_e(theirs, imported, tmp_path):
    encoder, decoder = theirs
    both = {f"encoder.{k}": v for k, v in encoder.state_dict().items()} | {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    save_file(both, tmp_path / "both.safetensors")
    save_file(dict(encoder.state_dict()), tmp_path / "one.safetensors")
    save_file(dict(decoder.state_dict()), tmp_path / "other.safetensors")
    wanted = open_tokenizer(imported).state_dict()
    apart = import_tokenizer(tmp_path / "one.safetensors", tmp_path / "apart", tmp_path / "other.safetensors")
    for ours in (import_tokenizer(tmp_path / "both.safetensors", tmp_path / "both"), apart):
        assert type(ours) is DalleVAE
        assert all(torch.equal(wanted[name], value) for name, value in ours.state_dict().items())


def test_the_folder_says_where_it_comes_from_and_a_changed_byte_is_found(imported, pickles, tmp_path):
    told = json.loads((imported / "tokenizer.json").read_text())
    assert told["kind"] == "dalle"
    assert told["arguments"] == {"vocab_size": 512, "in_channels": 3, "n_hid": 64, "n_blk_per_group": 1, "n_init": 32}
    assert [source["file"] for source in told["source"]] == ["encoder.pkl", "decoder.pkl"]
    assert [source["format"] for source in told["source"]] == ["pickled module", "pickled module"]
    assert told["source"][0]["sha256"] == hashlib.sha256((pickles / "encoder.pkl").read_bytes()).hexdigest()
    again = tmp_path / "again"
    import_tokenizer(pickles / "encoder.pkl", again)
    assert tokenizer_hash(again) == tokenizer_hash(imported)
    flip_byte(again / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has sha256 .* damaged or replaced"):
        open_tokenizer(again)


def test_bf16_differs_only_where_two_codes_are_nearly_as_likely():
    ours = perturbed(DalleVAE(512, 3, 32, 2), 4).requires_grad_(False)
    image_BCHW = images(8, 3, 48, 48)
    exact = ours.logits(image_BCHW)
    fast = copy.deepcopy(ours)
    fast.encode_in(torch.bfloat16)
    assert fast.encoder.output.conv.weight.dtype == torch.float32
    rough = fast.logits(image_BCHW)
    assert rough.dtype == torch.float32
    error = (rough - exact).abs().max()
    assert 0 < error < 0.1 * exact.std()
    best = exact.topk(2).values
    differs = fast.encode(image_BCHW) != ours.encode(image_BCHW)
    assert differs.float().mean() < 0.1
    assert (best[..., 0] - best[..., 1])[differs].max() < 2 * error if differs.any() else True
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.encode(image_BCHW), exact.argmax(-1))
        assert torch.equal(fast.encode(image_BCHW), rough.argmax(-1))


@torch.no_grad()
def test_ids_of_another_batch_shape_differ_at_near_ties_alone():
    """What a token cache says of itself: kernels may round otherwise for other shapes, and only codes that fit alike may trade places."""
    ours = perturbed(DalleTokenizer(512, 3, 16, 1))
    image_BCHW = images(24, 3, 32, 32)
    whole_BPQV, single_BPQV = ours.logits(image_BCHW), torch.cat([ours.logits(image_1CHW[None]) for image_1CHW in image_BCHW])
    error = (whole_BPQV - single_BPQV).abs().max()
    assert error < 1e-4 * whole_BPQV.std()
    differs_BPQ = whole_BPQV.argmax(-1) != single_BPQV.argmax(-1)
    best = whole_BPQV.topk(2).values
    assert (best[..., 0] - best[..., 1])[differs_BPQ].le(2 * error).all()
    assert (ours.encode(image_BCHW) == whole_BPQV.argmax(-1)).all()


def test_a_trained_dvae_encodes_in_bf16_too(tmp_path):
    torch.manual_seed(0)
    dvae = DVAE(64, 8, 3, width=32)
    image_BCHW = images(32, 3, 6, 6).repeat_interleave(8, -1).repeat_interleave(8, -2)
    dvae.seed_codebook(image_BCHW)
    nn.init.normal_(dvae.encoder[-1].weight, std=0.02)
    save_tokenizer(dvae, tmp_path / "dvae")
    exact, fast = open_tokenizer(tmp_path / "dvae"), open_tokenizer(tmp_path / "dvae", "bf16")
    assert fast.encoder[0].weight.dtype == torch.bfloat16
    assert fast.features(image_BCHW).dtype == torch.float32
    assert (fast.features(image_BCHW) - exact.features(image_BCHW)).abs().max() > 0
    assert (fast.encode(image_BCHW) == exact.encode(image_BCHW)).float().mean() > 0.98
    assert torch.equal(fast.decode(exact.encode(image_BCHW)), exact.decode(exact.encode(image_BCHW)))
    for wrong in ("fp16", "bfloat16"):
        with pytest.raises(SettingError, match=f"precision {wrong}.*fp32 or bf16"):
            open_tokenizer(tmp_path / "dvae", wrong)


def test_it_keeps_the_contract():
    ours = DalleVAE(16, 1, 8, 1, 8)
    assert isinstance(ours, ImageTokenizer)
    assert isinstance(ours, EncodesInAnyPrecision)
    assert (ours.vocab_size, ours.stride, ours.in_channels) == (16, 8, 1)
    again = DalleVAE(**ours.config)
    again.load_state_dict(ours.state_dict())
    ids_BPQ = ours.encode(images(2, 1, 16, 24))
    assert ids_BPQ.shape == (2, 2, 3)
    assert torch.equal(again.encode(images(2, 1, 16, 24)), ids_BPQ)
    assert ours.decode(ids_BPQ).shape == (2, 1, 16, 24)
    assert 0 <= ours.decode(ids_BPQ).min() <= ours.decode(ids_BPQ).max() <= 1


def test_beit_pretrains_on_its_ids_in_either_precision(world, tmp_path):
    torch.manual_seed(0)
    save_tokenizer(perturbed(DalleVAE(32, 1, 8, 1, 8)), tmp_path / "dalle")
    found = {}
    for precision in ("fp32", "bf16"):
        arguments = beit_arguments(world, tmp_path / precision, train__steps=3, tokenizer__path=tmp_path / "dalle",
                                   tokenizer__accept_collapsed="true")  # fmt: skip
        found[precision] = losses(run_here("beit", [*arguments, "--tokenizer.precision", precision]))
    assert len(found["bf16"]) == len(found["fp32"]) == 3
    assert found["bf16"] == pytest.approx(found["fp32"], abs=0.1)
    with pytest.raises(SettingError, match=r"tokenizer\.precision is 'fp16'; it must be fp32 or bf16"):
        run_here("beit", [*arguments, "--tokenizer.precision", "fp16"])


@pytest.mark.parametrize("tokenizer", [DalleVAE(16, 3, 8, 1, 8), DVAE(16, 8, 3, width=16)], ids=["dalle", "dvae"])
def test_unfit_images_are_refused_in_one_line(tokenizer):
    unfit = {
        r"width 30 .*stride 8.* 24 or 32": images(1, 3, 32, 30),
        r"\(batch, 3, .*\(1, 1, 8, 8\).*3 channel": images(1, 1, 8, 8),
        r"floats in \[0, 1\], and got uint8: divide by 255": torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        r"\[0, 1\], and got 0 to 255: divide by 255": torch.linspace(0, 255, 192).view(1, 3, 8, 8),
        r"\[0, 1\], and got -2 to 1: .*do not normalize": torch.linspace(-2, 1, 192).view(1, 3, 8, 8),
        r"got nan to nan": torch.full((1, 3, 8, 8), 0.5).index_fill(2, torch.tensor(3), torch.nan),
    }  # fmt: skip
    for told, image_BCHW in unfit.items():
        with pytest.raises(SettingError, match=told) as caught:
            tokenizer.encode(image_BCHW)
        assert "\n" not in str(caught.value)
    assert tokenizer.encode(images(0, 3, 8, 8)).shape == (0, 1, 1)


def test_the_range_is_looked_at_without_a_graph_break():
    def checked(image_BCHW: torch.Tensor) -> torch.Tensor:
        check_image_fits(image_BCHW, 8, 3)
        return image_BCHW * 2

    compiled = torch.compile(checked, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images(1, 3, 8, 8)), 2 * images(1, 3, 8, 8))
    with pytest.raises(RuntimeError, match=r"pixels in \[0, 1\]"):
        compiled(3 * images(1, 3, 8, 8))


def test_no_file_gets_code_run(tmp_path, capfd):
    witness, out = tmp_path / "witness", tmp_path / "out"
    (tmp_path / "evil.py").write_text(f"open({str(witness)!r}, 'w')")
    (tmp_path / "hubconf.py").write_text(f"open({str(witness)!r}, 'w')")
    (tmp_path / "evil.npy").write_bytes(pickle.dumps(Calls(eval, f"open({str(witness)!r}, 'w')")))
    for name, content in attacks(witness).items():
        for wrapped, suffix in ((as_zip(content), "zip"), (as_legacy(content), "legacy"), (content, "bare")):
            file = tmp_path / f"{suffix} {name}.pkl"
            file.write_bytes(wrapped)
            with pytest.raises(CheckpointError) as caught:
                import_tokenizer(file, out)
            assert not witness.exists(), file
            assert str(file) in str(caught.value)
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 600
    assert not out.exists()
    assert capfd.readouterr() == ("", "")


def test_the_attacks_are_real(tmp_path):
    """Python's own unpickler falls for them, so the test above tests something."""
    witness = tmp_path / "witness"
    by_hand = attacks(witness)
    for name in ("os.system", "posix.system", "builtins.eval", "builtins.exec", "__builtin__.eval", "subprocess", "__setstate__", "nested",
                 "protocol 5", "STACK_GLOBAL", "INST", "OBJ", "BUILD"):  # fmt: skip
        pickle.loads(by_hand[name])
        assert witness.exists(), name
        witness.unlink()


def test_the_line_names_what_the_file_asks_for(tmp_path):
    file = tmp_path / "encoder.pkl"
    for wrapped in (as_zip, as_legacy):
        for module in ("posix", "runpy"):
            file.write_bytes(wrapped(global_pickle(module, "system", "true")))
            with pytest.raises(CheckpointError, match=rf"encoder\.pkl is refused: it asks for {module}\.system, .*nothing of it was run"):
                read_state(file)


def test_a_module_of_the_old_format_is_refused_with_the_cure(theirs, tmp_path):
    torch.save(theirs[0], tmp_path / "encoder.pkl", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before 2020.*save its state_dict instead, as safetensors"):
        read_state(tmp_path / "encoder.pkl")


def test_states_that_are_not_this_network_are_refused_in_one_line(theirs, tmp_path):
    good = theirs[0].state_dict()
    name = "blocks.group_2.block_1.res_path.conv_2.w"
    state = {
        "missing": ({k: v for k, v in good.items() if k != name}, r"encoder\.group_2\.block_1\.res_path\.conv_2\.weight is missing"),
        "shape": (good | {name: torch.zeros(3, 3)}, r"conv_2\.weight is \(3, 3\), and \(32, 32, 3, 3\)"),
        "more": (good | {"blocks.group_9.w": torch.zeros(1)}, r"group_9\.weight is \(1,\), and not expected"),
        "nan": (good | {name: torch.full_like(good[name], torch.nan)}, "not finite"),
        "integers": (good | {name: good[name].int()}, "torch.int32"),
        "8 bits": (good | {name: good[name].to(torch.float8_e4m3fn)}, "torch.float8_e4m3fn"),
        "pretence": (good | {name: torch.zeros(1).expand(1 << 40)}, "claims 1,099,511,627,776 numbers"),
        "nothing": ({"weight": torch.zeros(1)}, "no tokenizer that is known here"),
        "flat": (good | {"blocks.input.w": torch.zeros(64)}, "holds no encoder"),
        "no block": ({k: v for k, v in good.items() if "group_1" not in k}, "holds no encoder"),
        "decoder": (theirs[1].state_dict(), "holds no encoder.*--decoder"),
    }
    for case, (content, told) in state.items():
        torch.save(dict(content), tmp_path / f"{case}.pt")
        with pytest.raises(CheckpointError, match=told) as caught:
            import_tokenizer(tmp_path / f"{case}.pt", tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert f"{case}.pt" in str(caught.value)
    (tmp_path / "text.pkl").write_text("<html>404</html>")
    (tmp_path / "empty.pkl").touch()
    (tmp_path / "cut.safetensors").write_bytes(struct.pack("<Q", 999) + b'{"blocks')
    (tmp_path / "folder").mkdir()
    for file in ("text.pkl", "empty.pkl", "cut.safetensors", "folder", "absent.pkl"):
        with pytest.raises(CheckpointError, match=file):
            import_tokenizer(tmp_path / file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_attributes_that_hide_a_tensors_methods_are_left_behind(theirs, tmp_path):
    good = theirs[0].state_dict()
    for method in ("numel", "isfinite", "detach", "element_size", "to", "contiguous"):
        hiding = good["blocks.input.w"].clone()
        setattr(hiding, method, collections.OrderedDict)
        torch.save(good | {"blocks.input.w": hiding}, tmp_path / "state.pt")
        assert torch.equal(read_state(tmp_path / "state.pt")[0]["encoder.input.weight"], good["blocks.input.w"])


def test_modules_that_hold_each_other_again_and_again_are_walked_once(tmp_path):
    """60 of them, each holding the next one twice: 2**60 names."""
    module = b"cdall_e.encoder\nEncoder\n)\x81}X\x08\x00\x00\x00_modules}"
    content = b"cdall_e.encoder\nEncoder\n)\x81q\x00"
    for number in range(60):
        content = (module + b"(X\x01\x00\x00\x00a" + content + b"X\x01\x00\x00\x00bh" + bytes([number]) + b"usbq" + bytes([number + 1]))
    (tmp_path / "encoder.pkl").write_bytes(as_zip(b"\x80\x02" + content + b"."))
    with pytest.raises(CheckpointError, match="no tokenizer that is known here"):
        read_state(tmp_path / "encoder.pkl")


def test_neither_the_source_nor_a_trained_tokenizer_is_written_over(theirs, tmp_path):
    """It holds a model.safetensors, as a tokenizer's folder does, and nothing else."""
    save_file(dict(theirs[0].state_dict()), tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(SettingError, match=r"there is model\.safetensors.*new folder"):
        import_tokenizer(tmp_path, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    save_tokenizer(DVAE(16, 8, 3, width=16), tmp_path / "trained")
    with pytest.raises(SettingError, match=r"trained is no folder of an earlier import alone"):
        import_tokenizer(tmp_path, tmp_path / "trained")


def test_an_import_takes_no_folder_of_somebody(pickles, imported, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").touch()
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(SettingError, match=r"there is mine\.txt.*new folder"):
            import_tokenizer(pickles / "encoder.pkl", out)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match="new folder"):
        import_tokenizer(pickles / "encoder.pkl", Path())
    with pytest.raises(CheckpointError, match=r"encoder\.pkl holds an encoder"):
        import_tokenizer(pickles / "encoder.pkl", tmp_path / "out", pickles / "encoder.pkl")


def command(*words: object) -> None:
    cli.sys.argv = ["mimetic", *map(str, words)]
    cli.dispatch()


def test_the_command(pickles, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.sys, "argv", [])
    command("tokenizer", "import", pickles / "encoder.pkl", tmp_path / "out")
    assert "tokenizer of 512 codes, stride 8, 3 channels" in capsys.readouterr().out
    assert hasattr(mimetic.open_tokenizer(tmp_path / "out"), "decode")
    with pytest.raises(SettingError, match="VERB"):
        command("tokenizer", "export", "a", "b")
    with pytest.raises(MimeticError, match="absent"):
        command("tokenizer", "import", "absent", tmp_path / "out")


@pytest.fixture
def home(tmp_path, monkeypatch, pickles) -> Path:
    """The user's own folder, and hashes as if the pickles here were the published ones."""
    monkeypatch.setenv("MIMETIC_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(published, "PATIENCE", 1.0)
    monkeypatch.setattr(published, "TELL", 0.0)
    monkeypatch.chdir(tmp_path)
    sha256 = hashlib.sha256((pickles / "encoder.pkl").read_bytes()).hexdigest()
    monkeypatch.setattr(published, "FILES", {"encoder.pkl": sha256, "decoder.pkl": None})
    return tmp_path / "home/tokenizers"


def test_the_published_tokenizer_is_fetched_once_over_a_bad_line(home, pickles, imported, monkeypatch, capsys):
    with serving(pickles) as server:
        monkeypatch.setattr(published, "ADDRESS", server.address)
        server.faults = ["drop", "500", "short"]
        ours = mimetic.open_tokenizer("dalle")
        assert server.asked == {"encoder.pkl": 1, "decoder.pkl": 1}
        assert server.again["encoder.pkl"] >= 1
        mimetic.open_tokenizer("dalle", "bf16")
        assert server.asked.total() == 2
    image_BCHW = images(1, 3, 32, 32)
    assert torch.equal(ours.encode(image_BCHW), open_tokenizer(imported).encode(image_BCHW))
    assert tokenizer_hash("dalle") == tokenizer_hash(imported)
    assert sorted(path.name for path in home.iterdir()) == [".dalle.lock", "dalle"]
    out = capsys.readouterr().out
    assert "as expected" in out
    assert "no published one to compare" in out
    assert " MB of " in out


def test_of_two_that_ask_at_the_same_time_one_fetches(home, pickles, monkeypatch):
    with serving(pickles) as server, ThreadPoolExecutor(2) as both:
        monkeypatch.setattr(published, "ADDRESS", server.address)
        opened = list(both.map(mimetic.open_tokenizer, ["dalle", "dalle"]))
        assert server.asked == {"encoder.pkl": 1, "decoder.pkl": 1}
    assert [tokenizer.vocab_size for tokenizer in opened] == [512, 512]


def test_another_file_than_the_published_one_is_refused(home, pickles, monkeypatch):
    with serving(pickles) as server:
        monkeypatch.setattr(published, "ADDRESS", server.address)
        server.faults = ["garbage"]
        with pytest.raises(CheckpointError, match=r"encoder\.pkl has sha256 \w{12}\.\.\., \w{12}\.\.\. was expected") as caught:
            mimetic.open_tokenizer("dalle")
        assert "\n" not in str(caught.value)
        assert not list(home.glob("dalle*"))
        mimetic.open_tokenizer("dalle")


def test_without_a_network_it_says_what_to_put_where(home, pickles, monkeypatch):
    monkeypatch.setattr(published, "ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"not here yet.*mimetic tokenizer import encoder\.pkl") as caught:
        mimetic.open_tokenizer("dalle")
    assert "\n" not in str(caught.value)
    told = str(caught.value).split("`")[1]
    command(*told.split()[1:-2], pickles / "encoder.pkl", told.split()[-1])
    assert mimetic.open_tokenizer("dalle").vocab_size == 512


def test_a_place_that_cannot_be_written_is_named(pickles, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIMETIC_HOME", str(tmp_path / "file"))
    with pytest.raises(SettingError, match=r"file/tokenizers cannot be written \(Not a directory\); set MIMETIC_HOME"):
        mimetic.open_tokenizer("dalle")
    with pytest.raises(SettingError, match=r"file/out cannot be written \(Not a directory\)"):
        import_tokenizer(pickles / "encoder.pkl", tmp_path / "file/out")


def test_a_folder_of_that_name_comes_first(home, imported, tmp_path):
    (tmp_path / "dalle").symlink_to(imported)
    assert open_tokenizer("dalle").vocab_size == 512
    assert not home.exists()


def test_the_users_folder(monkeypatch):
    for name in ("MIMETIC_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert published.tokenizers_folder() == Path.home() / ".cache/mimetic/tokenizers"
    monkeypatch.setenv("XDG_CACHE_HOME", "/a")
    assert published.tokenizers_folder() == Path("/a/mimetic/tokenizers")
    monkeypatch.setenv("MIMETIC_HOME", "/b")
    assert published.tokenizers_folder() == Path("/b/tokenizers")
