"""The settings of a training run, each with its default and its explanation, once.

Light to import: the command line makes its options from here without loading torch.
"""

from dataclasses import dataclass, field
from typing import Any

from retriever.errors import UsageError

OBJECTIVES = ("clip", "siglip", "triplet", "squared", "squared+uniformity")
TEXT_TOWERS = ("gru", "static", "transformer")


def _setting(default: Any, explanation: str) -> Any:
    return field(default=default, metadata={"help": explanation})


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Every setting of a training run; the whole of it is saved in the checkpoint.

    Without weights to begin from, both towers are learned from scratch. `image_lr` and `text_lr`
    of None stand for `lr` then, else for 3e-4 and 5e-5.
    """

    init: str | None = _setting(
        None, "A checkpoint to begin from: towers, tokenizer, sizes and dropout are its own."
    )
    image_tower: str = _setting(
        "cnn", "A convolutional network of timm, or cnn: a small one from scratch."
    )
    image_weights: str | None = _setting(
        None, "Weights of the image tower: a .pth or .safetensors file, or 'timm' to download."
    )
    text_tower: str = _setting("gru", "gru, static or transformer.")
    text_weights: str | None = _setting(
        None, "A folder with a BERT-like model.safetensors and its tokenizer.json."
    )
    add_words: int = _setting(
        0,
        "Words in scripts without spaces, such as Chinese, that text_weights learn: so many at "
        "most, found in the captions; what they mean is found in the other captions.",
    )
    dim: int = _setting(384, "Dimensions of the shared space.")
    image_size: int = _setting(224, "Pictures are squashed to squares of this side, in pixels.")
    max_tokens: int = _setting(64, "Longer captions are cut.")
    objective: str = _setting("clip", "One of " + ", ".join(OBJECTIVES) + ".")
    finetune: bool = _setting(False, "Train the towers too, not the projections alone.")
    freeze_stages: int = _setting(0, "Fine-tuning: lowest stages of the image tower kept fixed.")
    train_size: int | None = _setting(
        None,
        "Fine-tuning: side of the augmented pictures, if not image_size. Crops show things larger "
        "than whole pictures do, so a smaller side comes nearer to those and saves time.",
    )
    train_depthwise: bool = _setting(
        False, "Fine-tuning: pretrained depthwise convolutions too, 40 % of the time on a CPU."
    )
    views: int = _setting(1, "Frozen towers: cached views of a picture, all but one augmented.")
    epochs: int = _setting(20, "Passes over the pictures, at most.")
    batch_size: int = _setting(256, "Pictures in a batch; with --finetune as many as you like.")
    micro_batch: int = _setting(
        256,
        "Fine-tuning: a larger batch goes through the towers in parts of so many pictures, twice, "
        "with the memory of one part and the same gradients.",
    )
    captions_per_picture: int = _setting(2, "Captions of each picture in a batch, drawn anew.")
    text_weight: float = _setting(
        0.0, "Of the contrast between captions of a picture and those of others, with clip."
    )
    lr: float = _setting(1e-3, "Peak learning rate of the projections, on a cosine schedule.")
    image_lr: float | None = _setting(None, "The same for the image tower.")
    text_lr: float | None = _setting(None, "The same for the text tower.")
    token_lr: float | None = _setting(None, "The same for its token vectors; else text_lr.")
    weight_decay: float = _setting(0.05, "AdamW's, on matrices only.")
    warmup: float = _setting(0.1, "Share of all steps in which the learning rate rises.")
    dropout: float = _setting(0.1, "Dropout of projections and transformer.")
    token_dropout: float = _setting(0.0, "Chance that a token is hidden in training.")
    ema: float = _setting(0.0, "Decay of the average of weights that is measured and kept.")
    patience: int = _setting(5, "Epochs without a better held-out rSum before stopping.")
    threads: int = _setting(0, "CPU threads; 0 leaves it to torch.")
    device: str = _setting("auto", "auto, cpu, cuda or mps.")
    seed: int = _setting(0, "Of all chance; the same seed gives the same weights.")

    def __post_init__(self) -> None:
        for value, known, what in (
            (self.objective, OBJECTIVES, "objective"),
            (self.text_tower, TEXT_TOWERS, "text tower"),
        ):
            if value not in known:
                raise UsageError(f"unknown {what} {value!r}: choose from {', '.join(known)}")
        if self.image_weights and self.image_tower == "cnn":
            raise UsageError("image_weights need an image_tower of timm, such as resnet50")
        if self.text_weights and self.text_tower == "gru":
            raise UsageError("text_weights need the text_tower transformer or static")
        if self.add_words and not self.text_weights:
            raise UsageError("add_words need text_weights, whose words say what they mean")
        if self.text_weight and (self.objective != "clip" or self.captions_per_picture < 2):
            raise UsageError("text_weight needs objective clip and two captions_per_picture")
        for name in ("dim", "image_size", "max_tokens", "views", "epochs", "micro_batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1")
        if self.train_size is not None and self.train_size < 1:
            raise UsageError("train_size must be at least 1")
        if self.seed < 0:
            raise UsageError("seed must be at least 0")
        if self.batch_size < 2:
            raise UsageError("batch_size must be at least 2: a picture is told from others")
        if self.captions_per_picture < 1 or self.patience < 1:
            raise UsageError("captions_per_picture and patience must be at least 1")

    @property
    def is_from_scratch(self) -> bool:
        """Whether nothing pretrained is there whose features could be taken as they are."""
        return not self.init and not (self.image_weights and self.text_weights)
