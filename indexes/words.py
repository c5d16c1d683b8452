"""Words: captions, file names and folders as SQLite's FTS5 finds them; the only home of that table.

`words` has a row for each item that could be read, under the item's id. It is derived: whoever
writes an item writes its row in the same transaction, and all rows can be made again.

SQLite's own tokenizer takes letters and digits together, folds case and accents, and stems English
(Porter 1980). It knows no words where none are marked, and none inside a file's name. So a text is
spread before SQLite sees it (`spread`): what stands in its place serves phrases, and behind the
text stand the parts by which it is found as well.

    白い犬 dog           白い い犬 dog ¦ 白 い 犬        a query has the pairs alone
    IMG_2041.jpg         IMG2041 jpg ¦ IMG 2041         a query, and a caption's name, as well
    DogOnBeach           DogOnBeach ¦ Dog On Beach      names only

A score is BM25 (Robertson and Zaragoza 2009; k1 = 1.2, b = 0.75, the idf of a word in more than
half of all items a millionth) over the captions, name and folders of an item together, divided by
the most that its query could reach: the sum of idf · (k1 + 1) over the query's words. It lies in
[0, 1] and can be compared between queries. A word that no item has counts there as well.

Every function takes a connection to a database that has the table, such as one in memory.
"""

from __future__ import annotations

import json
import math
import os
import re
import sqlite3
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from indexes.errors import InvalidConditionError
from indexes.records import Term, WordMatch

COLUMNS = ("captions", "name", "folders")
TITLE = COLUMNS[1:]
TOKENIZER = "porter unicode61 remove_diacritics 2"
# Private use, yet a token for SQLite: no phrase reaches over it.
GAP = "\ue000"
K1, B = 1.2, 0.75
LEAST_IDF = 1e-6

# A word is common, and left out beside rarer ones, if it stands in more than one of these shares of
# the items and in more than so many: it tells little (from a half on nothing, see LEAST_IDF), and
# to read its places takes longest.
COMMON = ((0.5, 1_000), (0.1, 10_000))
# Items scored for a query, at most, which takes about 0.15 s. Words of which that would be more are
# left out beside rarer ones; of one that is alone, the first items are taken.
SCORED = 100_000
MOST_STEMS = 20_000  # words whose stems are kept
# Letters of a word that may be misspelt: shorter ones are all near to each other, longer ones none.
LEAST_LETTERS, MOST_LETTERS = 5, 40
LONG = 8  # letters of a word that may be two edits away, shorter ones one
ALIKE = 20  # words that are looked at as they are written
MISSPELT = 3  # words of a query; with more that are nowhere it is one in another language

# Han, kana and Hangul, with the marks that stand for letters.
_UNMARKED = re.compile(
    "[\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003fffd]+"
)
# Letters and digits, with accents that have no letter of their own; underscores within.
_WORD = re.compile("[^\\W_](?:\\w|[\u0300-\u036f])*")


def spread(text: str, *, names: bool = False) -> str:
    """A text as it goes into the table; of `names`, words are taken apart inside as well."""
    return _spread([text], names)


def asked(text: str) -> list[str]:
    """The words of a query, in its order, spelt as they stand in their place in the table."""
    text = _UNMARKED.sub(lambda run: f" {' '.join(_pairs(run[0]))} ", _plain(text))
    return [word.replace("_", "") for word in _WORD.findall(text)]


def likeness(ones: Sequence[str], others: Sequence[str]) -> float:
    """How much of two texts, word by word, stands in both in the same order: 0 to 1.

    Twice the longest common subsequence by the length of both; quick for thousands of words.
    """
    from rapidfuzz.distance import Indel

    return Indel.normalized_similarity(ones, others)


def _spread(texts: Iterable[str], names: bool) -> str:
    """Several texts as one, which no phrase reaches from one to the next."""
    parts: list[str] = []

    def pairs(run: re.Match[str]) -> str:
        if len(run[0]) > 1:
            parts.extend(run[0])
        return f" {' '.join(_pairs(run[0]))} "

    def whole(word: re.Match[str]) -> str:
        pieces = _pieces(word[0], names)
        if len(pieces) > 1:
            parts.extend(pieces)
        return word[0].replace("_", "")

    places = []
    for text in map(_plain, texts):
        place = text if text.isascii() else _UNMARKED.sub(pairs, text)
        places.append(_WORD.sub(whole, place) if names or "_" in place else place)
    if parts:
        places.append(" ".join(parts))
    return f" {GAP} ".join(places)


