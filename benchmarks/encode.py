"""How fast pictures become committed rows, beside what the machine could do and beside peers.

    python benchmarks/encode.py --pictures FOLDER --peers rclip,clip-retrieval \
        --out benchmarks/results/encode.json

Three sets of JPEG files are indexed by `retriever index` in processes of their own: files of FOLDER
as they are, and 640 × 480 and 12-megapixel files made from them, with noise like a camera's. With
`mini` and with open_clip's ViT-B-32 and ViT-B-32-256, whose weights are random (`peers.py`) and
which are prepared once; with each engine that is installed.

The limit is what arithmetic alone allows: cores ÷ (CPU-seconds of decoding + of the forward pass, a
picture), both measured alone on all cores in the same round: files → the pixels that the model
reads, in processes that are started as ours are; these pixels → embeddings. Hashing, passing pixels
on and writing are not in it. On a GPU the forward pass is bound by its own time, and the limit is
the lesser of both.

A run over all files and one over a part of them tell start-up and work apart: the rate is that of
the files between them, and what the whole process made stands beside it. All tools run in turn;
rates are medians over the rounds, ratios are medians of the rounds' ratios. Memory is that of all
processes of a tool together, sampled. An hour with the peers on two cores, 10 GB of disk.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import xxhash
from peers import PEERS, SHARED_MODEL, Call, PeerError, default_cache, ready, weights
from PIL import Image
from report import RETRIEVER, format_table, out_option, run_process, write_report

from retriever.data import list_pictures, read_image
from retriever.encoders import load_encoder
from retriever.machine import cores
from retriever.preprocessing import Preprocessing
from retriever.workers import _ENVIRONMENT, _Wish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENGINES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime", "torch": "torch"}
SAMPLE_SECONDS = 0.2  # between two looks at the memory of all processes
LIMIT_PICTURES = 128
OF_LIMIT, TIMES_RCLIP, TIMES_RCLIP_SHARED, TIMES_CLIP_RETRIEVAL = 0.85, 6.0, 1.5, 2.0

# The first picture is decoded twice, as the first time loads what decodes.
_DECODER = """
import json, sys, time
sys.path[:] = json.loads(sys.argv[1])
from retriever.workers import _answer, _Wish
print(flush=True)
wishes = list(iter(lambda: _Wish.received(sys.stdin.buffer), None))
for wish in wishes[:1]:
    _answer(wish)
began = time.process_time()
for wish in wishes:
    _answer(wish)
print(time.process_time() - began)
"""

Run = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of the benchmark."""

    count: int = 1_000  # files as they are
    small: int = 400  # 640 × 480
    large: int = 96  # 4000 × 3000
    part: int = 4  # the shorter run has one in so many
    large_part: int = 2  # or both runs of the few large ones would be nearly all start-up
    runs: int = 3
    models: tuple[str, ...] = ("mini", "ViT-B-32", SHARED_MODEL)
    engines: tuple[str, ...] = ("openvino", "onnxruntime")
    peers: tuple[str, ...] = ()
    device: str = "cpu"
    seed: int = 0


DEFAULTS = Settings()


@dataclass(frozen=True, slots=True)
class Tool:
    """One way to encode a folder: the call, how to count what it wrote, and how to limit it."""

    name: str
    model: str
    engine: str
    index: Callable[[Path, Path], Call]
    count: Callable[[Path], int]
    limit: Callable[[Path], Call] | None = None

    @property
    def label(self) -> str:
        """What it is called in records and plots."""
        return f"{self.name}, {self.model}, {self.engine}"


@dataclass(frozen=True, slots=True)
class Files:
    """A set of pictures, whole and in part, each in a folder of its own."""

    name: str
    whole: Path
    part: Path
    count: int
    part_count: int
    pixels: tuple[int, int]  # of the picture in the middle, by area
    mb_per_file: float
    digest: str  # of the contents, in order


# ── the tools ────────────────────────────────────────────────────────────────────────────────────


def ours(model: str, engine: str, settings: Settings, cache: Path) -> Tool:
    """`retriever index` with a model and an engine; what open_clip knows is prepared if need be."""
    name, models = model, cache / "models"
    if model != "mini":
        name = f"{model}/{weights(cache, model)}"
        if engine == "torch":
            models = cache / "no-models"
        else:
            prepare(name, models)
    env = {"RETRIEVER_MODELS": str(models)}
    if engine != "torch":
        env["RETRIEVER_ENGINE"] = engine
    if settings.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    device = f"--device={settings.device}"

    def index(folder: Path, place: Path) -> Call:
        options = [f"--library={place / 'made.lib'}", f"--model={name}", device]
        return Call([*RETRIEVER, "index", str(folder), *options], env)

    def limit(folder: Path) -> Call:
        script = [sys.executable, __file__, "--limit", name, device, "--pictures", str(folder)]
        return Call(script, env)

    return Tool("retriever", model, ENGINES[engine], index, count_ours, limit)


