"""A small library of real photographs to try everything on: `build` makes it, `tour` asks it.

The photographs are scikit-image's sample pictures, those that its wheel carries; the captions are
ours. They are copied to a folder with a `captions.jsonl`, as a folder of one's own would be, so
that every other command can be tried on it as well.
"""

import html
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from retriever.errors import MissingExtraError, RetrieverError, UsageError, printable
from retriever.search import NO_MATCH
from retriever.sheets import bar, figure, page, section

if TYPE_CHECKING:
    from retriever.library import Library
    from retriever.search import CaptionHit, Hit

PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "astronaut.png": (
        "An astronaut in an orange space suit smiles at the camera.",
        "A woman sits in front of an American flag and a model of the space shuttle.",
    ),
    "brick.png": ("A wall of bricks.", "Rows of dark bricks with light mortar between them."),
    "camera.png": (
        "A man in a black coat looks through a camera on a tripod.",
        "A photographer at work on a lawn, tall buildings far behind him.",
    ),
    "chelsea.png": ("A tabby cat with green eyes.", "The face of a cat, looking past the camera."),
    "coffee.png": (
        "A cup of coffee on a saucer with a spoon.",
        "An espresso in a red cup on a wooden table.",
    ),
    "coins.png": ("Old coins laid out in rows.", "Two dozen ancient coins on a dark background."),
    "grass.png": ("Grass seen from above.", "A lawn of short, dry grass."),
    "gravel.png": ("Gravel, seen from above.", "Hundreds of small, pale stones on the ground."),
    "hubble_deep_field.jpg": (
        "Countless galaxies in the black of space.",
        "A photograph of the deep sky by a space telescope.",
    ),
    "moon.png": ("Craters on the surface of the moon.", "The grey, dusty ground of the moon."),
    "motorcycle_left.png": (
        "A red motorcycle stands in a garage.",
        "A motorbike in front of shelves full of boxes.",
    ),
    "page.png": ("A printed page of a book.", "Black text on white paper, photographed."),
    "retina.jpg": ("The inside of a human eye.", "Blood vessels on an orange retina."),
    "rocket.jpg": (
        "A rocket on its launch pad in the evening.",
        "A white rocket between steel towers, lit by floodlights.",
    ),
}
# The same motorcycle by the other of two cameras: a picture to ask with that is not in the library.
QUERY_PICTURE = "motorcycle_right.png"
TEXT_QUERIES = (
    "a cat",
    "a red motorcycle",
    "a man taking a photograph",
    "stars in the night sky",
    "two dogs on a beach",  # of which there is none
)
EXPLAINED = "a man taking a photograph"  # whose best answer is shown with its heat map
K = 4
_LEAD = f"""What the bundled encoder answers in a library of {len(PHOTOGRAPHS)} photographs.
It looks at the pictures alone: neither their names nor their captions decide which one is found.
The number is the cosine between question and answer. Where it is no higher than for questions
about something else entirely, the page says so."""
_CREDIT = "Photographs: the sample pictures of scikit-image. Captions: Retriever."


@dataclass(frozen=True, slots=True)
class Answer:
    """One question of the tour with its best answers.

    picture: what was asked with, if anything. is_match: False if none of the hits is what was asked
    for. why: the heat map of the best hit, if it was drawn.
    """

    question: str
    picture: Path | None
    hits: "Sequence[Hit | CaptionHit]"
    is_match: bool | None = None
    why: Path | None = None


@dataclass(frozen=True, slots=True)
class Demo:
    """Where `build` put the photographs, the library, and the picture to ask with."""

    folder: Path
    pictures: Path
    library: Path
    query: Path


