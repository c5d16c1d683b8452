"""A real server beside real commands: found by its socket, ended by a signal, asked by others."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ToyEncoder, paint
from PIL import Image

import cli
from retriever.library import Library
from retriever.running import NotRunningError, ask, is_ours, socket_path

pytest.importorskip("fastapi", reason="needs the extra [web]")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs sockets of the file system")

ROOT = Path(__file__).parents[1]
SECONDS = 60


@pytest.fixture
def short() -> Iterator[Path]:
    """A private folder whose name is short enough for a socket's, as those of a test are not."""
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder with pictures, a library of them, and a private folder for sockets; see `short`."""
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp") as folder:
        yield fill(Path(folder))


def fill(place: Path) -> Path:
    for colour in ("red", "green", "blue"):
        paint(place / "pictures" / f"{colour}.png", colour)
        (place / "pictures" / f"{colour}.txt").write_text(f"all {colour}", encoding="utf-8")
    more = {"file": "red.png", "caption": "all red", "tag": ["warm", "bright"], "stars": 4}
    (place / "pictures" / "captions.jsonl").write_text(json.dumps(more), encoding="utf-8")
    (place / "run").mkdir(mode=0o700)
    with Library.create(place / "c.lib") as library:
        library.index(place / "pictures")
    return place


def environment(place: Path) -> dict[str, str]:
    return os.environ | {"XDG_RUNTIME_DIR": str(place / "run"), "PYTHONPATH": str(ROOT)}


def serve(place: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """A running server, and its address."""
    command = [sys.executable, "-m", "cli", "serve", "--library", str(place / "c.lib")]
    command += ["--port", "0", "--cache", str(place / "cache"), *options]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(place),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.search(r"http://\S+", line)
    assert found, line + process.stderr.read()
    return process, found[0]


def end(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGINT)
    with process:  # which closes its pipe too
        return process.wait(SECONDS)


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[str]:
    process, address = serve(place)
    wait_for(place)
    yield address
    end(process)


def wait_for(place: Path) -> None:
    """Until the server answers at its socket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(place / "run"))
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                ask(place / "c.lib", {})
            except NotRunningError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            else:
                return


def run(place: Path, *arguments: str, cwd: Path | None = None) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "cli", *arguments, "--library", str(place / "c.lib")],
        cwd=cwd or place,
        env=environment(place),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["search", "a red picture"],
        ["search", "a red picture", "--json", "-k", "2"],
        ["search", "a red picture", "--explain"],
        ["search", "red", "--paths", "-0"],
        ["search", "red", "--without", "blue", "--where", "width > 1"],
        ["search", "red", "--where", "width > 1000"],
        ["search", "./pictures/red.png + green"],
        ["search", "--image", "pictures/blue.png", "--all"],
        ["search", "the words of nothing", "--mode", "words"],
        ["search", "red", "--min-confidence", "99.9"],
        ["caption", "pictures/green.png"],
        ["caption", "pictures/green.png", "--json", "-k", "1"],
        ["search", "red", "--where", "nonsense"],
        ["search", "./nothing.png"],
        ["caption", "pictures/red.txt"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_the_command_line_says_the_same_with_a_server_and_without(place, address, arguments):
    assert run(place, *arguments) == run(place, *arguments, "--no-server")


def test_with_a_server_no_model_is_loaded(place, address):
    code = """
import sys
from cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", sorted({"numpy", "onnxruntime", "faiss", "PIL"} & set(sys.modules)))
"""
    found = subprocess.run(
        [sys.executable, "-c", code, "search", "red", "--library", str(place / "c.lib")],
        cwd=ROOT,
        env=environment(place),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.splitlines()[-1] == "loaded: []"
    assert len(found.stdout.splitlines()) > 3


def test_the_page_answers_over_http(address):
    with urllib.request.urlopen(f"{address}api/search?q=red", timeout=SECONDS) as answer:
        assert json.load(answer)["hits"][0]["name"] == "red.png"


def test_a_server_that_ends_takes_its_socket_with_it(place, monkeypatch):
    own = place / "own"
    (own / "run").mkdir(mode=0o700, parents=True)
    (own / "c.lib").symlink_to(place / "c.lib")
    process, _ = serve(own)
    wait_for(own)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(own / "run"))
    path = socket_path(own / "c.lib")
    assert path is not None
    assert path == socket_path(place / "c.lib")  # the same library by another name
    assert path.stat().st_mode & 0o077 == 0
    process.send_signal(signal.SIGINT)
    with process:
        assert process.stderr
        assert process.stderr.read().endswith("Stopped.\n")
        assert process.wait(SECONDS) == 0
    assert not path.exists()


def test_a_library_that_is_deleted_is_not_answered_from(place):
    own = fill(place / "deleted")
    process, address = serve(own)
    wait_for(own)
    assert run(own, "search", "red")[0] == 0
    shutil.rmtree(own / "c.lib")
    code, said, told = run(own, "search", "red")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{address}api/search?q=red", timeout=SECONDS)
    end(process)
    assert (code, said) == (1, "")
    assert "there is no library at" in told


def test_what_a_killed_server_left_is_no_hindrance(place, monkeypatch):
    own = place / "killed"
    (own / "run").mkdir(mode=0o700, parents=True)
    (own / "c.lib").symlink_to(place / "c.lib")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(own / "run"))
    process, _ = serve(own)
    wait_for(own)
    process.kill()
    with process:
        process.wait(SECONDS)
    path = socket_path(own / "c.lib")
    assert path is not None
    assert path.exists()
    with pytest.raises(NotRunningError):
        ask(own / "c.lib", {})
    assert run(own, "search", "red")[0] == 0  # by itself
    process, _ = serve(own)
    wait_for(own)
    end(process)


