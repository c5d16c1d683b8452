"""How fast `retriever serve` answers, one question after the other and many at once.

    python benchmarks/serve.py flickr8k --out benchmarks/results/serve.json

A library is made of a data set and served by a process of its own. Its captions are asked as texts,
each a new one, over HTTP on the loopback: one client, then --clients of them without a pause, each
of which asks anew as soon as it is answered; then the same while another process indexes pictures
that are new. The clients' own work is on the same cores, so latencies are a little worse than those
of people elsewhere. Memory is the server's resident set. Every answer is looked at: its status, the
number of hits, and, while pictures come in, whether the best of the old ones is still the best.

Last, what `retriever search` costs when it finds the server, beside doing without: CPU time of
whole processes in turn, and whether both print the same.
"""

import asyncio
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import click
import numpy as np
from PIL import Image
from report import (
    RETRIEVER,
    folder_option,
    format_table,
    interleaved,
    out_option,
    percentiles,
    run_process,
    write_report,
)

from retriever.data import Pair, read_pairs
from retriever.library import Library

K = 10
WARM = 50  # questions that are asked before any is timed
BARS = {"p50_ms": 15.0, "p99_ms": 150.0, "cpu": 0.25}


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of the benchmark."""

    questions: int = 500
    clients: int = 16
    seconds: float = 60.0
    new_pictures: int = 1000
    runs: int = 7
    seed: int = 0


DEFAULTS = Settings()


class Server:
    """A running `retriever serve` of one library."""

    def __init__(self, library: Path, cache: Path) -> None:
        self._process = subprocess.Popen(
            [*RETRIEVER, "serve", "--library", library, "--port", "0", "--cache", cache],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        line = self._process.stderr.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            raise RuntimeError(line + self._process.stderr.read())
        self.port = urlsplit(found[0]).port or 0

    def memory_mb(self) -> float | None:
        """Resident set in 10^6 bytes; None where /proc does not tell."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return None
        [kilobytes] = re.findall(r"VmRSS:\s+(\d+) kB", status)
        return round(int(kilobytes) * 1024 / 1e6, 1)

    def end(self) -> None:
        """Stops it."""
        self._process.send_signal(signal.SIGINT)
        with self._process:
            self._process.wait(30)


@contextmanager
def serving(library: Path, cache: Path) -> Iterator[Server]:
    """A server for the length of a `with` block."""
    server = Server(library, cache)
    try:
        yield server
    finally:
        server.end()