def prepare(name: str, models: Path) -> None:
    """Has `retriever models prepare` do it, once for all runs."""
    os.environ["RETRIEVER_MODELS"] = str(models)
    from retriever.models import find_prepared

    if find_prepared(name) is None:
        run_process([*RETRIEVER, "models", "prepare", name])


def count_ours(place: Path) -> int:
    """Embeddings of pictures in the library's index."""
    said = place / "info.json"
    run_process([*RETRIEVER, "info", "--json", f"--library={place / 'made.lib'}"], out=said)
    return int(json.loads(said.read_text(encoding="utf-8"))["index"]["image"]["rows"])


def peer_tools(
    settings: Settings, cache: Path, say: Callable[[str], None]
) -> tuple[list[Tool], dict[str, Any]]:
    """The peers that can be run, and of each its versions, or why it cannot."""
    tools: list[Tool] = []
    found: dict[str, Any] = {}
    engines = {"rclip": "ONNX Runtime", "clip-retrieval": "torch"}
    for name in settings.peers:
        try:
            peer, found[name] = ready(PEERS[name](cache), say)
        except PeerError as exc:
            found[name] = str(exc)
            say(f"left out: {exc}")
            continue
        tools.append(Tool(name, SHARED_MODEL, engines[name], peer.index, peer.count))
    return tools, found


# ── the pictures ─────────────────────────────────────────────────────────────────────────────────


def sets_of(sources: Sequence[Path], settings: Settings, cache: Path, home: Path) -> list[Files]:
    """The three sets, as far as they are wanted, in folders under `home`."""
    sets = []
    if settings.count:
        sets.append(staged("as they are", sources[: settings.count], home, settings.part))
    for name, count, size, noise, part in (
        ("640 × 480", settings.small, (640, 480), 4.0, settings.part),
        ("12 megapixels", settings.large, (4000, 3000), 6.0, settings.large_part),
    ):
        if count:
            made = made_pictures(sources, count, size, noise, settings.seed, cache)
            sets.append(staged(name, made, home, part))
    return sets


def made_pictures(
    sources: Sequence[Path], count: int, size: tuple[int, int], noise: float, seed: int, cache: Path
) -> list[Path]:
    """JPEG files of a size, cut and resized from the sources in turn, no two alike.

    What enlarging leaves smooth a camera fills with noise, which decides how large a file is and
    how long it takes to decode: normal, of so many grey levels, the same in all three channels.
    """
    width, height = size
    folder = cache / "pictures" / f"{width}x{height}-noise{noise:g}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number in range(count):
        source = sources[number % len(sources)]
        path = folder / f"{number:04d}-{source.stem}.jpg"
        made.append(path)
        if path.exists():
            continue
        picture = read_image(source).image
        # The largest part of the wanted proportions, from the middle.
        scale = min(picture.width / width, picture.height / height)
        left = (picture.width - scale * width) / 2
        top = (picture.height - scale * height) / 2
        box = (left, top, left + scale * width, top + scale * height)
        pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC, box=box))
        drawn = np.random.default_rng((seed, number)).standard_normal(
            (height, width, 1), np.float32
        )
        noisy = np.clip(pixels + noise * drawn, 0, 255).astype(np.uint8)
        partial = path.with_suffix(".partial")
        Image.fromarray(noisy).save(partial, "JPEG", quality=92)
        partial.replace(path)
    return made


