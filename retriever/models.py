"""What models there are: the bundled one, some of open_clip's, prepared ones, and folders of ours.

The table is read without torch, open_clip or a network, so `retriever models` answers at once.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from retriever.errors import EncoderError

DEFAULT_MODEL = "mini"
MINI_FOLDER = Path(__file__).parent / "mini"
# Where `retriever models prepare` puts models; else in the user's data folder.
MODELS_VARIABLE = "RETRIEVER_MODELS"

# Changes when models that were prepared before must not be used any more.
FORMAT = 2

Recall = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One line of `retriever models`.

    `size_mb` is the weights' size in 10⁶ bytes. `recall` gives percentages by data set and metric,
    as in `recall["flickr30k"]["t2i_r@1"]`; `source` says who measured them. A model of open_clip
    that is `prepared` runs without torch.
    """

    name: str
    kind: Literal["bundled", "open_clip", "checkpoint", "onnx"]
    dim: int
    size_mb: float
    on_disk: bool
    default: bool = False
    prepared: bool = False
    recall: Recall = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True, slots=True)
class _Published:
    """A model of open_clip, with R@1 in percent, text-to-image first; None: not published."""

    name: str
    dim: int
    parameters: float  # millions, as open_clip builds it
    repository: str  # on the Hugging Face hub
    flickr30k: tuple[float, float] | None
    coco: tuple[float, float]
    source: str


_TABLE = "open_clip docs/openclip_retrieval_results.csv"
_MOBILE = "ml-mobileclip results"
_BIG_VISION = "big_vision README"

# Flickr30k 1K and COCO 5K test, zero-shot. SigLIP 2 was published for COCO only.
# fmt: off
_PUBLISHED = (
    _Published("MobileCLIP2-S0/dfndr2b", 512, 74.8, "timm/MobileCLIP2-S0-OpenCLIP",
               (69.2, 86.6), (43.7, 62.7), _MOBILE),
    _Published("MobileCLIP2-S2/dfndr2b", 512, 99.2, "timm/MobileCLIP2-S2-OpenCLIP",
               (74.8, 90.4), (48.8, 66.7), _MOBILE),
    _Published("MobileCLIP2-B/dfndr2b", 512, 149.8, "timm/MobileCLIP2-B-OpenCLIP",
               (76.5, 89.7), (49.9, 67.5), _MOBILE),
    _Published("MobileCLIP2-S4/dfndr2b", 768, 445.4, "timm/MobileCLIP2-S4-OpenCLIP",
               (78.0, 92.4), (51.5, 69.3), _MOBILE),
    _Published("ViT-B-32/openai", 512, 151.3, "timm/vit_base_patch32_clip_224.openai",
               (58.8, 78.9), (30.4, 50.1), _TABLE),
    _Published("ViT-B-32/laion2b_s34b_b79k", 512, 151.3, "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
               (66.8, 84.1), (39.3, 56.3), _TABLE),
    _Published("ViT-B-32-256/datacomp_s34b_b86k", 512, 151.3,
               "laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K",
               (64.9, 84.8), (39.9, 57.9), _TABLE),
    _Published("ViT-L-14/openai", 768, 427.6, "timm/vit_large_patch14_clip_224.openai",
               (65.0, 85.2), (36.5, 56.3), _TABLE),
    _Published("ViT-B-16-SigLIP-256/webli", 768, 203.2, "timm/ViT-B-16-SigLIP-256",
               (75.0, 90.4), (48.3, 66.1), _TABLE),
    _Published("ViT-B-32-SigLIP2-256/webli", 768, 376.9, "timm/ViT-B-32-SigLIP2-256",
               None, (47.2, 63.7), _BIG_VISION),
    _Published("ViT-B-16-SigLIP2/webli", 768, 375.2, "timm/ViT-B-16-SigLIP2",
               None, (52.1, 68.9), _BIG_VISION),
    _Published("ViT-SO400M-14-SigLIP-384/webli", 1152, 878.0, "timm/ViT-SO400M-14-SigLIP-384",
               (83.0, 94.3), (54.2, 72.4), _TABLE),
    _Published("ViT-H-14/laion2b_s32b_b79k", 1024, 986.1, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
               (77.6, 90.7), (49.5, 65.9), _TABLE),
    _Published("ViT-H-14-378-quickgelu/dfn5b", 1024, 986.7, "apple/DFN5B-CLIP-ViT-H-14-378",
               (82.0, 94.0), (55.6, 71.9), _TABLE),
)
# fmt: on


