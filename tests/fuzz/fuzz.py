"""Coverage-guided fuzzing of what reads files that others may have written.

    python tests/fuzz/fuzz.py captions --seconds 300
    python tests/fuzz/fuzz.py all --seconds 5
    python tests/fuzz/fuzz.py store --replay fuzz/crashes/store-crash-1f0c…

Targets (see `targets.py` for what must hold): `captions`, the readers of captions files and
sidecars; `store`, opening, searching and checking a store whose files were edited; `repair`,
mending such a store; `vectors`, a FAISS file. `all` runs each in turn, which takes four times
`--seconds`, and is what continuous integration runs.

The corpus begins with seeds that the targets make and grows in `--folder` (default: `fuzz`, in the
current folder), where the next run takes it up again. An input that raises, hangs or takes too much
memory is written to `crashes/` there, its traceback to stderr, and the exit status is not 0. Fix
it, and let its plain form become a test beside the code's others.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
INPUT_SECONDS = 20  # an input that takes longer is a hang
MEMORY_MB = 2048
MAX_BYTES = {"captions": 4096, "store": 64, "repair": 64, "vectors": 1024}


def main() -> int:
    """Runs what the command line asks for; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=[*MAX_BYTES, "all"])
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    parser.add_argument("--folder", type=Path, default=Path("fuzz"), help="corpus and crashes")
    parser.add_argument("--replay", type=Path, help="check this one input and stop")
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("fuzzing needs: pip install 'picture-retriever[fuzz]'", file=sys.stderr)
        return 2
    if options.scratch is not None:
        fuzz(options.target, options.seconds, options.folder, options.replay, options.scratch)
        return 0
    # libFuzzer ends its process at once and cleans nothing up, so it has one of its own. Stores
    # are written for each input: in memory where there is such a folder.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    worst = 0
    for target in MAX_BYTES if options.target == "all" else [options.target]:
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as scratch:
            command = [sys.executable, __file__, target, "--seconds", str(options.seconds)]
            command += ["--folder", str(options.folder.absolute()), "--scratch", scratch]
            if options.replay is not None:
                command += ["--replay", str(options.replay)]
            worst = max(worst, abs(subprocess.run(command, check=False).returncode))
    return worst


def fuzz(name: str, seconds: int, folder: Path, replay: Path | None, scratch: Path) -> None:
    """Fuzzes one target; returns only from a replay, as libFuzzer ends the process itself."""
    import atheris

    sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
    with atheris.instrument_imports(include=["retriever", "indexes"]):
        from targets import TARGETS

    target = TARGETS[name](scratch)
    if replay is not None:
        target.check(replay.read_bytes())
        return
    corpus, crashes = folder / "corpus" / name, folder / "crashes"
    corpus.mkdir(parents=True, exist_ok=True)
    crashes.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    arguments = [
        sys.argv[0],
        str(corpus),
        f"-max_total_time={seconds}",
        f"-max_len={MAX_BYTES[name]}",
        f"-timeout={INPUT_SECONDS}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-artifact_prefix={crashes}/{name}-",
    ]
    atheris.Setup(arguments, target.check)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
