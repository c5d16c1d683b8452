"""How pictures become the squares that towers read: said once, done alike wherever it is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

RESIZE_MODES = ("squash", "shortest", "longest")
INTERPOLATIONS = ("bicubic", "bilinear")


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a decoded picture becomes the input of a tower.

    Args:
        size: side of the square, in pixels.
        resize: "squash" (both sides to `size`, whatever the proportions) or "shortest" (the shorter
            side to `size`, then the middle square) or "longest" (the longer side to `size`, in the
            middle of a square of grey level `fill`).
        interpolation: "bicubic" or "bilinear".
        fill: from 0 to 255.

    Raises:
        ValueError: one of them is something else.
    """

    size: int
    resize: str
    interpolation: str
    fill: int = 0

    def __post_init__(self) -> None:
        is_known = self.resize in RESIZE_MODES and self.interpolation in INTERPOLATIONS
        is_grey = isinstance(self.fill, int) and 0 <= self.fill <= 255
        if self.size < 1 or not (is_known and is_grey):
            raise ValueError(f"no picture can be prepared as {self} says")

    def prepared(self, picture: Image.Image) -> Image.Image:
        """The (size, size) picture; the very pixels of one that has this size already."""
        from PIL import Image

        size, filtered = self.size, Image.Resampling[self.interpolation.upper()]
        if picture.size == (size, size):
            return picture
        if self.resize == "squash":
            return picture.resize((size, size), filtered)
        # Rounded as torchvision's Resize and CenterCrop: open_clip's models were trained with them.
        width, height = picture.size
        if self.resize == "longest":
            ratio = max(width, height) / size
            width, height = max(1, round(width / ratio)), max(1, round(height / ratio))
            square = Image.new(picture.mode, (size, size), (self.fill,) * 3)
            middle = ((size - width) // 2, (size - height) // 2)
            square.paste(picture.resize((width, height), filtered), middle)
            return square
        shorter = min(width, height)
        width, height = int(size * width / shorter), int(size * height / shorter)
        left, top = round((width - size) / 2), round((height - size) / 2)
        resized = picture.resize((width, height), filtered)
        return resized.crop((left, top, left + size, top + size))
