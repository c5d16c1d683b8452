"""Encoders: pictures and texts → unit rows in one shared space, whichever model does it.

`load_encoder` finds the right one for a name. The bundled `mini` and every folder of ONNX files run
in ONNX Runtime; our own checkpoints and open_clip's models run in torch, imported only when one is
asked for.
"""

import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from importlib.util import find_spec
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Protocol,
    Self,
    TypeAlias,
    TypeVar,
    overload,
)

import numpy as np
from numpy.typing import NDArray

from retriever.cleaning import CLEANINGS, cleaned
from retriever.errors import EncoderError, MissingExtraError, PictureError, UsageError, printable
from retriever.models import DEFAULT_MODEL, MINI_FOLDER, ModelInfo, find_prepared, list_models
from retriever.preprocessing import INTERPOLATIONS, RESIZE_MODES, Preprocessing

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from tokenizers import Tokenizer

    from retriever.engines import Lanes
    from retriever.replicas import Replicas
    from retriever.towers import DualEncoder

__all__ = [
    "CheckpointEncoder",
    "Encoder",
    "ImageInput",
    "ModelInfo",
    "OnnxEncoder",
    "list_models",
    "load_encoder",
]

Array = NDArray[Any]
ImageInput: TypeAlias = "Image.Image | Path | Array"
T = TypeVar("T")
Tower = Literal["image", "text"]
Feed = Mapping[str, Array]

DEVICES = ("auto", "cpu", "cuda", "mps")

# What a config may say: more would be believed only to ask for all memory.
LIMITS = {"dim": 1 << 16, "size": 4096, "max_tokens": 1 << 16}
# Rows of one run through a tower: large enough for the matrix products, small in memory.
IMAGE_BATCH = 32
TEXT_BATCH = 64
# The same in ONNX Runtime or OpenVINO on a CPU, whose caches they should fit.
CPU_BATCH: Mapping[Tower, int] = {"image": 4, "text": 16}
# Inputs that a tower has had before it gets lanes, which take as long to start as these to run.
PATIENCE: Mapping[Tower, int] = {"image": 32, "text": 128}
# Towers normalise in float32, so rows are much nearer to 1 than this; the store asks for the same.
UNIT_TOLERANCE = 1e-3


class built_once(cached_property[T]):  # noqa: N801 (named as what it stands for)
    """`cached_property` for what is large: threads that come at once wait for the one that builds.

    From Python 3.12 on each of them would build its own.
    """

    def __init__(self, build: Callable[[Any], T]) -> None:
        super().__init__(build)
        self._guard = threading.RLock()

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> T: ...
    def __get__(self, instance: object, owner: type | None = None) -> Any:
        with self._guard:
            return super().__get__(instance, owner)


class Encoder(Protocol):
    """What the store, search, evaluation and the command line need of a model.

    An encoder may tell more of itself, which makes indexing faster:

    - `preprocessing`, a `retriever.preprocessing.Preprocessing` or None: how a picture becomes the
      model's input. Pictures then come finished from the processes that decode them, and preparing
      one a second time must change nothing.
    - `batch_size`: pictures that it would best encode at once.
    - `engine`: what has run it, for people to read.
    - `stay()`: from now on single inputs are to be fast, whatever that costs once.
    """

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

    def is_cut(self, texts: Sequence[str]) -> list[bool]:
        """Which texts are longer than `max_text_tokens`, so that only their beginning is read."""


