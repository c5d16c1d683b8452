"""From a model of open_clip to a folder of ONNX files that answers without torch, in the same rows.

The weights stay in float32 in a file beside each tower, from which they are mapped, not read. A
cold text query with ViT-B-32, imports of numpy and ONNX Runtime included, CPU seconds:

    weights inside the ONNX file                          1.05   773 MB at its peak
    beside it                                             0.47   204 MB
    beside it, not rearranged for repeated runs           0.30
    and the graph taken as it is                          0.26
    and the file held against its digest (what is done)   0.28   286 MB
    in float16, half as large, widened at each run        1.5 times as much
    open_clip in torch                                    7.2    936 MB

A causal text tower reads as many tokens as a text has; the others are padded as they were trained.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import copy
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retriever.cleaning import CLEANINGS, cleaned
from retriever.encoders import Encoder, OnnxEncoder, digest, standing_for
from retriever.errors import EncoderError, UsageError
from retriever.export import (
    MAX_COSINE_ERROR,
    ExportReport,
    compact,
    cosine_error,
    export_tower,
    patches,
    save_apart,
)
from retriever.models import FORMAT, file_states, find_prepared, is_prepared, prepared_folder
from retriever.openclip import CONFIG_FILE, OpenClipEncoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Check = Callable[[Encoder, Encoder], None]

_FILES = ("image.onnx", "image.weights", "text.onnx", "text.weights", "tokenizer.json")
# Nobody takes so long: what has lain there since is of a run that was cut off.
_CUT_OFF_SECONDS = 24 * 3600
# Largest 1 - cosine between a row of torch and of the prepared model, in float32.
MAX_ERROR = 1e-5
# Points of recall by which a prepared model may differ.
MAX_RECALL_CHANGE = 0.2
# Tensors below this many bytes stay inside the ONNX file.
_INSIDE = 1024

# What tokenizers disagree about: letters and marks of all kinds, entities, cut texts.
HARD_TEXTS = (
    "",
    "A photo of TWO dogs, running!!",
    " \t tabs,\nlines\r\nand \u00a0 blanks\u3000wide ",
    "it's they're we've I'm you'll he'd o'clock 'S 'ſ",
    "caffè naïve Ærø straße İstanbul ΣΊΣΥΦΟΣ ﬁne ﬀ",
    "два кота, 两只猫 二匹の猫 고양이 두 마리 قطتان שני חתולים दो बिल्लियाँ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🐈🐈🐈 ☕️ ©®™ ½ ² Ⅷ ١٢٣ 12345 3.14",
    "&lt;b&gt;bold&lt;/b&gt; &amp;amp; &eacute; &#128008; &nbsp;",
    "âœ” mojibake â€” schÃ¶n",
    "<start_of_text> <end_of_text> >><start_of_text>x<end_of_text> </w> [PAD] <pad> <unk> </s>",
    "snake_case kebab-case path/to/file.jpg user@example.org #tag $5.00 100% (a) [b] {c}",
    "\x00\x07\x1b[31mred\x1b[0m \ud800 \ufffd \u200b\u2028",
    "“curly” ‘quotes’ – dashes — ellipsis…",
    "a" * 400,
    "supercalifragilisticexpialidocious " * 30,
    "one, two; three: " * 60,
    "猫" * 200,
)


def prepare(
    name: str,
    folder: Path | None = None,
    *,
    float16: bool = False,
    check: Check | None = None,
) -> ExportReport:
    """Write `image.onnx`, `text.onnx`, their weights, `tokenizer.json` and `config.json`.

    What is prepared already, whole and from the same source, is left as it is. Else the files
    appear in their place all at once, when they have been checked; those of a model that was
    prepared there before are replaced one by one, and nothing else is ever touched.

    Args:
        name: what `OpenClipEncoder` takes.
        folder: None is where `load_encoder(name)` looks for it.
        float16: store the weights in half the space; they are widened at each query.
        check: called with the model in torch and the prepared one; what it raises stops all.

    Returns:
        Sizes, and the error against torch on made-up pictures and texts.

    Raises:
        EncoderError: the model cannot be loaded or exported, or answers otherwise than in torch.
        UsageError: the folder holds something else than a prepared model.
        MissingExtraError: open_clip is not installed.
    """
    place = prepared_folder(name) if folder is None else folder.expanduser().resolve()
    if check is None and (found := _found(name, place, float16)):
        return found
    _refuse_others(place)
    reference = OpenClipEncoder(name, device="cpu")
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        _clear_away(place)
        temporary.mkdir(parents=True)
        _write(reference, temporary, float16=float16)
        report = _checked(reference, temporary, place, float16=float16)
        if check is not None:
            check(reference, OnnxEncoder(temporary, device="cpu"))
        _put(temporary, place)
    except OSError as exc:
        raise EncoderError(f"{place} cannot be written: {exc.strerror or exc}") from exc
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _refuse_others(place: Path) -> None:
    """Raise UsageError if a place is not free for a model, naming a file that is in the way."""
    if not place.is_dir():
        if place.exists():
            raise UsageError(f"{place} is a file: give a folder of its own")
        return
    there = sorted(path.name for path in place.iterdir())
    others = [name for name in there if name not in (*_FILES, "config.json")]
    if there and not others and not is_prepared(place):
        others = [name for name in there if name == "config.json"] or there
    if others:
        raise UsageError(
            f"{place} holds {others[0]}, which is of no prepared model: give a folder of its own"
        )


def _clear_away(place: Path) -> None:
    """Remove what runs that were cut off have left: one of this process's number, and old ones."""
    remains = rf"\.{re.escape(place.name)}\.([0-9]+)\.tmp"
    for path in place.parent.iterdir() if place.parent.is_dir() else ():
        if found := re.fullmatch(remains, path.name):
            with suppress(FileNotFoundError):  # another run has just come to its end
                is_old = time.time() - path.stat().st_mtime > _CUT_OFF_SECONDS
                if is_old or found[1] == str(os.getpid()):
                    shutil.rmtree(path, ignore_errors=True)