def _plain(text: str) -> str:
    """A text that SQLite takes, without what we put between texts; wide letters are plain."""
    if text.isascii():
        return text.replace("\0", " ")
    text = text.encode("utf-8", "replace").decode().replace(GAP, " ").replace("\0", " ")
    return unicodedata.normalize("NFKC", text)


def _pairs(run: str) -> list[str]:
    return [run[place : place + 2] for place in range(max(1, len(run) - 1))]


def _pieces(word: str, names: bool) -> list[str]:
    """A word's parts between underscores; of a name, also between letters, digits and cases."""
    if not names:
        return [piece for piece in word.split("_") if piece]
    if word.isdecimal() or (word.isalpha() and word[1:].islower()):  # most are
        return [word]
    pieces = [""]
    for place, letter in enumerate(word):
        before, after = word[place - 1 : place], word[place + 1 : place + 2]
        if before and (
            before.isdigit() != letter.isdigit()
            or (letter.isupper() and (before.islower() or (before.isupper() and after.islower())))
        ):
            pieces.append("")
        pieces[-1] += letter
    return [piece for some in pieces for piece in some.split("_") if piece]


# ── Rows ─────────────────────────────────────────────────────────────────────────────────────────


SCHEMA = (  # as migration m004 makes it
    f"CREATE VIRTUAL TABLE words USING fts5(captions, name, folders, tokenize = '{TOKENIZER}')",
    "CREATE VIRTUAL TABLE words_terms USING fts5vocab(words, row)",
    "CREATE VIRTUAL TABLE words_places USING fts5vocab(words, instance)",
)

Row = tuple[int, str, str, str]  # id, captions, name, folders


def create(connection: sqlite3.Connection) -> None:
    """Make the table and its two views, empty; those that are there are replaced."""
    for table in ("words_terms", "words_places", "words"):
        connection.execute(f"DROP TABLE IF EXISTS {table}")
    for statement in SCHEMA:
        connection.execute(statement)


def row(item_id: int, captions: Iterable[str], file: str = "", root: str = "") -> Row:
    """The row of an item at the path `file` below the folder `root`."""
    folder, _, name = file.rpartition("/")
    return (
        item_id,
        _spread(captions, names=False),
        spread(name, names=True),
        _folders(f"{root}/{folder}"),
    )


@lru_cache(maxsize=256)
def _folders(path: str) -> str:
    """The same for all files of a folder, which come one after the other."""
    return spread(path, names=True)


def put(connection: sqlite3.Connection, rows: Iterable[Row]) -> None:
    """Write rows of items that have none."""
    connection.executemany(
        "INSERT INTO words (rowid, captions, name, folders) VALUES (?, ?, ?, ?)", rows
    )


def remove(connection: sqlite3.Connection, ids: Collection[int]) -> None:
    """Delete the rows of these items."""
    connection.execute(f"DELETE FROM words WHERE rowid IN {_GIVEN}", {"ids": listed(ids)})


def follow(connection: sqlite3.Connection, ids: Collection[int]) -> None:
    """Make the rows of these items what the catalogue says of them now."""
    remove(connection, ids)
    put(connection, _expected(connection, ids))


def make(connection: sqlite3.Connection) -> None:
    """Make the whole table anew from the catalogue."""
    create(connection)
    put(connection, _expected(connection))


def can_replace(connection: sqlite3.Connection) -> bool:
    """Whether `make` can: a table that FTS5 cannot open, it cannot drop either."""
    try:
        connection.execute("SELECT rowid FROM words LIMIT 1")
    except sqlite3.DatabaseError as error:
        return "no such table" in str(error)
    return True


def optimize(connection: sqlite3.Connection) -> None:
    """Have as little to read for each word as can be."""
    connection.execute("INSERT INTO words (words) VALUES ('optimize')")


