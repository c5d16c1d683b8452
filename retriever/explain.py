"""Why a picture is an answer: what each channel, each word and each part of the picture gave.

Everything is found by leaving something out and asking again, so it holds for every encoder: a word
of the query (`explain`) or a patch of the picture (`heat_map`). What a part gave is how much
the score falls without it; below zero, it rose.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from retriever.errors import PictureError, printable

if TYPE_CHECKING:
    from PIL import Image

    from retriever.calibration import Calibration
    from retriever.channels import Channel as Name
    from retriever.channels import Channels, Fusion, Mode
    from retriever.encoders import Encoder
    from retriever.search import Hit, Query

Ids = NDArray[np.int64]
Rows = NDArray[np.float32]
Scores = NDArray[np.float32]

MAX_WORDS = 64  # of a query; encoders read few more
# Scripts without spaces: each character is left out by itself.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af]"
    r"|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af]+"
    r"(?:['’-]\w+)*"
)
_UNSAFE = re.compile(r"[^\w.-]+")  # in the name of a file

CELLS = 6  # of the grid over a picture, on each side
MAX_ASPECT = 4  # beyond, a picture is squeezed: 65 copies of it are in memory
SPAN = 3  # cells that a patch covers, on each side
OVERLAY_SIDE = 640  # pixels, at most
# A smaller fall of the cosine is no finding: it is not stretched over all colours.
LEAST_PEAK = 0.05


@dataclass(frozen=True, slots=True)
class Channel:
    """What one channel gave to a hit: its score, its weight, and its share of their sum, 0 to 1."""

    name: Name
    score: float
    weight: float
    share: float


@dataclass(frozen=True, slots=True)
class Word:
    """A word of the query, and by how much the score falls without it."""

    text: str
    change: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a picture was found.

    caption, caption_score: the picture's caption nearest to the query, and its cosine with it.
    words: in the order of the query; none if it has fewer than two. percentile: share of unrelated
    texts whose best answer in this library has a lower score, 0 to 1.
    """

    channels: tuple[Channel, ...]
    caption: str | None = None
    caption_score: float | None = None
    words: tuple[Word, ...] = ()
    percentile: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The same as JSON can hold it, numbers rounded to what they can be believed to."""

        def rounded(number: float | None, digits: int = 4) -> float | None:
            return None if number is None else round(number, digits)

        return {
            "channels": {
                one.name: {
                    "score": rounded(one.score),
                    "weight": rounded(one.weight),
                    "share": rounded(one.share),
                }
                for one in self.channels
            },
            "caption": self.caption,
            "caption_score": rounded(self.caption_score),
            "words": [{"word": one.text, "change": rounded(one.change)} for one in self.words],
            "percentile": rounded(self.percentile),
        }

    def lines(self) -> list[str]:
        """The same for people, a few short lines."""
        told = []
        if len(self.channels) > 1:
            parts = [
                f"{one.name} {one.share:.0%} ({one.weight:.2f} x {one.score:.2f})"
                for one in sorted(self.channels, key=lambda one: -one.share)
            ]
            told.append(f"from {', '.join(parts)}")
        if self.caption_score is not None:
            told.append(f"nearest caption {self.caption_score:.3f}: {self.caption}")
        if self.words:
            # A minus as long as the plus; -0.00 says no more than 0.00.
            told.append("words " + ", ".join(f"{w.text} {_signed(w.change)}" for w in self.words))
        if self.percentile is not None:
            percent = math.floor(100 * self.percentile)
            share = f"{percent} % of what" if percent < 100 else "all that"
            told.append(f"above {share} unrelated texts find here")
        return told


def shares(scores: Mapping[Name, float], weights: Mapping[Name, float]) -> tuple[Channel, ...]:
    """The channels that have a weight, in the order of the weights.

    A share is of the sum of what speaks for the picture; what speaks against it has none.
    """
    parts = {name: max(0.0, weights[name] * scores[name]) for name in weights if name in scores}
    total = sum(parts.values())
    return tuple(
        Channel(name, scores[name], weights[name], part / total if total else 0.0)
        for name, part in parts.items()
    )


def without_each_word(text: str) -> list[tuple[str, str]]:
    """(word, the text without it) for the first words of a text, in their order.

    Punctuation stays where it was. Of scripts that write no spaces each character is a word.
    """
    found = list(_WORD.finditer(text))[:MAX_WORDS]
    return [(one[0], " ".join((text[: one.start()] + text[one.end() :]).split())) for one in found]


def explain(
    hits: Sequence[Hit],
    query: Query,
    mode: Mode,
    channels: Callable[[Query], Channels],
    calibration: Calibration | None = None,
) -> list[Explanation]:
    """Why each of these hits was found, in their order.

    What a word gave is told for texts of two words and more: it is asked again without each of
    them, which takes an embedding for every word and no search.

    Args:
        hits: answers to the query, by `mode`.
        query: as it was searched for; its pictures are encoded once for each word of its texts.
        mode: "image", "caption", "words" or "hybrid".
        channels: how the searcher hears a query, as `Searcher.channels`.
        calibration: of this library; without one no percentile is told.

    Raises:
        As `channels` does for the query itself.
    """
    whole = channels(query)
    ids = np.array(sorted({hit.item_id for hit in hits}), dtype=np.int64)
    known, scores = _scores(whole, ids)
    parts = _without_each_word(query)
    total = _total(scores, mode, whole.fusion)
    changes = np.zeros((len(parts), len(known)))
    for change, (_, rest) in zip(changes, parts, strict=True):
        still, without = _scores(channels(rest), known)
        where = np.searchsorted(known, still)  # another process may have removed some since
        change[where] = total[where] - _total(without, mode, whole.fusion)
    above = None
    if calibration and query.source == "text":
        above = calibration.percentile(total, mode)
    explanations = {}
    for at, item_id in enumerate(known.tolist()):
        own = {name: float(several[at]) for name, several in scores.items()}
        nearest = own.get("caption", math.nan)
        explanations[item_id] = Explanation(
            channels=shares(own, _weights(own, mode, whole.fusion)),
            caption_score=None if math.isnan(nearest) else nearest,
            words=tuple(
                Word(word, float(change))
                for (word, _), change in zip(parts, changes[:, at], strict=True)
            ),
            percentile=None if above is None else float(above[at]),
        )
    return [
        replace(found, caption=hit.caption) if found else Explanation(())
        for hit in hits
        for found in (explanations.get(hit.item_id),)
    ]


def _scores(channels: Channels, ids: Ids) -> tuple[Ids, Mapping[Name, Scores]]:
    """Which of the ids are still there, and what each channel gives to those."""
    if channels.row is not None:
        return channels.scores(ids)
    with channels.store.snapshot() as rows:  # only the words are looked at
        return ids, {"words": rows.word_scores(channels.text, ids)}


def _total(scores: Mapping[Name, Scores], mode: Mode, fusion: Fusion) -> NDArray[np.float64]:
    total = fusion.fuse(scores) if mode == "hybrid" else scores[mode]
    return np.nan_to_num(total.astype(np.float64))


def _weights(own: Mapping[Name, float], mode: Mode, fusion: Fusion) -> Mapping[Name, float]:
    if mode != "hybrid":
        return {mode: 1.0}
    if math.isnan(own["caption"]):
        return {"image": fusion.bare[1], "words": fusion.weights["words"]}
    return fusion.weights


def _without_each_word(query: Query) -> list[tuple[str, Query]]:
    """(word, the query without it) for each word of its texts; none if little would be left."""
    found = []
    for at, (text, weight) in enumerate(query.texts):
        for word, rest in without_each_word(text):
            texts = (*query.texts[:at], (rest, weight), *query.texts[at + 1 :])
            if _WORD.search(rest):
                found.append((word, replace(query, texts=texts)))
    return found[:MAX_WORDS]


def heat_map(encoder: Encoder, picture: Image.Image, query: str | Rows) -> Rows:
    """How much each place of a picture gives to its score: (h, w) float32, in units of the cosine.

    Patches of the picture, one after the other and overlapping, are covered with its mean colour;
    a place has the mean fall of the score over the patches that covered it. Places that speak
    against the query are below zero. Zeiler & Fergus 2014 (Visualizing and Understanding
    Convolutional Networks), arXiv:1311.2901, section 4.2.

    Args:
        encoder: any; it reads 65 pictures.
        picture: RGB. Its proportions are those of the map, whose shorter side is at most the one
            that the encoder reads; those of a strip are MAX_ASPECT.
        query: a text, or a unit row (d,).

    Raises:
        EncoderError: the model cannot be run.
    """
    from PIL import Image

    row = encoder.encode_texts([query])[0] if isinstance(query, str) else query
    ratio = min(1.0, encoder.image_size / min(picture.size))
    longest = MAX_ASPECT * encoder.image_size
    width, height = (min(max(CELLS, round(side * ratio)), longest) for side in picture.size)
    small = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(small)
    mean = pixels.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
    downs = [round(height * cell / CELLS) for cell in range(CELLS + 1)]
    rights = [round(width * cell / CELLS) for cell in range(CELLS + 1)]
    # From patches that only just reach in at one corner to those at the opposite one, so that
    # cells at the border are covered as often as any.
    reaches = [(max(0, last - SPAN), min(CELLS, last)) for last in range(1, CELLS + SPAN)]
    covered = [pixels]
    for top, bottom in reaches:
        for left, right in reaches:
            one = pixels.copy()
            one[downs[top] : downs[bottom], rights[left] : rights[right]] = mean
            covered.append(one)
    base, *scores = (encoder.encode_images(covered) @ row).tolist()
    falls = np.zeros((CELLS, CELLS), dtype=np.float32)
    patches = ((vertical, horizontal) for vertical in reaches for horizontal in reaches)
    for ((top, bottom), (left, right)), score in zip(patches, scores, strict=True):
        falls[top:bottom, left:right] += base - score
    cells = Image.fromarray(falls / SPAN**2)
    return np.asarray(cells.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)


def write_heat_maps(
    encoder: Encoder,
    row: Rows,
    hits: Sequence[Hit],
    folder: Path,
    *,
    notes: list[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Overlays of hits as PNG files in a folder, in their order; gives the files' paths.

    They are called by rank and picture, as `01-chelsea.png`; files of these names are replaced.

    Args:
        encoder: the one that made `row`.
        row: (d,), the query as it was compared with pictures.
        hits: 65 pictures are encoded for each.
        folder: made if absent.
        notes: a picture that cannot be read is left out and added to it.
        progress: called with (done, total) hits.

    Raises:
        EncoderError: the model cannot be run.
        OSError: a file cannot be written.
    """
    from retriever.data import read_image

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for done, hit in enumerate(hits, start=1):
        try:
            picture = read_image(hit.path, target=OVERLAY_SIDE).image
        except PictureError as exc:
            if notes is not None:
                notes.append(str(exc))
        else:
            name = _UNSAFE.sub("_", printable(hit.path.stem))[:80]
            file = folder / f"{hit.rank:02d}-{name}.png"
            overlay(picture, heat_map(encoder, picture, row)).save(file)
            written.append(file)
        if progress:
            progress(done, len(hits))
    return written


