import copy
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_openclip import open_clip
from tiny_models import (
    SIGLIP_PREPROCESSING,
    open_clip_architecture,
    word_tokenizer,
    write_checkpoint,
    write_open_clip,
)

from retriever.cleaning import cleaned
from retriever.encoders import OnnxEncoder, load_encoder
from retriever.errors import EncoderError, UsageError
from retriever.models import find_prepared, list_models, prepared_folder
from retriever.openclip import OpenClipEncoder
from retriever.prepare import (
    HARD_TEXTS,
    _save_config,
    clip_tokenizer,
    is_checkpoint,
    prepare,
    recall_check,
)

__all__ = ["open_clip"]  # the fixture

TEXTS = ["", "a red square", "Two DOGS, on a cat!", "small blue circle " * 30, "café &amp; ½"]
PREPROCESSING = SIGLIP_PREPROCESSING | {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
# Rounding of float32 in another order of sums.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where models are prepared in a test."""
    monkeypatch.setenv("RETRIEVER_MODELS", str(tmp_path / "prepared"))
    return tmp_path / "prepared"


@pytest.fixture(scope="module")
def clip(open_clip: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "clip"
    return write_open_clip(folder, preprocessing=PREPROCESSING)


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = ((40, 90), (64, 33), (32, 32))
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]


def changed(**parts: Any) -> dict[str, Any]:
    architecture = open_clip_architecture()
    for side in ("text_cfg", "vision_cfg"):
        architecture[side] = architecture[side] | parts.pop(side, {})
    return architecture | parts


def roberta(folder: Path) -> dict[str, Any]:
    """A text tower of transformers, whose description lies in a folder of its own."""
    from transformers import RobertaConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = RobertaConfig(
        vocab_size=word_tokenizer().get_vocab_size(),
        intermediate_size=64,
        max_position_embeddings=40,
        pad_token_id=0,
        **sizes,
    )
    config.save_pretrained(folder)
    text = {"hf_model_name": str(folder), "hf_tokenizer_name": "nobody/none", "hf_proj_type": "mlp"}
    text |= {"hf_pooler_type": "mean_pooler", "context_length": 16}
    text |= {"hf_model_pretrained": False}
    return {"embed_dim": 24, "custom_text": True, "text_cfg": text} | {
        "vision_cfg": open_clip_architecture()["vision_cfg"]
    }


KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "clip": lambda _: open_clip_architecture(),
    "quick gelu": lambda _: changed(quick_gelu=True, vision_cfg={"ls_init_value": 0.1}),
    "custom text": lambda _: changed(custom_text=True, text_cfg={"proj_bias": True}),
    "first eos": lambda _: changed(text_cfg={"pool_type": "eos", "eos_id": 49407}),
    "siglip": lambda _: open_clip_architecture(hf_tokenizer=True),
    "no projection": lambda _: changed(
        embed_dim=32, custom_text=True, text_cfg={"proj_type": "none", "pool_type": "first"}
    ),
    "own attention": lambda _: changed(
        vision_cfg={"block_type": "custom", "scale_heads": True, "pool_type": "avg"}
    ),
    "coca": lambda _: changed(
        custom_text=True,
        text_cfg={"embed_cls": True, "output_tokens": True},
        vision_cfg={"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
        multimodal_cfg={"context_length": 16, "width": 32, "heads": 2, "layers": 1},
    ),
    "resnet": lambda _: changed(vision_cfg={"layers": [1, 1, 1, 1], "head_width": 8, "width": 8}),
    "timm cnn": lambda _: changed(
        vision_cfg={"timm_model_name": "test_efficientnet", "timm_pool": "avg", "image_size": 64}
        | {"timm_proj": "linear"}
    ),
    "timm vit": lambda _: changed(
        custom_text=True,
        vision_cfg={"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}
        | {"timm_proj": "linear"},
    ),
    "transformers": roberta,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tower_answers_as_open_clip_and_as_torch(
    open_clip: ModuleType, kind: str, tmp_path: Path
) -> None:
    import torch

    architecture = KINDS[kind](tmp_path / "text")
    has_words = "hf_tokenizer_name" in architecture["text_cfg"]
    folder = write_open_clip(
        tmp_path / "model",
        preprocessing=PREPROCESSING,
        hf_tokenizer=has_words,
        architecture=copy.deepcopy(architecture),
    )

    # A mean over no tokens is no number; tokenizers in use put an end to every text.
    given = TEXTS[1:] if kind == "transformers" else TEXTS
    name = f"local-dir:{folder}"
    model, transform = open_clip.create_model_from_pretrained(name)
    tokenizer = open_clip.get_tokenizer(name)
    with torch.inference_mode():
        stacked = torch.stack([transform(picture) for picture in pictures()])
        images = model.eval().encode_image(stacked, normalize=True).numpy()
        texts = model.encode_text(tokenizer(given), normalize=True).numpy()

    in_torch = load_encoder(str(folder), device="cpu")
    assert isinstance(in_torch, OpenClipEncoder)
    np.testing.assert_allclose(in_torch.encode_images(pictures()), images, atol=TOLERANCE)
    np.testing.assert_allclose(in_torch.encode_texts(given), texts, atol=TOLERANCE)

    report = prepare(str(folder))
    prepared = load_encoder(str(folder), device="cpu")
    assert isinstance(prepared, OnnxEncoder)
    assert max(report.image_cosine_error, report.text_cosine_error) < 1e-6
    np.testing.assert_allclose(prepared.encode_images(pictures()), images, atol=TOLERANCE)
    np.testing.assert_allclose(prepared.encode_texts(given), texts, atol=TOLERANCE)
    one_by_one = np.concatenate([prepared.encode_texts([text]) for text in given])
    np.testing.assert_allclose(one_by_one, texts, atol=TOLERANCE)
    assert prepared.is_cut(given) == in_torch.is_cut(given)
    assert (prepared.name, prepared.fingerprint) == (in_torch.name, in_torch.fingerprint)
    assert prepared.verify() == []


# ── tokenizers ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def both(open_clip: ModuleType) -> Callable[[str], tuple[list[int], list[int]]]:
    """The tokens of a text by open_clip's tokenizer, and by ours from the same words."""
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer()
    ours = clip_tokenizer(theirs)

    def tokens(text: str) -> tuple[list[int], list[int]]:
        ends = (theirs.sot_token_id, theirs.eot_token_id)
        return [ends[0], *theirs.encode(text), ends[1]], ours.encode(cleaned(text, "lower")).ids

    return tokens


@pytest.mark.parametrize("text", HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_hard_texts_have_clips_tokens(
    both: Callable[[str], tuple[list[int], list[int]]], text: str
) -> None:
    theirs, ours = both(text)
    assert ours == theirs


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=40))
@example("\u00cd\u0085")  # mended, it is an iota subscript
@example("\u1fb3 a\u0345b !\u0345?")
def test_any_text_has_clips_tokens(
    both: Callable[[str], tuple[list[int], list[int]]], text: str
) -> None:
    # Characters newer than Python's table are letters to one engine and not yet to another; the
    # mending of a text can bring one about.
    assume("Cn" not in {unicodedata.category(one) for one in cleaned(text, "lower")})
    theirs, ours = both(text)
    assert ours == theirs


@settings(deadline=None, max_examples=200)
@given(
    st.text(st.characters(exclude_categories=["Cn"]), max_size=30)
    | st.text(st.sampled_from("ab_ &;<>#x27'.\t\n\u00a0é"), max_size=30),
    st.sampled_from(["lower", "whitespace", "canonicalize"]),
)
def test_texts_are_cleaned_as_open_clip_does(open_clip: ModuleType, text: str, how: str) -> None:
    assert cleaned(text, how) == open_clip.tokenizer.get_clean_fn(how)(text)


def test_plain_query_needs_no_ftfy() -> None:
    code = (
        "import sys; from retriever.cleaning import cleaned\n"
        "print(cleaned('A  dog, RUNNING!', 'lower'), 'ftfy' in sys.modules)"
    )
    assert run_python(code).stdout == "a dog, running! False\n"


def test_tokenizer_that_answers_otherwise_is_refused(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retriever.prepare._CLIP_WORDS", r"[^\s]+")
    with pytest.raises(EncoderError, match="cannot be written so that it does the same"):
        prepare(str(clip))
    assert not list((tmp_path / "prepared").iterdir())


# ── in its place at once, and only while it is right ───────────────────────────────────────────


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    root = Path(__file__).parents[1]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)


def test_prepared_model_runs_by_its_name_without_torch(clip: Path) -> None:
    before = load_encoder(str(clip), device="cpu").fingerprint
    prepare(str(clip))
    code = (
        "import sys; from retriever.encoders import load_encoder\n"
        "encoder = load_encoder(sys.argv[1], device='cpu')\n"
        "encoder.encode_texts(['a dog'])\n"
        "heavy = {'torch', 'open_clip', 'onnx', 'timm', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)), encoder.fingerprint)"
    )
    assert run_python(code, clip).stdout == f"[] {before}\n"


def test_what_is_prepared_is_left_until_its_source_changes(clip: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip, tmp_path / "model"))
    name = str(folder)
    first = prepare(name)
    made = (first.folder / "config.json").stat().st_mtime_ns
    assert prepare(name) == first
    assert (first.folder / "config.json").stat().st_mtime_ns == made

    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.1, 0.1, 0.1]
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert find_prepared(name) is None
    assert isinstance(load_encoder(name, device="cpu"), OpenClipEncoder)
    prepare(name)
    assert load_encoder(name).fingerprint == OpenClipEncoder(name, device="cpu").fingerprint


