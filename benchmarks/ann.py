"""What an approximate answer costs: overlap with the exact one against latency, and beside peers.

    python benchmarks/ann.py --rows 1000000 --dim 512 --out benchmarks/results/ann.json

Made-up vectors with a modality gap (`synthetic.py`), asked from the side of texts and from that of
pictures, one query after the other. Of each index only the ids count: they must be known and come
once each, scores are computed again from the vectors, and overlap@10 is by ids of the library's
exact search. Every index is asked along its dial:

- ours: as the library searches, candidates and then their stored vectors; it is built and tuned by
  the library's own rule, with queries other than those measured;
- FAISS flat, float32: what the exact answer costs without this library, on one thread;
- usearch (HNSW, float16, its defaults), hnswlib (M 16, 200 while building, float32);
- autofaiss: the index that its rule chooses for the size, an HNSW graph of 32 neighbours over
  float32 vectors while these fit into its default of 16 GB, built by FAISS.

Beside them stand the memory bandwidth of the machine and the share of it that exact search uses.
Peers that are not installed are left out and said so. A million rows with all peers take an hour on
two cores, nearly all of it for building graphs, 8 GB of memory and 10 GB of disk; with `--cache
FOLDER` what was built is found there by the next run.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import faiss as _faiss
import numpy as np
from numpy.typing import NDArray
from report import format_table, percentiles, write_report
from synthetic import image_queries, image_vectors, text_queries

from indexes.approximate import ApproximateIndex, choose, rerank, tune
from indexes.records import FileStamp
from indexes.vectors import THREADS, VectorIndex

if TYPE_CHECKING:
    from matplotlib.figure import Figure

faiss: Any = _faiss
Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]
Search = Callable[[Vectors], Ids]  # one query (1, d) -> ids of the best, in order

K = 10
TARGET = 0.99
FIRST_ID = 1_000_000  # ids are not positions
TUNING = 300  # queries of each side that ours is tuned with
BEAMS = (10, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
PROBES = (4, 8, 16, 32, 64, 128, 256)
COUNTS = (20, 30, 50, 80, 120, 200, 400)
CHUNK = 65_536
FLAT_ROWS = 2_000_000
AUTOFAISS_BYTES = 16e9  # what autofaiss lets an index take by default
OURS, FLAT = "retriever", "FAISS flat, float32"
SIDES = ("text", "image")


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of the benchmark."""

    rows: int = 1_000_000
    dim: int = 512
    queries: int = 500  # of each side
    flat_queries: int = 50
    k: int = K
    peers: bool = True
    seed: int = 0


DEFAULTS = Settings()


@dataclass(frozen=True, slots=True)
class Peer:
    """How another library builds, keeps and searches its index.

    add: takes blocks of (ids (n,), vectors (n, d)). size: bytes of the index in memory.
    search: ids of the k best for one query (1, d). dial: values of its search parameter.
    """

    package: str
    make: Callable[[Settings], Any]
    add: Callable[[Any, Ids, Vectors], None]
    save: Callable[[Any, Path], None]
    load: Callable[[Settings, Path], Any]
    set_dial: Callable[[Any, int], None]
    search: Callable[[Any, Vectors, int], Ids]
    dial: Sequence[int] = BEAMS


def _usearch(settings: Settings) -> Any:
    from usearch.index import Index

    return Index(ndim=settings.dim, metric="ip", dtype="f16")


def _load_usearch(settings: Settings, path: Path) -> Any:
    index = _usearch(settings)
    index.load(str(path))
    return index


def _hnswlib(settings: Settings) -> Any:
    import hnswlib

    index = hnswlib.Index(space="ip", dim=settings.dim)
    index.init_index(settings.rows, M=16, ef_construction=200, random_seed=settings.seed)
    return index


def _load_hnswlib(settings: Settings, path: Path) -> Any:
    import hnswlib

    index = hnswlib.Index(space="ip", dim=settings.dim)
    index.load_index(str(path))
    index.set_num_threads(1)
    return index


def _autofaiss(settings: Settings) -> Any:
    # As autofaiss 2.18 answers for these sizes.
    key = "Flat" if settings.rows < 1000 else "HNSW15" if settings.rows < 10_000 else "HNSW32"
    inner = faiss.METRIC_INNER_PRODUCT
    return faiss.IndexIDMap(faiss.index_factory(settings.dim, key, inner))


