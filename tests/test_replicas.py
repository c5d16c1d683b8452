from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from retriever.errors import EncoderError
from retriever.replicas import Replicas, largest_batch

CPU = torch.device("cpu")


class Sums(nn.Module):
    """Each input's sum and number of values; with a memory that holds so many inputs."""

    def __init__(self, memory: int = 10**9) -> None:
        super().__init__()
        self.memory = memory
        self.sizes: list[int] = []

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.sizes.append(len(inputs))
        flat = inputs.flatten(1).float()
        return torch.stack([flat.sum(1), torch.full((len(inputs),), flat.shape[1])], dim=1)


def given(n: int) -> np.ndarray[Any, Any]:
    return np.arange(n * 6, dtype=np.uint8).reshape(n, 2, 3)


def expected(inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.stack([inputs.sum(axis=(1, 2)), np.full(len(inputs), 6)], axis=1)


@pytest.mark.parametrize(
    ("memory", "start", "limit", "found"),
    [
        (100, 64, 1024, 64),
        (1000, 64, 1024, 512),
        (5000, 64, 1024, 1024),
        (20, 64, 1024, 16),
        (1, 64, 1024, 1),
        (64, 64, 64, 64),
    ],
)
def test_largest_batch_doubles_until_it_no_longer_fits_or_halves(
    memory: int, start: int, limit: int, found: int
) -> None:
    assert largest_batch(lambda n: n <= memory, start=start, limit=limit) == found


def test_device_without_memory_for_one_is_told() -> None:
    with pytest.raises(EncoderError, match="no memory for even one"):
        largest_batch(lambda n: False)


@pytest.mark.parametrize("n", [0, 1, 7, 32, 33, 70])
def test_rows_are_in_order_whatever_the_batches(n: int) -> None:
    replicas = Replicas(Sums(), CPU)
    rows = replicas(given(n))
    assert len(rows) == n
    if n:
        np.testing.assert_array_equal(rows, expected(given(n)))
        assert rows.dtype == np.float32


def test_several_copies_share_the_batches_and_keep_their_order() -> None:
    replicas = Replicas(Sums(), CPU)
    copies = [replicas._lanes[0], *(Replicas(Sums(), CPU)._lanes[0] for _ in range(2))]
    replicas._lanes, replicas.batch_size = copies, 4
    np.testing.assert_array_equal(replicas(given(30)), expected(given(30)))
    assert [sum(lane._tower.sizes) for lane in copies] == [12, 10, 8]  # type: ignore[union-attr, arg-type]


def test_batch_that_no_longer_fits_is_halved_and_answered() -> None:
    tower = Sums(memory=5)
    replicas = Replicas(tower, CPU)
    np.testing.assert_array_equal(replicas(given(33)), expected(given(33)))
    assert max(tower.sizes) <= 5
    assert replicas.batch_size <= 5
    with pytest.raises(torch.OutOfMemoryError):
        Replicas(Sums(memory=0), CPU)(given(3))


@pytest.mark.gpu
def test_gpus_answer_as_the_cpu_does() -> None:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 8)).eval()
    inputs = np.random.default_rng(0).normal(size=(3000, 12)).astype(np.float32)
    plain = Replicas(layers, CPU)(inputs)
    on_gpus = Replicas(layers, torch.device("cuda"))
    on_gpus.fit((12,), torch.float32)
    assert on_gpus.batch_size >= 64
    np.testing.assert_allclose(on_gpus(inputs), plain, atol=1e-2)
