"""What batches are made of, and that a cache which was cut off is gone on with."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from retriever import samples
from retriever.data import Caption, Pair
from retriever.samples import Captions, Pictures, fill_array


def captions_of(groups: list[list[str]]) -> Captions:
    words = sorted({word for group in groups for text in group for word in text.split()})
    vocabulary = {word: i + 1 for i, word in enumerate(words)} | {"[UNK]": 0}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pairs = [
        Pair(Path("a.png"), "a.png", tuple(Caption(text, "test") for text in group), None)
        for group in groups
    ]
    return Captions(pairs, tokenizer, max_tokens=4)


def test_a_batch_is_padded_to_its_longest_caption():
    captions = captions_of([["a b c"], ["", "d a"], ["b b b b b b"]])
    assert len(captions) == 4
    assert captions.lengths.tolist() == [3, 1, 2, 4]  # without a token: one of padding; cut at 4
    ids, mask = captions.batch(np.array([2, 0, 1]))
    assert ids.tolist() == [[4, 1, 0], [1, 2, 3], [0, 0, 0]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert captions.batch(np.array([3]))[0].tolist() == [[2, 2, 2, 2]]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.integers(1, 9), st.integers(0, 99))
def test_drawn_captions_are_the_pictures_own_and_differ_as_long_as_there_are_enough(
    counts, drawn, seed
):
    captions = captions_of([["a"] * count for count in counts])
    rows = captions.draw(drawn, np.random.default_rng(seed))
    assert rows.shape == (len(counts), drawn)
    for picture, (mine, count) in enumerate(zip(rows, counts, strict=True)):
        assert (captions.picture[mine] == picture).all()
        assert len(set(mine[:count])) == min(drawn, count)
        assert (mine[count:] == mine[: drawn - count][: len(mine[count:])]).all() or drawn > count
    assert np.array_equal(rows, captions.draw(drawn, np.random.default_rng(seed)))


def test_every_order_of_captions_is_drawn_equally_often():
    captions = captions_of([["a"] * 3] * 6000)
    rows = captions.draw(2, np.random.default_rng(0)) - captions.first[:-1, None]
    counts = np.bincount(rows[:, 0] * 3 + rows[:, 1], minlength=9).reshape(3, 3)
    assert not counts.diagonal().any()
    assert (abs(counts[~np.eye(3, dtype=bool)] - 1000) < 120).all()  # 4 standard deviations


# ── caches that are cut off ────────────────────────────────────────────────────────────────────


class Stop(BaseException):
    pass


def squares(path: Path, *, stop_at: int = 99, piece: int = 4) -> list[int]:
    """The rows that were made for a file of ten rows (i, i²)."""
    made: list[int] = []

    def make(rows):
        if rows[-1] >= stop_at:
            raise Stop
        made.extend(rows.tolist())
        return np.stack([rows, rows**2], axis=1), rows.tolist()

    def settle(notes):
        assert [row for rows in notes for row in rows] == list(range(10))

    fill_array(path, (10, 2), np.float32, make, piece=piece, settle=settle)
    return made


def assert_squares(path: Path) -> None:
    array = np.load(path)
    assert array.dtype == np.float32
    assert array.tolist() == [[i, i * i] for i in range(10)]
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing is left beside it


def test_a_file_is_made_once_in_pieces(tmp_path):
    path = tmp_path / "a.npy"
    assert squares(path) == list(range(10))
    assert_squares(path)
    assert squares(path) == []


def test_a_file_that_was_cut_off_is_gone_on_with_at_the_same_piece(tmp_path):
    path = tmp_path / "a.npy"
    for stop_at in (9, 9, 5):
        with pytest.raises(Stop):
            squares(path, stop_at=stop_at)
        assert not path.exists()
    assert squares(path) == [8, 9]
    assert_squares(path)


@pytest.mark.parametrize(
    ("damage", "made_again"),
    [
        (lambda part, record: part.write_bytes(part.read_bytes()[:-3]), [4, 5, 6, 7, 8, 9]),
        (lambda part, record: part.write_bytes(part.read_bytes() + b"xyz"), [8, 9]),
        (lambda part, record: part.write_bytes(bytes(part.stat().st_size)), list(range(10))),
        (lambda part, record: part.unlink(), list(range(10))),
        (lambda part, record: record.write_bytes(record.read_bytes()[:-1]), [4, 5, 6, 7, 8, 9]),
        (lambda part, record: record.write_bytes(b"nonsense\n"), list(range(10))),
        (lambda part, record: record.unlink(), list(range(10))),
    ],
)
def test_a_torn_piece_and_what_follows_it_are_made_again(damage, made_again, tmp_path):
    path = tmp_path / "a.npy"
    with pytest.raises(Stop):
        squares(path, stop_at=9)
    damage(tmp_path / "a.npy.part", tmp_path / "a.npy.record")
    assert squares(path) == made_again
    assert_squares(path)


def test_a_second_run_waits_and_takes_what_the_first_has_made(tmp_path):
    path = tmp_path / "a.npy"
    begun, waited = threading.Event(), []

    def make(rows):
        if not begun.is_set():
            begun.set()
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
        return np.stack([rows, rows**2], axis=1), None

    thread = threading.Thread(target=lambda: waited.append(squares(path)))
    fill_array(path, (10, 2), np.float32, make, piece=4)
    thread.join()
    assert waited == [[]]
    assert_squares(path)


def pictures(folder: Path, count: int) -> list[Pair]:
    folder.mkdir()
    pairs = []
    for i in range(count):
        path = folder / f"{i}.png"
        Image.new("RGB", (8, 8), (i, 2 * i, 255 - i)).save(path)
        pairs.append(Pair(path, path.name, (Caption(f"number {i}", "test"),), None))
    return pairs


KILLED_AT_30 = """
import os, signal, sys
from pathlib import Path
from retriever import samples
from retriever.data import Pair
seen = []
def read(path, *, target, plain=samples.read_image):
    seen.append(path)
    if len(seen) > 30:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(path, target=target)
