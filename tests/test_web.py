"""The server's API: the answers of the library, each problem told, and nothing harmed by anyone."""

from __future__ import annotations

import asyncio
import importlib
import io
import json
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLOURS, ToyEncoder, paint
from hypothesis import HealthCheck, given, settings
from PIL import Image
from tiny_models import write_checkpoint

from retriever.errors import PictureError
from retriever.library import Library

pytest.importorskip("fastapi", reason="needs the extra [web]")
from starlette.testclient import TestClient

from retriever.web import guard, service, thumbnails
from retriever.web.app import create_app
from retriever.web.service import Service

HOME = "http://127.0.0.1:8765"
SCRIPT = "<script>alert(1)</script>"
HOSTILE = '"><img src=x onerror=alert(1)>.png'  # a file's name


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    """A picture of each colour, with captions; one whose name and caption are scripts."""
    folder = tmp_path / "pictures"
    for colour in COLOURS:
        paint(folder / f"{colour}.png", colour)
        (folder / f"{colour}.txt").write_text(f"all {colour}\n", encoding="utf-8")
    paint(folder / "more" / HOSTILE, "red")
    (folder / "more" / HOSTILE).with_suffix(".txt").write_text(SCRIPT, encoding="utf-8")
    with Library.create(tmp_path / "colours.lib", ToyEncoder()) as library:
        library.index(folder)
        yield library


@pytest.fixture
def served(library: Library, tmp_path: Path) -> Service:
    library.share()
    return Service({"colours": library}, tmp_path / "cache", thumbnail_bytes=1 << 20)


@pytest.fixture
def client(served: Service) -> Iterator[TestClient]:
    with TestClient(create_app(served), base_url=HOME, raise_server_exceptions=False) as client:
        yield client


def ids(client: TestClient) -> dict[str, int]:
    """Ids of the pictures, by the names of their files."""
    listed = client.get("/api/items", params={"k": 200}).json()
    return {one["name"]: one["id"] for one in listed["hits"]}


def png(colour: str = "red", size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, COLOURS[colour]).save(buffer, "PNG")
    return buffer.getvalue()