def test_damaged_weights_are_refused_and_made_again(clip: Path) -> None:
    report = prepare(str(clip))
    weights = report.folder / "text.weights"
    contents = bytearray(weights.read_bytes())
    contents[-3] ^= 1
    weights.write_bytes(contents)
    with pytest.raises(EncoderError, match=r"text\.weights is not the file"):
        load_encoder(str(clip)).encode_texts(["a dog"])
    prepare(str(clip))
    assert load_encoder(str(clip)).encode_texts(["a dog"]).shape == (1, 24)


def test_failed_check_leaves_what_was_there(clip: Path, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise EncoderError("no")

    with pytest.raises(EncoderError, match="no"):
        prepare(str(clip), check=refuse)
    assert not list((tmp_path / "prepared").iterdir())
    report = prepare(str(clip))
    with pytest.raises(EncoderError, match="no"):
        prepare(str(clip), check=refuse)
    assert [path.name for path in report.folder.parent.iterdir()] == [report.folder.name]
    assert find_prepared(str(clip)) == report.folder


def test_remains_of_runs_that_were_cut_off_are_cleared_away(clip: Path) -> None:
    place = prepared_folder(str(clip))
    old, own, other = (place.with_name(f".{place.name}.{n}.tmp") for n in (1, os.getpid(), 2))
    for remains in (old, own, other):
        remains.mkdir(parents=True)
        (remains / "image.onnx").write_bytes(b"part")
    os.utime(old, (0, 0))
    assert find_prepared(str(clip)) is None
    assert [model for model in list_models() if model.prepared] == []
    prepare(str(clip))
    # The third may be of a run that is at work now.
    assert {path.name for path in place.parent.iterdir()} == {place.name, other.name}


def test_of_two_runs_at_once_both_come_to_their_end(clip: Path, tmp_path: Path) -> None:
    def prepare_too(*_: object) -> None:
        run_python("import sys; from retriever.prepare import prepare; prepare(sys.argv[1])", clip)

    report = prepare(str(clip), check=prepare_too)
    assert [path.name for path in report.folder.parent.iterdir()] == [report.folder.name]
    assert OnnxEncoder(report.folder).verify() == []


def test_model_of_an_older_format_is_not_used_but_made_again(clip: Path) -> None:
    folder = prepare(str(clip)).folder
    config = json.loads((folder / "config.json").read_text())
    older = config | {"stands_for": config["stands_for"]["fingerprint"], "made": {"format": 1}}
    (folder / "config.json").write_text(json.dumps(older))
    assert find_prepared(str(clip)) is None
    assert [model for model in list_models() if model.prepared] == []
    assert isinstance(load_encoder(str(clip), device="cpu"), OpenClipEncoder)
    prepare(str(clip))
    assert json.loads((folder / "config.json").read_text()) == config


def test_description_can_name_a_source_whose_name_is_no_text(tmp_path: Path) -> None:
    config = {"source": {os.fsdecode(b"weights-\xff.bin"): [1, 2]}}
    _save_config(tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == config


def test_prepared_models_are_listed(clip: Path) -> None:
    prepare(str(clip))
    (found,) = [model for model in list_models() if model.prepared]
    assert (found.name, found.kind, found.dim, found.on_disk) == (str(clip), "open_clip", 24, True)


def test_folder_of_ones_own_is_used_by_its_path(clip: Path, tmp_path: Path) -> None:
    report = prepare(str(clip), tmp_path / "mine", float16=True)
    assert report.folder == tmp_path / "mine"
    encoder = load_encoder(str(tmp_path / "mine"), device="cpu")
    assert encoder.fingerprint == OpenClipEncoder(str(clip), device="cpu").fingerprint
    assert report.text_bytes < prepare(str(clip)).text_bytes * 0.6


@pytest.mark.parametrize(
    ("files", "in_the_way"),
    [
        (["a.jpg"], "a.jpg"),
        (["config.json", "model.safetensors", "tokenizer.json"], "model.safetensors"),
        (["config.json", "image.onnx", "text.onnx", "text.weights", "tokenizer.json"], "config"),
        (["tokenizer.json"], "tokenizer.json"),
    ],
)
@pytest.mark.parametrize("named", ["folder", ".", ".."])
def test_what_it_did_not_write_it_leaves_alone(
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: list[str],
    in_the_way: str,
    named: str,
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in files:
        (folder / name).write_text('{"name": "mine"}')
    if named == "..":
        (folder / "inner").mkdir()
    monkeypatch.chdir(folder / "inner" if named == ".." else tmp_path if named != "." else folder)
    before = sorted(folder.iterdir())
    with pytest.raises(UsageError, match=rf"holds {in_the_way}|holds inner"):
        prepare(str(clip), Path(named))
    assert sorted(folder.iterdir()) == before
    assert all((folder / name).read_text() == '{"name": "mine"}' for name in files)


def test_files_of_a_model_that_was_prepared_there_are_replaced(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    small = prepare(str(clip), Path(), float16=True)
    whole = prepare(str(clip), Path())
    assert small.folder == whole.folder == tmp_path / "mine"
    assert small.text_bytes < whole.text_bytes * 0.6
    assert OnnxEncoder(Path(), device="cpu").verify() == []
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_recall_is_compared_on_a_data_set(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = ["image,caption"]
    for place, picture in enumerate(pictures()):
        picture.save(folder / f"{place}.png")
        lines.append(f"{place}.png,a picture number {place}")
    (folder / "captions.csv").write_text("\n".join(lines))
    prepare(str(clip), check=recall_check(folder))
    right, wrong = (OnnxEncoder(prepared_folder(str(clip))) for _ in range(2))
    rows = right.encode_images(pictures())
    # Each caption is its picture, or the next.
    right.encode_texts = lambda texts: rows[[int(one[-1]) for one in texts]]  # type: ignore[method-assign]
    wrong.encode_texts = lambda texts: rows[[int(one[-1]) - 1 for one in texts]]  # type: ignore[method-assign]
    recall_check(folder)(right, right)
    with pytest.raises(EncoderError, match="the prepared model has"):
        recall_check(folder)(right, wrong)


def test_what_cannot_be_exported_says_so_in_a_sentence(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Exporting the operator 'x' is not supported\nmore")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(
        EncoderError, match=r"image\.onnx cannot be exported: Exporting the op"
    ) as e:
        prepare(str(clip))
    assert "\n" not in str(e.value)


# ── in torch: what is loaded ───────────────────────────────────────────────────────────────────


def test_text_query_leaves_the_image_tower_without_memory(clip: Path) -> None:
    encoder = OpenClipEncoder(str(clip), device="cpu")
    encoder.encode_texts(["a dog"])
    parts = encoder._weights.model.state_dict()
    assert all(value.is_meta for key, value in parts.items() if key.startswith("visual."))
    assert not parts["token_embedding.weight"].is_meta
    encoder.fingerprint  # noqa: B018
    assert parts["visual.conv1.weight"].is_meta
    encoder.encode_images(pictures())
    assert not encoder._weights.model.visual.conv1.weight.is_meta


def test_fingerprint_is_that_of_the_whole_model_built_by_open_clip(
    open_clip: ModuleType, clip: Path
) -> None:
    import torch
    import xxhash

    model = open_clip.create_model(f"local-dir:{clip}").eval()
    state = xxhash.xxh3_128()
    for key, value in sorted(model.state_dict().items()):
        state.update(key.encode())
        state.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    config = json.loads((clip / "open_clip_config.json").read_text())["model_cfg"]
    described = {key: config[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
    state.update(
        json.dumps([described, model.visual.preprocess_cfg], sort_keys=True, default=list).encode()
    )
    sample = ["A dog, running!", "the  3 CATS' café", "два кота 两只猫", "one two " * 80]
    state.update(open_clip.get_tokenizer(f"local-dir:{clip}")(sample).numpy().tobytes())
    assert OpenClipEncoder(str(clip), device="cpu").fingerprint == state.hexdigest()


@pytest.mark.parametrize("way", ["float16", "pickle"])
def test_weights_stored_otherwise_answer_alike(clip: Path, tmp_path: Path, way: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(clip, tmp_path / "model"))
    path = folder / "open_clip_model.safetensors"
    weights = load_file(path)
    path.unlink()
    if way == "float16":
        halves = {key: value.half() for key, value in weights.items()}
        save_file(halves, path)
    else:
        torch.save(weights, folder / "open_clip_pytorch_model.bin")
    whole, encoder = (OpenClipEncoder(str(one), device="cpu") for one in (clip, folder))
    tolerance = 0.02 if way == "float16" else 1e-6
    np.testing.assert_allclose(
        encoder.encode_texts(TEXTS), whole.encode_texts(TEXTS), atol=tolerance
    )
    assert (encoder.fingerprint == whole.fingerprint) == (way == "pickle")


def test_checkpoint_of_ours_is_told_from_open_clips_models(clip: Path, tmp_path: Path) -> None:
    assert is_checkpoint(str(write_checkpoint(tmp_path / "checkpoint")))
    assert not is_checkpoint(str(clip))
    assert not is_checkpoint("ViT-B-32/openai")