samples.read_image, samples._PIECE, samples._THREADS = read, 8, 1
folder = Path(sys.argv[1])
pairs = [Pair(folder / f"{i}.png", f"{i}.png", (), None) for i in range(40)]
samples.Pictures(pairs, 4, Path(sys.argv[2]), print)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_after_a_kill_only_the_pictures_of_the_last_piece_are_decoded_again(tmp_path, monkeypatch):
    pairs = pictures(tmp_path / "d", 40)
    (tmp_path / "d" / "3.png").write_bytes(b"no picture")
    killed = [sys.executable, "-c", KILLED_AT_30, str(tmp_path / "d"), str(tmp_path / "c")]
    assert subprocess.run(killed, check=False).returncode == -signal.SIGKILL
    decoded, faults = [], []

    def read(path, *, target, plain=samples.read_image):
        decoded.append(int(path.stem))
        return plain(path, target=target)

    monkeypatch.setattr(samples, "read_image", read)
    monkeypatch.setattr(samples, "_PIECE", 8)
    found = Pictures(pairs, 4, tmp_path / "c", faults.append)
    assert sorted(decoded) == list(range(24, 40))
    assert len(faults) == 1
    assert "3.png" in faults[0]
    fresh = Pictures(pairs, 4, tmp_path / "c2", print)
    assert found.key == fresh.key
    assert np.array_equal(found.rows, fresh.rows)
    assert np.array_equal(found.pixels, fresh.pixels)


@pytest.mark.parametrize("suffix", ["npy", "json"])
def test_what_another_finishes_meanwhile_is_kept_and_half_of_it_made_again(
    suffix, tmp_path, monkeypatch
):
    pairs = pictures(tmp_path / "d", 3)
    first = Pictures(pairs, 4, tmp_path / "c", print)
    (lost,) = (tmp_path / "c").glob(f"pixels-*.{suffix}")
    content, mended = lost.read_bytes(), []
    lost.unlink()

    def wait(path, plain=samples._alone):
        mended.append(lost.write_bytes(content))
        return plain(path)

    with monkeypatch.context() as patch:
        patch.setattr(samples, "_alone", wait)
        patch.setattr(samples, "_decode", lambda *_: pytest.fail("made again"))
        again = Pictures(pairs, 4, tmp_path / "c", print)
    assert mended
    lost.unlink()
    anew = Pictures(pairs, 4, tmp_path / "c", print)
    for found in (again, anew):
        assert np.array_equal(found.pixels, first.pixels)
    assert lost.read_bytes() == content


def test_only_pictures_that_could_not_be_read_are_looked_at_again(tmp_path, monkeypatch):
    pairs = pictures(tmp_path / "d", 10)
    for name in ("3", "7"):
        (tmp_path / "d" / f"{name}.png").write_bytes(b"no picture")
    Pictures(pairs, 4, tmp_path / "c", lambda fault: None)
    decoded = []

    def read(path, *, target, plain=samples.read_image):
        decoded.append(int(path.stem))
        return plain(path, target=target)

    monkeypatch.setattr(samples, "read_image", read)
    assert len(Pictures(pairs, 4, tmp_path / "c", lambda fault: None)) == 8
    assert sorted(decoded) == [3, 7]
    (record,) = (tmp_path / "c").glob("pixels-*.json")
    assert json.loads(record.read_text("utf-8")).keys() == {"3", "7"}
