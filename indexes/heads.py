"""Heads: small functions that carry embeddings over to a space which fits one library better.

    y = (x + x·W + b), made to length 1

Pictures and captions have matrices of their own. With W and b zero it is the identity. A head is
kept as the bytes of a safetensors file, which is read here without that package: eight bytes with
the length of a JSON header, the header, and the numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from indexes.records import KINDS, Kind

Rows = NDArray[np.float32]

# No header of ours is longer, nor has a model more dimensions.
MAX_HEADER_BYTES = 1 << 16
MAX_DIM = 1 << 13


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """What is added to embeddings of pictures and of captions: `weights` (d, d), `biases` (d,)."""

    weights: Mapping[Kind, Rows]
    biases: Mapping[Kind, Rows]

    def __call__(self, kind: Kind, rows: NDArray[np.floating]) -> Rows:
        """(n, d) float32 unit rows for embeddings (n, d) of a kind; texts are of captions' kind."""
        given = np.ascontiguousarray(rows, dtype=np.float32)
        carried: Rows = given + given @ self.weights[kind]
        carried += self.biases[kind]
        carried /= np.linalg.norm(carried, axis=1, keepdims=True)
        return carried

    @property
    def dim(self) -> int:
        """Columns of the embeddings that it takes."""
        return len(self.biases["image"])

    def pack(self) -> bytes:
        """The bytes of a safetensors file with the tensors `image.weight`, `image.bias`, ..."""
        tensors = {
            f"{kind}.{name}": np.ascontiguousarray(several[kind], dtype="<f4")
            for kind in KINDS
            for name, several in (("weight", self.weights), ("bias", self.biases))
        }
        header, at = {}, 0
        for name, values in tensors.items():
            ends = [at, at + values.nbytes]
            header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": ends}
            at = ends[1]
        told = json.dumps(header, separators=(",", ":")).encode()
        told += b" " * (-len(told) % 8)  # so that the numbers are aligned
        data = b"".join(values.tobytes() for values in tensors.values())
        return len(told).to_bytes(8, "little") + told + data

    @classmethod
    def unpack(cls, data: bytes) -> Head:
        """Of what `pack` wrote; raises ValueError for anything else."""
        length = int.from_bytes(data[:8], "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, len(data) - 8):
            raise ValueError("a head has no header")
        header = json.loads(data[8 : 8 + length])
        found: dict[str, Rows] = {}
        for kind in KINDS:
            for name, axes in (("weight", 2), ("bias", 1)):
                try:
                    one = header[f"{kind}.{name}"]
                    shape, (start, end) = one["shape"], one["data_offsets"]
                    is_ours = one["dtype"] == "F32" and len(shape) == axes
                    if not is_ours or any(type(n) is not int for n in (*shape, start, end)):
                        raise ValueError("a head holds something other than rows of float32")
                except (KeyError, TypeError) as error:
                    raise ValueError(f"a head lacks {error}") from error
                is_square = len({*shape}) == 1 and 0 < shape[0] <= MAX_DIM
                if not is_square or end - start != 4 * math.prod(shape) or start < 0:
                    raise ValueError("a head has no square matrices")
                numbers = data[8 + length + start : 8 + length + end]
                values = np.frombuffer(numbers, "<f4").reshape(shape).astype(np.float32)
                if not np.isfinite(values).all():
                    raise ValueError("a head holds something that is no number")
                found[f"{kind}.{name}"] = values
        if len({len(values) for values in found.values()}) != 1:
            raise ValueError("the parts of a head differ in size")
        return cls(
            {kind: found[f"{kind}.weight"] for kind in KINDS},
            {kind: found[f"{kind}.bias"] for kind in KINDS},
        )


def fingerprint(base: str, head: bytes) -> str:
    """Stands for the space that a packed head makes of the one with the fingerprint `base`."""
    return hashlib.sha256(base.encode() + b"\n" + head).hexdigest()[:32]