def _set_faiss_beam(index: Any, beam: int) -> None:
    graph = faiss.downcast_index(index.index)
    if hasattr(graph, "hnsw"):
        graph.hnsw.efSearch = beam


def _set_usearch_beam(index: Any, beam: int) -> None:
    index.expansion_search = beam


PEERS: dict[str, Peer] = {
    "usearch (float16)": Peer(
        "usearch",
        _usearch,
        lambda index, ids, vectors: index.add(ids, vectors),
        lambda index, path: index.save(str(path)),
        _load_usearch,
        _set_usearch_beam,
        lambda index, query, k: index.search(query[0], k, threads=1).keys.astype(np.int64),
    ),
    "hnswlib": Peer(
        "hnswlib",
        _hnswlib,
        lambda index, ids, vectors: index.add_items(vectors, ids),
        lambda index, path: index.save_index(str(path)),
        _load_hnswlib,
        lambda index, beam: index.set_ef(beam),
        lambda index, query, k: index.knn_query(query, k)[0][0].astype(np.int64),
    ),
    "autofaiss's choice (HNSW32)": Peer(
        "faiss",
        _autofaiss,
        lambda index, ids, vectors: index.add_with_ids(vectors, ids),
        lambda index, path: faiss.write_index(index, str(path)),
        lambda settings, path: faiss.read_index(str(path)),
        _set_faiss_beam,
        lambda index, query, k: index.search(query, k)[1][0],
    ),
}


class Clock:
    """Wall and processor seconds since it was started."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """What has passed."""
        return {
            "wall_s": round(time.perf_counter() - self._wall, 3),
            "cpu_s": round(time.process_time() - self._cpu, 3),
        }


def gallery(settings: Settings, folder: Path) -> VectorIndex:
    """The vectors as a library keeps them, from a file."""
    name = f"vectors-{settings.rows}-{settings.dim}-{settings.seed}"
    path, note = folder / f"{name}.faiss", folder / f"{name}.json"
    if not note.exists():
        stamp = VectorIndex.build(settings.dim, _batches(settings)).save(path)
        note.write_text(json.dumps([stamp.size_bytes, stamp.checksum]), encoding="utf-8")
    stamp = FileStamp(*json.loads(note.read_text(encoding="utf-8")))
    return VectorIndex.load(path, dim=settings.dim, rows=settings.rows, stamp=stamp)


def _batches(settings: Settings) -> Iterator[tuple[Ids, NDArray[np.float16]]]:
    first = FIRST_ID
    for vectors in image_vectors(settings.rows, settings.dim, settings.seed):
        yield np.arange(first, first + len(vectors)), vectors.astype(np.float16)
        first += len(vectors)


def bandwidth(size_bytes: int = 1 << 30, runs: int = 5) -> dict[str, float]:
    """GB/s at which memory is read, by one thread and by all: the best of some runs."""
    numbers = np.ones(size_bytes // 4, dtype=np.float32)

    def best(parts: list[Vectors]) -> float:
        seconds = []
        with ThreadPoolExecutor(len(parts)) as pool:
            for _ in range(runs):
                before = time.perf_counter()
                list(pool.map(np.max, parts))
                seconds.append(time.perf_counter() - before)
        return round(numbers.nbytes / min(seconds) / 1e9, 2)

    return {
        "one_thread_gb_s": best([numbers]),
        "all_threads_gb_s": best(np.array_split(numbers, THREADS)),
        "threads": THREADS,
    }


def latency(search: Search, queries: Vectors) -> tuple[list[Ids], dict[str, Any]]:
    """What each query finds alone, and p50, p95, p99, queries/s and processor time of that."""
    search(queries[:1])
    found, seconds = [], []
    before = time.process_time()
    for row in range(len(queries)):
        start = time.perf_counter()
        ids = search(queries[row : row + 1])
        seconds.append(time.perf_counter() - start)
        found.append(ids)
    cpu_ms = 1000 * (time.process_time() - before) / len(queries)
    rate = {"qps": round(len(queries) / sum(seconds), 1), "cpu_ms": round(cpu_ms, 4)}
    return found, percentiles(seconds) | rate


def overlap(
    exact: VectorIndex, queries: Vectors, found: Sequence[Ids], truth: Sequence[Ids]
) -> float:
    """Mean share of the right ids that are among the k best of those found, scored again.

    Raises AssertionError for an id that is not in the gallery or comes twice.
    """
    shares = []
    for query, ids, right in zip(queries, found, truth, strict=True):
        assert len(np.unique(ids)) == len(ids), "an id came twice"
        assert exact.find(ids)[1].all(), "an id is unknown"
        shares.append(np.isin(rerank(exact, query, ids, len(right)).ids, right).mean())
    return float(np.mean(shares))


def measure(
    exact: VectorIndex,
    search: Search,
    queries: Mapping[str, Vectors],
    truth: Mapping[str, Sequence[Ids]],
    **setting: int,
) -> dict[str, dict[str, Any]]:
    """One point of the curve of each side."""
    points = {}
    for side in SIDES:
        found, times = latency(search, queries[side])
        shared = overlap(exact, queries[side], found, truth[side])
        points[side] = {**setting, "overlap": round(shared, 5), **times}
    return points


def front(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those points than which none is both as quick and as good, by ascending latency."""
    kept: list[Mapping[str, Any]] = []
    for point in sorted(points, key=lambda one: (one["p50_ms"], -one["overlap"])):
        if not kept or point["overlap"] > kept[-1]["overlap"]:
            kept.append(point)
    return kept


