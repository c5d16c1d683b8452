"""Training a dual encoder on captioned pictures.

Two ways. With frozen towers, each picture and caption goes through its tower once, the features
are cached on disk, and only the two projections are trained: minutes on a CPU. With `finetune`,
the towers learn too, on pictures that are augmented anew in every epoch.

A batch may be larger than memory: beyond `micro_batch` pictures its gradient is put together from
parts of that size. What comes of it all is a checkpoint with a log of one record an epoch. While
training runs, `OUT.partial` beside it holds all that is needed to go on after a kill; the caches
are gone on with as well.
"""

import contextlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from retriever import objectives
from retriever.checkpoints import (
    BERT_TOKENS,
    bert_shape,
    bert_tensors,
    load_backbone,
    load_bert,
    load_checkpoint,
    refuse_other_files,
    save_checkpoint,
)
from retriever.data import Pair
from retriever.encoders import torch_device
from retriever.errors import EncoderError, UsageError
from retriever.metrics import alignment, modality_gap, retrieval_metrics, uniformity
from retriever.samples import Captions, Pictures, fill_array, split_pairs
from retriever.settings import TrainConfig
from retriever.towers import BackboneTower, DualEncoder, TransformerTower
from retriever.vocabulary import extend

# How many pictures or captions go through a tower at once. On a CPU the activations of so few stay
# in the cache: measured, 64 pictures at a time take 26 ms each, 256 take 44.
_PIECE = 64
# Rows of a features file between two notes of how far it is.
_FEATURES_PIECE = 512


@dataclass(frozen=True, slots=True)
class EpochLog:
    """What one epoch gave, measured on the held-out pairs; recalls in percent."""

    epoch: int
    loss: float
    seconds: float
    logit_scale: float
    alignment: float
    uniformity: float
    modality_gap: float
    metrics: dict[str, float] = field(default_factory=dict)


def _autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 where the hardware multiplies it natively, else nothing."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


