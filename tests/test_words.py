"""Words in memory, where each score can be worked out, and in a store that changes."""

from __future__ import annotations

import math
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexes import words
from indexes.errors import InvalidRowsError, StoreError
from indexes.records import CaptionRow, Fit, ItemWrite, Term
from indexes.snapshot import Snapshot, our_error
from indexes.store import ModelSpec, Store

MODEL = ModelSpec("toy", 4, "toy-fingerprint")
RED = np.array([1, 0, 0, 0], dtype=np.float32)


@pytest.fixture
def memory() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:")) as connection:
        words.create(connection)
        yield connection


def put(connection: sqlite3.Connection, *captions: str) -> None:
    """Items 1, 2, …, each with one caption and no name."""
    words.put(connection, [words.row(n, [text]) for n, text in enumerate(captions, 1)])


def found(connection: sqlite3.Connection, text: str, limit: int = 10) -> list[int]:
    return words.search(connection, text, limit).ids.tolist()


# ── What words are ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "query", "is_found"),
    [
        ("Two dogs run", "dog running", True),
        ("un carré vert", "carre", True),
        ("ＷＩＤＥ ﬁsh", "wide fish", True),
        ("白い犬が走る", "犬", True),
        ("白い犬が走る", "白い犬", True),
        ("白い犬が走る", "犬と白", False),
        ("東京タワーの夜景", "東京タワー", True),
        ("東京タワーの夜景", "京東", False),
        ("하얀 강아지", "강아지", True),
        ("一只狗在海滩上奔跑", "海滩", True),
        ("𠮷野家", "𠮷野", True),
        ("see IMG_2041 for more", "IMG_2041", True),
        ("see IMG_2041 for more", "2041", True),
        ("the iPhone", "phone", False),
        ("don't", "don", True),
        ("50% off", "50", True),
        ("👍🏽 !?", "👍", False),
    ],
)
def test_a_caption_is_found_by_its_words(
    memory: sqlite3.Connection, text: str, query: str, is_found: bool
) -> None:
    put(memory, text, "something else")
    assert found(memory, query) == [1] * is_found


@pytest.mark.parametrize(
    ("file", "query"),
    [
        ("IMG_2041.jpg", "IMG_2041"),
        ("IMG_2041.jpg", "img2041"),
        ("IMG_2041.jpg", "2041 img"),
        ("DogOnBeach.png", "dog"),
        ("DogOnBeach.png", "dogonbeach"),
        ("HTMLPage7.png", "html page"),
        ("holiday2024.jpg", "2024"),
        ("holiday2024.jpg", "holiday2024.jpg"),
        ("Urlaub_Spanien/Málaga-03/x.jpg", "spanien malaga"),
        ("写真/東京駅2.jpg", "東京駅"),
        ("a\udcff/b\udcffc.jpg", "b c"),
        ("_DSC0001.NEF", "dsc0001 nef"),
    ],
)
def test_a_name_is_found_whole_and_by_its_parts(
    memory: sqlite3.Connection, file: str, query: str
) -> None:
    words.put(memory, [words.row(1, [], file), words.row(2, ["other"], "zz.zzz")])
    assert found(memory, query) == [1]
    asks = words.expression(query)
    assert memory.execute("SELECT rowid FROM words WHERE words MATCH ?", (asks,)).fetchall() == [
        (1,)
    ]


def test_a_phrase_stands_in_one_caption_in_its_order(memory: sqlite3.Connection) -> None:
    words.put(
        memory,
        [
            words.row(1, ["a red car stops", "main street"]),
            words.row(2, ["a car", "red main", "street"]),
            words.row(3, ["the car is red"]),
            words.row(4, ["白い犬 on main street"], "RedCar.jpg"),
        ],
    )

    def phrase(text: str) -> list[int]:
        asks = words.expression(text, phrase=True)
        rows = memory.execute("SELECT rowid FROM words WHERE words MATCH ? ORDER BY 1", (asks,))
        return [item_id for (item_id,) in rows]

    assert phrase("Main Street") == [1, 4]
    assert phrase("red car") == [1, 4]
    assert phrase("白い犬 on") == [4]
    assert phrase("い犬") == [4]
    assert phrase("car red") == []
    assert words.expression("!? ...", phrase=True) is None


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_any_text_can_be_kept_and_asked(text: str) -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        words.create(connection)
        words.put(connection, [words.row(1, [text], text.replace("\0", ""), text)])
        answer = words.search(connection, text, 5)
        assert set(answer.ids.tolist()) <= {1}
        assert ((answer.scores > 0) & (answer.scores <= 1)).all()


