"""How fast a folder that has not changed is checked again, and in how much memory.

    python benchmarks/recheck.py --out benchmarks/results/recheck.json

Makes tiny PNG files, no two alike, some with a caption beside them, and indexes them in batches
with an encoder that knows colours only. Then each run of a fresh process checks the folder again:
every picture costs a `stat`, none is opened, captions are read. The memory that 100,000 pictures
add is the slope between two sizes, so the interpreter and its libraries do not count. Ten minutes
and 1 GB of disk.
"""

import json
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from report import format_table, write_report

from indexes.store import ModelSpec, Store
from retriever.ingest import IndexReport, index_folder

COLOURS = [(214, 39, 40), (44, 160, 44), (31, 80, 200), (240, 210, 40), (245, 245, 245)]


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of the benchmark; nothing in it is random."""

    # Pictures, and which share of them has a caption: one in so many.
    folders: tuple[tuple[int, int], ...] = ((25_000, 10), (100_000, 10), (100_000, 1))
    per_folder: int = 1_000
    side: int = 8  # pixels
    batch_size: int = 256
    runs: int = 5  # of the check, each in a fresh process


DEFAULTS = Settings()


class ColourEncoder:
    """Embeds a picture as its mean colour and a text as its length: it costs next to nothing."""

    name = "colour"
    dim = 4
    fingerprint = "colour-1"
    max_text_tokens = 64
    image_size = 8

    def encode_images(self, images: Sequence[Any]) -> NDArray[np.float32]:
        """(n, 4) unit rows."""
        assert all(isinstance(image, Image.Image) for image in images)
        return _unit_rows([np.asarray(image).reshape(-1, 3).mean(axis=0) for image in images])

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, 4) unit rows."""
        return _unit_rows([np.array([len(text), 1, 1]) for text in texts])

    def is_cut(self, texts: Sequence[str]) -> list[bool]:
        """No text is too long for it."""
        return [False] * len(texts)