def _put(written: Path, place: Path) -> None:
    """Move a model that is written to its place, which is free or holds another one."""
    if not place.exists():
        with suppress(OSError):  # another run may have been quicker
            written.rename(place)
            return
    place.mkdir(exist_ok=True)
    # The description comes first: cut off after it, what lies there is known for a prepared model,
    # does not match its digests, and is made again.
    for file in ("config.json", *_FILES):
        (written / file).replace(place / file)


def is_checkpoint(name: str) -> bool:
    """Whether a name is that of a folder which is no model of open_clip's, so one of ours."""
    folder = Path(name).expanduser()
    return folder.is_dir() and not (folder / CONFIG_FILE).is_file()


def recall_check(dataset: Path, *, split: str | None = None) -> Check:
    """A check that no recall on a data set differs by more than 0.2 points from torch's."""

    def check(reference: Encoder, prepared: Encoder) -> None:
        from retriever.evaluation import evaluate

        before, after = (
            evaluate(dataset, encoder=one, split=split, resamples=0)["metrics"]
            for one in (reference, prepared)
        )
        for metric, value in before.items():
            if "r@" in metric and not abs(after[metric] - value) <= MAX_RECALL_CHANGE:
                raise EncoderError(
                    f"the prepared model has {metric} {after[metric]:.1f} on {dataset}, and"
                    f" {value:.1f} in torch"
                )

    return check


def _found(name: str, place: Path, float16: bool) -> ExportReport | None:
    """The report on a model that lies there already, if it is whole and what is wanted."""
    if place != find_prepared(name):
        return None
    encoder = OnnxEncoder(place, device="cpu")
    made = encoder.config["made"]
    if made["float16"] != float16 or encoder.verify():
        return None
    return _report(place, place, made["image_cosine_error"], made["text_cosine_error"])


