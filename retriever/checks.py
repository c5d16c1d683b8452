"""What a library can check beyond its own files: its pictures and its model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from indexes.errors import WrongModelError
from retriever.data import read_image
from retriever.errors import EncoderError, MissingExtraError, PictureError, printable

if TYPE_CHECKING:
    from PIL import Image

    from indexes.records import ItemRow
    from indexes.store import Store
    from retriever.encoders import Encoder

# A stored embedding is rounded to float16, and int8 kernels differ a little between processors:
# the cosine stays above 0.999. Another model, or other preprocessing, is far below this.
SAME = 0.99
T = TypeVar("T")
Rows = NDArray[np.floating]


def missing_pictures(store: Store, notes: list[str]) -> list[str]:
    """A sentence for each root with pictures that are no longer there.

    A root that is away or empty is not held against the library: it may be a drive that is not
    mounted, and is added to `notes`.
    """
    problems = []
    for root in store.root_infos():
        try:
            with os.scandir(root.path) as entries:
                is_there = any(entries)
        except OSError:
            is_there = False
        if not is_there:
            if root.items:
                notes.append(
                    f"{printable(root.path)} is away or empty; {root.items:,} known pictures were "
                    "not looked for"
                )
            continue
        files = store.known_files(root.root_id)
        gone = [file for file in files if not os.path.lexists(root.path / file)]
        if gone:
            problems.append(
                f"{len(gone):,} known pictures are no longer in {printable(root.path)}, such as "
                f"{printable(gone[0])}; `retriever index` takes them out, with --prune if none is "
                "left"
            )
    return problems


def changed_embeddings(
    store: Store, encoder: Callable[[], Encoder], sample: int, notes: list[str]
) -> list[str]:
    """A sentence for pictures, and one for captions, that encode to something else today.

    Looks at `sample` of each, spread over the library; pictures that changed on disk are left out.
    What could not be checked is added to `notes`.
    """
    with store.snapshot() as rows:
        ids = _spread(rows.item_ids(), 4 * sample)
        items = [one for one in rows.items(ids).values() if one.status == "ok"]
        images = rows.embeddings("image", [one.item_id for one in items])
        pairs = [
            (caption_id, caption.text)
            for one in items
            for caption_id, caption in zip(
                rows.caption_ids([one.item_id]), one.captions, strict=True
            )
        ]
        texts = rows.embeddings("caption", [caption_id for caption_id, _ in pairs])
    try:
        pictures = _pictures(
            encoder(), [one for one in items if one.item_id in images], images, sample
        )
        captions = _captions(encoder(), [pair for pair in pairs if pair[0] in texts], texts, sample)
    except WrongModelError as exc:
        return [str(exc)]
    except (EncoderError, MissingExtraError) as exc:
        notes.append(f"no embedding was checked: {exc}")
        return []
    return [*pictures, *captions]


def _pictures(
    encoder: Encoder, items: Sequence[ItemRow], stored: Mapping[int, Rows], sample: int
) -> list[str]:
    found: list[ItemRow] = []
    images: list[Image.Image] = []
    for item in items:
        if len(found) == sample:
            break
        with suppress(OSError, PictureError):
            status = item.path.stat()
            if (status.st_size, status.st_mtime_ns) == (item.size, item.mtime_ns):
                images.append(read_image(item.path, target=encoder.image_size).image)
                found.append(item)
    names = [printable(item.path) for item in found]
    expected = [stored[item.item_id] for item in found]
    return _differences("pictures", names, encoder.encode_images(images), expected)


def _captions(
    encoder: Encoder, pairs: Sequence[tuple[int, str]], stored: Mapping[int, Rows], sample: int
) -> list[str]:
    chosen = _spread(pairs, sample)
    names = [repr(text[:60]) for _, text in chosen]
    expected = [stored[caption_id] for caption_id, _ in chosen]
    rows = encoder.encode_texts([text for _, text in chosen])
    return _differences("captions", names, rows, expected)


def _differences(what: str, names: Sequence[str], rows: Rows, stored: Sequence[Rows]) -> list[str]:
    if not names:
        return []
    cosines = (rows * np.stack(stored)).sum(axis=1)
    wrong = np.flatnonzero(~(cosines >= SAME))
    if not wrong.size:
        return []
    return [
        f"{wrong.size} of {len(names)} {what} encode to something else than is stored, such as "
        f"{names[wrong[0]]} (cosine {cosines[wrong[0]]:.3f}): model or preprocessing have changed; "
        "remove the library and index again"
    ]


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of them, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, count)]
