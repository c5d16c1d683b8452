"""What is installed is what is here: packages, data files, version, dependencies."""

import re
import tomllib
from pathlib import Path

import pytest

import retriever

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TORCH = {"torch", "torchvision", "timm", "open-clip-torch", "safetensors"}


def required(lines: list[str]) -> set[str]:
    return {re.split(r"[\s\[<>=!~;]", line)[0].lower().replace("_", "-") for line in lines}


def test_each_folder_with_modules_is_a_listed_package() -> None:
    folders = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for top in ("retriever", "indexes")
        for path in (ROOT / top).rglob("*.py")
    }
    assert folders == set(PROJECT["tool"]["setuptools"]["packages"])


def test_listed_modules_and_data_files_exist() -> None:
    settings = PROJECT["tool"]["setuptools"]
    for module in settings["py-modules"]:
        assert (ROOT / f"{module}.py").is_file()
    for package, patterns in settings["package-data"].items():
        folder = ROOT / package.replace(".", "/")
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: {pattern}"


def test_no_file_of_a_package_is_left_behind() -> None:
    settings = PROJECT["tool"]["setuptools"]
    packed = {ROOT / f"{module}.py" for module in settings["py-modules"]}
    for package in settings["packages"]:
        folder = ROOT / package.replace(".", "/")
        for pattern in ["*.py", *settings["package-data"].get(package, [])]:
            packed |= set(folder.glob(pattern))
    there = {
        path
        for top in ("retriever", "indexes")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert there - packed == set()


def test_no_older_onnxruntime_is_taken_than_maps_weights_beside_a_session_of_bytes() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"], *extras["gpu"]]
    floors = [line.partition(">=") for line in lines if line.startswith("onnxruntime")]
    # Before it, weights outside of a model's folder were read as well.
    assert [(name, floor) for name, _, floor in floors] == [
        ("onnxruntime", "1.24"),
        ("onnxruntime-gpu", "1.24"),
    ]


def test_the_command_is_the_function_it_names() -> None:
    import cli

    assert PROJECT["project"]["scripts"] == {"retriever": "cli:main"}
    assert callable(cli.main)


def test_the_version_is_the_same_everywhere() -> None:
    version = retriever.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert PROJECT["project"]["version"] == version
    assert re.findall(r'^version: "?([\d.]+)"?$', citation, re.MULTILINE) == [version]
    assert re.findall(r"^## \[(\d[^\]]*)\]", changes, re.MULTILINE)[0] == version


def test_the_base_installation_needs_no_torch() -> None:
    assert not required(PROJECT["project"]["dependencies"]) & TORCH


@pytest.mark.parametrize("extra", ["heif", "demo", "gpu", "openvino", "parquet", "watch"])
def test_only_the_extras_about_models_need_torch(extra: str) -> None:
    assert not required(PROJECT["project"]["optional-dependencies"][extra]) & TORCH


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert all(re.search(rf"^ +{number}\. \w", text, re.MULTILINE) for number in range(1, 10))
    assert PROJECT["project"]["license"] == "Apache-2.0"