def staged(name: str, paths: Sequence[Path], home: Path, part: int) -> Files:
    """Two new folders with the pictures, and with one in so many of them."""
    whole, few = home / f"{name}, whole", home / f"{name}, part"
    areas, contents = [], xxhash.xxh3_64()
    for folder, chosen in ((whole, paths), (few, paths[::part])):
        folder.mkdir()
        for number, path in enumerate(chosen):
            place = folder / f"{number:05d}{path.suffix}"
            try:
                place.hardlink_to(path)
            except OSError:  # another file system
                shutil.copyfile(path, place)
    for path in paths:
        contents.update(path.read_bytes())
        with Image.open(path) as picture:
            areas.append((picture.width * picture.height, picture.size))
    middle = sorted(areas)[len(areas) // 2][1]
    size = sum(path.stat().st_size for path in paths) / 1e6 / len(paths)
    return Files(
        name,
        whole=whole,
        part=few,
        count=len(paths),
        part_count=len(paths[::part]),
        pixels=middle,
        mb_per_file=round(size, 3),
        digest=contents.hexdigest(),
    )


# ── measuring ────────────────────────────────────────────────────────────────────────────────────


def measure(tool: Tool, files: Files, home: Path) -> dict[str, Run]:
    """A run over the whole set and one over the part, each into a new place.

    Raises:
        RuntimeError: it failed, or did not write as many embeddings as there are files.
    """
    runs = {}
    for kind, folder, count in (
        ("part", files.part, files.part_count),
        ("whole", files.whole, files.count),
    ):
        with tempfile.TemporaryDirectory(dir=home) as made:
            place = Path(made) / "place"
            place.mkdir()
            call = tool.index(folder, place)
            with peak_of_children() as peak:
                runs[kind] = run_process(call.argv, env=os.environ | call.env, cwd=call.cwd)
            runs[kind]["peak_mb"] = peak()
            wrote = tool.count(place)
            if wrote != count:
                raise RuntimeError(f"{tool.label} wrote {wrote} embeddings of {count} pictures")
    return runs


def measure_limit(tool: Tool, files: Files, home: Path) -> Run:
    """What `limit_here` finds in a process of its own."""
    assert tool.limit
    call, said = tool.limit(files.whole), home / "limit.json"
    run_process(call.argv, env=os.environ | call.env, out=said)
    found: Run = json.loads(said.read_text(encoding="utf-8"))
    return found


def limit_here(model: str, folder: Path, device: str) -> Run:
    """CPU-seconds a picture of decoding to the model's input and of the forward pass, each alone
    on all cores."""
    encoder = load_encoder(model, device=device)
    # An encoder that cannot say how it prepares pictures does so in its forward pass.
    how: Preprocessing | None = getattr(encoder, "preprocessing", None)
    paths = [picture.path for picture in list_pictures(folder)][:LIMIT_PICTURES]
    wishes = [_Wish(path, None if how else encoder.image_size, how) for path in paths]
    decode_s = decode_cpu(wishes)
    ready_ones = [np.asarray(wish.fulfilled().image) for wish in wishes]
    encoder.encode_images(ready_ones)  # loads the model
    cpu, wall = time.process_time(), time.perf_counter()
    encoder.encode_images(ready_ones)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "decode_cpu_s": round(decode_s, 6),
        "forward_cpu_s": round(cpu / len(paths), 6),
        "forward_wall_s": round(wall / len(paths), 6),
        "pictures": len(paths),
    }


def decode_cpu(wishes: Sequence[_Wish]) -> float:
    """CPU-seconds a picture of what a decoding worker does, but for the pipes; one on each core."""
    with ExitStack() as stack:
        running = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-P", "-c", _DECODER, json.dumps(sys.path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=os.environ | _ENVIRONMENT,
                )
            )
            for _ in range(cores())
        ]
        pipes = [(one.stdin, one.stdout) for one in running if one.stdin and one.stdout]
        for _, answers in pipes:
            answers.readline()  # it has started
        for number, (requests, _) in enumerate(pipes):
            requests.write(b"".join(wish.packed() for wish in wishes[number :: len(pipes)]))
            requests.close()
        return sum(float(answers.read()) for _, answers in pipes) / len(wishes)


def limit_of(found: Run, device: str) -> float:
    """Pictures/s that arithmetic alone allows."""
    if device == "cpu":
        return cores() / float(found["decode_cpu_s"] + found["forward_cpu_s"])
    return min(cores() / float(found["decode_cpu_s"]), 1 / float(found["forward_wall_s"]))


@contextmanager
def peak_of_children() -> Iterator[Callable[[], float | None]]:
    """The most memory that all processes below this one have held together, in 10^6 bytes.

    Pages of their own count for each, mapped files for the one that has most of them. Known under
    Linux only; elsewhere None.
    """
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, _memory_below(os.getpid()))

    watcher = threading.Thread(target=watch, daemon=True)
    if sys.platform == "linux":
        watcher.start()
    try:
        yield lambda: round(peak / 1e6, 1) if peak else None
    finally:
        done.set()
        if watcher.ident:
            watcher.join()


