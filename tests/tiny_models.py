"""Models so small that they are built, saved and loaded in no time; their weights are random."""

import json
from pathlib import Path
from typing import Any

_COLOURS = ["red", "green", "blue", "yellow"]
_THINGS = ["square", "circle", "dog", "cat", "picture"]
WORDS = ["a", "the", "on", "in", "two", "small", "large", *_COLOURS, *_THINGS]


def word_tokenizer() -> Any:
    """One token a word, and no special tokens around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def write_checkpoint(folder: Path, text_tower: str = "transformer", seed: int = 0) -> Path:
    """A checkpoint with a small CNN of 32 × 32 pixels and a text tower that reads 12 tokens."""
    import torch

    from retriever.checkpoints import save_checkpoint
    from retriever.towers import DualEncoder

    tokenizer = word_tokenizer()
    text = {"tower": text_tower, "vocabulary": tokenizer.get_vocab_size(), "max_tokens": 12}
    config = {
        "dim": 64,
        "image": {
            "tower": "cnn",
            "width": 16,
            "size": 32,
            "resize": "squash",
            "interpolation": "bicubic",
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.3, 0.4],
        },
        "text": text | {"width": 64, "layers": 2, "heads": 4, "hidden": 128},
    }
    torch.manual_seed(seed)
    model = DualEncoder(config).eval()
    for parameter in model.parameters():  # the zeros of a new projection would hide mistakes
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    save_checkpoint(folder, model, tokenizer, {})
    return folder


SIGLIP_PREPROCESSING = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def open_clip_architecture(*, hf_tokenizer: bool = False) -> dict[str, Any]:
    """Two layers each side; with `hf_tokenizer`, texts are read as SigLIP's are."""
    text: dict[str, Any] = {"context_length": 16, "width": 32, "heads": 2, "layers": 2}
    if hf_tokenizer:
        vocabulary = word_tokenizer().get_vocab_size()
        text |= {"vocab_size": vocabulary, "hf_tokenizer_name": "nobody/none"}
        text |= {"tokenizer_kwargs": {"clean": "canonicalize"}, "pool_type": "last"}
        text |= {"no_causal_mask": True}
    return {
        "embed_dim": 24,
        "custom_text": hf_tokenizer,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16}
        | {"patch_size": 16},
        "text_cfg": text,
    }


def write_tokenizer(folder: Path) -> None:
    """The files from which transformers reads `word_tokenizer`."""
    word_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"unk_token": "[UNK]"}))


def write_open_clip(
    folder: Path,
    *,
    preprocessing: dict[str, Any] | None = None,
    hf_tokenizer: bool = False,
    architecture: dict[str, Any] | None = None,
) -> Path:
    """A folder as open_clip saves a model: config, weights, and tokenizer where it needs one."""
    import torch
    from open_clip import CLIP, CoCa, CustomTextCLIP
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    architecture = architecture or open_clip_architecture(hf_tokenizer=hf_tokenizer)
    config: dict[str, Any] = {"model_cfg": architecture}
    if preprocessing is not None:
        config["preprocess_cfg"] = preprocessing
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    kind = CustomTextCLIP if architecture.get("custom_text") else CLIP
    if "multimodal_cfg" in architecture:
        kind = CoCa
    parts = {key: value for key, value in architecture.items() if key != "custom_text"}
    weights = {key: value.clone() for key, value in kind(**parts).state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    if hf_tokenizer:
        write_tokenizer(folder)
    return folder
