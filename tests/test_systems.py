"""The systems that are compared: each part on cases worked out by hand, and the whole in small."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from test_benchmarks import run_benchmark

from retriever.metrics import retrieval_metrics
from retriever.towers import DualEncoder

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import systems
from baselines import compression
from baselines.autoencoder import Autoencoder
from baselines.bags import BagOfPatches, BagOfWords, patches_of
from baselines.features import SPLITS, Towers, read_splits
from baselines.fit import FitConfig, PooledSource, draw_captions, embed, fit_embeddings
from baselines.fusion import (
    POOLED,
    CosineMatcher,
    CrossAttentionMatcher,
    FusionConfig,
    PooledMatcher,
    confusing_batches,
    match_loss,
)
from baselines.heads import Heads
from baselines.reranking import Direction, Reranked, Shortlist, rerank
from baselines.resnet_lstm import ResNetLSTM
from baselines.variational import VariationalAutoencoder, kl_to_prior, product_of_experts

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (30, 60, 220)}
SHADES = ("dark", "bright")
SIZES = {"train": 24, "val": 6, "test": 6}


def make_dataset(folder: Path) -> Path:
    """Pictures whose left and right halves are coloured, with two captions each."""
    rng = np.random.default_rng(0)
    names = list(COLOURS)
    (folder / "images").mkdir(parents=True)
    lines = []
    for split, count in SIZES.items():
        for i in range(count):
            left, right = names[i % 3], names[(i + 1 + i // 3) % 3]
            pixels = np.empty((32, 32, 3))
            pixels[:, :16], pixels[:, 16:] = COLOURS[left], COLOURS[right]
            pixels += rng.normal(0, 8, pixels.shape)
            file = f"images/{split}{i}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / file)
            captions = [f"a {left} half beside a {right} half", f"{left} and {right}, picture {i}"]
            lines.append(json.dumps({"file": file, "captions": captions, "split": split}))
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def make_towers(folder: Path) -> Path:
    """A checkpoint of small towers that were never trained."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from retriever.checkpoints import save_checkpoint

    words = ["[PAD]", "a", "half", "beside", "and", "picture", ",", *COLOURS, *map(str, range(30))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    image = {"tower": "cnn", "width": 8, "size": 32, "resize": "squash"}
    image |= {"interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    text = {"tower": "transformer", "vocabulary": len(words), "width": 16, "max_tokens": 16}
    text |= {"layers": 1, "heads": 2, "hidden": 32}
    torch.manual_seed(0)
    model = DualEncoder({"dim": 8, "dropout": 0.0, "image": image, "text": text})
    save_checkpoint(folder, model, tokenizer, {})
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("pairs") / "halves")


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_towers(tmp_path_factory.mktemp("towers") / "towers.ckpt")


# ── features ─────────────────────────────────────────────────────────────────────────────────────


def test_features_are_those_of_the_towers(dataset: Path, towers: Path, tmp_path: Path) -> None:
    loaded = Towers.load(tmp_path, towers)
    (tmp_path / "cache").mkdir()
    splits = read_splits(dataset)
    found = loaded.features(splits, pytest.fail)
    assert tuple(found) == SPLITS
    test = found["test"]
    pixels = [np.asarray(Image.open(pair.path).convert("RGB")) for pair in splits["test"]]
    texts = [one.text for pair in splits["test"] for one in pair.captions]
    ids = [loaded.tokenizer.encode(text).ids for text in texts]
    with torch.inference_mode():
        images = loaded.model.image_features(torch.from_numpy(np.stack(pixels)))
        states = [
            loaded.model.text_features(torch.tensor([one]), torch.ones(1, len(one)))[0]
            for one in ids
        ]
    tolerance = 0.03  # of bfloat16, where the processor has it
    torch.testing.assert_close(test.images, images, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(test.texts, torch.stack(states), atol=tolerance, rtol=tolerance)
    assert test.lengths.tolist() == [len(one) for one in ids]
    assert test.picture.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert test.regions.shape == (6, 4, 64)  # two by two cells of 64 channels
    tokens, mask = test.tokens_of(np.array([3, 0]))
    assert mask.sum(dim=1).tolist() == [len(ids[3]), len(ids[0])]
    for place, row in enumerate((3, 0)):
        mean = tokens[place][mask[place]].mean(dim=0)
        torch.testing.assert_close(mean, states[row], atol=tolerance, rtol=tolerance)


def test_all_captions_of_a_picture_are_drawn_before_one_is_drawn_again() -> None:
    picture = np.array([0, 0, 0, 1, 2, 2])
    drawn = draw_captions(picture, 3, np.random.default_rng(0))
    assert sorted(drawn[0].tolist()) == [0, 1, 2]
    assert drawn[1].tolist() == [3, 3, 3]
    assert set(drawn[2].tolist()) == {4, 5}


# ── systems with embeddings ──────────────────────────────────────────────────────────────────────


def test_the_product_of_experts_adds_precisions_and_weighs_means_by_them() -> None:
    first = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    second = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, -math.log(2)]])
    mean, log_variance = product_of_experts(first, second)
    # With the prior: precisions 1 + 1 + 1 and 1 + 1 + 2.
    torch.testing.assert_close(mean, torch.tensor([[4 / 3, 2.0]]))
    torch.testing.assert_close(log_variance.exp(), torch.tensor([[1 / 3, 1 / 4]]))