def check_problem(response: Any, status: int, words: str) -> None:
    """A problem document whose sentence has these words, and nothing of our insides."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    told = response.json()
    assert told["status"] == status
    assert words in told["detail"]
    for inside in ("Traceback", 'File "', ".py", "sqlite3", os.sep + "tmp"):
        assert inside not in response.text


# ── answers ──────────────────────────────────────────────────────────────────────────────────────


def test_a_text_finds_what_the_library_finds(client, library):
    found = client.get("/api/search", params={"q": "red", "k": 3}).json()
    expected = library.search("red", k=3)
    assert [(one["id"], one["rank"]) for one in found["hits"]] == [
        (hit.item_id, hit.rank) for hit in expected
    ]
    assert [one["score"] for one in found["hits"]] == [round(hit.score, 6) for hit in expected]
    assert (found["library"], found["mode"], found["more"]) == ("colours", "image", True)


def test_pages_follow_each_other_without_a_gap(client):
    whole = client.get("/api/search", params={"q": "red", "k": 8}).json()["hits"]
    paged = []
    for offset in (0, 3, 6):
        page = client.get("/api/search", params={"q": "red", "k": 3, "offset": offset}).json()
        assert page["offset"] == offset
        paged += page["hits"]
    assert paged == whole
    assert page["more"] is False
    assert [one["rank"] for one in paged] == list(range(1, len(paged) + 1))


def test_a_picture_of_the_library_finds_ones_like_it_and_leaves_out_others(client):
    at = ids(client)
    found = client.get("/api/search", params={"image": at["red.png"], "k": 3, "all": True}).json()
    assert found["hits"][0]["name"] in ("red.png", HOSTILE)
    asked = {"q": "yellow", "without_image": at["red.png"], "k": 20}
    names = [one["name"] for one in client.get("/api/search", params=asked).json()["hits"]]
    assert "yellow.png" in names
    assert "red.png" not in names


def test_what_is_shown_can_be_excluded_by_a_text(client):
    asked = {"q": "yellow", "without": ["red"], "k": 20}
    names = [one["name"] for one in client.get("/api/search", params=asked).json()["hits"]]
    assert "red.png" not in names


def test_an_upload_finds_pictures_and_captions(client):
    found = client.post("/api/search", params={"k": 2}, files={"picture": png("green")}).json()
    assert found["hits"][0]["name"] == "green.png"
    said = client.post("/api/captions", params={"k": 1}, files={"picture": png("green")}).json()
    assert [one["caption"] for one in said["hits"]] == ["all green"]


def test_an_upload_and_a_text_are_weighed(client):
    picture = {"picture": png("red")}
    for weight, first in ((0.1, "green.png"), (10, "red.png")):
        asked = {"q": "green", "image_weight": weight, "k": 1}
        found = client.post("/api/search", params=asked, files=picture).json()
        assert found["hits"][0]["name"] in ((first, HOSTILE) if first == "red.png" else (first,))


def test_captions_of_a_picture_of_the_library(client):
    found = client.get("/api/captions", params={"id": ids(client)["blue.png"], "k": 1}).json()
    assert found["hits"][0]["caption"] == "all blue"


def test_a_filter_narrows_and_is_told_when_it_makes_no_sense(client):
    asked = {"q": "red", "where": 'name = "blue.png"'}
    assert [one["name"] for one in client.get("/api/search", params=asked).json()["hits"]] == [
        "blue.png"
    ]
    listed = client.get("/api/items", params={"where": 'name = "blue.png"'}).json()
    assert (listed["total"], listed["hits"][0]["name"]) == (1, "blue.png")
    for where in ("nonsense", "width >", "width > > 3"):
        check_problem(client.get("/api/search", params={"q": "red", "where": where}), 400, "")


def test_all_that_is_known_of_a_picture(client):
    item = client.get(f"/api/items/{ids(client)['cyan.png']}").json()
    assert (item["name"], item["width"], item["captions"][0]["text"]) == (
        "cyan.png",
        item["height"],
        "all cyan",
    )
    assert item["path"].endswith("/pictures/cyan.png")


def test_why_and_where(client):
    at = ids(client)["yellow.png"]
    why = client.get(f"/api/items/{at}/why", params={"q": "red green"}).json()
    assert [one["word"] for one in why["words"]] == ["red", "green"]
    assert all(one["change"] > 0 for one in why["words"])
    heat = client.get(f"/api/items/{at}/heat", params={"q": "red"})
    with Image.open(io.BytesIO(heat.content)) as opened:
        assert opened.format == "PNG"


@pytest.mark.parametrize("size", thumbnails.SIZES)
def test_a_thumbnail_is_a_small_jpeg_and_comes_from_the_cache_the_second_time(
    client, served, size, monkeypatch
):
    address = f"/api/items/{ids(client)['red.png']}/thumbnail?size={size}"
    first = client.get(address)
    assert first.headers["content-type"] == "image/jpeg"
    with Image.open(io.BytesIO(first.content)) as opened:
        assert max(opened.size) <= size
    monkeypatch.setattr(served, "decoded", lambda *_: pytest.fail("it was decoded again"))
    assert client.get(address).content == first.content
    known = client.get(address, headers={"if-none-match": first.headers["etag"]})
    assert (known.status_code, known.content) == (304, b"")


def test_thumbnails_keep_within_their_bound_and_the_oldest_go_first(tmp_path):
    picture = Image.effect_noise((320, 320), 90).convert("RGB")
    one = len(thumbnails.small_jpeg(picture, 320))
    kept = thumbnails.Thumbnails(tmp_path, 4 * one)
    for number in range(12):
        kept.get(f"{number:032x}", 320, lambda: picture)
        os.utime(tmp_path / "00" / f"{number:032x}-320.jpg", ns=(number, number))
    files = sorted(path.name for path in tmp_path.rglob("*.jpg"))
    assert 0 < len(files) * one <= 4 * one
    assert f"{11:032x}-320.jpg" in files
    assert f"{0:032x}-320.jpg" not in files


def test_a_cache_that_cannot_be_written_costs_time_not_the_answer(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    kept = thumbnails.Thumbnails(blocked, 1 << 20)
    assert kept.get("ab" * 16, 160, lambda: Image.new("RGB", (9, 9))).startswith(b"\xff\xd8")


def test_a_picture_comes_as_it_is_or_as_jpeg_if_browsers_do_not_show_it(client, library, tmp_path):
    address = f"/api/items/{ids(client)['red.png']}/picture"
    assert client.get(address).content == (tmp_path / "pictures" / "red.png").read_bytes()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "pictures" / "print.tiff")
    library.index(tmp_path / "pictures")
    shown = client.get(f"/api/items/{ids(client)['print.tiff']}/picture")
    assert shown.headers["content-type"] == "image/jpeg"
    assert shown.headers["content-security-policy"] == "default-src 'none'; sandbox"


def test_fields_have_the_values_that_the_library_holds(client):
    fields = {one["name"]: one for one in client.get("/api/fields").json()["fields"]}
    assert fields["width"]["type"] == "number"
    assert "more" in fields["folder"]["values"]


def test_health_metrics_and_libraries(client):
    assert client.get("/api/health").json()["status"] == "ok"
    client.get("/api/search", params={"q": "red"})
    told = client.get("/metrics").text
    assert 'retriever_requests_total{route="/api/search",status="200"} 1.0' in told
    assert 'retriever_pictures{library="colours"} 8.0' in told
    [one] = client.get("/api/libraries").json()["libraries"]
    assert (one["name"], one["items"], one["model"]) == ("colours", 8, "toy")


def test_routes_that_anyone_makes_up_do_not_fill_the_metrics(client):
    for number in range(20):
        client.get(f"/made/up/{number}")
    lines = [
        line
        for line in client.get("/metrics").text.splitlines()
        if "requests_total" in line and "404" in line
    ]
    assert len(lines) == 1


def test_what_another_process_writes_is_found_at_once(client, library, tmp_path):
    paint(tmp_path / "pictures" / "later.png", "blue")
    with Library.open(library.path, ToyEncoder()) as writer:
        writer.index(tmp_path / "pictures")
    asked = {"q": "blue", "k": 20, "all": True}
    names = [one["name"] for one in client.get("/api/search", params=asked).json()["hits"]]
    assert "later.png" in names


def test_progress_tells_of_changes_while_they_happen(served, library, tmp_path):
    """The stream itself: a test client waits for the end of an answer, which has none."""
    from retriever.web.app import _changes

    class Staying:
        async def is_disconnected(self) -> bool:
            return False

    async def listen() -> list[int]:
        stream = _changes(Staying(), served, "colours")  # type: ignore[arg-type]
        counts = [items(await anext(stream))]
        paint(tmp_path / "pictures" / "later.png", "blue")
        await asyncio.to_thread(library.index, tmp_path / "pictures")
        while counts[-1] == counts[0]:
            counts.append(items(await asyncio.wait_for(anext(stream), 20)))
        await stream.aclose()
        return counts

    def items(event: str) -> int:
        first, second, *_ = event.splitlines()
        assert first == "event: library"
        return json.loads(second.removeprefix("data: "))["items"]

    counts = asyncio.run(listen())
    assert (counts[0], counts[-1]) == (8, 9)


def test_several_libraries_are_asked_by_name(library, tmp_path):
    paint(tmp_path / "others" / "white.png", "white")
    with Library.create(tmp_path / "others.lib", ToyEncoder()) as others:
        others.index(tmp_path / "others")
        both = Service(
            {"colours": library, "others": others}, tmp_path / "cache", thumbnail_bytes=1 << 20
        )
        with TestClient(create_app(both), base_url=HOME) as client:
            found = client.get("/api/search", params={"q": "red", "library": "others"}).json()
            assert [one["name"] for one in found["hits"]] == ["white.png"]
            check_problem(
                client.get("/api/search", params={"q": "red", "library": "x"}), 404, "no library"
            )


def test_the_map_places_every_picture_and_keeps_the_places(client, served, tmp_path):
    pytest.importorskip("sklearn")

    def drawn() -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while not (answer := client.get("/api/map").json())["ready"]:
            assert answer["message"] is None, answer
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return answer

    first = drawn()
    assert sorted(first["ids"]) == sorted(ids(client).values())
    assert all(0 <= place <= 1 for place in first["x"] + first["y"])
    shelf = served.shelf(None)
    again = type(shelf.map)(shelf.library, next((tmp_path / "cache" / "maps").iterdir()))
    known_ids, known_points = again._read()
    assert known_ids.tolist() == first["ids"]
    assert known_points[:, 0].tolist() == pytest.approx(first["x"], abs=1e-4)
    paint(tmp_path / "pictures" / "late.png", "blue")
    with Library.open(shelf.library.path, encoder=ToyEncoder()) as writer:
        writer.index()
    deadline = time.monotonic() + 60
    while (late := drawn())["drawing"]:  # whoever looks meanwhile is told to look again
        assert time.monotonic() < deadline
    assert len(late["ids"]) == len(first["ids"]) + 1


def test_a_picture_whose_file_is_gone_is_not_found(client, library):
    number = ids(client)["green.png"]
    next(library.path.parent.glob("pictures/green.png")).unlink()
    for part in ("picture", "thumbnail"):
        check_problem(client.get(f"/api/items/{number}/{part}"), 404, f"file of picture {number}")
    assert client.get(f"/api/items/{number}").json()["captions"]


def test_new_pictures_join_a_map_among_those_they_are_like():
    from retriever.web.projection import placed

    rows = np.eye(4, dtype=np.float32)[[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0]]
    points = np.array([[0.1, 0.1]] * 5 + [[0.9, 0.9]] * 5, dtype=np.float32)
    found = placed(np.arange(11), rows, np.arange(10), points)
    assert found[:10] == pytest.approx(points)
    assert found[10] == pytest.approx([0.1, 0.1])


def test_the_page_and_what_it_needs_come_from_here(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    for script in ("app.js", "api.js", "style.css", "icon.svg"):
        assert client.get(f"/static/{script}").status_code == 200
    assert "http://" not in page.text.replace("http://www.w3.org", "")
    assert "https://" not in page.text


def test_the_description_names_each_route_and_problem(client):
    described = client.get("/openapi.json").json()
    assert {"/api/search", "/api/captions", "/api/items/{id}/thumbnail"} <= set(described["paths"])
    for methods in described["paths"].values():
        for operation in methods.values():
            assert {"200", "400", "404", "413", "503"} <= set(operation["responses"])


# ── many at once ─────────────────────────────────────────────────────────────────────────────────


def test_texts_of_many_threads_go_through_the_model_together_and_come_back_apart():
    from retriever.batching import BatchingEncoder

    class Slow(ToyEncoder):
        calls = 0

        def encode_texts(self, texts):
            self.calls += 1
            time.sleep(0.05)
            return super().encode_texts(texts)

    slow = Slow()
    shared = BatchingEncoder(slow)
    colours = [*COLOURS] * 6
    found: dict[int, np.ndarray] = {}

    def ask(number: int) -> None:
        found[number] = shared.encode_texts([colours[number]])

    threads = [threading.Thread(target=ask, args=[number]) for number in range(len(colours))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert slow.calls < len(colours) / 2
    for number, colour in enumerate(colours):
        assert found[number] == pytest.approx(ToyEncoder().encode_texts([colour]))


def test_a_fault_of_the_model_reaches_everyone_who_waited_for_it():
    from retriever.batching import BatchingEncoder
    from retriever.errors import EncoderError

    class Broken(ToyEncoder):
        def encode_texts(self, texts):
            raise EncoderError("the model is damaged")

    shared = BatchingEncoder(Broken())
    for _ in range(2):
        with pytest.raises(EncoderError, match="damaged"):
            shared.encode_texts(["red"])


def test_a_library_that_gets_another_default_model_is_answered_by_that_one(tmp_path):
    folder = tmp_path / "pictures"
    for colour in COLOURS:
        paint(folder / f"{colour}.png", colour)
    one, other = (str(write_checkpoint(tmp_path / name, seed=n)) for n, name in enumerate("ab"))
    with Library.create(tmp_path / "two.lib", one) as library:
        library.index(folder)
    with Library.open(tmp_path / "two.lib", other, add_model=True) as second:
        second.index(folder)
    served = Library.open(tmp_path / "two.lib")
    served.share()
    service = Service({"two": served}, tmp_path / "cache", thumbnail_bytes=1 << 20)
    with TestClient(create_app(service), base_url=HOME) as client:

        def asked() -> tuple[str, Any]:
            [record] = client.get("/api/libraries").json()["libraries"]
            hits = client.get("/api/search", params={"q": "red"}).json()["hits"]
            return record["model"], [(hit["id"], hit["score"]) for hit in hits]

        before = asked()
        encoder = service.shelf("two").library.encoder
        with Library.open(tmp_path / "two.lib") as chooser:
            chooser.use_model(other)
        after = asked()
        assert (before[0], after[0]) == (one, other)
        assert before[1] != after[1]
        with Library.open(tmp_path / "two.lib") as chooser:
            chooser.use_model(one)
        assert asked() == before
        assert service.shelf("two").library is not served
        assert service.shelf("two").library.encoder is not encoder


def test_an_encoder_that_still_serves_is_kept_when_a_library_is_opened_again(library):
    library.share()
    again = library.reopened()
    assert again is not library
    assert again.encoder is library.encoder
    assert [hit.path for hit in again.search("red", k=2)] == [
        hit.path for hit in library.search("red", k=2)
    ]


def test_a_flood_gets_503_and_the_server_goes_on(client, served, monkeypatch):
    monkeypatch.setattr(service, "MOST_WAITING", 0)
    flooded = client.get("/api/search", params={"q": "red"})
    check_problem(flooded, 503, "too many questions")
    assert flooded.headers["retry-after"] == "1"
    monkeypatch.undo()
    assert client.get("/api/search", params={"q": "red"}).status_code == 200
    assert served.in_flight == 0


def test_one_address_cannot_take_all_places():
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.2)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask(guarded: guard.Guard, client: str) -> int:
        statuses: list[int] = []
        scope = {
            **{"type": "http", "method": "GET", "path": "/", "query_string": b""},
            **{"headers": [(b"host", b"localhost")], "client": (client, 1)},
        }

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            statuses.append(message.get("status", 0))

        await guarded(scope, receive, send)
        return statuses[0]

    async def flood() -> tuple[list[int], list[int]]:
        guarded = guard.Guard(slow)
        one = [ask(guarded, "a") for _ in range(guard.MOST_OF_ONE + 5)]
        others = [ask(guarded, "b") for _ in range(3)]
        found = await asyncio.gather(*one, *others)
        assert not guarded._busy
        return list(found[: len(one)]), list(found[len(one) :])

    one, others = asyncio.run(flood())
    assert one.count(429) == 5
    assert others == [200, 200, 200]


def test_searches_while_another_indexes_are_all_right(client, library, tmp_path):
    """Sixteen at once beside a writer: every answer is whole, and red pictures come first."""
    faults: list[object] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answer = client.get("/api/search", params={"q": "red", "k": 1, "all": True})
            if answer.status_code != 200 or answer.json()["hits"][0]["score"] < 0.99:
                faults.append(answer.text)

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    with Library.open(library.path, ToyEncoder()) as writer:
        for number in range(5):
            paint(tmp_path / "pictures" / f"{number}.png", "blue")
            writer.index(tmp_path / "pictures")
    stop.set()
    for thread in threads:
        thread.join()
    assert faults == []


# ── hostile requests ─────────────────────────────────────────────────────────────────────────────


def bomb() -> bytes:
    """A PNG of 900 million pixels in some hundred bytes."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


