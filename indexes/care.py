"""The care of a store: verify what is there, mend it, copy it.

What can be believed: SQLite checks the structure of its file, not the bytes of a vector; a FAISS
file is whole if its checksum is the recorded one. So where the two disagree on a vector that both
hold, the FAISS file is right.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from indexes.approximate import ApproximateIndex
from indexes.catalogue import Catalogue
from indexes.errors import (
    StoreDamagedError,
    StoreExistsError,
    StoreReadOnlyError,
)
from indexes.files import CATALOGUE, REPLACEMENT, find_catalogue, sync
from indexes.heads import Head, fingerprint
from indexes.locks import locked
from indexes.records import KINDS, STORED_TOLERANCE, Derivation, Kind, ModelSpec
from indexes.salvage import restore_info, salvage
from indexes.snapshot import MODEL_LOST
from indexes.vectors import IndexFileError, VectorIndex
from indexes.writer import Writer

if TYPE_CHECKING:
    from indexes.catalogue import Transaction
    from indexes.snapshot import Reader, Snapshot

SAVED = "catalogue.saved.sqlite"
_COPIED = re.compile(
    r"catalogue\.sqlite(-wal|-shm|\.tmp)?|(image|caption)-\d+-\d+(-approximate)?\.faiss(\.tmp)?"
)
LOST = "its embedding was lost; index its folder again"
UNTUNED = "`retriever repair` goes back to what was there before; then `retriever tune` tunes anew"
# A vector that was made of another one, both rounded to float16, has at least this cosine with what
# is made of it again.
FOLLOWS = 0.999


def verify(path: Path, catalogue: Reader) -> list[str]:
    """Problems found by reading all of a store; empty means clean.

    Checks SQLite's integrity, foreign keys, that exactly what should have an embedding has one,
    that embeddings are finite and of unit length, and that the FAISS files of every model have the
    recorded generation, size and checksum and hold the very vectors of the catalogue, and that
    approximate indexes are whole.
    """
    found: list[str] = []
    try:
        with catalogue.read() as state:
            found += state.problems()
            found += state.word_problems()
            for model_id, model in state.models().items():
                for kind in KINDS:
                    found += _verify_kind(path, state.of_model(model_id), model, kind)
                    found += _verify_approximate(path, state.of_model(model_id), model, kind)
                found += _verify_derived(state, model_id, model)
    except StoreDamagedError as error:
        found.append(str(error))
    return found


def _verify_approximate(path: Path, rows: Snapshot, model: ModelSpec, kind: Kind) -> list[str]:
    built = rows.approximate_file(kind)
    if built is None:
        return []
    file = built.file
    generation, change = rows.version()
    if file.generation > generation or file.change > change:
        return [f"{file.name} is of a later generation than the catalogue"]
    try:
        ApproximateIndex.load(path / file.name, dim=model.dim, rows=file.rows, stamp=file.stamp)
    except IndexFileError as error:
        return [f"{error}; searches are exact until `retriever optimize` makes it again"]
    return []


def _verify_kind(path: Path, rows: Snapshot, model: ModelSpec, kind: Kind) -> list[str]:
    found: list[str] = []
    generation, change = rows.version()
    file, index = rows.index_file(kind), None
    if file is not None:
        if file.generation > generation or file.change > change:
            found.append(f"{file.name} is of a later generation than the catalogue")
        try:
            index = VectorIndex.load(
                path / file.name, dim=model.dim, rows=file.rows, stamp=file.stamp
            )
            index.check()
        except IndexFileError as error:
            index = None
            found.append(f"{error}; `retriever repair` makes it again")
    after = file.change if file is not None else -1
    beside = rows.ids_after(kind, after)
    missing = 0
    no_unit: list[int] = []
    others: list[int] = []
    expected = np.zeros(len(index) if index is not None else 0, dtype=np.bool_)
    for ids, stored in rows.vectors(kind):
        if stored.shape[1] != model.dim:
            return [*found, f"{kind} embeddings have {stored.shape[1]} dimensions"]
        no_unit += ids[~_is_unit(stored)].tolist()
        if index is None:
            continue
        in_file = ~np.isin(ids, beside)
        positions, present = index.find(ids[in_file])
        missing += int((~present).sum())
        expected[positions] = True
        differs = (index.vectors(positions) != stored[in_file][present]).any(axis=1)
        others += index.ids[positions[differs]].tolist()
    for ids_, words in (
        (no_unit, f"the {kind} embedding of {{}} is not a unit vector"),
        (others, f"the FAISS file has another {kind} vector for {{}}"),
    ):
        if ids_:
            more = f", and so for {len(ids_) - 1:,} more" if len(ids_) > 1 else ""
            found.append(words.format(ids_[0]) + more)
    if index is not None:
        expected[index.find(np.concatenate([rows.removed(kind), beside]))[0]] = True
        extra = int((~expected).sum())
        if missing or extra:
            found.append(f"the FAISS file of {kind}s lacks {missing} rows and has {extra} more")
    return found


def _sound_head(rows: Snapshot, model: ModelSpec) -> Head | None:
    """What a derived model is made by, if it is whole."""
    derivation = rows.derivation()
    if derivation is None:
        return None
    with suppress(ValueError):
        head = Head.unpack(derivation.head)
        whole = fingerprint(derivation.base.fingerprint, derivation.head) == model.fingerprint
        if whole and (head.dim, head.made) == (derivation.base.dim, model.dim):
            return head
    return None


def _verify_derived(state: Snapshot, model_id: int, model: ModelSpec) -> list[str]:
    """What is wrong with a model whose embeddings follow from another's."""
    rows = state.of_model(model_id)
    derivation = rows.derivation()
    if derivation is None:
        return []
    head = _sound_head(rows, model)
    if head is None:
        return [f"what made {model.name} of {derivation.base.name} is damaged: {UNTUNED}"]
    found = []
    for kind in KINDS:
        wrong, lacking = _astray(state, rows, derivation, head, kind)
        if count := len(wrong) + len(lacking):
            found.append(
                f"{count:,} {kind} vectors of {model.name} do not follow from those of "
                f"{derivation.base.name}: `retriever repair` makes them again"
            )
    return found


