"""Measures cross-modal retrieval on a data set by the field's protocol: one JSON-ready record.

Text-to-image: each caption is a query over the pictures of the split, a hit if its own picture is
among the first k. Image-to-text: each picture queries all captions of the split, a hit if any of
its own is among the first k. Raw captions, no prompt, cosine. Each picture stands once in the
gallery, however many captions it has, and pictures of other splits are not in it.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retriever import metrics
from retriever.captions import find_caption_files, read_caption_file
from retriever.data import CaptionReport, Pair, read_image, read_pairs
from retriever.encoders import Encoder, checked_embeddings
from retriever.errors import CaptionError, PictureError, UsageError, printable
from retriever.machine import environment, percentiles
from retriever.preprocessing import Preprocessing

Array = NDArray[np.float32]
Progress = Callable[[int, int], None]

_DIRECTIONS = ("t2i", "i2t")
_EXTREMES = ("pessimistic", "optimistic")
_LATENCY_QUERIES = 100  # asked one by one to time the index


@dataclass(frozen=True, slots=True)
class _Gallery:
    """The pictures of one fold, their captions, and where each query found its positive."""

    pictures: NDArray[np.int64]  # (n,) rows of the whole evaluation
    captions: NDArray[np.int64]  # (m,) rows of the whole evaluation
    owners: NDArray[np.int64]  # (m,) the place in `pictures` that each caption describes
    t2i: metrics.Ranks
    i2t: metrics.Ranks


def evaluate(
    dataset: Path,
    *,
    encoder: Encoder,
    split: str | None = None,
    captions: Path | None = None,
    captions_per_picture: int | None = None,
    folds: int = 1,
    ks: Sequence[int] = metrics.KS,
    embedded: bool = False,
    through_index: bool = False,
    per_query: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Recall, ranks and their intervals in both directions, with all that is needed to repeat them.

    Pictures that cannot be read are left out together with their captions, and named.

    Args:
        dataset: a folder of pictures with captions.
        encoder: the model to measure.
        split: the gallery. None takes "test" where the captions name splits, and the whole folder
            where they do not; "all" takes the whole folder in any case.
        captions: a captions file, if it is not found beside the pictures.
        captions_per_picture: use only the first so many of each picture. COCO's 5,000 test pictures
            have 25,010 captions (None, as CLIP-era tables count) or 25,000 (5, as VSE++ counts).
        folds: cut the pictures into so many consecutive galleries of equal size and report the
            mean; 5 on the 5,000 COCO test pictures is "COCO 1K".
        ks: the k of the recalls.
        embedded: also use descriptions inside the picture files (EXIF, IPTC, XMP). Annotations of a
            data set do not count them, so they are left out by default.
        through_index: measure the recall through the FAISS index as well.
        per_query: keep the rank of each query in the record.
        resamples: drawings for the 95 % bootstrap intervals, by picture; 0 leaves them out.
        seed: of the bootstrap.
        batch_size: pictures or captions encoded at a time.
        progress: called with (done, total) pictures and captions after each batch.

    Returns:
        A dictionary that `json.dumps` takes. `metrics` has `t2i_r@1`, `t2i_r@5`, `t2i_r@10`,
        `t2i_medr`, `t2i_meanr`, the same of `i2t`, and `rsum`; `intervals` has (lower, upper) of
        each. Recalls are in percent, ranks one-based.

    Raises:
        UsageError: no captioned picture, no such split, or folds that do not divide the pictures.
        CaptionError: the captions file cannot be read.
        PictureError: not a single picture can be read.
    """
    if captions_per_picture is not None and captions_per_picture < 1:
        raise UsageError("captions_per_picture must be at least 1")
    if not ks or min(ks) < 1:
        raise UsageError("recall needs at least one k, each at least 1")
    started = time.perf_counter()
    pairs, report, split = _read_split(dataset, captions, split, embedded=embedded)
    if folds < 1 or len(pairs) % folds:
        raise UsageError(f"{len(pairs)} pictures cannot be cut into {folds} folds of equal size")
    files = [captions] if captions else find_caption_files(dataset)
    if folds > 1:
        pairs = _in_annotation_order(pairs, files)
    texts = [[caption.text for caption in pair.captions[:captions_per_picture]] for pair in pairs]
    # The same words get the same embedding, once, so that their ties are exact.
    distinct = dict.fromkeys(text for several in texts for text in several)
    vocabulary = {text: row for row, text in enumerate(distinct)}
    total = len(pairs) + len(vocabulary)

    def report_progress(done: int) -> None:
        if progress:
            progress(done, total)

    images, excluded = _encode_pictures(pairs, encoder, batch_size, report_progress)
    readable = [i for i, pair in enumerate(pairs) if pair.file not in excluded]
    unique = _encode_captions(
        list(vocabulary), encoder, batch_size, lambda done: report_progress(len(pairs) + done)
    )
    encoded = time.perf_counter()

    words = [text for i in readable for text in texts[i]]
    caption_rows = unique[[vocabulary[text] for text in words]]
    owners = np.repeat(np.arange(len(readable)), [len(texts[i]) for i in readable])
    # Folds are cut before pictures are left out, so that the others stay where they were.
    fold_of = np.array(readable) // (len(pairs) // folds)
    galleries = [
        _rank(images, caption_rows, owners, np.flatnonzero(fold_of == fold))
        for fold in np.unique(fold_of)
    ]
    record: dict[str, Any] = {
        "record": "retriever-evaluation-1",
        "dataset": {
            "name": dataset.resolve().name,
            "split": split,
            "pictures": len(readable),
            "captions": len(words),
            "captions_per_picture": captions_per_picture,
            "by_source": _count_sources([pairs[i] for i in readable], captions_per_picture),
            "pictures_without_captions": report.pictures - report.with_captions,
            "captions_without_picture": len(report.unmatched),
            "problems": list(report.problems),
            "excluded": [{"file": file, "reason": why} for file, why in excluded.items()],
            "captions_files": _hash_files(files),
            "captions_sha256": _hash_captions(pairs, texts),
        },
        "model": {
            "name": encoder.name,
            "dim": encoder.dim,
            # Of weights, tokenizer and preprocessing together: this is what a store compares.
            "fingerprint": encoder.fingerprint,
            "preprocessing": _preprocessing(encoder),
            "image_size": encoder.image_size,
            "max_text_tokens": encoder.max_text_tokens,
            "engine": getattr(encoder, "engine", None),
        },
        "protocol": {
            "gallery": "this split only",
            "similarity": "cosine",
            "prompt": None,
            "precision": "embeddings float32; scores summed in float64, rounded to float32",
            "tie_rule": metrics.TIE_RULE,
            "ks": list(ks),
            "folds": folds,
            "order": "as the captions file names the pictures" if folds > 1 else "by path",
        },
        "metrics": _table(galleries, None, ks),
        "intervals": _intervals(galleries, ks, resamples, seed),
        "bootstrap": {"unit": "picture", "confidence": 0.95, "resamples": resamples, "seed": seed},
        "ties": _ties(galleries, ks),
        "diagnostics": _diagnostics(images, caption_rows, owners),
        "index": _index_table(galleries, images, caption_rows, ks) if through_index else None,
        "seconds": {
            "encoding": round(encoded - started, 3),
            "total": round(time.perf_counter() - started, 3),
        },
        "environment": environment(),
    }
    if per_query:
        names = [pairs[i].file for i in readable]
        record["per_query"] = _per_query(galleries, names, words)
    return record