UPLOADS = {
    "nothing": (b"", "empty"),
    "a text": (b"hello", "not a picture"),
    "a page": (b"<html><script>alert(1)</script>", "not a picture"),
    "a drawing with a script": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a picture"),
    "a bomb": (bomb(), "pixels"),
    "half a picture": (png(size=(300, 300))[:200], "the picture"),
    "a pickle": (b"\x80\x04cos\nsystem\n(S'id'\ntR.", "not a picture"),
    "zeros": (bytes(100_000), "not a picture"),
}


@pytest.mark.parametrize("what", UPLOADS)
@pytest.mark.parametrize("address", ["/api/search", "/api/captions"])
def test_an_upload_that_is_no_picture_is_told_so_and_leaves_nothing(
    client, address, what, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    data, words = UPLOADS[what]
    check_problem(client.post(address, files={"picture": data}), 422, words)
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/static/....//app.py",
        "/static//etc/passwd",
        "/api/items/..%2f..%2fetc%2fpasswd",
        "/api/items/../../etc/passwd",
        "/etc/passwd",
        "/api/items/1%00.png/picture",
        "/%5c%5chost%5cshare",
    ],
)
def test_no_address_leads_out_of_the_library(client, path):
    answer = client.get(path)
    assert answer.status_code in (404, 405, 422)
    assert "root:" not in answer.text
    assert "def " not in answer.text


