"""What `retriever bench` tells: how fast this machine is with a library, and what limits it.

Everything is measured on the library's own pictures and captions and with its own model; without a
library, on made-up ones, and the record says so. Nothing is written to the library, but that the
command `retriever search`, which is timed as a whole, mends a missing or damaged index as always.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from indexes.records import CaptionRow, ItemRow, ItemWrite, Match
from indexes.store import Store
from retriever import metrics
from retriever.data import read_image
from retriever.encoders import Encoder
from retriever.errors import PictureError, RetrieverError, UsageError, printable
from retriever.library import Library
from retriever.machine import describe, environment, load_average, percentiles
from retriever.preprocessing import Preprocessing

Rows = NDArray[np.float32]
Progress = Callable[[int, int], None]

DEFAULT_SECONDS = 60.0
K = 10
SAMPLE = 256  # pictures and captions drawn from the library
# Encoded at a time. Two such batches are enough for encoders to change over to what is fastest
# for many.
IMAGE_BATCH, TEXT_BATCH = 32, 128
MIN_QUERIES, QUERIES = 10, 200  # asked one by one
MIN_RUNS, MAX_RUNS = 2, 7  # of the command, from a cold start
# Share of the time that each stage may take; each does its least however little there is.
SHARES = {"decode": 0.15, "images": 0.25, "texts": 0.1, "cold": 0.25, "search": 0.1, "answer": 0.1}
BUSY = 0.5  # processes for each core, besides this one, from which figures are not this machine's

MADE_UP_PICTURES, MADE_UP_ROWS = 48, 10_000
MADE_UP_SIZE = (640, 480)
MADE_UP_TEXTS = (
    "two dogs run along the beach",
    "a woman in a red jacket climbs a rock",
    "children play football on a green field",
    "a man rides a bicycle down a street in the rain",
)

_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from cli import main; main()"
)


def measure(
    path: Path | None,
    *,
    seconds: float = DEFAULT_SECONDS,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Rates, waiting times and sizes of a library on this machine, as a record for `json.dumps`.

    Args:
        path: the library's folder; None makes one of made-up pictures and vectors, for a while.
        seconds: about how long it may take.
        device: where the encoder runs: "auto", "cpu", "cuda" or "mps".
        threads: CPU threads of the encoder; None leaves it to the engine.
        seed: of the sample of pictures and captions.
        progress: called with (done, total) stages.

    Raises:
        StoreError: the library cannot be opened for reading.
        EncoderError: its model cannot be loaded.
        UsageError: it holds no picture that can be read.
        RetrieverError: a search in a process of its own fails.
    """
    if path is not None:
        with Store.open(path, read_only=True) as store:
            library = Library(store, None, device, threads)
            return _Bench(library, store, seconds, seed, progress).record(is_made_up=False)
    with tempfile.TemporaryDirectory(prefix="retriever-bench-") as folder:
        made = _make_up(Path(folder), device, threads, seed)
        with Store.open(made, read_only=True) as store:
            library = Library(store, None, device, threads)
            return _Bench(library, store, seconds, seed, progress).record(is_made_up=True)


