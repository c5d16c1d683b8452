"""Answers to look at: a grid of thumbnails for a notebook, a contact sheet as one HTML file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from retriever.errors import PictureError, printable

if TYPE_CHECKING:
    from PIL import Image

    from retriever.search import Answer, Hit

SIDE = 320  # pixels of a thumbnail's longer side
QUALITY = 82
_TEMPLATE = Path(__file__).parent / "templates" / "contact_sheet.html"
# In the grid itself: a notebook keeps no style sheet of ours.
_GRID = (
    "display:grid;grid-template-columns:repeat(auto-fill,minmax(160px,1fr));gap:12px;"
    "max-width:1100px;font:13px/1.4 system-ui,sans-serif"
)
_THUMBNAIL = "width:100%;aspect-ratio:4/3;object-fit:cover;border-radius:6px"


def small_jpeg(picture: Path | Image.Image, side: int, *, progressive: bool = False) -> bytes:
    """A picture as JPEG, at most `side` pixels on its longer side; raises PictureError."""
    from PIL import Image

    if isinstance(picture, Path):
        from retriever.data import read_image

        picture = read_image(picture, target=side).image
    small = picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY, optimize=True, progressive=progressive)
    return buffer.getvalue()


def data_uri(path: Path) -> str:
    """A small JPEG of a picture that a page holds in itself; raises PictureError."""
    return f"data:image/jpeg;base64,{base64.b64encode(small_jpeg(path, SIDE)).decode('ascii')}"


# ── a notebook ───────────────────────────────────────────────────────────────────────────────────


def grid(hits: Sequence[Hit], message: str | None = None) -> str:
    """Hits as HTML: thumbnails with captions and scores, after a message if there is one.

    A picture that cannot be read any more is named instead.
    """
    told = f"<p><em>{html.escape(message)}</em></p>" if message else ""
    return f'{told}<div style="{_GRID}">{"".join(_cell(hit) for hit in hits)}</div>'


def _cell(hit: Hit) -> str:
    caption = html.escape(hit.caption or printable(hit.path.name))
    try:
        shown = f'<img src="{data_uri(hit.path)}" alt="{caption}" style="{_THUMBNAIL}">'
    except PictureError as error:
        shown = f"<em>{html.escape(str(error))}</em>"
    sure = "" if hit.confidence is None else f" · {100 * hit.confidence:.0f} %"
    return (
        f'<figure style="margin:0" title="{html.escape(printable(hit.path))}">{shown}'
        f'<figcaption dir="auto"><b>{hit.rank}</b> · {hit.score:.3f}{sure}<br>{caption}'
        "</figcaption></figure>"
    )


# ── a file ───────────────────────────────────────────────────────────────────────────────────────


def page(title: str, lead: str, sections: Sequence[str], credit: str = "") -> str:
    """An HTML page that holds all it shows; `lead` and `credit` are plain text, sections HTML."""
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        lead=html.escape(lead),
        sections="\n".join(sections),
        credit=html.escape(credit),
    )


def section(heading: str, body: str) -> str:
    """A part of a page: a heading, plain text, above HTML."""
    return f"<section><h2>{html.escape(heading)}</h2>{body}</section>"


def figure(path: Path, caption: str, *, score: float | None = None) -> str:
    """A picture with its caption, its file's name and a score; raises PictureError."""
    name, text = html.escape(printable(path.name)), html.escape(caption)
    shown = bar(score) if score is not None else ""
    return (
        f'<figure><img src="{data_uri(path)}" alt="{text}" loading="lazy">'
        f"<figcaption>{shown}<span>{text}</span><small>{name}</small></figcaption></figure>"
    )


def bar(score: float) -> str:
    """A score as a number and a bar."""
    return (
        f'<b class="score" title="cosine between query and answer">{score:.3f}'
        f'<i style="width:{100 * min(max(score, 0.0), 1.0):.0f}%"></i></b>'
    )


def answer_sheet(question: str, answer: Answer) -> str:
    """A page with all pictures of an answer; one that cannot be read any more is named."""
    cards = []
    for hit in answer:
        try:
            cards.append(figure(hit.path, hit.caption or "", score=hit.score))
        except PictureError as error:
            cards.append(f"<figure><figcaption>{html.escape(str(error))}</figcaption></figure>")
    notes = (*answer.notes, answer.message)
    told = "".join(f"<p>{html.escape(note)}</p>" for note in notes if note)
    body = f'{told}<div class="cards all">{"".join(cards)}</div>'
    count = f"{len(answer)} picture{'' if len(answer) == 1 else 's'}"
    return page(question, f"{count} found by {answer.mode}.", [section(question, body)])