def _memory_below(ancestor: int) -> int:
    parents, pages = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                # The name, in brackets, may hold anything.
                stat = (folder / "stat").read_text().rpartition(")")[2].split()
                _, resident, shared, *_ = map(int, (folder / "statm").read_text().split())
            except OSError:  # it has ended meanwhile
                continue
            parents[int(folder.name)] = int(stat[1])
            pages[int(folder.name)] = (resident - shared, shared)

    def is_below(process: int) -> bool:
        while process in parents:
            process = parents[process]
            if process == ancestor:
                return True
        return False

    below = [pages[process] for process in pages if is_below(process)]
    own = sum(private for private, _ in below)
    return (own + max((shared for _, shared in below), default=0)) * os.sysconf("SC_PAGE_SIZE")


# ── what the numbers say ─────────────────────────────────────────────────────────────────────────


def rates_of(rounds: Sequence[Mapping[str, Run]], files: Files) -> dict[str, list[float]]:
    """By round: pictures/s of the work alone and of the whole process, CPU ms a picture, start-up.

    A round whose shorter run took longer than the other tells nothing of the work alone.
    """
    rates: dict[str, list[float]] = {"work": [], "whole": [], "cpu_ms": [], "start_s": []}
    for one in rounds:
        more = files.count - files.part_count
        seconds = one["whole"]["wall_s"] - one["part"]["wall_s"]
        cpu = one["whole"]["cpu_s"] - one["part"]["cpu_s"]
        rates["work"].append(round(more / seconds, 2) if more and seconds > 0 else 0.0)
        rates["whole"].append(round(files.count / one["whole"]["wall_s"], 2))
        rates["cpu_ms"].append(round(1000 * cpu / more, 2) if more else 0.0)
        start = one["whole"]["wall_s"] - files.count * seconds / more if more else 0.0
        rates["start_s"].append(round(start, 2))
    return rates


def summary_of(
    tool: Tool,
    rounds: Sequence[Mapping[str, Run]],
    limits: Sequence[Run],
    files: Files,
    settings: Settings,
) -> dict[str, Any]:
    """All that is known of a tool on a set: its runs, medians of its rates, its limit."""
    rates = rates_of(rounds, files)
    peaks = [run["peak_mb"] for one in rounds for run in one.values() if run["peak_mb"]]
    found = {
        "tool": tool.name,
        "model": tool.model,
        "engine": tool.engine,
        "pictures_per_s": median(rates["work"]),
        "pictures_per_s_with_start": median(rates["whole"]),
        "cpu_ms": median(rates["cpu_ms"]),
        "start_s": median(rates["start_s"]),
        "peak_mb": max(peaks, default=None),
        "rates": rates,
        "runs": list(rounds),
    }
    if limits:
        allowed = [round(limit_of(one, settings.device), 2) for one in limits]
        shares = [rate / most for rate, most in zip(rates["work"], allowed, strict=True)]
        arithmetic = [1000 * (one["decode_cpu_s"] + one["forward_cpu_s"]) for one in limits]
        found |= {
            "limit_per_s": median(allowed),
            "limit_cpu_ms": round(median(arithmetic), 2),
            "of_limit": round(median(shares), 3),
            "limits": list(limits),
        }
    return found


