"""Derived models: a head, its bytes, and what a store keeps beside the embeddings of its base."""

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexes import heads
from indexes.care import repair
from indexes.errors import InvalidRowsError, StoreDamagedError, WrongModelError
from indexes.heads import Correction, Head, Residual, fingerprint
from indexes.records import KINDS
from indexes.store import CaptionRow, ItemWrite, ModelSpec, Store, Writer

BASE = ModelSpec("toy", 4, "toy-1")
# Half a unit in the last place of float16 at 1, in each of four columns.
ROUNDED = 2e-3


def a_head(seed: int = 0, size: float = 0.5) -> Head:
    rng = np.random.default_rng(seed)
    shapes = ((4, 3), (3,), (3, 4), (4,))
    return Head(
        {
            kind: Residual(*((size * rng.normal(size=one)).astype(np.float32) for one in shapes))
            for kind in KINDS
        }
    )


def a_corrected_head() -> Head:
    """The same with a correction that stands on twelve texts."""
    head = a_head()
    images, texts = head("image", unit_rows(12)), head("caption", unit_rows(12, 30))
    return replace(head, correction=Correction.of(texts, images, 1).weighted(0.5))


def zeros(inner: int = 3) -> Residual:
    shapes = ((4, inner), (inner,), (inner, 4), (4,))
    return Residual(*(np.zeros(one, np.float32) for one in shapes))


def spec_of(head: Head) -> ModelSpec:
    return ModelSpec("toy+tuned", head.made, fingerprint(BASE.fingerprint, head.pack()))


