"""What every benchmark script shares: a table for people, and one JSON record that can be repeated.

A number without its data, settings, seed, machine and versions is no result, so `write_report` asks
for the first three and adds the others itself.
"""

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retriever.evaluation import environment


def write_report(
    path: Path | None,
    benchmark: str,
    *,
    settings: Any,
    data: Mapping[str, Any],
    numbers: Any,
    seconds: float,
) -> dict[str, Any]:
    """The record of one run, written to `path` as indented JSON unless that is None.

    Args:
        path: the file; its folder is made.
        benchmark: name of the script.
        settings: the frozen dataclass that holds every setting, the seed among them.
        data: what was measured on: name, counts, hashes.
        numbers: the results.
        seconds: wall clock of the whole run.
    """
    record = {
        "benchmark": benchmark,
        "command": " ".join(["python", *sys.argv]),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "settings": asdict(settings),
        "data": dict(data),
        "numbers": numbers,
        "seconds": round(seconds, 1),
        "environment": environment(),
    }
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    return record


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column to the left and the others to the right, padded to align."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def joined(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([first, *others])} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([joined(lines[0]), joined(rule), *(joined(line) for line in lines[1:])])
