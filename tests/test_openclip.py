import json
import pickle
import re
import shutil
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import (
    SIGLIP_PREPROCESSING,
    open_clip_architecture,
    write_open_clip,
    write_tokenizer,
)

from retriever.encoders import Encoder, load_encoder, to_pixels
from retriever.errors import EncoderError
from retriever.models import _PUBLISHED
from retriever.openclip import OpenClipEncoder, _agreed_preprocessing

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


@pytest.fixture(scope="module")
def open_clip() -> ModuleType:
    """The import takes seconds, and its own dependencies warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import open_clip
        import transformers  # noqa: F401  (open_clip reads SigLIP's tokenizers through it)
    return open_clip


@pytest.fixture(scope="module")
def siglip(open_clip: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose model squashes pictures to [-1, 1] and has a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("models") / "siglip"
    return write_open_clip(folder, preprocessing=SIGLIP_PREPROCESSING, hf_tokenizer=True)


@pytest.fixture
def architecture(open_clip: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A SigLIP-like architecture that open_clip knows by name, for the length of a test."""
    path = tmp_path / "configs" / "tiny-siglip.json"
    path.parent.mkdir()
    path.write_text(json.dumps(open_clip_architecture(hf_tokenizer=True)))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr(
        open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS)
    )
    open_clip.add_model_config(path)
    return "tiny-siglip"


def publish(
    open_clip: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, **tags: dict[str, Any]
) -> None:
    """Enter weights into open_clip's table of what can be downloaded."""
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, tags)


@pytest.fixture
def picture() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (40, 90, 3), np.uint8))


def expected_rows(encoder: Encoder, picture: Image.Image) -> np.ndarray:
    """What a model gets that squashes to 32 × 32 and maps 0…255 to -1…1, worked out by hand."""
    import torch
    from torch.nn.functional import normalize

    assert isinstance(encoder, OpenClipEncoder)
    pixels = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC), np.float32)
    ready = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.inference_mode():
        rows: np.ndarray = normalize(encoder._weights.visual()(ready), dim=-1).numpy()
    return rows


# ── preprocessing and tokenizer are the model's own ────────────────────────────────────────────


def test_folder_prepares_pictures_as_its_config_says(siglip: Path, picture: Image.Image) -> None:
    encoder = load_encoder(str(siglip), device="cpu")
    assert isinstance(encoder, OpenClipEncoder)
    found = {key: encoder.config["image"][key] for key in SIGLIP_PREPROCESSING}
    assert found == SIGLIP_PREPROCESSING
    rows = encoder.encode_images([picture])
    np.testing.assert_allclose(rows, expected_rows(encoder, picture), atol=1e-6)
    assert (encoder.image_size, encoder.max_text_tokens, encoder.dim) == (32, 16, 24)