def _report(written: Path, place: Path, image_error: float, text_error: float) -> ExportReport:
    def size(pattern: str) -> int:
        return sum(path.stat().st_size for path in written.glob(pattern))

    return ExportReport(
        folder=place,
        image_bytes=size("image.*"),
        text_bytes=size("text.*"),
        tokenizer_bytes=size("tokenizer.json"),
        image_cosine_error=image_error,
        text_cosine_error=text_error,
    )


# ── files ──────────────────────────────────────────────────────────────────────────────────────


def _write(encoder: OpenClipEncoder, folder: Path, *, float16: bool) -> None:
    """The files, unchecked."""
    import torch

    from retriever.openclip_towers import WithoutToken, with_plain_attention

    tokenizer, text = _tokenizer(encoder)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    size = encoder.image_size
    pixels = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    images = with_plain_attention(encoder.image_tower())
    _write_tower(images, {"pixels": pixels}, {0: "batch"}, folder / "image.onnx", float16)
    del images
    tower = encoder.text_tower()
    tokens = encoder.tokenizer(["a dog", "two dogs on a bed"])
    ids = tokens[:, : tower.read(tokens.numpy())]
    axes = {0: "batch"}
    if tower.is_causal:  # then what follows the end of a text changes nothing
        axes[1] = "tokens"
        del text["padding"]
    texts = with_plain_attention(tower)
    if getattr(encoder.tokenizer, "strip_sep_token", False):
        texts = WithoutToken(texts, encoder.tokenizer.tokenizer.sep_token_id)
    _write_tower(texts, {"input_ids": ids}, axes, folder / "text.onnx", float16)
    image = encoder.preprocessing
    config = {
        "name": encoder.name,
        "dim": encoder.dim,
        "image": {
            "size": image.size,
            "resize": image.resize,
            "interpolation": image.interpolation,
            "fill": image.fill,
        },
        "text": {"max_tokens": encoder.max_text_tokens, "mask": False} | text,
        "files": {path.name: _digest(path) for path in sorted(folder.iterdir())},
        # `find_prepared` sees by these that the model has changed since.
        "source": file_states(os.fspath(path.resolve()) for path in encoder.files),
    }
    config["stands_for"] = standing_for(config, encoder.fingerprint)
    _save_config(folder, config)


def _write_tower(
    tower: Any, inputs: Mapping[str, Any], axes: dict[int, str], path: Path, float16: bool
) -> None:
    """`tower.onnx` and its weights beside it, as `tower.weights`."""
    import onnx

    scratch = path.with_suffix("")  # beyond 2 GB the exporter writes a file for each tensor
    scratch.mkdir()
    whole = scratch / path.name
    export_tower(tower, inputs, axes, whole)
    if float16:
        compact(whole, int8=False)
    model = onnx.load(whole)
    shutil.rmtree(scratch)
    save_apart(model, path, least_bytes=_INSIDE)


def _digest(path: Path) -> str:
    with path.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as contents:
        return digest(contents)


def _save_config(folder: Path, config: Mapping[str, Any]) -> None:
    # In ASCII: a path among the sources may hold bytes that are no text.
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


# ── tokenizers ─────────────────────────────────────────────────────────────────────────────────

# CLIP's words: contractions, runs of letters, single digits, runs of anything else. To the engine
# that CLIP's tokenizer was written for, a long s is a small s, and the iota subscript, of which the
# capital is a letter, is neither a letter nor anything else.
_CLIP_WORDS = (
    r"<[sſ]tart_of_text>|<end_of_text>|'[sſ]|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\x{345}]+"
)


