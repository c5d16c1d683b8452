import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import ToyEncoder, paint

from indexes.store import Store
from retriever import watch as watching
from retriever.errors import MissingExtraError, UsageError
from retriever.ingest import IndexReport
from retriever.library import Library
from retriever.watch import watch

pytest.importorskip("watchfiles")

SETTLE = 0.1  # seconds
PATIENCE = 30.0  # seconds after which a machine is not slow, but the test failed


class CountingLibrary(Library):
    """Knows how often it was asked to index."""

    runs = 0

    def index(self, folder: str | Path | None = None, **options: object) -> IndexReport:
        try:
            return super().index(folder, **options)
        finally:
            self.runs += 1


class Watch:
    """A watch in a thread of its own, stopped at the end of a `with` block."""

    def __init__(
        self, library: Library, folders: Sequence[Path] | None = None, *, polling: bool = False
    ) -> None:
        self.reports: list[tuple[Path, IndexReport]] = []
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(library, folders, polling))

    def _run(self, library: Library, folders: Sequence[Path] | None, polling: bool) -> None:
        try:
            watch(
                library,
                folders,
                on_report=lambda folder, report: self.reports.append((folder, report)),
                stop=self.stop,
                settle_seconds=SETTLE,
                polling=polling,
            )
        except BaseException as exc:
            self.error = exc

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.join()

    def join(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the watch did not stop"
        if self.error is not None:
            raise self.error

    def until(self, condition: Callable[[], bool]) -> None:
        patience = time.monotonic() + PATIENCE
        while not condition():
            assert self.error is None, self.error
            assert time.monotonic() < patience, self.reports
            time.sleep(0.02)

    def total(self, outcome: str) -> int:
        return sum(getattr(report, outcome) for _, report in self.reports)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for colour in ("red", "green"):
        paint(folder / f"{colour}.png", colour)
    return folder


@pytest.fixture
def library(tmp_path: Path, toy_encoder: ToyEncoder) -> Iterator[CountingLibrary]:
    with CountingLibrary.create(tmp_path / "photos.lib", toy_encoder) as library:
        assert isinstance(library, CountingLibrary)
        yield library


def known(library: Library) -> dict[str, tuple[str, ...]]:
    """The captions of each picture that can be found, by its path below its root."""
    store = library._store  # opening one each time would take most of the tests' time
    return {
        file: tuple(caption.text for caption in one.captions)
        for root_id, _ in store.roots()
        for file, one in store.known_files(root_id).items()
        if one.status == "ok"
    }


def test_new_changed_and_deleted_pictures_are_followed(
    library: Library, pictures: Path, toy_encoder: ToyEncoder
) -> None:
    with Watch(library, [pictures]) as running:
        running.until(lambda: set(known(library)) == {"red.png", "green.png"})
        paint(pictures / "new" / "blue.png", "blue")
        running.until(lambda: "new/blue.png" in known(library))
        assert library.search("blue", k=1)[0].path == pictures / "new" / "blue.png"
        paint(pictures / "red.png", "yellow", side=9)
        running.until(lambda: running.total("updated") == 1)
        (pictures / "green.png").unlink()
        running.until(lambda: "green.png" not in known(library))
    assert [(report.added, report.removed) for _, report in running.reports] == [
        (2, 0),
        (1, 0),
        (0, 0),
        (0, 1),
    ]
    assert {folder for folder, _ in running.reports} == {pictures}


def test_a_renamed_picture_and_an_edited_caption_cost_no_encoding_of_pictures(
    library: Library, pictures: Path, toy_encoder: ToyEncoder
) -> None:
    with Watch(library, [pictures]) as running:
        running.until(lambda: len(known(library)) == 2)
        (pictures / "red.png").rename(pictures / "rot.png")
        running.until(lambda: "rot.png" in known(library))
        (pictures / "rot.txt").write_text("a red square\n", encoding="utf-8")
        running.until(lambda: known(library)["rot.png"] == ("a red square",))
        table = "file,caption\ngreen.png,a green square\n"
        (pictures / "captions.csv").write_text(table, encoding="utf-8")
        running.until(lambda: known(library)["green.png"] == ("a green square",))
    assert (running.total("moved"), running.total("updated")) == (1, 2)
    assert toy_encoder.images_seen == 2


def test_folders_that_are_moved_in_and_out_are_followed(
    library: Library, pictures: Path, tmp_path: Path
) -> None:
    paint(tmp_path / "2024.05" / "deep" / "blue.png", "blue")
    with Watch(library, [pictures]) as running:
        running.until(lambda: len(known(library)) == 2)
        (tmp_path / "2024.05").rename(pictures / "2024.05")
        running.until(lambda: "2024.05/deep/blue.png" in known(library))
        (pictures / "2024.05").rename(tmp_path / "2024.05")
        running.until(lambda: len(known(library)) == 2)


def test_a_burst_of_files_is_few_runs(library: CountingLibrary, pictures: Path) -> None:
    with Watch(library, [pictures]) as running:
        running.until(lambda: len(known(library)) == 2)
        before = library.runs
        for side in range(10, 210):
            paint(pictures / f"{side}.png", "blue", side=side)
        running.until(lambda: len(known(library)) == 202)
    assert running.total("added") == 202
    # One if the burst is quick; it never takes as many seconds as there are runs allowed here.
    assert library.runs - before <= 10


def test_what_is_not_indexed_starts_no_run(toy_encoder: ToyEncoder, pictures: Path) -> None:
    with CountingLibrary.create(pictures / "inside", toy_encoder) as library:
        assert isinstance(library, CountingLibrary)
        with Watch(library, [pictures]) as running:
            running.until(lambda: library.runs == 1)
            before = library.runs
            (pictures / "notes.md").write_text("nothing to see")
            paint(pictures / ".hidden" / "blue.png", "blue")
            paint(pictures / "@eaDir" / "blue.png", "blue")
            (pictures / "data.json").write_text("{}")
            time.sleep(5 * SETTLE)
            assert library.runs == before
            paint(pictures / "blue.png", "blue")
            running.until(lambda: len(known(library)) == 3)
            running.until(lambda: running.total("added") == 3)
            assert library.runs == before + 1
    assert len(running.reports) == 2


def test_a_folder_that_is_gone_is_reported_once_and_taken_up_when_it_is_back(
    library: CountingLibrary,
    pictures: Path,
    tmp_path: Path,
    toy_encoder: ToyEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watching, "RETRY_SECONDS", 0.1)
    other = paint(tmp_path / "other" / "white.png", "white").parent
    with Watch(library, [pictures, other]) as running:
        running.until(lambda: len(known(library)) == 3)
        pictures.rename(tmp_path / "away")
        running.until(lambda: len(running.reports) == 3)
        tries = library.runs
        running.until(lambda: library.runs > tries + 2)
        assert len(running.reports) == 3  # one for each folder, and one that it is gone
        folder, report = running.reports[2]
        assert folder == pictures
        assert report == IndexReport(problems=report.problems)
        assert str(pictures) in report.problems[0]
        assert len(known(library)) == 3  # nothing is removed

        paint(other / "cyan.png", "cyan")  # the other folder is watched all the while
        running.until(lambda: "cyan.png" in known(library))
        paint(tmp_path / "away" / "blue.png", "blue")
        (tmp_path / "away").rename(pictures)
        running.until(lambda: "blue.png" in known(library))
        paint(pictures / "yellow.png", "yellow")
        running.until(lambda: "yellow.png" in known(library))
    assert toy_encoder.images_seen == 6


def test_a_folder_that_is_back_unchanged_is_reported_back(
    library: CountingLibrary, pictures: Path, tmp_path: Path
) -> None:
    library.index(pictures)
    pictures.rename(tmp_path / "away")
    with Watch(library) as running:
        running.until(lambda: len(running.reports) == 1)
        (tmp_path / "away").rename(pictures)
        running.until(lambda: len(running.reports) == 2)
    assert running.reports[0][1].problems
    assert running.reports[1] == (pictures, IndexReport(unchanged=2))


def test_a_folder_that_is_deleted_and_made_again_at_once_is_watched_on(
    library: CountingLibrary, pictures: Path
) -> None:
    with Watch(library, [pictures]) as running:
        running.until(lambda: len(known(library)) == 2)
        shutil.rmtree(pictures)
        paint(pictures / "blue.png", "blue")
        running.until(lambda: set(known(library)) == {"blue.png"})
        paint(pictures / "cyan.png", "cyan")
        running.until(lambda: set(known(library)) == {"blue.png", "cyan.png"})


def test_a_library_that_another_process_writes_is_waited_for(
    library: CountingLibrary, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "LOCKED_SECONDS", 0.05)
    with Store.open(library.path) as other, Watch(library, [pictures]) as running:
        running.until(lambda: library.runs == 1)
        with other.writer():
            paint(pictures / "blue.png", "blue")
            before = library.runs
            running.until(lambda: library.runs > before + 2)
            assert len(running.reports) == 1
        running.until(lambda: "blue.png" in known(library))
    assert [report.added for _, report in running.reports] == [2, 1]


def test_a_stop_during_a_run_keeps_what_was_done_and_the_next_run_does_the_rest(
    tmp_path: Path,
) -> None:
    for side in range(8, 208):
        paint(tmp_path / "pictures" / f"{side}.png", "blue", side=side)
    called = threading.Event()

    class Signalling(ToyEncoder):
        def encode_images(self, images: Sequence[object]) -> np.ndarray:
            called.set()
            assert running.stop.wait(PATIENCE)
            return super().encode_images(images)

    encoder = Signalling()
    with Library.create(tmp_path / "photos.lib", encoder) as library:
        running = Watch(library, [tmp_path / "pictures"])
        with running:
            assert called.wait(PATIENCE)
        (_, report), *rest = running.reports
        assert rest == []
        assert report.interrupted
        assert 0 < report.added < 200
        assert len(known(library)) == report.added
        assert library.index(tmp_path / "pictures").added == 200 - report.added
    assert encoder.images_seen == 200


def test_a_half_written_picture_is_read_again_when_it_is_whole(
    library: Library, pictures: Path
) -> None:
    whole = paint(pictures.parent / "blue.png", "blue", side=64).read_bytes()
    with Watch(library, [pictures]) as running:
        running.until(lambda: len(known(library)) == 2)
        with (pictures / "blue.png").open("wb") as file:
            file.write(whole[: len(whole) // 2])
            file.flush()
            running.until(lambda: any(report.failed for _, report in running.reports))
            assert len(running.reports) == 2
            file.write(whole[len(whole) // 2 :])
        running.until(lambda: "blue.png" in known(library))
    assert library.failures() == []


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names there are valid text")
def test_a_name_that_is_no_text_does_not_end_the_watch(library: Library, pictures: Path) -> None:
    with Watch(library, [pictures]) as running:
        running.until(lambda: len(known(library)) == 2)
        for number in range(2):
            source = paint(pictures.parent / "new.png", "blue", side=10 + number)
            name = os.fsdecode(b"\xff%d.png" % number)
            source.rename(pictures / name)
            running.until(lambda name=name: name in known(library))
        paint(pictures / "cyan.png", "cyan")
        running.until(lambda: "cyan.png" in known(library))
    assert all(not report.problems for _, report in running.reports)


def test_polling_sees_what_happens_where_the_system_gives_no_notices(
    library: Library, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "POLL_SECONDS", 0.1)
    with Watch(library, [pictures], polling=True) as running:
        running.until(lambda: len(known(library)) == 2)
        paint(pictures / "new" / "blue.png", "blue")
        running.until(lambda: "new/blue.png" in known(library))
        shutil.rmtree(pictures / "new")
        running.until(lambda: len(known(library)) == 2)


def test_without_notices_the_folders_are_polled_and_that_is_said_once(
    library: Library, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import watchfiles

    real = watchfiles.watch

    def full(*paths: Path, force_polling: bool | None, **options: object) -> Iterator[object]:
        if not force_polling:
            raise OSError("OS file watch limit reached.")
        yield from real(*paths, force_polling=force_polling, **options)

    # The limit is the whole machine's: to exhaust it would disturb others.
    monkeypatch.setattr(watchfiles, "watch", full)
    monkeypatch.setattr(watching, "POLL_SECONDS", 0.1)
    with Watch(library, [pictures]) as running:
        running.until(lambda: len(known(library)) == 2)
        paint(pictures / "blue.png", "blue")
        running.until(lambda: "blue.png" in known(library))
    problems = [problem for _, report in running.reports for problem in report.problems]
    assert problems == [
        f"{pictures}: the system gives no notice of changes (OS file watch limit reached.);"
        " looking every few seconds"
    ]


def test_a_quiet_folder_is_looked_at_all_the_same(
    library: CountingLibrary, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "RESCAN_SECONDS", 0.1)
    with Watch(library, [pictures]) as running:
        running.until(lambda: library.runs >= 3)
    assert len(running.reports) == 1


def test_folders_inside_others_are_watched_once(library: CountingLibrary, pictures: Path) -> None:
    paint(pictures / "inside" / "blue.png", "blue")
    with Watch(library, [pictures / "inside", pictures, pictures]) as running:
        running.until(lambda: len(known(library)) == 3)
    assert [folder for folder, _ in running.reports] == [pictures]


@pytest.mark.parametrize("folders", [None, []])
def test_a_library_without_folders_has_nothing_to_watch(
    library: Library, folders: list[Path] | None
) -> None:
    with pytest.raises(UsageError, match="no folders yet"), Watch(library, folders) as running:
        running.join()


def test_a_new_folder_must_exist(library: Library, pictures: Path) -> None:
    with (
        pytest.raises(UsageError, match="nowhere: no such folder"),
        Watch(library, [pictures, pictures / "nowhere"]) as running,
    ):
        running.join()


def test_watching_without_its_extra_says_which(
    library: Library, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    with (
        pytest.raises(MissingExtraError, match=r"picture-retriever\[watch\]"),
        Watch(library, [pictures]) as running,
    ):
        running.join()