@pytest.mark.parametrize("id", ["0", "-1", "99999999", "1e3", "9" * 30, "one", "1;drop", "%00"])
@pytest.mark.parametrize("rest", ["", "/picture", "/thumbnail", "/heat?q=red", "/why?q=red"])
def test_ids_of_nothing_are_told_so(client, id, rest):
    answer = client.get(f"/api/items/{id}{rest}")
    assert answer.status_code in (404, 422)
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_removed_picture_is_shown_no_more_though_its_file_is_there(client, library, tmp_path):
    at = ids(client)["green.png"]
    assert client.get(f"/api/items/{at}/picture").status_code == 200
    library.remove(tmp_path / "pictures" / "green.png")
    for rest in ("", "/picture", "/thumbnail", "/heat?q=red", "/why?q=red"):
        check_problem(client.get(f"/api/items/{at}{rest}"), 404, "no picture")
    check_problem(client.get("/api/search", params={"image": at}), 404, "no picture")


def test_a_picture_that_could_not_be_read_is_never_served(client, library, tmp_path):
    (tmp_path / "pictures" / "secret.png").write_bytes(b"password")
    library.index(tmp_path / "pictures")
    with library._store.snapshot() as rows:
        [failed] = rows.failures()
    check_problem(client.get(f"/api/items/{failed.item_id}/picture"), 404, "no picture")


