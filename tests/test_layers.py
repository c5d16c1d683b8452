"""Imports point one way, the heavy ones stay at home, and what runs with `mini` needs no torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import paint

ROOT = Path(__file__).parents[1]

# A module may import from the lines below its own, never from its own line or from above.
LAYERS = [
    {"cli", "benchmarks"},
    {"retriever.finding", "retriever.serving", "retriever.upkeep"},
    {"retriever.terminal"},
    {"retriever.web.run"},
    {"retriever.web.app"},
    {"retriever.web.local", "retriever.web.measured"},
    {"retriever.web.service"},
    {"retriever.web", "retriever.web.guard", "retriever.web.projection", "retriever.web.schemas"},
    {"retriever.web.thumbnails"},
    {
        *("retriever.assistants", "retriever.bench", "retriever.demo", "retriever.replies"),
        *("retriever.running", "retriever.watch"),
    },
    {"retriever.prepare", "retriever.sheets"},
    {"retriever.library", "retriever.training", "retriever.evaluation", "retriever.export"},
    {"retriever.batching", "retriever.exchange"},
    {"retriever.clip_retrieval"},
    {"retriever.explain"},
    {
        *("retriever.checks", "retriever.ingest", "retriever.portable"),
        *("retriever.search", "retriever.samples", "retriever.fitting"),
        *("retriever.tuned", "retriever.tuning"),
    },
    {"retriever.composing"},
    {"retriever.encoders", "retriever.openclip"},
    {
        *("retriever.asking", "retriever.engines", "retriever.openclip_towers"),
        *("retriever.replicas", "retriever.workers"),
    },
    {"retriever.checkpoints", "retriever.data", "retriever.models"},
    {"retriever.decoding", "retriever.descriptions", "retriever.towers"},
    {
        *("retriever.calibration", "retriever.captions", "retriever.machine", "retriever.metrics"),
        *("retriever.duplicates", "retriever.channels"),
        *("retriever.objectives", "retriever.preview", "retriever.settings"),
        "retriever.vocabulary",
    },
    {"retriever.cleaning", "retriever.phrases", "retriever.preprocessing", "retriever.where"},
    {"retriever", "retriever.errors", "retriever.mini"},
    {"indexes.store"},
    {"indexes.care"},
    {"indexes.gallery", "indexes.salvage", "indexes.writer"},
    {"indexes.optimizer"},
    {"indexes.approximate"},
    {"indexes.catalogue", "indexes.vectors"},
    {"indexes.snapshot"},
    {"indexes.filters"},
    {"indexes.locks", "indexes.migrations", "indexes.threads", "indexes.words"},
    {"indexes.heads"},
    {"indexes.records"},
    {"indexes.files"},
    {"indexes", "indexes.errors"},
]
# An adapter is found by the function that loads encoders, and is built on their common parts.
PAIRS = {("retriever.encoders", "retriever.openclip")}
# The package gives out its one public class, when it is asked for it.
# An answer shows itself in a notebook.
LATE = {("retriever", "retriever.library"), ("retriever.search", "retriever.sheets")}

TORCH = {"torch", "torchvision", "timm", "safetensors", "open_clip"}
TORCH_HOMES = {
    f"retriever.{name}"
    for name in (
        "checkpoints",
        "encoders",
        "export",
        "objectives",
        "openclip",
        "openclip_towers",
        "prepare",
        "replicas",
        "samples",
        "towers",
        "training",
        "tuning",
    )
}
HOMES = {
    "faiss": {"indexes.approximate", "indexes.vectors"},
    "sqlalchemy": {"indexes.catalogue"},
    "onnxruntime": {"retriever.encoders", "retriever.export", "retriever.engines"},
    "openvino": {"retriever.engines"},
    "open_clip": {"retriever.openclip"},
    "pyarrow": {"retriever.clip_retrieval"},
    "watchfiles": {"retriever.watch"},
    "rapidfuzz": {"indexes.words"},
    "lark": {"retriever.where"},
    "click": {
        "cli",
        *(f"retriever.{name}" for name in ("finding", "serving", "terminal", "upkeep")),
    },
    "fastapi": {"retriever.web.app"},
    "uvicorn": {"retriever.web.run"},
    "prometheus_client": {"retriever.web.measured"},
    "sklearn": {"retriever.web.projection"},
    "mcp": {"retriever.assistants"},
    "chafa": {"retriever.preview"},
}


@dataclass(frozen=True)
class Import:
    """One module that another one imports; `late`: inside a function, or for type checking only."""

    module: str
    late: bool


def find_modules() -> dict[str, Path]:
    modules = {"cli": ROOT / "cli.py"}
    for package in ("retriever", "indexes"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = find_modules()
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


def read_imports(path: Path) -> set[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    early = {id(node) for node in _import_statements(tree.body)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {Import(alias.name, id(node) not in early) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide the layer"
            base = node.module or ""
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found.add(Import(name if name in MODULES else base, id(node) not in early))
    return found


def _import_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The imports that run when the module is imported."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _import_statements(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _import_statements(getattr(node, part, []))


IMPORTS = {name: read_imports(path) for name, path in MODULES.items()}


def layer_of(module: str) -> int:
    for number, layer in enumerate(LAYERS):
        if module in layer:
            return number
    raise AssertionError(f"{module} has no place in LAYERS of {Path(__file__).name}")


def ours(imports: set[Import]) -> set[str]:
    return {one.module for one in imports if one.module.split(".")[0] in ("retriever", "indexes")}


def loaded_by(module: str) -> set[str]:
    """All that importing a module of ours imports, by the statements outside functions."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        for one in IMPORTS.get(name, set()):
            if not one.late and one.module not in seen:
                seen.add(one.module)
                waiting.append(one.module)
    return seen | {name.split(".")[0] for name in seen}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down_the_layers(module: str) -> None:
    for other in ours(IMPORTS[module]):
        if (module, other) in LATE or tuple(sorted((module, other))) in PAIRS:
            continue
        assert layer_of(module) < layer_of(other), f"{module} imports {other}"