def load_encoder(
    name: str = DEFAULT_MODEL, *, device: str = "auto", threads: int | None = None
) -> Encoder:
    """The encoder that `name` stands for.

    Args:
        name: "mini"; a folder with ONNX files, a checkpoint of ours or an open_clip model; or
            open_clip's "ARCH/PRETRAINED", where PRETRAINED is a tag or a file of weights. A model
            of open_clip that has been prepared runs without torch.
        device: "auto", "cpu", "cuda" or "mps"; "auto" takes the fastest that is there.
        threads: CPU threads for one operation; None leaves it to the engine.

    Raises:
        EncoderError: there is no such model, or it cannot be loaded.
        MissingExtraError: it needs torch or open_clip, and they are not installed.
        UsageError: `device` is none of the four.
    """
    if device not in DEVICES:
        raise UsageError(f"no device is called {device!r}: choose one of {', '.join(DEVICES)}")
    if name == DEFAULT_MODEL:
        return OnnxEncoder(MINI_FOLDER, device=device, threads=threads)
    if prepared := find_prepared(name):
        return OnnxEncoder(prepared, device=device, threads=threads)
    from retriever import openclip  # which builds on this module

    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "image.onnx").is_file() or (folder / "text.onnx").is_file():
            return OnnxEncoder(folder, device=device, threads=threads)
        if (folder / openclip.CONFIG_FILE).is_file():
            return openclip.OpenClipEncoder(name, device=device, threads=threads)
        if (folder / "model.safetensors").is_file():
            return CheckpointEncoder(folder, device=device, threads=threads)
        raise EncoderError(
            f"{folder} holds no model: no image.onnx and text.onnx, no {openclip.CONFIG_FILE}, "
            f"no model.safetensors"
        )
    if "/" in name:
        return openclip.OpenClipEncoder(name, device=device, threads=threads)
    raise EncoderError(f"no model is called {name!r}: `retriever models` lists what can be used")


