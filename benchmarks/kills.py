"""What SIGKILL does to a library: hundreds of indexing processes killed at random instants.

    python benchmarks/kills.py --kills 500 --out kills.json

Runs the harness of `tests/kills.py` in several processes (it says what is done to a library, how
its processes die and what is checked after each kill) and counts what was lost, found twice, wrong,
not clean or left over; exits 1 if anything was. About a second for each kill and process.
"""

import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from report import format_table, write_report

# This file has the harness's name, so that the tests' folder must come first.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import kills as harness
from kills import STEPS, WORDS, Trial

import indexes.catalogue
import indexes.vectors  # noqa: F401  (their packages are among the versions of the record)


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of the benchmark."""

    kills: int = 500
    hosts: int = 2  # processes at a time
    batch_size: int = harness.BATCH_SIZE  # pictures in a transaction
    killed_again: float = harness.AGAIN  # share of the trials
    seed: int = 0


DEFAULTS = Settings()


def count(trials: Sequence[Trial]) -> dict[str, Any]:
    """Kills by kind, step and place, and faults by word."""
    kills = [kill for trial in trials for kill in trial.kills]
    faults = Counter(word for trial in trials for word, _ in trial.faults)
    places = Counter(kill.place.split(":")[0] for kill in kills if kill.place)
    by_step = {
        step: {
            kind: sum((kill.step, kill.kind) == (step, kind) for kill in kills)
            for kind in ("clock", "event")
        }
        for step in ("", *STEPS, "end")
    }
    return {
        "trials": len(trials),
        "kills": len(kills),
        "kills_of_a_run_after_a_kill": sum(kill.number > 1 for kill in kills),
        **{word: faults[word] for word in WORDS},
        "repairs": sum(trial.repairs for trial in trials),
        "kills_by_step": {step or "start": n for step, n in by_step.items() if any(n.values())},
        "places": len(places),
        "kills_by_place": dict(places.most_common()),
        "faults": [list(fault) for trial in trials for fault in trial.faults],
    }


@click.command()
@click.option("--kills", default=DEFAULTS.kills, show_default=True, help="How many, at least.")
@click.option("--hosts", default=DEFAULTS.hosts, show_default=True, help="Processes at a time.")
@click.option("--seed", default=DEFAULTS.seed, show_default=True, help="Of the instants drawn.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where the libraries are made; the system's folder for temporary files if not given.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Also write the numbers as JSON.")
def main(kills: int, hosts: int, seed: int, folder: Path | None, out: Path | None) -> None:
    """Kill indexing processes at random instants and count what that harms."""
    settings = Settings(kills=kills, hosts=hosts, seed=seed)
    started = time.perf_counter()
    done: list[Trial] = []

    def report(trial: Trial) -> None:
        done.append(trial)
        for word, what in trial.faults:
            click.echo(f"{word}: {what}", err=True)
        if len(done) % 25 == 0:
            n = sum(len(one.kills) for one in done)
            click.echo(f"{n} kills, {time.perf_counter() - started:.0f} s", err=True)

    with tempfile.TemporaryDirectory(dir=folder) as made:
        trials = harness.run_hosts(Path(made), kills, seed, hosts=hosts, report=report)
        stage = Path(made) / "host-0" / "stage" / "before"
        pictures = sum(path.suffix in (".png", ".jpg") for path in stage.rglob("*"))
    numbers = count(trials)
    header = ["killed in", "clock", "event"]
    rows = [[step, *map(str, n.values())] for step, n in numbers["kills_by_step"].items()]
    found = ", ".join(f"{word} {numbers[word]}" for word in (*WORDS, "repairs"))
    printed = (
        f"{format_table(header, rows)}\n\n"
        f"{numbers['kills']} kills in {numbers['trials']} trials: {found}"
    )
    click.echo(printed)
    write_report(
        out,
        "kills",
        settings=settings,
        data={
            "name": "the scripted life of a library, see tests/kills.py",
            "pictures": pictures,
            "steps": list(STEPS),
            "sqlite": sqlite3.sqlite_version,
        },
        numbers=numbers,
        printed=printed,
        seconds=time.perf_counter() - started,
    )
    if numbers["faults"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