@pytest.mark.parametrize("module", [name for name in sorted(MODULES) if "indexes" in name])
def test_indexes_know_neither_models_nor_retriever(module: str) -> None:
    roots = {one.module.split(".")[0] for one in IMPORTS[module]}
    assert not roots & (TORCH | {"retriever", "PIL", "onnxruntime", "tokenizers"})


def test_only_the_parts_of_the_store_know_vectors_and_catalogue() -> None:
    inner = {"indexes.vectors", "indexes.catalogue", "indexes.snapshot"}
    users = {name for name, imports in IMPORTS.items() if ours(imports) & inner}
    parts = {
        f"indexes.{name}"
        for name in (
            *("store", "writer", "care", "salvage"),
            *("approximate", "gallery", "optimizer"),
        )
    }
    # The evaluation measures recall through a bare index, without a store.
    assert users == parts | {"indexes.catalogue", "retriever.evaluation"}
    assert ours(IMPORTS["retriever.evaluation"]) & inner == {"indexes.vectors"}


@pytest.mark.parametrize("package", sorted(HOMES))
def test_each_heavy_package_has_one_home(package: str) -> None:
    users = {
        name
        for name, imports in IMPORTS.items()
        if any(one.module.split(".")[0] == package for one in imports)
    }
    assert users == HOMES[package]


def test_torch_and_its_relatives_stay_where_models_are_trained_or_adapted() -> None:
    users = {
        name
        for name, imports in IMPORTS.items()
        if any(one.module.split(".")[0] in TORCH for one in imports)
    }
    assert users <= TORCH_HOMES


@pytest.mark.parametrize(
    "module", ["retriever.library", "retriever.search", "retriever.ingest", "retriever.encoders"]
)
def test_what_runs_with_mini_reaches_torch_only_inside_functions(module: str) -> None:
    assert not loaded_by(module) & TORCH


def test_metrics_need_numpy_only() -> None:
    outside = {one.module.split(".")[0] for one in IMPORTS["retriever.metrics"]}
    assert outside - set(sys.stdlib_module_names) == {"numpy"}


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.name)
def test_benchmarks_use_the_program_and_are_used_by_nothing(path: Path) -> None:
    beside = {other.stem for other in BENCHMARKS}
    for other in ours(read_imports(path)):
        layer_of(other)
    for name, imports in IMPORTS.items():
        used = {one.module for one in imports} & ({"benchmarks"} | beside)
        assert not used, f"{name} imports {used}"


def run_python(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_help_loads_no_numerical_library() -> None:
    code = """
import sys
from cli import main
try:
    main(["--help"])
except SystemExit:
    pass
heavy = {"numpy", "PIL", "onnxruntime", "tokenizers", "faiss", "sqlalchemy", "torch"}
print("loaded:", sorted(heavy & set(sys.modules)))
"""
    assert run_python(code) == "loaded: []"


def test_index_search_and_captions_with_mini_import_no_torch(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from retriever import Library
folder, library = map(Path, sys.argv[1:])
with Library.create(library) as made:
    assert made.index(folder).added == 2
    assert len(made.search("a red picture")) == 2
    assert len(made.search(image=folder / "red.png", k=1)) == 1
    assert len(made.captions_for(folder / "red.png")) == 1
heavy = {"torch", "torchvision", "timm", "open_clip", "safetensors", "transformers"}
print("loaded:", sorted(heavy & set(sys.modules)))
"""
    folder = tmp_path / "pictures"
    paint(folder / "red.png", "red")
    paint(folder / "blue.png", "blue").with_suffix(".txt").write_text("all blue", encoding="utf-8")
    assert run_python(code, folder, tmp_path / "new.lib") == "loaded: []"


# What a question from a shell need not load: a text knows no pictures, reading no SQLAlchemy.
SPARED = {
    "search": {"sqlalchemy", "PIL", "pandas", "numpy.ma", "csv", "socket", "lark"}
    | {"retriever.captions"},
    "caption": {"sqlalchemy", "pandas", "numpy.ma", "socket", "tokenizers"},
    "info": {"sqlalchemy", "PIL", "onnxruntime", "tokenizers", "socket"},
}


def test_a_question_from_the_shell_loads_only_what_it_needs(tmp_path: Path) -> None:
    code = """
import sys
from cli import main
try:
    main(sys.argv[2:])
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", sorted(set(sys.argv[1].split(",")) & set(sys.modules)))
"""
    folder, library = tmp_path / "pictures", tmp_path / "new.lib"
    red = paint(folder / "red.png", "red")
    paint(folder / "blue.png", "blue").with_suffix(".txt").write_text("all blue", encoding="utf-8")
    run_python(code, "", "index", folder, "--library", library)
    asked = {"search": ["a red picture"], "caption": [red], "info": []}
    for command, arguments in asked.items():
        spared = ",".join(sorted(SPARED[command] | TORCH | {"transformers"}))
        found = run_python(code, spared, command, *arguments, "--library", library)
        assert found == "loaded: []", command