def test_the_divergence_from_the_prior_is_zero_only_there() -> None:
    zero = torch.zeros(1, 3)
    assert kl_to_prior(zero, zero).item() == 0
    assert kl_to_prior(zero + 1, zero).item() == pytest.approx(1.5)
    assert kl_to_prior(zero, zero + math.log(4)).item() == pytest.approx(1.5 * (3 - math.log(4)))


def make_source(n: int, seed: int) -> PooledSource:
    """Two views of the same hidden numbers, by fixed random maps."""
    maps = torch.Generator().manual_seed(7)
    left, right = torch.randn(6, 20, generator=maps), torch.randn(6, 12, generator=maps)
    hidden = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    picture = np.repeat(np.arange(n), 2)
    return PooledSource(hidden @ left, (hidden @ right)[picture], picture)


SYSTEMS = {
    "heads": lambda: Heads((20, 12), 8, "clip"),
    "autoencoder": lambda: Autoencoder((20, 12), 8, "squared", hidden=32),
    "autoencoder with contrast": lambda: Autoencoder((20, 12), 8, "clip", hidden=32),
    "variational": lambda: VariationalAutoencoder((20, 12), 8, hidden=32, warmup=10),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_each_system_learns_which_views_belong_together(name: str) -> None:
    torch.manual_seed(0)
    system = SYSTEMS[name]()
    held_out = make_source(50, 1)
    config = FitConfig(epochs=12, batch_size=64, lr=5e-3)
    log = fit_embeddings(system, make_source(512, 0), held_out, config, lambda line: None)
    sums = [entry["metrics"]["rsum"] for entry in log]
    chance = 2 * (1 + 5 + 10) / 50 * 100
    assert max(sums) > 2 * chance
    # The weights are those of the best epoch, and its record can be had again.
    images, texts = embed(system, held_out)
    assert images.shape == (50, 8)
    assert np.linalg.norm(images, axis=1) == pytest.approx(1)
    assert retrieval_metrics(images, texts, held_out.picture)["rsum"] == max(sums)


def test_squared_distance_alone_collapses_and_uniformity_prevents_it() -> None:
    ends = {}
    for objective in ("squared", "squared+uniformity"):
        torch.manual_seed(0)
        config = FitConfig(epochs=40, batch_size=64, lr=1e-2, patience=40)
        log = fit_embeddings(
            Heads((20, 12), 8, objective), make_source(512, 0), make_source(50, 1), config,
            lambda line: None,
        )  # fmt: skip
        ends[objective] = log[-1]
    assert ends["squared"]["uniformity"] > -0.6
    assert ends["squared+uniformity"]["uniformity"] < -1.5
    assert ends["squared"]["alignment"] < ends["squared+uniformity"]["alignment"] + 0.5
    assert ends["squared"]["metrics"]["rsum"] < ends["squared+uniformity"]["metrics"]["rsum"]


def test_resnet_and_lstm_embed_padded_captions_as_they_are_alone() -> None:
    torch.manual_seed(0)
    image = {"tower": "cnn", "size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    text = {"tower": "gru", "vocabulary": 9, "width": 16, "max_tokens": 8}
    config = {"dim": 8, "dropout": 0.0, "image": image, "text": text}
    model = ResNetLSTM(config, "clip").eval()
    assert isinstance(model.text_tower.gru, torch.nn.LSTM)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    with torch.inference_mode():
        both = model.embed_texts((ids, (ids > 0).long()))
        alone = model.embed_texts((ids[1:, :2], torch.ones(1, 2, dtype=torch.long)))
    torch.testing.assert_close(both[1:], alone)
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    loss = model.loss(pixels, (ids[[0, 0, 1]], (ids[[0, 0, 1]] > 0).long()), torch.arange(3))
    loss.backward()
    grads = [one.grad for one in model.image_tower.parameters()]
    assert all(one is not None and torch.isfinite(one).all() for one in grads)


def test_towers_from_scratch_know_the_words_of_the_captions(tmp_path: Path) -> None:
    bench = systems.Bench(make_dataset(tmp_path / "data"), tmp_path, systems.DEFAULTS, print)
    model, tokenizer = systems.small_towers(bench, "clip")
    assert tokenizer.get_vocab_size() == model.config["text"]["vocabulary"]
    assert "[UNK]" not in tokenizer.encode("a red half beside a green half").tokens


# ── bags ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_word_that_every_text_has_weighs_nothing() -> None:
    bag = BagOfWords(["a dog", "a cat", "a dog and a dog"], vocabulary=3)
    assert list(bag.places) == ["a", "dog", "and"]
    rows = bag(["a dog", "a", "dog and dog", "zebra"])
    assert rows[0].tolist() == [0, 1, 0]
    assert rows[1].tolist() == [0, 0, 0]
    weights = np.array([(1 + math.log(2)) * math.log(3 / 2), math.log(3)])
    assert rows[2, 1:].numpy() == pytest.approx(weights / np.linalg.norm(weights))
    assert rows[3].tolist() == [0, 0, 0]


def test_patches_are_the_same_in_another_light() -> None:
    pixels = torch.randint(60, 120, (1, 16, 16, 3), dtype=torch.uint8)
    brighter = (pixels.int() + 50).to(torch.uint8)
    assert patches_of(pixels).shape == (1, 9, 192)
    torch.testing.assert_close(patches_of(pixels), patches_of(brighter), atol=1e-4, rtol=0)


def test_the_histogram_of_a_picture_is_the_sum_of_its_quarters(
    dataset: Path, tmp_path: Path
) -> None:
    from retriever.samples import Pictures

    pictures = Pictures(read_splits(dataset)["train"], 32, tmp_path, pytest.fail)
    rows = BagOfPatches.fit(pictures, count=10)(pictures)
    assert rows.shape == (24, 50)
    assert rows.square().sum(dim=1).numpy() == pytest.approx(1)
    counts = rows.square().view(24, 5, 10)
    torch.testing.assert_close(counts[:, 0], counts[:, 1:].sum(dim=1))


# ── ranking again ────────────────────────────────────────────────────────────────────────────────


def unit_rows(n: int, d: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_query_whose_positive_is_no_candidate_keeps_its_rank() -> None:
    direction = Direction(
        queries=np.arange(3),
        candidates=np.array([[4, 2, 7], [1, 5, 0], [3, 8, 9]]),
        scores=np.array([[0.9, 0.8, 0.7]] * 3, np.float32),
        is_match=np.array([[0, 0, 1], [0, 0, 0], [1, 0, 1]], bool),
        ranks=np.array([2, 17, 0]),
    )
    assert direction.ranked_again(direction.scores).tolist() == [2, 17, 0]
    assert direction.ranked_again(np.array([[1, 2, 3]] * 3)).tolist() == [0, 17, 0]
    assert direction.ranked_again(np.array([[1, 2, 1]] * 3)).tolist() == [2, 17, 1]


def test_weight_zero_changes_nothing_and_a_perfect_judge_lifts_all_candidates() -> None:
    images, texts = unit_rows(30, 6, 0), unit_rows(60, 6, 1)
    picture = np.repeat(np.arange(30), 2)
    shortlist = Shortlist.of(images, texts, picture, top=8)
    perfect = [one.is_match.astype(np.float32) for one in (shortlist.t2i, shortlist.i2t)]
    found = Reranked(shortlist, picture, *perfect, seconds_per_query=0.0, stored_bytes=0)
    before = found.at(0.0)
    assert before.t2i.tolist() == shortlist.t2i.ranks.tolist()
    assert before.i2t.tolist() == shortlist.i2t.ranks.tolist()
    within = shortlist.t2i.ranks < 8
    assert (found.at(math.inf).t2i == np.where(within, 0, shortlist.t2i.ranks)).all()
    assert found.best().worth == found.at(math.inf).worth > before.worth


def test_of_some_queries_those_of_all_are_a_part() -> None:
    images, texts = unit_rows(12, 6, 0), unit_rows(36, 6, 1)
    picture = np.repeat(np.arange(12), 3)
    some = Shortlist.of(images, texts, picture, top=5, captions=1, pictures=4)
    assert some.t2i.queries.tolist() == list(range(0, 36, 3))
    assert some.i2t.queries.tolist() == [0, 3, 6, 9]
    whole = Shortlist.of(images, texts, picture, top=5)
    assert (some.t2i.candidates == whole.t2i.candidates[::3]).all()
    assert (some.i2t.ranks == whole.i2t.ranks[::3]).all()


def test_the_loss_looks_at_matches_and_at_the_hardest_of_the_others() -> None:
    right = torch.full((4, 4), -20.0).fill_diagonal_(20.0)
    assert match_loss(right, 1.0).item() == pytest.approx(0, abs=1e-6)
    one_wrong = right.clone()
    one_wrong[0, 1] = 20.0
    # It is among the three hardest of its row and of its column, of 24 that are looked at.
    assert match_loss(one_wrong, 0.0).item() == pytest.approx(2 * 20 / 24, rel=1e-4)
    assert match_loss(torch.zeros(4, 4), 1.0).item() == pytest.approx(
        2 * math.log(2) + math.log(4), rel=1e-4
    )


def test_batches_hold_each_picture_once_and_bring_neighbours_together() -> None:
    # Pictures of four families, each confused with those of its own.
    n, family = 64, np.arange(64) // 16
    near = np.stack([np.flatnonzero((family == family[i]) & (np.arange(n) != i)) for i in range(n)])
    config = FusionConfig(batch_size=16, neighbours=8)
    batches = list(confusing_batches(near, config, np.random.default_rng(0)))
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    groups = np.concatenate(batches).reshape(-1, 8)
    assert all(len(set(family[group])) == 1 for group in groups)


def test_neighbours_are_other_pictures_nearest_first() -> None:
    images = np.array([[1, 0], [0.8, 0.6], [0, 1], [-1, 0]], np.float32)
    near = systems.neighbours_of(images, images[[0, 0, 1, 2, 3]], np.array([0, 0, 1, 2, 3]), 2)
    assert near.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]


@pytest.mark.parametrize("fusion", POOLED)
def test_a_pooled_classifier_judges_all_pairs_as_it_judges_one(fusion: str) -> None:
    torch.manual_seed(0)
    matcher = PooledMatcher((20, 12), fusion, width=16).eval()
    images, texts = torch.randn(3, 20), torch.randn(5, 12)
    with torch.inference_mode():
        seen, read = matcher.encode_images(images), matcher.encode_texts(texts)
        pairs = matcher.compare(seen, read)
        assert pairs.shape == (3, 5)
        alone = matcher.compare((seen[0][1:2],), (read[0][3:4],))
        torch.testing.assert_close(alone, pairs[1:2, 3:4])


def test_cross_attention_looks_at_no_padding() -> None:
    torch.manual_seed(0)
    matcher = CrossAttentionMatcher(
        (10, 12), CosineMatcher((20, 12), 8, "clip"), width=16, relation=8
    ).eval()
    images = torch.randn(3, 4, 10), torch.randn(3, 20)
    tokens, pooled = torch.randn(2, 5, 12), torch.randn(2, 12)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    with torch.inference_mode():
        seen = matcher.encode_images(images)
        pairs = matcher.compare(seen, matcher.encode_texts((tokens, mask, pooled)))
        alone = matcher.encode_texts((tokens[1:, :2], mask[1:, :2], pooled[1:]))
        alone = matcher.compare(seen, alone)
        assert pairs.shape == (3, 2)
        torch.testing.assert_close(pairs[:, 1:], alone)


def test_a_shortlist_is_judged_query_by_query(dataset: Path, towers: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    features = Towers.load(tmp_path, towers).features(read_splits(dataset), pytest.fail)["test"]
    torch.manual_seed(0)
    matcher = PooledMatcher((64, 16), "product", width=16)
    shortlist = Shortlist.of(unit_rows(6, 4, 0), unit_rows(12, 4, 1), features.picture, top=4)
    found = rerank(shortlist, matcher, features)
    with torch.inference_mode():
        seen = matcher.encode_images(features.images)
        pairs = matcher.compare(seen, matcher.encode_texts(features.texts)).numpy()
    tolerance = 0.02  # bfloat16
    for caption, candidates in enumerate(shortlist.t2i.candidates):
        assert found.t2i[caption] == pytest.approx(pairs[candidates, caption], abs=tolerance)
    for picture, candidates in enumerate(shortlist.i2t.candidates):
        assert found.i2t[picture] == pytest.approx(pairs[picture, candidates], abs=tolerance)


# ── smaller models ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def bottleneck(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An inverted bottleneck of eight channels, of which one gives nothing and one a constant."""
    from retriever.export import export_tower

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up = torch.nn.Conv2d(3, 8, 1)
            self.middle = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.down = torch.nn.Conv2d(8, 4, 1)
            with torch.no_grad():
                self.down.weight[:, 2] = 0
                self.up.weight[5], self.up.bias[5] = 0, 2
                self.middle.weight[5] = torch.tensor([[0, 0, 0], [0, 1.5, 0], [0, 0, 0]])

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            scaled = pixels.permute(0, 3, 1, 2).float() / 255
            hidden = self.middle(self.up(scaled).clamp(0, 6)).clamp(0, 6)
            return torch.nn.functional.normalize(self.down(hidden).mean(dim=(2, 3)), dim=1)

    path = tmp_path_factory.mktemp("onnx") / "tower.onnx"
    pixels = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    export_tower(Network().eval(), {"pixels": pixels}, {0: "batch"}, path)
    return compression.unfolded(path, path.with_name("plain.onnx"))


def photographs(places: slice) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    return pixels[places]


def test_channels_that_tell_nothing_are_the_first_to_go(bottleneck: Path, tmp_path: Path) -> None:
    rows, _ = compression.run(bottleneck, photographs, 20)
    fewer = compression.prune_channels(bottleneck, tmp_path / "fewer.onnx", 0.25, multiple=1)
    shapes = [list(one.dims) for one in onnx.load(fewer).graph.initializer if len(one.dims) == 4]
    assert shapes == [[6, 3, 1, 1], [6, 1, 3, 3], [4, 6, 1, 1]]
    assert compression.run(fewer, photographs, 20)[0] == pytest.approx(rows, abs=1e-6)
    too_few = compression.prune_channels(bottleneck, tmp_path / "few.onnx", 0.75, multiple=1)
    assert compression.run(too_few, photographs, 20)[0] != pytest.approx(rows, abs=1e-3)


def test_a_network_without_bottlenecks_is_told(bottleneck: Path, tmp_path: Path) -> None:
    model = onnx.load(bottleneck)
    del model.graph.node[:]
    onnx.save(model, tmp_path / "empty.onnx")
    with pytest.raises(ValueError, match="no inverted bottlenecks"):
        compression.prune_channels(tmp_path / "empty.onnx", tmp_path / "out.onnx", 0.5)


def test_the_smallest_weights_become_zero(
    bottleneck: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "SMALL", 24)
    pruned = compression.prune_weights(bottleneck, tmp_path / "pruned.onnx", 0.5)
    before, after = (
        {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}
        for path in (bottleneck, pruned)
    )
    for name, values in before.items():
        if values.ndim == 4 and values.shape[1] > 1:
            zero = after[name] == 0
            assert zero.sum() == pytest.approx(values.size / 2, abs=1)
            assert np.abs(values[zero]).max() <= np.abs(values[~zero]).min()
        else:
            assert (after[name] == values).all()
    assert compression.packed_mb(pruned) < compression.packed_mb(bottleneck)


def test_int8_gives_nearly_the_same_rows(bottleneck: Path, tmp_path: Path) -> None:
    rows, ms = compression.run(bottleneck, photographs, 20)
    assert ms > 0
    small = compression.quantise(bottleneck, tmp_path / "int8.onnx", [photographs(slice(8))])
    found, _ = compression.run(small, photographs, 20)
    assert np.sum(found * rows, axis=1).min() > 0.98
    assert found != pytest.approx(rows, abs=1e-6)


def test_the_linear_map_undoes_a_rotation() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 5))
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))
    assert rows @ turn @ compression.linear_map(rows @ turn, rows) == pytest.approx(rows, abs=0.05)
    far = compression.linear_map(rows @ turn, rows, ridge=1e6)
    assert far == pytest.approx(np.eye(5), abs=1e-4)


