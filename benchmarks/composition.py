"""Queries that compose: what is left out, what is added, and texts of more than one sentence.

These functions measure a library whose pictures have several captions; `answers.py` makes it, calls
`measure` and prints. What a picture shows is told by its captions alone, in words that people wrote
who saw it: `THINGS` has for each thing the words that say it is there, and further ones that leave
it open. A picture shows a thing if more than half of its captions say so, and does not show it if
none of them has a word of either kind; any other picture is judged neither way.

**What is left out.** Each pair of things, "a dog" without "water", is a query if ten pictures show
the first alone and three show both. Of the first ten answers to "a dog", those that show water are
unwanted, those that show a dog and no water are wanted. `removed` is how many fewer unwanted ones
the first ten have afterwards, new ones that moved up among them counted; `lost` how many of the
wanted ones are no longer among them; `wanted` how many wanted ones there are then, of those before.
Queries without unwanted answers are left out of account. This is asked twice: of pictures alone,
as if the library had no captions; and with captions, each picture's in turn being kept from the
library, which then is the only judge of what it shows, while what it does not show is still told by
all. By that a caption's words can err only by letting something pass. Pictures are ranked by their
cosine, with captions by the mean of it and of the nearest caption's. At last the library itself is
asked, in the way that it answers by default, and judged by the captions that it does not have.

**What is added.** Two texts, or a text and a picture that shows one thing and not the other: the
share of pictures that show both among the first ten, or among as many as there are.

**Prompts and long texts.** Recall of a picture by one of its captions in a template, and by several
of them as one text of several sentences.

Intervals are 95 %, drawn by picture.
"""

import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import format_table

from indexes import words
from indexes.store import Store
from retriever import metrics
from retriever.asking import Query, thing
from retriever.composing import Composed, compose
from retriever.encoders import Encoder
from retriever.library import Library

Ids = NDArray[np.int64]
Rows = NDArray[np.float32]
Flags = NDArray[np.bool_]
Counts = NDArray[np.int64]
Statistic = Callable[[Ids], Mapping[str, float]]

K = 10
LEAST_WANTED, LEAST_BOTH = 10, 3  # pictures that show the first thing alone, and both
PICTURES_PER_PAIR = 5  # asked with, beside a text
TEMPLATES = ("a photo of {}", "a picture of {}")
SENTENCES = (2, 5)
GAP = 1.0  # length of what is added to all pictures, and another to all texts; see `with_gap`