def _unit_rows(rows: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    with_one = np.array([[*row, 1.0] for row in rows], dtype=np.float32)
    lengths: NDArray[np.float32] = np.linalg.norm(with_one, axis=1, keepdims=True)
    return with_one / lengths


MODEL = ModelSpec(ColourEncoder.name, ColourEncoder.dim, ColourEncoder.fingerprint)


def make_pictures(folder: Path, pictures: int, captioned_every: int, settings: Settings) -> None:
    """Writes that many PNG files, each with a chunk of its own that no decoder reads."""
    side = settings.side
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = [_chunk(b"IDAT", zlib.compress(side * (b"\0" + side * bytes(c)))) for c in COLOURS]
    for number in range(pictures):
        path = folder / f"{number // settings.per_folder:04d}" / f"{number:06d}.png"
        if number % settings.per_folder == 0:
            path.parent.mkdir(parents=True)
        parts = [b"\x89PNG\r\n\x1a\n", _chunk(b"IHDR", header), pixels[number % len(pixels)]]
        own = _chunk(b"nuMb", str(number).encode())
        path.write_bytes(b"".join([*parts, own, _chunk(b"IEND", b"")]))
        if number % captioned_every == 0:
            path.with_suffix(".txt").write_text(f"picture number {number} of a series\n")


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def run_here(library: Path, folder: Path) -> dict[str, float]:
    """One run, measured in the process that calls it, which should have done nothing before."""
    batches = 0

    def count(done: int, total: int) -> None:
        nonlocal batches
        batches += done > 0

    with Store.open(library, MODEL) as store:
        before, cpu, started = peak_mb(), time.process_time(), time.perf_counter()
        report = index_folder(
            store, ColourEncoder, folder, batch_size=Settings().batch_size, progress=count
        )
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    assert report == IndexReport(added=report.added, unchanged=report.unchanged), report
    return {
        "added": report.added,
        "unchanged": report.unchanged,
        "batches": batches,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mb_before": before,
        "peak_mb": peak_mb(),
    }


def peak_mb() -> float:
    """Most memory that this process has held at any time, in 10^6 bytes."""
    # Not `getrusage`: its number is that of the parent, if that had more.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("the system does not tell the peak memory of a process")


def measure(
    home: Path, pictures: int, captioned_every: int, settings: Settings, say: Callable[[str], None]
) -> dict[str, Any]:
    """The first run over a new folder, and the checks after it."""
    folder, library = home / "pictures", home / "recheck.lib"
    make_pictures(folder, pictures, captioned_every, settings)
    Store.create(library, MODEL).close()
    command = [sys.executable, __file__, "--run", str(library), str(folder)]

    def run() -> dict[str, float]:
        found: dict[str, float] = json.loads(subprocess.check_output(command))
        return found

    first = run()
    assert first["added"] == pictures, first
    say(f"{pictures:,} pictures: first run {first['seconds']:.0f} s")
    checks = [run() for _ in range(settings.runs)]
    assert all((one["unchanged"], one["batches"]) == (pictures, 0) for one in checks), checks
    rates = [pictures / check["seconds"] for check in checks]
    return {
        "pictures": pictures,
        "captions": len(range(0, pictures, captioned_every)),
        "first_run": {
            "seconds": round(first["seconds"], 1),
            "cpu_seconds": round(first["cpu_seconds"], 1),
            "batches": first["batches"],
            "pictures_per_second": round(pictures / first["seconds"]),
            "peak_mb": round(first["peak_mb"], 1),
        },
        "check": {
            "pictures_per_second": round(median(rates)),
            "pictures_per_second_runs": [round(rate) for rate in rates],
            "pictures_per_cpu_second": round(
                pictures / median(check["cpu_seconds"] for check in checks)
            ),
            "peak_mb_before": round(max(check["peak_mb_before"] for check in checks), 1),
            "peak_mb": round(max(check["peak_mb"] for check in checks), 1),
        },
    }


def mb_per_100_000(run: str, smaller: dict[str, Any], larger: dict[str, Any]) -> float:
    """Slope of the peak memory of a run between two sizes."""
    grown = larger[run]["peak_mb"] - smaller[run]["peak_mb"]
    return round(float(grown / (larger["pictures"] - smaller["pictures"]) * 100_000), 1)


@click.command()
@click.option(
    "--sizes",
    nargs=2,
    type=click.IntRange(min=10),
    default=(25_000, 100_000),
    show_default=True,
    help="Pictures in the smaller folder and in the larger ones.",
)
@click.option("--runs", default=DEFAULTS.runs, show_default=True, help="Checks of each folder.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the numbers as JSON.")
@click.option("--run", nargs=2, type=click.Path(path_type=Path), hidden=True)
def main(
    sizes: tuple[int, int], runs: int, out: Path | None, run: tuple[Path, Path] | None
) -> None:
    """Index folders of tiny pictures, then check them again and measure that."""
    if run:
        click.echo(json.dumps(run_here(*run)))
        return
    smaller, larger = sizes
    settings = Settings(folders=((smaller, 10), (larger, 10), (larger, 1)), runs=runs)
    started = time.perf_counter()
    found = []
    for pictures, captioned_every in settings.folders:
        with tempfile.TemporaryDirectory(prefix="recheck-") as home:
            found.append(
                measure(
                    Path(home),
                    pictures,
                    captioned_every,
                    settings,
                    lambda line: click.echo(line, err=True),
                )
            )
    growth = {run: mb_per_100_000(run, *found[:2]) for run in ("first_run", "check")}
    numbers = {"folders": found, "mb_per_100_000": growth}
    rows = [
        [
            f"{one['pictures']:,}",
            f"{one['captions']:,}",
            f"{one['first_run']['pictures_per_second']:,}",
            f"{one['first_run']['peak_mb']:.0f}",
            f"{one['check']['pictures_per_second']:,}",
            f"{one['check']['peak_mb_before']:.0f}",
            f"{one['check']['peak_mb']:.0f}",
        ]
        for one in found
    ]
    header = ["pictures", "captions", "first run /s", "MB", "check /s", "MB before", "MB"]
    printed = (
        f"{format_table(header, rows)}\n\n"
        f"100,000 more pictures take {growth['first_run']} MB more in the first run,"
        f" {growth['check']} MB in a check."
    )
    click.echo(printed)
    write_report(
        out,
        "recheck",
        settings=settings,
        data={"name": f"PNG files of {settings.side} × {settings.side} pixels, no two alike"},
        numbers=numbers,
        printed=printed,
        packages=("faiss-cpu", "sqlalchemy"),
        seconds=time.perf_counter() - started,
    )


if __name__ == "__main__":
    main()