LETTERS = "あ亜漢字カナ한글ab1_ ー々"


@settings(max_examples=100, deadline=None)
@given(text=st.text(LETTERS, min_size=1, max_size=12), start=st.integers(0, 11), data=st.data())
def test_any_part_of_a_run_without_spaces_is_found(
    text: str, start: int, data: st.DataObject
) -> None:
    runs = words._UNMARKED.findall(text)
    if not runs:
        return
    run = runs[start % len(runs)]
    begin = data.draw(st.integers(0, len(run) - 1))
    part = run[begin : data.draw(st.integers(begin + 1, len(run)))]
    with closing(sqlite3.connect(":memory:")) as connection:
        words.create(connection)
        put(connection, text)
        for asks in (words.expression(part), words.expression(part, phrase=True)):
            query = "SELECT count(*) FROM words WHERE words MATCH ?"
            assert connection.execute(query, (asks,)).fetchone() == (1,)


# ── Scores ───────────────────────────────────────────────────────────────────────────────────────

VOCABULARY = ("red", "blue", "cat", "sun", "sea", "map")


def bm25(texts: Sequence[Sequence[str]], query: Sequence[str]) -> list[float]:
    """The score of each text as the module's docstring defines it."""
    average = sum(map(len, texts)) / len(texts)
    scores, most = [0.0] * len(texts), 0.0
    for word in dict.fromkeys(query):
        count = sum(word in text for text in texts)
        idf = max(math.log((len(texts) - count + 0.5) / (count + 0.5)), 1e-6)
        most += idf * 2.2
        for number, text in enumerate(texts):
            times = Counter(text)[word]
            scores[number] += (
                idf * times * 2.2 / (times + 1.2 * (0.25 + 0.75 * len(text) / average))
            )
    return [score / most for score in scores]


WORD_LISTS = st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(WORD_LISTS, min_size=1, max_size=12), query=WORD_LISTS, limit=st.integers(1, 9)
)
def test_scores_are_shares_of_the_best_that_a_query_could_reach(
    texts: list[list[str]], query: list[str], limit: int
) -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        words.create(connection)
        put(connection, *(" ".join(text) for text in texts))
        # Three letters are too few to be taken for a misspelling.
        answer = words.search(connection, " ".join(query), limit)
        expected = bm25(texts, query)
        ids = list(range(1, len(texts) + 1))
        np.testing.assert_allclose(
            words.scores(connection, " ".join(query), ids), expected, rtol=1e-5, atol=1e-9
        )
        ranked = sorted(
            (-np.float32(score), n) for n, score in zip(ids, expected, strict=True) if score
        )
        assert len(answer.ids) == min(limit, len(ranked))
        np.testing.assert_allclose(
            answer.scores, [-score for score, _ in ranked[:limit]], rtol=1e-5
        )


def test_equal_scores_are_ordered_by_id_and_ids_are_kept_to(memory: sqlite3.Connection) -> None:
    put(memory, *["a dog"] * 6, "a cat and a dog", "a cat")
    assert found(memory, "dog", 4) == [1, 2, 3, 4]
    among = np.array([8, 6, 3, 99])
    assert words.search(memory, "dog cat", 9, among=among).ids.tolist() == [8, 3, 6]
    assert words.search(memory, "dog", 9, among=[]).ids.tolist() == []
    assert words.scores(memory, "dog", [8, 6]).tolist()[0] == 0