_PEOPLE = (
    "person people persons man men guy guys gentleman woman women lady ladies child children kid"
    " kids boy boys girl girls baby babies toddler toddlers infant teenager teenagers adult adults"
    " crowd player players cyclist cyclists bicyclist bicyclists biker bikers surfer surfers skier"
    " skiers snowboarder snowboarders skateboarder skateboarders climber climbers hiker hikers"
    " swimmer swimmers motorcyclist motorcyclists rider riders worker workers couple family friends"
)
# A thing as it is asked for: words that say it is there; words that leave it open.
THINGS: Mapping[str, tuple[str, str]] = {
    "a dog": (
        "dog dogs puppy puppies poodle collie terrier greyhound greyhounds labrador retriever"
        " dachshund rottweiler bulldog husky beagle dalmatian",
        "animal animals pet hound shepherd",
    ),
    "a man": (
        "man men guy guys gentleman",
        "person people persons adult adults player players rider worker workers father dad couple"
        " family crowd group team someone biker cyclist surfer skier snowboarder climber hiker"
        " skateboarder bicyclist motorcyclist",
    ),
    "a woman": (
        "woman women lady ladies",
        "person people persons adult adults mother mom bride couple family crowd group player"
        " players friends girl girls female",
    ),
    "a child": (
        "child children kid kids boy boys girl girls baby babies toddler toddlers infant",
        "person people persons teenager teenagers family crowd group players player youth son"
        " daughter",
    ),
    "a boy": (
        "boy boys",
        "child children kid kids baby toddler person people infant teenager",
    ),
    "a girl": (
        "girl girls",
        "child children kid kids baby toddler person people infant woman women teenager lady",
    ),
    "people": (_PEOPLE, "hand hands face group team someone legs feet"),
    "water": (
        "water ocean sea lake river pool pond stream creek wave waves surf surfer surfers surfing"
        " surfboard swimming swim swims swimmer swimmers underwater waterfall kayak kayaking"
        " kayaker canoe",
        "wet beach shore boat boats splash splashes splashing puddle rain fountain sprinkler dock"
        " pier raft hose tub bath wakeboarder wakeboard wakeboarding shoreline surfs seashore dives"
        " diving",
    ),
    "a beach": (
        "beach beaches",
        "sand sandy shore ocean sea seashore coast waves wave surf shoreline water",
    ),
    "snow": (
        "snow snowy snowboard snowboarder snowboarders snowboarding ski skis skier skiers skiing"
        " snowball snowman",
        "ice icy sled sledding winter slope mountain toboggan",
    ),
    "grass": ("grass grassy lawn", "field meadow yard park green"),
    "a ball": (
        "ball balls football soccer basketball baseball volleyball",
        "tennis player players game team rugby hockey",
    ),
    "a bicycle": (
        "bike bikes bicycle bicycles bicyclist bicyclists bmx cyclist cyclists bicycling",
        "biker bikers cycling motorcycle motorbike rider ride rides riding",
    ),
    "a car": ("car cars", "truck vehicle vehicles van taxi race suv jeep racing"),
    "a street": (
        "street streets road roads",
        "sidewalk city pavement corner alley path crosswalk downtown",
    ),
    "a mountain": (
        "mountain mountains",
        "hill hills cliff rock rocks rocky peak summit climbing climber slope",
    ),
    "trees": ("tree trees", "forest wood woods wooded leaves branch branches log jungle"),
    "rocks": ("rock rocks rocky boulder boulders", "cliff mountain stone stones"),
    "sand": ("sand sandy", "beach dirt dune"),
    "a hat": ("hat hats", "cap helmet beanie hood caps"),
    "a helmet": ("helmet helmets", "hat biker bicyclist bike motorcycle gear"),
    "sunglasses": ("sunglasses", "glasses goggles shades"),
    "a building": (
        "building buildings",
        "house store shop city skyscraper church tower structure",
    ),
    "a bench": ("bench benches", "seat couch chair"),
    "a skateboard": (
        "skateboard skateboarder skateboarders skateboarding skateboards",
        "skate skater skating ramp board",
    ),
    "a motorcycle": (
        "motorcycle motorcycles motorcyclist motorcyclists motorbike motorbikes motocross",
        "dirt bike biker bikes bikers",
    ),
    "a horse": ("horse horses pony", "cowboy rodeo bull bronco"),
    "a boat": ("boat boats canoe kayak raft sailboat", "ship oar rowing paddle"),
    "a toy": ("toy toys", "frisbee stick ball doll"),
    "a frisbee": ("frisbee", "toy disc"),
    "a fence": ("fence fences", "railing gate"),
}