def problems(connection: sqlite3.Connection) -> list[str]:
    """What is wrong with the table: rows that are not those of the items, damage."""
    names = ("missing", "of no item", "not what its item says")
    counts = dict.fromkeys(names, 0)
    try:
        for (line,) in connection.execute("PRAGMA integrity_check(words)"):
            if line != "ok":  # SQLite looks into FTS5's tables from 3.44 on
                return [f"words: {line}; {_WAY_OUT}"]
        # Reads every list of places.
        connection.execute("SELECT count(*), sum(doc), sum(cnt) FROM words_terms").fetchone()
        stored = connection.execute(
            "SELECT rowid, captions, name, folders FROM words ORDER BY rowid"
        )
        have = stored.fetchone()
        for wanted in _expected(connection):
            while have is not None and have[0] < wanted[0]:
                counts["of no item"] += 1
                have = stored.fetchone()
            if have is None or have[0] > wanted[0]:
                counts["missing"] += 1
                continue
            counts["not what its item says"] += have != wanted
            have = stored.fetchone()
        counts["of no item"] += (have is not None) + len(stored.fetchall())
    except (sqlite3.Error, ValueError, TypeError, AttributeError) as error:
        return [f"words cannot be read ({error}); {_WAY_OUT}"]
    return [
        f"{count} rows of words are {what}; {_WAY_OUT}" for what, count in counts.items() if count
    ]


_WAY_OUT = "`retriever repair` makes them again"
_GIVEN = "(SELECT value FROM json_each(:ids))"


def listed(ids: Iterable[int] | NDArray[np.int64]) -> str:
    """Ids as one value of a statement, which takes any number of them so; see `_GIVEN`."""
    return json.dumps(ids.tolist() if isinstance(ids, np.ndarray) else list(map(int, ids)))


def _expected(connection: sqlite3.Connection, ids: Collection[int] | None = None) -> Iterator[Row]:
    """The rows that items should have, or these items, ascending."""
    which = "" if ids is None else f"AND items.id IN {_GIVEN}"
    values = {} if ids is None else {"ids": listed(ids)}
    texts = groupby(
        connection.execute(
            "SELECT item_id, text FROM captions JOIN items ON items.id = item_id"
            f" WHERE items.status = 'ok' {which} ORDER BY item_id, position",
            values,
        ),
        key=itemgetter(0),
    )
    captioned, captions = next(texts, (0, iter(())))
    for item_id, file, path in connection.execute(
        "SELECT items.id, items.file, roots.path FROM items JOIN roots ON roots.id = items.root_id"
        f" WHERE items.status = 'ok' {which} ORDER BY items.id",
        values,
    ):
        said: list[str] = []
        if captioned == item_id:
            said = [text for _, text in captions]
            captioned, captions = next(texts, (0, iter(())))
        yield row(item_id, said, os.fsdecode(file), Path(os.fsdecode(path)).name)


# ── Queries ──────────────────────────────────────────────────────────────────────────────────────


def search(
    connection: sqlite3.Connection,
    text: str,
    limit: int | None = None,
    *,
    among: Collection[int] | NDArray[np.int64] | None = None,
    lists: WordLists | None = None,
) -> WordMatch:
    """The items that have most of a query's words, at most `limit`; `among`: those ids alone.

    Without a limit they are all that have any word that is looked for, up to SCORED. The answer is
    the same with `lists` of the table, which must be as it was when they were made.

    Words that no item has are taken for the nearest that one has, and common words are left out
    beside rarer ones; `terms` says which.
    """
    if any(" " in stem for _, stem in _stemmed(asked(text))):
        lists = None  # SQLite takes the word apart, so it is a phrase
    plan = _Plan.of(connection, text, lists)
    ids, scores = plan.scored(connection, among, limit, lists)
    order = np.lexsort((ids, -scores))[:limit]
    return WordMatch(ids[order], scores[order], plan.terms)


def scores(
    connection: sqlite3.Connection, text: str, ids: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.float32]:
    """(n,) float32, the score of each of these items as `search` has it; 0 where no word is."""
    plan = _Plan.of(connection, text)
    known, shares = plan.scored(connection, ids)
    found = dict(zip(known.tolist(), shares.tolist(), strict=True))
    return np.array([found.get(int(item_id), 0.0) for item_id in ids], dtype=np.float32)


