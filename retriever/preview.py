"""Pictures in a terminal: as pixels where it can show them (kitty, iTerm2, sixel), else as blocks.

How a terminal is told to show a picture, and which one is at hand, is chafa's to know
(hpjansson.org/chafa).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from retriever.errors import MissingExtraError

if TYPE_CHECKING:
    from PIL import Image

Kind = Literal["kitty", "iterm2", "sixel", "blocks"]
KINDS: tuple[Kind, ...] = get_args(Kind)
COLUMNS, ROWS = 40, 12  # characters that a preview takes, at most
CELL = (10, 20)  # pixels of a character, where the terminal does not say


_MODES: dict[Kind, str] = {
    "kitty": "KITTY",
    "iterm2": "ITERM2",
    "sixel": "SIXELS",
    "blocks": "SYMBOLS",
}
_SIGNS: tuple[tuple[Kind, str], ...] = (
    ("kitty", "BEGIN_KITTY_IMMEDIATE_IMAGE_V1"),
    ("iterm2", "BEGIN_ITERM2_IMAGE"),
    ("sixel", "BEGIN_SIXELS"),
)


def render(
    picture: Image.Image,
    kind: Kind | None = None,
    *,
    columns: int = COLUMNS,
    rows: int = ROWS,
) -> bytes:
    """What a terminal shows as the picture: lines of text, or one sequence for all pixels.

    Args:
        picture: RGB.
        kind: how; None: as well as the terminal can, by its environment.
        columns: characters that it may take across.
        rows: and down.

    Raises MissingExtraError if chafa is not installed.
    """
    try:
        import chafa  # type: ignore[import-untyped]
    except ModuleNotFoundError as exc:
        raise MissingExtraError("A preview", "preview") from exc

    info = chafa.TermDb().detect()
    how = kind or _best(chafa, info)
    few_colours = kind is None and not _has(chafa, info, "SET_COLOR_FGBG_DIRECT")
    # What the terminal did not say that it understands, as most of its kind do.
    info.supplement(chafa.TermDb().get_fallback_info())
    config = chafa.CanvasConfig()
    config.canvas_mode = chafa.CanvasMode.CHAFA_CANVAS_MODE_TRUECOLOR
    if how == "blocks" and few_colours:
        config.canvas_mode = chafa.CanvasMode.CHAFA_CANVAS_MODE_INDEXED_240
    config.pixel_mode = getattr(chafa.PixelMode, f"CHAFA_PIXEL_MODE_{_MODES[how]}")
    config.cell_width, config.cell_height = CELL
    config.width, config.height = columns, rows
    config.calc_canvas_geometry(picture.width, picture.height, CELL[0] / CELL[1])
    width, height = (
        min(side, cells * cell)
        for side, cells, cell in zip(picture.size, (config.width, config.height), CELL, strict=True)
    )
    pixels = picture.convert("RGB").resize((max(1, width), max(1, height)))
    canvas = chafa.Canvas(config)
    canvas.draw_all_pixels(
        chafa.PixelType.CHAFA_PIXEL_RGB8,
        list(pixels.tobytes()),
        pixels.width,
        pixels.height,
        pixels.width * 3,
    )
    printed: bytes = canvas.print(info)
    return printed


def _best(chafa: Any, info: Any) -> Kind:
    """How the terminal that `info` tells of shows a picture best."""
    return next((kind for kind, sign in _SIGNS if _has(chafa, info, sign)), "blocks")


def _has(chafa: Any, info: Any, sign: str) -> bool:
    return bool(info.have_seq(getattr(chafa.TermSeq, f"CHAFA_TERM_SEQ_{sign}")))