def test_a_folder_that_others_may_enter_is_not_trusted(short, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    folder = short / "retriever"
    folder.mkdir(mode=0o755)
    path = socket_path(short / "x.lib")
    assert path is not None
    assert path.parent == folder
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(path))
        listening.listen()
        assert not is_ours(folder)
        with pytest.raises(NotRunningError):
            ask(short / "x.lib", {})
        folder.chmod(0o700)
        assert is_ours(folder)


def test_a_folder_that_may_not_even_be_looked_into_has_no_server(short, monkeypatch):
    """As after `sudo -u somebody`, which leaves the variable as it was."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short / "locked"))
    (short / "locked" / "retriever").mkdir(parents=True)
    (short / "locked").chmod(0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        with pytest.raises(NotRunningError):
            ask(Path("x.lib"), {})
    finally:
        if is_root:
            os.seteuid(0)
        (short / "locked").chmod(0o700)


def test_an_answer_that_is_none_of_ours_is_left_alone(short, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    (short / "retriever").mkdir(mode=0o700)
    path = socket_path(short / "x.lib")

    async def talk(said: bytes) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(said)
            writer.close()

        server = await asyncio.start_unix_server(answer, path)
        with pytest.raises(NotRunningError):
            await asyncio.to_thread(ask, short / "x.lib", {})
        server.close()

    for said in (b"", b"hello\n", b"[]\n", b'{"protocol": 99}\n', b'{"protocol":'):
        asyncio.run(talk(said))


def test_beyond_this_machine_a_token_is_made_up_and_needed(place):
    process, address = serve(place, "--host", "0.0.0.0")
    try:
        bare, _, token = address.partition("?token=")
        assert len(token) >= 16
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{bare}api/health", timeout=SECONDS)
        with refused.value as told:
            assert told.code == 401
        asked = urllib.request.Request(
            f"{bare}api/health", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(asked, timeout=SECONDS) as answer:
            assert json.load(answer)["status"] == "ok"
    finally:
        end(process)


def test_a_port_that_is_taken_is_told(place):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = CliRunner().invoke(
            cli.main, ["serve", "--library", str(place / "c.lib"), "--port", str(port)]
        )
    assert done.exit_code == 2
    assert "cannot be listened on" in done.stderr
    assert f"--port {port + 1}" in done.stderr


def test_an_address_that_is_not_ours_is_told_without_advice_that_does_not_help(place):
    done = CliRunner().invoke(
        cli.main, ["serve", "--library", str(place / "c.lib"), "--host", "192.0.2.1"]
    )
    assert done.exit_code == 2
    assert "192.0.2.1:8765 cannot be listened on" in done.stderr
    assert "--port" not in done.stderr


def test_a_cache_that_cannot_be_had_is_told(place):
    (place / "a-file").write_text("", encoding="utf-8")
    process, _ = serve(place, "--cache", str(place / "a-file" / "cache"))
    assert process.stderr
    told = process.stderr.readline()
    end(process)
    assert f"Nothing can be kept in {place / 'a-file' / 'cache'} (Not a directory)" in told


def test_a_library_that_is_not_there_is_told(tmp_path):
    done = CliRunner().invoke(cli.main, ["serve", "--library", str(tmp_path / "no.lib")])
    assert done.exit_code == 1
    assert "retriever index FOLDER" in done.stderr


# ── assistants ───────────────────────────────────────────────────────────────────────────────────


def test_an_assistant_searches_looks_and_asks(place):
    """A session of the official client with `retriever mcp` as its child."""
    pytest.importorskip("mcp", reason="needs the extra [mcp]")
    from mcp import Client, StdioServerParameters
    from mcp.client.stdio import stdio_client

    server = StdioServerParameters(
        command=sys.executable,
        args=["-m", "cli", "mcp", "--library", str(place / "c.lib")],
        env=environment(place),
        cwd=ROOT,
    )

    async def session() -> None:
        async with Client(stdio_client(server)) as client:
            tools = (await client.list_tools()).tools
            assert {tool.name for tool in tools} == {
                *("search_pictures", "similar_pictures", "captions_for"),
                *("show_picture", "library_info"),
            }
            assert all(tool.annotations and tool.annotations.read_only_hint for tool in tools)
            found = await client.call_tool("search_pictures", {"text": "a red picture", "k": 2})
            told, *pictures = found.content
            record = json.loads(told.text)
            assert Path(record["hits"][0]["path"]).name == "red.png"
            assert [one.mime_type for one in pictures] == ["image/jpeg"] * 2
            at = str(record["hits"][0]["id"])
            alike = await client.call_tool("similar_pictures", {"picture": at, "k": 1})
            assert json.loads(alike.content[0].text)["hits"][0]["id"] == int(at)
            picture = str(place / "pictures" / "green.png")
            said = await client.call_tool("captions_for", {"picture": picture, "k": 1})
            assert json.loads(said.content[0].text)[0]["caption"].startswith("all ")
            seen = await client.call_tool("show_picture", {"id": int(at)})
            shown = json.loads(seen.content[0].text)
            assert shown["captions"] == ["all red"]
            assert shown["extras"] == {"tag": ["bright", "warm"], "stars": [4]}
            assert seen.content[1].mime_type == "image/jpeg"
            info = await client.call_tool("library_info", {})
            assert json.loads(info.content[0].text)["pictures"] == 3
            for name, asked, words in (
                ("search_pictures", {"text": "red", "where": "nonsense"}, "nonsense"),
                ("show_picture", {"id": 999}, "no picture 999"),
                ("captions_for", {"picture": "/etc/passwd"}, "not a picture"),
            ):
                failed = await client.call_tool(name, asked)
                assert failed.is_error
                assert words in failed.content[0].text

    asyncio.run(asyncio.wait_for(session(), SECONDS))


# ── notebooks, files, terminals ──────────────────────────────────────────────────────────────────


@pytest.fixture
def toys(tmp_path: Path) -> Iterator[Library]:
    for colour in ("red", "green"):
        paint(tmp_path / "pictures" / f"{colour}.png", colour)
    (tmp_path / "pictures" / "red.txt").write_text("<b>red</b>", encoding="utf-8")
    with Library.create(tmp_path / "toys.lib", ToyEncoder()) as library:
        library.index(tmp_path / "pictures")
        yield library


def test_a_notebook_shows_an_answer_as_a_grid_of_thumbnails(toys, tmp_path):
    answer = toys.search("red", k=2)
    shown = answer._repr_html_()
    assert shown.count("<img ") == 2
    assert shown.count("data:image/jpeg;base64,") == 2
    assert "&lt;b&gt;red&lt;/b&gt;" in shown
    assert "<b>red" not in shown
    assert f"{answer[0].score:.3f}" in shown
    (tmp_path / "pictures" / "green.png").unlink()
    assert "green.png" in toys.search("red", k=2)._repr_html_()  # named, not shown


def test_a_contact_sheet_holds_all_that_it_shows(place, tmp_path):
    sheet = tmp_path / "red.html"
    code, _, told = run(place, "search", "<i>red", "--sheet", str(sheet))
    assert (code, str(sheet) in told) == (0, True)
    page = sheet.read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 3
    assert "&lt;i&gt;red" in page
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    code, _, told = run(place, "search", "red", "--sheet", str(tmp_path / "no" / "red.html"))
    assert (code, "cannot be written" in told) == (2, True)


SIGNS = {"kitty": "\x1b_Ga=T", "iterm2": "\x1b]1337;File=", "sixel": "\x1bP0", "blocks": "\x1b["}


@pytest.mark.parametrize("kind", SIGNS)
def test_a_terminal_shows_pictures_in_each_way(place, kind):
    pytest.importorskip("chafa", reason="needs the extra [preview]")
    code, shown, _ = run(place, "search", "red", "-k", "1", "--preview-as", kind)
    assert code == 0
    assert SIGNS[kind] in shown
    assert "red.png" in shown


@pytest.mark.parametrize(
    ("environment", "sign"),
    [
        ({"TERM": "xterm-kitty", "KITTY_PID": "1"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "mlterm"}, "sixel"),
        ({"TERM": "xterm-256color"}, "blocks"),
    ],
)
def test_what_a_terminal_can_show_is_found_by_its_environment(environment, sign):
    pytest.importorskip("chafa", reason="needs the extra [preview]")
    code = (
        "import sys; from PIL import Image; from retriever.preview import render;"
        "sys.stdout.buffer.write(render(Image.new('RGB', (64, 64), 'red')))"
    )
    kept = {name: value for name, value in os.environ.items() if "TERM" not in name}
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        check=True,
    ).stdout.decode()
    assert SIGNS[sign] in found
    if sign == "blocks":
        assert not any(SIGNS[other] in found for other in ("kitty", "iterm2", "sixel"))


def test_a_pipe_gets_no_pictures(place):
    code, shown, _ = run(place, "search", "red", "--preview")
    assert code == 0
    assert "\x1b" not in shown


def test_a_preview_of_a_picture_that_is_gone_names_it(toys, tmp_path):
    pytest.importorskip("chafa", reason="needs the extra [preview]")
    from retriever.finding import _previewed

    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    assert _previewed(tmp_path / "one.png", "blocks").startswith(b"\x1b")
    assert b"none.png" in _previewed(tmp_path / "none.png", "blocks")


def test_a_name_that_is_too_long_for_a_socket_is_another_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("x" * 90)))
    path = socket_path(tmp_path / "x.lib")
    assert path is not None
    assert len(os.fsencode(path)) < 104
