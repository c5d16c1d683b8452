"""How open_clip's models clean a text before its tokens are looked up.

Their tokenizers were trained on texts cleaned so, and another cleaning gives other tokens. Done
here without open_clip, whose import takes seconds.
"""

import html
import string

from retriever.errors import MissingExtraError

CLEANINGS = ("lower", "whitespace", "canonicalize")

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def cleaned(text: str, how: str) -> str:
    """The text mended (ftfy), its HTML entities read, its white space made single blanks.

    Args:
        text: any text.
        how: "whitespace" does no more; "lower" takes small letters; "canonicalize" takes them too
            and drops the punctuation of ASCII, as SigLIP's texts were.

    Raises:
        MissingExtraError: the text needs ftfy, and it is not installed.
    """
    text = html.unescape(html.unescape(text if _is_plain(text) else _mended(text)))
    if how == "canonicalize":
        text = text.replace("_", " ").translate(_PUNCTUATION)
    text = " ".join(text.split())
    return text if how == "whitespace" else text.lower()


def _is_plain(text: str) -> bool:
    """Whether ftfy would leave the text as it is; most queries are spared its import so."""
    return text.isascii() and text.isprintable() and "&" not in text


def _mended(text: str) -> str:
    try:
        import ftfy  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as exc:
        raise MissingExtraError(
            f"a model of open_clip with the text {text[:40]!r}", "models"
        ) from exc
    fixed: str = ftfy.fix_text(text)
    return fixed
