import contextlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import write_checkpoint

from retriever import objectives, training
from retriever.checkpoints import average_checkpoints, load_checkpoint, save_checkpoint
from retriever.errors import EncoderError, UsageError
from retriever.samples import Pictures, augment, split_pairs
from retriever.settings import OBJECTIVES, TrainConfig
from retriever.towers import DualEncoder
from retriever.training import _Run, build, train

COLOURS = {"red": (230, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230), "grey": (128,) * 3}
TINY = TrainConfig(image_size=32, dim=16, epochs=3, batch_size=8, threads=1)


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """40 pictures of four colours, each in ten shades; two captions each; no split."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    lines = []
    for name, colour in COLOURS.items():
        for i in range(10):
            noise = rng.integers(-20, 20, (32, 32, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{name}{i}.png")
            record = {"file": f"{name}{i}.png", "captions": [f"all {name}", f"a {name} square"]}
            lines.append(json.dumps(record))
    (root / "captions.jsonl").write_text("\n".join(lines), "utf-8")
    return root


@pytest.fixture(scope="session")
def trained(colours, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "tiny.ckpt"
    train([colours], out, TINY, cache=out.parent / "cache")
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder)[0].state_dict()


def assert_same_weights(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_training_learns_the_colours(colours, tmp_path):
    lines = (colours / "captions.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        # One picture of each colour is held out, so that 100 % recall means: all colours known.
        record["split"] = "val" if record["file"][-5] == "0" else "train"
    shutil.copytree(colours, tmp_path / "d")
    (tmp_path / "d" / "captions.jsonl").write_text("\n".join(map(json.dumps, records)), "utf-8")
    config = replace(TINY, epochs=40, patience=40, lr=3e-3)
    log = train([tmp_path / "d"], tmp_path / "c.ckpt", config, cache=tmp_path)
    assert max(entry["metrics"]["rsum"] for entry in log) == 600
    model, tokenizer = load_checkpoint(tmp_path / "c.ckpt")
    pixels = torch.tensor(list(COLOURS.values()), dtype=torch.uint8)[:, None, None, :]
    images = model.encode_images(pixels.expand(-1, 32, 32, -1))
    ids = torch.tensor([tokenizer.encode(f"all {name}").ids for name in COLOURS])
    texts = model.encode_texts(ids, torch.ones_like(ids))
    assert (texts @ images.T).argmax(dim=1).tolist() == [0, 1, 2, 3]


def test_every_epoch_is_logged_with_recall_and_diagnostics(trained):
    log = json.loads((trained / "log.json").read_text("utf-8"))
    assert [entry["epoch"] for entry in log] == [0, 1, 2]
    for entry in log:
        assert {"t2i_r@1", "t2i_r@5", "t2i_r@10", "i2t_r@1", "rsum"} <= entry["metrics"].keys()
        assert 0 <= entry["alignment"] <= 4
        assert entry["uniformity"] <= 0
        assert entry["modality_gap"] >= 0
    settings = json.loads((trained / "training.json").read_text("utf-8"))
    assert settings["config"]["epochs"] == 3
    assert settings["data"]["pictures"] == 36


def test_same_seed_same_weights_other_seed_other_weights(colours, trained, tmp_path):
    train([colours], tmp_path / "again.ckpt", TINY, cache=tmp_path)
    assert_same_weights(trained, tmp_path / "again.ckpt")
    train([colours], tmp_path / "other.ckpt", replace(TINY, seed=1, epochs=1), cache=tmp_path)
    same = weights(trained)["image_projection.linear.weight"]
    assert not torch.equal(same, weights(tmp_path / "other.ckpt")["image_projection.linear.weight"])


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_and_ends_as_if_undisturbed(colours, trained, tmp_path):
    out = tmp_path / "killed.ckpt"

    def kill(entry):
        if entry.epoch == 1:
            raise Killed

    with pytest.raises(Killed):
        train([colours], out, TINY, cache=tmp_path, on_epoch=kill)
    assert not out.exists()
    seen = []
    train([colours], out, TINY, cache=tmp_path, on_epoch=lambda entry: seen.append(entry.epoch))
    assert seen == [2]
    assert_same_weights(trained, out)
    assert [p.name for p in tmp_path.glob("killed*")] == ["killed.ckpt"]


@pytest.mark.parametrize("settings", [{"finetune": True}, {"views": 2}])
def test_averages_and_frozen_towers_survive_a_kill(settings, colours, trained, tmp_path):
    config = TrainConfig(
        init=str(trained), epochs=3, batch_size=8, patience=3, ema=0.9, threads=1, **settings
    )

    def kill(entry):
        if entry.epoch == 1:
            raise Killed

    with pytest.raises(Killed):
        train([colours], tmp_path / "a.ckpt", config, cache=tmp_path, on_epoch=kill)
    train([colours], tmp_path / "a.ckpt", config, cache=tmp_path)
    train([colours], tmp_path / "b.ckpt", config, cache=tmp_path)
    assert_same_weights(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    state = json.loads((tmp_path / "a.ckpt" / "log.json").read_text("utf-8"))
    assert [entry["epoch"] for entry in state] == [0, 1, 2]


def test_state_of_a_run_from_other_weights_is_not_taken_up(colours, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "init.ckpt")
    config = TrainConfig(init=str(tmp_path / "init.ckpt"), epochs=2, batch_size=8, threads=1)

    def kill(entry):
        raise Killed

    with pytest.raises(Killed):
        train([colours], tmp_path / "a.ckpt", config, cache=tmp_path, on_epoch=kill)
    model, tokenizer = load_checkpoint(trained)
    with torch.no_grad():
        model.text_tower.tokens.weight[1] += 1
    save_checkpoint(tmp_path / "init.ckpt", model, tokenizer, {})
    with pytest.raises(UsageError, match="other settings or data"):
        train([colours], tmp_path / "a.ckpt", config, cache=tmp_path)


def test_state_of_a_run_with_other_settings_is_not_taken_up(colours, tmp_path):
    def kill(entry):
        raise Killed

    with pytest.raises(Killed):
        train([colours], tmp_path / "a.ckpt", TINY, cache=tmp_path, on_epoch=kill)
    with pytest.raises(UsageError, match=r"a\.ckpt\.partial: left by a run with other settings"):
        train([colours], tmp_path / "a.ckpt", replace(TINY, lr=1e-4), cache=tmp_path)


def test_state_of_a_run_on_other_data_is_not_taken_up(colours, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(colours, other)
    (other / "red0.png").unlink()

    def kill(entry):
        raise Killed

    with pytest.raises(Killed):
        train([colours], tmp_path / "a.ckpt", TINY, cache=tmp_path, on_epoch=kill)
    with pytest.raises(UsageError, match="other settings or data"):
        train([other], tmp_path / "a.ckpt", TINY, cache=tmp_path)


def test_state_is_taken_up_after_the_data_was_copied_elsewhere(colours, trained, tmp_path):
    def kill(entry):
        if entry.epoch == 1:
            raise Killed

    with pytest.raises(Killed):
        train([colours], tmp_path / "a.ckpt", TINY, cache=tmp_path, on_epoch=kill)
    copied = shutil.copytree(colours, tmp_path / "copied", copy_function=shutil.copyfile)
    seen = []
    train(
        [copied], tmp_path / "a.ckpt", TINY, cache=tmp_path, on_epoch=lambda e: seen.append(e.epoch)
    )
    assert seen == [2]
    assert_same_weights(trained, tmp_path / "a.ckpt")


def test_a_tower_with_learning_rate_0_stays_as_it_was(colours, trained, tmp_path):
    config = replace(TINY, init=str(trained), finetune=True, epochs=1, image_lr=0.0)
    train([colours], tmp_path / "a.ckpt", config, cache=tmp_path)
    before, after = weights(trained), weights(tmp_path / "a.ckpt")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in changed if name.startswith("image_tower.")]
    assert [name for name in changed if name.startswith("text_tower.")]


def test_a_picture_that_can_be_read_again_is_trained_on(colours, tmp_path):
    folder = tmp_path / "d"
    shutil.copytree(colours, folder)
    good, stat = (folder / "red0.png").read_bytes(), (folder / "red0.png").stat()
    (folder / "red0.png").write_bytes(bytes(len(good)))
    os.utime(folder / "red0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    pairs = split_pairs([folder], 0)[0]
    faults = []
    assert len(Pictures(pairs, 8, tmp_path / "c", faults.append)) == len(pairs) - 1
    (folder / "red0.png").write_bytes(good)
    os.utime(folder / "red0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(Pictures(pairs, 8, tmp_path / "c", faults.append)) == len(pairs)
    assert len(faults) == 1


def test_features_are_gone_on_with_after_a_kill(colours, trained, tmp_path, monkeypatch):
    config = TrainConfig(init=str(trained), epochs=1, batch_size=8, threads=1)
    train([colours], tmp_path / "whole.ckpt", config, cache=tmp_path / "undisturbed")
    monkeypatch.setattr(training, "_FEATURES_PIECE", 10)
    encode, encoded = DualEncoder.image_features, []

    def killed(self, pixels):
        if sum(encoded) >= 20:
            raise Killed
        encoded.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(DualEncoder, "image_features", killed)
    with pytest.raises(Killed):
        train([colours], tmp_path / "a.ckpt", config, cache=tmp_path / "cache")
    assert encoded == [10, 10]
    encoded[:] = [-1000]
    train([colours], tmp_path / "a.ckpt", config, cache=tmp_path / "cache")
    assert encoded[1:] == [10, 6, 4]  # the rest of 36, then the held-out four
    assert_same_weights(tmp_path / "whole.ckpt", tmp_path / "a.ckpt")


def test_text_weights_without_a_tokenizer_are_a_clear_error(colours, tmp_path):
    config = replace(TINY, text_tower="static", text_weights=str(tmp_path))
    with pytest.raises(EncoderError, match=r"no tokenizer\.json that can be read"):
        train([colours], tmp_path / "a.ckpt", config, cache=tmp_path)


def test_stops_early_when_held_out_recall_no_longer_rises(colours, tmp_path):
    config = replace(TINY, epochs=50, patience=2, lr=1e-9)
    log = train([colours], tmp_path / "a.ckpt", config, cache=tmp_path)
    sums = [entry["metrics"]["rsum"] for entry in log]
    assert len(log) < 50
    assert len(sums) - 1 - int(np.argmax(sums)) == 2


def test_checkpoint_gives_the_same_embeddings_in_another_process(trained, tmp_path):
    model, _ = load_checkpoint(trained)
    pixels = torch.arange(32 * 32 * 3, dtype=torch.uint8).view(1, 32, 32, 3)
    ids = torch.tensor([[2, 3, 4]])
    with torch.inference_mode():
        here = model.encode_images(pixels), model.encode_texts(ids, torch.ones_like(ids))
    code = f"""