def test_a_word_that_is_nowhere_lowers_what_the_others_reach(memory: sqlite3.Connection) -> None:
    put(memory, "a dog", "a cat", "a bird")
    [alone] = words.search(memory, "dog", 1).scores
    [beside] = words.search(memory, "dog xylophones", 1).scores
    assert beside < alone / 2


# ── Spelling and common words ────────────────────────────────────────────────────────────────────


def test_a_misspelt_word_is_taken_for_the_nearest(memory: sqlite3.Connection) -> None:
    several = ("a beautiful beach", "children playing", "one beech", "the bench", "img2041")
    put(memory, *several, "pep", "people", "two people")
    terms = {
        text: words.search(memory, text, 5).terms[0]
        for text in (
            "beatiful",
            "chidlren",
            "baech",
            "peple",
            "beach",
            "IMG_2042",
            "cta",
            "zzzzzz",
            "xhildren",
        )
    }
    assert terms == {
        "beatiful": Term("beautiful", 1, "beatiful"),
        "chidlren": Term("children", 1, "chidlren"),
        "baech": Term("beach", 1, "baech"),  # a swap is one edit
        "peple": Term("people", 2, "peple"),  # of those at one edit the most frequent
        "beach": Term("beach", 1),
        "IMG_2042": Term("IMG2042", 0),  # a number is not misspelt
        "cta": Term("cta", 0),
        "zzzzzz": Term("zzzzzz", 0),
        "xhildren": Term("xhildren", 0),  # what is misspelt begins as it should
    }
    assert found(memory, "beatiful baech") == [1]


def test_a_word_is_no_misspelling_of_one_that_is_only_alike_by_its_stem(
    memory: sqlite3.Connection,
) -> None:
    put(memory, "parked cars", "a couch in a field", "working", "leaning", "an airline")
    for text in ("paris", "church", "york", "leafs", "violin", "Parkes"):
        assert words.search(memory, text, 5).terms[0].corrected_from is None, text


def test_a_word_of_thousands_of_letters_is_looked_up_at_once(memory: sqlite3.Connection) -> None:
    put(memory, *(f"xx{chr(97 + n)}" for n in range(26)))
    with mock.patch("rapidfuzz.process.extract", side_effect=AssertionError):
        assert words.search(memory, "x" * 100_000, 5).terms[0].count == 0


def test_up_to_seven_letters_one_edit_is_forgiven_and_then_two(memory: sqlite3.Connection) -> None:
    put(memory, "horse", "mountain")
    assert words.search(memory, "hoorse", 1).terms[0].text == "horse"
    assert words.search(memory, "hirze", 1).terms[0].count == 0
    assert words.search(memory, "muontian", 1).terms[0].text == "mountain"
    assert words.search(memory, "moutanin", 1).terms[0].text == "mountain"
    assert words.search(memory, "mxxnxain", 1).terms[0].count == 0


def test_words_of_another_language_are_not_misspelt(memory: sqlite3.Connection) -> None:
    put(memory, "a hunt along the spring line", "a stone bridge over water")
    german = words.search(memory, "hund springt über eine steinbrücke", 5)
    assert german.terms[0] == Term("hund", 0)
    assert all(term.corrected_from is None for term in german.terms)
    assert words.search(memory, "sprong", 5).terms == (Term("spring", 1, "sprong"),)


def test_common_words_are_left_out_beside_rarer_ones_only(
    memory: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "COMMON", ((0.1, 3),))
    put(memory, *["a dog"] * 8, "a dog and a zebra")
    both = words.search(memory, "a dog zebra", 9)
    assert both.terms == (
        Term("a", 9, left_out=True),
        Term("dog", 9, left_out=True),
        Term("zebra", 1),
    )
    assert both.ids.tolist() == [9]
    assert len(words.search(memory, "a dog", 20).ids) == 9
    monkeypatch.setattr(words, "SCORED", 5)
    assert words.search(memory, "a dog", 20).ids.tolist() == [1, 2, 3, 4, 5]


