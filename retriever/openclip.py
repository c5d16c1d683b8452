"""Models of open_clip behind the contract of `Encoder`; the only home of open_clip.

Weights in a .safetensors file are mapped, not read, and only the tower that is needed is built from
them: a text query with ViT-B-32 takes 0.9 GB of memory rather than 1.9. A model whose tensors are
not those of its file, and any pickle, is built whole by open_clip, which converts and checks it.
"""

import difflib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retriever.encoders import (
    TEXT_BATCH,
    Array,
    ImageInput,
    batches,
    built_once,
    checked_embeddings,
    first_line,
    may_be_cut,
    need_models_extra,
    open_picture,
    torch_device,
)
from retriever.errors import EncoderError
from retriever.preprocessing import INTERPOLATIONS, Preprocessing

if TYPE_CHECKING:
    import torch

    from retriever.openclip_towers import TextTower
    from retriever.replicas import Replicas

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"  # the first that open_clip looks for in a folder

# Capitals, punctuation, digits, accents, other scripts, and more words than any model reads.
_TOKENIZER_SAMPLE = ("A dog, running!", "the  3 CATS' café", "два кота 两只猫", "one two " * 80)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True, slots=True)
class _Source:
    """What open_clip is asked for: its name for the architecture, options, where the files are.

    `mapped` is the .safetensors file that open_clip would read, `beside` the folder of a file of
    weights.
    """

    architecture: str
    options: Mapping[str, Any] = field(default_factory=dict)
    beside: Path | None = None
    mapped: Path | None = None
    files: tuple[Path, ...] = ()


