"""Models of open_clip behind the contract of `Encoder`; the only home of open_clip."""

import difflib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retriever.encoders import (
    IMAGE_BATCH,
    TEXT_BATCH,
    Array,
    ImageInput,
    batches,
    checked_embeddings,
    first_line,
    may_be_cut,
    need_models_extra,
    open_picture,
    torch_device,
)
from retriever.errors import EncoderError

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "open_clip_config.json"

# Capitals, punctuation, digits, accents, other scripts, and more words than any model reads.
_TOKENIZER_SAMPLE = ("A dog, running!", "the  3 CATS' café", "два кота 两只猫", "one two " * 80)
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


class OpenClipEncoder:
    """A model of open_clip, run by torch, with the preprocessing and tokenizer that are its own.

    open_clip gives weights from a local file CLIP's preprocessing, whatever they were trained with
    (its issue #1068), and CLIP's activation to models that were trained with another. Here both
    come from the model's own description, and where there is none, nothing is loaded.

    Args:
        name: "ARCH/TAG", whose weights open_clip downloads on first use; "ARCH/FILE" with a file of
            weights; or a folder with `open_clip_config.json`, weights and tokenizer.
        device: "auto", "cpu", "cuda" or "mps".
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
            architecture, beside = f"local-dir:{folder}", None
            options: dict[str, Any] = {}
        else:
            architecture, options, beside = _named_model(name)
        try:
            self._model, self._transform = open_clip.create_model_from_pretrained(
                architecture, device=self._device, **options
            )
        except Exception as exc:  # whatever torch, timm, safetensors and pickle raise
            raise EncoderError(f"{name} cannot be loaded: {first_line(exc)}") from exc
        self._model.eval()
        self._config: dict[str, Any] = open_clip.get_model_config(architecture)
        self._tokenizer = _load_tokenizer(name, architecture, self._config["text_cfg"], beside)
        self.dim: int = self._config["embed_dim"]
        self.max_text_tokens: int = self._tokenizer.context_length
        self.image_size: int = int(np.max(self._model.visual.image_size))

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How pictures are made ready: size, mean, std, interpolation, resize_mode, fill_color."""
        return dict(self._model.visual.preprocess_cfg)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights, architecture, preprocessing, and of what the tokenizer does."""
        import torch
        import xxhash

        state = xxhash.xxh3_128()
        for key, value in sorted(self._model.state_dict().items()):
            state.update(key.encode())
            state.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        settings = {key: self._config[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
        described = json.dumps([settings, self.preprocessing], sort_keys=True, default=list)
        state.update(described.encode())
        state.update(self._tokenizer(list(_TOKENIZER_SAMPLE)).numpy().tobytes())
        return state.hexdigest()

    def encode_images(self, images: Sequence[ImageInput]) -> Array:
        """Embeddings of pictures: (n, d) float32 unit rows; see `Encoder.encode_images`."""
        import torch

        rows = [np.empty((0, self.dim), np.float32)]
        with torch.inference_mode():
            for batch in batches(images, IMAGE_BATCH):
                ready = torch.stack([self._ready(image) for image in batch])
                features = self._model.encode_image(ready.to(self._device), normalize=True)
                rows.append(features.float().cpu().numpy())
        return checked_embeddings(np.concatenate(rows), len(images), self.dim, self.name)

    def encode_texts(self, texts: Sequence[str]) -> Array:
        """Embeddings of texts: (n, d) float32 unit rows; see `Encoder.encode_texts`."""
        import torch

        rows = [np.empty((0, self.dim), np.float32)]
        with torch.inference_mode():
            for batch in batches(texts, TEXT_BATCH):
                # Always padded to the full length: SigLIP's towers were trained so, without a mask.
                tokens = self._tokenizer(batch).to(self._device)
                features = self._model.encode_text(tokens, normalize=True)
                rows.append(features.float().cpu().numpy())
        return checked_embeddings(np.concatenate(rows), len(texts), self.dim, self.name)

    def is_cut(self, texts: Sequence[str]) -> list[bool]:
        """Which texts are read only in part; see `Encoder.is_cut`."""
        window = self.max_text_tokens
        empty, *rows = self._tokenizer(["", *texts], context_length=2 * window)
        return [
            may_be_cut(text, window) and bool((row[window:] != empty[window:]).any())
            for text, row in zip(texts, rows, strict=True)
        ]

    def _ready(self, image: ImageInput) -> "torch.Tensor":
        """(3, s, s) float32, normalised as the model's own config says."""
        ready: torch.Tensor = self._transform(open_picture(image, target=self.image_size))
        return ready


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


def _named_model(name: str) -> tuple[str, dict[str, Any], Path | None]:
    """open_clip's architecture, its options, and the folder of the weights if they are a file."""
    import open_clip

    architecture, _, pretrained = name.partition("/")
    file = Path(pretrained).expanduser()
    beside = None
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
    options = {f"image_{key}": known.get(key) for key in _PREPROCESSING}
    # open_clip only warns when weights were trained with another activation than it gives them.
    quick_gelu = bool(known.get("quick_gelu"))
    return architecture, {"pretrained": weights, "force_quick_gelu": quick_gelu} | options, beside


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