def render(record: Mapping[str, Any]) -> str:
    """The record of `evaluate` as a table for people, 80 columns wide, without a final newline."""
    dataset, protocol = record["dataset"], record["protocol"]
    table, intervals = record["metrics"], record["intervals"]
    ties, index = record["ties"], record["index"]

    def measured(name: str) -> str:
        bounds = "[{:.1f}, {:.1f}]".format(*intervals[name]) if intervals else ""
        return f"{table[name]:.1f} {bounds:>14}".rstrip()

    recalls = [(f"R@{k}", f"r@{k}") for k in protocol["ks"]]
    rows = [["", "text to image", "image to text"]]
    for label, name in [*recalls, ("MedR", "medr"), ("MeanR", "meanr")]:
        rows.append([label, *(measured(f"{direction}_{name}") for direction in _DIRECTIONS)])
    if "rsum" in table:
        rows.append(["rSum", "", measured("rsum")])
    if "optimistic" in ties:
        for label, name in recalls:
            names = [f"{direction}_{name}" for direction in _DIRECTIONS]
            worst, best = ([f"{ties[case][name]:.1f}" for name in names] for case in _EXTREMES)
            if worst != best:
                spans = [f"{low} to {high}" for low, high in zip(worst, best, strict=True)]
                rows.append([f"{label}, ties lost to won", *spans])
    if index:
        for label, name in recalls:
            numbers = [index["metrics"][f"{direction}_{name}"] for direction in _DIRECTIONS]
            rows.append([f"{label}, through the index", *(f"{number:.1f}" for number in numbers)])
        overlaps = [f"{index[f'{direction}_overlap']:.4f}" for direction in _DIRECTIONS]
        rows.append([f"overlap@{index['overlap_k']} of the index", *overlaps])

    split = f", split {dataset['split']}" if dataset["split"] else ""
    folds = f", mean of {protocol['folds']} folds" if protocol["folds"] > 1 else ""
    lines = [
        f"{dataset['name']}{split}: {dataset['pictures']:,} pictures, "
        f"{dataset['captions']:,} captions{folds}; model {record['model']['name']}",
        "",
        *(f"{label:<28}{left:>24}{right:>24}".rstrip() for label, left, right in rows),
        "",
    ]
    note = "Recalls in percent"
    lines.append(
        f"{note}; in brackets 95 % bootstrap intervals by picture." if intervals else f"{note}."
    )
    if "optimistic" in ties:
        lines.append(
            f"Ties: {ties['t2i_queries']:,} captions and {ties['i2t_queries']:,} pictures; "
            f"{protocol['tie_rule']}."
        )
    if dataset["excluded"]:
        lines.append(f"Left out because they cannot be read: {len(dataset['excluded']):,}")
        lines += [f"  {printable(one['file'])}: {one['reason']}" for one in dataset["excluded"]]
    return "\n".join(lines)