def overlay(picture: Image.Image, heat: Rows) -> Image.Image:
    """The picture in grey, with colour where the map is above zero, up to yellow at its peak.

    Lightness grows evenly with the map, so that it is read alike in print and by eyes that see
    fewer colours. A map whose peak is below LEAST_PEAK stays pale: nothing was found.
    """
    from PIL import Image

    shown = picture.convert("RGB")
    shown.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE), Image.Resampling.LANCZOS)
    level = np.clip(heat / max(float(heat.max()), LEAST_PEAK), 0.0, 1.0)
    resized = Image.fromarray(level.astype(np.float32)).resize(shown.size, Image.Resampling.BICUBIC)
    level = np.clip(np.asarray(resized), 0.0, 1.0)
    grey = np.asarray(shown.convert("L"), dtype=np.float64)[..., None].repeat(3, axis=2)
    colours = palette()[np.round(level * 255).astype(np.intp)]
    alpha = (0.85 * level**0.6)[..., None]
    # The picture's own light and dark stays to be seen through the colour.
    mixed = grey * (1 - alpha) + colours * alpha * (0.55 + 0.45 * grey / 255)
    return Image.fromarray(np.round(mixed).clip(0, 255).astype(np.uint8))


def palette() -> NDArray[np.float64]:
    """256 colours from dark violet over red to light yellow, (256, 3), sRGB from 0 to 255.

    Steps of equal size are seen as equal: lightness and hue go evenly at one chroma in OKLab
    (Ottosson 2020, A perceptual color space for image processing).
    """
    lightness = np.linspace(0.35, 0.9, 256)
    hue = np.radians(np.linspace(-70, 95, 256))
    a, b = 0.14 * np.cos(hue), 0.14 * np.sin(hue)
    cones = (
        np.stack(
            [
                lightness + 0.3963377774 * a + 0.2158037573 * b,
                lightness - 0.1055613458 * a - 0.0638541728 * b,
                lightness - 0.0894841775 * a - 1.2914855480 * b,
            ]
        )
        ** 3
    )
    to_rgb = [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
    light = (np.array(to_rgb) @ cones).T
    curved = np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.abs(light) ** (1 / 2.4) - 0.055)
    return 255 * curved


def _signed(change: float) -> str:
    text = f"{change:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "−")
