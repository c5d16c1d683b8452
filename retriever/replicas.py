"""A torch tower at work: a copy on every GPU, pinned memory, the largest batch that fits.

On a CPU, and on Apple's GPUs, there is one copy, in float32. Where the processor multiplies
bfloat16, that would run ViT-B-32 2.3 times as fast (by autocast half as fast), and turn rows by a
cosine of 6e-5 with random weights; what it costs in recall has not been measured. On CUDA towers
compute in float16 where autocast holds that to be safe, and rows are made unit rows in float32.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retriever.errors import EncoderError

Array = NDArray[Any]

CPU_BATCH = 32
# Beyond this a GPU is busy all the time, and more would only take memory of the machine.
LARGEST_BATCH = 1024


def largest_batch(fits: Callable[[int], bool], *, start: int = 64, limit: int = 1024) -> int:
    """The largest of `start`, its doubles up to `limit`, or else its halves, that fits.

    Raises:
        EncoderError: not even one does.
    """
    size = start
    while not fits(size):
        size //= 2
        if not size:
            raise EncoderError("the device has no memory for even one picture: use --device cpu")
    if size == start:
        while 2 * size <= limit and fits(2 * size):
            size *= 2
    return size


class Replicas:
    """One tower on one device, or on every GPU that there is; thread-safe where the tower is.

    Args:
        tower: from a tensor (b, …) to (b, d); eval mode. It is moved to the device.
        device: "cuda" of any index stands for all GPUs that this process may see.
        method: what is called on the tower.
    """

    def __init__(self, tower: nn.Module, device: torch.device, *, method: str = "__call__") -> None:
        devices = [device]
        if device.type == "cuda":
            devices = [torch.device("cuda", place) for place in range(torch.cuda.device_count())]
        tower = tower.eval().requires_grad_(False)
        if sum(isinstance(part, nn.Conv2d) for part in tower.modules()) > 1:
            # Convolutions like channels beside each other; transformers have one and do not care.
            tower = tower.to(memory_format=torch.channels_last)
        copies = [tower, *(deepcopy(tower) for _ in devices[1:])]
        self._lanes = [_Lane(copy, one, method) for copy, one in zip(copies, devices, strict=True)]
        self.batch_size = CPU_BATCH

    def fit(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Set `batch_size` to what the smallest GPU holds of inputs of that shape."""
        if self._lanes[0].is_cuda:
            sizes = [
                largest_batch(lambda n, lane=lane: lane.fits(n, shape, dtype), limit=LARGEST_BATCH)  # type: ignore[misc]
                for lane in self._lanes
            ]
            self.batch_size = min(sizes)

    def __call__(self, inputs: Array) -> Array:
        """(n, d) float32 rows for inputs (n, …), batches shared among the devices."""
        parts = [
            inputs[start : start + self.batch_size]
            for start in range(0, len(inputs), self.batch_size)
        ]
        # No more threads than parts; one part runs in the caller's thread.
        lanes = self._lanes[: max(1, len(parts))]
        shares = [parts[place :: len(lanes)] for place in range(len(lanes))]
        if len(lanes) == 1:
            rows = [self._share(lanes[0], shares[0])]
        else:
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(len(lanes)) as threads:
                rows = list(threads.map(self._share, lanes, shares))
        in_order = [rows[place % len(lanes)][place // len(lanes)] for place in range(len(parts))]
        return np.concatenate(in_order) if in_order else np.empty((0, 0), np.float32)

    def _share(self, lane: "_Lane", parts: list[Array]) -> list[Array]:
        try:
            return list(lane.rows(parts))
        except torch.OutOfMemoryError:  # something else has taken memory since the size was found
            if max(map(len, parts)) == 1:
                raise
        torch.cuda.empty_cache()  # out of the handler, which would hold what the failed run held
        self.batch_size = max(1, self.batch_size // 2)
        rows = []
        for part in parts:
            halves = [half for half in np.array_split(part, 2) if len(half)]
            rows.append(np.concatenate(self._share(lane, halves)))
        return rows


class _Lane:
    """One copy of a tower on its device."""

    def __init__(self, tower: nn.Module, device: torch.device, method: str) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self._tower = tower.to(device)
        self._call = getattr(self._tower, method)

    def fits(self, size: int, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether a batch of that size goes through the tower without running out of memory."""
        try:
            with torch.inference_mode():
                self._run(torch.zeros((size, *shape), dtype=dtype, device=self.device))
                torch.cuda.synchronize(self.device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return False
        return True

    def rows(self, parts: list[Array]) -> Iterator[Array]:
        """(b, d) float32 for each part, in order.

        On CUDA copies to and from the device wait for nothing: while one batch is computed the
        host fills the other of two pinned buffers.
        """
        with torch.inference_mode():
            if not self.is_cuda:
                for part in parts:
                    yield self._run(torch.from_numpy(part).to(self.device)).cpu().numpy()
                return
            running: list[tuple[Tensor, Tensor, torch.cuda.Event]] = []
            with torch.cuda.device(self.device):
                for part in parts:
                    # A buffer of torch's own cache of pinned memory; it is taken again only when
                    # the copy from it is over.
                    held = torch.from_numpy(part).pin_memory()
                    answer = self._run(held.to(self.device, non_blocking=True))
                    rows = torch.empty(answer.shape, dtype=answer.dtype, pin_memory=True)
                    rows.copy_(answer, non_blocking=True)
                    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    done.record()
                    running.append((held, rows, done))
                    if len(running) == 2:
                        yield _finished(running.pop(0))
                for one in running:
                    yield _finished(one)

    def _run(self, inputs: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.float16, enabled=self.is_cuda):
            rows: Tensor = self._call(inputs)
        return rows.float()


def _finished(run: "tuple[Tensor, Tensor, torch.cuda.Event]") -> Array:
    _, rows, done = run
    done.synchronize()
    return np.array(rows.numpy())