class OnnxEncoder:
    """Two ONNX towers in a folder, run by ONNX Runtime: `mini`, or what was exported or prepared.

    The folder holds `image.onnx`, `text.onnx`, `tokenizer.json` and `config.json`. Each tower is
    loaded when it is first needed, so a text query never pays for the image tower. Weights in a
    file beside the tower (`text.weights`) are mapped, not read.
    """

    def __init__(self, folder: Path, *, device: str = "auto", threads: int | None = None) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.name: str = self.config["name"]
        self.dim: int = self.config["dim"]
        self.image_size: int = self.config["image"]["size"]
        self.max_text_tokens: int = self.config["text"]["max_tokens"]
        self.preprocessing = preprocessing_of(self.config["image"])
        self._device = device
        self._threads = threads
        self._lanes: dict[Tower, Lanes] = {}
        self._inputs: Counter[Tower] = Counter()
        self._used: set[Tower] = set()
        self._guard = threading.Lock()  # of the three
        self._stays = False

    @property
    def batch_size(self) -> int:
        """Pictures to encode at once that keep all lanes busy until shortly before the end."""
        from retriever.machine import cores

        return max(IMAGE_BATCH, 2 * CPU_BATCH["image"] * (self._threads or cores()))

    @property
    def engine(self) -> str:
        """What has run the towers: not only ONNX Runtime once there was much to do."""
        with self._guard:
            lanes = {tower: self._lanes.get(tower) for tower in sorted(self._used)}
        named = {tower: one.engine if one else "ONNX Runtime" for tower, one in lanes.items()}
        if len(set(named.values())) > 1:
            return f"{named['image']} for pictures, {named['text']} for texts"
        return next(iter(named.values()), "ONNX Runtime")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the preprocessing and of the digests of the three files.

        The digests stand in `config.json`, written at export, and every file is held against its
        own when it is loaded. So the fingerprint costs no reading of 30 MB at each query, and a
        swapped file still cannot pass for the one that made the stored embeddings. A model that
        was prepared has that of the model in torch, whose embeddings are the same (within 1e-5 in
        cosine, within 1e-3 if its weights were halved by `--float16`), as long as its description
        is the one that it was prepared with: see `standing_for`.
        """
        own = fingerprint_of(self.config)
        other: dict[str, str] = self.config.get("stands_for", {})
        return other["fingerprint"] if other.get("own") == own else own

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        from tokenizers import Tokenizer

        contents = self._checked_file("tokenizer.json")
        try:
            tokenizer = _without_padding(Tokenizer.from_buffer(contents), self.max_text_tokens)
            if padding := self.config["text"].get("padding"):
                # Towers without a mask, as SigLIP's, were trained with texts of one length only.
                tokenizer.enable_padding(length=self.max_text_tokens, **padding)
            return tokenizer
        except Exception as exc:  # what tokenizers raises shares no base but Exception
            raise EncoderError(
                f"{self.folder / 'tokenizer.json'} is no tokenizer: {first_line(exc)}"
            ) from exc

    @built_once
    def _image_session(self) -> Any:
        return self._session("image.onnx")

    @built_once
    def _text_session(self) -> Any:
        return self._session("text.onnx")

    def encode_images(self, images: Sequence[ImageInput]) -> Array:
        """Embeddings of pictures: (n, d) float32 unit rows; see `Encoder.encode_images`."""
        if not images:
            return np.empty((0, self.dim), np.float32)

        def feed(batch: Sequence[ImageInput]) -> Feed:
            return {"pixels": _stacked_pixels(batch, self.preprocessing)}

        run, run_all, size = self._way("image", len(images), lambda n: feed(images[:n]))
        rows = np.concatenate(list(run_all(lambda one: run(feed(one)), batches(images, size))))
        return checked_embeddings(rows, len(images), self.dim, self.name)

    def encode_texts(self, texts: Sequence[str]) -> Array:
        """Embeddings of texts: (n, d) float32 unit rows; see `Encoder.encode_texts`."""
        if not texts:
            return np.empty((0, self.dim), np.float32)
        has_mask = self.config["text"].get("mask", True)
        ids = token_ids(self._tokenizer, self._cleaned(texts))

        def feed(input_ids: Array, mask: Array) -> Feed:
            return {"input_ids": input_ids} | ({"attention_mask": mask} if has_mask else {})

        run, run_all, size = self._way("text", len(texts), lambda n: feed(*_padded(ids[:n])))
        rows = _encode_by_length(
            ids, self.dim, lambda *inputs: run(feed(*inputs)), size=size, run_all=run_all
        )
        return checked_embeddings(rows, len(texts), self.dim, self.name)

    def is_cut(self, texts: Sequence[str]) -> list[bool]:
        """Which texts are read only in part; see `Encoder.is_cut`."""
        return has_overflow(self._tokenizer, self._cleaned(texts), self.max_text_tokens)

    def _cleaned(self, texts: Sequence[str]) -> Sequence[str]:
        how = self.config["text"].get("clean")
        return [cleaned(text, how) for text in texts] if how else texts

    def verify(self) -> list[str]:
        """What is wrong with the folder's files, a sentence each; empty when all is well."""
        problems = []
        for file in self.config["files"]:
            try:
                self._check(file)
            except EncoderError as exc:
                problems.append(str(exc))
        return problems

    def _check(self, file: str) -> None:
        """Raise EncoderError if a file of any size is not the one that `config.json` describes."""
        path = self.folder / file
        try:
            with (
                path.open("rb") as opened,
                mmap(opened.fileno(), 0, access=ACCESS_READ) as contents,
            ):
                found = digest(contents)
        except OSError as exc:
            raise EncoderError(f"{path} cannot be read ({exc.strerror}): {_WAY_OUT}") from exc
        except ValueError:  # an empty file cannot be mapped
            found = digest(b"")
        if found != self.config["files"].get(file):
            raise EncoderError(f"{path} is not the file that config.json describes: {_WAY_OUT}")

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

    def _weights_of(self, tower: str, contents: bytes) -> Path | None:
        """The checked file beside a tower that holds its weights, if they are not in its own.

        Raises:
            EncoderError: it is not the one that `config.json` describes, or there are others.
        """
        from retriever.engines import files_beside

        path = self.folder / f"{tower}.weights"
        named = {path.name} & self.config["files"].keys()
        try:
            others = files_beside(contents) - named
        except ValueError as exc:
            raise EncoderError(f"{self.folder / tower}.onnx cannot be run: {exc}") from exc
        if others:
            raise EncoderError(
                f"{self.folder / tower}.onnx has weights in {printable(min(others))}, which"
                f" config.json does not describe: {_WAY_OUT}"
            )
        if not named:
            return None
        self._check(path.name)
        return path

    def _way(
        self, tower: Tower, n: int, first: Callable[[int], Feed]
    ) -> tuple[Callable[[Feed], Array], "RunAll", int]:
        """The best way to run n inputs: one run, a `map` for many, and inputs for each of them."""
        with self._guard:
            self._used.add(tower)
        run_all: RunAll = map
        size = CPU_BATCH[tower]
        lanes = self._lanes_for(tower, n, first) if n > 1 or self._stays else None
        if lanes:
            run, run_all = lanes.run, lanes.map
        else:
            session = self._query_session(tower)
            if session.get_providers()[0] != "CPUExecutionProvider":
                size = IMAGE_BATCH if tower == "image" else TEXT_BATCH
            run = partial(_first_output, session)
        return partial(self._checked_run, self.folder / f"{tower}.onnx", run), run_all, size

    def stay(self) -> None:
        """Runs single inputs as many are run: a text takes half the time, the first one a second.

        For a process that answers for long; weights are rearranged, which takes memory. It stays
        with ONNX Runtime, so that rows are those of a process that answers once.
        """
        self._stays = True

    def _query_session(self, tower: Tower) -> Any:
        return self._image_session if tower == "image" else self._text_session

    def _lanes_for(self, tower: Tower, n: int, first: Callable[[int], Feed]) -> "Lanes | None":
        """The lanes of a tower, once it has had enough inputs to be worth their start."""
        from retriever.engines import Lanes, tries_openvino, wanted_engine

        with self._guard:
            self._inputs[tower] += n
            has_time = self._stays or self._inputs[tower] > PATIENCE[tower]
            is_soon = wanted_engine() == "auto" and not has_time
            if tower in self._lanes or is_soon or not self._is_on_cpu:
                return self._lanes.get(tower)
            path = self.folder / f"{tower}.onnx"
            self._weights_of(tower, self._checked_file(path.name))
            trial = None
            if tries_openvino(same=self._stays):
                feed, run = (
                    first(CPU_BATCH[tower]),
                    partial(_first_output, self._query_session(tower)),
                )
                trial = feed, self._checked_run(path, run, feed)
            # Its weights need not be in memory twice. A query brings it back.
            self.__dict__.pop(f"_{tower}_session", None)
            try:
                # Weights must lie beside it, and installers may put links in place of files.
                self._lanes[tower] = Lanes(path.resolve(), trial, self._threads, same=self._stays)
            except Exception as exc:  # see _session
                raise EncoderError(f"{path} cannot be run: {first_line(exc)}") from exc
            return self._lanes[tower]

    def _checked_run(self, path: Path, run: Callable[[Feed], Array], feed: Feed) -> Array:
        """One run of a tower: (b, d) rows for b inputs."""
        try:
            rows = run(feed)
        except Exception as exc:  # see _session
            raise EncoderError(f"{path} cannot be run: {first_line(exc)}") from exc
        n = len(next(iter(feed.values())))
        if rows.shape != (n, self.dim):
            raise EncoderError(f"{path} answers {rows.shape}, not {(n, self.dim)}")
        return rows

    def _session(self, file: str) -> Any:
        import onnxruntime  # type: ignore[import-untyped]

        from retriever.engines import KEEP_FLOAT32

        available = onnxruntime.get_available_providers()
        wants_cuda = self._device in ("auto", "cuda") and "CUDAExecutionProvider" in available
        if self._device in ("cuda", "mps") and not wants_cuda:
            raise EncoderError(
                f"{self.name} cannot run on {self._device} here: this onnxruntime offers only "
                f"{', '.join(available)}; use --device cpu"
            )
        options = onnxruntime.SessionOptions()
        # A text is a few tokens: dividing them costs more than a second core saves.
        options.intra_op_num_threads = self._threads or (1 if file == "text.onnx" else 0)
        # Idle threads that spin take the cores from the decoding of the next pictures.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry(*KEEP_FLOAT32)
        providers = ["CUDAExecutionProvider"] if wants_cuda else []
        contents = self._checked_file(file)
        if weights := self._weights_of(Path(file).stem, contents):
            folder = os.fspath(weights.resolve().parent)  # or a link would lead out of it
            options.add_session_config_entry(_WEIGHTS_FOLDER, folder)
            if not wants_cuda:
                # As they lie in the file, mapped, weights cost only the reading of what is used:
                # a text query with ViT-B-32 takes 0.28 s of CPU time rather than 0.47. More than a
                # few inputs run in lanes, which rearrange them.
                options.add_session_config_entry("session.disable_prepacking", "1")
                level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
                options.graph_optimization_level = level
        try:
            return onnxruntime.InferenceSession(
                contents, options, providers=[*providers, "CPUExecutionProvider"]
            )
        except Exception as exc:  # onnxruntime's own errors share no base but Exception
            raise EncoderError(f"{self.folder / file} cannot be run: {first_line(exc)}") from exc

    @cached_property
    def _is_on_cpu(self) -> bool:
        import onnxruntime

        available = onnxruntime.get_available_providers()
        is_auto = self._device == "auto" and "CUDAExecutionProvider" not in available
        return is_auto or self._device == "cpu"


