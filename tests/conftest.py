"""Shared fixtures: an encoder whose answers anyone can work out, a small folder, a new store.

Colour is all that the toy encoder knows. A colour is the direction (red, green, blue, other):

    red (1, 0, 0, 0)   yellow (1, 1, 0, 0)/√2   white (1, 1, 1, 0)/√3   no colour (0, 0, 0, 1)

So the cosine between the text "red" and a yellow picture is 1/√2, and between "red" and a blue
picture 0.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from indexes.store import Store

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
    "white": (255, 255, 255),
}


class ToyEncoder:
    """Embeds a picture as its mean colour and a text as the sum of the colours it names."""

    name = "toy"
    dim = 4
    max_text_tokens = 16
    image_size = 8

    def __init__(self, fingerprint: str = "toy-1") -> None:
        self.fingerprint = fingerprint
        self.images_seen = 0  # so that a test can tell that work was saved
        self.texts_seen = 0

    def encode_images(self, images: Sequence[Image.Image | Path | np.ndarray]) -> np.ndarray:
        self.images_seen += len(images)
        return _unit_rows([_mean_colour(image) for image in images])

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        self.texts_seen += len(texts)
        return _unit_rows([_named_colours(text) for text in texts])

    def is_cut(self, texts: Sequence[str]) -> list[bool]:
        return [len(text.split()) > self.max_text_tokens for text in texts]


def _mean_colour(image: Image.Image | Path | np.ndarray) -> np.ndarray:
    if isinstance(image, Path):
        from retriever.data import read_image

        image = read_image(image).image
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    return pixels.reshape(-1, 3).mean(axis=0)


def _named_colours(text: str) -> np.ndarray:
    words = re.findall(r"\w+", text.lower())
    return np.sum([COLOURS[word] for word in words if word in COLOURS] or [(0, 0, 0)], axis=0)


def _unit_rows(colours: Sequence[np.ndarray]) -> np.ndarray:
    rows = np.zeros((len(colours), ToyEncoder.dim), dtype=np.float32)
    for row, colour in zip(rows, colours, strict=True):
        row[:3] = colour
        row[3] = not np.any(colour)
        row /= np.linalg.norm(row)
    return rows


@pytest.fixture(autouse=True, scope="session")
def _one_engine() -> Iterator[None]:
    """Embeddings are the same to the last digits, whichever engines are installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETRIEVER_ENGINE", "onnxruntime")
        yield


@pytest.fixture
def toy_encoder() -> ToyEncoder:
    return ToyEncoder()


@pytest.fixture
def tiny_pairs(tmp_path: Path) -> Path:
    """Five flat pictures, one in a sub-folder; all but the white one have captions beside them."""
    folder = tmp_path / "pictures"
    captions = {
        "red": ["a red square", "all red, nothing else"],
        "green": ["a green square"],
        "blue": ["a blue square", "the deep blue"],
        "more/yellow": ["a yellow square"],
        "white": [],
    }
    for name, lines in captions.items():
        paint(folder / f"{name}.png", Path(name).name)
        if lines:
            (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def paint(path: Path, colour: str, *, side: int = 8) -> Path:
    """Writes a flat square picture of a named colour; another `side` makes another content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), COLOURS[colour]).save(path)
    return path


@pytest.fixture
def fresh_store(tmp_path: Path, toy_encoder: ToyEncoder) -> Iterator["Store"]:
    """An empty store for the toy encoder's embeddings."""
    from indexes.store import ModelSpec, Store

    model = ModelSpec(name=toy_encoder.name, dim=toy_encoder.dim, fingerprint="toy-1")
    with Store.create(tmp_path / "fresh.lib", model) as store:
        yield store