def test_a_file_that_became_something_else_is_not_served(client, tmp_path):
    at = ids(client)["blue.png"]
    (tmp_path / "pictures" / "blue.png").write_bytes(b"<script>alert(1)</script>")
    answer = client.get(f"/api/items/{at}/picture")
    assert answer.status_code == 422
    assert "script" not in answer.text


def test_a_link_that_a_picture_became_gives_away_no_other_file(client, tmp_path):
    (tmp_path / "secret.txt").write_text("password", encoding="utf-8")
    at = ids(client)["blue.png"]
    (tmp_path / "pictures" / "blue.png").unlink()
    (tmp_path / "pictures" / "blue.png").symlink_to(tmp_path / "secret.txt")
    assert "password" not in client.get(f"/api/items/{at}/picture").text


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8765", "", "[::1", "0x7f.1"],
)
def test_a_forged_host_is_refused(client, host):
    answer = client.get("/api/search", params={"q": "red"}, headers={"host": host})
    check_problem(answer, 421, "not asked for by that name")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8765"])
def test_this_machine_is_asked_for_by_any_of_its_names(client, host):
    assert client.get("/api/health", headers={"host": host}).status_code == 200


def test_pages_of_other_origins_neither_ask_nor_show(client):
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
    ):
        check_problem(client.get("/api/items/1/picture", headers=headers), 403, "other origins")
    own = client.get("/api/health", headers={"origin": HOME})
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers
    assert own.headers["cross-origin-resource-policy"] == "same-origin"


