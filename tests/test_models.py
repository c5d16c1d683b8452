import json
import subprocess
import sys
from pathlib import Path

import pytest

from retriever import models
from retriever.errors import EncoderError
from retriever.models import list_models


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def write_model(folder: Path, files: dict[str, int], **config: object) -> Path:
    folder.mkdir(parents=True)
    for name, size in files.items():
        (folder / name).write_bytes(bytes(size))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_bundled_model_is_the_default_and_shows_its_own_recall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recall = {"flickr8k": {"t2i_r@1": 26.5}}
    files = {"image.onnx": 2_000_000, "text.onnx": 1_500_000}
    monkeypatch.setattr(
        models, "MINI_FOLDER", write_model(tmp_path / "mini", files, dim=384, recall=recall)
    )
    first, *others = list_models()
    assert (first.name, first.kind, first.dim, first.size_mb) == ("mini", "bundled", 384, 3.5)
    assert first.on_disk
    assert first.recall == recall
    assert first.default
    assert not any(one.default for one in others)


def test_published_figures_are_those_of_the_sources() -> None:
    table = {model.name: model for model in list_models()}
    openai = table["ViT-B-32/openai"]
    assert openai.recall == {
        "flickr30k": {"t2i_r@1": 58.8, "i2t_r@1": 78.9},
        "coco": {"t2i_r@1": 30.4, "i2t_r@1": 50.1},
    }
    assert (openai.dim, openai.source) == (512, "open_clip docs/openclip_retrieval_results.csv")
    assert "flickr30k" not in table["ViT-B-16-SigLIP2/webli"].recall
    for model in table.values():
        for metrics in model.recall.values():
            # In every published table a picture finds one of its five captions more easily.
            assert 0 < metrics["t2i_r@1"] < metrics["i2t_r@1"] < 100


def test_model_is_on_disk_once_its_weights_are_whole(cache: Path) -> None:
    name = "MobileCLIP2-S0/dfndr2b"

    def on_disk() -> bool:
        return next(model for model in list_models() if model.name == name).on_disk

    assert not on_disk()
    repository = cache / "models--timm--MobileCLIP2-S0-OpenCLIP"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (snapshot / "open_clip_config.json").write_text("{}")
    (snapshot / "open_clip_model.safetensors").symlink_to(blobs / "1234")
    (blobs / "1234.incomplete").write_bytes(b"part")
    assert not on_disk()
    (blobs / "1234.incomplete").rename(blobs / "1234")
    assert on_disk()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/a"),
    ],
)
def test_cache_is_where_the_hubs_client_keeps_it(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert models._hub_cache() == Path(expected)


def test_own_models_of_a_folder_are_listed_and_other_folders_are_not(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    write_model(root / "a.ckpt", {"model.safetensors": 3_000_000}, dim=64)
    write_model(root / "b", {"image.onnx": 100_000, "text.onnx": 200_000}, dim=32)
    write_model(root / "half", {"image.onnx": 100_000}, dim=32)
    write_model(root / "foreign", {"model.safetensors": 10}, hidden_size=7)
    (root / "notes.txt").write_text("no folder")
    own = [model for model in list_models(folder=root) if model.kind in ("checkpoint", "onnx")]
    assert [(model.name, model.kind, model.size_mb) for model in own] == [
        (str(root / "a.ckpt"), "checkpoint", 3.0),
        (str(root / "b"), "onnx", 0.3),
    ]
    with pytest.raises(EncoderError, match="is no folder"):
        list_models(folder=root / "nothing")


def test_list_needs_no_heavy_import() -> None:
    code = (
        "import sys; from retriever.models import list_models; list_models()\n"
        "heavy = {'torch', 'open_clip', 'onnxruntime', 'huggingface_hub', 'numpy', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout == "[]\n"
