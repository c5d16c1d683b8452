"""Made-up embeddings that are about as hard to search as real ones, and libraries filled with them.

    python benchmarks/synthetic.py made-up.lib --items 100000

A million captioned pictures are not at hand everywhere, and one Gaussian is no stand-in: there all
neighbours are about equally far away, and a text query lies among the pictures.

An embedding here is the mean of its modality plus its content, both of fixed length. Content is a
sum over three levels of topics, of the picture's own part and, for texts, of what the caption adds;
along the principal directions its variance falls as in `mini`'s embeddings of Flickr8k's 8,000
pictures. Beside those (384-d, 1,000 queries, both without a gap between the means):

                                              mini, Flickr8k     made up
    variance in the first 10/50/100/200         .46 .90 .95 .98    .46 .90 .96 .99
    cosine of the nearest picture, the tenth
      from a text                               .72 .61            .65 .53
      from a picture                            .72 .61            .73 .57
    overlap@10 of the best 20/50 by 1-bit codes
      from a text                               .94 .998           .93 .994
      from a picture                            .96 .999           .96 .998

The gap itself is that of CLIP (means .82 apart, Liang et al. 2022, arXiv:2203.02053), not the .08
of `mini`: with it 1-bit codes need three times the candidates for texts, so no figure is won by it.
"""

import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from indexes.records import CaptionRow, Extras, ItemWrite
from indexes.store import ModelSpec, Store

Vectors = NDArray[np.float32]

BLOCK = 8192  # rows made at a time
# (topics, share of the variance of contents) from the widest to the narrowest.
LEVELS = ((64, 0.35), (1024, 0.25), (16_384, 0.15))
OWN = 0.25  # share of a picture's own
CAPTION = 0.85  # cosine between the content of a picture and that of its caption
MEAN = 0.7  # length of the mean of a modality; pictures have a cosine of about its square
GAP = 0.82  # between the two means
# Principal variances fall as exp(-j / 14), and over a longer tail 15 % of them as exp(-4 j / d).
HEAD, TAIL = 14.0, 0.15
PICTURES, IMAGE_QUERIES, TEXT_QUERIES, CAPTIONS, WORDS, FACTS = range(6)  # streams of numbers
# Captions have so many words of so many that there are, the r-th as often as 1 / r (Zipf).
LENGTH, VOCABULARY = 12, 20_000
SYLLABLES = [first + second for first in "bdfgjklmnprstvwxyzqh" for second in "aeiou"]
CAMERAS = ("NIKON D90", "Canon EOS 5D", "Apple iPhone 12", None)
SIDES = (480, 640, 1080, 1920, 4000)
FIRST_TAKEN = datetime(2005, 1, 1)


class World:
    """All that embeddings of dimension `d` have in common: directions, topics, the two means."""

    def __init__(self, d: int, seed: int) -> None:
        self.d = d
        self.seed = seed
        rng = np.random.default_rng((seed, d))
        rank = np.arange(d)
        tail = d / 4
        variance = (1 - TAIL) / HEAD * np.exp(-rank / HEAD) + TAIL / tail * np.exp(-rank / tail)
        directions = np.linalg.qr(rng.standard_normal((d, d)))[0]
        self._spread = (np.sqrt(variance / variance.sum())[:, None] * directions).astype(np.float32)
        # The means differ where contents hardly vary, as those of CLIP do.
        along = np.sqrt(MEAN**2 - (GAP / 2) ** 2) * directions[-1]
        self._means = [along + half * directions[-2] for half in (GAP / 2, -GAP / 2)]
        self._topics = np.zeros((1, d), dtype=np.float32)
        for count, share in LEVELS:
            parents = self._topics[rng.integers(0, len(self._topics), count)]
            self._topics = parents + np.sqrt(share, dtype=np.float32) * self._noise(rng, count)

    def _noise(self, rng: np.random.Generator, n: int) -> Vectors:
        noise: Vectors = rng.standard_normal((n, self.d), dtype=np.float32) @ self._spread
        return noise

    def rng(self, stream: int, block: int) -> np.random.Generator:
        """Numbers of their own for each block, so that fewer rows are the first of more rows."""
        return np.random.default_rng((self.seed, self.d, stream, block))

    def contents(self, rng: np.random.Generator, n: int) -> Vectors:
        """(n, d) contents of pictures."""
        topics = self._topics[rng.integers(0, len(self._topics), n)]
        contents: Vectors = topics + np.float32(np.sqrt(OWN)) * self._noise(rng, n)
        return contents

    def captions(self, rng: np.random.Generator, contents: Vectors) -> Vectors:
        """(n, d) contents of one caption for each of the pictures."""
        added = np.float32(np.sqrt(1 - CAPTION**2)) * self._noise(rng, len(contents))
        captions: Vectors = np.float32(CAPTION) * contents + added
        return captions

    def embed(self, contents: Vectors, *, texts: bool) -> Vectors:
        """(n, d) float32 unit rows."""
        lengths = np.linalg.norm(contents, axis=1, keepdims=True)
        embeddings: Vectors = contents * (np.float32(np.sqrt(1 - MEAN**2)) / lengths)
        embeddings += self._means[texts].astype(np.float32)
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        return embeddings


