"""What all commands share: options, errors as sentences, Ctrl-C, the progress bar, JSON."""

import errno
import gc
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from indexes.errors import StoreError, StoreNotFoundError
from retriever.errors import RetrieverError, UsageError, printable
from retriever.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from retriever.ingest import IndexReport
    from retriever.library import Library

DEVICES = ("auto", "cpu", "cuda", "mps")
SOME_FILES_FAILED = 3
Command = Callable[..., None]
Handler = Callable[[int, FrameType | None], None]


class WrongUsage(click.ClickException):
    """A sentence on stderr and exit status 2, as click's own usage errors have."""

    exit_code = 2


class Commands(click.Group):
    """A group that turns our errors into sentences, and Ctrl-C into what was kept."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Runs the program; see `click.Command.main`. Without `args` it ends the process."""
        if args is not None:  # a test, or another program
            return super().main(args, *rest, **extra)
        # Thousands of objects are made by imports, and few ever go: looking for those that can,
        # as often as Python does by default, takes a twentieth of a search.
        gc.set_threshold(50_000)
        status = 0
        fault: OSError | None = None
        _open_closed_streams()
        try:
            super().main(args, *rest, **extra)
        except SystemExit as exc:
            status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        except OSError as exc:  # from what is printed before a command runs, such as --version
            if exc.errno != errno.ENOSPC:
                raise
            fault = exc
        with suppress(OSError):  # the reader, such as `head`, has had enough
            sys.stderr.flush()
        try:
            sys.stdout.flush()
        except OSError as exc:
            fault = exc if status != 1 else None  # or it has been told
        if fault:
            status = status or 1
            with suppress(OSError):
                click.echo(f"Error: the output could not be written: {fault.strerror}", err=True)
        # All that is written is closed. To take the libraries apart that were loaded would take a
        # tenth of a search.
        os._exit(status)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; see `click.Group.invoke`."""
        caught: list[int] = []

        def on_signal(number: int, _frame: object) -> None:
            caught.append(number)
            raise KeyboardInterrupt

        with _signals(on_signal):
            try:
                return self._run(ctx)
            except click.exceptions.Exit:
                raise
            except (KeyboardInterrupt, Exception) as exc:
                # A module in C that is being imported makes its own error of a Ctrl-C.
                if not caught and not isinstance(exc, KeyboardInterrupt):
                    raise
                # Every writer commits as it goes, so there is nothing to clean up here.
                kept = ctx.meta.get("kept", "Nothing was changed.")
                click.echo(f"\nInterrupted. {kept}", err=True)
                ctx.exit(128 + (caught[-1] if caught else signal.SIGINT))

    def _run(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as exc:
            raise WrongUsage(str(exc)) from exc
        except StoreNotFoundError as exc:
            raise click.ClickException(f"{exc}: make it with `retriever index FOLDER`") from exc
        except (RetrieverError, StoreError) as exc:
            raise click.ClickException(str(exc)) from exc
        except BrokenPipeError:
            raise  # the reader, such as `head`, has had enough; click ends quietly
        except OSError as exc:
            if exc.errno == errno.ENOSPC and exc.filename is None:
                raise click.ClickException(f"nothing more can be written: {exc.strerror}") from exc
            if exc.filename is None:
                raise
            raise click.ClickException(f"{exc.filename}: {exc.strerror}") from exc


def _open_closed_streams() -> None:
    """Sends nowhere what is said where the shell has closed the stream (`>&-`)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = Path(os.devnull).open("w", encoding="utf-8", errors="replace")  # noqa: SIM115
            setattr(sys, name, nowhere)


def if_interrupted(kept: str) -> None:
    """Sets what Ctrl-C says from here on."""
    click.get_current_context().meta["kept"] = kept