def _tokenizer(encoder: OpenClipEncoder) -> tuple["Tokenizer", dict[str, Any]]:
    """A tokenizer that gives the same tokens without open_clip, and how its texts are cleaned.

    Raises:
        EncoderError: it does not, for one of `HARD_TEXTS`.
    """
    theirs = encoder.tokenizer
    is_clip = hasattr(theirs, "bpe_ranks")
    padding: dict[str, Any] = {"pad_id": 0}
    if is_clip:
        ours = clip_tokenizer(theirs)
    else:
        ours = _from_transformers(encoder)
        padding = {"pad_id": theirs.tokenizer.pad_token_id}
        padding["direction"] = theirs.tokenizer.padding_side
    default = "lower" if is_clip else "whitespace" if hasattr(theirs, "clean_fn") else CLEANINGS[-1]
    clean = encoder.text_settings.get("tokenizer_kwargs", {}).get("clean", default)
    trial = type(ours).from_str(ours.to_str())
    trial.enable_truncation(encoder.max_text_tokens)
    trial.enable_padding(length=encoder.max_text_tokens, **padding)
    texts = [cleaned(text, clean) for text in HARD_TEXTS]
    found = np.array([one.ids for one in trial.encode_batch(texts)])
    wanted = theirs(list(HARD_TEXTS)).numpy()
    if getattr(theirs, "strip_sep_token", False):
        found[found == theirs.tokenizer.sep_token_id] = 0
    if found.shape != wanted.shape or (found != wanted).any():
        raise EncoderError(
            f"the tokenizer of {encoder.name} cannot be written so that it does the same"
        )
    return ours, {"clean": clean, "padding": padding}


def clip_tokenizer(theirs: Any) -> "Tokenizer":
    """open_clip's `SimpleTokenizer` as one of the library tokenizers; texts come cleaned to it.

    The words <start_of_text> and <end_of_text> are single tokens where a text has them, though only
    as words: ">><start_of_text>" has none. So they are no special tokens but built by merges of
    their own, the last of all, from the pieces that the other merges leave of them.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    plain = copy(theirs)
    plain.cache = {}
    vocabulary, merges = dict(theirs.encoder), list(theirs.bpe_ranks)
    ends = []
    for special in ("<start_of_text>", "<end_of_text>"):
        left, *others = plain.bpe(special).split(" ")
        for piece in others:
            merges.append((left, piece))
            left += piece
            vocabulary.setdefault(left, len(vocabulary))
        vocabulary[left] = vocabulary.pop(special)
        ends.append((left, vocabulary[left]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    (start, _), (end, _) = ends
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[start, "$A", end], special_tokens=ends
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _from_transformers(encoder: OpenClipEncoder) -> "Tokenizer":
    from tokenizers import Tokenizer

    backend = getattr(encoder.tokenizer.tokenizer, "backend_tokenizer", None)
    has_mode = bool(getattr(encoder.tokenizer, "tokenizer_mode", None))
    if backend is None or has_mode:
        raise EncoderError(
            f"{encoder.name} cannot be prepared: its tokenizer is none of the library tokenizers"
        )
    ours: Tokenizer = Tokenizer.from_str(backend.to_str())
    ours.no_padding()
    ours.no_truncation()
    return ours


# ── the check against torch ────────────────────────────────────────────────────────────────────


def _checked(
    reference: OpenClipEncoder, written: Path, place: Path, *, float16: bool
) -> ExportReport:
    """The report on the files in `written`, which will be at `place`; kept in their description."""
    exported = OnnxEncoder(written, device="cpu")
    pictures, texts = patches(), [text for text in HARD_TEXTS if text]
    allowed = MAX_COSINE_ERROR if float16 else MAX_ERROR
    errors = {
        "image": cosine_error(reference.encode_images(pictures), exported.encode_images(pictures)),
        "text": max(
            # Alone, as a query is, and together, as captions are.
            cosine_error(reference.encode_texts(texts), exported.encode_texts(texts)),
            cosine_error(reference.encode_texts(texts[:1]), exported.encode_texts(texts[:1])),
        ),
    }
    for tower, error in errors.items():
        if not error <= allowed:
            raise EncoderError(
                f"{reference.name} cannot be prepared: its {tower} tower differs from torch by"
                f" {error:.1e} in cosine, more than {allowed:.0e}"
            )
    made: dict[str, Any] = {"format": FORMAT, "float16": float16}
    made |= {f"{tower}_cosine_error": max(0.0, error) for tower, error in errors.items()}
    _save_config(written, exported.config | {"made": made})
    return _report(written, place, made["image_cosine_error"], made["text_cosine_error"])