# ── what is measured on ──────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class World:
    """Pictures with their captions; of each, `owners` has the picture's place.

    images: (n, d). paths: (n). captions: (m, d). texts: (m). numbers: (m,) which of its picture's
    each caption is.
    """

    images: Rows
    captions: Rows
    texts: tuple[str, ...]
    owners: Ids
    numbers: Ids
    paths: tuple[Path, ...] = ()

    @cached_property
    def said(self) -> Mapping[str, Flags]:
        """By thing, the captions that say it is there: (m,)."""
        return self._having(lambda says, _: says)

    @cached_property
    def may(self) -> Mapping[str, Flags]:
        """By thing, the captions that say it is there or leave it open: (m,)."""
        return self._having(lambda says, leaves_open: says | leaves_open)

    def _having(self, chosen: Callable[[set[str], set[str]], set[str]]) -> dict[str, Flags]:
        spoken = [set(re.findall(r"[a-z]+", text.lower())) for text in self.texts]
        return {
            name: np.array([bool(one & chosen(set(says.split()), set(rest.split())))
                            for one in spoken], dtype=np.bool_)
            for name, (says, rest) in THINGS.items()
        }  # fmt: skip

    @cached_property
    def shows(self) -> Mapping[str, Flags]:
        """By thing, the pictures more than half of whose captions say it is there: (n,)."""
        every = np.bincount(self.owners, minlength=len(self.images))
        return {name: 2 * self._count(flags) > every for name, flags in self.said.items()}

    @cached_property
    def lacks(self) -> Mapping[str, Flags]:
        """By thing, the pictures none of whose captions says or leaves open that it is there."""
        return {name: self._count(flags) == 0 for name, flags in self.may.items()}

    def _count(self, flags: Flags) -> Ids:
        return np.bincount(self.owners[flags], minlength=len(self.images))

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Two things of which neither is the other or a kind of it, and that can be asked for."""
        for one, other in self._unlike():
            alone = self.shows[one] & self.lacks[other]
            both = self.shows[one] & self.shows[other]
            if alone.sum() >= LEAST_WANTED and both.sum() >= LEAST_BOTH:
                yield one, other

    def _unlike(self) -> Iterator[tuple[str, str]]:
        for one, (says, leaves_open) in THINGS.items():
            for other, (others, others_open) in THINGS.items():
                mine, theirs = set(says.split()), set(others.split())
                if not mine & (theirs | set(others_open.split())) | theirs & (
                    set(leaves_open.split())
                ):
                    yield one, other


def read_world(library: Path, encoder: Encoder, asked: Sequence[str] = ()) -> World:
    """The pictures of a library in the order of their names, each with `asked`, one more caption.

    Raises ValueError if there is not one for each.
    """
    with Store.open(library, read_only=True) as store:
        items = sorted(store.items(store.item_ids()), key=lambda item: item.file)
        if asked and len(asked) != len(items):
            raise ValueError(f"{len(asked)} captions for {len(items)} pictures")
        images = store.embeddings("image", [item.item_id for item in items])
        texts, owners, numbers, ids = [], [], [], []
        for place, item in enumerate(items):
            texts += [caption.text for caption in item.captions]
            ids += store.caption_ids(item.item_id)
            owners += [place] * len(item.captions)
            numbers += range(len(item.captions))
        captions = store.embeddings("caption", ids)
    if asked:
        owners += range(len(items))
        numbers += [len(item.captions) for item in items]
        captions = np.concatenate([captions, encoder.encode_texts(asked)])
    return World(
        images,
        captions,
        (*texts, *asked),
        np.array(owners, np.int64),
        np.array(numbers, np.int64),
        tuple(item.path for item in items),
    )


def with_gap(world: World, encoder: Encoder, seed: int) -> tuple[World, Callable[[Rows], Rows]]:
    """The world as a model has it whose modalities lie apart, and its way to embed texts.

    `mini` was trained so that pictures and texts have hardly a gap between them. CLIP's do have
    one: about 0.8 from mean to mean, and true pairs at a cosine near 0.3. Two vectors at a right
    angle, one added to all pictures and one to all texts, give both.
    """
    rng = np.random.default_rng(seed)
    apart = np.linalg.qr(rng.normal(size=(encoder.dim, 2)))[0].T.astype(np.float32) * GAP

    def moved(rows: Rows, number: int) -> Rows:
        rows = rows + apart[number]
        unit: Rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit

    there = World(
        moved(world.images, 0), moved(world.captions, 1), world.texts, world.owners, world.numbers
    )
    return there, lambda rows: moved(rows, 1)


def intervals(statistic: Statistic, n: int, resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Each number of a statistic as `value` and `interval`; see `metrics.bootstrap_interval`."""
    once = statistic(np.ones(n, np.int64))
    bounds = metrics.bootstrap_interval(statistic, [n], resamples=resamples, seed=seed)
    return {name: {"value": once[name], "interval": list(bounds[name])} for name in once}


# ── what is left out ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """How often each picture was among the first ten as what: five (n,) counts."""

    unwanted_before: Counts
    unwanted: Counts
    wanted_before: Counts
    wanted: Counts
    lost: Counts

    def shares(self, drawn: Ids) -> dict[str, float]:
        """In percent, if each picture counts `drawn` times."""
        unwanted_before = max(int(drawn @ self.unwanted_before), 1)
        wanted_before = max(int(drawn @ self.wanted_before), 1)
        return {
            "removed": 100 * (1 - int(drawn @ self.unwanted) / unwanted_before),
            "lost": 100 * int(drawn @ self.lost) / wanted_before,
            "wanted": 100 * int(drawn @ self.wanted) / wanted_before,
        }