class Progress:
    """A bar with rate and time left on stderr, if that is a terminal; called with (done, total)."""

    def __init__(self, doing: str, unit: str) -> None:
        self.doing = doing
        self.unit = unit
        self.stream = sys.stderr
        self.is_shown = self.stream.isatty()
        self.started = self.drawn = 0.0
        self.first = self.last = self.total = -1

    def __call__(self, done: int, total: int) -> None:
        """Draws how far it is, unless it was drawn just now."""
        now = time.monotonic()
        if total != self.total or done < self.last:  # an epoch may follow another
            self.started, self.first, self.total = now, done, total
        self.last = done
        if not self.is_shown or (done < total and now - self.drawn < 0.1):
            return
        self.drawn = now
        self.stream.write(f"\r\x1b[K{self.line(now - self.started)}")
        self.stream.flush()

    def line(self, seconds: float) -> str:
        """The bar as text that fits the terminal."""
        filled = 20 * self.last // max(self.total, 1)
        bar = "#" * filled + "-" * (20 - filled)
        text = f"{self.doing} [{bar}] {self.last:,} of {self.total:,} {self.unit}"
        if self.last > self.first and seconds > 0:
            rate = (self.last - self.first) / seconds
            left = duration((self.total - self.last) / rate)
            text += f", {rate:.3g}/s, {left} left"
        return text[: shutil.get_terminal_size().columns - 1]

    def clear(self) -> None:
        """Takes the bar away before something else is printed."""
        if self.is_shown:
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()


def duration(seconds: float) -> str:
    """Seconds as people say them: "3 s", "2 min 5 s", "1 h 2 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def print_json(record: Mapping[str, Any]) -> None:
    """One object on a line of stdout."""
    # ASCII only, so that names that are no UTF-8 pass any pipe and come back as they were.
    click.echo(json.dumps(record))


def index_lines(index: Mapping[str, Any]) -> list[str]:
    """How each kind of vector is searched, and why."""
    lines = []
    for kind, facts in index.items():
        built = facts["approximate"]
        how = f"{built['kind']}, {built['memory_bytes'] / 1e6:,.1f} MB" if built else "exact"
        line = f"{facts['rows']:,} {kind} vectors, {how}"
        if built and built["beside"]:
            line += f", {built['beside']:,} newer ones beside it"
        lines += [line, f"  {facts['reason']}"] if facts["rows"] else []
    return lines or ["no vectors yet"]


def answer_lines(answers: Mapping[str, Any] | None) -> list[str]:
    """What a text is searched by, and what was measured of that."""
    if not answers or not answers["queries"]:
        way_out = "`retriever optimize` measures it" if not answers else "too few captions to tell"
        return [f"by pictures; what captions and words would add is not known: {way_out}"]
    by = "by pictures, captions and words" if answers["mode"] == "hybrid" else "by pictures"
    found = ", ".join(
        f"{recalls['r@1']:.0f} % by {mode}" for mode, recalls in answers["measured"].items()
    )
    lines = [
        f"{by}, measured with {answers['queries']:,} captions held out, whose picture comes",
        f"  first: {found}",
    ]
    if told := answers["cut_off"].get(answers["mode"]):
        lines.append(
            f"  right answers and those to unrelated texts are told apart with an AUC of"
            f" {told['auc']:.3f}; confidences are off by {100 * told['error']:.1f} points"
        )
    return lines


def warn(sentence: str) -> None:
    """A sentence on stderr."""
    click.echo(f"Warning: {sentence}", err=True)


def shown(path: str | Path) -> str:
    """A path for people: bytes that are no text become question marks."""
    return printable(path)


def default_library() -> str:
    """Where the library is if nothing else is said."""
    import platformdirs

    return str(platformdirs.user_data_path("retriever", appauthor=False) / "default.lib")


def library_option(command: Command) -> Command:
    """`--library`, as `library_path`."""
    return click.option(
        "--library",
        "library_path",
        metavar="PATH",
        type=click.Path(path_type=Path),
        envvar="RETRIEVER_LIBRARY",
        show_envvar=True,
        default=default_library,
        show_default="default.lib in the user's data folder",
        help="The library's folder.",
    )(command)


class ByteSize(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """A number of bytes as people write it: "500MB", "2 GB", "1.5GiB"."""

    name = "size"
    _UNITS: Mapping[str, int] = {
        **{"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12},
        **{"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40},
    }

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes; see `click.ParamType.convert`."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value).lower())
        if not found or found[2] not in self._UNITS:
            self.fail(f"{value!r} is no size such as 500MB or 2GB", param, ctx)
        size = float(found[1]) * self._UNITS[found[2]]
        if size >= 1 << 63:  # what files and systems can count
            self.fail("no machine has that much", param, ctx)
        return int(size)


def encoder_options(command: Command) -> Command:
    """`--device` and `--threads`."""
    device = click.option(
        "--device", type=click.Choice(DEVICES), default="auto", help="Where the encoder runs."
    )
    threads = click.option(
        "--threads",
        type=click.IntRange(min=1),
        show_default="as many as the engine likes",
        help="CPU threads of the encoder.",
    )
    return device(threads(command))


def model_option(default: str | None, help: str, **more: Any) -> Callable[[Command], Command]:
    """`--model`, whose meaning depends on the command."""
    return click.option("--model", metavar="NAME", default=default, help=help, **more)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER_OR_FILE = click.Path(exists=True, path_type=Path)


def open_library(
    path: Path,
    device: str = "auto",
    threads: int | None = None,
    model: str | None = None,
    *,
    add_model: bool = False,
) -> "Library":
    """The library at `path`, seen by `model`, one of its own or else added, or by its default."""
    from retriever.library import Library

    return Library.open(path, model, add_model=add_model, device=device, threads=threads)


def open_or_create(path: Path, device: str, threads: int | None, model: str | None) -> "Library":
    """The library at `path`, made if absent; a `model` that it does not have is added."""
    from retriever.library import Library

    try:
        return open_library(path, device, threads, model, add_model=True)
    except StoreNotFoundError:
        return Library.create(path, model or DEFAULT_MODEL, device=device, threads=threads)


@contextmanager
def stopping(on_stop: Callable[[], None] = lambda: None) -> Iterator[Callable[[], int]]:
    """Has Ctrl-C, and SIGTERM, finish what is in hand; a second one stops at once.

    Gives a function that tells which signal came, 0 for none; `on_stop` is called at the first.
    """
    caught: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if caught:
            at_once = before.get(number)
            if callable(at_once):
                at_once(number, frame)
            raise KeyboardInterrupt
        caught.append(number)
        on_stop()
        # Not through a stream of Python's, which may be in the middle of a line.
        os.write(2, b"\nStopping after the batch in hand; once more stops at once.\n")

    with _signals(on_signal) as before:
        yield lambda: caught[0] if caught else 0


@contextmanager
def _signals(handler: Handler) -> Iterator[Mapping[int, Any]]:
    """Has `handler` get SIGINT and SIGTERM, unless they are ignored; gives the handlers before.

    Only the main thread may do that; in any other nothing happens.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for one in (signal.SIGINT, signal.SIGTERM):
            # A job in the background of a script ignores the Ctrl-C that is for the one in front.
            if signal.getsignal(one) not in (signal.SIG_IGN, None):
                before[one] = signal.signal(one, handler)
    try:
        yield before
    finally:
        for number, was in before.items():
            signal.signal(number, was)


