"""Heads: small functions that carry embeddings over to a space which fits one library better.

    y = (x + gelu(x·D + c)·U + b), made to length 1

Pictures and captions have matrices of their own. With U and b zero it is the identity. A head is
kept as the bytes of a safetensors file, which is read here without that package: eight bytes with
the length of a JSON header, the header, and the numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from indexes.records import KINDS, Kind

Rows = NDArray[np.float32]

# No header of ours is longer, nor has a model more dimensions.
MAX_HEADER_BYTES = 1 << 16
MAX_SIDE = 1 << 13


class Residual(NamedTuple):
    """What is added to embeddings of one kind.

    down: (d, h). inner: (h,). up: (h, d). bias: (d,).
    """

    down: Rows
    inner: Rows
    up: Rows
    bias: Rows


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A function of embeddings of pictures, and one of embeddings of captions and other texts."""

    residuals: Mapping[Kind, Residual]

    def __call__(self, kind: Kind, rows: NDArray[np.floating]) -> Rows:
        """(n, d) float32 unit rows for embeddings (n, d); all texts are of captions' kind."""
        one = self.residuals[kind]
        given = np.ascontiguousarray(rows, dtype=np.float32)
        carried: Rows = given + _gelu(given @ one.down + one.inner) @ one.up
        carried += one.bias
        carried /= np.linalg.norm(carried, axis=1, keepdims=True)
        return carried

    @property
    def dim(self) -> int:
        """Columns of the embeddings that it takes."""
        return len(self.residuals["image"].bias)

    def pack(self) -> bytes:
        """The bytes of a safetensors file with the tensors `image.down`, `image.inner`, ..."""
        header: dict[str, Any] = {}
        parts: list[bytes] = []
        at = 0
        for kind in KINDS:
            for name, values in self.residuals[kind]._asdict().items():
                part = np.ascontiguousarray(values, dtype="<f4").tobytes()
                ends = [at, at + len(part)]
                shape = list(values.shape)
                header[f"{kind}.{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": ends}
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
        return head


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