# ── In a store ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path / "photos.lib", MODEL) as made:
        yield made


def item(file: str, *captions: str, failure: str | None = None) -> ItemWrite:
    return ItemWrite(
        file=file,
        size=1,
        mtime_ns=1,
        content_hash=file.encode(),
        width=8,
        height=8,
        captions=tuple(CaptionRow(text, "given") for text in captions),
        image_embedding=None if failure else RED,
        caption_embeddings=np.tile(RED, (len(captions), 1)) if captions and not failure else None,
        failure=failure,
    )


def asked(store: Store, text: str) -> list[int]:
    with store.snapshot() as rows:
        found = sorted(rows.words(text, 50).ids.tolist())
    for _ in range(2):  # the second time by lists in memory, where a test has them made so soon
        assert sorted(store.words(text).ids.tolist()) == found
    return found


def test_words_follow_what_is_written_moved_told_and_removed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("indexes.store.OFTEN", 2)
    with store.writer() as writer:
        root = writer.add_root(tmp_path / "Italy")
        first, second, failed = writer.write(
            root, [item("a.jpg", "a dog"), item("trip/b.jpg"), item("c.jpg", "dog", failure="no")]
        )
        assert asked(store, "dog") == [first]
        assert asked(store, "italy") == [first, second]
        writer.write(root, [item("c.jpg", "another dog")])
        assert asked(store, "dog") == [first, failed]
        writer.write(root, [item("a.jpg", "a dog", failure="broken now")])
        assert asked(store, "dog") == [failed]
        writer.set_captions(second, [CaptionRow("a zebra", "given")], RED[None])
        assert asked(store, "zebra trip") == [second]
        writer.move(second, root, "home/b.jpg", 1, 1)
        assert asked(store, "trip") == []
        assert asked(store, "home") == [second]
        writer.relocate_root(root, tmp_path / "Spain")
        assert asked(store, "italy") == []
        assert asked(store, "spain") == [second, failed]
        outer = writer.add_root(tmp_path / "Outer")
        writer.absorb_root(outer, root, "was/Spain")
        assert asked(store, "outer was zebra") == [second, failed]
        writer.remove([second])
        assert asked(store, "zebra") == []
        with pytest.raises(InvalidRowsError), writer.together():  # noqa: PT012 (the second raises)
            writer.write(outer, [item("new.jpg", "unwritten")])
            writer.set_captions(99, [], None)
        assert asked(store, "unwritten") == []
        assert store.verify() == []
        writer.forget_root(outer)
        assert asked(store, "outer") == []
        assert store.verify() == []
        writer.compact()
    assert store.verify() == []


def test_the_migration_makes_the_table_that_the_module_makes(store: Store) -> None:
    def schema(connection: sqlite3.Connection) -> dict[str, str]:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE name LIKE 'words%'")
        return {name: re.sub(r"\s+", " ", sql or "") for name, sql in rows}

    with closing(sqlite3.connect(store.path / "catalogue.sqlite")) as connection:
        migrated = schema(connection)
    with closing(sqlite3.connect(":memory:")) as connection:
        words.create(connection)
        assert schema(connection) == migrated


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(
            st.sampled_from(["dog", "dogs", "snow", "snöw", "a", "狗在雪", "x_1", "ab\u0305cd"]),
            max_size=300,
        ),
        min_size=1,
        max_size=30,
    ),
    st.lists(
        st.sampled_from(["dog", "snow", "running", "狗", "x_1", "snw", "ab\u0305cd"]), max_size=4
    ),
)
def test_lists_in_memory_answer_as_sqlite_does(captions: list[list[str]], asked: list[str]) -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        words.create(connection)
        put(connection, *(" ".join(said) for said in captions))
        lists = words.WordLists(connection)
        half = np.arange(1, len(captions) + 1, 2)
        for among in (None, half):
            for limit in (None, 3):
                text = " ".join(asked)
                one = words.search(connection, text, limit, among=among)
                other = words.search(connection, text, limit, among=among, lists=lists)
                assert one.ids.tolist() == other.ids.tolist()
                assert one.scores == pytest.approx(other.scores, abs=1e-6)
                assert one.terms == other.terms