class Client:
    """One connection that stays open, as a browser's does."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> "Client":
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def ask(self, text: str) -> tuple[int, Any]:
        """Status and answer."""
        target = f"/api/search?k={K}&q={quote(text)}"
        self._writer.write(f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert length, head
        body = await self._reader.readexactly(int(length[1]))
        return int(head.split(maxsplit=2)[1]), json.loads(body)


async def one_by_one(port: int, texts: Sequence[str]) -> tuple[list[float], dict[str, list[int]]]:
    """Seconds of each question, and the ids that answer it."""
    seconds, best = [], {}
    async with Client(port) as client:
        for text in texts:
            begin = time.perf_counter()
            status, answer = await client.ask(text)
            seconds.append(time.perf_counter() - begin)
            if status != 200:
                raise RuntimeError(f"{text!r}: {status} {answer}")
            best[text] = [hit["id"] for hit in answer["hits"]]
    return seconds, best


async def many_at_once(
    port: int,
    texts: Sequence[str],
    clients: int,
    until: Any,
    best: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """What clients without a pause get until `until()` is true; see `BARS`."""
    seconds: list[float] = []
    faults: list[str] = []
    following = itertools.cycle(texts)
    newest = max(itertools.chain.from_iterable(best.values())) if best else 0

    async def ask() -> None:
        async with Client(port) as client:
            while not until():
                text = next(following)
                begin = time.perf_counter()
                status, answer = await client.ask(text)
                seconds.append(time.perf_counter() - begin)
                if status != 200 or not answer["hits"]:
                    faults.append(f"{status} {text}")
                elif best and text in best:
                    old = [hit["id"] for hit in answer["hits"] if hit["id"] <= newest]
                    if old[:1] != list(best[text][: len(old[:1])]):
                        faults.append(f"another answer: {text}")

    begin = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(clients)))
    lasted = time.perf_counter() - begin
    return {
        "seconds": round(lasted, 2),
        "answers": len(seconds),
        "a_second": round(len(seconds) / lasted, 1),
        "errors": len(faults),
        "first_errors": faults[:3],
        **percentiles(seconds),
    }


def make_new_pictures(pairs: Sequence[Pair], folder: Path, count: int) -> None:
    """Pictures that the library does not know: others, mirrored, and mixed with the next one."""
    folder.mkdir()
    for number in range(count):
        one, other = (
            Image.open(pairs[(number + shift) % len(pairs)].path).convert("RGB").resize((320, 240))
            for shift in (0, 1)
        )
        mixed = Image.blend(one.transpose(Image.Transpose.FLIP_LEFT_RIGHT), other, 0.5)
        mixed.save(folder / f"new-{number:05}.jpg", quality=85)


def measure(dataset: Path, library: Path | None, home: Path, settings: Settings) -> dict[str, Any]:
    """All numbers; the library is made in `home`, or copied there."""
    pairs, _ = read_pairs(dataset)
    draw = np.random.default_rng(settings.seed)
    captions = sorted({caption.text for pair in pairs for caption in pair.captions})
    texts = [captions[at] for at in draw.permutation(len(captions))]
    place = home / "served.lib"
    if library is not None:
        shutil.copytree(library, place)
    else:
        with Library.create(place) as made:
            made.index(dataset)
    make_new_pictures(pairs, home / "new", settings.new_pictures)
    with Library.open(place) as opened:
        pictures, mode = opened.counts()["items"], opened.search(texts[0], k=1).mode
    with serving(place, home / "cache") as server:
        following = itertools.cycle(texts)
        warm = list(itertools.islice(following, WARM))
        asked = list(itertools.islice(following, settings.questions))
        asyncio.run(one_by_one(server.port, warm))
        alone, best = asyncio.run(one_by_one(server.port, asked))
        before = server.memory_mb()
        end = time.monotonic() + settings.seconds
        busy = asyncio.run(
            many_at_once(
                server.port, texts[::-1], settings.clients, lambda: time.monotonic() >= end
            )
        )
        after = server.memory_mb()
        indexing = asyncio.run(
            while_indexing(server.port, place, home / "new", asked, best, settings)
        )
        shell = from_the_shell(place, texts[0], home, settings)
    return {
        "pictures": pictures,
        "mode": mode,
        "one_client": {"answers": len(alone), "errors": 0, **percentiles(alone)},
        "clients": busy,
        "memory_mb": {"before": before, "after": after},
        "while_indexing": indexing,
        "shell": shell,
        "bars": bars_of(alone, busy, shell),
    }


async def while_indexing(
    port: int,
    library: Path,
    new: Path,
    texts: Sequence[str],
    best: Mapping[str, Sequence[int]],
    settings: Settings,
) -> dict[str, Any]:
    """As `many_at_once`, until another process has indexed the new pictures."""
    process = await asyncio.create_subprocess_exec(
        *RETRIEVER, "index", str(new), "--library", str(library), stdout=asyncio.subprocess.DEVNULL
    )
    # A few clients: what is asked is whether answers stay whole, not how long a full machine takes.
    found = await many_at_once(
        port, texts, min(4, settings.clients), lambda: process.returncode is not None, best
    )
    status = await process.wait()
    if status:
        raise RuntimeError(f"indexing ended with status {status}")
    return {"new_pictures": settings.new_pictures, **found}


def from_the_shell(library: Path, text: str, home: Path, settings: Settings) -> dict[str, Any]:
    """CPU time of a search that finds the server, beside one without, and whether both agree."""
    search = [*RETRIEVER, "search", text, "--library", str(library)]
    commands = {"with the server": search, "without": [*search, "--no-server"]}
    printed = {}
    for name, argv in commands.items():
        run_process(argv, out=home / "printed.txt")
        printed[name] = (home / "printed.txt").read_bytes()
    found = interleaved(commands, settings.runs)
    ratio = found["with the server"]["cpu_s"]["median"] / found["without"]["cpu_s"]["median"]
    return {
        "commands": found,
        "ratio": round(ratio, 3),
        "same": len(set(printed.values())) == 1,
    }


def bars_of(
    alone: Sequence[float], busy: Mapping[str, Any], shell: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What is wanted, and whether it was found."""
    found = [
        ("p50 of one client, ms", percentiles(alone)["p50_ms"], BARS["p50_ms"]),
        ("p99 of all clients at once, ms", busy["p99_ms"], BARS["p99_ms"]),
        ("errors of all clients at once", busy["errors"], 0),
        ("CPU of a search from the shell, beside without the server", shell["ratio"], BARS["cpu"]),
    ]
    return [
        {"what": what, "found": value, "bar": bar, "met": value <= bar}
        for what, value, bar in found
    ]


