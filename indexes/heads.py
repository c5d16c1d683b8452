"""Heads: small functions that carry embeddings over to a space which fits one library better.

    y = (x + gelu(x·D + c)·U + b), made to length 1

Pictures and captions have matrices of their own. With U and b zero it is the identity. A correction
for hubs may follow, which needs more dimensions: see `Correction`. A head is kept as the bytes
of a safetensors file, which is read here without that package: eight bytes with the length of a
JSON header, the header, and the numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from indexes.records import KINDS, Kind

Rows = NDArray[np.float32]

# No header of ours is longer, nor has a model more dimensions.
MAX_HEADER_BYTES = 1 << 16
MAX_SIDE = 1 << 13
# Of a correction for hubs: texts whose mean counts, as its paper has it; the share of pictures that
# count as being no farther from texts than the others; the least room for it beside cosines;
# pictures compared with its texts at a time.
NEAREST = 10
FAR = 0.05
LEAST_SPAN = 0.01
BLOCK = 256
# The columns of corrected rows are a multiple of this: FAISS scans 386 eight times slower than 400.
COLUMNS = 16


class Residual(NamedTuple):
    """What is added to embeddings of one kind.

    down: (d, h). inner: (h,). up: (h, d). bias: (d,).
    """

    down: Rows
    inner: Rows
    up: Rows
    bias: Rows


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """Takes from each picture's score what it owes to being near to texts of all kinds: hubness.

    Some pictures are among the nearest to many texts that they do not show. A picture x has

        h(x) = weight · (mean cosine to the `NEAREST` nearest of `texts` − centre)

    as in cross-domain similarity local scaling (Conneau et al. 2018, arXiv:1710.04087), where the
    weight is 1/2; the nearest `passed` texts are likely the picture's own and do not count. With

        x → [x, −h(x)/√s, what is missing to the length √(1 + s)] / √(1 + s),  s: the span
        t → [t, √s, 0] / √(1 + s)

    all rows have length 1 again, and the dot product of a picture and a text is
    (x·t − h(x)) / (1 + s). Those of two texts, and but for the square of a difference of h those of
    two pictures, keep their order. Each of the two further numbers is spread evenly over columns,
    so that none is far larger than those of x and t: whoever rounds rows counts on that.

    texts: (t, d) unit rows. span: no |h| is larger; one that would be counts as that. Pictures far
    from all texts are so, for a library may hold things that its captions never speak of, and these
    are not to come up for everything.
    """

    texts: Rows
    passed: int
    weight: float
    centre: float
    span: float

    @classmethod
    def of(cls, texts: Rows, pictures: Rows, passed: int) -> Correction:
        """The whole of it, of weight 1, with room for some pictures (n, d) but the farthest."""
        near = _nearness(texts, pictures, passed)
        low, high = float(np.quantile(near, FAR)), float(near.max())
        return cls(texts, passed, 1.0, (low + high) / 2, (high - low) / 2)

    def weighted(self, weight: float) -> Correction:
        """A part of it, of what is one as a whole."""
        return replace(self, weight=weight, span=max(LEAST_SPAN, weight * self.span))

    def __call__(self, kind: Kind, rows: Rows) -> Rows:
        """(n, made) float32 unit rows for unit rows (n, d)."""
        room = math.sqrt(self.span)
        dim = rows.shape[1]
        made = np.zeros((len(rows), _widened(dim)), np.float32)
        made[:, :dim] = rows
        first, second = np.array_split(made[:, dim:], 2, axis=1)
        if kind == "image":
            high = self.weight * (_nearness(self.texts, rows, self.passed) - self.centre)
            taken = -np.clip(high, -self.span, self.span)[:, None] / room
            first[:] = taken / math.sqrt(first.shape[1])
            second[:] = np.sqrt(np.maximum(self.span - taken**2, 0) / second.shape[1])
        else:
            first[:] = room / math.sqrt(first.shape[1])
        made /= math.sqrt(1 + self.span)
        return made


def _widened(dim: int) -> int:
    """Columns of corrected rows, at least two beside `dim`."""
    return -(-(dim + 2) // COLUMNS) * COLUMNS


def _nearness(texts: Rows, pictures: Rows, passed: int) -> Rows:
    """(n,) the mean cosine of pictures (n, d) to the nearest of texts (t, d) but for some."""
    last = min(passed + NEAREST, len(texts))
    first = max(0, min(passed, last - NEAREST))
    means = np.empty(len(pictures), np.float32)
    for start in range(0, len(pictures), BLOCK):
        cosines = pictures[start : start + BLOCK] @ texts.T
        nearest = -np.sort(np.partition(-cosines, last - 1, axis=1)[:, :last], axis=1)
        means[start : start + BLOCK] = nearest[:, first:].mean(axis=1)
    return means


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A function of embeddings of pictures, and one of embeddings of captions and other texts.

    residuals: for each kind. correction: what follows, if anything.
    """

    residuals: Mapping[Kind, Residual]
    correction: Correction | None = None

    def __call__(self, kind: Kind, rows: NDArray[np.floating]) -> Rows:
        """(n, made) float32 unit rows for embeddings (n, d); all texts are of captions' kind."""
        one = self.residuals[kind]
        given = np.ascontiguousarray(rows, dtype=np.float32)
        carried: Rows = given + _gelu(given @ one.down + one.inner) @ one.up
        carried += one.bias
        carried /= np.linalg.norm(carried, axis=1, keepdims=True)
        return carried if self.correction is None else self.correction(kind, carried)

    @property
    def dim(self) -> int:
        """Columns of the embeddings that it takes."""
        return len(self.residuals["image"].bias)

    @property
    def made(self) -> int:
        """Columns of the embeddings that it gives."""
        return self.dim if self.correction is None else _widened(self.dim)

    def pack(self) -> bytes:
        """The bytes of a safetensors file with the tensors `image.down`, `image.inner`, ...

        A correction is in `texts` and `correction`, which has its other fields in their order.
        """
        tensors = {
            f"{kind}.{name}": values
            for kind in KINDS
            for name, values in self.residuals[kind]._asdict().items()
        }
        if one := self.correction:
            numbers = [one.passed, one.weight, one.centre, one.span]
            tensors |= {"texts": one.texts, "correction": np.array(numbers, np.float32)}
        header: dict[str, Any] = {}
        parts: list[bytes] = []
        at = 0
        for name, values in tensors.items():
            part = np.ascontiguousarray(values, dtype="<f4").tobytes()
            ends = [at, at + len(part)]
            header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": ends}
            parts.append(part)
            at = ends[1]
        told = json.dumps(header, separators=(",", ":")).encode()
        told += b" " * (-len(told) % 8)  # so that the numbers are aligned
        return len(told).to_bytes(8, "little") + told + b"".join(parts)

    @classmethod
    def unpack(cls, data: bytes) -> Head:
        """Of what `pack` wrote; raises ValueError for anything else."""
        length = int.from_bytes(data[:8], "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, len(data) - 8):
            raise ValueError("a head has no header")
        header = json.loads(data[8 : 8 + length])
        if not isinstance(header, dict):
            raise ValueError("a head has another header")
        numbers = data[8 + length :]
        head = cls(
            {
                kind: Residual(
                    *(_tensor(header.get(f"{kind}.{name}"), numbers) for name in Residual._fields)
                )
                for kind in KINDS
            }
        )
        for down, inner, up, bias in head.residuals.values():
            sides = (head.dim, *inner.shape)
            if len(sides) != 2 or (down.shape, up.shape) != (sides, sides[::-1]):
                raise ValueError("the parts of a head do not fit together")
            if bias.shape != (head.dim,):
                raise ValueError("the parts of a head differ in size")
        if "correction" not in header:
            return head
        texts, given = (_tensor(header.get(name), numbers) for name in ("texts", "correction"))
        if texts.ndim != 2 or texts.shape[1] != head.dim or given.shape != (4,):
            raise ValueError("the correction of a head does not fit it")
        passed, weight, centre, span = given.tolist()
        if not (0 <= passed <= MAX_SIDE and span > 0):
            raise ValueError("the correction of a head is out of range")
        return replace(head, correction=Correction(texts, int(passed), weight, centre, span))


def _tensor(described: Any, numbers: bytes) -> Rows:
    """What a header describes; raises ValueError unless all of it is there and finite."""
    try:
        shape, (start, end) = described["shape"], described["data_offsets"]
        is_ours = described["dtype"] == "F32" and 1 <= len(shape) <= 2
    except (KeyError, TypeError) as error:
        raise ValueError("a head lacks a part") from error
    if not is_ours or any(type(n) is not int or n < 0 for n in (*shape, start, end)):
        raise ValueError("a head holds something other than float32")
    is_small = all(0 < n <= MAX_SIDE for n in shape)
    if not is_small or end - start != 4 * math.prod(shape) or end > len(numbers):
        raise ValueError("a part of a head has another size")
    values = np.frombuffer(numbers[start:end], "<f4").reshape(shape).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("a head holds something that is no number")
    return values


def _gelu(rows: Rows) -> Rows:
    """Gaussian error linear units, as torch approximates them by tanh. arXiv:1606.08415."""
    inner = math.sqrt(2 / math.pi) * (rows + 0.044715 * rows * rows * rows)
    made: Rows = 0.5 * rows * (1 + np.tanh(inner))
    return made


def fingerprint(base: str, head: bytes) -> str:
    """Stands for the space that a packed head makes of the one with the fingerprint `base`."""
    return hashlib.sha256(base.encode() + b"\n" + head).hexdigest()[:32]
