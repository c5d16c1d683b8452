"""Checkpoints of a dual encoder, and pretrained weights to begin one from.

A checkpoint is a folder: `model.safetensors`, `config.json`, `tokenizer.json`, and what else the
trainer wants to keep, as JSON. No file in it is a pickle.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from retriever.errors import EncoderError, UsageError
from retriever.towers import BackboneTower, DualEncoder, TransformerTower, fold_batch_norms

_WEIGHTS = "model.safetensors"
_QKV = ("query", "key", "value")
BERT_TOKENS = "embeddings.word_embeddings.weight"


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors file, or a .pth file that holds nothing but tensors."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as exc:  # each format has its own error types; all mean the same to the user
        raise EncoderError(f"{path}: not a file of weights that can be read ({exc})") from exc
    if not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise EncoderError(f"{path}: holds other things than tensors; save the state dict alone")
    return weights


def load_backbone(tower: BackboneTower, architecture: str, weights_from: str) -> None:
    """Put weights of the architecture into the tower, whose BatchNorms are folded already.

    `weights_from` is a file, or "timm" for the ones that timm downloads.

    Names may differ (the weights of another implementation of the same network): then the tensors
    of a .pth file are matched in order, and every shape must agree. A .safetensors file sorts its
    tensors, so there the names must be timm's.
    """
    import timm

    if weights_from == "timm":
        try:
            plain: Any = timm.create_model(architecture, pretrained=True).eval()
        except Exception as exc:  # the hub's client has many kinds of failure, none of them ours
            raise EncoderError(
                f"timm cannot get the weights of {architecture} ({exc}): check the network, or "
                "give a file of weights"
            ) from exc
    else:
        plain = timm.create_model(architecture).eval()
        weights, wanted = load_tensors(Path(weights_from)), plain.state_dict()
        if weights.keys() != wanted.keys():
            shapes = [tuple(t.shape) for t in weights.values()]
            if shapes != [tuple(t.shape) for t in wanted.values()]:
                raise EncoderError(f"{weights_from}: these are not the weights of {architecture}")
            weights = dict(zip(wanted, weights.values(), strict=True))
        plain.load_state_dict(weights)
    plain.reset_classifier(0)
    fold_batch_norms(plain)
    tower.backbone.load_state_dict(plain.state_dict())


def bert_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a BERT under their usual names, without the prefix that some files have.

    Raises:
        EncoderError: the file holds no BERT.
    """
    weights = {name.removeprefix("bert."): t for name, t in load_tensors(path).items()}
    if "encoder.layer.0.attention.self.query.weight" not in weights:
        raise EncoderError(f"{path}: these are not the weights of a BERT-like encoder")
    return weights


def load_bert(tower: TransformerTower, path: Path, tokens: Tensor) -> None:
    """Put BERT's tensors, under the names that they have everywhere, into our layers.

    Args:
        tower: of the same sizes but for the vocabulary.
        path: of the weights.
        tokens: (v, f) vectors of the tower's vocabulary.

    Raises:
        EncoderError: the file holds no BERT, or one with too few positions.
    """
    weights = bert_tensors(path)
    positions = weights["embeddings.position_embeddings.weight"]
    if len(positions) < tower.positions.num_embeddings:
        raise EncoderError(f"{path}: has positions for {len(positions)} tokens only")
    # Every token has type 0, so that row of the type table is a constant, added once and for all.
    positions = positions + weights["embeddings.token_type_embeddings.weight"][0]
    ours = {
        "tokens.weight": tokens,
        "positions.weight": positions[: tower.positions.num_embeddings],
        "norm.weight": weights["embeddings.LayerNorm.weight"],
        "norm.bias": weights["embeddings.LayerNorm.bias"],
    }
    names = {
        "out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm": "output.LayerNorm",
    }
    for i in range(len(tower.layers)):
        for part in ("weight", "bias"):
            parts = [weights[f"encoder.layer.{i}.attention.self.{n}.{part}"] for n in _QKV]
            ours[f"layers.{i}.qkv.{part}"] = torch.cat(parts)
            for our, theirs in names.items():
                ours[f"layers.{i}.{our}.{part}"] = weights[f"encoder.layer.{i}.{theirs}.{part}"]
    tower.load_state_dict(ours)