def tables_of(numbers: Mapping[str, Any]) -> str:
    """Latencies, memory and CPU time as Markdown."""
    runs = {
        "one client": numbers["one_client"],
        f"{numbers['settings_clients']} clients": numbers["clients"],
        f"while {numbers['while_indexing']['new_pictures']:,} pictures are indexed": numbers[
            "while_indexing"
        ],
    }
    rows = [
        [
            name,
            f"{one['answers']:,}",
            f"{one['a_second']:,.0f}" if "a_second" in one else "",
            *(f"{one[f'{p}_ms']:,.1f}" for p in ("p50", "p95", "p99")),
            str(one.get("errors", 0)),
        ]
        for name, one in runs.items()
    ]
    header = ["asked by", "answers", "a second", "p50 ms", "p95 ms", "p99 ms", "errors"]
    shell = numbers["shell"]
    costs = [
        [name, f"{one['cpu_s']['median']:.3f}", f"{one['wall_s']['median']:.3f}"]
        for name, one in shell["commands"].items()
    ]
    bars = [
        [one["what"], f"{one['found']:g}", f"≤ {one['bar']:g}", "yes" if one["met"] else "no"]
        for one in numbers["bars"]
    ]
    memory = numbers["memory_mb"]
    return "\n\n".join(
        [
            format_table(header, rows),
            format_table(["`retriever search`", "CPU s", "wall s"], costs)
            + f"\n\nBoth print the same: {'yes' if shell['same'] else 'no'}. The server's memory"
            f" before and after the minute with all clients: {memory['before']} and"
            f" {memory['after']} MB.",
            format_table(["", "measured", "wanted", "met"], bars),
        ]
    )


@click.command()
@click.argument("dataset", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--library",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="One of the data set that is there already; it is copied.",
)
@click.option("--questions", default=DEFAULTS.questions, show_default=True, help="Of one client.")
@click.option("--clients", default=DEFAULTS.clients, show_default=True, help="At once.")
@click.option("--seconds", default=DEFAULTS.seconds, show_default=True, help="Of all clients.")
@click.option("--new-pictures", default=DEFAULTS.new_pictures, show_default=True, help="Indexed.")
@click.option("--runs", default=DEFAULTS.runs, show_default=True, help="Of each search of a shell.")
@click.option("--seed", default=DEFAULTS.seed, show_default=True, help="Of what is drawn.")
@folder_option
@out_option
def main(
    dataset: Path, library: Path | None, folder: Path | None, out: Path | None, **options: Any
) -> None:
    """Measure a running server."""
    if not dataset.is_dir():
        click.echo(f"{dataset} is not there: skipped", err=True)
        return
    settings = Settings(**options)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="serve-", dir=folder) as made:
        home = Path(made)
        (home / "run").mkdir(mode=0o700)
        os.environ["XDG_RUNTIME_DIR"] = str(home / "run")  # no other server is asked by mistake
        numbers = measure(dataset, library, home, settings)
    printed = tables_of(numbers | {"settings_clients": settings.clients})
    click.echo(printed)
    write_report(
        out,
        "serve",
        settings=settings,
        data={"name": dataset.name, "pictures": numbers["pictures"], "texts": "its captions"},
        numbers=numbers,
        seconds=time.perf_counter() - started,
        printed=printed,
        packages=("fastapi", "uvicorn", "numpy", "faiss-cpu", "onnxruntime"),
    )


if __name__ == "__main__":
    main()