class CheckpointEncoder:
    """A checkpoint that training wrote, run by torch; read when something is first encoded."""

    def __init__(self, folder: Path, *, device: str = "auto", threads: int | None = None) -> None:
        need_models_extra(f"the checkpoint {folder}", "torch")
        self.folder = folder
        self.name = folder.name
        path = folder / "config.json"
        try:
            self.config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            self.dim: int = self.config["dim"]
            self.image_size: int = self.config["image"]["size"]
            self.max_text_tokens: int = self.config["text"]["max_tokens"]
            self.preprocessing = preprocessing_of(self.config["image"])
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise EncoderError(f"{path} does not describe a checkpoint of ours: {exc!r}") from exc
        self._device = device
        self._threads = threads

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights, tokenizer and config; beside the import of torch it takes no time."""
        try:
            files = {
                file: digest((self.folder / file).read_bytes())
                for file in ("model.safetensors", "tokenizer.json")
            }
        except OSError as exc:
            raise EncoderError(f"{exc.filename} cannot be read: {exc.strerror}") from exc
        return fingerprint_of(self.config | {"files": files})

    @built_once
    def loaded(self) -> tuple["DualEncoder", "Tokenizer", "torch.device"]:
        """The model in eval mode, its tokenizer, and the device that the model is on."""
        from retriever.checkpoints import load_checkpoint

        device = torch_device(self._device, self._threads)
        model, tokenizer = load_checkpoint(self.folder)
        return model.to(device), _without_padding(tokenizer, self.max_text_tokens), device

    @built_once
    def _images(self) -> "Replicas":
        import torch

        from retriever.replicas import Replicas

        model, _, device = self.loaded
        replicas = Replicas(model, device, method="encode_images")
        replicas.fit((self.image_size, self.image_size, 3), torch.uint8)
        return replicas

    @property
    def batch_size(self) -> int:
        """Pictures encoded at once; on GPUs as many as fit."""
        return self._images.batch_size

    def encode_images(self, images: Sequence[ImageInput]) -> Array:
        """Embeddings of pictures: (n, d) float32 unit rows; see `Encoder.encode_images`."""
        rows = [np.empty((0, self.dim), np.float32)]
        rows += [
            self._images(_stacked_pixels(batch, self.preprocessing))
            for batch in batches(images, self.batch_size if images else 1)
        ]
        return checked_embeddings(np.concatenate(rows), len(images), self.dim, self.name)

    def encode_texts(self, texts: Sequence[str]) -> Array:
        """Embeddings of texts: (n, d) float32 unit rows; see `Encoder.encode_texts`."""
        import torch

        model, tokenizer, device = self.loaded

        def run(input_ids: Array, mask: Array) -> Array:
            inputs = [torch.from_numpy(part).to(device) for part in (input_ids, mask)]
            rows: Array = model.encode_texts(*inputs).cpu().numpy()
            return rows

        with torch.inference_mode():
            embeddings = _encode_by_length(token_ids(tokenizer, texts), self.dim, run)
        return checked_embeddings(embeddings, len(texts), self.dim, self.name)

    def is_cut(self, texts: Sequence[str]) -> list[bool]:
        """Which texts are read only in part; see `Encoder.is_cut`."""
        _, tokenizer, _ = self.loaded
        return has_overflow(tokenizer, texts, self.max_text_tokens)


def need_models_extra(what: str, module: str) -> None:
    """Raises MissingExtraError, naming `what`, if `module` is not installed; imports nothing."""
    if find_spec(module) is None:
        raise MissingExtraError(what, "models")


def torch_device(name: str, threads: int | None = None) -> "torch.device":
    """The device for `name`, tried out; "auto" is CUDA, else Apple's MPS, else the CPU.

    `threads`, if given, sets torch's CPU threads, which are those of the whole process.

    Raises:
        EncoderError: torch cannot use it here.
    """
    import torch

    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if threads:
        torch.set_num_threads(threads)
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as exc:
        raise EncoderError(f"torch cannot use {name} here: {first_line(exc)}") from exc


def first_line(exc: BaseException) -> str:
    """What an error says, short enough for a sentence of ours."""
    return (str(exc) or type(exc).__name__).splitlines()[0][:300]


_WAY_OUT = "export or install the model again"
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


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
            if not isinstance(part[key], kind) or isinstance(part[key], bool):
                raise EncoderError(f"{path}: {key!r} is no {kind.__name__}: {_WAY_OUT}")
            if key in LIMITS and not 1 <= part[key] <= LIMITS[key]:
                raise EncoderError(f"{path}: {key!r} must be from 1 to {LIMITS[key]:,}: {_WAY_OUT}")
        fill = config["image"].get("fill", 0)
        if type(fill) is not int or not 0 <= fill <= 255:
            raise EncoderError(f"{path}: 'fill' must be a grey level from 0 to 255: {_WAY_OUT}")
        for key, known in (("resize", RESIZE_MODES), ("interpolation", INTERPOLATIONS)):
            if config["image"][key] not in known:
                raise EncoderError(f"{path}: {key!r} must be one of {', '.join(known)}")
        if config["text"].get("clean") not in (None, *CLEANINGS):
            raise EncoderError(f"{path}: 'clean' must be one of {', '.join(CLEANINGS)}")
        other = config.get("stands_for", {"fingerprint": "", "own": ""})
        if not all(isinstance(other[key], str) for key in ("fingerprint", "own")):
            raise EncoderError(f"{path}: 'stands_for' is no fingerprint: {_WAY_OUT}")
    except OSError as exc:
        raise EncoderError(f"{folder} holds no model: config.json cannot be read") from exc
    except KeyError as exc:
        raise EncoderError(f"{path} lacks {exc.args[0]!r}: {_WAY_OUT}") from exc
    except (ValueError, TypeError, RecursionError) as exc:
        raise EncoderError(f"{path} is not the description of a model: {first_line(exc)}") from exc
    return config


def fingerprint_of(config: Mapping[str, Any]) -> str:
    """32 hexadecimal digits over all that decides an embedding; names and notes may change."""
    deciding = {key: config[key] for key in ("dim", "image", "text", "files")}
    return digest(json.dumps(deciding, sort_keys=True).encode())


def standing_for(config: Mapping[str, Any], fingerprint: str) -> dict[str, str]:
    """What says in `config` that its embeddings are those of the model of another fingerprint."""
    return {"fingerprint": fingerprint, "own": fingerprint_of(config)}


def digest(contents: "bytes | mmap") -> str:
    """XXH3 of some bytes, 128 bits as 32 hexadecimal digits: 30 MB take some 3 ms."""
    import xxhash

    return xxhash.xxh3_128_hexdigest(contents)


def to_pixels(image: ImageInput, size: int, resize: str, interpolation: str) -> Array:
    """A picture as a tower reads it: (size, size, 3) uint8 RGB.

    Args:
        image: a PIL picture, a path, or a uint8 RGB array of shape (h, w, 3).
        size: see `retriever.preprocessing.Preprocessing`.
        resize: as there.
        interpolation: as there.

    Raises:
        PictureError: the file cannot be read, or the array has another type or shape.
    """
    picture = open_picture(image, target=size)
    return np.asarray(Preprocessing(size, resize, interpolation).prepared(picture))


def _stacked_pixels(images: Sequence[ImageInput], preprocessing: Preprocessing) -> Array:
    """(b, size, size, 3) uint8."""
    size = preprocessing.size
    pixels = np.empty((len(images), size, size, 3), np.uint8)
    for place, image in zip(pixels, images, strict=True):
        place[:] = np.asarray(preprocessing.prepared(open_picture(image, target=size)))
    return pixels


def preprocessing_of(config: Mapping[str, Any]) -> Preprocessing:
    """What the `image` part of a model's config says."""
    return Preprocessing(
        config["size"], config["resize"], config["interpolation"], config.get("fill", 0)
    )


