"""What Retriever raises, and nothing else reaches a user of the library on purpose.

RetrieverError
├── PictureError      a picture that cannot be read: missing, truncated, too large, not a picture
├── CaptionError      a captions file that cannot be read
├── FolderGoneError   an indexed folder is away or empty, as when its drive is not mounted
├── EncoderError      a model that cannot be found, downloaded or loaded
├── MissingExtraError a command needs an optional part of the installation
└── UsageError        arguments that contradict each other or name nothing (exit status 2)

The store has a tree of its own, `indexes.errors.StoreError`. What a text says of a path is
`printable`.
"""

import os
import re

# Control characters, and marks of direction.
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069]")
_UNPAIRED = re.compile(r"[\ud800-\udc7f\udd00-\udfff]")  # surrogates that stand for no byte


class RetrieverError(Exception):
    """Base of all that Retriever raises on purpose; its text is a sentence for the user."""


class PictureError(RetrieverError):
    """A picture cannot be read; the text names the file and says what is wrong with it."""


class CaptionError(RetrieverError):
    """A captions file cannot be read; the text names the file, and the line where there is one."""


class FolderGoneError(RetrieverError):
    """Pictures are known in a folder that is not there or holds none; nothing was removed."""


class EncoderError(RetrieverError):
    """A model cannot be found, downloaded or loaded."""


class MissingExtraError(RetrieverError):
    """A part of the installation is absent; the text has the command that adds it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional part: pip install 'picture-retriever[{extra}]'")


class UsageError(RetrieverError):
    """The arguments contradict each other or name nothing that exists."""


def printable(path: str | os.PathLike[str]) -> str:
    r"""The path as text that can be encoded; bytes that are no UTF-8 show as `\xff`.

    A name need not come from the disk: JSON can spell surrogates that no file's name has.
    """
    name = _UNPAIRED.sub("\ufffd", os.fspath(path))
    return plain(os.fsencode(name).decode("utf-8", "backslashreplace"))


def plain(text: str) -> str:
    r"""The text without what would steer a terminal: line breaks and the like show as `\n`.

    So do marks that turn the direction of what follows, after which a name reads as another.
    """
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
