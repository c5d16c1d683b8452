"""Encoders: pictures and texts → unit rows in one shared space, whichever model does it.

`load_encoder` finds the right one for a name. The bundled `mini` and every folder of ONNX files run
in ONNX Runtime; our own checkpoints and open_clip's models run in torch, imported only when one is
asked for.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from retriever.errors import EncoderError, PictureError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = NDArray[Any]
ImageInput = Image.Image | Path | Array
T = TypeVar("T")

MINI_FOLDER = Path(__file__).parent / "mini"
DEVICES = ("auto", "cpu", "cuda", "mps")
RESIZE_MODES = ("squash", "shortest")
INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}

# Rows of one run through a tower: large enough for the matrix products, small in memory.
IMAGE_BATCH = 32
TEXT_BATCH = 64
# Towers normalise in float32, so rows are much nearer to 1 than this; the store asks for the same.
UNIT_TOLERANCE = 1e-3


class Encoder(Protocol):
    """What the store, search, evaluation and the command line need of a model."""

    @property
    def name(self) -> str:
        """What a user calls the model."""

    @property
    def dim(self) -> int:
        """Columns of every embedding."""

    @property
    def fingerprint(self) -> str:
        """Stands for weights, tokenizer and preprocessing: if equal, embeddings are comparable."""

    @property
    def max_text_tokens(self) -> int:
        """Tokens of a text that are read; the rest is cut off."""

    @property
    def image_size(self) -> int:
        """Side of the square, in pixels, that every picture is made to."""

    def encode_images(self, images: Sequence[ImageInput]) -> Array:
        """Embeddings of pictures: (n, d) float32 unit rows, in the order given.

        Args:
            images: PIL pictures, paths, or uint8 RGB arrays of shape (h, w, 3), mixed as you like.

        Raises:
            PictureError: one of them cannot be read; none is encoded then.
            EncoderError: the model is damaged or answers with something that is no unit row.
        """

    def encode_texts(self, texts: Sequence[str]) -> Array:
        """Embeddings of texts: (n, d) float32 unit rows, in the order given.

        Raises:
            EncoderError: the model is damaged or answers with something that is no unit row.
        """


def load_encoder(
    name: str = "mini", *, device: str = "auto", threads: int | None = None
) -> Encoder:
    """The encoder that `name` stands for.

    Args:
        name: "mini"; a folder with ONNX files, with a checkpoint of ours or with an open_clip model;
            or open_clip's "ARCH/PRETRAINED", where PRETRAINED is a tag or a file of weights.
        device: "auto", "cpu", "cuda" or "mps"; "auto" takes the fastest that is there.
        threads: CPU threads for one operation; None leaves it to the engine.

    Raises:
        EncoderError: there is no such model, or it cannot be loaded.
        MissingExtraError: it needs torch or open_clip, and they are not installed.
        UsageError: `device` is none of the four.
    """
    if device not in DEVICES:
        raise UsageError(f"no device is called {device!r}: choose one of {', '.join(DEVICES)}")
    if name == "mini":
        return OnnxEncoder(MINI_FOLDER, device=device, threads=threads)
    folder = Path(name).expanduser()
    if (folder / "image.onnx").is_file() or (folder / "text.onnx").is_file():
        return OnnxEncoder(folder, device=device, threads=threads)
    raise EncoderError(f"no model is called {name!r}: `retriever models` lists what can be used")


class OnnxEncoder:
    """Two ONNX towers in a folder, run by ONNX Runtime: `mini`, or what `export_onnx` wrote.

    The folder holds `image.onnx`, `text.onnx`, `tokenizer.json` and `config.json`. Each tower is
    loaded when it is first needed, so a text query never pays for the image tower.
    """

    def __init__(self, folder: Path, *, device: str = "auto", threads: int | None = None) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.name: str = self.config["name"]
        self.dim: int = self.config["dim"]
        self.image_size: int = self.config["image"]["size"]
        self.max_text_tokens: int = self.config["text"]["max_tokens"]
        self._device = device
        self._threads = threads

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the preprocessing and of the digests of the three files.

        The digests stand in `config.json`, written at export, and every file is held against its
        own when it is loaded. So the fingerprint costs no reading of 30 MB at each query, and a
        swapped file still cannot pass for the one that made the stored embeddings.
        """
        return fingerprint_of(self.config)

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_buffer(self._checked_file("tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_text_tokens)
        return tokenizer

    @cached_property
    def _image_session(self) -> Any:
        return self._session("image.onnx")

    @cached_property
    def _text_session(self) -> Any:
        return self._session("text.onnx")

    def encode_images(self, images: Sequence[ImageInput]) -> Array:
        """Embeddings of pictures: (n, d) float32 unit rows; see `Encoder.encode_images`."""
        image = self.config["image"]
        rows = [np.empty((0, self.dim), np.float32)]
        for batch in _batches(images, IMAGE_BATCH):
            pixels = np.stack(
                [
                    to_pixels(one, self.image_size, image["resize"], image["interpolation"])
                    for one in batch
                ]
            )
            rows += self._image_session.run(["embeddings"], {"pixels": pixels})
        return checked_embeddings(np.concatenate(rows), len(images), self.dim, self.name)

    def encode_texts(self, texts: Sequence[str]) -> Array:
        """Embeddings of texts: (n, d) float32 unit rows; see `Encoder.encode_texts`."""
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        embeddings = np.empty((len(ids), self.dim), np.float32)
        # Texts of like length run together, so that short ones are not padded to the longest.
        by_length = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        for batch in _batches(by_length, TEXT_BATCH):
            input_ids, mask = padded([ids[row] for row in batch])
            feed = {"input_ids": input_ids, "attention_mask": mask}
            embeddings[batch] = self._text_session.run(["embeddings"], feed)[0]
        return checked_embeddings(embeddings, len(texts), self.dim, self.name)

    def verify(self) -> list[str]:
        """What is wrong with the folder's files, a sentence each; empty when all is well."""
        problems = []
        for file in self.config["files"]:
            try:
                self._checked_file(file)
            except EncoderError as exc:
                problems.append(str(exc))
        return problems

    def _checked_file(self, file: str) -> bytes:
        """The contents of one of the folder's files, held against its digest in `config.json`."""
        path = self.folder / file
        try:
            contents = path.read_bytes()
        except OSError as exc:
            raise EncoderError(f"{path} cannot be read ({exc.strerror}): {_WAY_OUT}") from exc
        if digest(contents) != self.config["files"].get(file):
            raise EncoderError(f"{path} is not the file that config.json describes: {_WAY_OUT}")
        return contents

    def _session(self, file: str) -> Any:
        import onnxruntime  # type: ignore[import-untyped]

        available = onnxruntime.get_available_providers()
        wants_cuda = self._device in ("auto", "cuda") and "CUDAExecutionProvider" in available
        if self._device in ("cuda", "mps") and not wants_cuda:
            raise EncoderError(
                f"{self.name} cannot run on {self._device} here: this onnxruntime offers only "
                f"{', '.join(available)}; use --device cpu"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads or 0
        # Idle threads that spin take the cores from the decoding of the next pictures.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = ["CUDAExecutionProvider"] if wants_cuda else []
        try:
            return onnxruntime.InferenceSession(
                self._checked_file(file), options, providers=[*providers, "CPUExecutionProvider"]
            )
        except Exception as exc:  # onnxruntime's own errors share no base but Exception
            if isinstance(exc, EncoderError):
                raise
            raise EncoderError(f"{self.folder / file} cannot be run: {exc}") from exc


_WAY_OUT = "export or install the model again"


def read_config(folder: Path) -> dict[str, Any]:
    """The checked `config.json` of a folder of ONNX files.

    Raises:
        EncoderError: it is missing, is no JSON, or lacks a part; the text says which.
    """
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        wanted: tuple[tuple[Mapping[str, Any], str, type], ...] = (
            (config, "name", str),
            (config, "dim", int),
            (config["image"], "size", int),
            (config["text"], "max_tokens", int),
            (config["files"], "image.onnx", str),
            (config["files"], "text.onnx", str),
            (config["files"], "tokenizer.json", str),
        )
        for part, key, kind in wanted:
            if not isinstance(part[key], kind):
                raise EncoderError(f"{path}: {key!r} is no {kind.__name__}: {_WAY_OUT}")
        for key, known in (("resize", RESIZE_MODES), ("interpolation", tuple(INTERPOLATIONS))):
            if config["image"][key] not in known:
                raise EncoderError(f"{path}: {key!r} must be one of {', '.join(known)}")
    except OSError as exc:
        raise EncoderError(f"{folder} holds no model: config.json cannot be read") from exc
    except KeyError as exc:
        raise EncoderError(f"{path} lacks {exc.args[0]!r}: {_WAY_OUT}") from exc
    except (ValueError, TypeError) as exc:
        raise EncoderError(f"{path} is not the description of a model: {exc}") from exc
    return config


def fingerprint_of(config: Mapping[str, Any]) -> str:
    """32 hexadecimal digits over all that decides an embedding; names and notes may change."""
    deciding = {key: config[key] for key in ("dim", "image", "text", "files")}
    return digest(json.dumps(deciding, sort_keys=True).encode())


def digest(contents: bytes) -> str:
    """XXH3 of some bytes, 128 bits as 32 hexadecimal digits: 30 MB take some 3 ms."""
    import xxhash

    return xxhash.xxh3_128_hexdigest(contents)


def to_pixels(image: ImageInput, size: int, resize: str, interpolation: str) -> Array:
    """A picture as a tower reads it: (size, size, 3) uint8 RGB.

    Args:
        image: a PIL picture, a path, or a uint8 RGB array of shape (h, w, 3).
        size: side of the square, in pixels.
        resize: "squash" (both sides to `size`, whatever the proportions) or "shortest" (the shorter
            side to `size`, then the middle square).
        interpolation: "bicubic" or "bilinear".

    Raises:
        PictureError: the file cannot be read, or the array has another type or shape.
    """
    picture = open_picture(image, target=size)
    filtered = INTERPOLATIONS[interpolation]
    if resize == "squash":
        return np.asarray(picture.resize((size, size), filtered))
    # Rounded as torchvision's Resize and CenterCrop do, which open_clip's models were trained with.
    width, height = picture.size
    shorter = min(width, height)
    width, height = int(size * width / shorter), int(size * height / shorter)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = picture.resize((width, height), filtered)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def open_picture(image: ImageInput, *, target: int) -> Image.Image:
    """An RGB picture from whatever stands for one; `target` is the side needed of it in pixels."""
    if isinstance(image, Path):
        from retriever.data import read_image

        return read_image(image, target=target).image
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise PictureError(
                f"a picture given as an array must be uint8 RGB of shape (h, w, 3), "
                f"not {image.dtype} of shape {image.shape}"
            )
        return Image.fromarray(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def padded(ids: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """Token ids and mask of a batch, both (b, t) int64, t being the longest text's length."""
    length = max(1, *(len(one) for one in ids))
    input_ids = np.zeros((len(ids), length), np.int64)
    mask = np.zeros((len(ids), length), np.int64)
    for row, one in enumerate(ids):
        input_ids[row, : len(one)] = one
        mask[row, : len(one)] = 1
    return input_ids, mask


def checked_embeddings(embeddings: Array, n: int, dim: int, name: str) -> Array:
    """The embeddings as the contract wants them: (n, d) float32, C-contiguous, finite unit rows.

    Raises:
        EncoderError: they have another shape, or a row is not of length 1.
    """
    if embeddings.shape != (n, dim):
        raise EncoderError(f"{name} answered {embeddings.shape} where {(n, dim)} was expected")
    embeddings = np.ascontiguousarray(embeddings, np.float32)
    lengths = np.linalg.norm(embeddings, axis=1)
    # Written so that a NaN fails it too.
    if not (np.abs(lengths - 1) <= UNIT_TOLERANCE).all():
        row = int(np.flatnonzero(~(np.abs(lengths - 1) <= UNIT_TOLERANCE))[0])
        raise EncoderError(f"{name} answered a row of length {lengths[row]} where 1 was expected")
    return embeddings


def _batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