class OpenClipEncoder:
    """A model of open_clip, run by torch, with the preprocessing and tokenizer that are its own.

    open_clip gives weights from a local file CLIP's preprocessing, whatever they were trained with
    (its issue #1068), and CLIP's activation to models that were trained with another. Here both
    come from the model's own description, and where there is none, nothing is loaded.

    Each tower is made when it is first needed. Convolutions that were trained in several branches
    (MobileCLIP) are folded into one.

    Args:
        name: "ARCH/TAG", whose weights open_clip downloads on first use; "ARCH/FILE" with a file of
            weights; or a folder with `open_clip_config.json`, weights and tokenizer.
        device: "auto", "cpu", "cuda" (all GPUs that there are) or "mps".
        threads: CPU threads for one operation; None leaves it to torch.

    Raises:
        EncoderError: there is no such model, it cannot be downloaded, or it cannot be loaded.
        MissingExtraError: open_clip is not installed.
    """

    def __init__(self, name: str, *, device: str = "auto", threads: int | None = None) -> None:
        folder = Path(name).expanduser()
        is_folder = (folder / CONFIG_FILE).is_file()
        need_models_extra(f"the model {name}", "open_clip")
        if not is_folder:
            _check_architecture(name)
        import open_clip  # type: ignore[import-untyped]

        self.name = name
        self._device = torch_device(device, threads)
        if is_folder:
            _own_preprocessing(folder / CONFIG_FILE)
            file = folder / WEIGHTS_FILE
            files = sorted(path for path in folder.iterdir() if path.is_file())
            source = _Source(
                f"local-dir:{folder}", mapped=file if file in files else None, files=tuple(files)
            )
        else:
            source = _named_model(name)
        # Local files that the model is made of; none if it was downloaded by its name.
        self.files = source.files
        try:
            self._weights = _Weights(source)
        except Exception as exc:  # whatever torch, timm, safetensors and pickle raise
            raise EncoderError(f"{name} cannot be loaded: {first_line(exc)}") from exc
        model = self._weights.model
        self._described: dict[str, Any] = open_clip.get_model_config(source.architecture)
        self.tokenizer = _load_tokenizer(
            name, source.architecture, self._described["text_cfg"], source.beside
        )
        self.dim: int = self._described["embed_dim"]
        self.max_text_tokens: int = self.tokenizer.context_length
        self.image_size: int = int(np.max(model.visual.image_size))
        self.text_settings: Mapping[str, Any] = self._described["text_cfg"]
        # Size, mean, std, interpolation, resize_mode and fill_color, in open_clip's own words.
        self.config: dict[str, Any] = {"image": dict(model.visual.preprocess_cfg)}
        self.preprocessing = self._preprocessing()

    def _preprocessing(self) -> Preprocessing:
        image = self.config["image"]
        if np.min(image["size"]) != self.image_size:
            raise EncoderError(
                f"{self.name} wants pictures that are not square: none are made here"
            )
        interpolation = image["interpolation"]
        if interpolation not in INTERPOLATIONS:
            interpolation = "bicubic"  # as open_clip takes "random" where nothing is trained
        try:
            return Preprocessing(
                self.image_size, image["resize_mode"], interpolation, image["fill_color"]
            )
        except ValueError as exc:
            raise EncoderError(f"{self.name} cannot be loaded: {exc}") from exc

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights, architecture, preprocessing, and of what the tokenizer does."""
        import xxhash

        state = xxhash.xxh3_128()
        self._weights.update(state)
        settings = {key: self._described[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
        described = json.dumps([settings, self.config["image"]], sort_keys=True, default=list)
        state.update(described.encode())
        state.update(self.tokenizer(list(_TOKENIZER_SAMPLE)).numpy().tobytes())
        return state.hexdigest()

    @property
    def batch_size(self) -> int:
        """Pictures encoded at once; on GPUs as many as fit."""
        return self._images.batch_size

    def image_tower(self) -> "torch.nn.Module":
        """From (b, s, s, 3) uint8 RGB to (b, d) unit rows; on the CPU."""
        from retriever.openclip_towers import ImageTower, folded

        with self._loading():
            visual = folded(self._weights.visual())
        image = self.config["image"]
        return ImageTower(visual, image["mean"], image["std"])

    def text_tower(self) -> "TextTower":
        """From (b, t) int64 tokens to (b, d) unit rows; on the CPU."""
        from retriever.openclip_towers import text_tower

        with self._loading():
            return text_tower(self._weights.text())

    @built_once
    def _images(self) -> "Replicas":
        import torch

        from retriever.replicas import Replicas

        replicas = Replicas(self.image_tower(), self._device)
        replicas.fit((self.image_size, self.image_size, 3), torch.uint8)
        return replicas

    @built_once
    def _texts(self) -> tuple["TextTower", "Replicas"]:
        from retriever.replicas import Replicas

        tower = self.text_tower()
        return tower, Replicas(tower, self._device)

    @contextmanager
    def _loading(self) -> Iterator[None]:
        try:
            yield
        except Exception as exc:  # whatever torch, timm and safetensors raise
            raise EncoderError(f"{self.name} cannot be loaded: {first_line(exc)}") from exc

    def encode_images(self, images: Sequence[ImageInput]) -> Array:
        """Embeddings of pictures: (n, d) float32 unit rows; see `Encoder.encode_images`."""
        rows = [np.empty((0, self.dim), np.float32)]
        size, prepared = self.image_size, self.preprocessing.prepared
        for batch in batches(images, self.batch_size if images else 1):
            pixels = [np.asarray(prepared(open_picture(one, target=size))) for one in batch]
            rows.append(self._images(np.stack(pixels)))
        return checked_embeddings(np.concatenate(rows), len(images), self.dim, self.name)

    def encode_texts(self, texts: Sequence[str]) -> Array:
        """Embeddings of texts: (n, d) float32 unit rows; see `Encoder.encode_texts`."""
        rows = [np.empty((0, self.dim), np.float32)]
        for batch in batches(texts, TEXT_BATCH):
            tower, replicas = self._texts
            tokens = self.tokenizer(batch).numpy()
            rows.append(replicas(tokens[:, : tower.read(tokens)]))
        return checked_embeddings(np.concatenate(rows), len(texts), self.dim, self.name)

    def is_cut(self, texts: Sequence[str]) -> list[bool]:
        """Which texts are read only in part; see `Encoder.is_cut`."""
        window = self.max_text_tokens
        empty, *rows = self.tokenizer(["", *texts], context_length=2 * window)
        return [
            may_be_cut(text, window) and bool((row[window:] != empty[window:]).any())
            for text, row in zip(texts, rows, strict=True)
        ]


# ── weights ────────────────────────────────────────────────────────────────────────────────────


class _Weights:
    """A model of open_clip and its values: mapped from their file where that can be, or built.

    `model` is whole; mapped, its tensors have no values until a tower is asked for.
    """

    def __init__(self, source: _Source) -> None:
        import open_clip

        self._file: Path | None = None
        if source.mapped is not None:
            self._stored = _stored_tensors(source.mapped)
            model = _without_values(source)
            if model is not None and self._are_those_of(model):
                self.model, self._file = model, source.mapped
                return
        self.model = open_clip.create_model_from_pretrained(
            source.architecture, return_transform=False, **source.options
        ).eval()

    def visual(self) -> "torch.nn.Module":
        """The image tower, with its values."""
        self._load(lambda key: key.startswith("visual."))
        tower: torch.nn.Module = self.model.visual
        return tower

    def text(self) -> Any:
        """The model, with the values of its text tower."""
        from retriever.openclip_towers import causal_mask

        is_apart = hasattr(self.model, "text")
        owner = self.model.text if is_apart else self.model
        self._load(lambda key: key.startswith("text.") if is_apart else key[:7] != "visual.")
        mask = getattr(owner, "attn_mask", None)
        if mask is not None and mask.is_meta:
            owner.attn_mask = causal_mask(len(mask))
        return self.model

    def update(self, state: Any) -> None:
        """Hash name and value of every tensor by name; a mapped file is read past the mapping."""
        import torch

        for key, value in sorted(self.model.state_dict().items()):
            state.update(key.encode())
            if self._file is None:
                state.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
                continue
            stored = self._stored[key]
            if stored.dtype == value.dtype:
                _hash_part(state, self._file, stored)
            else:
                tensor = self._tensors([key])[key].to(value.dtype)
                state.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())

    def _are_those_of(self, model: Any) -> bool:
        """Whether the file holds the model's tensors and nothing that would have to be made.

        The causal masks are in no file, but are always the same.
        """
        state = model.state_dict()
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        made = [name for name, _ in model.named_buffers() if name not in state]
        return shapes == {key: one.shape for key, one in self._stored.items()} and all(
            name.split(".")[-1] == "attn_mask" and "visual" not in name for name in made
        )

    def _load(self, is_wanted: Callable[[str], bool]) -> None:
        if self._file is None:
            return
        state = self.model.state_dict()
        values = self._tensors(key for key in state if is_wanted(key) and state[key].is_meta)
        self.model.load_state_dict(
            {key: value.to(state[key].dtype) for key, value in values.items()},
            strict=False,
            assign=True,
        )

    def _tensors(self, keys: Iterable[str]) -> dict[str, "torch.Tensor"]:
        from safetensors import safe_open

        with safe_open(self._file, framework="pt") as mapped:
            return {key: mapped.get_tensor(key) for key in keys}


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where in a .safetensors file the bytes of a tensor are."""

    dtype: "torch.dtype | None"
    shape: tuple[int, ...]
    begin: int
    end: int


