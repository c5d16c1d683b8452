"""What is asked and answered over HTTP, as types; the OpenAPI description is made from them.

Names and meanings are those of `--json` on the command line.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from retriever.channels import Mode

MOST_RESULTS = 1000  # answers that can be reached by paging
MOST_TEXT = 2000  # characters of a query
MOST_PARTS = 16  # of what is left out, and of pictures to ask with
# A NUL is no text that a person types, and C libraries end there.
Text = Annotated[str, StringConstraints(max_length=MOST_TEXT, pattern=r"^[^\x00]*$")]
Number = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Id = Annotated[int, Field(ge=1, lt=1 << 63)]
LibraryName = Annotated[
    str | None, Field(max_length=200, description="Of several libraries, the one to ask.")
]


class Asked(BaseModel):
    """What is asked, in the address of a request."""

    library: LibraryName = None
    q: Text = Field("", description="What to look for; parts as on the command line.")
    image: list[Id] = Field([], max_length=MOST_PARTS, description="Ids of pictures to ask with.")
    text_weight: Number = Field(1.0, description="Of the text, beside pictures.")
    image_weight: Number = Field(1.0, description="Of each picture.")
    without: list[Text] = Field([], max_length=MOST_PARTS, description="What must not be shown.")
    without_image: list[Id] = Field(
        [], max_length=MOST_PARTS, description="Ids of pictures of such things."
    )
    where: Text = Field("", description="A filter, as on the command line.")
    mode: Mode | None = Field(None, description="By what pictures are found.")

    @property
    def filter(self) -> str | None:
        """The filter; None: every picture."""
        return self.where.strip() or None


class Wanted(Asked):
    """What is asked, and how much is wanted of the answers."""

    k: int = Field(30, ge=1, le=200, description="Answers wanted.")
    offset: int = Field(0, ge=0, lt=MOST_RESULTS, description="Answers to skip.")
    min_confidence: float | None = Field(
        None, ge=0, le=1, description="Leave out what is less surely right."
    )
    all: bool = Field(False, description="Near-duplicates as well.")
    exact: bool = Field(False, description="Look at everything.")
    explain: bool = Field(False, description="Say of each answer why.")


class Record(BaseModel):
    """Of fields that are all there."""

    model_config = ConfigDict(extra="forbid")


class Found(Record):
    """A picture found; see `retriever.search.Hit`."""

    rank: int
    score: float
    confidence: float | None
    id: int
    name: str
    path: str
    caption: str | None
    duplicates: int
    explain: dict[str, Any] | None = None


class Answer(Record):
    """Pictures that answer a query, best first.

    is_match: whether the best is one that was asked for, rather than merely the nearest that there
    is; null if nobody knows. more: whether there are further ones, from `offset` + the number of
    hits on. message: to be shown above the hits, where none is a match.
    """

    library: str
    mode: Mode
    is_match: bool | None
    message: str | None
    notes: list[str]
    offset: int
    more: bool
    seconds: float
    hits: list[Found]


class FoundCaption(Record):
    """A caption found, and the first picture that has it."""

    rank: int
    score: float
    caption: str
    id: int
    path: str


class Captions(Record):
    """Captions that fit a picture, best first."""

    library: str
    seconds: float
    hits: list[FoundCaption]


class Caption(Record):
    """A caption of a picture, and where it comes from."""

    text: str
    source: str


class Item(Record):
    """All that is known of a picture. Sides in pixels, size in bytes, time is the camera's own."""

    id: int
    name: str
    path: str
    folder: str
    width: int
    height: int
    size: int
    taken: str | None
    camera: str | None
    latitude: float | None
    longitude: float | None
    captions: list[Caption]
    extras: dict[str, list[str | float]]


class Listed(Record):
    """A picture in a list; its caption is its first."""

    id: int
    name: str
    path: str
    caption: str | None


class Items(Record):
    """Pictures that a filter lets through. more: whether there are further ones."""

    library: str
    total: int
    offset: int
    more: bool
    hits: list[Listed]


class LibraryRecord(Record):
    """A library that is served."""

    name: str
    path: str
    items: int
    captions: int
    failures: int
    model: str
    generation: int
    mode: Mode
    confidences: bool


class Libraries(Record):
    """The libraries that are served; the first is the default."""

    libraries: list[LibraryRecord]


class FilterField(Record):
    """Something that a filter may ask for, and the commonest values of it where those are texts."""

    name: str
    type: Literal["text", "number", "time", "place", "extra"]
    values: list[str]


class Fields(Record):
    """What a filter may ask for."""

    fields: list[FilterField]


class MapRecord(Record):
    """Places of pictures on a map, from 0 to 1.

    ready: whether there is one. drawing: a newer one is on its way, ask again.
    """

    ready: bool
    drawing: bool
    message: str | None
    ids: list[int]
    x: list[float]
    y: list[float]


class Health(Record):
    """That the server is there."""

    status: Literal["ok"]
    version: str


class Problem(BaseModel):
    """What went wrong, as RFC 9457 has it; `detail` is a sentence for people."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
