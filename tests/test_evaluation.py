"""Evaluation on small folders of flat colours, where every rank can be worked out by hand."""

import hashlib
import json
import re

import numpy as np
import pytest
from conftest import COLOURS, ToyEncoder, paint
from PIL import Image

from retriever import metrics
from retriever.errors import CaptionError, EncoderError, PictureError, UsageError
from retriever.evaluation import evaluate, render


def write_dataset(folder, rows, *, lines=()):
    """Flat pictures and their `captions.jsonl`, from (file, colour, captions, split or None)."""
    folder.mkdir(parents=True, exist_ok=True)
    written = list(lines)
    for file, colour, captions, split in rows:
        paint(folder / file, colour)
        written.append(json.dumps({"file": file, "captions": captions, "split": split}))
    (folder / "captions.jsonl").write_text("\n".join(written), encoding="utf-8")
    return folder


@pytest.fixture
def colours(tmp_path):
    """Three test pictures with five captions, one of which describes another picture."""
    return write_dataset(
        tmp_path / "colours",
        [
            ("a.png", "red", ["red", "so red"], "test"),
            ("b.png", "green", ["green", "blue"], "test"),
            ("c.png", "blue", ["the blue"], "test"),
            ("d.png", "yellow", ["yellow"], "train"),
        ],
    )