def _word_tokenizer(captions: Sequence[str], vocabulary: int = 8000) -> Tokenizer:
    """A tokenizer for towers from scratch: lower-case words of the training captions."""
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocabulary, special_tokens=["[PAD]", "[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


def build(config: TrainConfig, captions: Sequence[Sequence[str]]) -> tuple[DualEncoder, Tokenizer]:
    """A dual encoder as the config describes it, with pretrained weights where it names some.

    Args:
        config: of the run.
        captions: of each training pair: they give the vocabulary of a text tower from scratch, and
            the words that a pretrained one learns.

    Raises:
        EncoderError: weights that cannot be read or do not fit.
    """
    if config.init:
        model, tokenizer = load_checkpoint(Path(config.init))
        return model, tokenizer
    text: dict[str, Any] = {"tower": config.text_tower, "max_tokens": config.max_tokens}
    bert = Path(config.text_weights) / "model.safetensors" if config.text_weights else None
    if bert:
        try:
            tokenizer = Tokenizer.from_file(str(bert.with_name("tokenizer.json")))
        except Exception as exc:  # all that tokenizers raises
            raise EncoderError(
                f"{bert.parent}: no tokenizer.json that can be read ({exc})"
            ) from exc
        text |= bert_shape(bert)
        vectors = bert_tensors(bert)[BERT_TOKENS]
        if config.add_words:
            tokenizer, extended = extend(tokenizer, vectors.numpy(), captions, config.add_words)
            vectors = torch.from_numpy(extended)
            text["vocabulary"] = len(vectors)
    else:
        tokenizer = _word_tokenizer([text for several in captions for text in several])
        text |= {"vocabulary": tokenizer.get_vocab_size(), "width": 256}
        text |= {"layers": 2, "heads": 4, "hidden": 1024}
    scratch = config.image_tower == "cnn"
    mean = std = [0.5, 0.5, 0.5]
    if not scratch:
        import timm

        defaults = timm.get_pretrained_cfg(config.image_tower)
        if defaults is None:
            raise UsageError(f"unknown image tower {config.image_tower!r}: cnn, or a name of timm")
        mean, std = list(defaults.mean), list(defaults.std)
    image = {
        "tower": config.image_tower,
        "size": config.image_size,
        "resize": "squash",
        "interpolation": "bicubic",
        "mean": mean,
        "std": std,
    }
    torch.manual_seed(config.seed)
    model = DualEncoder(
        {"dim": config.dim, "dropout": config.dropout, "image": image, "text": text}
    )
    if config.image_weights and isinstance(model.image_tower, BackboneTower):
        load_backbone(model.image_tower, config.image_tower, config.image_weights)
    if bert and isinstance(model.text_tower, TransformerTower):
        load_bert(model.text_tower, bert, vectors)
    elif bert and config.text_tower == "static":
        model.text_tower.load_state_dict({"tokens.weight": vectors}, strict=False)
    return model, tokenizer


# ── the run ────────────────────────────────────────────────────────────────────────────────────


def _digest(*parts: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def _digest_of_tensors(tensors: Iterable[Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def backward_in_chunks(
    chunks: Sequence[Callable[[], tuple[Tensor, ...]]], loss_of: Callable[..., Tensor]
) -> Tensor:
    """The loss of a batch, whose gradients are added to those of all that it depends on.

    Gradient caching: what a backward pass needs is kept of one chunk at a time. All chunks are
    encoded without a graph, the loss says what gradient each embedding has, and then every chunk is
    encoded once more, for its embeddings' gradients to go on through it. As the loss sees nothing
    but embeddings, the gradients are those of the whole batch. Gao et al. 2021, arXiv:2101.06983.

    Args:
        chunks: each encodes its part of the batch into tensors of as many rows as it likes. Called
            twice, and with the same state of torch's random numbers both times.
        loss_of: the tensors of all chunks, one below the other → loss.
    """
    seeds = torch.randint(2**62, (len(chunks),)).tolist()
    encoded = []
    with torch.no_grad():
        for chunk, seed in zip(chunks, seeds, strict=True):
            torch.manual_seed(seed)
            encoded.append(chunk())
    sides = list(zip(*encoded, strict=True))
    whole = [torch.cat(side).requires_grad_() for side in sides]
    loss = loss_of(*whole)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = []
    for leaf, side in zip(whole, sides, strict=True):
        assert leaf.grad is not None
        gradients.append(torch.split(leaf.grad, [len(part) for part in side]))
    for chunk, seed, *parts in zip(chunks, seeds, *gradients, strict=True):
        torch.manual_seed(seed)
        torch.autograd.backward(chunk(), parts)
    return loss.detach()


class _Run:
    """State of one training run: model, optimiser, averages, log; saved after every epoch."""

    def __init__(
        self,
        config: TrainConfig,
        model: DualEncoder,
        tokenizer: Tokenizer,
        out: Path,
        cache: Path,
        train_pairs: Sequence[Pair],
        held_out_pairs: Sequence[Pair],
        warn: Callable[[str], None],
    ) -> None:
        self.config, self.model, self.tokenizer, self.out = config, model, tokenizer, out
        self.partial = out.with_name(out.name + ".partial")
        self.device = torch_device(config.device, config.threads)
        model.to(self.device)
        model.image_tower.to(memory_format=torch.channels_last)
        image, text = model.config["image"], model.config["text"]
        self.pictures = Pictures(train_pairs, image["size"], cache, warn)
        self.held_pictures = Pictures(held_out_pairs, image["size"], cache, warn)
        self.captions = Captions(self.pictures.pairs, tokenizer, text["max_tokens"])
        self.held_captions = Captions(self.held_pictures.pairs, tokenizer, text["max_tokens"])
        if min(len(self.pictures), len(self.held_pictures)) < 2:
            raise UsageError("fewer than two of the pictures can be read")
        self.cached: dict[str, Tensor] = {}
        if not config.finetune:
            self._cache_features(cache)
        groups = self._parameter_groups()
        is_fused = self.device.type in ("cpu", "cuda")  # one pass over the weights, not ten
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=is_fused)
        self.steps_per_epoch = max(len(self.pictures) // config.batch_size, 1)
        # Only these change: nothing else is averaged, kept or saved.
        self.trained = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
        self.average = self.trained
        if config.ema:
            self.average = {k: v.clone() for k, v in self.trained.items()}
        self.log: list[dict[str, Any]] = []
        # A state is taken up only with the very same pictures, captions, vocabulary and towers.
        self.data = _digest(
            self.pictures.content(),
            self.held_pictures.content(),
            self.captions.key,
            self.held_captions.key,
            self.captions.first.tolist(),
            self.held_captions.first.tolist(),
            model.config,
            tokenizer.to_str(),
            _digest_of_tensors(p for p in model.parameters() if not p.requires_grad),
        )
        self.best: dict[str, Tensor] = {}

    def _lr_factor(self, step: int) -> float:
        total = self.steps_per_epoch * self.config.epochs
        warmup = max(int(total * self.config.warmup), 1)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(total - warmup, 1), 1.0)))

    def _parameter_groups(self) -> list[dict[str, Any]]:
        config, model = self.config, self.model
        model.image_tower.requires_grad_(config.finetune)
        model.text_tower.requires_grad_(config.finetune)
        is_pretrained = bool(config.init or config.image_weights)
        for stage in model.image_tower.stages()[: config.freeze_stages]:
            stage.requires_grad_(False)
        for layer in model.image_tower.modules():
            is_depthwise = isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1
            if is_depthwise and is_pretrained and not config.train_depthwise:
                layer.requires_grad_(False)
        image_lr, text_lr = config.image_lr, config.text_lr
        if image_lr is None:
            image_lr = 3e-4 if config.init or config.image_weights else config.lr
        if text_lr is None:
            text_lr = 5e-5 if config.init or config.text_weights else config.lr
        token_lr = config.token_lr or text_lr
        rates = {"image_tower.": image_lr, "text_tower.tokens.": token_lr, "text_tower.": text_lr}
        if not config.finetune:
            rates = dict.fromkeys(rates, 0.0)
        rates[""] = config.lr  # of all that no other prefix fits
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            prefix = next(prefix for prefix in rates if name.startswith(prefix))
            if not rates[prefix]:
                parameter.requires_grad_(False)
            if not parameter.requires_grad:
                continue
            decays = parameter.ndim > 1
            made = {"params": [], "peak_lr": rates[prefix]}
            made["weight_decay"] = config.weight_decay if decays else 0.0
            groups.setdefault((prefix, decays), made)["params"].append(parameter)
        return list(groups.values())

    # ── frozen features ────────────────────────────────────────────────────────────────────────

    def _cache_features(self, cache: Path) -> None:
        model = self.model
        tensors = [v for k, v in model.state_dict().items() if "_tower." in k]
        towers = _digest(model.config["image"], model.config["text"], _digest_of_tensors(tensors))
        model.eval()
        sources = {
            "train": (self.pictures, self.captions, self.config.views),
            "held_out": (self.held_pictures, self.held_captions, 1),
        }
        for which, (pictures, captions, views) in sources.items():
            for view in range(views):
                seed = (self.config.seed, view) if view else None
                name = f"{pictures.key}-{view}-{self.config.seed if view else 0}"
                self.cached[f"{which}.image.{view}"] = self._features(
                    cache / f"features-{towers}-{name}.npy",
                    (len(pictures), model.image_tower.features),
                    partial(self._view_features, pictures, seed),
                )
            self.cached[f"{which}.text"] = self._features(
                cache / f"features-{towers}-{captions.key}.npy",
                (len(captions), model.text_tower.features),
                partial(self._text_features, captions),
            )

    def _features(
        self, path: Path, shape: tuple[int, int], encode: Callable[[NDArray[np.int64]], Tensor]
    ) -> Tensor:
        """(n, f) float32 from the cache file, which is written first if it is not there."""

        @torch.inference_mode()
        def make(rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], None]:
            return encode(rows).cpu().numpy(), None

        fill_array(path, shape, np.float32, make, piece=_FEATURES_PIECE)
        return torch.from_numpy(np.load(path)).to(self.device)

    def _view_features(
        self, pictures: Pictures, seed: tuple[int, int] | None, rows: NDArray[np.int64]
    ) -> Tensor:
        return self._image_features(pictures.batch(rows, seed))

    def _image_features(self, pixels: Tensor) -> Tensor:
        with _autocast(self.device):
            pieces = torch.split(pixels.to(self.device), _PIECE)
            return torch.cat([self.model.image_features(piece) for piece in pieces])

    def _text_features(self, captions: Captions, rows: NDArray[np.int64]) -> Tensor:
        # Captions of like length go together, so that little of the work is padding.
        order = np.argsort(captions.lengths[rows], kind="stable")
        parts = []
        for start in range(0, len(rows), _PIECE):
            ids, mask = captions.batch(rows[order[start : start + _PIECE]])
            if self.model.training and self.config.token_dropout:
                hidden = torch.rand(mask.shape) < self.config.token_dropout
                hidden[:, 0] = False
                mask = mask.masked_fill(hidden, 0)
            with _autocast(self.device):
                parts.append(self.model.text_features(ids.to(self.device), mask.to(self.device)))
        return torch.cat(parts)[torch.from_numpy(np.argsort(order))]

    # ── an epoch ───────────────────────────────────────────────────────────────────────────────

    def _batches(self, epoch: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Pictures (b,) and their captions (b, c) of each batch."""
        rng = np.random.default_rng((self.config.seed, epoch))
        order = rng.permutation(len(self.pictures))
        drawn = self.captions.draw(self.config.captions_per_picture, rng)[order]
        b = min(self.config.batch_size, len(order))
        starts = range(0, self.steps_per_epoch * b, b)
        return [(order[start : start + b], drawn[start : start + b]) for start in starts]

    def _chunks(self, b: int) -> list[slice]:
        """A batch of b pictures in parts, of which one at a time goes through towers that learn."""
        size = self.config.micro_batch if self.config.finetune else b
        return [slice(start, start + size) for start in range(0, b, size)]

    def _pixels(
        self, batches: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]], epoch: int
    ) -> Iterator[Tensor]:
        """Augmented pictures in the order in which `_backward` asks for them, two parts ahead."""
        with ThreadPoolExecutor(1) as pool:
            ahead: deque[Future[Tensor]] = deque()
            for rows, _ in batches:
                chunks = self._chunks(len(rows))
                for chunk in chunks if len(chunks) == 1 else chunks * 2:
                    seed = (self.config.seed, epoch)
                    size = self.config.train_size
                    ahead.append(pool.submit(self.pictures.batch, rows[chunk], seed, size))
                    if len(ahead) > 2:
                        yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _embed(
        self,
        rows: NDArray[np.int64],
        drawn: NDArray[np.int64],
        pixels: Iterator[Tensor],
        epoch: int,
    ) -> tuple[Tensor, Tensor]:
        """(b, d) embeddings of pictures and (b·c, d) of their captions, picture by picture."""
        if self.config.finetune:
            image_features = self._image_features(next(pixels))
            text_features = self._text_features(self.captions, drawn.reshape(-1))
        else:
            chance = np.random.default_rng((self.config.seed, epoch, int(rows[0])))
            view = self.cached[f"train.image.{chance.integers(self.config.views)}"]
            image_features = view.index_select(0, self._on_device(rows))
            text_features = self.cached["train.text"].index_select(
                0, self._on_device(drawn.reshape(-1))
            )
        return self.model.project_images(image_features), self.model.project_texts(text_features)

    def _on_device(self, rows: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(rows).to(self.device)

    def _backward(
        self,
        rows: NDArray[np.int64],
        drawn: NDArray[np.int64],
        pixels: Iterator[Tensor],
        epoch: int,
    ) -> Tensor:
        """The loss of a batch, whose gradients are then in the parameters."""
        chunks = [
            partial(self._embed, rows[chunk], drawn[chunk], pixels, epoch)
            for chunk in self._chunks(len(rows))
        ]
        if len(chunks) > 1:
            return backward_in_chunks(chunks, self._loss)
        loss = self._loss(*chunks[0]())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _loss(self, images: Tensor, texts: Tensor) -> Tensor:
        """The objective of (b, d) pictures and the (b·c, d) captions of these, c of each."""
        config, model = self.config, self.model
        c = len(texts) // len(images)
        groups = torch.arange(len(images), device=self.device).repeat_interleave(c)
        images = images.repeat_interleave(c, dim=0)
        match config.objective:
            case "clip":
                loss = objectives.clip_loss(images, texts, model.logit_scale, groups)
                if config.text_weight:
                    loss = loss + config.text_weight * objectives.clip_loss(
                        texts[::c], texts[1::c], model.logit_scale
                    )
                return loss
            case "siglip":
                scale, bias = model.logit_scale, model.logit_bias
                return objectives.siglip_loss(images, texts, scale, bias, groups)
            case "triplet":
                return objectives.triplet_loss(images, texts, groups=groups)
            case "squared":
                return objectives.squared_distance_loss(images, texts)
            case _:
                return objectives.squared_uniformity_loss(images[::c], texts[::c])

    def _update_average(self, step: int) -> None:
        if self.average is self.trained:
            return
        # The decay grows with the steps, so that the first weights do not linger in a short run.
        decay = min(self.config.ema, (1 + step) / (10 + step))
        for name, value in self.trained.items():
            self.average[name].lerp_(value, 1 - decay)

    def train_epoch(self, epoch: int, progress: Callable[[int, int], None] | None) -> float:
        """Mean loss of one pass over the training pictures."""
        torch.manual_seed(self.config.seed * 100_003 + epoch)
        self.model.train()
        losses = []
        batches = self._batches(epoch)
        pixels = self._pixels(batches, epoch)
        for step, (rows, drawn) in enumerate(batches):
            done = epoch * self.steps_per_epoch + step
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * self._lr_factor(done)
            self.model.zero_grad(set_to_none=True)
            losses.append(self._backward(rows, drawn, pixels, epoch))
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self._update_average(done)
            if progress:
                progress(step + 1, self.steps_per_epoch)
        return torch.stack(losses).double().mean().item()

    @torch.inference_mode()
    def held_out(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Embeddings of the held-out pictures (n, d) and captions (m, d), by averaged weights."""
        current = {k: v.clone() for k, v in self.trained.items()}
        self.model.load_state_dict(self.average, strict=False)
        self.model.eval()
        if self.config.finetune:
            n = len(self.held_pictures)
            pieces = np.array_split(np.arange(n), math.ceil(n / _PIECE))
            image_features = torch.cat(
                [self._image_features(self.held_pictures.batch(rows, None)) for rows in pieces]
            )
            captions = np.arange(len(self.held_captions))
            text_features = self._text_features(self.held_captions, captions)
        else:
            image_features = self.cached["held_out.image.0"]
            text_features = self.cached["held_out.text"]
        images = self.model.project_images(image_features).cpu().numpy()
        texts = self.model.project_texts(text_features).cpu().numpy()
        self.model.load_state_dict(current, strict=False)
        return images, texts

    def measure(self, epoch: int, loss: float, started: float) -> EpochLog:
        """The epoch's record; better weights than any before are kept."""
        images, texts = self.held_out()
        picture = self.held_captions.picture
        metrics = retrieval_metrics(images, texts, picture)
        log = EpochLog(
            epoch=epoch,
            loss=loss,
            seconds=time.monotonic() - started,
            logit_scale=self.model.logit_scale.item(),
            alignment=alignment(images[picture], texts),
            uniformity=(uniformity(images) + uniformity(texts)) / 2,
            modality_gap=modality_gap(images, texts),
            metrics=metrics,
        )
        if not self.log or metrics["rsum"] > max(e["metrics"]["rsum"] for e in self.log):
            self.best = {k: v.clone() for k, v in self.average.items()}
        self.log.append(asdict(log))
        return log

    # ── going on after a kill ──────────────────────────────────────────────────────────────────

    def save(self) -> None:
        """Everything needed to go on, as safetensors and JSON, replaced in one step."""
        tensors = {f"model.{k}": v for k, v in self.trained.items()}
        if self.average is not self.trained:
            tensors |= {f"average.{k}": v for k, v in self.average.items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        state = self.optimizer.state_dict()
        for index, values in state["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        self.partial.mkdir(parents=True, exist_ok=True)
        temporary = self.partial / "state.tmp"
        save_file(
            {k: v.cpu().contiguous() for k, v in tensors.items()},
            temporary,
            {
                "log": json.dumps(self.log),
                "config": json.dumps(asdict(self.config)),
                "data": self.data,
            },
        )
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(self.partial / "state.safetensors")

    def resume(self) -> None:
        """Take up the state of an earlier run with the same settings, if there is one."""
        path = self.partial / "state.safetensors"
        if not path.is_file():
            return
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            meta = file.metadata()
            same_settings = json.loads(meta["config"]) == asdict(self.config)
            if not same_settings or meta.get("data") != self.data:
                raise UsageError(
                    f"{self.partial}: left by a run with other settings or data; remove it to "
                    "start anew"
                )
            parts: dict[str, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                kind, _, name = key.partition(".")
                parts.setdefault(kind, {})[name] = file.get_tensor(key)
        self.log = json.loads(meta["log"])
        self.model.load_state_dict(parts["model"], strict=False)
        for name, value in parts.get("average", {}).items():
            self.average[name].copy_(value)
        self.best = parts["best"]
        state = self.optimizer.state_dict()
        for key, value in parts.get("optimizer", {}).items():
            index, _, name = key.partition(".")
            state["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(state)

    def forget(self) -> None:
        """Remove the state, once the checkpoint is in place."""
        (self.partial / "state.safetensors").unlink()
        with contextlib.suppress(OSError):  # something of somebody else's is in there
            self.partial.rmdir()

    def is_over(self) -> bool:
        """All epochs done, or no better held-out rSum for `patience` epochs."""
        sums = [entry["metrics"]["rsum"] for entry in self.log]
        stale = len(sums) - 1 - int(np.argmax(sums)) if sums else 0
        return len(sums) >= self.config.epochs or stale >= self.config.patience


def train(
    datasets: Sequence[Path],
    out: Path,
    config: TrainConfig,
    *,
    cache: Path,
    on_epoch: Callable[[EpochLog], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Train on captioned folders and write the best checkpoint, by held-out rSum, to `out`.

    The same settings on the same data and machine give the same weights. A run that was killed goes
    on from its last whole epoch when it is started again.

    Args:
        datasets: folders that `retriever.data.read_pairs` can read.
        out: the checkpoint folder; replaced only when training is done.
        config: the settings.
        cache: folder for decoded pixels and tower features; may be deleted at any time. A run that
            was killed while it filled them goes on there too.
        on_epoch: called with each epoch's record.
        progress: called with (steps done, steps of this epoch).
        warn: called with a sentence for each picture that cannot be read.

    Returns:
        The log: one record an epoch, as `EpochLog`.

    Raises:
        UsageError: too little data, `out` holds something else than a checkpoint, or another run's
            state lies at `out`.partial.
        EncoderError: pretrained weights that cannot be read.
    """
    refuse_other_files(out)
    train_pairs, held_out_pairs = split_pairs(datasets, config.seed)
    captions = [[caption.text for caption in pair.captions] for pair in train_pairs]
    model, tokenizer = build(config, captions)
    if config.is_from_scratch:
        config = replace(config, finetune=True)  # features of random towers say nothing
    run = _Run(config, model, tokenizer, out, cache, train_pairs, held_out_pairs, warn)
    run.resume()
    while not run.is_over():
        started = time.monotonic()
        loss = run.train_epoch(len(run.log), progress)
        entry = run.measure(len(run.log), loss, started)
        run.save()
        if on_epoch:
            on_epoch(entry)
    model.load_state_dict(run.best, strict=False)
    data = {"datasets": [d.name for d in datasets], "pictures": len(run.pictures)}
    data |= {"captions": len(run.captions), "held_out": len(run.held_pictures)}
    training = {"config": asdict(config), "data": data}
    save_checkpoint(out, model.cpu().eval(), tokenizer, {"training": training, "log": run.log})
    run.forget()
    return run.log