# ---------------------------------------------------------------------------- reading, encoding


def _read_split(
    dataset: Path, captions: Path | None, split: str | None, *, embedded: bool
) -> tuple[list[Pair], CaptionReport, str | None]:
    """The pairs of the gallery, the report on all captions, and the split that was taken."""
    pairs, report = read_pairs(dataset, captions=captions, embedded=embedded)
    splits = {pair.split for pair in pairs if pair.split is not None}
    if split is None and splits:
        if "test" not in splits:
            raise UsageError(f"say which split to take: {printable(dataset)} has {_listed(splits)}")
        split = "test"
    if split is None or split == "all":
        chosen = pairs
    else:
        chosen = [pair for pair in pairs if pair.split == split]
        if pairs and not chosen:
            has = f"it has {_listed(splits)}" if splits else "its captions name no splits"
            raise UsageError(f"{printable(dataset)} has no split {split!r}: {has}")
    if not chosen:
        raise UsageError(f"{printable(dataset)} has no picture with a caption")
    return chosen, report, split


def _in_annotation_order(pairs: Sequence[Pair], files: Sequence[Path]) -> list[Pair]:
    """The pairs as the captions files first name them: published folds are cut in that order."""
    places: dict[str, int] = {}
    for file in files:
        try:
            _, records = read_caption_file(file, [])
        except CaptionError:  # the report of read_pairs names it
            continue
        for record in records:
            places.setdefault(PurePosixPath(record.name).name, len(places))
    return sorted(pairs, key=lambda pair: places.get(pair.path.name, len(places)))


def _encode_pictures(
    pairs: Sequence[Pair], encoder: Encoder, batch_size: int, progress: Callable[[int], None]
) -> tuple[Array, dict[str, str]]:
    """(n, d) rows of the pictures that can be read, and the reason for each that cannot."""
    rows, excluded = [], {}
    for start in range(0, len(pairs), batch_size):
        batch = []
        for pair in pairs[start : start + batch_size]:
            try:
                # In full: a faster, coarser decoding would be part of the number.
                batch.append(read_image(pair.path).image)
            except PictureError as error:
                excluded[pair.file] = str(error)
        if batch:
            embeddings = encoder.encode_images(batch)
            rows.append(checked_embeddings(embeddings, len(batch), encoder.dim, encoder.name))
        progress(min(start + batch_size, len(pairs)))
    if not rows:
        file, reason = next(iter(excluded.items()))
        raise PictureError(
            f"none of {len(pairs)} pictures can be read; the first, {file}: {reason}"
        )
    return np.concatenate(rows), excluded