def bert_shape(path: Path) -> dict[str, int]:
    """The sizes that a BERT state dict shows; without a config.json, heads as is customary.

    Raises:
        EncoderError: the file holds no BERT.
    """
    weights = bert_tensors(path)
    vocabulary, width = weights[BERT_TOKENS].shape
    layers = 1 + max(int(n.split(".")[2]) for n in weights if n.startswith("encoder.layer."))
    hidden = len(weights["encoder.layer.0.intermediate.dense.bias"])
    config = path.with_name("config.json")
    heads = width // (32 if width <= 384 else 64)
    if config.is_file():
        heads = json.loads(config.read_text("utf-8"))["num_attention_heads"]
    return {
        "vocabulary": vocabulary,
        "width": width,
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
    }


def save_checkpoint(
    folder: Path, model: DualEncoder, tokenizer: Tokenizer, extra: Mapping[str, Any]
) -> None:
    """Write a checkpoint beside its final name, then put it in place of an earlier one, if any.

    Raises:
        UsageError: the folder holds something else than a checkpoint; it stays as it is.
    """
    refuse_other_files(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, temporary / _WEIGHTS)
    tokenizer.save(str(temporary / "tokenizer.json"))
    for name, value in ({"config": model.config} | dict(extra)).items():
        (temporary / f"{name}.json").write_text(json.dumps(value, indent=1), "utf-8")
    temporary.chmod(0o777 & ~_umask())  # mkdtemp's folders are for their owner alone
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        folder.rename(old / folder.name)
        temporary.rename(folder)
        shutil.rmtree(old)
    else:
        temporary.rename(folder)


def average_checkpoints(
    folders: Sequence[Path],
    *,
    weights: Sequence[float] | None = None,
    image_size: int | None = None,
) -> tuple[DualEncoder, Tokenizer]:
    """One model whose weights are the means of those of several, and the tokenizer of all.

    Runs of one recipe from a common beginning, with other seeds, err in different ways; their mean
    costs no more than one of them (Wortsman et al. 2022, "Model soups").

    Args:
        folders: checkpoints of one shape with one vocabulary.
        weights: how much each of them counts, all alike if None. A little of a model from before
            fine-tuning keeps what it knew (Wortsman et al. 2022, "Robust fine-tuning").
        image_size: what pictures are read at from now on; a little more than in training often
            finds more (Touvron et al. 2019, "Fixing the train-test resolution discrepancy").

    Raises:
        UsageError: they differ in more than their weights, or there are not as many weights.
        EncoderError: one is no checkpoint.
    """
    shares = [1.0] * len(folders) if weights is None else [*weights]
    if len(shares) != len(folders) or min(shares) < 0 or not sum(shares):
        raise UsageError(f"give each of the {len(folders)} checkpoints a weight, none negative")
    model, tokenizer = load_checkpoint(folders[0])
    tensors = {name: tensor * shares[0] for name, tensor in model.state_dict().items()}
    for folder, share in zip(folders[1:], shares[1:], strict=True):
        other, words = load_checkpoint(folder)
        if other.config != model.config or words.get_vocab() != tokenizer.get_vocab():
            raise UsageError(f"{folder} is of another shape or vocabulary than {folders[0]}")
        for name, tensor in other.state_dict().items():
            tensors[name] += share * tensor
    config = dict(model.config)
    if image_size is not None:
        config["image"] = config["image"] | {"size": image_size}
    averaged = DualEncoder(config)
    averaged.load_state_dict({name: tensor / sum(shares) for name, tensor in tensors.items()})
    return averaged.eval(), tokenizer


def refuse_other_files(folder: Path) -> None:
    """Raise UsageError if the folder holds anything that no checkpoint holds."""
    known = {_WEIGHTS, "config.json", "tokenizer.json", "training.json", "log.json"}
    if folder.is_dir():
        # Hidden files are what file managers leave.
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        if others := sorted(names - known):
            raise UsageError(f"{folder} holds other files ({others[0]}): give a folder of its own")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: give a folder for the checkpoint")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_checkpoint(folder: Path) -> tuple[DualEncoder, Tokenizer]:
    """The model, in eval mode on the CPU, and its tokenizer, as `save_checkpoint` wrote them.

    Raises:
        EncoderError: the folder is no checkpoint, or its weights do not fit its config.
    """
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        model = DualEncoder(config)
        model.load_state_dict(load_file(folder / _WEIGHTS))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as exc:  # tokenizers raises bare Exception, safetensors a type of its own
        raise EncoderError(f"{folder}: not a checkpoint that can be loaded ({exc})") from exc
    return model.eval(), tokenizer