import torch, numpy as np
from pathlib import Path
from retriever.checkpoints import load_checkpoint, save_checkpoint
model, _ = load_checkpoint(Path({str(trained)!r}))
pixels = torch.arange(32 * 32 * 3, dtype=torch.uint8).view(1, 32, 32, 3)
ids = torch.tensor([[2, 3, 4]])
with torch.inference_mode():
    rows = [model.encode_images(pixels), model.encode_texts(ids, torch.ones_like(ids))]
np.save({str(tmp_path / "rows.npy")!r}, torch.cat(rows).numpy())
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    there = np.load(tmp_path / "rows.npy")
    np.testing.assert_allclose(torch.cat(here).numpy(), there, atol=1e-5)


def test_frozen_towers_are_run_once_and_stay_as_they_were(colours, trained, tmp_path):
    config = TrainConfig(
        init=str(trained), views=2, epochs=2, batch_size=8, captions_per_picture=1, threads=1
    )
    train([colours], tmp_path / "a.ckpt", config, cache=tmp_path / "cache")
    features = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("features-*.npy")}
    assert len(features) == 5  # training pictures in two views, held-out ones in one, two of texts
    train([colours], tmp_path / "b.ckpt", config, cache=tmp_path / "cache")
    assert {p: p.stat().st_mtime_ns for p in features} == features
    assert_same_weights(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    before, after = weights(trained), weights(tmp_path / "a.ckpt")
    for name in before:
        if "_tower." in name:
            assert torch.equal(before[name], after[name]), name
    name = "image_projection.linear.weight"
    assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize("objective", ["siglip", "triplet", "squared", "squared+uniformity"])
def test_every_objective_trains(objective, colours, tmp_path):
    config = replace(TINY, objective=objective, epochs=2, ema=0.9, token_dropout=0.1)
    log = train([colours], tmp_path / "a.ckpt", config, cache=tmp_path)
    assert len(log) == 2
    assert all(np.isfinite(entry["loss"]) for entry in log)


# ── large batches ──────────────────────────────────────────────────────────────────────────────


def noisy_run(folder: Path, tmp_path: Path, **settings: Any) -> _Run:
    """Fine-tuning with every kind of chance, in float32, with a loss that has all its parts."""
    config = replace(
        TINY, finetune=True, dropout=0.2, token_dropout=0.2, text_tower="transformer", **settings
    )
    pairs, held_out = split_pairs([folder], 0)
    model, tokenizer = build(config, [[c.text for c in pair.captions] for pair in pairs])
    return _Run(config, model, tokenizer, tmp_path / "o", tmp_path, pairs, held_out, print)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_of_a_batch_in_parts_are_those_of_the_whole(
    objective, colours, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "_autocast", lambda device: contextlib.nullcontext())
    run = noisy_run(colours, tmp_path, objective=objective, batch_size=20, micro_batch=6)
    run.model.train()
    [(rows, drawn)] = run._batches(0)
    torch.manual_seed(5)
    loss = run._backward(rows, drawn, run._pixels([(rows, drawn)], 0), 0)
    cached = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    run.model.zero_grad()

    # The same parts with the same chance, but all their graphs kept until the loss is there.
    pixels = run._pixels([(rows, drawn)], 0)
    chunks = [slice(0, 6), slice(6, 12), slice(12, 18), slice(18, 20)]
    torch.manual_seed(5)
    seeds = torch.randint(2**62, (4,)).tolist()
    embedded = []
    for chunk, seed in zip(chunks, seeds, strict=True):
        torch.manual_seed(seed)
        embedded.append(run._embed(rows[chunk], drawn[chunk], pixels, 0))
    whole = run._loss(*map(torch.cat, zip(*embedded, strict=True)))
    whole.backward()
    assert loss.item() == pytest.approx(whole.item(), abs=1e-6)
    plain = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    assert cached.keys() == plain.keys()
    assert {"image_tower.layers.0.weight", "text_tower.tokens.weight"} <= plain.keys()
    assert ("log_scale" in plain) == (objective in ("clip", "siglip"))
    assert ("logit_bias" in plain) == (objective == "siglip")
    for name, gradient in plain.items():
        torch.testing.assert_close(cached[name], gradient, rtol=1e-5, atol=1e-5)


def test_captions_of_a_picture_are_contrasted_with_those_of_others(colours, tmp_path):
    run = noisy_run(colours, tmp_path, text_weight=0.5)
    plain = noisy_run(colours, tmp_path)
    images, first, second = (torch.eye(16)[:3].roll(i, 0) for i in range(3))
    texts = torch.stack([first, second], dim=1).reshape(6, 16)
    scale = run.model.logit_scale
    wanted = plain._loss(images, texts) + 0.5 * objectives.clip_loss(first, second, scale)
    torch.testing.assert_close(run._loss(images, texts), wanted)


def test_token_vectors_have_a_rate_of_their_own(colours, tmp_path):
    run = noisy_run(colours, tmp_path, text_lr=1e-4, token_lr=1e-3)
    rates = {id(p): g["peak_lr"] for g in run.optimizer.param_groups for p in g["params"]}
    tower = run.model.text_tower
    assert rates[id(tower.tokens.weight)] == 1e-3
    assert rates[id(tower.positions.weight)] == 1e-4
    assert len(rates) == len(list(run.model.parameters()))


def test_without_chance_parts_change_nothing(colours, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_autocast", lambda device: contextlib.nullcontext())
    gradients = []
    for size in (36, 36, 7):
        run = noisy_run(colours, tmp_path, batch_size=36, micro_batch=size)
        run.model.eval()  # no dropout, no hidden tokens
        [batch] = run._batches(0)
        run._backward(*batch, run._pixels([batch], 0), 0)
        parameters = run.model.named_parameters()
        gradients.append({name: p.grad for name, p in parameters if p.grad is not None})
    whole, again, parts = gradients
    for name, gradient in whole.items():
        assert torch.equal(again[name], gradient)
        torch.testing.assert_close(parts[name], gradient, rtol=1e-5, atol=1e-5)


def test_a_run_with_parts_is_repeatable(colours, tmp_path):
    config = replace(TINY, epochs=2, batch_size=20, micro_batch=6, token_dropout=0.1)
    for name in ("a.ckpt", "b.ckpt"):
        train([colours], tmp_path / name, config, cache=tmp_path)
    assert_same_weights(tmp_path / "a.ckpt", tmp_path / "b.ckpt")


def test_unknown_objective_names_the_known_ones():
    with pytest.raises(UsageError, match="unknown objective 'nce': choose from clip, siglip"):
        TrainConfig(objective="nce")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_tower": "lstm"}, "unknown text tower 'lstm': choose from gru, static"),
        ({"image_weights": "w.pth"}, "image_weights need an image_tower of timm"),
        ({"text_weights": "folder"}, "text_weights need the text_tower transformer"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**settings)


def dataset(root: Path, splits: list[str | None]) -> Path:
    root.mkdir()
    lines = []
    for i, split in enumerate(splits):
        Image.new("RGB", (8, 8), (i, i, i)).save(root / f"{i}.png")
        record = {"file": f"{i}.png", "captions": [f"number {i}"]}
        lines.append(json.dumps(record | ({"split": split} if split else {})))
    (root / "captions.jsonl").write_text("\n".join(lines), "utf-8")
    return root


def test_test_pictures_are_never_trained_on_and_val_pictures_are_held_out(tmp_path):
    folder = dataset(tmp_path / "d", ["train", "train", None, "val", "test", "val"])
    train_pairs, held_out = split_pairs([folder], 0)
    assert [pair.file for pair in train_pairs] == ["0.png", "1.png", "2.png"]
    assert [pair.file for pair in held_out] == ["3.png", "5.png"]


def test_without_a_val_split_a_tenth_is_held_out(tmp_path):
    folder = dataset(tmp_path / "d", [None] * 30)
    train_pairs, held_out = split_pairs([folder], 0)
    assert len(held_out) == 3
    assert not {p.file for p in train_pairs} & {p.file for p in held_out}
    assert split_pairs([folder], 0) == (train_pairs, held_out)


def test_a_captions_file_beside_its_pictures_adds_to_the_captions_of_the_folder(tmp_path):
    folder = dataset(tmp_path / "d", ["train", "train", "val", "val", "test"])
    lines = [{"file": f"{i}.png", "captions": [f"第{i}", f"number {i}"]} for i in range(5)]
    more = folder / "more.jsonl"
    more.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    train_pairs, held_out = split_pairs([folder, more], 0)
    assert [pair.file for pair in train_pairs] == ["0.png", "1.png"]
    assert [pair.file for pair in held_out] == ["2.png", "3.png"]
    assert [c.text for c in train_pairs[1].captions] == ["number 1", "第1"]
    assert split_pairs([more, folder], 0)[0][1].split == "train"


def test_too_few_pairs_are_refused(tmp_path):
    folder = dataset(tmp_path / "d", ["train", "train", "train", "val"])
    with pytest.raises(UsageError, match="3 to train on and 1 to measure with"):
        split_pairs([folder], 0)


def test_an_unreadable_picture_is_named_and_left_out(colours, tmp_path):
    folder = tmp_path / "d"
    shutil.copytree(colours, folder)
    (folder / "red0.png").write_bytes(b"no picture")
    named = []
    config = replace(TINY, epochs=1)
    for _ in range(2):  # the second run takes the pixels from the cache
        train([folder], tmp_path / "a.ckpt", config, cache=tmp_path, warn=named.append)
    assert len(named) == 2
    assert "red0.png" in named[0]
    assert named[0] == named[1]


def test_a_folder_that_holds_other_files_is_never_replaced(colours, trained, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "diary.txt").write_text("dear diary", encoding="utf-8")
    with pytest.raises(UsageError, match=r"mine holds other files \(diary\.txt\)"):
        train([colours], folder, replace(TINY, epochs=1), cache=tmp_path)
    model, tokenizer = load_checkpoint(trained)
    with pytest.raises(UsageError, match=r"diary\.txt"):
        save_checkpoint(folder, model, tokenizer, {})
    assert [p.name for p in folder.iterdir()] == ["diary.txt"]
    assert not list(tmp_path.glob(".mine*"))


def test_an_earlier_checkpoint_is_replaced_and_nothing_is_left_beside_it(trained, tmp_path):
    model, tokenizer = load_checkpoint(trained)
    for note in (1, 2):
        save_checkpoint(tmp_path / "a.ckpt", model, tokenizer, {"log": [note]})
    assert json.loads((tmp_path / "a.ckpt" / "log.json").read_text("utf-8")) == [2]
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]
    assert_same_weights(trained, tmp_path / "a.ckpt")


def test_the_mean_of_checkpoints_has_the_means_of_their_weights(tmp_path):
    folders = [write_checkpoint(tmp_path / f"{seed}.ckpt", seed=seed) for seed in range(3)]
    states = [load_checkpoint(folder)[0].state_dict() for folder in folders]
    mean, tokenizer = average_checkpoints(folders, image_size=48)
    for name, tensor in mean.state_dict().items():
        torch.testing.assert_close(tensor, sum(state[name] for state in states) / 3)
    assert not torch.equal(
        mean.image_projection.linear.weight, states[0]["image_projection.linear.weight"]
    )
    assert mean.config["image"]["size"] == 48
    assert not mean.training
    save_checkpoint(tmp_path / "mean.ckpt", mean, tokenizer, {})
    assert load_checkpoint(tmp_path / "mean.ckpt")[0].config == mean.config


def test_checkpoints_count_as_much_as_their_weights_say(tmp_path):
    folders = [write_checkpoint(tmp_path / f"{seed}.ckpt", seed=seed) for seed in range(2)]
    one, other = (load_checkpoint(folder)[0].state_dict() for folder in folders)
    mean, _ = average_checkpoints(folders, weights=[3, 1])
    for name, tensor in mean.state_dict().items():
        torch.testing.assert_close(tensor, 0.75 * one[name] + 0.25 * other[name])
    for weights in ([1], [1, -1], [0, 0]):
        with pytest.raises(UsageError, match="each of the 2 checkpoints a weight"):
            average_checkpoints(folders, weights=weights)


def test_checkpoints_of_other_shapes_have_no_mean(tmp_path):
    one = write_checkpoint(tmp_path / "one.ckpt")
    other = write_checkpoint(tmp_path / "other.ckpt", "gru")
    with pytest.raises(UsageError, match=r"other\.ckpt is of another shape"):
        average_checkpoints([one, other])
    with pytest.raises(EncoderError, match="not a checkpoint"):
        average_checkpoints([one, tmp_path])


def test_augmentation_keeps_the_shape_and_follows_the_seed():
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    views = [augment(pixels, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert all(view.shape == (16, 16, 3) and view.dtype == np.uint8 for view in views)
    assert np.array_equal(views[0], views[1])
    assert not np.array_equal(views[0], views[2])


def test_augmented_pictures_may_be_smaller_than_those_that_are_measured(colours, tmp_path):
    run = noisy_run(colours, tmp_path, train_size=24)
    [(rows, _), *_] = batches = run._batches(0)
    assert {views.shape[1:] for views in run._pixels(batches, 0)} == {(24, 24, 3)}
    assert run.held_pictures.batch(np.array([0]), None).shape[1:] == (32, 32, 3)
    # The same crop: a smaller picture of the same colours.
    pixels = np.asarray(run.pictures.batch(rows[:1], None)[0])
    small, large = (augment(pixels, np.random.default_rng(3), size) for size in (8, None))
    assert large.shape == (32, 32, 3)
    np.testing.assert_allclose(small.mean(axis=(0, 1)), large.mean(axis=(0, 1)), atol=3)


def test_a_folder_that_is_no_checkpoint_is_a_clear_error(tmp_path):
    with pytest.raises(EncoderError, match="not a checkpoint that can be loaded"):
        load_checkpoint(tmp_path)