def at_target(points: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The quickest point that reaches the target."""
    good = [point for point in points if point["overlap"] >= TARGET]
    return min(good, key=lambda one: one["p50_ms"]) if good else None


def run_ours(
    settings: Settings,
    exact: VectorIndex,
    queries: Mapping[str, Vectors],
    truth: Mapping[str, Sequence[Ids]],
    tuning: Mapping[str, Vectors],
) -> dict[str, Any]:
    """Built, tuned and searched as the library does it; and along both of its dials."""
    clock = Clock()
    index = ApproximateIndex.build(exact, seed=settings.seed)
    built = clock.read()
    assert index is not None
    clock = Clock()
    tuned = {side: tune(index, exact, tuning[side], k=settings.k) for side in SIDES}
    tuning_cost = clock.read()

    def searching(probes: int, count: int) -> Search:
        def search(query: Vectors) -> Ids:
            (ids,) = index.candidates(query, count, probes)
            return rerank(exact, query[0], ids, settings.k).ids

        return search

    curves: dict[str, list[Mapping[str, Any]]] = {side: [] for side in SIDES}
    for probes in [probes for probes in PROBES if probes <= index.lists]:
        for count in COUNTS:
            points = measure(
                exact, searching(probes, count), queries, truth, probes=probes, candidates=count
            )
            for side in SIDES:
                curves[side].append(points[side])
    chosen = {}
    for side in SIDES:
        setting = (tuned[side].probes, tuned[side].candidates)
        dials = {"probes": setting[0], "candidates": setting[1]}
        chosen[side] = measure(exact, searching(*setting), queries, truth, **dials)[side]
    return {
        "kind": index.kind,
        "why": choose(settings.rows, settings.dim).why,
        "build": built,
        "tuning": tuning_cost,
        "bytes_per_vector": round(index.memory_bytes / settings.rows, 1),
        "mapped_bytes_per_vector": 2 * settings.dim,
        "curves": {side: front(curves[side]) for side in SIDES},
        "chosen": chosen,
    }


def run_peer(
    name: str,
    settings: Settings,
    folder: Path,
    exact: VectorIndex,
    queries: Mapping[str, Vectors],
    truth: Mapping[str, Sequence[Ids]],
) -> dict[str, Any]:
    """A peer's index, built on all threads unless it is in the folder, along its dial."""
    peer = PEERS[name]
    label = f"{peer.package}-{settings.rows}-{settings.dim}-{settings.seed}"
    path, note = folder / f"{label}.index", folder / f"{label}.json"
    if not note.exists():
        faiss.omp_set_num_threads(THREADS)
        index = peer.make(settings)
        clock = Clock()
        for start in range(0, settings.rows, CHUNK):
            places = np.arange(start, min(start + CHUNK, settings.rows))
            peer.add(index, exact.ids[places], exact.vectors(places))
        built = clock.read()
        peer.save(index, path)
        del index
        note.write_text(json.dumps(built), encoding="utf-8")
    index = peer.load(settings, path)
    faiss.omp_set_num_threads(1)
    curves: dict[str, list[Mapping[str, Any]]] = {side: [] for side in SIDES}
    for beam in peer.dial:
        peer.set_dial(index, beam)
        points = measure(
            exact, lambda query: peer.search(index, query, settings.k), queries, truth, beam=beam
        )
        for side in SIDES:
            curves[side].append(points[side])
    return {
        "build": json.loads(note.read_text(encoding="utf-8")),
        "bytes_per_vector": round(path.stat().st_size / settings.rows, 1),
        "curves": {side: front(curves[side]) for side in SIDES},
    }


def run_flat(
    settings: Settings,
    exact: VectorIndex,
    queries: Mapping[str, Vectors],
    truth: Mapping[str, Sequence[Ids]],
) -> dict[str, Any]:
    """FAISS' exact search of float32 vectors on one thread, each query alone.

    As many rows at a time as fit into memory beside all else; the time of a query is their sum.
    """
    few = {side: queries[side][: settings.flat_queries] for side in SIDES}
    seconds = {side: np.zeros(len(few[side])) for side in SIDES}
    found: dict[str, list[list[Ids]]] = {side: [[] for _ in few[side]] for side in SIDES}
    built = {"wall_s": 0.0, "cpu_s": 0.0}
    for first in range(0, settings.rows, FLAT_ROWS):
        last = min(first + FLAT_ROWS, settings.rows)
        clock = Clock()
        flat = faiss.IndexFlatIP(settings.dim)
        for start in range(first, last, CHUNK):
            flat.add(exact.vectors(np.arange(start, min(start + CHUNK, last))))
        built = {key: round(built[key] + passed, 3) for key, passed in clock.read().items()}
        faiss.omp_set_num_threads(1)
        for side in SIDES:
            flat.search(few[side][:1], settings.k)
            for row in range(len(few[side])):
                before = time.perf_counter()
                _, places = flat.search(few[side][row : row + 1], settings.k)
                seconds[side][row] += time.perf_counter() - before
                found[side][row].append(exact.ids[first + places[0]])
        faiss.omp_set_num_threads(THREADS)
    curves = {}
    for side in SIDES:
        ids = [np.concatenate(parts) for parts in found[side]]
        shared = overlap(exact, few[side], ids, truth[side][: len(ids)])
        rate = {"qps": round(len(ids) / seconds[side].sum(), 1)}
        curves[side] = [{"overlap": shared, **percentiles(seconds[side].tolist()), **rate}]
    return {"build": built, "bytes_per_vector": 4 * settings.dim, "curves": curves}


def run_exact(settings: Settings, exact: VectorIndex, queries: Vectors) -> dict[str, Any]:
    """The library's exact search, and the bytes that it reads in a second."""
    exact.check()
    _, times = latency(lambda query: exact.search(query, settings.k)[0].ids, queries)
    size_bytes = 2 * settings.dim * settings.rows
    return times | {"gb_s": round(size_bytes / times["p50_ms"] / 1e6, 6), "mb": size_bytes / 1e6}


def table(numbers: Mapping[str, Any]) -> str:
    """What each index costs where it first reaches the target."""
    flat = {side: numbers["indexes"][FLAT]["curves"][side][0] for side in SIDES}
    rows = []
    for name, found in numbers["indexes"].items():
        cells = [name, f"{found['bytes_per_vector']:,.0f}", f"{found['build']['cpu_s']:,.0f}"]
        for side in SIDES:
            point = found.get("chosen", {}).get(side) or at_target(found["curves"][side])
            if point is None:
                best = max(one["overlap"] for one in found["curves"][side])
                cells += [f"at most {best:.3f}", "", "", ""]
                continue
            share = flat[side]["p50_ms"] / point["p50_ms"]
            tail = f"{point['p50_ms']:.2f} / {point['p95_ms']:.2f} / {point['p99_ms']:.2f}"
            cells += [f"{point['overlap']:.3f}", tail, f"{point['qps']:,.0f}", f"{share:.0f} ×"]
        rows.append(cells)
    header = ["index", "bytes/vector", "build, CPU s"]
    for side in SIDES:
        header += [f"{side}: overlap@{K}", "p50 / p95 / p99 ms", "queries/s", "faster than flat"]
    return format_table(header, rows)


def show(settings: Settings, numbers: Mapping[str, Any]) -> str:
    """All that is printed, as Markdown."""
    memory, exact = numbers["bandwidth"], numbers["exact"]
    share = exact["gb_s"] / memory["all_threads_gb_s"]
    lines = [
        f"{settings.rows:,} vectors of {settings.dim}, {settings.queries} queries of each side, "
        f"one after the other. Overlap@{K} and latency where an index first reaches {TARGET}; "
        f"{OURS} as it was tuned. Bytes are of the index; {OURS} also reads the stored float16 "
        f"vectors ({2 * settings.dim} bytes each, mapped) of the candidates.",
        "",
        table(numbers),
        "",
        f"Exact search in the library: {exact['p50_ms']:.1f} ms, {exact['gb_s']:.1f} GB/s, "
        f"{share:.0%} of the {memory['all_threads_gb_s']:.1f} GB/s that {memory['threads']} "
        f"threads read ({memory['one_thread_gb_s']:.1f} by one).",
    ]
    if numbers["left_out"]:
        lines += ["", f"Left out: {'; '.join(numbers['left_out'])}."]
    return "\n".join(lines)


def draw(record: Mapping[str, Any]) -> "dict[str, Figure]":
    """Overlap against median latency, a panel for each side."""
    from plots import line, new_figure

    settings = record["settings"]
    figure, panels = new_figure(
        f"{settings['rows']:,} vectors of {settings['dim']}: text queries",
        "median latency of a query, ms",
        f"overlap@{settings['k']}",
        columns=2,
        log="x",
    )
    for side, axes in zip(SIDES, panels, strict=True):
        shown = []
        for number, (name, found) in enumerate(record["numbers"]["indexes"].items()):
            points = found["curves"][side]
            times = [point["p50_ms"] for point in points]
            shown += [point["overlap"] for point in points]
            line(axes, number, name, times, [point["overlap"] for point in points])
        axes.axhline(TARGET, color="#1a1a1a", linewidth=1, linestyle="--")
        axes.set_ylim(max(0.8, min(shown) - 0.01) if shown else 0.8, 1.005)
    panels[1].set_title("picture queries")
    panels[1].legend(loc="lower right")
    return {"": figure}


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """All numbers of the benchmark."""
    click.echo(f"making {settings.rows:,} vectors of {settings.dim}", err=True)
    exact = gallery(settings, folder)
    makers = {"text": text_queries, "image": image_queries}
    asked = {
        side: make(TUNING + settings.queries, settings.dim, settings.seed)
        for side, make in makers.items()
    }
    tuning = {side: asked[side][:TUNING] for side in SIDES}
    queries = {side: np.ascontiguousarray(asked[side][TUNING:]) for side in SIDES}
    truth = {
        side: [match.ids for match in exact.search(queries[side], settings.k)] for side in SIDES
    }
    numbers: dict[str, Any] = {"bandwidth": bandwidth(min(1 << 30, 1024 * settings.rows))}
    numbers["exact"] = run_exact(settings, exact, queries["text"][: settings.flat_queries])
    click.echo(OURS, err=True)
    indexes = {OURS: run_ours(settings, exact, queries, truth, tuning)}
    click.echo(FLAT, err=True)
    indexes[FLAT] = run_flat(settings, exact, queries, truth)
    left_out = []
    for name, peer in PEERS.items() if settings.peers else ():
        if find_spec(peer.package) is None:
            left_out.append(f"{name}, which is not installed")
            continue
        if peer.package == "faiss" and settings.rows * (4 * settings.dim + 256) > AUTOFAISS_BYTES:
            left_out.append(f"{name}: beyond 16 GB it takes product quantizers, not built here")
            continue
        click.echo(name, err=True)
        indexes[name] = run_peer(name, settings, folder, exact, queries, truth)
    return numbers | {"indexes": indexes, "left_out": left_out}


@click.command()
@click.option("--rows", default=DEFAULTS.rows, show_default=True)
@click.option("--dim", default=DEFAULTS.dim, show_default=True)
@click.option("--queries", default=DEFAULTS.queries, show_default=True, help="Of each side.")
@click.option("--peers/--no-peers", default=DEFAULTS.peers, show_default=True)
@click.option("--seed", default=DEFAULTS.seed, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), help="Keeps vectors and peers' indexes.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the record as JSON.")
def main(cache: Path | None, out: Path | None, **options: Any) -> None:
    """Measure approximate search of made-up vectors, ours and others'."""
    started = time.perf_counter()
    settings = Settings(**options)
    with ExitStack() as stack:
        folder = cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        numbers = run(settings, folder)
    printed = show(settings, numbers)
    click.echo(printed)
    write_report(
        out,
        "ann",
        settings=settings,
        data={"name": "made-up embeddings (synthetic.py)", "rows": settings.rows},
        numbers=numbers,
        seconds=time.perf_counter() - started,
        printed=printed,
        packages=("faiss-cpu", "usearch", "hnswlib"),
        draw=draw,
    )


if __name__ == "__main__":
    main()