def _stored_tensors(file: Path) -> dict[str, _Stored]:
    """What a .safetensors file holds, by its head: 8 bytes of length, and JSON."""
    import torch

    kinds = {"F32": torch.float32, "F16": torch.float16, "I64": torch.int64}
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        head = json.loads(opened.read(min(length, 1 << 27)))
    head.pop("__metadata__", None)
    return {
        key: _Stored(
            kinds.get(one["dtype"]),
            tuple(one["shape"]),
            *(8 + length + place for place in one["data_offsets"]),
        )
        for key, one in head.items()
    }


def _hash_part(state: Any, file: Path, part: _Stored) -> None:
    buffer = memoryview(bytearray(1 << 20))
    with file.open("rb", buffering=0) as opened:
        opened.seek(part.begin)
        left = part.end - part.begin
        while left:
            count = opened.readinto(buffer[:left])
            if not count:
                raise EncoderError(f"{file} is cut off")
            state.update(buffer[:count])
            left -= count


def _without_values(source: _Source) -> Any:
    """The model as open_clip would build it, with no memory for its tensors; None if it cannot."""
    import open_clip
    import torch

    options = dict(source.options)
    forced = {key: options.pop(f"image_{key}", None) for key in _PREPROCESSING}
    try:
        with torch.device("meta"), _without_notes():
            return open_clip.create_model(
                source.architecture,
                load_weights=False,
                pretrained_text=False,
                device="meta",
                force_preprocess_cfg={key: value for key, value in forced.items() if value},
                **options,
            ).eval()
    except Exception:  # whatever part of timm or transformers looks at values; open_clip's own
        return None  # builder then does it, or says what is wrong


@contextmanager
def _without_notes() -> Iterator[None]:
    """Without open_clip's warning that a model without weights is random."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_architecture(name: str) -> None:
    """Tell a mistyped name at once, by open_clip's files: importing it takes several seconds."""
    architecture = name.split("/")[0]
    spec = find_spec("open_clip")
    folders = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    known = {file.stem for folder in folders for file in folder.glob("model_configs/*.json")}
    if "open_clip" in sys.modules:  # a program may have added architectures of its own
        known.update(sys.modules["open_clip"].list_models())
    if architecture not in known:
        near = difflib.get_close_matches(architecture, sorted(known), n=3)
        hint = f"did you mean {' or '.join(near)}" if near else "`retriever models` lists some"
        raise EncoderError(
            f"{name!r} is neither a folder nor a model: open_clip has no {architecture}; {hint}"
        )


