"""What `search` and `caption` print: made here or by a running server, the same either way."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from indexes.files import absolute
from retriever.errors import plain, printable

if TYPE_CHECKING:
    from retriever.asking import Query
    from retriever.channels import Mode
    from retriever.explain import Explanation
    from retriever.library import Library
    from retriever.search import CaptionHit, Hit

Format = Literal["lines", "json", "paths", "null"]


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked on the command line.

    texts, images, without: as in `retriever.asking.Query`, files by their absolute paths; notes are
    its too. captions: those are wanted, not pictures. library: as it was called, for what is said.
    """

    library: str
    texts: tuple[tuple[str, float], ...] = ()
    images: tuple[tuple[str, float], ...] = ()
    without: tuple[tuple[Literal["text", "file"], str], ...] = ()
    notes: tuple[str, ...] = ()
    captions: bool = False
    where: str | None = None
    mode: Mode | None = None
    k: int = 10
    exact: bool = False
    all: bool = False
    min_confidence: float | None = None
    explain: bool = False
    format: Format = "lines"

    @classmethod
    def of(cls, query: Query, library: Path, **more: Any) -> Request:
        """The same query, with files named so that they are found from any folder."""
        return cls(
            library=os.fspath(library),
            texts=query.texts,
            images=tuple((_absolute(one), weight) for one, weight in query.images),
            without=tuple(
                ("file", _absolute(one)) if isinstance(one, Path) else ("text", one)
                for one in query.without
            ),
            notes=query.notes,
            **more,
        )

    def as_json(self) -> dict[str, Any]:
        """What `from_json` makes a request of again."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Request:
        """A request that came as JSON; raises TypeError for what is none."""
        several = ("texts", "images", "without", "notes")
        given: dict[str, Any] = {
            name: tuple(tuple(one) if isinstance(one, list) else one for one in value)
            if name in several
            else value
            for name, value in record.items()
        }
        return cls(**given)

    @property
    def query(self) -> Query:
        """The query itself."""
        from retriever.asking import Query

        return Query(
            texts=self.texts,
            images=tuple((Path(one), weight) for one, weight in self.images),
            without=tuple(Path(one) if kind == "file" else one for kind, one in self.without),
            notes=self.notes,
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """What is printed: lines on stdout, or raw bytes there, and sentences on stderr before them.

    groups: the lines of each answer. empty: said instead of answers.
    """

    groups: tuple[tuple[str, ...], ...] = ()
    raw: bytes = b""
    told: tuple[str, ...] = ()
    empty: str | None = None

    def as_json(self) -> dict[str, Any]:
        """What `from_json` makes a reply of again."""
        return asdict(self) | {"raw": base64.b64encode(self.raw).decode("ascii")}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Reply:
        """A reply that came as JSON; raises KeyError, TypeError or ValueError for what is none."""
        return cls(
            tuple(tuple(lines) for lines in record["groups"]),
            base64.b64decode(record["raw"]),
            tuple(record["told"]),
            record["empty"],
        )


@dataclass(frozen=True, slots=True)
class Found:
    """A reply and the answer that it tells of."""

    reply: Reply
    hits: Sequence[Hit] | Sequence[CaptionHit] = field(default_factory=tuple)


def reply(library: Library, request: Request) -> Found:
    """What a library answers to a request; raises as `Library.search` and `captions_for` do."""
    told = []
    if count := library.pending:
        name = library.model.name
        told.append(
            f"Warning: {count:,} pictures are not embedded by {name} yet: retriever index --model"
            f" {name}"
        )
    if request.captions:
        [(picture, _)] = request.images
        hits = library.captions_for(
            Path(picture), where=request.where, k=request.k, exact=request.exact
        )
        groups = tuple(_caption_lines(hit, request.format) for hit in hits)
        empty = None if hits else _nothing(request, "captions")
        return Found(Reply(groups, told=tuple(told), empty=empty), hits)
    query = request.query
    answer = library.search(
        query,
        where=request.where,
        mode=request.mode,
        k=request.k,
        exact=request.exact,
        all=request.all,
        min_confidence=request.min_confidence,
    )
    told += answer.notes
    if answer.message:
        told.append(answer.message)
    empty = None
    if not answer and not answer.notes:
        empty = _nothing(request, "pictures")
    if request.format in ("paths", "null"):
        # The very bytes, for the next program.
        end = b"\0" if request.format == "null" else b"\n"
        raw = b"".join(os.fsencode(hit.path) + end for hit in answer)
        return Found(Reply(raw=raw, told=tuple(told), empty=empty), answer)
    reasons: Sequence[Explanation | None] = [None] * len(answer)
    if request.explain:
        reasons = library.explain(answer, query, answer.mode)
    groups = tuple(
        _lines(hit, reason, request.format) for hit, reason in zip(answer, reasons, strict=True)
    )
    return Found(Reply(groups, told=tuple(told), empty=empty), answer)


def _absolute(picture: object) -> str:
    assert isinstance(picture, Path), "the command line names files"
    return os.fspath(absolute(picture))


def _lines(hit: Hit, reason: Explanation | None, form: Format) -> tuple[str, ...]:
    if form == "json":
        record = {
            "rank": hit.rank,
            "score": round(hit.score, 6),
            "confidence": None if hit.confidence is None else round(hit.confidence, 4),
            "path": str(hit.path),
            "caption": hit.caption,
            "id": hit.item_id,
            "duplicates": hit.duplicates,
        }
        # ASCII only, so that names that are no UTF-8 pass any pipe and come back as they were.
        return (json.dumps(record | ({"explain": reason.as_json()} if reason else {})),)
    sure = "" if hit.confidence is None else f"  {percent(hit.confidence):>5}"
    more = f"  (and {hit.duplicates} like it)" if hit.duplicates else ""
    lines = [f"{hit.rank:>3}{sure}  {hit.score:.3f}  {printable(hit.path)}{more}"]
    indent = " " * (12 + len(sure))
    if hit.caption:
        lines.append(f"{indent}{plain(hit.caption)}")
    return (*lines, *(f"{indent}· {plain(line)}" for line in (reason.lines() if reason else ())))


def _caption_lines(hit: CaptionHit, form: Format) -> tuple[str, ...]:
    if form == "json":
        record = {
            "rank": hit.rank,
            "score": round(hit.score, 6),
            "caption": hit.caption,
            "path": str(hit.path),
            "id": hit.item_id,
        }
        return (json.dumps(record),)
    return (
        f"{hit.rank:>3}  {hit.score:.3f}  {plain(hit.caption)}",
        f"            {printable(hit.path)}",
    )


def percent(share: float) -> str:
    """A confidence for people, who should not be told that anything is certain."""
    whole = round(100 * share)
    return "<1 %" if whole < 1 else ">99 %" if whole > 99 else f"{whole} %"


def _nothing(request: Request, what: str) -> str:
    """Why there is no answer, and the way out."""
    if request.min_confidence:
        return f"No answer is as sure as {100 * request.min_confidence:.0f} %."
    if request.where or request.without:
        return f"No {what} in {printable(request.library)} fulfil all that was asked for."
    way_out = "`retriever index FOLDER` takes them in"
    if what == "captions":
        way_out = "`retriever index FOLDER --captions FILE` names them"
    return f"There are no {what} in the library: {way_out}."