def print_index_report(
    report: "IndexReport", library: "Library", seconds: float, as_json: bool
) -> None:
    """The outcome of a run on stdout, what failed and every problem on stderr."""
    if as_json:
        record = asdict(report) | {"library": str(library.path), "seconds": round(seconds, 2)}
        record["failed"] = [{"path": str(f.path), "reason": f.reason} for f in report.failed]
        print_json(record)
    else:
        click.echo(_summary(report, library, seconds))
    for failure in report.failed:
        click.echo(f"Failed: {shown(failure.path)}: {failure.reason}", err=True)
    for problem in report.problems:
        warn(problem)


def _summary(report: "IndexReport", library: "Library", seconds: float) -> str:
    counts = {
        "added": report.added,
        "updated": report.updated,
        "moved": report.moved,
        "removed": report.removed,
        "failed": len(report.failed),
    }
    changes = [f"{count:,} {what}" for what, count in counts.items() if count]
    if not changes and not report.unchanged:
        return "No pictures were found"
    if report.unchanged or not changes:
        changes.append(f"{report.unchanged:,} unchanged")
    if not (report.added or report.updated or report.moved or report.removed):
        changes.append("nothing to do")
    held = library.counts()
    parts = {"picture": held["items"] - held["failures"], "caption": held["captions"]}
    holds = " and ".join(f"{n:,} {what}{'' if n == 1 else 's'}" for what, n in parts.items())
    return f"{', '.join(changes)} in {duration(seconds)}: {shown(library.path)} has {holds}"