WITHOUT = "left out, as `--without` does"
WAYS = (
    'asked as "A without B"',
    "subtracted by half",
    "subtracted",
    "projected away",
    "words only",
    WITHOUT,
)


class _Tally:
    """Counts by way; see `Judged`."""

    def __init__(self, n: int) -> None:
        self._counts = {way: np.zeros((5, n), np.int64) for way in WAYS}
        self._measured: set[str] = set()
        self.queries = 0

    def add(self, before: Ids, after: Mapping[str, Ids], unwanted: Flags, wanted: Flags) -> None:
        """One query's first answers, if any of them was unwanted."""
        self._measured |= after.keys()
        if not unwanted[before].any():
            return
        self.queries += 1
        for way, now in after.items():
            gone = np.setdiff1d(before[wanted[before]], now)
            for counts, places in zip(
                self._counts[way],
                (before[unwanted[before]], now[unwanted[now]],
                 before[wanted[before]], now[wanted[now]], gone),
                strict=True,
            ):  # fmt: skip
                counts[places] += 1

    def judged(self) -> dict[str, Judged]:
        """Ways that were measured."""
        return {way: Judged(*self._counts[way]) for way in WAYS if way in self._measured}


def measure_exclusion(
    world: World, encoder: Encoder, *, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """For pictures alone and with captions, what each way of leaving something out does."""
    pairs = list(world.pairs())
    composed = [_without(encoder, one, other) for one, other in pairs]
    rows = _ways(encoder, pairs)
    by_image = {way: world.images @ row.T for way, row in rows.items()}
    by_caption = {way: world.captions @ row.T for way, row in rows.items()}
    said = _said_words(world, {other for _, other in pairs})
    none = np.zeros((0, world.images.shape[1]), np.float32), np.zeros(0, np.int64)

    alone = _Tally(len(world.images))
    for at, (one, other) in enumerate(pairs):
        ranked = {way: _first(scores[:, at]) for way, scores in by_image.items()}
        before = ranked.pop("")
        shown = composed[at].shows(world.images, *none)
        ranked[WITHOUT] = _first(np.where(shown, -np.inf, by_image[""][:, at]))
        alone.add(before, ranked, world.shows[other], world.shows[one] & world.lacks[other])

    both = _Tally(len(world.images))
    for number in range(int(world.numbers.max()) + 1):
        kept, judge = world.numbers != number, world.numbers == number
        owners = world.owners[kept]
        for at, (one, other) in enumerate(pairs):
            scores = {
                way: (by_image[way][:, at] + _nearest(by_caption[way][kept, at], owners, world)) / 2
                for way in rows
            }
            ranked = {way: _first(each) for way, each in scores.items()}
            before = ranked.pop("")
            words_say = _any(said[other][kept], owners, world)
            shown = composed[at].shows(world.images, world.captions[kept], owners) | words_say
            ranked[WITHOUT] = _first(np.where(shown, -np.inf, scores[""]))
            ranked["words only"] = _first(np.where(words_say, -np.inf, scores[""]))
            shows = _any(world.said[other][judge], world.owners[judge], world)
            has_one = _any(world.said[one][judge], world.owners[judge], world)
            both.add(before, ranked, shows, has_one & world.lacks[other])
    return {
        name: {"queries": tally.queries}
        | {
            way: intervals(judged.shares, len(world.images), resamples, seed)
            for way, judged in tally.judged().items()
        }
        for name, tally in (("pictures", alone), ("captions", both))
    }


def measure_library(library: Library, world: World, *, resamples: int, seed: int) -> dict[str, Any]:
    """What the library itself leaves out, by the last caption of each picture, which it has not."""
    place_of = {path: place for place, path in enumerate(world.paths)}
    last = np.bincount(world.owners, minlength=len(world.images)) - 1
    judge = world.numbers == last[world.owners]
    tally = _Tally(len(world.images))
    for one, other in world.pairs():
        query = Query(texts=((one, 1.0),))
        before, after = (
            np.array([place_of[hit.path] for hit in library.searcher.images(each, K, all=True)],
                     dtype=np.int64)
            for each in (query, replace(query, without=(other,)))
        )  # fmt: skip
        shows = _any(world.said[other][judge], world.owners[judge], world)
        has_one = _any(world.said[one][judge], world.owners[judge], world)
        tally.add(before, {WITHOUT: after}, shows, has_one & world.lacks[other])
    shares = tally.judged()[WITHOUT].shares
    return {"queries": tally.queries} | intervals(shares, len(world.images), resamples, seed)


def _without(encoder: Encoder, one: str, other: str) -> Composed:
    return compose(Query(texts=((one, 1.0),), without=(other,)), encoder)


def _ways(encoder: Encoder, pairs: Sequence[tuple[str, str]]) -> dict[str, Rows]:
    """By way, what is asked instead: a unit row for each pair; "" is the first thing alone."""
    one, other = (encoder.encode_texts([pair[place] for pair in pairs]) for place in (0, 1))
    sentences = encoder.encode_texts([f"{one} without {thing(other)}" for one, other in pairs])
    along = np.sum(one * other, axis=1, keepdims=True) * other
    rows = {
        "": one,
        WAYS[0]: sentences,
        WAYS[1]: one - other / 2,
        WAYS[2]: one - other,
        WAYS[3]: one - along,
    }
    return {way: _units(row) for way, row in rows.items()}


def _said_words(world: World, things: Iterable[str]) -> dict[str, Flags]:
    """By thing, the captions that have its words as a library finds them: (m,)."""
    with closing(sqlite3.connect(":memory:")) as connection:
        words.create(connection)
        words.put(connection, [words.row(at, [text]) for at, text in enumerate(world.texts)])
        found = {}
        for name in things:
            asks = words.expression(thing(name), phrase=True, columns=("captions",))
            rows = connection.execute("SELECT rowid FROM words WHERE words MATCH ?", [asks])
            found[name] = np.isin(np.arange(len(world.texts)), [row_id for (row_id,) in rows])
    return found


def _nearest(scores: NDArray[np.floating], owners: Ids, world: World) -> NDArray[np.floating]:
    nearest = np.full(len(world.images), -1.0)
    np.maximum.at(nearest, owners, scores)
    return nearest


def _any(flags: Flags, owners: Ids, world: World) -> Flags:
    found: Flags = np.bincount(owners[flags], minlength=len(world.images)) > 0
    return found


def _first(scores: NDArray[np.floating]) -> Ids:
    """Places of the K best; equal ones in their order; those at minus infinity never."""
    best = np.argsort(-scores, kind="stable")[:K]
    return best[np.isfinite(scores[best])]


def _units(rows: NDArray[np.floating]) -> Rows:
    unit: Rows = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
    return unit


# ── what is added ────────────────────────────────────────────────────────────────────────────────


def measure_sums(
    world: World, encoder: Encoder, *, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """The share of pictures that show both things among the first, by what is added and how."""
    pairs = list(world.pairs())
    unordered = [pair for pair in pairs if pair[0] < pair[1] or pair[::-1] not in pairs]
    names = sorted({name for pair in pairs for name in pair})
    rng = np.random.default_rng(seed)
    asked = [
        (one, other, int(place))
        for one, other in pairs
        for place in rng.permutation(
            np.flatnonzero(world.shows[one] & world.lacks[other])
        )[:PICTURES_PER_PAIR]
    ]  # fmt: skip
    texts = dict(zip(names, encoder.encode_texts(names), strict=True))
    together = encoder.encode_texts([f"{one}, {other}" for one, other in unordered])
    found = {
        "two texts": {"queries": len(unordered)}
        | _precisions(
            world,
            [(one, other, None) for one, other in unordered],
            {
                "added": [_units(texts[one] + texts[other]) for one, other in unordered],
                "read together": list(together),
            },
            resamples,
            seed,
        )
    }
    apart, move = with_gap(world, encoder, seed)
    there = {name: move(row[None])[0] for name, row in texts.items()}
    for name, here, rows in (
        ("a text and a picture", world, texts),
        ("the same with a gap", apart, there),
    ):
        means = np.stack([here.images.mean(axis=0), here.captions.mean(axis=0)])
        ways = {
            "added": [_units(rows[other] + here.images[place]) for _, other, place in asked],
            "added without the means": [
                compose(
                    Query(texts=((other, 1.0),), images=((Path("picture"), 1.0),)),
                    _Reader(encoder, rows, here.images[place]),
                    means,
                ).row
                for _, other, place in asked
            ],
        }
        found[name] = (
            {"queries": len(asked), "gap": float(np.linalg.norm(means[0] - means[1]))}
            | _precisions(here, asked, ways, resamples, seed)
        )  # fmt: skip
    return found


class _Reader:
    """An encoder that has read some texts, and one picture, already."""

    image_size = 1
    name = fingerprint = "reader"

    def __init__(
        self, encoder: Encoder, texts: Mapping[str, Rows], picture: Rows | None = None
    ) -> None:
        self._encoder, self._texts, self._picture = encoder, dict(texts), picture
        self.dim, self.max_text_tokens = encoder.dim, encoder.max_text_tokens

    def encode_texts(self, texts: Sequence[str]) -> Rows:
        if unread := [text for text in texts if text not in self._texts]:
            self._texts.update(zip(unread, self._encoder.encode_texts(unread), strict=True))
        return np.stack([self._texts[text] for text in texts])

    def encode_images(self, images: Sequence[Any]) -> Rows:
        assert self._picture is not None, "there is no picture"
        return self._picture[None]

    def is_cut(self, texts: Sequence[str]) -> list[bool]:
        return self._encoder.is_cut(texts)


def _precisions(
    world: World,
    asked: Sequence[tuple[str, str, int | None]],
    ways: Mapping[str, Sequence[Rows]],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """By way, the mean share in percent, and by how much the last way's is greater."""
    n = len(world.images)
    both = [world.shows[one] & world.shows[other] for one, other, _ in asked]
    most = [min(K, int(flags.sum())) for flags in both]
    counts = {}
    for way, rows in ways.items():
        counts[way] = np.zeros((len(asked), n), dtype=np.float32)
        for at, (row, (*_, own)) in enumerate(zip(rows, asked, strict=True)):
            scores = world.images @ row
            if own is not None:
                scores[own] = -np.inf
            first = _first(scores)
            counts[way][at, first[both[at][first]]] = 100 / most[at]
    hits = {way: count.mean(axis=0) for way, count in counts.items()}
    *_, first_way, last_way = ways

    def statistic(drawn: Ids) -> dict[str, float]:
        shares = {way: float(drawn @ each) for way, each in hits.items()}
        return shares | {"difference": shares[last_way] - shares[first_way]}

    return intervals(statistic, n, resamples, seed)


# ── texts ────────────────────────────────────────────────────────────────────────────────────────


def measure_texts(
    world: World, encoder: Encoder, *, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """R@1 of a picture by its captions in templates, and as one long text, in percent."""
    n = len(world.images)
    captions: list[list[str]] = [[] for _ in range(n)]
    for text, owner in zip(world.texts, world.owners.tolist(), strict=True):
        captions[owner].append(text.rstrip(" ."))
    firsts = [several[0] for several in captions]
    small = [text[:1].lower() + text[1:] for text in firsts]
    queries = {"templates": {"{}": encoder.encode_texts(firsts)}}
    for template in TEMPLATES:
        filled = [template.format(text) for text in small]
        queries["templates"][template] = encoder.encode_texts(filled)
    each = [f"{text}." for several in captions for text in several]
    known = dict(zip(each, encoder.encode_texts(each), strict=True))
    for count in SENTENCES:
        long = [" ".join(f"{text}." for text in several[:count]) for several in captions]
        whole = encoder.encode_texts(long)
        reader = _Reader(encoder, known | dict(zip(long, whole, strict=True)))
        queries[f"{count} sentences"] = {
            "as one text": whole,
            "by sentences": np.stack(
                [compose(Query(texts=((text, 1.0),)), reader).row for text in long]
            ),
        }
        queries[f"{count} sentences"]["cut"] = np.array(encoder.is_cut(long))
    found = {}
    for name, ways in queries.items():
        cut = ways.pop("cut", None)
        ranks = {way: _own_ranks(rows, world) for way, rows in ways.items()}
        found[name] = intervals(_recalls(ranks), n, resamples, seed)
        if cut is not None:
            found[name] |= {"cut": 100 * float(np.mean(cut))}
    return found


def _own_ranks(rows: Rows, world: World) -> Ids:
    scores = rows @ world.images.T
    ranks: Ids = (scores > np.diag(scores)[:, None]).sum(axis=1)
    return ranks


def _recalls(ranks: Mapping[str, Ids]) -> Statistic:
    """Of R@1 by way, and of each way's difference to the first."""
    plain = next(iter(ranks))

    def statistic(drawn: Ids) -> dict[str, float]:
        recalls = {
            way: 100 * float(np.average(one < 1, weights=drawn)) for way, one in ranks.items()
        }
        return recalls | {
            f"difference: {way}": recalls[way] - recalls[plain] for way in ranks if way != plain
        }

    return statistic


# ── all together ─────────────────────────────────────────────────────────────────────────────────


def measure(
    library: Path, encoder: Encoder, asked: Sequence[str], *, resamples: int, seed: int
) -> dict[str, Any]:
    """Each section's numbers, and `table`, the same as Markdown.

    Args:
        library: its folder; its pictures have captions.
        encoder: of the model that made it.
        asked: a caption of each picture that the library has not, in the order of their names.
        resamples: of the bootstrap.
        seed: of the bootstrap, and of which pictures are asked with.
    """
    world = read_world(library, encoder, asked)
    drawn = {"resamples": resamples, "seed": seed}
    with Library.open(library, encoder) as opened:
        in_library = measure_library(opened, world, **drawn)
    numbers: dict[str, Any] = {
        "exclusion": measure_exclusion(world, encoder, **drawn),
        "library": in_library,
        "sums": measure_sums(world, encoder, **drawn),
        "texts": measure_texts(world, encoder, **drawn),
    }
    return numbers | {"table": tables_of(numbers)}


def tables_of(numbers: Mapping[str, Any]) -> str:
    """All that was measured, as Markdown; percent."""
    alone, both = (numbers["exclusion"][name] for name in ("pictures", "captions"))
    columns = ("removed", "lost", "wanted")
    excluded = format_table(
        ["A, but not B"]
        + [f"{name}, pictures alone" for name in columns]
        + [f"{name}, with captions" for name in columns],
        [
            [way]
            + [_cell(one[way][name]) if way in one else "" for one in (alone, both)
               for name in columns]
            for way in WAYS if way in alone or way in both
        ]
        + [["asked of the library itself", "", "", ""]
           + [_cell(numbers["library"][name]) for name in columns]],
    )  # fmt: skip
    added = format_table(
        ["A and B, both found", "queries", "added", "as a library does", "difference"],
        [
            [name, f"{one['queries']:,}"]
            + [_cell(value) for way, value in one.items() if isinstance(value, dict)]
            for name, one in numbers["sums"].items()
        ],
    )
    texts = format_table(
        ["own picture first", "R@1", "difference"],
        [
            [f"{name}: {way}", _cell(value), _cell(one.get(f"difference: {way}"))]
            for name, one in numbers["texts"].items()
            for way, value in one.items()
            if isinstance(value, dict) and not way.startswith("difference")
        ],
    )
    long = numbers["texts"][f"{max(SENTENCES)} sentences"]["cut"]
    gaps = [
        numbers["sums"][name]["gap"] for name in ("a text and a picture", "the same with a gap")
    ]
    return "\n\n".join(
        [
            excluded,
            f"{alone['queries']:,} queries to pictures alone, {both['queries']:,} with captions,"
            f" {numbers['library']['queries']:,} to the library; of the first ten answers.",
            added,
            f"The gap between the modalities is {gaps[0]:.2f} as measured, {gaps[1]:.2f} where one"
            " was put in.",
            texts,
            f"Of {max(SENTENCES)} sentences {long:.0f} % are longer than the encoder reads.",
        ]
    )  # fmt: skip


def _cell(found: Mapping[str, Any] | None) -> str:
    """A number with its interval."""
    if found is None:
        return ""
    low, high = found["interval"]
    return f"{found['value']:.1f} [{low:.1f}, {high:.1f}]"