def titled(
    connection: sqlite3.Connection, text: str, lists: WordLists | None = None
) -> NDArray[np.int64]:
    """Ids of the items whose name and folders have all words of a text, ascending.

    The answer is the same with `lists` of the table; see `search`.
    """
    stems = {stem for _, stem in _stemmed(asked(text)) if stem}
    if lists is not None and stems and not any(" " in stem for stem in stems):
        first, *others = (lists.titled(connection, stem) for stem in stems)
        for one in others:
            first = first[np.isin(first, one, assume_unique=True)]
        return first
    found: Iterable[tuple[int]] = ()
    if asks := expression(text, columns=TITLE):
        found = connection.execute(
            "SELECT rowid FROM words WHERE words MATCH ? ORDER BY rowid", [asks]
        )
    return np.array([item_id for (item_id,) in found], dtype=np.int64)


def expression(
    text: str, *, phrase: bool = False, columns: Sequence[str] | None = None
) -> str | None:
    """What FTS5 is asked for items that have all words of a text, or the text; None: no word.

    Raises InvalidConditionError for a column that there is not.
    """
    if unknown := set(columns or ()) - set(COLUMNS):
        raise InvalidConditionError(f"words has no column {unknown.pop()!r}")
    words = [word for word, stem in _stemmed(asked(text)) if stem]
    if not words:
        return None
    asks = _quoted(" ".join(words)) if phrase else " AND ".join(map(_quoted, words))
    return asks if columns is None else f"{{{' '.join(columns)}}} : ({asks})"


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a query is asked: `words` are those of its terms that are looked for.

    most: what the score of SQLite can reach.
    """

    terms: tuple[Term, ...]
    words: tuple[str, ...]
    most: float

    @classmethod
    def of(cls, connection: sqlite3.Connection, text: str, lists: WordLists | None = None) -> _Plan:
        # By stem: a word that is there twice counts once.
        words = {stem: word for word, stem in reversed(_stemmed(asked(text))) if stem}
        counts = {
            stem: _count(connection, word) if lists is None else lists.count(connection, stem)
            for stem, word in reversed(words.items())
        }
        total = _total(connection) if lists is None else len(lists.ids)
        is_foreign = sum(not count for count in counts.values()) > MISSPELT
        spelt = [
            Term(words[stem], count)
            if count or is_foreign
            else _term(connection, words[stem], stem)
            for stem, count in counts.items()
        ]
        few = min(max(share * total, least) for share, least in COMMON)
        has_rare, so_far = any(0 < term.count <= few for term in spelt), 0
        kept = set()
        for term in sorted(spelt, key=lambda term: term.count):
            if not so_far or (
                so_far + term.count <= SCORED and not (has_rare and term.count > few)
            ):
                kept.add(term)
                so_far += term.count
        terms = tuple(replace(term, left_out=term not in kept) for term in spelt)
        counted = [term for term in terms if not term.left_out]
        found = tuple(term.text for term in counted if term.count)
        most = (K1 + 1) * sum(idf(total, term.count) for term in counted)
        return cls(terms, found, most)

    def scored(
        self,
        connection: sqlite3.Connection,
        among: Collection[int] | NDArray[np.int64] | None,
        limit: int | None = None,
        lists: WordLists | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids of items that have any of the words, and their scores, in any order."""
        if not self.words or (among is not None and not len(among)):
            return np.empty(0, np.int64), np.empty(0, np.float32)
        if lists is not None:
            stems = [stem for _, stem in _stemmed(self.words)]
            ids, raw = lists.sums(connection, stems)
            if among is not None:
                is_asked = np.isin(ids, among if isinstance(among, np.ndarray) else [*among])
                ids, raw = ids[is_asked], raw[is_asked]
        else:
            # The plus keeps SQLite from asking for each id by itself.
            which = "" if among is None else f"AND +rowid IN {_GIVEN}"
            found = connection.execute(
                "SELECT id, score FROM (SELECT rowid AS id, -bm25(words) AS score FROM words"
                f" WHERE words MATCH :asks {which} LIMIT {SCORED})"
                " ORDER BY score DESC, id LIMIT :limit",
                {
                    "asks": " OR ".join(map(_quoted, self.words)),
                    "ids": None if among is None else listed(among),
                    "limit": -1 if limit is None else limit,
                },
            ).fetchall()
            ids = np.array([item_id for item_id, _ in found], dtype=np.int64)
            raw = np.array([score for _, score in found], dtype=np.float64)
        return ids, (raw / (self.most or 1.0)).astype(np.float32)


