"""Looking inside: rollout against plain NumPy, distances, positions, reach against gradients, and the picture.

Legend: B batch, P Q patch grid, N tokens, n heads, l layers.
"""

import functools
import itertools
import re

import numpy as np
import pytest
import timm
import torch
from oracles import perturb_, worst
from PIL import Image
from sklearn.datasets import load_sample_images
from test_conformance import images, small
from test_first_hour import Entry, one_line

from mimetic.backbones.attention import attention_distance, attention_maps, position_similarity, reach, rollout, seen_from
from mimetic.backbones.catalog import create_backbone
from mimetic.backbones.files import save_backbone
from mimetic.engine.errors import SettingError

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 4}
VITS = {
    "vit": ("vit_tiny_patch16_224", {}),
    "vit-without-cls": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "beit-shared": ("beit_base_patch16_224", {"use_shared_rel_pos_bias": True}),
}
every_vit = pytest.mark.parametrize("case", VITS)


def vit(case: str):
    name, overrides = VITS[case]
    return perturb_(create_backbone(name, 5, 20, **SMALL | overrides)).eval()


@every_vit
def test_maps_are_what_the_fused_attention_uses(case):
    """The net's own output, computed again from the exported maps."""
    ours = vit(case)
    image = images(ours)
    maps, inputs = attention_maps(ours, image), []
    handles = [block.attn.register_forward_hook(lambda part, given, out: inputs.append((part, given[0], out))) for block in ours.blocks]
    with torch.no_grad():
        ours(image)
    for handle in handles:
        handle.remove()
    for share_BnNN, (part, x_BND, out) in zip(maps, inputs, strict=True):
        assert torch.allclose(share_BnNN.sum(-1), torch.ones(()), atol=1e-5)
        v = part.qkv(x_BND).unflatten(-1, (3, part.heads, -1))[:, :, 2].transpose(1, 2)
        assert worst(part.proj((share_BnNN @ v).transpose(1, 2).flatten(2)), out) < 1e-5


def test_maps_equal_timms():
    ours = vit("vit")
    theirs = timm.create_model(ours.config["name"], **ours.timm_arguments()).eval()
    theirs.load_state_dict(ours.timm_state_dict())
    found = []
    for block in theirs.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda part, given, out: found.append(out))
    with torch.no_grad():
        theirs(images(ours))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(attention_maps(ours, images(ours)), found, strict=True))


def plain_rollout(maps: list[np.ndarray], fuse: str, discard: float) -> np.ndarray:
    """The equation in NumPy, image by image."""
    results = []
    for image in range(len(maps[0])):
        result = np.eye(maps[0].shape[-1])
        for a in maps:
            fused = {"mean": np.mean, "max": np.max, "min": np.min}[fuse](a[image], axis=0).copy()
            order = np.argsort(fused.ravel(), kind="stable")
            fused.ravel()[order[: int(discard * fused.size)]] = 0
            step = fused + np.eye(len(fused))
            result = (step / step.sum(1, keepdims=True)) @ result
        results.append(result)
    return np.stack(results)


@pytest.mark.parametrize(("fuse", "discard"), list(itertools.product(["mean", "max", "min"], [0.0, 0.5, 0.9])))
@every_vit
def test_rollout_equals_numpy_on_the_exported_maps(case, fuse, discard):
    ours = vit(case).double()
    maps = attention_maps(ours, images(ours))
    found = rollout(maps, fuse, discard)
    assert len(found) == 3
    for layers in (1, 3):
        assert np.allclose(found[layers - 1], plain_rollout([m.numpy() for m in maps[:layers]], fuse, discard), atol=1e-12)
    seen = seen_from(ours, found[-1])
    whole = found[-1][:, 0] if ours.has_cls else found[-1].mean(1)
    assert np.allclose(seen.flatten(1), whole[:, -25:])
    assert np.allclose(seen_from(ours, found[-1], (1, 2)).flatten(1), found[-1][:, -25 + 7, -25:])


def test_distance_of_known_maps():
    ours = vit("vit")
    even, own = torch.full((1, 1, 26, 26), 1 / 26), torch.eye(26)[None, None]
    at = np.stack(np.meshgrid(np.arange(5), np.arange(5), indexing="ij"), -1).reshape(-1, 2) * 4
    expected = np.linalg.norm(at[:, None] - at[None], axis=-1).mean()
    found = attention_distance(ours, [even, own])
    assert found.shape == (2, 1)
    assert found[:, 0].tolist() == pytest.approx([expected, 0.0], abs=1e-5)


def test_positions_are_likest_to_themselves():
    ours = vit("distilled")
    similar = position_similarity(ours)
    positions = ours.patch_embed.pos_embed.detach()[0, 2:].numpy()
    unit = positions / np.linalg.norm(positions, axis=1, keepdims=True)
    assert np.allclose(similar.reshape(25, 25), unit @ unit.T, atol=1e-5)
    assert position_similarity(vit("beit")) is None