def test_an_origin_that_is_allowed_may_read(served):
    allowed = "http://localhost:3000"
    with TestClient(create_app(served, origins=[allowed]), base_url=HOME) as client:
        answer = client.get("/api/health", headers={"origin": allowed})
        assert answer.headers["access-control-allow-origin"] == allowed
        before = client.options("/api/search", headers={"origin": allowed})
        assert before.status_code == 204
        assert client.get("/api/health", headers={"origin": "http://x"}).status_code == 403


def test_every_answer_keeps_browsers_from_taking_it_for_something_else(client):
    for address in ("/", "/api/health", "/nothing", "/static/app.js", "/api/items/1/thumbnail"):
        headers = client.get(address).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy


def test_scripts_in_captions_and_names_stay_text(client):
    answer = client.get("/api/search", params={"q": "red", "k": 20, "all": True})
    assert answer.headers["content-type"] == "application/json"
    [hit] = [one for one in answer.json()["hits"] if one["caption"] == SCRIPT]
    assert hit["name"] == HOSTILE


def test_too_much_is_refused_whether_it_is_announced_or_not(client, monkeypatch):
    monkeypatch.setattr(guard, "MOST_BYTES", 1000)
    large = {"picture": bytes(5000)}
    check_problem(client.post("/api/search", files=large), 413, "at most")

    def endless() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="picture"; filename="a"\r\n\r\n'
        for _ in range(100):
            yield bytes(100)

    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = client.post("/api/search", content=endless(), headers=headers)
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("parameters", "status"),
    [
        ({"q": "red\0"}, 422),
        ({"q": "x" * 3000}, 422),
        ({"q": ""}, 400),
        ({"q": "red", "k": 0}, 422),
        ({"q": "red", "k": 10**9}, 422),
        ({"q": "red", "k": "NaN"}, 422),
        ({"q": "red", "offset": -1}, 422),
        ({"q": "red", "offset": 10**9}, 422),
        ({"q": "red", "text_weight": "inf"}, 422),
        ({"q": "red", "text_weight": 0}, 400),
        ({"q": "red", "mode": "sql"}, 422),
        ({"q": "red", "without": ["x"] * 50}, 422),
        ({"q": "red", "where": "(" * 1900}, 400),
        ({"q": "red", "where": "name = 'x'; DROP TABLE items; --"}, 400),
        ({"q": "red", "image": "/etc/passwd"}, 422),
        ({"q": "./etc/passwd.png"}, 200),  # a text like any other
        ({"q": "red + /etc/passwd"}, 200),
        ({"q": "red", "without": ["/etc/passwd"]}, 200),
        ({"q": "\U0001f600 \u202e"}, 200),
        ({"q": "red", "min_confidence": 2}, 422),
    ],
)
def test_parameters_that_make_no_sense_are_told_so(client, parameters, status):
    answer = client.get("/api/search", params=parameters)
    assert answer.status_code == status, answer.text
    assert "passwd" not in answer.text or status == 422


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "POST"])
@pytest.mark.parametrize("path", ["/api/items/1", "/api/libraries", "/"])
def test_nothing_can_be_changed(client, method, path):
    assert client.request(method, path).status_code == 405