def test_local_weights_are_prepared_as_the_architecture_was_trained(
    open_clip: ModuleType,
    architecture: str,
    siglip: Path,
    picture: Image.Image,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish(open_clip, monkeypatch, architecture, webli=SIGLIP_PREPROCESSING)
    weights = Path(shutil.copy(siglip / "open_clip_model.safetensors", tmp_path / "w.safetensors"))
    write_tokenizer(tmp_path)

    # This is the trap: open_clip alone takes CLIP's mean and crops.
    alone = open_clip.create_model(architecture, pretrained=str(weights))
    assert alone.visual.preprocess_cfg["mean"] == open_clip.OPENAI_DATASET_MEAN
    assert alone.visual.preprocess_cfg["resize_mode"] == "shortest"

    encoder = load_encoder(f"{architecture}/{weights}", device="cpu")
    np.testing.assert_allclose(
        encoder.encode_images([picture]), expected_rows(encoder, picture), atol=1e-6
    )
    folder = load_encoder(str(siglip), device="cpu")
    texts = ["a red square", "A red, square!", "a dog"]
    np.testing.assert_allclose(encoder.encode_texts(texts), folder.encode_texts(texts), atol=1e-6)


def test_config_beside_the_weights_decides(
    open_clip: ModuleType, architecture: str, siglip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = SIGLIP_PREPROCESSING | {"mean": list(CLIP_MEAN), "resize_mode": "shortest"}
    publish(open_clip, monkeypatch, architecture, webli=clip)
    weights = siglip / "open_clip_model.safetensors"
    encoder = OpenClipEncoder(f"{architecture}/{weights}", device="cpu")
    assert encoder.config["image"]["mean"] == [0.5, 0.5, 0.5]
    assert encoder.preprocessing.resize == "squash"


def test_weights_whose_preprocessing_nothing_tells_are_refused(
    open_clip: ModuleType,
    architecture: str,
    siglip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = Path(shutil.copy(siglip / "open_clip_model.safetensors", tmp_path / "w.safetensors"))
    message = r"nothing tells how .*w\.safetensors wants its pictures prepared"
    with pytest.raises(EncoderError, match=message):
        OpenClipEncoder(f"{architecture}/{weights}", device="cpu")
    clip = SIGLIP_PREPROCESSING | {"resize_mode": "shortest"}
    publish(open_clip, monkeypatch, architecture, webli=SIGLIP_PREPROCESSING, other=clip)
    with pytest.raises(EncoderError, match=message):
        OpenClipEncoder(f"{architecture}/{weights}", device="cpu")


def test_published_architectures_agree_or_are_refused(open_clip: ModuleType) -> None:
    siglip = _agreed_preprocessing("ViT-B-16-SigLIP", Path("weights.safetensors"))
    assert siglip["resize_mode"] == "squash"
    assert tuple(siglip["mean"]) == (0.5, 0.5, 0.5)
    clip = _agreed_preprocessing("ViT-B-32", Path("weights.safetensors"))
    assert (clip["resize_mode"], tuple(clip["mean"])) == ("shortest", CLIP_MEAN)
    with pytest.raises(EncoderError, match="nothing tells how"):
        _agreed_preprocessing("ViT-L-14", Path("weights.safetensors"))  # one tag has another mean


@pytest.mark.parametrize("preprocessing", [None, {"std": [0.5, 0.5, 0.5]}])
def test_folder_without_preprocessing_is_refused(
    open_clip: ModuleType, tmp_path: Path, preprocessing: dict[str, Any] | None
) -> None:
    folder = write_open_clip(tmp_path / "model", preprocessing=preprocessing)
    with pytest.raises(EncoderError, match="preprocess_cfg"):
        OpenClipEncoder(str(folder), device="cpu")


def test_tagged_weights_get_the_activation_that_they_were_trained_with(
    open_clip: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_open_clip(tmp_path / "plain", preprocessing=SIGLIP_PREPROCESSING)
    path = tmp_path / "tiny-clip.json"
    path.write_text(json.dumps(open_clip_architecture()))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [path])
    open_clip.factory._rescan_model_configs()
    tag = SIGLIP_PREPROCESSING | {"file": str(folder / "open_clip_model.safetensors")}
    publish(open_clip, monkeypatch, "tiny-clip", quick=tag | {"quick_gelu": True}, plain=tag)

    quick = OpenClipEncoder("tiny-clip/quick", device="cpu")
    plain = OpenClipEncoder("tiny-clip/plain", device="cpu")
    names = {type(module).__name__ for module in quick.text_tower().modules()}
    assert "QuickGELU" in names
    assert "QuickGELU" not in {type(module).__name__ for module in plain.text_tower().modules()}


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    size=st.integers(1, 40),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    resize=st.sampled_from(["shortest", "squash"]),
)
def test_our_resizing_equals_open_clips(
    open_clip: ModuleType, width: int, height: int, size: int, interpolation: str, resize: str
) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    theirs = open_clip.image_transform(
        size,
        is_train=False,
        mean=(0,) * 3,
        std=(1,) * 3,
        resize_mode=resize,
        interpolation=interpolation,
    )
    pixels = (theirs(picture).permute(1, 2, 0) * 255).round().numpy()
    np.testing.assert_array_equal(to_pixels(picture, size, resize, interpolation), pixels)


# ── the contract ───────────────────────────────────────────────────────────────────────────────


def test_rows_are_unit_and_do_not_depend_on_their_batch(siglip: Path, picture: Image.Image) -> None:
    encoder = load_encoder(str(siglip), device="cpu")
    images = [picture, picture.rotate(90), picture.crop((0, 0, 20, 20))]
    texts = [f"a {colour} square" for colour in ("red", "green", "blue")]
    for rows, one in (
        (encoder.encode_images(images), encoder.encode_images(images[2:])),
        (encoder.encode_texts(texts), encoder.encode_texts(texts[2:])),
    ):
        assert rows.shape == (3, 24)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(rows[2], one[0], atol=1e-6)
    assert encoder.encode_images([]).shape == encoder.encode_texts([]).shape == (0, 24)


def test_fingerprint_holds_weights_preprocessing_and_tokenizer(
    siglip: Path, tmp_path: Path
) -> None:
    def fingerprint(folder: Path) -> str:
        return OpenClipEncoder(str(folder), device="cpu").fingerprint

    def copy(name: str) -> Path:
        return Path(shutil.copytree(siglip, tmp_path / name))

    before = fingerprint(siglip)
    assert fingerprint(copy("same")) == before

    config = json.loads((siglip / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.4, 0.5, 0.5]
    other_mean = copy("mean")
    (other_mean / "open_clip_config.json").write_text(json.dumps(config))

    other_words = copy("words")
    tokenizer = json.loads((siglip / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["the"] = words["the"], words["a"]
    (other_words / "tokenizer.json").write_text(json.dumps(tokenizer))

    other_weights = copy("weights")
    path = other_weights / "open_clip_model.safetensors"
    contents = bytearray(path.read_bytes())
    contents[-2] ^= 1
    path.write_bytes(contents)

    found = {fingerprint(folder) for folder in (other_mean, other_words, other_weights)}
    assert len(found | {before}) == 4


# ── what cannot be loaded ──────────────────────────────────────────────────────────────────────


def test_absent_weights_without_network_are_told_in_a_sentence(
    open_clip: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = (
        r"the weights of ViT-B-32/laion2b_s34b_b79k are not on this machine and cannot be "
        r"downloaded \(.*\): connect once, or give a folder with the model"
    )
    with pytest.raises(EncoderError, match=message) as caught:
        load_encoder("ViT-B-32/laion2b_s34b_b79k", device="cpu")
    assert "\n" not in str(caught.value)


def test_absent_tokenizer_without_network_is_told_in_a_sentence(
    open_clip: ModuleType,
    architecture: str,
    siglip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    publish(open_clip, monkeypatch, architecture, webli=SIGLIP_PREPROCESSING)
    weights = Path(shutil.copy(siglip / "open_clip_model.safetensors", tmp_path / "w.safetensors"))
    message = r"the tokenizer of .* \(nobody/none\) is not on this machine"
    with pytest.raises(EncoderError, match=message):
        load_encoder(f"{architecture}/{weights}", device="cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-33/openai", "open_clip has no ViT-B-33; did you mean ViT-B-32"),
        ("photos/models", "'photos/models' is neither a folder nor a model"),
        ("ViT-B-32/opennai", "'opennai' is neither a file nor weights .* it has openai, "),
    ],
)
def test_mistyped_name_is_told_with_what_is_near(
    open_clip: ModuleType, name: str, message: str
) -> None:
    with pytest.raises(EncoderError, match=message):
        load_encoder(name)


def test_pickle_is_never_run(siglip: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(siglip, tmp_path / "model"))
    (folder / "open_clip_model.safetensors").unlink()
    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trap,)

    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps({"state_dict": Trap()}))
    with pytest.raises(EncoderError, match=re.escape(f"{folder} cannot be loaded")):
        OpenClipEncoder(str(folder), device="cpu")
    assert not trap.exists()


def test_folder_without_weights_is_refused(siglip: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(siglip, tmp_path / "model"))
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(EncoderError, match="cannot be loaded"):
        OpenClipEncoder(str(folder), device="cpu")


# ── the table of models ────────────────────────────────────────────────────────────────────────


def test_every_model_of_the_table_is_open_clips(open_clip: ModuleType) -> None:
    for model in _PUBLISHED:
        architecture, tag = model.name.split("/")
        known = open_clip.get_pretrained_cfg(architecture, tag)
        assert known["hf_hub"].rstrip("/") == model.repository
        assert open_clip.get_model_config(architecture)["embed_dim"] == model.dim


def test_a_text_beyond_the_context_is_told_as_cut(siglip: Path) -> None:
    encoder = OpenClipEncoder(str(siglip), device="cpu", threads=1)
    texts = ["", "dog", "dog " * 500, "dog " * 500 + "red"]
    assert encoder.is_cut(texts) == [False, False, True, True]
    rows = encoder.encode_texts(texts)
    assert np.allclose(rows[2], rows[3])