def _encode_captions(
    texts: Sequence[str], encoder: Encoder, batch_size: int, progress: Callable[[int], None]
) -> Array:
    rows = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        embeddings = encoder.encode_texts(batch)
        rows.append(checked_embeddings(embeddings, len(batch), encoder.dim, encoder.name))
        progress(start + len(batch))
    return np.concatenate(rows)


# ---------------------------------------------------------------------------- numbers


def _rank(
    images: Array, captions: Array, owners: NDArray[np.int64], pictures: NDArray[np.int64]
) -> _Gallery:
    """The gallery of some pictures (rows of `images`, ascending) and the captions they own."""
    chosen = np.flatnonzero(np.isin(owners, pictures))
    local = np.searchsorted(pictures, owners[chosen])
    places = np.arange(len(pictures))
    return _Gallery(
        pictures=pictures,
        captions=chosen,
        owners=local,
        t2i=metrics.ranks_of_positives(captions[chosen], images[pictures], local, places),
        i2t=metrics.ranks_of_positives(images[pictures], captions[chosen], places, local),
    )


def _table(
    galleries: Sequence[_Gallery],
    drawn: NDArray[np.int64] | None,
    ks: Sequence[int],
    case: str = "ranks",
) -> dict[str, float]:
    """The mean of the galleries' metrics.

    Args:
        galleries: the folds.
        drawn: how often a bootstrap drew each picture, fold after fold; None: each once.
        ks: the k of the recalls.
        case: "ranks", "optimistic" or "pessimistic".
    """
    tables = []
    end = 0
    for gallery in galleries:
        start, end = end, end + len(gallery.pictures)
        t2i: NDArray[np.int64] = getattr(gallery.t2i, case)
        i2t: NDArray[np.int64] = getattr(gallery.i2t, case)
        if drawn is not None:
            t2i = np.repeat(t2i, drawn[start:end][gallery.owners])
            i2t = np.repeat(i2t, drawn[start:end])
        tables.append(metrics.summarise_ranks(t2i, i2t, ks))
    return _mean(tables)


def _mean(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([table[name] for table in tables])) for name in tables[0]}


def _intervals(
    galleries: Sequence[_Gallery], ks: Sequence[int], resamples: int, seed: int
) -> dict[str, list[float]]:
    if not resamples:
        return {}
    intervals = metrics.bootstrap_interval(
        lambda drawn: _table(galleries, drawn, ks),
        [len(gallery.pictures) for gallery in galleries],
        resamples=resamples,
        seed=seed,
    )
    return {name: list(bounds) for name, bounds in intervals.items()}


def _ties(galleries: Sequence[_Gallery], ks: Sequence[int]) -> dict[str, Any]:
    """How many queries are tied, and if any are, the metrics at both extremes."""
    ties: dict[str, Any] = {
        "t2i_queries": sum(gallery.t2i.tied for gallery in galleries),
        "i2t_queries": sum(gallery.i2t.tied for gallery in galleries),
    }
    if any(ties.values()):
        for case in _EXTREMES:
            ties[case] = _table(galleries, None, ks, case)
    return ties


def _diagnostics(
    images: Array, captions: Array, owners: NDArray[np.int64]
) -> dict[str, float | None]:
    return {
        "alignment": metrics.alignment(images[owners], captions),
        "uniformity_images": metrics.uniformity(images) if len(images) > 1 else None,
        "uniformity_texts": metrics.uniformity(captions) if len(captions) > 1 else None,
        "modality_gap": metrics.modality_gap(images, captions),
    }