class NamedEncoder(ToyEncoder):
    """Reads the direction of a text from a table: for cases that colours cannot make."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def encode_texts(self, texts):
        return np.array([self.table[text] for text in texts], np.float32)


def test_hand_worked_recalls(colours, toy_encoder):
    record = evaluate(colours, encoder=toy_encoder, resamples=0)
    numbers = record["metrics"]
    # "blue" belongs to the green picture: green ties with red at cosine 0 behind the blue one, and
    # red stands before it: rank 2. All other captions find their picture first.
    assert numbers["t2i_r@1"] == 80.0
    assert numbers["t2i_medr"] == 1.0
    assert numbers["t2i_meanr"] == pytest.approx((1 + 1 + 1 + 3 + 1) / 5)
    # The blue picture meets "blue", the green one's caption, before its own of the same score.
    assert numbers["i2t_r@1"] == pytest.approx(200 / 3)
    assert numbers["i2t_meanr"] == pytest.approx((1 + 1 + 2) / 3)
    assert numbers["rsum"] == pytest.approx(80 + 200 / 3 + 400)
    assert record["ties"]["t2i_queries"] == 1
    assert record["ties"]["i2t_queries"] == 1
    assert record["ties"]["optimistic"]["t2i_meanr"] == pytest.approx((4 + 2) / 5)
    assert record["ties"]["optimistic"]["i2t_r@1"] == 100.0
    assert record["ties"]["pessimistic"]["t2i_meanr"] == pytest.approx((4 + 3) / 5)
    assert record["ties"]["pessimistic"]["i2t_r@1"] == pytest.approx(200 / 3)


def test_gallery_is_the_split_only(colours, toy_encoder):
    record = evaluate(colours, encoder=toy_encoder, resamples=0)
    assert (record["dataset"]["split"], record["dataset"]["pictures"]) == ("test", 3)
    assert record["dataset"]["captions"] == 5
    assert toy_encoder.images_seen == 3
    train = evaluate(colours, encoder=toy_encoder, split="train", resamples=0)
    assert (train["dataset"]["pictures"], train["dataset"]["captions"]) == (1, 1)
    everything = evaluate(colours, encoder=toy_encoder, split="all", resamples=0)
    assert (everything["dataset"]["pictures"], everything["dataset"]["captions"]) == (4, 6)


def test_split_that_is_not_there_is_refused_with_those_that_are(colours, tiny_pairs, toy_encoder):
    with pytest.raises(UsageError, match="no split 'dev': it has test, train"):
        evaluate(colours, encoder=toy_encoder, split="dev")
    with pytest.raises(UsageError, match="name no splits"):
        evaluate(tiny_pairs, encoder=toy_encoder, split="test")


def test_split_must_be_named_where_none_is_called_test(tmp_path, toy_encoder):
    rows = [("a.png", "red", ["red"], "train"), ("b.png", "blue", ["blue"], "val")]
    with pytest.raises(UsageError, match=r"say which split.*train, val"):
        evaluate(write_dataset(tmp_path, rows), encoder=toy_encoder)


def test_folder_without_splits_is_taken_whole(tiny_pairs, toy_encoder):
    record = evaluate(tiny_pairs, encoder=toy_encoder, resamples=0)
    assert record["dataset"]["split"] is None
    assert record["dataset"]["pictures"] == 4
    assert record["dataset"]["captions"] == 6
    assert record["dataset"]["pictures_without_captions"] == 1  # the white one
    assert record["dataset"]["by_source"] == {"sidecar": 6}


def test_captions_of_a_picture_can_be_limited_to_the_first(colours, toy_encoder):
    # 25,000 or 25,010 captions of COCO: the first five of each, or all of them.
    record = evaluate(colours, encoder=toy_encoder, captions_per_picture=1, resamples=0)
    assert record["dataset"]["captions"] == 3
    assert record["metrics"]["t2i_r@1"] == 100.0
    with pytest.raises(UsageError, match="at least 1"):
        evaluate(colours, encoder=toy_encoder, captions_per_picture=0)


@pytest.mark.parametrize("through_index", [False, True])
def test_numbers_equal_a_brute_force_reference(tmp_path, through_index):
    rng = np.random.default_rng(5)
    names = list(COLOURS)
    rows, table = [], {}
    for number in range(40):
        texts = [f"{number} {i}" for i in range(rng.integers(1, 4))]
        # Few colours, so that many pictures tie; few directions, so that many captions do.
        rows.append((f"{number:02}.png", names[rng.integers(len(names))], texts, None))
        for text in texts:
            row = rng.integers(-1, 2, size=4) + np.array([0, 0, 0, 0.5])
            table[text] = row / np.linalg.norm(row)
    encoder = NamedEncoder(table)
    folder = write_dataset(tmp_path, rows)
    record = evaluate(folder, encoder=encoder, resamples=0, through_index=through_index)

    images = encoder.encode_images([folder / row[0] for row in rows])
    words = [text for row in rows for text in row[2]]
    owners = np.array([n for n, row in enumerate(rows) for _ in row[2]])
    scores = (encoder.encode_texts(words).astype(np.float64) @ images.T).astype(np.float32)
    t2i = [
        list(np.lexsort((np.arange(40), -row))).index(o)
        for row, o in zip(scores, owners, strict=True)
    ]
    i2t = []
    for picture, row in enumerate(scores.T):
        order = np.lexsort((np.arange(len(words)), -row))
        i2t.append(int(np.flatnonzero(owners[order] == picture)[0]))
    for direction, ranks in (("t2i", np.array(t2i)), ("i2t", np.array(i2t))):
        for k in (1, 5, 10):
            assert record["metrics"][f"{direction}_r@{k}"] == 100 * np.mean(ranks < k)
        assert record["metrics"][f"{direction}_medr"] == np.floor(np.median(ranks)) + 1
        assert record["metrics"][f"{direction}_meanr"] == ranks.mean() + 1
    assert record["ties"]["t2i_queries"] > 10
    assert (record["index"] is not None) == through_index


def test_recall_through_the_index_is_a_number_of_its_own(colours, toy_encoder):
    index = evaluate(colours, encoder=toy_encoder, resamples=0, through_index=True)["index"]
    assert index["t2i_overlap"] == index["i2t_overlap"] == 1.0
    assert index["metrics"]["t2i_r@1"] == 80.0
    assert index["bytes_per_vector"] == 8
    assert index["p50_ms"] <= index["p95_ms"]
    assert set(index["metrics"]) == {
        *(f"{direction}_r@{k}" for direction in ("t2i", "i2t") for k in (1, 5, 10)),
        "rsum",
    }


def test_folds_are_consecutive_in_the_order_of_the_captions_file(tmp_path, toy_encoder):
    # By path the folds would be {a, b} and {c, d}, each of one colour; the file pairs a with c.
    rows = [
        ("a.png", "red", ["red"], "test"),
        ("c.png", "blue", ["blue"], "test"),
        ("b.png", "red", ["so red"], "test"),
        ("d.png", "blue", ["so blue"], "test"),
    ]
    folder = write_dataset(tmp_path, rows)
    record = evaluate(folder, encoder=toy_encoder, folds=2, per_query=True, resamples=20)
    assert record["metrics"]["t2i_r@1"] == record["metrics"]["i2t_r@1"] == 100.0
    assert record["intervals"]["t2i_r@1"] == [100.0, 100.0]
    assert [one["file"] for one in record["per_query"]["i2t"]] == [row[0] for row in rows]
    # In one gallery each colour stands twice.
    assert evaluate(folder, encoder=toy_encoder, resamples=0)["metrics"]["t2i_r@1"] == 50.0


def test_folds_are_averaged(tmp_path, toy_encoder):
    rows = [
        ("a.png", "red", ["red"], "test"),
        ("b.png", "blue", ["blue"], "test"),
        ("c.png", "red", ["blue"], "test"),
        ("d.png", "blue", ["red"], "test"),
    ]
    folder = write_dataset(tmp_path, rows)
    numbers = evaluate(folder, encoder=toy_encoder, folds=2, resamples=0)["metrics"]
    assert numbers["t2i_r@1"] == numbers["i2t_r@1"] == 50.0
    assert numbers["t2i_medr"] == 1.5
    with pytest.raises(UsageError, match="4 pictures cannot be cut into 3"):
        evaluate(folder, encoder=toy_encoder, folds=3)


def test_unreadable_picture_is_named_and_leaves_the_others_in_their_folds(tmp_path, toy_encoder):
    rows = [(f"{n}.png", "red" if n % 2 else "blue", [f"text {n}"], "test") for n in range(4)]
    folder = write_dataset(tmp_path, rows)
    (folder / "0.png").write_bytes(b"not a picture")
    record = evaluate(folder, encoder=toy_encoder, folds=2, per_query=True, resamples=10)
    assert record["dataset"]["pictures"] == record["dataset"]["captions"] == 3
    (excluded,) = record["dataset"]["excluded"]
    assert excluded["file"] == "0.png"
    assert "0.png" in excluded["reason"]
    assert [one["file"] for one in record["per_query"]["t2i"]] == ["1.png", "2.png", "3.png"]
    # "1.png" is alone in the first fold.
    assert record["per_query"]["t2i"][0]["rank"] == 0
    assert "Left out because they cannot be read: 1\n  0.png: " in render(record)


def test_no_readable_picture_is_a_failure(tmp_path, toy_encoder):
    folder = write_dataset(tmp_path, [("a.png", "red", ["red"], None)])
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(PictureError, match="none of 1 pictures"):
        evaluate(folder, encoder=toy_encoder)


def test_folder_without_captions_is_refused(tmp_path, toy_encoder):
    paint(tmp_path / "a.png", "red")
    with pytest.raises(UsageError, match="no picture with a caption"):
        evaluate(tmp_path, encoder=toy_encoder)
    with pytest.raises(UsageError):
        evaluate(tmp_path / "nowhere", encoder=toy_encoder)
    with pytest.raises(CaptionError):
        evaluate(tmp_path, encoder=toy_encoder, captions=tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("ks", [(), (0,), (1, -5)])
def test_unusable_ks_are_refused(colours, toy_encoder, ks):
    with pytest.raises(UsageError, match="k"):
        evaluate(colours, encoder=toy_encoder, ks=ks)


def test_rows_that_are_no_embeddings_are_refused(colours):
    texts = ["red", "so red", "green", "blue", "the blue"]
    encoder = NamedEncoder({text: [2, 0, 0, 0] for text in texts})
    with pytest.raises(EncoderError, match="length"):
        evaluate(colours, encoder=encoder)


def test_each_text_is_encoded_once_so_equal_captions_tie(tmp_path, toy_encoder):
    rows = [(f"{n}.png", colour, ["red"], None) for n, colour in enumerate(["blue", "red"])]
    record = evaluate(write_dataset(tmp_path, rows), encoder=toy_encoder, resamples=0)
    assert toy_encoder.texts_seen == 1
    assert record["dataset"]["captions"] == 2
    assert record["ties"]["i2t_queries"] == 2


def test_intervals_enclose_the_numbers_and_repeat_with_the_seed(colours, toy_encoder):
    records = [
        evaluate(colours, encoder=toy_encoder, resamples=50, seed=seed) for seed in (0, 0, 1)
    ]
    assert records[0]["intervals"] == records[1]["intervals"]
    assert records[0]["intervals"] != records[2]["intervals"]
    assert set(records[0]["intervals"]) == set(records[0]["metrics"])
    for name, (lower, upper) in records[0]["intervals"].items():
        assert lower <= records[0]["metrics"][name] <= upper


def test_interval_of_text_to_image_draws_pictures_with_all_their_captions(tmp_path, toy_encoder):
    # All captions of a picture hit or miss together: the interval must be that of 20 pictures.
    rows = [
        (f"{n:02}.png", "blue", [f"{'blue' if n else 'red'} {i}" for i in range(5)], None)
        for n in range(2)
    ]
    rows.append(("z.png", "red", [f"red {i}" for i in range(5)], None))
    record = evaluate(write_dataset(tmp_path, rows), encoder=toy_encoder, resamples=200, ks=(1,))
    lower, upper = record["intervals"]["t2i_r@1"]
    # Only the third picture's captions hit. Drawing 3 of 3 gives 0, 1/3, 2/3 or all.
    assert (lower, upper) == (0.0, 100.0)
    assert "rsum" not in record["metrics"]


def test_record_is_json_and_can_be_traced_to_its_sources(colours, toy_encoder):
    record = evaluate(colours, encoder=toy_encoder, resamples=10, seed=3, per_query=True)
    assert json.loads(json.dumps(record)) == record
    source = (colours / "captions.jsonl").read_bytes()
    assert record["dataset"]["captions_files"] == {
        "captions.jsonl": hashlib.sha256(source).hexdigest()
    }
    assert record["dataset"]["excluded"] == []
    assert record["model"]["fingerprint"] == "toy-1"
    assert record["model"]["max_text_tokens"] == 16
    assert record["protocol"]["tie_rule"] == metrics.TIE_RULE
    assert record["protocol"]["ks"] == [1, 5, 10]
    assert record["protocol"]["prompt"] is None
    assert record["bootstrap"] == {
        "unit": "picture",
        "confidence": 0.95,
        "resamples": 10,
        "seed": 3,
    }
    assert record["environment"]["versions"]["numpy"] == np.__version__
    assert record["per_query"]["t2i"][3] == {"caption": "blue", "file": "b.png", "rank": 2}
    assert [one["rank"] for one in record["per_query"]["i2t"]] == [0, 0, 1]


def test_hash_of_the_captions_changes_with_a_caption_and_not_with_the_file_format(
    tmp_path, toy_encoder
):
    rows = [("a.png", "red", ["red"], None), ("b.png", "blue", ["blue"], None)]
    first = evaluate(write_dataset(tmp_path / "1", rows), encoder=toy_encoder, resamples=0)
    beside = tmp_path / "2"
    for file, colour, captions, _ in rows:
        paint(beside / file, colour)
        (beside / file).with_suffix(".txt").write_text(captions[0], encoding="utf-8")
    second = evaluate(beside, encoder=toy_encoder, resamples=0)
    assert second["dataset"]["captions_files"] == {}
    assert first["dataset"]["captions_sha256"] == second["dataset"]["captions_sha256"]
    (beside / "a.txt").write_text("rot", encoding="utf-8")
    third = evaluate(beside, encoder=toy_encoder, resamples=0)
    assert third["dataset"]["captions_sha256"] != second["dataset"]["captions_sha256"]


def test_descriptions_inside_pictures_count_only_when_asked_for(tmp_path, toy_encoder):
    folder = write_dataset(tmp_path, [("a.png", "red", ["red"], None)])
    image = Image.new("RGB", (8, 8), COLOURS["blue"])
    exif = image.getexif()
    exif[0x010E] = "a blue thing"
    image.save(folder / "b.jpg", exif=exif)
    plain = evaluate(folder, encoder=toy_encoder, resamples=0)
    assert plain["dataset"]["by_source"] == {"captions.jsonl": 1}
    embedded = evaluate(folder, encoder=toy_encoder, resamples=0, embedded=True)
    assert embedded["dataset"]["by_source"] == {"captions.jsonl": 1, "exif": 1}


def test_progress_counts_pictures_and_distinct_captions_to_the_end(colours, toy_encoder):
    seen = []
    evaluate(
        colours,
        encoder=toy_encoder,
        resamples=0,
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 8), (3, 8), (5, 8), (7, 8), (8, 8)]


def test_batch_size_changes_nothing(colours, toy_encoder):
    records = [
        evaluate(colours, encoder=toy_encoder, resamples=5, batch_size=size) for size in (1, 2, 64)
    ]
    for record in records[1:]:
        assert record["metrics"] == records[0]["metrics"]
        assert record["intervals"] == records[0]["intervals"]


def test_table_shows_both_directions_intervals_ties_and_index(colours, toy_encoder):
    text = render(evaluate(colours, encoder=toy_encoder, resamples=20, through_index=True))
    lines = text.splitlines()
    assert lines[0] == "colours, split test: 3 pictures, 5 captions; model toy"
    cells = {line[:28].strip(): " ".join(line[28:].split()) for line in lines[3:]}
    assert re.fullmatch(r"80\.0 \[.+, 100\.0\] 66\.7 \[.+, 100\.0\]", cells["R@1"])
    assert re.fullmatch(r"546\.7 \[.+, 600\.0\]", cells["rSum"])
    assert cells["R@1, ties lost to won"] == "80.0 to 80.0 66.7 to 100.0"
    assert "R@5, ties lost to won" not in cells  # no tie decides there
    assert cells["R@1, through the index"] == "80.0 66.7"
    assert cells["overlap@10 of the index"] == "1.0000 1.0000"
    assert "Ties: 1 captions and 1 pictures; among equal scores" in text
    assert all(len(line) <= 100 for line in lines)


def test_table_without_intervals_or_ties_is_short(tmp_path, toy_encoder):
    rows = [("a.png", "red", ["red"], None), ("b.png", "blue", ["blue"], None)]
    text = render(evaluate(write_dataset(tmp_path / "two", rows), encoder=toy_encoder, resamples=0))
    assert text.splitlines() == [
        "two: 2 pictures, 2 captions; model toy",
        "",
        "                                       text to image           image to text",
        "R@1                                            100.0                   100.0",
        "R@5                                            100.0                   100.0",
        "R@10                                           100.0                   100.0",
        "MedR                                             1.0                     1.0",
        "MeanR                                            1.0                     1.0",
        "rSum                                                                   600.0",
        "",
        "Recalls in percent.",
    ]