def test_headers_that_lie_about_the_length_are_refused(client):
    for length in ("-1", "1e9", "99999999999999", "\u0661"):
        headers = [(b"content-length", length.encode())]
        answer = client.get("/api/health", headers=headers)
        assert answer.status_code in (400, 413)


def test_an_address_without_end_is_refused(client):
    check_problem(client.get("/api/search?q=" + "x" * 20_000), 414, "at most")


def test_a_fault_of_ours_tells_nothing_of_our_insides(client, served, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("secret in /tmp/secret.py")

    monkeypatch.setattr(served, "shelf", broken)
    answer = client.get("/api/search", params={"q": "red"})
    check_problem(answer, 500, "should not have")
    assert "secret" not in answer.text


def test_with_a_token_nothing_is_seen_without_it(served):
    with TestClient(create_app(served, token="much-secret"), base_url=HOME) as client:
        for address in ("/", "/api/search?q=red", "/static/app.js", "/metrics", "/api/items/1"):
            check_problem(client.get(address), 401, "token")
        check_problem(client.get("/?token=wrong"), 401, "token")
        bearer = {"authorization": "Bearer much-secret"}
        assert client.get("/api/health", headers=bearer).status_code == 200
    with TestClient(create_app(served, token="much-secret"), base_url=HOME) as client:
        shown = client.get("//evil.example/?token=much-secret&q=red", follow_redirects=False)
        assert shown.status_code in (303, 401)
        assert not shown.headers.get("location", "/").startswith("//")
    with TestClient(create_app(served, token="much-secret"), base_url=HOME) as client:
        entered = client.get("/?token=much-secret&q=red", follow_redirects=False)
        assert (entered.status_code, entered.headers["location"]) == (303, "/?q=red")
        assert "HttpOnly" in entered.headers["set-cookie"]
        assert client.get("/api/health").status_code == 200  # by the cookie


def test_a_model_that_is_gone_is_told_and_the_rest_goes_on(client, library, monkeypatch):
    def gone(*_: object) -> None:
        raise PictureError("it cannot be read")

    monkeypatch.setattr(library.encoder, "encode_texts", gone)
    assert client.get("/api/search", params={"q": "red"}).status_code == 422
    assert client.get("/api/items").status_code == 200


# ── the description ──────────────────────────────────────────────────────────────────────────────

schemathesis = pytest.importorskip("schemathesis", reason="reads the description")


@pytest.fixture
def described(served: Service) -> Any:
    app = create_app(served, hosts=["testserver"])
    # An endless stream; what it tells is tested above.
    return schemathesis.openapi.from_asgi("/openapi.json", app).exclude(path="/api/progress")


def test_each_operation_answers_as_it_is_described(described):
    checks = importlib.import_module("schemathesis.specs.openapi.checks")
    names = []
    for found in described.get_all_operations():
        operation = found.ok()
        names.append(operation.label)

        @given(case=operation.as_strategy())
        @settings(
            max_examples=20, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck]
        )
        def answers(case: Any) -> None:
            # That a filter makes sense, or that anything is asked at all, is more than types tell.
            case.call_and_validate(excluded_checks=[checks.positive_data_acceptance])

        answers()
    assert "POST /api/search" in names
    assert len(names) > 12