def bars_of(sets: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is to be reached, as far as it was measured: the value, the bar, whether it is met.

    Ratios to a peer are told of the work alone and of the whole process; the lesser one counts. The
    same ratio by CPU time stands beside them, which a busy machine changes less.
    """
    bars = []

    def add(what: str, values: Sequence[float], cpu: float, bar: float) -> None:
        value = [round(one, 3) for one in values]
        by_cpu = round(cpu, 3)
        bars.append(
            {"what": what, "values": value, "by_cpu": by_cpu, "bar": bar, "met": min(value) >= bar}
        )

    def find(found: Mapping[str, Any], tool: str, model: str) -> Mapping[str, Any] | None:
        # The first engine is the one that is used if nothing is asked for.
        named = (one for one in found["tools"] if (one["tool"], one["model"]) == (tool, model))
        return next(named, None)

    for found in sets:
        for model in ("mini", "ViT-B-32"):
            one = find(found, "retriever", model)
            if one and "of_limit" in one and found["name"] != "as they are":
                cpu = _share(one["limit_cpu_ms"], one["cpu_ms"])
                add(f"{found['name']}: {model}, of the limit", [one["of_limit"]], cpu, OF_LIMIT)
        for model, peer, bar in (
            ("mini", "rclip", TIMES_RCLIP),
            (SHARED_MODEL, "rclip", TIMES_RCLIP_SHARED),
            (SHARED_MODEL, "clip-retrieval", TIMES_CLIP_RETRIEVAL),
        ):
            one, other = find(found, "retriever", model), find(found, peer, SHARED_MODEL)
            if one and other and found["name"] == "as they are":
                times = [_times(one, other, kind) for kind in ("work", "whole")]
                cpu = _share(other["cpu_ms"], one["cpu_ms"])
                add(f"{found['name']}: {model}, times {peer}", times, cpu, bar)
    return bars


def _share(one: float, other: float) -> float:
    return one / other if other > 0 else 0.0


def _times(one: Mapping[str, Any], other: Mapping[str, Any], kind: str) -> float:
    pairs = zip(one["rates"][kind], other["rates"][kind], strict=True)
    ratios = [ours / theirs for ours, theirs in pairs if theirs]
    return median(ratios) if ratios else 0.0


def tables_of(numbers: Mapping[str, Any]) -> str:
    """A table for each set and one of the bars, as Markdown."""
    header = ["tool", "model", "engine", "pictures/s", "with start-up", "CPU ms each"]
    header += ["limit /s", "of limit", "peak MB"]
    parts = []
    for found in numbers["sets"]:
        columns, rows = found["pixels"]
        parts.append(
            f"{found['name'].capitalize()}: {found['files']:,} files, {columns} × {rows},"
            f" {found['mb_per_file']:.2f} MB each"
        )
        parts.append(format_table(header, map(_row, found["tools"])))
    if numbers["bars"]:
        rows = [
            [
                one["what"],
                " / ".join(f"{value:.2f}" for value in one["values"]),
                f"{one['by_cpu']:.2f}",
                f"≥ {one['bar']:g}",
                "yes" if one["met"] else "no",
            ]
            for one in numbers["bars"]
        ]
        header = ["bar", "work / with start-up", "by CPU time", "wanted", "met"]
        parts.append(format_table(header, rows))
    parts += [f"Left out: {name}: {why}" for name, why in numbers["left_out"].items()]
    return "\n\n".join(parts)


def _row(one: Mapping[str, Any]) -> list[str]:
    def cell(key: str, form: str) -> str:
        return format(one[key], form) if one.get(key) else ""

    return [
        one["tool"],
        one["model"],
        one["engine"],
        cell("pictures_per_s", ".1f"),
        cell("pictures_per_s_with_start", ".1f"),
        cell("cpu_ms", ".1f"),
        cell("limit_per_s", ".1f"),
        cell("of_limit", ".0%"),
        cell("peak_mb", ",.0f"),
    ]


def draw(record: Mapping[str, Any]) -> dict[str, "Figure"]:
    """Bars of the rates, one panel for each set, with a line across each where its limit is."""
    from plots import COLOURS, INK, new_figure

    sets = record["numbers"]["sets"]
    figure, panels = new_figure("Pictures indexed", "pictures/s", "", columns=max(1, len(sets)))
    colours = dict(zip(("retriever", "rclip", "clip-retrieval"), COLOURS, strict=False))
    for axes, found in zip(panels, sets, strict=False):
        tools = found["tools"][::-1]
        labels = [f"{one['tool']}\n{one['model']}, {one['engine']}" for one in tools]
        rates = [one["pictures_per_s"] for one in tools]
        axes.barh(labels, rates, color=[colours[one["tool"]] for one in tools])
        for place, one in enumerate(tools):
            if limit := one.get("limit_per_s"):
                axes.plot([limit, limit], [place - 0.4, place + 0.4], color=INK, linewidth=2)
            axes.annotate(f"{rates[place]:.3g}", (rates[place], place), (4, 0), va="center",
                          textcoords="offset points", fontsize=11)  # fmt: skip
        axes.tick_params(axis="y", labelsize=10)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.12)
        axes.set_xlabel(f"pictures/s, {found['name']}; line: limit")
    return {"": figure}


# ── the command ──────────────────────────────────────────────────────────────────────────────────


def _names(known: Sequence[str]) -> Callable[[object, object, str], tuple[str, ...]]:
    def parse(_context: object, _option: object, value: str) -> tuple[str, ...]:
        names = tuple(name for name in value.split(",") if name)
        if wrong := [name for name in names if name not in known]:
            raise click.BadParameter(f"{wrong[0]!r} is none of {', '.join(known)}")
        return names

    return parse


def _list(names: Sequence[str]) -> str:
    return ",".join(names)


@click.command()
@click.option(
    "--pictures",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="A folder of photographs, such as Flickr8k's.",
)
@click.option("--count", default=DEFAULTS.count, show_default=True, help="Files as they are.")
@click.option("--small", default=DEFAULTS.small, show_default=True, help="Files of 640 × 480.")
@click.option("--large", default=DEFAULTS.large, show_default=True, help="Files of 12 megapixels.")
@click.option("--runs", default=DEFAULTS.runs, show_default=True, help="Rounds of all tools.")
@click.option(
    "--models",
    default=_list(DEFAULTS.models),
    show_default=True,
    callback=_names(DEFAULTS.models),
    help="Ours, with commas between them.",
)
@click.option(
    "--engines",
    default=_list(DEFAULTS.engines),
    show_default=True,
    callback=_names(tuple(ENGINES)),
    help="Ours; those that are not installed are left out.",
)
@click.option(
    "--peers", default="", callback=_names(tuple(PEERS)), help=f"Any of {_list(tuple(PEERS))}."
)
@click.option("--device", default=DEFAULTS.device, show_default=True, help="Ours: cpu or cuda.")
@click.option("--seed", default=DEFAULTS.seed, show_default=True, help="Of noise and weights.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=default_cache,
    show_default="benchmarks in the user's cache folder",
    help="For made pictures, weights, prepared models and peers.",
)
@click.option("--limit", hidden=True)
@out_option
def main(pictures: Path, cache: Path, limit: str | None, out: Path | None, **options: Any) -> None:
    """Index photographs with us and with peers, and show pictures/s beside the limit."""
    if limit:
        click.echo(json.dumps(limit_here(limit, pictures, options["device"])))
        return
    settings = Settings(**options)
    started = time.perf_counter()

    def say(sentence: str) -> None:
        click.echo(f"{sentence}, {time.perf_counter() - started:.0f} s", err=True)

    cache = cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    tools = [
        ours(model, engine, settings, cache)
        for model in settings.models
        for engine in settings.engines
        if find_spec(engine) and (model, engine) != ("mini", "torch")
    ]
    peers, versions = peer_tools(settings, cache, say)
    left_out = {name: why for name, why in versions.items() if isinstance(why, str)}
    sources = [picture.path for picture in list_pictures(pictures)]
    if not sources:
        raise click.UsageError(f"{pictures} holds no pictures")
    rounds: dict[tuple[str, str], list[dict[str, Run]]] = {}
    limits: dict[tuple[str, str], list[Run]] = {}
    with tempfile.TemporaryDirectory(prefix="encode-") as made:
        home = Path(made)
        sets = sets_of(sources, settings, cache, home)
        say("the pictures are there")
        for number in range(settings.runs):
            for files in sets:
                for tool in [*tools, *(one for one in peers if one.name not in left_out)]:
                    key = (files.name, tool.label)
                    try:
                        runs = measure(tool, files, home)
                    except RuntimeError as exc:
                        if tool in tools:
                            raise click.ClickException(str(exc)) from exc
                        left_out[tool.name] = str(exc)
                        continue
                    rounds.setdefault(key, []).append(runs)
                    if tool.limit:
                        limits.setdefault(key, []).append(measure_limit(tool, files, home))
                    say(f"round {number + 1}: {files.name}: {tool.label}")
    # A peer that failed in one round is in none.
    shown = [*tools, *(one for one in peers if one.name not in left_out)]
    numbers: dict[str, Any] = {"cores": cores(), "peers": versions, "left_out": left_out}
    numbers["sets"] = [
        {
            "name": files.name,
            "files": files.count,
            "files_in_part": files.part_count,
            "pixels": files.pixels,
            "mb_per_file": files.mb_per_file,
            "xxh3_64": files.digest,
            "tools": [
                summary_of(
                    tool,
                    rounds[files.name, tool.label],
                    limits.get((files.name, tool.label), []),
                    files,
                    settings,
                )
                for tool in shown
            ],
        }
        for files in sets
    ]
    numbers["bars"] = bars_of(numbers["sets"])
    printed = tables_of(numbers)
    click.echo(printed)
    write_report(
        out,
        "encode",
        settings=settings,
        data={"name": f"{len(sources):,} photographs of {pictures.resolve().name}, and made ones"},
        numbers=numbers,
        seconds=time.perf_counter() - started,
        printed=printed,
        packages=[
            *("onnxruntime", "pillow", "faiss-cpu", "tokenizers"),
            *(one for one in ("openvino", "torch") if find_spec(one)),
        ],
        draw=draw,
    )


if __name__ == "__main__":
    main()