def list_models(*, folder: Path | None = None) -> list[ModelInfo]:
    """The models that can be used: `mini`, those in `folder`, prepared ones, some of open_clip's.

    Args:
        folder: looked through, one level deep, for checkpoints and ONNX folders; None: no such.
    """
    mini = _folder_info(MINI_FOLDER, "bundled")
    models = [mini] if mini else []
    if folder is not None:
        if not folder.is_dir():
            raise EncoderError(f"{folder} is no folder to look for models in")
        found = [_folder_info(path) for path in (folder, *sorted(folder.iterdir()))]
        models += [one for one in found if one]
    prepared = {one.name: one for one in _prepared_models()}
    published = [_published_info(one, _hub_cache()) for one in _PUBLISHED]
    known = {one.name for one in published}
    models += [one for name, one in prepared.items() if name not in known]
    return models + [
        replace(one, on_disk=True, prepared=True) if one.name in prepared else one
        for one in published
    ]


def models_folder() -> Path:
    """Where prepared models are: `RETRIEVER_MODELS`, or `models` in the user's data folder."""
    if folder := os.environ.get(MODELS_VARIABLE):
        return Path(folder).expanduser()
    import platformdirs

    return platformdirs.user_data_path("retriever", appauthor=False) / "models"


def prepared_folder(name: str) -> Path:
    """Where a model of open_clip is put when it is prepared: `ARCH--TAG`.

    A model from a folder or a file of weights is told from others of that name by its path.
    """
    place = Path(name).expanduser()
    architecture, _, tag = name.partition("/")
    weights = Path(tag).expanduser()
    if place.is_dir():
        parts = [place.resolve().name, _short_sum(place)]
    elif tag and weights.is_file():
        parts = [architecture, weights.stem, _short_sum(weights)]
    else:
        parts = name.split("/")
    return models_folder() / "--".join(parts)


def find_prepared(name: str) -> Path | None:
    """The folder of a prepared model, if there is one, made as it is made now, of this source."""
    folder = prepared_folder(name)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        is_current = (
            config["made"]["format"] == FORMAT and file_states(config["source"]) == config["source"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return folder if is_current else None


def is_prepared(folder: Path) -> bool:
    """Whether a folder's description is that of a prepared model, of any format."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return isinstance(config["made"], dict) and isinstance(config["source"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def file_states(files: Iterable[str]) -> dict[str, list[int]]:
    """Size and time of change, in nanoseconds, of each file that is there."""
    states = {}
    for file in files:
        try:
            found = os.stat(file)  # noqa: PTH116 (paths are strings in the JSON that keeps this)
        except OSError:
            continue
        states[file] = [found.st_size, found.st_mtime_ns]
    return states


def _short_sum(path: Path) -> str:
    return f"{zlib.crc32(os.fsencode(path.resolve())):08x}"


def _prepared_models() -> Iterator[ModelInfo]:
    folder = models_folder()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = None if path.name.startswith(".") else _folder_info(path, "onnx")
        if found and find_prepared(name := _name_in(path)) == path:
            yield replace(found, name=name, kind="open_clip", prepared=True)


def _name_in(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("name", ""))


def _folder_info(
    folder: Path, kind: Literal["bundled", "onnx", "checkpoint"] | None = None
) -> ModelInfo | None:
    """What a folder with `config.json` and weights of ours holds; None if it is no such folder."""
    if kind is None:
        kind = "onnx" if (folder / "image.onnx").is_file() else "checkpoint"
    names = ("model.safetensors",) if kind == "checkpoint" else ("image.onnx", "text.onnx")
    files = [*(folder / name for name in names), *folder.glob("*.weights")]
    try:
        size = sum(file.stat().st_size for file in files)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return ModelInfo(
            name=DEFAULT_MODEL if kind == "bundled" else str(folder),
            kind=kind,
            dim=int(config["dim"]),
            size_mb=round(size / 1e6, 1),
            on_disk=True,
            default=kind == "bundled",
            recall=config.get("recall", {}),
            source="measured by `retriever evaluate`" if config.get("recall") else "",
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _published_info(model: _Published, cache: Path) -> ModelInfo:
    recall = {"flickr30k": model.flickr30k, "coco": model.coco}
    return ModelInfo(
        name=model.name,
        kind="open_clip",
        dim=model.dim,
        size_mb=round(4 * model.parameters, 1),  # float32
        on_disk=_is_cached(model.repository, cache),
        recall={
            data: {"t2i_r@1": values[0], "i2t_r@1": values[1]}
            for data, values in recall.items()
            if values
        },
        source=model.source,
    )


def _hub_cache() -> Path:
    """Where the Hugging Face hub's client keeps what it downloaded, by its own variables."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "huggingface" / "hub"


def _is_cached(repository: str, cache: Path) -> bool:
    """Whether weights of a hub repository lie in the cache, whole."""
    snapshots = cache / f"models--{repository.replace('/', '--')}" / "snapshots"
    # A snapshot's file is a link to a blob that is given its name only when it is complete.
    files = (path for suffix in ("safetensors", "bin") for path in snapshots.glob(f"*/*.{suffix}"))
    return any(path.is_file() for path in files)
