"""Frozen teachers of VQ-KD: any net that turns images in [0, 1] into a feature map, with its own normalization and input size.

Legend: B batch, C channels, H W pixels, h w feature grid, N tokens, D width.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mimetic.backbones.adapter import TimmBackbone
from mimetic.backbones.catalog import ADAPTED, create_backbone
from mimetic.backbones.contract import Backbone
from mimetic.backbones.files import backbone_folder, load_backbone
from mimetic.data.views import Normalize
from mimetic.engine.errors import CheckpointError, MimeticError, SettingError

TRANSFORMERS = "transformers:"
INSIDE = ("state_dict", "model")  # under which training scripts keep weights in a .pth


class Teacher(nn.Module):
    """`image_BCHW` in [0, 1] -> `map_BDhw`, float32, without gradient.

    Args:
        net: normalized images of its own size to a feature map.
        image_size: that side in pixels.
        mean: per channel in [0, 1], what its input is normalized with. As many values as it has channels.
        std: likewise.
        channels: C of the images that will come. A grey image is repeated for a coloured teacher.

    Attributes:
        width: D.

    Raises:
        SettingError: the channels do not fit, or the net yields no feature map.
    """

    def __init__(self, net: nn.Module, image_size: int, mean: Sequence[float], std: Sequence[float], channels: int) -> None:
        super().__init__()
        if channels not in (1, len(mean)):
            raise SettingError(f"the teacher sees {len(mean)} channels, the images have {channels}; take a teacher for {channels}, or pack "
                               f"the images with --channels {len(mean)}")  # fmt: skip
        self.net, self.image_size, self.channels = net.eval().requires_grad_(False), image_size, len(mean)
        self.normalize = Normalize(tuple(mean), tuple(std))
        map_BDhw = self(torch.zeros(1, channels, image_size, image_size))
        if map_BDhw.dim() != 4:
            raise SettingError(f"the teacher yields {tuple(map_BDhw.shape)} for one image, no feature map (1, D, h, w); take another")
        self.width = map_BDhw.shape[1]

    @torch.no_grad()
    def forward(self, image_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1], of any size -> (B, D, h, w)."""
        size = (self.image_size, self.image_size)
        if image_BCHW.shape[-2:] != size:
            image_BCHW = F.interpolate(image_BCHW, size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.net(self.normalize(image_BCHW.expand(-1, self.channels, -1, -1))).float()


class BackboneMap(nn.Module):
    """The last map of a backbone in our contract."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Normalized (B, C, H, W) -> (B, D, h, w)."""
        return self.backbone.forward_features(image_BCHW).map_BDhw


class TransformersMap(nn.Module):
    """The last map of a vision model of transformers: its patch tokens, without [CLS] and registers, which come first.

    Of CLIP, what the paper uses: every token through the last norm and the projection into the space that images share with texts.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.vision = getattr(net, "vision_model", net)
        self.projection = getattr(net, "visual_projection", None)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Normalized (B, C, H, W) -> (B, D, h, w)."""
        x = self.vision(pixel_values=image_BCHW).last_hidden_state
        if x.dim() == 4:  # a convolutional net
            return x
        if self.projection is not None:
            x = self.projection(self.vision.post_layernorm(x))
        h, w = (side // self.vision.config.patch_size for side in image_BCHW.shape[-2:])
        return rearrange(x[:, x.shape[1] - h * w :], "B (h w) D -> B D h w", h=h)


def open_teacher(path: str, channels: int, *, weights: str | None = None, image_size: int | None = None,
                 mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Teacher:  # fmt: skip
    """A teacher by name; nothing is downloaded.

    Args:
        path: a finished run or an exported folder of this program, `timm:NAME` with `weights`, or `transformers:FOLDER`.
        channels: C of the images that it will see.
        weights: of a timm net: .safetensors, or a .pth that needs no code to be read.
        image_size: side in pixels that images are resized to for it; the default is its own.
        mean: per channel in [0, 1]; the default is its own.
        std: likewise.

    Raises:
        SettingError: no weights, or weights for what brings its own; channels or a size that do not fit.
        CheckpointError: a file or folder is missing, damaged, or fits another net.
    """
    if weights is not None and not path.startswith(ADAPTED):
        raise SettingError(f"teacher.weights is {weights}, but {path} brings its own; leave it out")
    if path.startswith(ADAPTED):
        net, size, own = _of_timm(path, weights, image_size)
    elif path.startswith(TRANSFORMERS):
        net, size, own = _of_transformers(Path(path.removeprefix(TRANSFORMERS)), image_size)
    else:
        net, size, own = _exported(path, image_size)
    for name, given, known in (("mean", mean, own[0]), ("std", std, own[1])):
        if given and known and len(given) != len(known):
            raise SettingError(f"teacher.{name} has {len(given)} values, {path} sees {len(known)} channels; give one for each")
    mean, std = mean or own[0], std or own[1]
    if mean is None or std is None:
        raise SettingError(f"{path} does not say what its input is normalized with; set teacher.mean and teacher.std")
    try:
        return Teacher(net, size, mean, std, channels)
    except MimeticError:
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {_line(error)}"
        raise SettingError(f"teacher {path} yields no feature map of {size}x{size} pixels ({told}); set teacher.image_size") from None


Opened = tuple[nn.Module, int, tuple[Sequence[float] | None, Sequence[float] | None]]  # net, image size, its mean and deviation


def _exported(path: str, image_size: int | None) -> Opened:
    backbone = load_backbone(path, image_size)
    own = json.loads((backbone_folder(path) / "config.json").read_text())["pretrained_cfg"]
    return BackboneMap(backbone), backbone.image_size[0], (own["mean"], own["std"])


def _of_timm(path: str, weights: str | None, image_size: int | None) -> Opened:
    if weights is None:
        raise SettingError(f"teacher {path} has no weights, and a random teacher teaches nothing; set teacher.weights to a file "
                           "(.safetensors or .pth)")  # fmt: skip
    backbone = create_backbone(path, num_classes=_classes(path), image_size=image_size)
    assert isinstance(backbone, TimmBackbone)
    load_fitting(backbone, read_weights(Path(weights)), weights)
    own = backbone.net.pretrained_cfg
    return BackboneMap(backbone), backbone.image_size[0], (own.get("mean"), own.get("std"))


def _classes(path: str) -> int:
    """Of the name's own classifier, so that files of the whole net fit by order."""
    import timm

    own = timm.get_pretrained_cfg(path.removeprefix(ADAPTED)) if timm.is_model(path.removeprefix(ADAPTED)) else None
    return own.num_classes if own else 0


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors, or from a .pth read without running any code in it.

    Raises:
        CheckpointError: missing, damaged, or not such a file.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = next((state[name] for name in INSIDE if isinstance(state.get(name), Mapping)), state)
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}
    except FileNotFoundError:
        raise CheckpointError(f"teacher.weights {file}: there is no such file") from None
    except Exception as error:
        raise CheckpointError(f"teacher.weights {file} holds no weights that can be read without running code ({type(error).__name__}); "
                              "give a .safetensors, or a .pth of tensors by name") from None  # fmt: skip


def load_fitting(backbone: TimmBackbone, state: Mapping[str, Tensor], named: str) -> None:
    """Loads a timm net: by name, where all names are there but the classifier's; else one after the other.

    The latter is for files of other programs with the same net under other names. Both lists must then have as many entries, of
    the same shapes, in the same order, and the last part of each name (weight, bias, running_mean) must be the same.

    Raises:
        CheckpointError: neither fits.
    """
    own = backbone.net.state_dict()
    needed = {name: value.shape for name, value in own.items() if name not in backbone.heads}
    if all(name in state and state[name].shape == shape for name, shape in needed.items()):
        found = {name: state[name] for name in needed}
    elif [_kind(*entry) for entry in state.items()] == [_kind(*entry) for entry in own.items()]:
        found = dict(zip(own, state.values(), strict=True))
    else:
        misfit = next(name for name, shape in needed.items() if name not in state or state[name].shape != shape)
        theirs = tuple(state[misfit].shape) if misfit in state else "not there"
        raise CheckpointError(f"teacher.weights {named} does not fit {type(backbone.net).__name__}: {misfit} {theirs} in the file, "
                              f"{tuple(needed[misfit])} in the net; nor do its {len(state)} entries fit the net's {len(own)} in order; "
                              "give the weights of this very net")  # fmt: skip
    backbone.net.load_state_dict(found, strict=False)


def _kind(name: str, value: Tensor) -> tuple[str, torch.Size]:
    return name.rpartition(".")[2], value.shape


def _of_transformers(folder: Path, image_size: int | None) -> Opened:
    try:
        import transformers
    except ImportError:
        raise SettingError(f"{TRANSFORMERS}{folder} needs transformers, which is not installed; pip install transformers") from None
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{TRANSFORMERS}{folder}: no config.json there; give a folder that save_pretrained wrote")
    try:
        net = transformers.AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"{TRANSFORMERS}{folder} cannot be opened ({type(error).__name__}: {_line(error)}); it must hold "
                              "model.safetensors and be of a kind that AutoModel knows") from None  # fmt: skip
    file = folder / "preprocessor_config.json"
    own = json.loads(file.read_text()) if file.is_file() else {}
    config = getattr(net.config, "vision_config", net.config)
    size = image_size or getattr(config, "image_size", None) or 224  # a convolutional net's says none
    return TransformersMap(net), int(size), (own.get("image_mean"), own.get("image_std"))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
