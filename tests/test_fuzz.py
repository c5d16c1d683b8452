"""What `fuzz/fuzz.py` looks for, on a few inputs that are always the same."""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from fuzz.targets import Captions, Stores, Vectors


def mutated(seeds: Iterable[bytes], *, times: int) -> Iterator[bytes]:
    """Each seed as it is, and with one byte changed, some bytes cut out or doubled."""
    chance = random.Random(0)
    for seed in seeds:
        yield seed
        for _ in range(times):
            start = chance.randrange(len(seed) + 1)
            end = chance.randrange(start, len(seed) + 1)
            middle = [bytes([chance.randrange(256)]), b"", seed[start:end] * 2]
            yield seed[:start] + chance.choice(middle) + seed[end:]


def test_whatever_a_captions_file_holds_is_stored_or_refused(tmp_path: Path) -> None:
    target = Captions(tmp_path)
    for data in mutated(target.seeds(), times=10):
        target.check(data)


def test_only_the_recorded_bytes_are_believed_to_be_an_index(tmp_path: Path) -> None:
    target = Vectors(tmp_path)
    for data in mutated(target.seeds(), times=20):
        target.check(data)


@pytest.mark.parametrize("file", [1, 2], ids=["image", "caption"])
def test_an_edited_index_file_is_noticed_and_changes_no_answer(tmp_path: Path, file: int) -> None:
    target = Stores(tmp_path)
    for seed in target.seeds():
        if seed[:1] == bytes([file]):
            target.check(seed)