@pytest.mark.parametrize(
    ("text", "titled"),
    [
        ("beach", [2, 3]),
        ("dog beach", [2, 3]),
        ("dogs IMG_1", [2]),
        ("snow", []),  # a caption's word
        ("dog snow", []),
        ("nowhere beach", []),
        ("ab\u0305cd", []),
        ("…", []),
        ("", []),
    ],
)
def test_titles_in_memory_are_those_of_sqlite(
    memory: sqlite3.Connection, text: str, titled: list[int]
) -> None:
    words.put(
        memory,
        [
            words.row(1, ["a dog in the snow, on a beach"], "IMG_1.jpg"),
            words.row(2, ["snow"], "dog/beach/IMG_1.jpg"),
            words.row(3, [], "DogOnBeach.jpg", "2024"),
        ],
    )
    assert words.titled(memory, text).tolist() == titled
    assert words.titled(memory, text, words.WordLists(memory)).tolist() == titled


def test_words_that_are_nowhere_fill_no_memory(memory: sqlite3.Connection) -> None:
    put(memory, "a dog", "a cat")
    lists = words.WordLists(memory)
    for number in range(9):
        words.search(memory, f"dog nowhere{number}", lists=lists)
    assert [*lists._of] == ["dog"]


def test_a_store_that_is_asked_often_answers_as_before_and_follows_changes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = mock.Mock(side_effect=words.WordLists)
    monkeypatch.setattr("indexes.snapshot.WordLists", made)
    monkeypatch.setattr("indexes.store.OFTEN", 3)
    with store.writer() as writer:
        root = writer.add_root(Path("/p"))
        [first] = writer.write(root, [item("a.jpg", "a dog")])
    found = [store.words("dog").ids.tolist() for _ in range(5)]
    assert found == [[first]] * 5
    assert made.call_count == 1
    with store.writer() as writer:
        [second] = writer.write(root, [item("b.jpg", "two dogs")])
    assert sorted(store.words("dog").ids) == [first, second]
    assert store.words("dog", among=np.array([second])).ids.tolist() == [second]
    assert made.call_count == 1
    assert [sorted(store.words("dogs").ids) for _ in range(3)] == [[first, second]] * 3
    assert made.call_count == 2


def test_damage_that_is_met_on_the_way_to_memory_is_met_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("indexes.store.OFTEN", 2)
    with store.writer() as writer:
        root = writer.add_root(Path("/p"))
        [one] = writer.write(root, [item("a.jpg", "a dog")])
    monkeypatch.setattr(Snapshot, "owners", mock.Mock(side_effect=ValueError("no number")))
    assert store.words("dog").ids.tolist() == [one]
    with pytest.raises(StoreError):
        store.words("dog")
    for _ in range(5):
        assert store.titled("a").tolist() == [one]
        assert store.words("dog").ids.tolist() == [one]