def _astray(
    state: Snapshot, rows: Snapshot, derivation: Derivation, head: Head, kind: Kind
) -> tuple[list[int], list[int]]:
    """Ids of vectors of a derived model that its base says otherwise of, and of those it lacks."""
    base = state.model(derivation.base.fingerprint)
    assert base is not None
    wrong: list[int] = []
    lacking: list[int] = []
    for ids, stored in state.of_model(base[0]).vectors(kind):
        theirs = rows.embeddings(kind, ids.tolist())
        is_there = np.array([one in theirs for one in ids.tolist()], dtype=np.bool_)
        lacking += ids[~is_there].tolist()
        kept = [theirs[one] for one in ids[is_there].tolist()]
        if kept and stored.shape[1] == head.dim and {len(one) for one in kept} == {head.made}:
            cosines = (head(kind, stored[is_there]) * np.stack(kept)).sum(axis=1)
            wrong += ids[is_there][~(cosines >= FOLLOWS)].tolist()
    return wrong, lacking


def backup(path: Path, catalogue: Reader, destination: Path) -> None:
    """Copy the store at `path`, as it is at one moment, into a new folder; see `Store.backup`."""
    if destination.is_relative_to(path):
        raise StoreExistsError(f"{destination} is inside the library itself: name another place")
    if destination.exists():
        raise StoreExistsError(f"{destination} exists already: name a new folder for the copy")
    beside = destination.with_name(destination.name + ".partial")
    is_ours = False
    try:
        if beside.exists():  # of a copy that was cut off, and of nothing else
            if not all(_COPIED.fullmatch(one.name) for one in beside.iterdir()):
                raise StoreExistsError(f"{beside} is in the way, and no backup of ours made it")
            shutil.rmtree(beside)
        beside.mkdir(parents=True)
        is_ours = True
        catalogue.copy(beside / CATALOGUE)
        copied = Catalogue(beside / CATALOGUE)
        try:
            with copied.read() as rows:
                names = rows.index_file_names()
            for name in names:
                # A writer may have replaced it since; it is then made again from the copy.
                with suppress(FileNotFoundError):
                    if (path / name).is_file():
                        shutil.copyfile(path / name, beside / name)
                        sync(beside / name)
            copied.use_model()
            _drop_spoilt_files(beside, copied)
            _drop_useless(beside, copied)
            Writer(beside, copied, 0).finish(all_models=True)
        finally:
            copied.close()
        beside.rename(destination)
        sync(destination.parent)
    except (OSError, StoreReadOnlyError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is the disk full?"
        raise StoreReadOnlyError(
            f"{destination} could not be written ({reason}); the library itself is as it was"
        ) from error
    finally:
        if is_ours:
            shutil.rmtree(beside, ignore_errors=True)  # no half copy, as of Ctrl-C, fills the disk


def _drop_spoilt_files(path: Path, catalogue: Catalogue) -> None:
    with catalogue.read() as state:
        for model_id, model in state.models().items():
            for kind in KINDS:
                file = state.of_model(model_id).index_file(kind)
                if file is not None:
                    where = path / file.name
                    try:
                        VectorIndex.load(
                            where, dim=model.dim, rows=file.rows, stamp=file.stamp
                        ).check()
                    except IndexFileError:
                        where.unlink(missing_ok=True)


def repair(path: Path) -> list[str]:
    """Mend the store at `path` as far as that can be done, and say what was done.

    A catalogue that SQLite finds damaged is replaced by what can be read of it, and kept beside
    the new one. Vectors are taken from a FAISS file that is provably whole; a picture whose vector
    is lost is marked, so that the next run of `index` over its folder reads it again.

    Raises StoreNotFoundError, StoreTooNewError, StoreLockedError, StoreReadOnlyError, and
    StoreDamagedError if nothing of the catalogue can be read.
    """
    if not (path / REPLACEMENT).exists():
        find_catalogue(path)
    with locked(path):
        done = list(_mend_database(path))
        catalogue = Catalogue(path / CATALOGUE)
        try:
            if catalogue.pending_migrations():
                catalogue.migrate()
            if catalogue.use_model() is None:
                restore_info(path / CATALOGUE)
                done.append("the library no longer said which model is its default: the first is")
            if catalogue.use_model() is None:
                raise StoreDamagedError(f"{path} {MODEL_LOST}")
            done += _mend_rows(path, catalogue)
            done += _mend_files(path, catalogue)
        finally:
            catalogue.close()
    return done


def _mend_database(path: Path) -> Iterator[str]:
    """Replaces a database that SQLite finds damaged by what can be read of it."""
    file, saved, replacement = path / CATALOGUE, path / SAVED, path / REPLACEMENT
    kept = file.with_name(f"catalogue.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S}.sqlite")
    if not replacement.exists():
        if _is_sound(file):
            saved.unlink(missing_ok=True)  # of a repair that was cut off
            return
        yield from salvage(file, saved)
        for suffix in ("", "-wal"):
            with suppress(FileNotFoundError):
                shutil.copyfile(f"{file}{suffix}", f"{kept}{suffix}")
                sync(Path(f"{kept}{suffix}"))
        # From here on nothing else opens the store, and a repair that is killed is finished by the
        # next: without its log, the old database may look sound, and is older.
        saved.replace(replacement)
        sync(path)
    # The log of the old database would be played into the new one.
    for suffix in ("-wal", "-shm"):
        file.with_name(file.name + suffix).unlink(missing_ok=True)
    replacement.replace(file)
    sync(path)
    kept = max(path.glob("catalogue.damaged-*.sqlite"), default=kept)
    yield f"the catalogue was damaged: what could be read is the new one, the old is {kept.name}"


def _is_sound(file: Path) -> bool:
    catalogue = Catalogue(file)
    try:
        if catalogue.pending_migrations():
            catalogue.migrate()
        with catalogue.read() as rows:
            return not rows.structure_problems() and rows.can_mend_words()
    except StoreDamagedError:
        return False
    finally:
        catalogue.close()


def _mend_rows(path: Path, catalogue: Catalogue) -> Iterator[str]:
    with catalogue.write() as state:
        if orphans := state.remove_orphans():
            yield f"{orphans} rows that belong to nothing were removed"
        if wrong := state.word_problems():
            state.make_words()
            yield f"the words were made anew: {wrong[0]}"
        for model_id, model in state.models().items():
            rows = state.of_model(model_id)
            for kind in KINDS:
                yield from _mend_vectors(path, rows, model, kind)
        yield from _mend_derived(state)
        for kind in KINDS:
            if extra := {item_id for item_id, _ in state.at_odds(kind, "failed", True)}:
                state.forget_contents(extra, "was embedded and yet had failed; index it again")
                yield f"{len(extra)} failed pictures had embeddings, which were removed"
            if bare := {item_id for item_id, _ in state.at_odds(kind, "ok", False)}:
                whose = "an embedding" if kind == "image" else "the embedding of a caption"
                yield f"{len(bare)} pictures have lost {whose}: `retriever index` makes it again"
                if kind == "image":
                    state.forget_contents(bare, LOST)


def _mend_vectors(path: Path, rows: Transaction, model: ModelSpec, kind: Kind) -> Iterator[str]:
    wrong = rows.misfits(kind, model.dim, _is_unit)
    rows.replace_embeddings(kind, wrong, [])
    healed: list[tuple[int, NDArray[np.float16]]] = []
    file = rows.index_file(kind)
    with suppress(IndexFileError):
        if file is not None:
            index = VectorIndex.load(
                path / file.name, dim=model.dim, rows=file.rows, stamp=file.stamp
            )
            index.check()
            # Only what has not changed since the file was written is the same in both.
            beside = rows.ids_after(kind, file.change)
            for ids, stored in rows.vectors(kind):
                positions, present = index.find(ids)
                theirs = index.vectors(positions).astype(np.float16)
                differs = (theirs != stored[present]).any(axis=1)
                differs &= ~np.isin(ids[present], beside)
                healed += zip(ids[present][differs].tolist(), theirs[differs], strict=True)
            # What was changed or removed since has a tombstone.
            wanted = {*wrong, *rows.lacking(kind)} - set(rows.removed(kind).tolist())
            positions, _ = index.find(np.array(sorted(wanted), dtype=np.int64))
            theirs = index.vectors(positions).astype(np.float16)
            healed += zip(index.ids[positions].tolist(), theirs, strict=True)
    known = {owner_id for owner_id, _ in healed}
    if file is not None and healed:
        rows.replace_embeddings(kind, known, healed)
        yield f"{len(healed)} {kind} vectors of {model.name} were taken from {file.name}"
    if lost := len(wrong - known):
        yield f"{lost} {kind} vectors of {model.name} were damaged and were removed"


def _mend_derived(state: Transaction) -> Iterator[str]:
    """Gives derived models what their bases have, and forgets those that cannot be derived."""
    default = state.model()
    for model_id, model in state.models().items():
        rows = state.of_model(model_id)
        derivation = rows.derivation()
        if derivation is None:
            continue
        base = state.model(derivation.base.fingerprint)
        assert base is not None
        head = _sound_head(rows, model)
        if head is None:
            if default is not None and default[0] == model_id:
                state.set_default_model(base[0])
            state.drop_model(model_id)
            yield (
                f"what made {model.name} was damaged: the library is as it was with"
                f" {derivation.base.name}, and `retriever tune` tunes it anew"
            )
            continue
        for kind in KINDS:
            wrong, _ = _astray(state, rows, derivation, head, kind)
            rows.replace_embeddings(kind, wrong, [])
            if count := sum(state.of_model(base[0]).derive(kind)):
                yield f"{count:,} {kind} vectors of {model.name} were made again"


def _mend_files(path: Path, catalogue: Catalogue) -> Iterator[str]:
    with catalogue.read() as state:
        broken = [
            problem
            for model_id, model in state.models().items()
            for kind in KINDS
            for problem in _verify_kind(path, state.of_model(model_id), model, kind)
        ]
    yield from _drop_useless(path, catalogue)
    writer = Writer(path, catalogue, 0)
    if broken:
        writer.finish(anew=KINDS, all_models=True)
        yield f"the FAISS files were made anew: {broken[0]}"
    else:
        writer.finish(all_models=True)


def _drop_useless(path: Path, catalogue: Catalogue) -> list[str]:
    """Forget approximate indexes that cannot be used, and say which."""
    with catalogue.write() as state:
        found = [
            (model_id, kind, problem)
            for model_id, model in state.models().items()
            for kind in KINDS
            for problem in _verify_approximate(path, state.of_model(model_id), model, kind)
        ]
        for model_id, kind, _ in found:
            state.record_approximate(model_id, kind, None)
    return [f"an approximate index is no longer used: {problem}" for _, _, problem in found]


def _is_unit(vectors: NDArray[np.float16]) -> NDArray[np.bool_]:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    return np.asarray(np.abs(lengths - 1) <= STORED_TOLERANCE)  # False for NaN too