class WordLists:
    """The items of each word in memory, for who asks often of a table that stays as it is.

    SQLite takes a microsecond for each item that it scores, of which a query has thousands. Here a
    word's items are read when it is first looked for, and cost a hundredth of that from then on.

    Attributes:
        ids: (n,) int64, of all items, ascending.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        rows = connection.execute("SELECT id, sz FROM words_docsize ORDER BY id").fetchall()
        self.ids = np.array([item_id for item_id, _ in rows], dtype=np.int64)
        lengths = (
            _varints(b"".join(sizes for _, sizes in rows)).reshape(-1, len(COLUMNS)).sum(axis=1)
        )
        self._damping = damping(lengths)
        self._of: dict[str, _Listed] = {}

    def count(self, connection: sqlite3.Connection, stem: str) -> int:
        """In how many items a word stands."""
        return len(self._listed(connection, stem).places)

    def titled(self, connection: sqlite3.Connection, stem: str) -> NDArray[np.int64]:
        """Ids of the items with a word in their name or folders, ascending."""
        return self._listed(connection, stem).titled

    def sums(
        self, connection: sqlite3.Connection, stems: Iterable[str]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Ids of items that have any of some words, and what those are worth together."""
        scores = np.zeros(len(self.ids))
        for stem in stems:
            listed = self._listed(connection, stem)
            scores[listed.places] += listed.worth
        has_any = np.flatnonzero(scores)
        return self.ids[has_any], scores[has_any]

    def _listed(self, connection: sqlite3.Connection, stem: str) -> _Listed:
        kept = self._of.get(stem)
        if kept is None:
            found = connection.execute(
                "SELECT doc, count(*), max(col <> 'captions') FROM words_places WHERE term = ?"
                " GROUP BY doc ORDER BY doc",
                (stem,),
            ).fetchall()
            ids, often, is_title = np.array(found, dtype=np.int64).reshape(-1, 3).T
            places = np.searchsorted(self.ids, ids)
            most = (K1 + 1) * idf(len(self.ids), len(ids))
            worth = most * often / (often + self._damping[places])
            kept = _Listed(places, worth, ids[is_title > 0])
            if found:  # else anyone could fill the memory with words that are nowhere
                self._of[stem] = kept
        return kept


@dataclass(frozen=True, slots=True, eq=False)
class _Listed:
    """Places in `WordLists.ids` of the items that have a word, and what it is worth to each.

    titled: ids of those that have it in their name or folders, ascending.
    """

    places: NDArray[np.int64]
    worth: NDArray[np.float64]
    titled: NDArray[np.int64]


def _varints(packed: bytes) -> NDArray[np.int64]:
    """Numbers as SQLite packs them: seven bits a byte, the highest first, the last below 128."""
    data = np.frombuffer(packed, dtype=np.uint8)
    ends = np.flatnonzero(data < 0x80)
    places = np.arange(len(data))
    which = np.searchsorted(ends, places)
    values = (data & 0x7F).astype(np.int64) << 7 * (ends[which] - places)
    return np.bincount(which, weights=values, minlength=len(ends)).astype(np.int64)


def _quoted(words: str) -> str:
    return f'"{words}"'  # there are letters and digits alone, see `asked`


def idf(total: int, count: int) -> float:
    """What a word is worth that `count` of `total` items have."""
    weight = math.log((total - count + 0.5) / (count + 0.5)) if total else 0.0
    return weight if weight > 0 else LEAST_IDF


def damping(lengths: NDArray[np.integer | np.floating]) -> NDArray[np.float64]:
    """(n,) what stands beside how often a word is said, in items of so many words (n,)."""
    average = lengths.mean() if lengths.any() else 1.0
    return np.asarray(K1 * (1 - B + B * lengths / average), dtype=np.float64)


