"""What damaged pictures do to the decoder: thousands of them, each damaged in another way.

    python benchmarks/mutated.py --pictures 10000 --out mutated.json

Small pictures of every format are damaged at random (`tests/mutations.py` says how) and read by the
decoding processes as an index run reads them. Counts those that are read after all and those that
are refused, by reason; exits 1 if one is refused in words that nobody foresaw. Twenty seconds for
10,000 pictures on two cores.
"""

import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import click
from report import format_table, write_report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from mutations import REASONS, Mutant, class_of, mutants, originals

from retriever.errors import PictureError
from retriever.workers import DecodeWorkers

CHUNK = 500  # pictures in the folder at a time


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of the benchmark."""

    pictures: int = 10_000
    seconds: float = 60.0  # for one picture
    memory_mb: int = 4096
    target: int = 224
    processes: int = min(4, os.cpu_count() or 1)
    seed: int = 0


DEFAULTS = Settings()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one picture; `reason` is None if it was read."""

    number: int
    mutant: Mutant
    reason: str | None
    seconds: float

    @property
    def word(self) -> str:
        """ "read", a key of REASONS, or "unforeseen"."""
        return "read" if self.reason is None else class_of(self.reason) or "unforeseen"


def read_all(settings: Settings, folder: Path) -> Iterator[Outcome]:
    """The outcomes in the order of the pictures, which pass through `folder`."""
    numbered = enumerate(mutants(settings.pictures, settings.seed))
    with (
        DecodeWorkers(
            settings.processes, seconds=settings.seconds, memory_bytes=settings.memory_mb << 20
        ) as workers,
        ThreadPoolExecutor(settings.processes) as threads,
    ):

        def read(numbered: tuple[int, Mutant]) -> Outcome:
            number, mutant = numbered
            path = folder / f"{number}-{mutant.original}"
            path.write_bytes(mutant.content)
            begun = time.perf_counter()
            reason = None
            try:
                decoded = workers.read(path, target=settings.target)
                assert decoded.image.mode == "RGB"
            except PictureError as exc:
                reason = str(exc).removeprefix(f"{path}: ")
            seconds = time.perf_counter() - begun
            path.unlink()
            return Outcome(number, mutant, reason, seconds)

        while chunk := list(islice(numbered, CHUNK)):
            yield from threads.map(read, chunk)


def count(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Outcomes by word, in all and by format, and the pictures worth a look."""
    outcomes = list(outcomes)
    formats = sorted({Path(name).suffix for name in originals()})
    words = ["read", *REASONS, "unforeseen"]
    slowest = max(outcomes, key=lambda one: one.seconds)
    return {
        "pictures": len(outcomes),
        **_by_word(outcomes, words),
        "slowest_s": round(slowest.seconds, 3),
        "slowest": _described(slowest),
        "by_format": {
            suffix: _by_word(
                (one for one in outcomes if one.mutant.original.endswith(suffix)), words
            )
            for suffix in formats
        },
        "to_look_at": [
            {**_described(one), "reason": one.reason}
            for one in outcomes
            if one.word in ("crashed", "late", "memory", "unforeseen")
        ],
    }


def _by_word(outcomes: Iterable[Outcome], words: list[str]) -> dict[str, int]:
    found = Counter(one.word for one in outcomes)
    return {word: found[word] for word in words}


def _described(one: Outcome) -> dict[str, Any]:
    return {
        "number": one.number,
        "original": one.mutant.original,
        "changes": list(one.mutant.changes),
        "bytes": len(one.mutant.content),
    }


@click.command()
@click.option("--pictures", default=DEFAULTS.pictures, show_default=True, help="How many.")
@click.option("--seed", default=DEFAULTS.seed, show_default=True, help="Of what is done to them.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the numbers as JSON.")
def main(pictures: int, seed: int, out: Path | None) -> None:
    """Read thousands of damaged pictures and show what became of them."""
    settings = Settings(pictures=pictures, seed=seed)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        numbers = count(read_all(settings, Path(folder)))
    header = ["format", "read", *REASONS, "unforeseen"]
    rows = [[suffix, *map(str, row.values())] for suffix, row in numbers["by_format"].items()]
    rows.append(["all", *(str(numbers[word]) for word in header[1:])])
    printed = f"{format_table(header, rows)}\n\nslowest: {numbers['slowest_s']} s"
    click.echo(printed)
    data = {
        "name": "mutated pictures",
        "originals": len(originals()),
        "bytes": sum(map(len, originals().values())),
    }
    seconds = time.perf_counter() - begun
    write_report(
        out,
        "mutated",
        settings=settings,
        data=data,
        numbers=numbers,
        printed=printed,
        seconds=seconds,
    )
    if numbers["unforeseen"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