def _first_sentence(exc: BaseException) -> str:
    return first_line(exc).split(". ")[0]


@contextmanager
def _without_retry_notes() -> Iterator[None]:
    """Without what the hub's client logs on each of its tries; the last fault is in its error."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _named_model(name: str) -> _Source:
    """What open_clip is to build for "ARCH/TAG" or "ARCH/FILE"; downloads the weights of a tag."""
    import open_clip

    architecture, _, pretrained = name.partition("/")
    file = Path(pretrained).expanduser()
    beside, files = None, tuple[Path, ...]()
    known = open_clip.get_pretrained_cfg(architecture, pretrained)
    if known:
        try:
            with _without_retry_notes():
                weights = open_clip.download_pretrained(known)
        except Exception as exc:  # whatever the network and the hub's client raise
            raise EncoderError(
                f"the weights of {name} are not on this machine and cannot be downloaded "
                f"({_first_sentence(exc)}): connect once, or give a folder with the model"
            ) from exc
    elif file.is_file():
        weights, beside = str(file), file.parent
        others = (beside / one for one in (CONFIG_FILE, *_TOKENIZER_FILES))
        files = (file, *(one for one in others if one.is_file()))
        if (beside / CONFIG_FILE).is_file():
            known = _own_preprocessing(beside / CONFIG_FILE)
        else:
            known = _agreed_preprocessing(architecture, file)
    else:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise EncoderError(
            f"{pretrained!r} is neither a file nor weights that open_clip knows for {architecture}"
            f": it has {', '.join(tags) or 'none'}"
        )
    options: dict[str, Any] = {f"image_{key}": known.get(key) for key in _PREPROCESSING}
    # open_clip only warns when weights were trained with another activation than it gives them.
    quick_gelu = bool(known.get("quick_gelu"))
    mapped = Path(weights) if str(weights).endswith(".safetensors") else None
    options |= {"pretrained": str(weights), "force_quick_gelu": quick_gelu}
    return _Source(architecture, options, beside, mapped, files)


def _own_preprocessing(path: Path) -> dict[str, Any]:
    """The preprocessing that an `open_clip_config.json` gives.

    Raises:
        EncoderError: it gives none; open_clip would then take CLIP's without a word.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        preprocessing: dict[str, Any] = config["preprocess_cfg"]
        missing = [key for key in ("mean", "std") if key not in preprocessing]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise EncoderError(f"{path} has no preprocess_cfg that can be read: {exc!r}") from exc
    if missing:
        raise EncoderError(f"{path}: preprocess_cfg lacks {' and '.join(missing)}")
    return preprocessing


def _agreed_preprocessing(architecture: str, file: Path) -> dict[str, Any]:
    """The preprocessing that all of open_clip's published weights of an architecture share.

    Raises:
        EncoderError: there are none, or they differ; only a config beside the file can tell then.
    """
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    found = [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]
    agreed = [{key: one.get(key) for key in _PREPROCESSING} for one in found]
    if not agreed or any(one != agreed[0] for one in agreed):
        raise EncoderError(
            f"nothing tells how {file} wants its pictures prepared: put the model's "
            f"{CONFIG_FILE} beside it"
        )
    return agreed[0]


def _load_tokenizer(
    name: str, architecture: str, text: Mapping[str, Any], beside: Path | None
) -> Any:
    """The tokenizer that the model's config names, from beside the weights where it lies there."""
    import open_clip

    wanted = text.get("hf_tokenizer_name")
    try:
        if wanted and beside and (beside / "tokenizer.json").is_file():
            from open_clip.tokenizer import HFTokenizer  # type: ignore[import-untyped]

            return HFTokenizer(
                str(beside),
                context_length=text.get("context_length", 77),
                tokenizer_mode=text.get("tokenizer_mode"),
                **text.get("tokenizer_kwargs", {}),
            )
        with _without_retry_notes():
            return open_clip.get_tokenizer(architecture)
    except ImportError as exc:
        raise EncoderError(f"the tokenizer of {name} needs: pip install transformers") from exc
    except Exception as exc:  # whatever the network and the hub's client raise
        raise EncoderError(
            f"the tokenizer of {name} ({wanted}) is not on this machine and cannot be downloaded "
            f"({_first_sentence(exc)}): connect once, or put its tokenizer.json beside the weights"
        ) from exc
