"""Pictures made smaller, or written in another format, as they are packed."""

import io
from dataclasses import dataclass

from PIL import Image

from mimetic.data.decode import decode
from mimetic.engine.errors import SettingError

FORMATS = {"jpeg": ("jpg", "jpeg", "jpe", "jfif"), "png": ("png",), "webp": ("webp",)}  # and how their files end
QUALITY = 90


@dataclass(frozen=True)
class Encoding:
    """What is asked for; with nothing set, bytes stay as they are.

    Attributes:
        short_side: pixels; larger pictures are resized to it, smaller ones are not.
        format: `jpeg`, `png` or `webp`; None keeps the picture's own, or takes png where that is none of them.
        quality: 1 to 100, of JPEG and WebP; None is 90, and leaves alone what is small enough and of the right format.

    Raises:
        SettingError: out of range.
    """

    short_side: int | None = None
    format: str | None = None
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.short_side is not None and self.short_side < 1:
            raise SettingError(f"--short-side is {self.short_side}; it must be 1 pixel or more")
        if self.format is not None and self.format not in FORMATS:
            raise SettingError(f"--format is {self.format}; use {', '.join(FORMATS)}")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise SettingError(f"--quality is {self.quality}; it must be in [1, 100]")
        if self.quality is not None and (self.format == "png" or not self.changes):
            raise SettingError("--quality is for JPEG and WebP; add --format jpeg or --format webp, or --short-side N")

    @property
    def changes(self) -> bool:
        """Whether anything is asked for."""
        return self.short_side is not None or self.format is not None

    def apply(self, content: bytes, extension: str, channels: int) -> tuple[bytes, str]:
        """An encoded image and its extension, as asked for: upright, 8 bits, of this many channels, without metadata.

        Raises:
            ValueError: it cannot be decoded.
        """
        own = next((name for name, endings in FORMATS.items() if extension in endings), None)
        form = self.format or own or "png"
        image_CHW = decode(content, channels)
        height, width = image_CHW.shape[1:]
        short = min(height, width)
        smaller = self.short_side is not None and short > self.short_side
        if not smaller and form == own and self.quality is None:
            return content, extension
        picture = Image.fromarray(image_CHW[0] if channels == 1 else image_CHW.transpose(1, 2, 0).copy())
        if smaller and self.short_side:
            size = tuple(max(1, round(side * self.short_side / short)) for side in (width, height))
            picture = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
        buffer = io.BytesIO()
        try:
            picture.save(buffer, form, **({} if form == "png" else {"quality": self.quality or QUALITY}))
        except (OSError, ValueError) as error:  # a format has a largest side
            raise ValueError(f"cannot be written as {form}: {' '.join(str(error).split())}") from None
        return buffer.getvalue(), FORMATS[form][0]