def open_picture(image: ImageInput, *, target: int) -> "Image.Image":
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
        from PIL import Image

        return Image.fromarray(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def token_ids(tokenizer: "Tokenizer", texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text; one without any token reads as the padding token, as in training."""
    return [encoding.ids or [0] for encoding in tokenizer.encode_batch(list(texts))]


def may_be_cut(text: str, max_tokens: int) -> bool:
    """Whether a text could have more tokens than that: no token stands for less than a byte."""
    return len(text.encode("utf-8", "surrogatepass")) > max_tokens - 2  # a beginning and an end


def has_overflow(tokenizer: "Tokenizer", texts: Sequence[str], max_tokens: int) -> list[bool]:
    """Which texts a tokenizer that cuts at `max_tokens` cuts."""
    return [
        may_be_cut(text, max_tokens) and bool(tokenizer.encode(text).overflowing) for text in texts
    ]


def _without_padding(tokenizer: "Tokenizer", max_tokens: int) -> "Tokenizer":
    """The tokenizer, cutting texts at `max_tokens` and leaving the padding to us."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


class RunAll(Protocol):
    """The built-in `map`, or one that does several at a time."""

    def __call__(
        self, function: Callable[[list[T]], Array], batches: Iterable[list[T]], /
    ) -> Iterable[Array]: ...


def _first_output(session: Any, feed: Feed) -> Array:
    rows: Array = session.run(["embeddings"], feed)[0]
    return rows


def _padded(ids: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """The ids of some texts and a mask that tells them from padding: two of (b, t) int64."""
    input_ids = np.zeros((len(ids), max(map(len, ids))), np.int64)
    mask = np.zeros_like(input_ids)
    for place, one in enumerate(ids):
        input_ids[place, : len(one)] = one
        mask[place, : len(one)] = 1
    return input_ids, mask


def _encode_by_length(
    ids: Sequence[Sequence[int]],
    dim: int,
    run: Callable[[Array, Array], Array],
    *,
    size: int = TEXT_BATCH,
    run_all: RunAll = map,
) -> Array:
    """(n, d) rows of `run(input_ids, mask)`, whose two inputs are (b, t) int64, b at most `size`.

    Texts of like length run together, so that short ones are not padded to the longest of all.
    """

    def encode(batch: Sequence[int]) -> Array:
        return run(*_padded([ids[row] for row in batch]))

    embeddings = np.empty((len(ids), dim), np.float32)
    by_length = list(batches(sorted(range(len(ids)), key=lambda row: len(ids[row])), size))
    for batch, rows in zip(by_length, run_all(encode, by_length), strict=True):
        embeddings[batch] = rows
    return embeddings


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


def batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """The items in order, `size` at a time."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