def build(folder: Path | None = None) -> Demo:
    """The photographs with their captions in a folder; nothing is indexed yet.

    Args:
        folder: made if absent; None: a new one among the temporary files.

    Raises:
        MissingExtraError: scikit-image is not installed.
        RetrieverError: it has not the expected sample pictures.
        UsageError: `pictures` in the folder holds other files; nothing is written.
    """
    # The package is only located: importing it would take a second.
    package = find_spec("skimage")
    if package is None or package.origin is None:
        raise MissingExtraError("The demo takes its photographs from scikit-image, so it", "demo")
    samples = Path(package.origin).parent / "data"
    folder = folder or Path(tempfile.mkdtemp(prefix="retriever-demo-"))
    demo = Demo(folder, folder / "pictures", folder / "demo.lib", folder / QUERY_PICTURE)
    demo.pictures.mkdir(parents=True, exist_ok=True)
    _refuse_other_files(demo.pictures)
    try:
        for file in PHOTOGRAPHS:
            shutil.copyfile(samples / file, demo.pictures / file)
        _refuse_another_file(demo.query, samples / QUERY_PICTURE)
        shutil.copyfile(samples / QUERY_PICTURE, demo.query)
    except FileNotFoundError as exc:
        raise RetrieverError(
            f"this version of scikit-image has no sample picture {Path(exc.filename).name}"
        ) from exc
    lines = [
        json.dumps({"file": file, "captions": captions}) for file, captions in PHOTOGRAPHS.items()
    ]
    (demo.pictures / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return demo


def _refuse_other_files(pictures: Path) -> None:
    """Captions written by hand must not be replaced: `--folder ~` may well find ~/Pictures."""
    ours = {*PHOTOGRAPHS, "captions.jsonl"}
    for path in sorted(pictures.iterdir()):
        if path.name not in ours and not path.name.startswith("."):
            raise UsageError(
                f"{printable(pictures)} holds files that are not the demo's, such as"
                f" {printable(path.name)}: choose another folder"
            )


def _refuse_another_file(path: Path, ours: Path) -> None:
    if path.exists() and path.read_bytes() != ours.read_bytes():
        raise UsageError(
            f"{printable(path)} is a file that is not the demo's: choose another folder"
        )


def tour(library: "Library", query: Path, why: Path) -> list[Answer]:
    """What the library answers to texts, to a picture, and to the question what a picture shows.

    A heat map goes into the folder `why`.
    """
    from retriever.explain import write_heat_maps

    answers = []
    for text in TEXT_QUERIES:
        found = library.search(text, k=K)
        drawn: list[Path] = []
        if text == EXPLAINED:
            (row,) = library.encoder.encode_texts([text])
            drawn = write_heat_maps(library.encoder, row, found[:1], why)
        best = drawn[0] if drawn else None
        answers.append(Answer(f"“{text}”", None, found, found.is_match, best))
    answers.append(Answer("Pictures like this one", query, library.search(image=query, k=K)))
    captions = library.captions_for(query, k=K)
    answers.append(Answer("Captions that fit this picture", query, captions))
    return answers


def render(answers: Sequence[Answer]) -> str:
    """The answers as a person would like to read them in a terminal."""
    lines = []
    for answer in answers:
        asked = f": {answer.picture.name}" if answer.picture else ""
        lines += ["", f"{answer.question}{asked}"]
        if answer.is_match is False:
            lines.append(f"  {NO_MATCH}")
        for hit in answer.hits:
            caption = hit.caption or ""
            if _is_caption_answer(answer):
                lines.append(f"  {hit.rank}  {hit.score:.3f}  {caption}")
            else:
                lines.append(f"  {hit.rank}  {hit.score:.3f}  {hit.path.name:<22} {caption}")
    return "\n".join(lines[1:])


def contact_sheet(answers: Sequence[Answer], pictures: Path) -> str:
    """One HTML page with all it shows inside: every answer, then the whole folder."""
    sections = []
    for answer in answers:
        asked = figure(answer.picture, "The picture to compare with") if answer.picture else ""
        if _is_caption_answer(answer):
            rows = "".join(
                f"<li>{bar(hit.score)} {html.escape(hit.caption or '')}</li>" for hit in answer.hits
            )
            found = f'<ol class="captions">{rows}</ol>'
        else:
            cards = "".join(
                figure(hit.path, hit.caption or "", score=hit.score) for hit in answer.hits
            )
            if answer.why:
                cards += figure(answer.why, "Where the first of them shows what was asked for")
            told = f"<p>{NO_MATCH}</p>" if answer.is_match is False else ""
            found = f'{told}<div class="cards">{cards}</div>'
        body = f'<div class="asked">{asked}{found}</div>' if asked else found
        sections.append(section(answer.question, body))
    everything = "".join(
        figure(pictures / file, " ".join(captions)) for file, captions in PHOTOGRAPHS.items()
    )
    sections.append(section("The whole library", f'<div class="cards all">{everything}</div>'))
    return page("contact sheet of the demo", _LEAD, sections, _CREDIT)


def _is_caption_answer(answer: Answer) -> bool:
    from retriever.search import CaptionHit

    return any(isinstance(hit, CaptionHit) for hit in answer.hits)