@pytest.mark.parametrize("case", ["swin", "swinv2", "swin-oblong"])
def test_reach_is_where_gradients_come_from(case):
    ours = small(case, torch.float64, classes=0)
    patch = 2
    for cell in ((0, 0), (1, 2), (3, 3)):
        for block, seen_hw in enumerate(reach(ours, cell)):
            image = images(ours, 1).requires_grad_()
            map_BDhw = ours.forward_features(image, layers=(block,)).layers[0]
            grid = map_BDhw.shape[-2:]
            row, column = (int((at + 0.5) * side / last) for at, side, last in zip(cell, grid, ours.feature_grid, strict=True))
            map_BDhw[0, :, row, column].square().sum().backward()
            expected = torch.nn.functional.max_pool2d(image.grad[0].abs().amax(0)[None], patch)[0] > 0
            assert torch.equal(seen_hw, expected)


def test_reach_of_the_other_families():
    local, whole = reach(small("svt"), (0, 0))[:2]
    assert torch.equal(local.nonzero().amax(0), torch.tensor([3, 3])), "a window of 4 x 4"
    assert whole.all()
    assert reach(small("svt"), (1, 1))[0].all(), "at a corner of its window the convolution looks into the three others"
    pooled = reach(small("poolformer"), (0, 0))
    assert pooled[0].sum() == 9
    assert [int(seen.sum()) for seen in pooled] == sorted(int(seen.sum()) for seen in pooled)
    assert reach(small("maxvit"), (0, 0))[0].shape == (16, 16)
    assert reach(small("pcpvt"), (0, 0))[0].all()


@pytest.mark.parametrize("case", ["vit", "mixer"])
def test_reach_is_refused_where_everything_is_mixed(case):
    with pytest.raises(SettingError, match="mixes all places in every block"):
        reach(small(case), (0, 0))


@pytest.mark.parametrize(("arguments", "words"), [({"fuse": "median"}, "mean, max, min"), ({"discard": 1.0}, r"discard 1; .* \[0, 1\)")])
def test_bad_rollouts_are_named(arguments, words):
    with pytest.raises(SettingError, match=words):
        rollout([torch.eye(3)[None, None]], **arguments)


# The command


@pytest.fixture
def command(monkeypatch, capsys):
    return functools.partial(Entry(monkeypatch, capsys), "mimetic")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "flower.png"
    Image.fromarray(load_sample_images().images[1]).save(path)
    return path


@pytest.mark.parametrize("case", ["vit", "vit-without-cls", "beit", "distilled", "swin", "swinv2", "svt", "maxvit", "poolformer"])
def test_the_command_draws_a_picture(case, photo, tmp_path, command):
    ours = vit(case) if case in VITS else small(case)
    save_backbone(ours, tmp_path / "net", mean=[0.5] * 3, std=[0.5] * 3)
    code, out, err = command("attention", tmp_path / "net", photo, "--out", tmp_path / "drawn/picture.png", "--cell", 1, 2)
    assert (code, err) == (0, "")
    assert out.startswith("drawing where ")
    assert out.endswith(f"picture in {tmp_path / 'drawn/picture.png'}\n")
    picture = np.asarray(Image.open(tmp_path / "drawn/picture.png").convert("RGB"))
    assert picture.shape[1] > 1200
    assert picture.std() > 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{net}", "{photo}", "--cell", 9, 0], r"cell 9, 0 is outside the 5x5 grid"),
        (["{net}", "{photo}", "--discard", 1.5], r"discard 1\.5; .*\[0, 1\)"),
        (["{net}", "{photo}", "--out", "x.jpg"], r"--out x\.jpg must end in \.png"),
        (["{net}", "{net}/config.json"], r"config\.json is no readable image \(cannot identify image file\)"),
        (["{net}", "nowhere.jpg"], r"nowhere\.jpg is no readable image \(No such file"),
        (["nowhere", "{photo}"], r"nowhere: no backbone there"),
        (["{mixer}", "{photo}"], r"mixer_s16_224 mixes all places in every block"),
    ],
)
def test_what_it_cannot_draw_is_one_line(words, message, photo, tmp_path, command):
    save_backbone(vit("vit"), tmp_path / "net", mean=[0.5] * 3, std=[0.5] * 3)
    save_backbone(small("mixer"), tmp_path / "mixer", mean=[0.5] * 3, std=[0.5] * 3)
    places = {"net": tmp_path / "net", "mixer": tmp_path / "mixer", "photo": photo}
    code, _, err = command("attention", *(str(word).format(**places) for word in words))
    assert re.search(message, one_line(code, err))