def test_whose_captions_are_whose_is_told_alike_from_memory(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("indexes.store.OFTEN", 2)
    with store.writer() as writer:
        root = writer.add_root(Path("/p"))
        ids = writer.write(root, [item(f"{n}.jpg", *["a dog"] * (n % 3)) for n in range(9)])
    ids += [99]
    captions = {one: store.caption_ids(one) for one in ids}
    asked = np.array([*captions[ids[2]], 999, *captions[ids[1]]], dtype=np.int64)
    some = np.array([ids[8], ids[0], ids[4], 99], dtype=np.int64)

    def told() -> tuple[list[int], list[tuple[int, int]], list[int]]:
        found = store.captions_of(some)
        pairs = zip(found.captions.tolist(), found.items.tolist(), strict=True)
        return store.caption_owners(asked).tolist(), list(pairs), store.titled("2 jpg").tolist()

    expected = sorted((one, item) for item in some.tolist() for one in captions[item])
    before = told()
    assert before == ([ids[2], ids[2], -1, ids[1]], expected, [ids[2]])
    read = mock.Mock(side_effect=Snapshot.owners)
    monkeypatch.setattr(Snapshot, "owners", lambda *args, **kinds: read(*args, **kinds))
    for _ in range(2):
        store.words("dog")
    assert [told(), told()] == [before, before]
    assert read.call_count == 1  # of all at once
    with store.writer() as writer:
        writer.remove([ids[2]])
    assert store.caption_owners(asked).tolist() == [-1, -1, -1, ids[1]]


def test_rows_are_counted_without_reading_them(store: Store) -> None:
    with store.writer() as writer:
        root = writer.add_root(store.path.parent)
        for start in range(0, 300, 100):
            writer.write(root, [item(f"{n}.jpg") for n in range(start, start + 100)])
        writer.remove(store.item_ids()[:7])
    with store.snapshot() as rows:
        assert words._total(rows._connection) == 293


def test_an_sqlite_without_fts5_is_told_in_one_sentence() -> None:
    error = our_error(Path("x"), sqlite3.OperationalError("no such module: fts5"))
    assert type(error) is StoreError
    assert "built without FTS5" in str(error)


def test_facts_and_columns_are_kept_changed_and_copied(store: Store) -> None:
    with store.writer() as writer:
        root = writer.add_root(store.path.parent)
        [item_id] = writer.write(root, [item("a.jpg")])
        writer.set_facts(
            item_id, camera="X100", latitude=-1.5, longitude=2.0, perceptual_hash=-(1 << 63)
        )
        writer.set_extras(item_id, (("stars", 4.0), ("tag", "b"), ("tag", "a")))
        [known] = store.known_files(root).values()
        assert known.extras == (("stars", 4.0), ("tag", "a"), ("tag", "b"))
        [row] = store.items([item_id])
        assert (row.camera, row.latitude, row.longitude) == ("X100", -1.5, 2.0)
        assert (row.perceptual_hash, row.extras) == (-(1 << 63), known.extras)
        writer.write(root, [item("a.jpg")])
        [row] = store.items([item_id])
        assert (row.camera, row.latitude, row.perceptual_hash, row.extras) == (None, None, None, ())
        with store.snapshot() as rows:
            assert rows.extra_keys() == {}
    assert store.verify() == []


def test_what_was_measured_is_kept_for_each_model(store: Store) -> None:
    other = ModelSpec("other", 3, "other-fingerprint")
    means = np.arange(8, dtype=np.float32).reshape(2, 4)
    with store.writer() as writer:
        assert store.fit() is None
        writer.record_fit(Fit(3, 100, {"channels": {"default": "image"}}, means * 2))
        writer.record_fit(Fit(4, 200, {"channels": {"default": "hybrid"}}, means))
        for wrong in (
            Fit(5, 1, {}, np.ones((2, 3), dtype=np.float32)),
            Fit(5, 1, {"auc": math.nan}, means),
            Fit(5, 1, {"auc": np.float32(0.5)}, means),
        ):
            with pytest.raises(InvalidRowsError):
                writer.record_fit(wrong)
    with Store.open(store.path, other, add_model=True) as seen:
        assert seen.fit() is None
        with seen.writer() as writer:
            writer.record_fit(Fit(5, 1, {}, np.ones((2, 3), dtype=np.float32)))
    with Store.open(store.path) as again:
        fit = again.fit()
        assert fit is not None
        assert (fit.change, fit.rows) == (4, 200)
        assert fit.facts == {"channels": {"default": "hybrid"}}
        assert fit.means.tolist() == means.tolist()
        with again.writer() as writer:
            writer.drop_model(other.fingerprint)
        assert again.verify() == []
    with closing(sqlite3.connect(store.path / "catalogue.sqlite")) as connection, connection:
        connection.execute("UPDATE fits SET facts = '{'")
    assert store.fit() is None