def _index_table(
    galleries: Sequence[_Gallery], images: Array, captions: Array, ks: Sequence[int]
) -> dict[str, Any]:
    """The same recalls from what the FAISS index returns, and its agreement with exact search.

    `overlap` is the share of the exact first `overlap_k` that the index returned as well. Ranks
    beyond the largest k are not known from an index, so it has no MedR and MeanR.
    """
    depth = max(*ks, 10)
    tables, seconds, latencies = [], [], []
    overlaps: dict[str, list[float]] = {direction: [] for direction in _DIRECTIONS}
    for gallery in galleries:
        pictures, words = images[gallery.pictures], captions[gallery.captions]
        places = np.arange(len(pictures))
        table = {}
        for direction, queries, candidates, wanted, labels in (
            ("t2i", words, pictures, gallery.owners, places),
            ("i2t", pictures, words, places, gallery.owners),
        ):
            found, build, latency = _search_index(queries, candidates, depth)
            seconds.append(build)
            latencies.append(latency)
            for k in ks:
                hits = [
                    bool((labels[ids[:k]] == label).any())
                    for ids, label in zip(found, wanted, strict=True)
                ]
                table[f"{direction}_r@{k}"] = 100 * float(np.mean(hits))
            exact = list(metrics.top_k(queries, candidates, 10))
            overlaps[direction].append(metrics.overlap_at_k(exact, found, 10))
        if set(metrics.KS) <= set(ks):
            table["rsum"] = metrics.rsum(table)
        tables.append(table)
    return {
        "kind": "flat, float16 codes, inner product",
        "parameters": {},
        "metrics": _mean(tables),
        "overlap_k": 10,
        "t2i_overlap": float(np.mean(overlaps["t2i"])),
        "i2t_overlap": float(np.mean(overlaps["i2t"])),
        "bytes_per_vector": 2 * images.shape[1],
        "build_s": round(sum(seconds), 4),
        **percentiles(np.concatenate(latencies).tolist()),
    }


def _search_index(
    queries: Array, candidates: Array, k: int
) -> tuple[list[NDArray[np.int64]], float, list[float]]:
    """What the index returns for each query, seconds to build it, seconds of single calls."""
    from indexes.vectors import VectorIndex

    started = time.perf_counter()
    # Float16, as the store keeps them.
    rows = (np.arange(len(candidates), dtype=np.int64), candidates.astype(np.float16))
    index = VectorIndex.build(candidates.shape[1], [rows])
    build = time.perf_counter() - started
    found = [match.ids for match in index.search(queries, k)]
    latencies = []
    for row in range(min(_LATENCY_QUERIES, len(queries))):
        started = time.perf_counter()
        index.search(queries[row : row + 1], k)
        latencies.append(time.perf_counter() - started)
    return found, build, latencies


# ---------------------------------------------------------------------------- the record


def _per_query(
    galleries: Sequence[_Gallery], files: Sequence[str], words: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """The zero-based rank of every query, folds one after the other."""
    return {
        "t2i": [
            {"caption": words[row], "file": files[gallery.pictures[owner]], "rank": int(rank)}
            for gallery in galleries
            for row, owner, rank in zip(
                gallery.captions, gallery.owners, gallery.t2i.ranks, strict=True
            )
        ],
        "i2t": [
            {"file": files[row], "rank": int(rank)}
            for gallery in galleries
            for row, rank in zip(gallery.pictures, gallery.i2t.ranks, strict=True)
        ],
    }


def _count_sources(pairs: Sequence[Pair], first: int | None) -> dict[str, int]:
    counts: dict[str, int] = {}
    for pair in pairs:
        for caption in pair.captions[:first]:
            counts[caption.source] = counts.get(caption.source, 0) + 1
    return counts


def _hash_files(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 by name of the captions files; captions beside single pictures have none."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _hash_captions(pairs: Sequence[Pair], texts: Sequence[Sequence[str]]) -> str:
    """SHA-256 of what was asked for, whatever file it came from: files and captions, in order."""
    listed = [[pair.file, *captions] for pair, captions in zip(pairs, texts, strict=True)]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _preprocessing(encoder: Encoder) -> dict[str, Any] | None:
    """How pictures are made ready, in the words of the model's own configuration, if it has any."""
    own = getattr(encoder, "config", {}).get("image") or getattr(encoder, "preprocessing", None)
    return asdict(own) if isinstance(own, Preprocessing) else dict(own) if own else None


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