class _Bench:
    """One measurement of one library."""

    def __init__(
        self,
        library: Library,
        store: Store,
        seconds: float,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self.library = library
        self.store = store
        self.seconds = seconds
        self.rng = random.Random(seed)
        self.progress = progress or (lambda done, total: None)
        self.done = 0

    def record(self, *, is_made_up: bool) -> dict[str, Any]:
        """All stages, one after the other."""
        started, load = time.perf_counter(), load_average()
        self.progress(0, len(SHARES))
        items = self._sample()
        texts = [one.captions[0].text for one in items if one.captions]
        asks_own = bool(texts)
        texts = texts or list(MADE_UP_TEXTS)
        encoder = self.library.encoder
        with self._stage("decode") as left:
            decoding, ready = _decode([item.path for item in items], _prepared_by(encoder), left)
        with self._stage("images") as left:
            images = _encode(encoder.encode_images, ready, IMAGE_BATCH, left)
        with self._stage("texts") as left:
            words = _encode(encoder.encode_texts, texts, TEXT_BATCH, left)
        with self._stage("cold") as left:
            cold = _cold_starts(self.library.path, texts[0], left)
        with self._stage("search") as left:
            search = self._search(encoder.encode_texts(texts[:QUERIES]), left)
        with self._stage("answer") as left:
            answers = _times(lambda text: self.library.search(text, k=K), texts[:QUERIES], left)
        info = self.library.info()
        record: dict[str, Any] = {
            "record": "retriever-bench-1",
            "made_up": is_made_up,
            "library": {
                "path": None if is_made_up else str(self.library.path),
                "pictures": info["items"],
                "captions": info["captions"],
                "size_bytes": info["size_bytes"],
                "index_bytes": _size_of(self.library.path.glob("*.faiss")),
            },
            "model": asdict(self.library.model),
            "queries": "captions of the library" if asks_own else "made-up sentences",
            "encoding": {
                "gpu": _uses_gpu(),
                "engine": getattr(encoder, "engine", "torch"),
                "decode": decoding,
                "images": images,
                "texts": words,
            },
            "cold_start": cold,
            "answer": answers,
            "search": search,
            "seconds": round(time.perf_counter() - started, 1),
            "environment": environment(),
        }
        # What this process itself did does not count.
        record["environment"]["load_average"] = load
        record["limits"] = limits_of(record)
        return record

    @contextmanager
    def _stage(self, name: str) -> Iterator[Callable[[], bool]]:
        """Gives a function that tells whether there is time left for this stage."""
        ends = time.perf_counter() + self.seconds * SHARES[name]
        yield lambda: time.perf_counter() < ends
        self.done += 1
        self.progress(self.done, len(SHARES))

    def _sample(self) -> list[ItemRow]:
        """Items whose files are there, in a random order."""
        ids = self.store.item_ids()
        self.rng.shuffle(ids)
        found: list[ItemRow] = []
        for start in range(0, len(ids), SAMPLE):
            items = self.store.items(ids[start : start + SAMPLE])
            found += [one for one in items if one.status == "ok" and one.path.is_file()]
            if len(found) >= SAMPLE or start >= 8 * SAMPLE:  # most of them may be away
                break
        if not found:
            raise UsageError(
                f"{printable(self.library.path)} has no pictures whose files are there: index some"
            )
        return found[:SAMPLE]

    def _search(self, queries: Rows, left: Callable[[], bool]) -> dict[str, Any]:
        """Vectors alone: exact, and as the library answers by itself if that is not the same."""
        info = self.library.info()["index"]["image"]
        rows, dim = info["rows"], self.library.model.dim
        begun = time.perf_counter()

        def is_first_half() -> bool:
            return left() and time.perf_counter() - begun < self.seconds * SHARES["search"] / 2

        def exactly(rows: Rows) -> list[Match]:
            return self.store.search("image", rows, K, exact=True)

        def as_it_likes(rows: Rows) -> list[Match]:
            return self.store.search("image", rows, K, source="text")

        singles = [row[None] for row in queries]
        exact = _times(exactly, singles, is_first_half)
        approximate = None
        if info["approximate"]:
            found = [match.ids for match in as_it_likes(queries)]
            true = [match.ids for match in exactly(queries)]
            approximate = {
                **_times(as_it_likes, singles, left),
                f"overlap@{K}": round(metrics.overlap_at_k(true, found, K), 4),
            }
        return {
            "rows": rows,
            "read_bytes": 2 * dim * rows,  # float16, all of them
            "memory_gb_per_s": _memory_gb_per_s(),
            "reason": info["reason"],
            "exact": exact,
            "approximate": approximate,
        }


def _decode(
    paths: Sequence[Path], prepared: Preprocessing, left: Callable[[], bool]
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Cost of decoding and resizing on one core; the first pictures, as large as a model sees."""
    ready: list[Image.Image] = []
    n = unreadable = pixels = 0
    wall, cpu = time.perf_counter(), time.thread_time()
    for path in paths:
        try:
            decoded = read_image(path, target=prepared.size)
        except PictureError:
            unreadable += 1
            continue
        image = prepared.prepared(decoded.image)
        n += 1
        pixels += decoded.width * decoded.height
        if len(ready) < IMAGE_BATCH:
            ready.append(image)
        if not left():
            break
    wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
    if not ready:
        raise UsageError(f"none of {len(paths)} pictures of the library can be read any more")
    return {**_rate(n, wall, cpu), "megapixels": round(pixels / n / 1e6, 2)}, ready


def _prepared_by(encoder: Encoder) -> Preprocessing:
    """How its pictures are made ready; squashed, which costs the same, if it does not say."""
    said: Preprocessing | None = getattr(encoder, "preprocessing", None)
    return said or Preprocessing(encoder.image_size, "squash", "bicubic")


def _encode(
    encode: Callable[[Sequence[Any]], Rows],
    inputs: Sequence[Any],
    size: int,
    left: Callable[[], bool],
) -> dict[str, Any]:
    """Cost of a tower, in batches, after two that load and warm it."""
    # Some of them again if there are too few: a batch of another size is another speed.
    batch = [inputs[at % len(inputs)] for at in range(size)]
    encode(batch)
    encode(batch)
    n = 0
    wall, cpu = time.perf_counter(), time.process_time()
    while n == 0 or left():
        encode(batch)
        n += len(batch)
    return _rate(n, time.perf_counter() - wall, time.process_time() - cpu)


def _rate(n: int, wall: float, cpu: float) -> dict[str, Any]:
    return {
        "n": n,
        "per_second": round(n / wall, 1),
        "ms": round(1000 * wall / n, 3),
        "cpu_ms": round(1000 * cpu / n, 3),
    }


def _uses_gpu() -> bool:
    """Whether torch ran the model on a GPU."""
    torch = sys.modules.get("torch")
    return bool(torch and torch.cuda.is_initialized())


def _cold_starts(library: Path, text: str, left: Callable[[], bool]) -> dict[str, Any]:
    """Wall and CPU time of whole `retriever search` commands; RetrieverError if one fails."""
    # Nothing is imported from the folder that it is called in.
    folders = [*filter(None, sys.path), str(Path(__file__).parents[1])]
    command = [sys.executable, "-P", "-c", _COMMAND, json.dumps(folders)]
    command += ["search", "--library", str(library), "--json", "--", text]
    walls: list[float] = []
    cpus: list[float] = []
    while len(walls) < MIN_RUNS or (left() and len(walls) < MAX_RUNS):
        before, wall = os.times(), time.perf_counter()
        done = subprocess.run(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        walls.append(time.perf_counter() - wall)
        if done.returncode:
            raise RetrieverError(
                f"`retriever search`, to be timed, ended with status {done.returncode}:"
                f" {' '.join(done.stderr.split())[-500:]}"
            )
        after = os.times()
        cpus.append(
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )
    return {"runs": len(walls), "wall_s": round(median(walls), 3), "cpu_s": round(median(cpus), 3)}


def _times(
    ask: Callable[[Any], object], queries: Sequence[Any], left: Callable[[], bool]
) -> dict[str, Any]:
    """Percentiles of single calls, after one that finds everything on disk."""
    ask(queries[0])
    seconds: list[float] = []
    for query in queries:
        began = time.perf_counter()
        ask(query)
        seconds.append(time.perf_counter() - began)
        if len(seconds) >= MIN_QUERIES and not left():
            break
    return percentiles(seconds)


def _memory_gb_per_s() -> float:
    """Bytes that a matrix-vector product, which reads each of them once, gets from memory."""
    matrix = np.ones((1 << 16, 512), dtype=np.float32)  # 134 MB, more than caches hold
    vector = np.ones(512, dtype=np.float32)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        matrix @ vector
        best = min(best, time.perf_counter() - began)
    return round(matrix.nbytes / best / 1e9, 1)


def _size_of(paths: Iterator[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


# ── a library of made-up pictures ────────────────────────────────────────────────────────────────


def _make_up(folder: Path, device: str, threads: int | None, seed: int) -> Path:
    """A library with some real files and many random vectors."""
    rng = np.random.default_rng(seed)
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(MADE_UP_PICTURES):
        # Soft patches with a little noise take JPEG about as long as photographs do.
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(MADE_UP_SIZE, Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(pictures / f"{number:04d}.jpg", quality=90)
        text = MADE_UP_TEXTS[number % len(MADE_UP_TEXTS)]
        (pictures / f"{number:04d}.txt").write_text(text, encoding="utf-8")
    path = folder / "made-up.lib"
    with Library.create(path, device=device, threads=threads) as library:
        library.index(pictures)
        dim = library.model.dim
    rows = rng.standard_normal((MADE_UP_ROWS, dim), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with Store.open(path) as store, store.writer() as writer:
        root = writer.add_root(folder / "nowhere")
        for start in range(0, len(rows), 1000):
            writer.write(
                root,
                [
                    ItemWrite(
                        file=f"{number:06d}.jpg",
                        size=1,
                        mtime_ns=0,
                        content_hash=number.to_bytes(16, "little"),
                        width=MADE_UP_SIZE[0],
                        height=MADE_UP_SIZE[1],
                        captions=(CaptionRow(f"made-up picture {number}", "sidecar"),),
                        image_embedding=rows[number],
                        caption_embeddings=rows[number][None],
                    )
                    for number in range(start, start + 1000)
                ],
            )
        writer.finish()
    return path


# ── in words ─────────────────────────────────────────────────────────────────────────────────────


def limits_of(record: Mapping[str, Any]) -> list[str]:
    """What limits the speed, a sentence each, from the numbers of a record."""
    encoding, search, machine = record["encoding"], record["search"], record["environment"]
    said = []
    load, cpus = machine["load_average"], machine["cpus"]
    if load is not None and load > BUSY * cpus:
        said.append(
            f"Other programs were at work (load {load:.1f} on {cpus} cores):"
            " on a quiet machine these numbers are better."
        )
    decode, forward = encoding["decode"]["cpu_ms"], encoding["images"]["cpu_ms"]
    if encoding["gpu"]:
        rates = {
            "decoding on the CPU": 1000 * cpus / decode,
            "the model on the GPU": encoding["images"]["per_second"],
        }
        slowest = min(rates, key=rates.__getitem__)
        said.append(
            f"Indexing: at most about {_round(rates[slowest])} pictures a second; {slowest} limits."
        )
    else:
        share = round(100 * decode / (decode + forward))
        said.append(
            f"Indexing: at most about {_round(1000 * cpus / (decode + forward))} pictures a second;"
            f" {'decoding' if share > 50 else 'the model'} limits: of the {decode + forward:.1f} ms"
            f" of CPU that each takes, {share} % is decoding and {100 - share} % the model."
        )
    cold, warm = record["cold_start"], record["answer"]["p50_ms"]
    said.append(
        f"A search from the shell takes {cold['wall_s']:.2f} s, of which"
        f" {warm:.0f} ms are the answer: the rest starts Python and loads the model."
    )
    exact = search["exact"]["p50_ms"]
    reads = search["read_bytes"] / 1e6
    if reads < 8:
        said.append(f"Exact search of {search['rows']:,} pictures takes {exact:.2f} ms.")
    else:
        reached = reads / exact
        said.append(
            f"Exact search reads {reads:,.0f} MB at {reached:.1f} GB/s,"
            f" {100 * reached / search['memory_gb_per_s']:.0f} % of what memory gives here"
            f" ({search['memory_gb_per_s']:.1f} GB/s): its time grows with the library."
        )
    if found := search["approximate"]:
        said.append(
            f"The approximate index answers {exact / found['p50_ms']:.1f} times as fast"
            f" and finds {100 * found[f'overlap@{K}']:.1f} % of the {K} best."
        )
    said.append(f"How the library chose to search: {search['reason']}.")
    return said


def _round(rate: float) -> str:
    """Two digits are all that holds on another day."""
    digits = max(0, len(str(int(rate))) - 2)
    return f"{round(rate, -digits):,.0f}"


def render(record: Mapping[str, Any]) -> str:
    """The record of `measure` as a table for people, without a final newline."""
    library, model, encoding = record["library"], record["model"], record["encoding"]
    search, cold = record["search"], record["cold_start"]
    name = "made up for this run" if record["made_up"] else printable(library["path"])
    lines = [
        f"Library   {name}: {library['pictures']:,} pictures, {library['captions']:,} captions",
        f"Size      {library['size_bytes'] / 1e6:,.1f} MB on disk,"
        f" {library['index_bytes'] / 1e6:,.1f} MB of it the index",
        f"Model     {model['name']}, {model['dim']} dimensions, run by {encoding['engine']}",
        f"Machine   {describe({**record['environment'], 'versions': {}}).removesuffix('; ')}",
        "",
        f"{'encoding':<34}{'per second':>12}{'ms':>10}{'ms of CPU':>12}",
    ]
    stages = {
        "decode": f"  decoding, {encoding['decode']['megapixels']:.1f} MP, one core",
        "images": "  the model, pictures",
        "texts": "  the model, texts",
    }
    for stage, label in stages.items():
        found = encoding[stage]
        lines.append(
            f"{label:<34}{found['per_second']:>12,.1f}{found['ms']:>10.2f}{found['cpu_ms']:>12.2f}"
        )
    lines += ["", f"{'waiting, ms':<34}{'p50':>12}{'p95':>10}{'p99':>12}"]
    waits = {
        "  an answer to a text": record["answer"],
        f"  exact search of {search['rows']:,} rows": search["exact"],
    }
    if found := search["approximate"]:
        waits[f"  approximate, overlap@{K} {found[f'overlap@{K}']:.3f}"] = found
    for label, found in waits.items():
        lines.append(
            f"{label:<34}{found['p50_ms']:>12.2f}{found['p95_ms']:>10.2f}{found['p99_ms']:>12.2f}"
        )
    lines += [
        f"{'  `retriever search`, cold':<34}{1000 * cold['wall_s']:>12,.0f}"
        f" (median of {cold['runs']}; {1000 * cold['cpu_s']:,.0f} of CPU)",
        "",
        "What limits the speed here",
        *(f"  {sentence}" for sentence in record["limits"]),
    ]
    return "\n".join(lines)