def unit_rows(n: int, seed: int = 1, dim: int = 4) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def an_item(name: str, image: np.ndarray | None, texts: np.ndarray) -> ItemWrite:
    captions = tuple(CaptionRow(f"{name} {n}", "given") for n in range(len(texts)))
    return ItemWrite(name, 1, 1, name.encode(), 8, 8, None, captions, image, texts)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Twelve pictures with two captions each."""
    with Store.create(tmp_path / "photos.lib", BASE) as store:
        with store.writer() as writer:
            root = writer.add_root(tmp_path / "pictures")
            images, texts = unit_rows(12), unit_rows(24, 2).reshape(12, 2, 4)
            writer.write(root, [an_item(f"{n}.jpg", images[n], texts[n]) for n in range(12)])
            writer.finish()
        yield store


@pytest.fixture
def tuned(store: Store) -> Iterator[Store]:
    """The same store as the model sees it that is derived from the first."""
    adopt(store, a_head())
    with Store.open(store.path) as seen:
        yield seen


def adopt(store: Store, head: Head, **more) -> bool:
    with store.writer() as writer:
        done = writer.adopt(spec_of(head), head.pack(), {"gain": 1.5}, **more)
        writer.finish()
    return done


def rows_of(store: Store, kind: str) -> np.ndarray:
    with store.snapshot() as rows:
        ids = rows.item_ids()
        return store.embeddings(kind, ids if kind == "image" else rows.caption_ids(ids))


def answers(store: Store) -> list:
    return [
        (match.ids.tolist(), match.scores.tolist())
        for kind in KINDS
        for match in store.search(kind, unit_rows(5, 3), 30)
    ]


def execute(store: Store, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(store.path / "catalogue.sqlite")) as connection, connection:
        connection.execute(statement, values)


def assert_follows(store: Store, head: Head, base: Store) -> None:
    for kind in KINDS:
        expected = head(kind, rows_of(base, kind))
        assert rows_of(store, kind) == pytest.approx(expected, abs=ROUNDED)


# A head


def test_a_head_of_zeros_changes_nothing():
    rows = unit_rows(7)
    head = Head(dict.fromkeys(KINDS, zeros()))
    for kind in KINDS:
        assert head(kind, rows) == pytest.approx(rows, abs=1e-6)


def test_a_row_is_worked_out_by_hand():
    # The first column, less 1, goes through gelu(1) = 0.8412 to the second; 1 is added to the last.
    down, up = np.zeros((4, 1), np.float32), np.zeros((1, 4), np.float32)
    down[0], up[0, 1] = 2, 1
    image = Residual(down, np.array([-1], np.float32), up, np.array([0, 0, 0, 1], np.float32))
    caption = zeros(1)._replace(bias=np.array([0, 3, 0, 0], np.float32))
    head = Head({"image": image, "caption": caption})
    first = np.array([[1, 0, 0, 0]], np.float32)
    expected = np.array([1, 0.8412, 0, 1]) / (2 + 0.8412**2) ** 0.5
    assert head("image", first)[0] == pytest.approx(expected, abs=1e-4)
    assert head("caption", first)[0] == pytest.approx(np.array([1, 3, 0, 0]) / 10**0.5)


def test_it_is_what_torch_makes_of_the_same_numbers():
    torch = pytest.importorskip("torch")
    head, rows = a_head(size=3), unit_rows(9)
    down, inner, up, bias = map(torch.from_numpy, head.residuals["image"])
    given = torch.from_numpy(rows)
    made = given + torch.nn.functional.gelu(given @ down + inner, approximate="tanh") @ up + bias
    expected = torch.nn.functional.normalize(made, dim=1).numpy()
    assert head("image", rows) == pytest.approx(expected, abs=1e-5)


def test_a_head_comes_back_from_its_bytes_which_safetensors_reads_as_well():
    head = a_head()
    again = Head.unpack(head.pack())
    assert again.pack() == head.pack()
    rows = unit_rows(5)
    for kind in KINDS:
        assert np.array_equal(again(kind, rows), head(kind, rows))
    safetensors = pytest.importorskip("safetensors.numpy")
    assert np.array_equal(safetensors.load(head.pack())["image.up"], head.residuals["image"].up)


@given(
    cut=st.integers(0, 1400),
    at=st.integers(0, 1400),
    byte=st.integers(0, 255),
    is_corrected=st.booleans(),
)
def test_damaged_bytes_are_refused_or_are_a_head(cut: int, at: int, byte: int, is_corrected: bool):
    data = bytearray((a_corrected_head() if is_corrected else a_head()).pack())
    data[at % len(data)] = byte
    for some in (bytes(data), bytes(data[:cut])):
        try:
            head = Head.unpack(some)
        except ValueError:
            continue
        assert head.dim == 4


# A correction for hubs


def test_a_correction_takes_away_what_pictures_owe_to_their_nearness_to_texts(monkeypatch):
    monkeypatch.setattr(heads, "NEAREST", 2)
    texts = np.eye(4, dtype=np.float32)[[0, 0, 1]]
    pictures = np.array([[0.6, 0.8, 0, 0], [0, 0.6, 0, 0.8]], np.float32)
    # Of the first, the nearest text (0.8) is passed by, so 0.6 and 0.6 are left; of the other one,
    # after 0.6, the two zeros.
    monkeypatch.setattr(heads, "FAR", 0)
    whole = Correction.of(texts, pictures, 1)
    assert (whole.centre, whole.span) == pytest.approx((0.3, 0.3))
    part = whole.weighted(0.5)
    assert part.span == pytest.approx(0.15)
    queries = unit_rows(3)
    scores = part("caption", queries) @ part("image", pictures).T
    high = np.array([0.5 * 0.3, -0.5 * 0.3])
    assert scores == pytest.approx((queries @ pictures.T - high) / 1.15, abs=1e-6)


def taken(whole: Correction, pictures: np.ndarray) -> np.ndarray:
    """What is taken from the scores of some pictures (n, d)."""
    query = unit_rows(1, 9, pictures.shape[1])
    scores = whole("caption", query) @ whole("image", pictures).T * (1 + whole.span)
    return (query @ pictures.T - scores)[0]


def test_where_there_are_fewer_texts_than_count_all_of_them_do(monkeypatch):
    monkeypatch.setattr(heads, "FAR", 0)
    texts, pictures = unit_rows(5, 2), unit_rows(6)
    whole = Correction.of(texts, pictures, 3)
    means = (pictures @ texts.T).mean(axis=1)
    assert whole.centre == pytest.approx((means.min() + means.max()) / 2, abs=1e-6)
    assert taken(whole, pictures) == pytest.approx(means - whole.centre, abs=1e-5)


def test_pictures_far_from_all_texts_are_lifted_no_more_than_others():
    texts = unit_rows(40) + np.array([3, 0, 0, 0], np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    pictures = texts + unit_rows(40, 1) / 2
    pictures /= np.linalg.norm(pictures, axis=1, keepdims=True)
    whole = Correction.of(texts, pictures, 1)
    far = np.eye(4, dtype=np.float32)[1:]
    assert taken(whole, np.concatenate([far, -far])) == pytest.approx(np.full(6, -whole.span))
    lifted = taken(whole, pictures) <= -whole.span + 1e-5
    assert lifted.mean() == pytest.approx(heads.FAR, abs=1 / 40)


def test_further_columns_are_as_large_as_others_so_that_rounding_bears_them():
    texts, pictures = unit_rows(60, 2, dim=384), unit_rows(50, dim=384)
    whole = Correction.of(texts, pictures, 2)
    for kind in KINDS:
        made = np.abs(whole(kind, pictures))
        assert made[:, 384:].max() < made[:, :384].max()


@given(seed=st.integers(0, 1000), weight=st.sampled_from([0.0, 0.25, 1.0]))
def test_corrected_rows_have_length_1_and_texts_keep_their_order(seed: int, weight: float):
    part = Correction.of(unit_rows(40, seed), unit_rows(30, seed + 1), 2).weighted(weight)
    rows = unit_rows(50, seed + 2)  # some of them have more of it than there is room for
    for kind in KINDS:
        assert np.linalg.norm(part(kind, rows), axis=1) == pytest.approx(np.ones(50), abs=1e-5)
    cosines, told = rows @ rows.T, part("caption", rows)
    assert told @ told.T == pytest.approx((cosines + part.span) / (1 + part.span), abs=1e-5)


def test_a_corrected_head_comes_back_from_its_bytes():
    head = a_corrected_head()
    again = Head.unpack(head.pack())
    assert (again.pack(), again.dim, again.made) == (head.pack(), 4, 16)
    for kind in KINDS:
        assert again(kind, unit_rows(5)) == pytest.approx(head(kind, unit_rows(5)), abs=1e-6)


def test_a_correction_that_does_not_fit_its_head_is_refused():
    head = a_corrected_head()
    wide = replace(head.correction, texts=np.ones((3, 5), np.float32))
    with pytest.raises(ValueError, match="does not fit"):
        Head.unpack(replace(head, correction=wide).pack())
    for spoilt in ({"span": 0.0}, {"passed": -1}):
        with pytest.raises(ValueError, match="out of range"):
            Head.unpack(replace(head, correction=replace(head.correction, **spoilt)).pack())


def test_a_store_keeps_and_searches_a_corrected_space_of_more_dimensions(store, tmp_path):
    before, head = answers(store), a_corrected_head()
    adopt(store, head)
    with Store.open(store.path) as seen:
        assert seen.model.dim == head.made == 16
        assert_follows(seen, head, store)
        with store.writer() as writer:
            [new] = writer.write(1, [an_item("new.jpg", unit_rows(1, 8)[0], unit_rows(3, 9))])
            writer.finish()
        assert_follows(seen, head, store)
        query = head("caption", unit_rows(1, 3))
        [match] = seen.search("image", query, 13)
        scores = rows_of(seen, "image") @ query[0]
        assert match.ids.tolist() == [1 + at for at in np.argsort(-scores)]
        assert new in match.ids
        seen.backup(tmp_path / "copy.lib")
        model_id = seen.models()[0].model_id
        execute(store, "DELETE FROM image_embeddings WHERE model_id = ? AND owner_id < 4", model_id)
        assert any("3 image vectors of toy+tuned" in one for one in seen.verify())
    assert any("3 image vectors of toy+tuned" in one for one in repair(store.path))
    with Store.open(store.path) as seen:
        assert seen.verify() == []
        assert_follows(seen, head, store)
    with store.writer() as writer:
        writer.remove([new])
        assert writer.abandon() == 1
    with Store.open(store.path) as seen:
        assert answers(seen) == before


def test_another_base_or_another_head_is_another_space():
    first, second = a_head(1).pack(), a_head(2).pack()
    assert len({fingerprint(base, head) for base in "ab" for head in (first, second)}) == 4


# A store with a derived model


def test_what_is_adopted_follows_from_stored_embeddings_and_is_what_opens(store, tuned):
    assert tuned.model == spec_of(a_head())
    assert_follows(tuned, a_head(), store)
    derivation = tuned.derivation
    assert (derivation.base, derivation.facts) == (BASE, {"gain": 1.5})
    assert store.derivation is None
    [first, second] = tuned.models()
    assert (first.derived.base, first.is_default, first.pictures, first.captions) == (
        *(BASE, True, 12, 24),
    )
    assert (second.derived, second.is_default) == (None, False)
    assert [one["base"] for one in tuned.info()["models"]] == ["toy", None]
    assert tuned.verify() == store.verify() == []


def test_abandoning_gives_back_the_answers_that_were_there_before(store):
    before = answers(store)
    adopt(store, a_head())
    with Store.open(store.path) as seen:
        assert answers(seen) != before
    with store.writer() as writer:
        assert writer.abandon() == 1
    with Store.open(store.path) as seen:
        assert seen.model == BASE
        assert answers(seen) == before
        assert len(seen.models()) == 1
        assert seen.verify() == []
    assert {file.name.split("-")[1] for file in store.path.glob("*.faiss")} == {"1"}
    with store.writer() as writer:
        assert writer.abandon() == 0


def test_what_is_written_for_the_base_is_derived_in_the_same_transaction(store, tuned):
    with store.writer() as writer:
        with writer.together():
            texts = unit_rows(3, 9)
            [new] = writer.write(1, [an_item("new.jpg", unit_rows(1, 8)[0], texts)])
            captions = [CaptionRow("other", "given"), CaptionRow("more", "given")]
            writer.set_captions(2, captions, unit_rows(2, 7))
            writer.remove([3])
        copy = an_item("copy.jpg", None, texts)
        copy = ItemWrite(
            **{f: getattr(copy, f) for f in copy.__slots__} | {"content_hash": b"new.jpg"}
        )
        writer.write(1, [copy])
        writer.finish()
    assert_follows(tuned, a_head(), store)
    assert tuned.embedded("image", [new]) == {new}
    assert [one.pending for one in tuned.models()] == [0, 0]
    assert tuned.verify() == []


def test_a_transaction_that_fails_leaves_neither(store, tuned):
    items = [an_item("new.jpg", unit_rows(1, 8)[0], unit_rows(1, 9))]

    def half(writer: Writer) -> None:
        with writer.together():
            writer.write(1, items)
            raise RuntimeError

    with pytest.raises(RuntimeError), store.writer() as writer:
        half(writer)
    assert len(rows_of(store, "image")) == len(rows_of(tuned, "image")) == 12


def test_embeddings_of_a_derived_model_cannot_be_written_by_themselves(tuned):
    with pytest.raises(InvalidRowsError, match="follow from"), tuned.writer() as writer:
        writer.write(1, [an_item("new.jpg", unit_rows(1)[0], unit_rows(1))])
    with pytest.raises(InvalidRowsError, match="derived from one that"), tuned.writer() as writer:
        writer.adopt(spec_of(a_head()), a_head().pack(), {})


def test_another_adoption_takes_the_place_of_the_first_and_starts_from_the_base(store, tuned):
    adopt(store, a_head(5))
    with Store.open(store.path) as seen:
        assert len(seen.models()) == 2
        assert_follows(seen, a_head(5), store)
        assert seen.verify() == []
    with pytest.raises(WrongModelError, match="no longer has the model"):
        answers(tuned)


def test_an_adoption_that_is_stopped_changes_nothing(store):
    before = answers(store)
    assert not adopt(store, a_head(), stop=lambda: True)
    with Store.open(store.path) as seen:
        assert (seen.model, len(seen.models())) == (BASE, 1)
        assert answers(seen) == before


def test_progress_tells_of_every_embedding(store):
    told: list[tuple[int, int]] = []
    adopt(store, a_head(), progress=lambda done, total: told.append((done, total)))
    assert (told[0], told[-1]) == ((0, 36), (36, 36))


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_heads import a_head, spec_of
from indexes.store import Store

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

calls = int(sys.argv[2])

def count(done, total):
    global calls
    calls -= 1
    if not calls:
        die()

with Store.open(Path(sys.argv[1])) as store, store.writer() as writer:
    assert writer.adopt(spec_of(a_head()), a_head().pack(), {}, progress=count)
    die()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal")
@pytest.mark.parametrize("calls", [1, 2, 3, 9])
def test_killed_anywhere_an_adoption_leaves_what_was_there_or_all_of_the_new(store, calls):
    before = answers(store)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(store.path), str(calls), str(here)],
        cwd=here.parent,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    with Store.open(store.path) as seen:
        is_new = calls == 9  # killed after it was done, before its FAISS files were written
        assert (seen.model == spec_of(a_head()), len(seen.models()) == 2) == (is_new, is_new)
        assert (answers(seen) == before) is not is_new
        if is_new:
            assert_follows(seen, a_head(), store)
        assert seen.verify() == []


@pytest.mark.parametrize(
    ("model", "head", "words"),
    [
        (spec_of(a_head()), b"nonsense", "no header"),
        (spec_of(a_head(1)), a_head(2).pack(), "fingerprint"),
        (ModelSpec("toy+tuned", 5, "x"), a_head().pack(), "does not fit"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(store, model, head, words):
    with pytest.raises(InvalidRowsError, match=words), store.writer() as writer:
        writer.adopt(model, head, {})
    assert len(store.models()) == 1


def test_a_base_is_kept_as_long_as_something_is_derived_from_it(store, tuned):
    with pytest.raises(InvalidRowsError, match="tuned from this one"), tuned.writer() as writer:
        writer.drop_model(BASE.fingerprint)
    with tuned.writer() as writer:
        writer.set_default_model(BASE.fingerprint)
        writer.drop_model(tuned.model.fingerprint)
    assert len(store.models()) == 1
    assert store.verify() == []


def test_a_backup_has_both(store, tuned, tmp_path):
    tuned.backup(tmp_path / "copy.lib")
    with Store.open(tmp_path / "copy.lib") as copy:
        assert answers(copy) == answers(tuned)
        assert copy.derivation.head == a_head().pack()
        assert copy.verify() == []


# Damage


def test_vectors_that_do_not_follow_are_found_and_made_again(store, tuned):
    model_id = tuned.models()[0].model_id
    other = unit_rows(1, 20)[0].astype("<f2").tobytes()
    # The FAISS file would give it back: as after a change that it does not hold yet.
    execute(store, "DELETE FROM index_files WHERE model_id = ?", model_id)
    execute(
        store,
        "UPDATE image_embeddings SET vector = ? WHERE model_id = ? AND owner_id = 3",
        *(other, model_id),
    )
    execute(store, "DELETE FROM caption_embeddings WHERE model_id = ? AND owner_id < 5", model_id)
    problems = tuned.verify()
    assert any("1 image vectors of toy+tuned do not follow" in one for one in problems)
    assert any("4 caption vectors of toy+tuned do not follow" in one for one in problems)
    done = repair(store.path)
    assert any("1 image vectors of toy+tuned were made again" in one for one in done)
    assert tuned.verify() == []
    assert_follows(tuned, a_head(), store)


def test_a_damaged_head_is_found_and_the_library_mended_to_what_it_was_before(store):
    before = answers(store)
    adopt(store, a_head())
    head = bytearray(a_head().pack())
    head[-3] ^= 64
    execute(store, "UPDATE models SET head = ? WHERE base_id IS NOT NULL", bytes(head))
    with Store.open(store.path) as seen:
        assert any("what made toy+tuned of toy is damaged" in one for one in seen.verify())
    assert any("the library is as it was with toy" in one for one in repair(store.path))
    with Store.open(store.path) as seen:
        assert seen.model == BASE
        assert answers(seen) == before
        assert seen.verify() == []


@pytest.mark.parametrize("table", ["models", "image_embeddings", "caption_embeddings"])
def test_both_spaces_are_saved_from_a_damaged_catalogue_unless_the_models_are_lost(store, table):
    """Without the models' rows nobody knows what the vectors mean: a backup is the way out."""
    before = answers(store)
    head = a_head()
    adopt(store, head)
    with Store.open(store.path) as seen:
        after = answers(seen)
    with closing(sqlite3.connect(store.path / "catalogue.sqlite")) as connection:
        [[root]] = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", [table])
    store.close()
    with (store.path / "catalogue.sqlite").open("r+b") as file:
        file.seek(4096 * (root - 1))
        file.write(b"\xa5" * 4096)
    if table == "models":
        with pytest.raises(StoreDamagedError, match="repair"):
            Store.open(store.path)
        with pytest.raises(StoreDamagedError, match="restore a backup"):
            repair(store.path)
        return
    assert repair(store.path) != []
    with Store.open(store.path) as seen:
        assert seen.verify() == []
        assert answers(seen) == after
        assert seen.derivation is not None
        with Store.open(store.path, seen.derivation.base) as base:
            assert answers(base) == before


def test_what_its_base_lost_is_given_to_both_again(store, tuned):
    execute(store, "DELETE FROM image_embeddings WHERE model_id = 1 AND owner_id = 2")
    with store.writer() as writer:
        writer.embed(2, unit_rows(12)[1], None)
    assert_follows(tuned, a_head(), store)
    assert store.verify() == []