@lru_cache(maxsize=1)
def world(d: int, seed: int) -> World:
    """The world of a dimension and a seed; making it takes a moment."""
    return World(d, seed)


def _blocks(n: int) -> Iterator[tuple[int, int]]:
    for block, start in enumerate(range(0, n, BLOCK)):
        yield block, min(BLOCK, n - start)


def image_vectors(n: int, d: int, seed: int) -> Iterator[Vectors]:
    """The gallery: n rows as blocks of (m, d) float32 unit rows."""
    here = world(d, seed)
    for block, m in _blocks(n):
        rng = here.rng(PICTURES, block)
        yield here.embed(here.contents(rng, BLOCK)[:m], texts=False)


def image_queries(q: int, d: int, seed: int) -> Vectors:
    """(q, d) float32 unit rows: pictures of the same kind that are not in the gallery."""
    here = world(d, seed)
    return here.embed(here.contents(here.rng(IMAGE_QUERIES, 0), q), texts=False)


def text_queries(q: int, d: int, seed: int) -> Vectors:
    """(q, d) float32 unit rows: captions of pictures that are not in the gallery."""
    here = world(d, seed)
    rng = here.rng(TEXT_QUERIES, 0)
    return here.embed(here.captions(rng, here.contents(rng, q)), texts=True)


def mini_model() -> ModelSpec:
    """The bundled model as libraries record it."""
    from retriever.encoders import load_encoder

    encoder = load_encoder("mini")
    return ModelSpec(encoder.name, encoder.dim, encoder.fingerprint)


def fill_store(
    path: Path, n: int, *, captions: int = 0, seed: int = 0, model: ModelSpec | None = None
) -> None:
    """A new library at `path` with n made-up pictures, each with so many captions.

    None of the files is there; everything else is as after `retriever index`, so that texts and
    pictures can be searched with the model: `mini` unless another is given. Captions are of
    made-up words (`word`), a quarter of the pictures have a place, and all have the columns "stars"
    and "series".
    """
    model = model if model is not None else mini_model()
    here = world(model.dim, seed)
    with Store.create(path, model) as store, store.writer() as writer:
        root_id = writer.add_root(Path("/made-up"))
        for block, m in _blocks(n):
            rng = here.rng(PICTURES, block)
            contents = here.contents(rng, BLOCK)[:m]
            images = here.embed(contents, texts=False)
            rng = here.rng(CAPTIONS, block)
            texts = np.stack(
                [here.embed(here.captions(rng, contents), texts=True) for _ in range(captions)]
                or [np.empty((m, model.dim), dtype=np.float32)],
                axis=1,
            )
            ranks = VOCABULARY ** here.rng(WORDS, block).random((m, captions, LENGTH))
            numbers = here.rng(FACTS, block).random((m, 4))
            writer.write(
                root_id,
                [
                    _item(
                        block * BLOCK + row,
                        images[row],
                        texts[row, :captions],
                        [" ".join(map(word, said)) for said in ranks[row].astype(int).tolist()],
                        numbers[row].tolist(),
                    )
                    for row in range(m)
                ],
            )
        writer.mark_indexed(root_id)
        writer.finish()


def word(rank: int) -> str:
    """The made-up word that is the rank-th most frequent, from 1 on."""
    syllables = SYLLABLES[rank % len(SYLLABLES)]
    while rank := rank // len(SYLLABLES):
        syllables += SYLLABLES[rank % len(SYLLABLES)]
    return syllables


def _item(
    number: int, image: Vectors, texts: Vectors, said: Sequence[str], random: Sequence[float]
) -> ItemWrite:
    one, two, three, four = random
    place = (180 * two - 90, 360 * three - 180) if one < 0.25 else (None, None)
    extras: Extras = (("series", f"series {number // 50}"), ("stars", float(int(5 * four) + 1)))
    return ItemWrite(
        file=f"{number // 1000:05d}/{number:08d}.jpg",
        size=100_000 + number,
        mtime_ns=1_700_000_000_000_000_000 + number,
        content_hash=number.to_bytes(16, "little"),
        width=SIDES[int(len(SIDES) * two)],
        height=SIDES[int(len(SIDES) * three)],
        taken=FIRST_TAKEN + timedelta(days=7300 * one),
        camera=CAMERAS[int(len(CAMERAS) * four)],
        latitude=place[0],
        longitude=place[1],
        perceptual_hash=int(one * 2.0**63) ^ number,
        extras=extras,
        captions=tuple(CaptionRow(text, "sidecar") for text in said),
        image_embedding=image,
        caption_embeddings=texts if len(texts) else None,
    )


@click.command()
@click.argument("library", type=click.Path(path_type=Path))
@click.option("--items", default=100_000, show_default=True)
@click.option("--captions", default=0, show_default=True, help="Of each picture.")
@click.option("--seed", default=0, show_default=True)
def main(library: Path, **options: Any) -> None:
    """Make LIBRARY, a library of made-up pictures for the bundled model."""
    started = time.perf_counter()
    fill_store(library, options["items"], captions=options["captions"], seed=options["seed"])
    click.echo(f"{options['items'] / (time.perf_counter() - started):,.0f} items/s")


if __name__ == "__main__":
    main()