# ── the command ──────────────────────────────────────────────────────────────────────────────────


def test_the_systems_are_trained_measured_and_not_trained_again(
    dataset: Path, towers: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    options = ["--work", work, "--towers", towers, "--checkpoint", towers, "--model", towers]
    options += ["--image-size", 32, "--scratch-epochs", 1, "--epochs", 2, "--fusion-epochs", 1]
    options += ["--dim", 16, "--top", 4, "--resamples", 20, "--threads", 1]
    only = "cnn-squared,resnet-contrastive,bags,autoencoder,variational,frozen,mini,fusion"
    record = run_benchmark(
        "systems", dataset, *options, "--only", only, folder=tmp_path, plots=["", "epochs"]
    )
    numbers = record["numbers"]
    assert list(numbers) == [name for name in systems.SYSTEMS if name.startswith(only_of(only))]
    for name, rows in numbers.items():
        for row in rows:
            assert 0 <= row["intervals"]["t2i_r@1"][0] <= row["metrics"]["t2i_r@1"] <= 100
        if name != "mini":
            epochs = len(rows[0]["log"])
            by_name = {"fusion-cosine": 2, "fusion-attention": 3, "fusion-attention-own": 3}
            is_short = name.startswith(("cnn", "resnet", "fusion"))
            assert epochs == by_name.get(name, 1 if is_short else 2)
            assert rows[0]["seconds"] > 0
            assert 0 < rows[0]["trained"] <= rows[0]["parameters"]
    assert all(one == 0 for one in numbers["mini"][0]["differences"].values())
    kept = {path: path.stat().st_mtime_ns for path in (work / "rows").iterdir()}
    again = run_benchmark(
        "systems", dataset, *options, "--only", "mini,bags", folder=tmp_path, plots=["", "epochs"]
    )
    assert again["numbers"] == {
        name: numbers[name] for name in ("bags", "bags-variational", "mini")
    }
    assert kept == {path: path.stat().st_mtime_ns for path in (work / "rows").iterdir()}


def only_of(names: str) -> tuple[str, ...]:
    return tuple(names.split(","))


def test_a_system_that_is_not_there_is_told(dataset: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(systems.main, [str(dataset), "--only", "cnn,perceptron"])
    assert done.exit_code == 2
    assert "no system is called 'perceptron'" in done.output
