"""Each objective: against a plain loop, by gradient check, and by what it does to towers."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from retriever import metrics, objectives  # noqa: E402

# ---------------------------------------------------------------------------- slow versions


def same(groups, i, j):
    return i != j and groups is not None and groups[i] == groups[j]


def slow_squared_distance(images, texts):
    pairs = zip(images, texts, strict=True)
    return sum(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) for a, b in pairs) / len(images)


def slow_uniformity(rows, t):
    potentials = [
        math.exp(-t * sum((x - y) ** 2 for x, y in zip(rows[i], rows[j], strict=True)))
        for i in range(len(rows))
        for j in range(i)
    ]
    return math.log(sum(potentials) / len(potentials))


def slow_squared_uniformity(images, texts, weight=1.0, t=2.0):
    spread = (slow_uniformity(images, t) + slow_uniformity(texts, t)) / 2
    return slow_squared_distance(images, texts) + weight * spread


def slow_clip(cosines, scale, groups=None):
    b = len(cosines)
    total = 0.0
    for i in range(b):
        rivals = [j for j in range(b) if not same(groups, i, j)]
        row = sum(math.exp(scale * cosines[i][j]) for j in rivals)
        column = sum(math.exp(scale * cosines[j][i]) for j in rivals)
        total -= math.log(math.exp(scale * cosines[i][i]) / row)
        total -= math.log(math.exp(scale * cosines[i][i]) / column)
    return total / (2 * b)


def slow_siglip(cosines, scale, bias, groups=None):
    b = len(cosines)
    total = 0.0
    for i in range(b):
        for j in range(b):
            if not same(groups, i, j):
                logit = (scale * cosines[i][j] + bias) * (1 if i == j else -1)
                total += math.log(1 + math.exp(-logit))
    return total / b


def slow_triplet(cosines, margin=0.2, groups=None):
    b = len(cosines)
    total = 0.0
    for i in range(b):
        rivals = [j for j in range(b) if j != i and not same(groups, i, j)]
        for hardest in ([cosines[i][j] for j in rivals], [cosines[j][i] for j in rivals]):
            if hardest:
                total += max(0.0, margin + max(hardest) - cosines[i][i])
    return total / b


def unit_rows(b, d, seed):
    rows = torch.randn(b, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def rows_with_cosines(cosines):
    """Two matrices whose product is `cosines`: the objectives below read nothing else of them."""
    matrix = torch.as_tensor(cosines, dtype=torch.float64)
    return torch.eye(len(matrix), dtype=torch.float64), matrix.T.contiguous()


# Name → (fast, slow), both of a (b, b) matrix of cosines and of groups.
CONTRASTIVE = {
    "clip": (
        lambda x, y, groups: objectives.clip_loss(x, y, 5.0, groups),
        lambda cosines, groups: slow_clip(cosines, 5.0, groups),
    ),
    "siglip": (
        lambda x, y, groups: objectives.siglip_loss(x, y, 5.0, -3.0, groups),
        lambda cosines, groups: slow_siglip(cosines, 5.0, -3.0, groups),
    ),
    "triplet": (
        lambda x, y, groups: objectives.triplet_loss(x, y, 0.2, groups),
        lambda cosines, groups: slow_triplet(cosines, 0.2, groups),
    ),
}

cosine = st.floats(-1, 1, allow_subnormal=False)


@st.composite
def batches(draw):
    b = draw(st.integers(1, 6))
    cosines = draw(
        st.lists(st.lists(cosine, min_size=b, max_size=b), min_size=b, max_size=b), label="cosines"
    )
    groups = draw(st.none() | st.lists(st.integers(0, 3), min_size=b, max_size=b), label="groups")
    return cosines, groups


# ---------------------------------------------------------------------------- values


def test_hand_worked_values():
    images = torch.eye(2, dtype=torch.float64)
    # Partners coincide: the distance is 0, the only pair of each side is √2 apart: log exp(−2 · 2).
    assert objectives.squared_distance_loss(images, images).item() == 0
    assert objectives.squared_uniformity_loss(images, images).item() == pytest.approx(-4)
    assert objectives.squared_uniformity_loss(images, images, weight=0.5).item() == pytest.approx(
        -2
    )
    # Opposite partners are 2 apart.
    assert objectives.squared_distance_loss(images, -images).item() == 4
    # Cosine 1 against 0 at scale log 3: each softmax gives its partner 3 of 4.
    assert objectives.clip_loss(images, images, math.log(3)).item() == pytest.approx(
        math.log(4 / 3)
    )
    # Logits of 0 everywhere: each of four questions costs log 2, shared by two rows.
    assert objectives.siglip_loss(images, images, 0.0, 0.0).item() == pytest.approx(2 * math.log(2))
    # Both directions lack 0.2 + 1 − 0 when each row's rival is perfect and its partner is not.
    assert objectives.triplet_loss(images, images.flip(0)).item() == pytest.approx(2.4)
    assert objectives.triplet_loss(images, images).item() == 0


@pytest.mark.parametrize("seed", range(3))
def test_distance_losses_equal_the_loop_over_pairs(seed):
    images, texts = unit_rows(7, 5, seed), unit_rows(7, 5, seed + 100)
    x, y = images.tolist(), texts.tolist()
    assert objectives.squared_distance_loss(images, texts).item() == pytest.approx(
        slow_squared_distance(x, y)
    )
    for weight, t in ((1.0, 2.0), (0.3, 3.0)):
        assert objectives.squared_uniformity_loss(images, texts, weight, t).item() == pytest.approx(
            slow_squared_uniformity(x, y, weight, t)
        )


@pytest.mark.parametrize("name", CONTRASTIVE)
@given(batch=batches())
def test_contrastive_losses_equal_the_loop_over_pairs(name, batch):
    cosines, groups = batch
    fast, slow = CONTRASTIVE[name]
    given_groups = None if groups is None else torch.tensor(groups)
    value = fast(*rows_with_cosines(cosines), given_groups).item()
    assert value == pytest.approx(slow(cosines, groups), rel=1e-9, abs=1e-12)


def test_objectives_measure_what_the_diagnostics_report():
    images, texts = unit_rows(20, 6, 1), unit_rows(20, 6, 2)
    distance = metrics.alignment(images.numpy(), texts.numpy())
    spread = (metrics.uniformity(images.numpy()) + metrics.uniformity(texts.numpy())) / 2
    assert objectives.squared_distance_loss(images, texts).item() == pytest.approx(distance)
    assert objectives.squared_uniformity_loss(images, texts).item() == pytest.approx(
        distance + spread
    )


# ---------------------------------------------------------------------------- one picture, twice


@pytest.mark.parametrize("name", CONTRASTIVE)
@given(batch=batches(), other=cosine)
def test_captions_of_the_same_picture_are_never_negatives(name, batch, other):
    cosines, groups = batch
    groups = groups or [0] * len(cosines)
    fast, _ = CONTRASTIVE[name]
    changed = [
        [other if same(groups, i, j) else value for j, value in enumerate(row)]
        for i, row in enumerate(cosines)
    ]
    before = fast(*rows_with_cosines(cosines), torch.tensor(groups)).item()
    assert fast(*rows_with_cosines(changed), torch.tensor(groups)).item() == before


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_captions_of_other_pictures_are_negatives(name):
    fast, _ = CONTRASTIVE[name]
    near = rows_with_cosines([[0.5, 0.6], [0.0, 0.5]])
    far = rows_with_cosines([[0.5, 0.0], [0.0, 0.5]])
    for groups in (None, torch.tensor([0, 1])):
        assert fast(*near, groups).item() > fast(*far, groups).item()


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_batch_of_one_picture_gives_a_finite_loss_and_gradient(name):
    fast, _ = CONTRASTIVE[name]
    images = unit_rows(3, 4, 0).float().requires_grad_()
    loss = fast(images, unit_rows(3, 4, 1).float(), torch.zeros(3, dtype=torch.int64))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(images.grad).all()


# ---------------------------------------------------------------------------- gradients

GROUPS = torch.tensor([0, 1, 1, 2, 0])


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y, s, c: objectives.squared_distance_loss(x, y),
        lambda x, y, s, c: objectives.squared_uniformity_loss(x, y, 0.7, 2.0),
        lambda x, y, s, c: objectives.clip_loss(x, y, s),
        lambda x, y, s, c: objectives.clip_loss(x, y, s, GROUPS),
        lambda x, y, s, c: objectives.siglip_loss(x, y, s, c),
        lambda x, y, s, c: objectives.siglip_loss(x, y, s, c, GROUPS),
        lambda x, y, s, c: objectives.triplet_loss(x, y, 0.2),
        lambda x, y, s, c: objectives.triplet_loss(x, y, 0.2, GROUPS),
    ],
)
def test_gradients_are_those_of_finite_differences(loss):
    images, texts = unit_rows(5, 4, 3).requires_grad_(), unit_rows(5, 4, 4).requires_grad_()
    scale = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (images, texts, scale, bias))


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_losses_stay_finite_at_the_largest_scale_in_half_precision(scale):
    images, texts = unit_rows(8, 6, 5).bfloat16(), unit_rows(8, 6, 6).bfloat16()
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert torch.isfinite(objectives.clip_loss(images, texts, scale, groups))
    assert torch.isfinite(objectives.siglip_loss(images, texts, scale, -10.0, groups))
    assert torch.isfinite(objectives.triplet_loss(images, texts, groups=groups))


@pytest.mark.parametrize("pairs_at_a_time", [1, 20, 33])  # one row, two and three of ten
@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y, s, c, g: objectives.squared_uniformity_loss(x, y),
        lambda x, y, s, c, g: objectives.clip_loss(x, y, s, g),
        lambda x, y, s, c, g: objectives.siglip_loss(x, y, s, c, g),
        lambda x, y, s, c, g: objectives.triplet_loss(x, y, 0.2, g),
    ],
    ids=["squared+uniformity", *CONTRASTIVE],
)
@pytest.mark.parametrize("groups", [None, torch.arange(5).repeat_interleave(2)])
def test_rows_compared_block_by_block_give_the_same_loss_and_gradients(
    loss, groups, pairs_at_a_time, monkeypatch
):
    def measured():
        leaves = [unit_rows(10, 6, seed).requires_grad_() for seed in (7, 8)]
        leaves += [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (9.0, -3.0)]
        value = loss(*leaves, groups)
        return [value, *torch.autograd.grad(value, leaves, materialize_grads=True)]

    whole = measured()
    monkeypatch.setattr(objectives, "_PAIRS_AT_A_TIME", pairs_at_a_time)
    for blocks, expected in zip(measured(), whole, strict=True):
        torch.testing.assert_close(blocks, expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------- collapse

PAIRS = 200
CHANCE = 100 * 10 / PAIRS  # R@10 in percent


def noisy_pairs(n, seed):
    """(n, 24) and (n, 16): two noisy linear views of the same (n, 8) hidden causes."""
    views = torch.Generator().manual_seed(0)  # the same for training and held-out pairs
    left, right = torch.randn(8, 24, generator=views), torch.randn(8, 16, generator=views)
    drawn = torch.Generator().manual_seed(seed)
    causes = torch.randn(n, 8, generator=drawn)
    x = causes @ left + torch.randn(n, 24, generator=drawn)
    return x, causes @ right + torch.randn(n, 16, generator=drawn)


def train_two_towers(loss):
    """Held-out metrics of two small perceptrons trained for 300 steps on 256 pairs by `loss`."""
    torch.manual_seed(0)
    towers = [
        torch.nn.Sequential(torch.nn.Linear(f, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        for f in (24, 16)
    ]

    def embed(views):
        return [
            torch.nn.functional.normalize(tower(view), dim=1)
            for tower, view in zip(towers, views, strict=True)
        ]

    weights = [weight for tower in towers for weight in tower.parameters()]
    # Strong weight decay: what the loss does not hold on to is gone within the 300 steps.
    optimiser = torch.optim.AdamW(weights, lr=0.03, weight_decay=1.0)
    views = noisy_pairs(256, seed=1)
    for _ in range(300):
        optimiser.zero_grad()
        loss(*embed(views)).backward()
        optimiser.step()
    with torch.no_grad():
        images, texts = (rows.numpy() for rows in embed(noisy_pairs(PAIRS, seed=2)))
    spread = max(metrics.uniformity(images), metrics.uniformity(texts))
    return spread, metrics.retrieval_metrics(images, texts, np.arange(PAIRS))


def test_squared_distance_alone_collapses_to_one_point_and_recall_to_chance():
    spread, recalls = train_two_towers(objectives.squared_distance_loss)
    assert spread > -0.01
    assert recalls["t2i_r@10"] < 3 * CHANCE
    assert recalls["i2t_r@10"] < 3 * CHANCE


@pytest.mark.parametrize(
    "loss",
    [
        objectives.squared_uniformity_loss,
        lambda x, y: objectives.clip_loss(x, y, 10.0),
        lambda x, y: objectives.siglip_loss(x, y, 10.0, -5.0),
        objectives.triplet_loss,
    ],
    ids=["squared+uniformity", "clip", "siglip", "triplet"],
)
def test_companion_terms_prevent_the_collapse(loss):
    spread, recalls = train_two_towers(loss)
    assert spread < -0.5
    assert recalls["t2i_r@10"] > 6 * CHANCE
    assert recalls["i2t_r@10"] > 6 * CHANCE