def _total(connection: sqlite3.Connection) -> int:
    """Rows of the table, as FTS5 keeps their number: the first varint of its record of averages.

    To count them would read them all.
    """
    # What this transaction has put is written down first where the view is opened.
    connection.execute("SELECT 1 FROM words_terms LIMIT 1").fetchone()
    found = connection.execute("SELECT block FROM words_data WHERE id = 1").fetchone()
    total = 0
    for byte in found[0] if found else b"":
        total = total << 7 | byte & 0x7F
        if byte < 0x80:
            break
    return total


def _count(connection: sqlite3.Connection, word: str) -> int:
    (count,) = connection.execute(
        "SELECT count(*) FROM words WHERE words MATCH ?", (_quoted(word),)
    ).fetchone()
    return int(count)


def _stemmed(words: Sequence[str]) -> list[tuple[str, str]]:
    """Each word with what SQLite's tokenizer makes of it: "" if it sees no letter in it."""
    known = {word: _known_stems.get(word) for word in words}
    if fresh := [word for word, stem in known.items() if stem is None]:
        found = dict(zip(fresh, _stems(fresh), strict=True))
        if len(_known_stems) + len(found) > MOST_STEMS:
            _known_stems.clear()
        _known_stems.update(found)
        known |= found
    return [(word, known[word] or "") for word in words]


# To ask SQLite takes a database with two tables, a millisecond in all: a tenth of a search.
_known_stems: dict[str, str] = {}


def _stems(words: Sequence[str]) -> list[str]:
    with closing(sqlite3.connect(":memory:")) as memory:
        memory.execute(f"CREATE VIRTUAL TABLE one USING fts5(text, tokenize = '{TOKENIZER}')")
        memory.execute("CREATE VIRTUAL TABLE places USING fts5vocab(one, instance)")
        memory.executemany("INSERT INTO one (rowid, text) VALUES (?, ?)", enumerate(words))
        stems = [""] * len(words)
        for place, stem in memory.execute("SELECT doc, term FROM places ORDER BY doc, offset"):
            stems[place] += f" {stem}" if stems[place] else stem
    return stems


def _vocabulary(connection: sqlite3.Connection, first: str, last: str) -> dict[str, int]:
    """In how many items each word stands, from the first up to but without the last."""
    return dict(
        connection.execute(
            "SELECT term, doc FROM words_terms WHERE term >= ? AND term < ?", (first, last)
        ).fetchall()
    )


def _term(connection: sqlite3.Connection, word: str, stem: str) -> Term:
    """Of a word that no item has."""
    right = _nearest(connection, word, stem)
    if right is None:
        return Term(word, 0)
    return Term(right, _count(connection, right), corrected_from=word)


def _nearest(connection: sqlite3.Connection, word: str, stem: str) -> str | None:
    """The word that a misspelt one was meant to be.

    It begins with the same letter, as most misspelt words do, and what is not far away by its stem
    must be near as it is written: "paris" and "parked" have stems that differ in one letter. Fewest
    edits win, of which a swap of neighbours is one; then what stands in most items.
    """
    edits = 1 if len(word) < LONG else 2
    if not LEAST_LETTERS <= len(word) <= MOST_LETTERS or not stem.isalpha():
        return None
    if word[0].isupper():  # a name
        return None
    if _UNMARKED.search(stem):
        return None
    from rapidfuzz.distance import OSA
    from rapidfuzz.process import extract

    counts = _vocabulary(connection, stem[0], chr(ord(stem[0]) + 1))
    alike = extract(
        stem, list(counts), scorer=OSA.distance, score_cutoff=edits + 1, limit=ALIKE, processor=None
    )
    near = [
        (distance, -counts[term], surface)
        for term, _, _ in alike
        if term.isalpha() and len(term) > 1
        for surface in _surfaces(connection, term)
        if (distance := OSA.distance(word, surface)) <= edits
    ]
    return min(near)[-1] if near else None


def _surfaces(connection: sqlite3.Connection, stem: str) -> set[str]:
    """Words of the library with this stem, as some items have them."""
    found = connection.execute(
        "SELECT captions, name, folders FROM words WHERE rowid IN"
        " (SELECT DISTINCT doc FROM words_places WHERE term = ? LIMIT 5)",
        (stem,),
    )
    words = {word.lower() for row in found for word in _WORD.findall(" ".join(row))}
    return {word for word, its in _stemmed([*words]) if its == stem}
