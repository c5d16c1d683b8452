"""The tools that Retriever is measured beside, each in an environment of its own.

    python benchmarks/peers.py

Installs rclip and clip-retrieval from PyPI and makes the towers that they need, once; the other
benchmarks call this by themselves. Both load their models from a hub, which a benchmark must not
depend on, so they get their architecture with random weights, drawn from a seed: what counts is the
time, not the answers. The same weights serve our own `ARCHITECTURE/FILE`, so all run one model.

rclip runs its towers in ONNX Runtime, clip-retrieval in torch of the version that is installed
here. What either writes is counted after each run, because a tool that skips pictures is fast.
Three gigabytes of disk for environments and weights, eight where torch brings CUDA's libraries.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import click
import numpy as np

SEED = 0
SHARED_MODEL = "ViT-B-32-256"  # the only one that rclip can run

RCLIP_FOLDER = "ViT-B-32-256-datacomp_s34b_b86k"
RCLIP_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"

# Run by rclip's own interpreter, so that its tables are always those of its version.
_FILL_RCLIP = """
import sys
import numpy as np
from rclip.db import DB

file, folder, count, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
draw = np.random.default_rng(seed)
database = DB(file)
for start in range(0, count, 10_000):
    rows = draw.standard_normal((min(10_000, count - start), 512), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for number, row in enumerate(rows, start):
        image = {"filepath": f"{folder}/{number // 1000:04d}/{number:07d}.jpg", "modified_at": 1.0}
        image |= {"size": 100_000, "vector": row.tobytes(), "hash": f"{number:064x}"}
        database.upsert_image(image, commit=False)
database.close()
"""


class PeerError(Exception):
    """A peer cannot be installed or run; the text says why."""


@dataclass(frozen=True, slots=True)
class Call:
    """A command line, and what it needs around it."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)  # besides what is set already
    cwd: Path | None = None


@dataclass(frozen=True, slots=True)
class Rclip:
    """rclip: it brings its database up to date before each answer, in batches of 8 pictures."""

    cache: Path
    name = "rclip"
    requirements = (("rclip==3.3.0",),)
    packages = ("rclip", "onnxruntime", "numpy", "pillow")

    def prepare(self) -> None:
        """Writes the two towers where rclip looks for them before it asks its hub."""
        import open_clip  # type: ignore[import-untyped]

        towers, vocabulary = self._home / RCLIP_FOLDER, self._home / "tokenizer" / RCLIP_VOCABULARY
        if not vocabulary.is_file():
            export_towers(weights(self.cache, SHARED_MODEL), towers)
            vocabulary.parent.mkdir(exist_ok=True)
            shutil.copy(Path(open_clip.__file__).parent / RCLIP_VOCABULARY, vocabulary)

    def index(self, folder: Path, place: Path) -> Call:
        """Indexes a folder; there is no command for that alone, so that one query comes on top."""
        return self._call(place, folder, "--filepath-only", "a dog in the snow")

    def count(self, place: Path) -> int:
        """Embeddings that it has written."""
        with closing(sqlite3.connect(place / "db.sqlite3")) as database:
            query = "SELECT count(*) FROM images WHERE deleted IS NULL AND length(vector) = 2048"
            (found,) = database.execute(query).fetchone()
        return int(found)

    def fill(self, folder: Path, place: Path, count: int) -> None:
        """A database that knows so many pictures of `folder`, none of which is there."""
        place.mkdir(parents=True, exist_ok=True)
        python, arguments = _python(self.cache, self.name), (folder.resolve(), count, SEED)
        _run([python, "-c", _FILL_RCLIP, place / "db.sqlite3", *arguments])

    def search(self, folder: Path, place: Path, query: str) -> Call:
        """A query, text or the path of a picture, that does not look for changes first."""
        return self._call(place, folder, "--no-indexing", "--filepath-only", query)

    @property
    def _home(self) -> Path:
        return self.cache / "rclip-models"

    def _call(self, place: Path, folder: Path, *arguments: str) -> Call:
        # A data folder holds models and database; the models are the same in all.
        place.mkdir(parents=True, exist_ok=True)
        for part in self._home.iterdir():
            if not (place / part.name).exists():
                (place / part.name).symlink_to(part)
        # As its console script does.
        program = [str(_python(self.cache, self.name)), "-m", "rclip", *arguments]
        env = {"RCLIP_DATADIR": str(place), "HF_HUB_OFFLINE": "1"}
        return Call(program, env, folder)


@dataclass(frozen=True, slots=True)
class ClipRetrieval:
    """clip-retrieval's inference: four processes that decode, float16 rows in one file.

    In batches of 32 rather than its 256, to its good: it warms up with two batches of pictures and
    of texts, and with large ones a thousand pictures leave nothing to decode beside the model.
    """

    cache: Path
    name = "clip-retrieval"
    packages = ("clip-retrieval", "all_clip", "open_clip_torch", "torch", "numpy", "pillow")

    @property
    def requirements(self) -> tuple[tuple[str, ...], ...]:
        """Groups for pip, one after the other: torch comes first, of the version used here.

        clip-anytorch, which it imports, needs a part of setuptools that went with version 70; torch
        asks for a later one, but only to compile.
        """
        ours = [f"{name}=={version(name).split('+')[0]}" for name in ("torch", "torchvision")]
        return (tuple(ours), ("clip-retrieval==2.45.0", *ours), ("setuptools<70",))

    def prepare(self) -> None:
        """Makes the checkpoint that open_clip loads there."""
        weights(self.cache, SHARED_MODEL)

    def index(self, folder: Path, place: Path) -> Call:
        """Encodes a folder; captions are left out, so that only pictures are compared."""
        model = f"open_clip:{SHARED_MODEL}/{weights(self.cache, SHARED_MODEL)}"
        return Call(
            [
                str(_python(self.cache, self.name).with_name("clip-retrieval")),
                "inference",
                f"--input_dataset={folder}",
                f"--output_folder={place}",
                f"--clip_model={model}",
                "--enable_text=False",
                "--batch_size=32",
            ],
            {"HF_HUB_OFFLINE": "1"},
        )

    def count(self, place: Path) -> int:
        """Embeddings that it has written."""
        return sum(len(np.load(file)) for file in (place / "img_emb").glob("*.npy"))


Peer = Rclip | ClipRetrieval
P = TypeVar("P", bound=Peer)
PEERS: dict[str, Callable[[Path], Peer]] = {"rclip": Rclip, "clip-retrieval": ClipRetrieval}


def default_cache() -> Path:
    """Where environments, weights and made pictures are kept between runs."""
    import platformdirs

    return platformdirs.user_cache_path("retriever", appauthor=False) / "benchmarks"


def ready(peer: P, say: Callable[[str], None]) -> tuple[P, dict[str, str]]:
    """The peer, installed and with its towers, and the versions of what it runs on.

    Raises:
        PeerError: it cannot be installed, or its towers cannot be made.
    """
    versions = install(peer.name, peer.requirements, peer.packages, peer.cache, say)
    try:
        peer.prepare()
    except (OSError, ImportError) as exc:
        raise PeerError(f"{peer.name}: {exc}") from exc
    return peer, versions


def install(
    name: str,
    requirements: Sequence[Sequence[str]],
    packages: Sequence[str],
    cache: Path,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Makes the environment of a peer unless it is there; the versions of `packages` in it.

    Raises:
        PeerError: pip cannot install it.
    """
    stamp = cache / name / "installed.json"
    wanted = {"python": sys.version.split()[0], "requirements": [list(one) for one in requirements]}
    if not stamp.is_file() or json.loads(stamp.read_text())["wanted"] != wanted:
        say(f"installing {name} in {cache / name}")
        python = _python(cache, name)
        try:
            venv.create(cache / name, clear=True, with_pip=True)
            for group in requirements:
                _run([python, "-m", "pip", "install", "--quiet", *group])
            found = json.loads(_run([python, "-m", "pip", "list", "--format=json"]))
        except (OSError, subprocess.CalledProcessError) as exc:
            said = getattr(exc, "stderr", None) or str(exc)
            raise PeerError(f"{name}: {_last_line(said)}") from exc
        versions = {one["name"]: one["version"] for one in found}
        stamp.write_text(json.dumps({"wanted": wanted, "versions": versions}, indent=1))
    versions = json.loads(stamp.read_text())["versions"]
    # Names are spelt with - or _, as their authors please.
    plain = {one.lower().replace("_", "-"): number for one, number in versions.items()}
    return {one: plain[one.lower().replace("_", "-")] for one in packages}


def weights(cache: Path, architecture: str, seed: int = SEED) -> Path:
    """A file with random weights of an architecture that open_clip knows, made if need be.

    Architecture and file make a name that `load_encoder` takes: "ViT-B-32-256/FILE".
    """
    path = cache.resolve() / "weights" / f"{architecture}-seed{seed}.pt"
    if not path.is_file():
        import open_clip
        import torch

        torch.manual_seed(seed)
        model = open_clip.create_model(architecture)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
    return path


def export_towers(checkpoint: Path, folder: Path) -> None:
    """`visual.onnx` and `textual.onnx` of rclip's architecture, as rclip reads them."""
    import open_clip
    import torch

    class Tower(torch.nn.Module):
        def __init__(self, model: torch.nn.Module, encode: str) -> None:
            super().__init__()
            self.model, self.encode = model, encode

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            rows: torch.Tensor = getattr(self.model, self.encode)(batch)
            return rows

    # The fused kernel of torch's attention has no counterpart in ONNX.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model = open_clip.create_model(SHARED_MODEL, pretrained=str(checkpoint)).eval()
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.zeros(2, 3, *model.visual.image_size)
        tokens = torch.ones(2, model.context_length, dtype=torch.int64)
        for file, encode, example in (
            ("visual.onnx", "encode_image", pixels),
            ("textual.onnx", "encode_text", tokens),
        ):
            torch.onnx.export(
                Tower(model, encode).eval(),
                (example,),
                str(folder / file),
                input_names=["input"],
                output_names=["output"],
                dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
                opset_version=17,
                dynamo=False,
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _python(cache: Path, name: str) -> Path:
    folder = "Scripts" if os.name == "nt" else "bin"
    return cache.resolve() / name / folder / "python"


def _run(argv: Sequence[object]) -> str:
    """What a command prints; raises CalledProcessError with what it says of its failure."""
    words = [str(word) for word in argv]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


@click.command()
@click.option("--peers", default=",".join(PEERS), show_default=True, help="Separated by commas.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=default_cache,
    show_default="benchmarks in the user's cache folder",
    help="Where the environments go.",
)
def main(peers: str, cache: Path) -> None:
    """Install the peers and make their towers."""
    failed = False
    for name in peers.split(","):
        try:
            _, versions = ready(
                PEERS[name](cache.resolve()), lambda line: click.echo(line, err=True)
            )
            said = ", ".join(f"{one} {number}" for one, number in versions.items())
            click.echo(f"{name} is ready in {cache / name}: {said}")
        except PeerError as exc:
            click.echo(str(exc), err=True)
            failed = True
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
