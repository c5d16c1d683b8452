"""The page as a person uses it: a browser drives it on scikit-image's photographs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retriever import demo
from retriever.library import Library

pytest.importorskip("fastapi", reason="needs the extra [web]")
pytest.importorskip("skimage", reason="the photographs are scikit-image's")
sync_api = pytest.importorskip("playwright.sync_api", reason="drives the browser")

ROOT = Path(__file__).parents[1]
BROWSER = os.environ.get("RETRIEVER_BROWSER") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
if BROWSER is None:
    pytest.skip(
        "no browser is installed: apt-get install chromium, or name one in RETRIEVER_BROWSER",
        allow_module_level=True,
    )
PATIENCE = 30_000  # milliseconds for what takes one on a quiet machine
SIZES = {"wide": (1440, 900), "narrow": (390, 844)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> demo.Demo:
    place = demo.build(tmp_path_factory.mktemp("page"))
    # Two alike, and a text that is written from right to left.
    shutil.copyfile(place.pictures / "coffee.png", place.pictures / "coffee-again.png")
    (place.pictures / "rocket.txt").write_text("صاروخ على منصة الإطلاق\n火箭在发射台上\n", "utf-8")
    with Library.create(place.library) as library:
        library.index(place.pictures)
    return place


@pytest.fixture(scope="module")
def address(place: demo.Demo) -> Iterator[str]:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "cli", "serve", "--library", str(place.library)),
            *("--port", "0", "--cache", str(place.folder / "cache")),
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.search(r"http://\S+", line)
    assert found, line
    yield found[0]
    process.send_signal(signal.SIGTERM)
    with process:
        process.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        sync_api.expect.set_options(timeout=PATIENCE)
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=["wide"])
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A new page; whatever it asks of others, and every error, fails the test."""
    width, height = SIZES[request.param]
    context = browser.new_context(viewport={"width": width, "height": height})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    faults: list[str] = []
    page.on("console", lambda one: faults.append(one.text) if one.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))

    def look(asked: Any) -> None:
        if not asked.url.startswith((address, "blob:", "data:")):
            faults.append(f"it asked {asked.url}")

    page.on("request", look)
    page.goto(address)
    page.locator(".tile").first.wait_for()
    page.told = faults
    yield page
    context.close()
    assert faults == []


def refused(page: Any) -> None:
    """Takes the one line off the console that the browser writes when a question is refused."""
    assert len(page.told) == 1
    assert "Failed to load resource" in page.told.pop()


def first(page: Any) -> Any:
    return page.locator(".tile .words").first


def search(page: Any, text: str) -> None:
    page.fill("#q", text)
    sync_api.expect(page).to_have_url(re.compile(r"[?&]q="))


def test_pictures_appear_while_typing(page):
    sync_api.expect(page.locator(".tile")).to_have_count(15)
    page.locator("#q").press_sequentially("a cat", delay=30)
    sync_api.expect(first(page)).to_contain_text("cat")
    assert page.url.endswith("?q=a+cat")
    assert page.title() == "a cat · Retriever"
    sync_api.expect(page.locator(".badge.sure").first).to_contain_text("%")


def test_back_leads_to_what_was_asked_before(page):
    search(page, "a cat")
    sync_api.expect(first(page)).to_contain_text("cat")
    page.press("#q", "Enter")
    page.locator("#q").blur()
    search(page, "a rocket")
    sync_api.expect(first(page)).not_to_contain_text("cat")
    page.go_back()
    sync_api.expect(first(page)).to_contain_text("cat")
    assert page.input_value("#q") == "a cat"
    page.go_forward()
    assert page.input_value("#q") == "a rocket"


def test_a_search_has_an_address_of_its_own(page, address):
    page.goto(f"{address}?q=a+cat&mode=words&without=dog")
    sync_api.expect(first(page)).to_contain_text("cat")
    assert page.input_value("#mode") == "words"
    sync_api.expect(page.locator("#chips li")).to_have_count(1)


def test_no_good_match_is_told(page):
    search(page, "two dogs on a beach")
    sync_api.expect(page.locator("#status")).to_contain_text("No good match")


def test_near_duplicates_are_folded(page):
    search(page, "an espresso in a red cup")
    sync_api.expect(page.locator(".badge.copies").first).to_have_text("+1 alike")
    sync_api.expect(page.locator(".tile")).to_have_count(14)


def test_a_dropped_picture_finds_ones_like_it_and_captions(page, place):
    data = (place.pictures / "chelsea.png").read_bytes()
    page.evaluate(
        """async (bytes) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "x.png", {type: "image/png"}));
            const options = {dataTransfer: transfer, bubbles: true, cancelable: true};
            for (const name of ["dragenter", "dragover", "drop"]) {
                document.body.dispatchEvent(new DragEvent(name, options));
            }
        }""",
        list(data),
    )
    sync_api.expect(first(page)).to_contain_text("cat")
    sync_api.expect(page.locator("#chips li")).to_contain_text("like your picture")
    sync_api.expect(page.locator("#caption-answers li").first).to_contain_text("cat")
    page.locator("#chips button").click()
    sync_api.expect(page.locator("#chips")).to_be_hidden()
    sync_api.expect(page.locator(".tile")).to_have_count(15)


def test_a_chosen_picture_is_asked_with_and_weighed_against_a_text(page, place):
    page.set_input_files("#file", place.pictures / "rocket.jpg")
    sync_api.expect(page.locator("#chips li")).to_contain_text("like your picture")
    search(page, "a cat")
    page.select_option("#chips select", "0.25")
    sync_api.expect(first(page)).to_contain_text("cat")
    assert "weight=0.25" in page.url


def test_a_file_that_is_no_picture_is_told(page, tmp_path):
    (tmp_path / "x.png").write_text("no picture", encoding="utf-8")
    with page.expect_response("**/api/search**") as answer:
        page.set_input_files("#file", tmp_path / "x.png")
    assert answer.value.status == 422
    sync_api.expect(page.locator("#status")).to_contain_text("not a picture")
    refused(page)


def test_an_error_takes_the_former_answers_off_the_page(page, place, tmp_path):
    page.set_input_files("#file", place.pictures / "chelsea.png")
    sync_api.expect(page.locator("#caption-answers li").first).to_contain_text("cat")
    (tmp_path / "x.png").write_text("no picture", encoding="utf-8")
    page.set_input_files("#file", tmp_path / "x.png")
    sync_api.expect(page.locator("#status")).to_contain_text("not a picture")
    sync_api.expect(page.locator("#caption-answers")).not_to_be_visible()
    refused(page)


def test_a_picture_that_a_reload_drops_is_missed(page, place):
    page.set_input_files("#file", place.pictures / "rocket.jpg")
    sync_api.expect(page.locator("#chips li")).to_contain_text("like your picture")
    search(page, "a cat")
    page.reload()
    sync_api.expect(page.locator("#status")).to_contain_text("drop or choose it again")


def test_what_the_address_names_in_vain_is_told(page, address):
    page.goto(f"{address}?library=nowhere&q=cat")
    sync_api.expect(page.locator("#status")).to_contain_text("no library “nowhere” here")
    page.goto(f"{address}?item=99999")
    sync_api.expect(page.locator("#about")).to_contain_text("no picture 99999")
    sync_api.expect(page.locator("#copy")).not_to_be_visible()
    assert len(page.told) >= 1
    assert all("Failed to load resource" in one for one in page.told)
    page.told.clear()


def test_advice_is_that_of_a_page(page):
    search(page, "a beach with no people")
    sync_api.expect(page.locator("#notes")).to_contain_text("hardly understood")
    assert "--" not in page.locator("#notes").inner_text()


def test_more_like_this_captions_for_this_and_where_it_shows_it(page):
    search(page, "a cat")
    sync_api.expect(first(page)).to_contain_text("cat")
    page.locator(".tile").first.click()
    sync_api.expect(page.locator("#name")).to_have_text("chelsea.png")
    sync_api.expect(page.locator("#captions li")).to_have_count(2)
    sync_api.expect(page.locator("#why")).to_contain_text("Why it was found")
    page.click("#say")
    sync_api.expect(page.locator("#said li").first).to_contain_text("cat")
    page.click("#heat")
    sync_api.expect(page.locator("#large")).to_have_attribute("src", re.compile("/heat[?]"))
    sync_api.expect(page.locator("#large")).to_have_js_property("complete", True)
    assert page.locator("#large").evaluate("one => one.naturalWidth") > 0
    page.click("#alike")
    sync_api.expect(page.locator("#box")).not_to_be_visible()
    sync_api.expect(page.locator("#chips li")).to_contain_text("like this")
    sync_api.expect(first(page)).to_contain_text("cat")


def test_not_like_this(page):
    search(page, "an animal")
    cat = page.locator(".tile", has_text=re.compile(r"\bcat\b"))
    cat.click()
    page.click("#shun")
    sync_api.expect(page.locator("#chips li")).to_contain_text("not like this")
    sync_api.expect(cat).to_have_count(0)
    assert page.locator(".tile").count() > 5


def test_a_filter_completes_itself_from_what_is_there(page):
    page.click("#where")
    page.locator("#where").press_sequentially("na", delay=20)
    page.locator("#completions li", has_text="name").first.click()
    page.locator("#where").press_sequentially("con", delay=20)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.locator("#where").press_sequentially("coffee", delay=20)
    assert page.input_value("#where") == "name contains coffee"
    sync_api.expect(page.locator(".tile")).to_have_count(2)
    page.fill("#where", "wibble")
    with page.expect_response(lambda one: one.status == 400):
        page.press("#where", "Enter")
    sync_api.expect(page.locator("#status")).to_contain_text("wibble")
    refused(page)
    # The mark under what is wrong stands where it belongs, and the answers stay while one types.
    status = page.locator("#status").evaluate("one => getComputedStyle(one).whiteSpace")
    assert status == "pre-wrap"
    sync_api.expect(page.locator(".tile")).to_have_count(2)


def test_something_is_left_out(page):
    search(page, "a cat")
    sync_api.expect(first(page)).to_contain_text("cat")
    page.fill("#without", "a cat")
    page.press("#without", "Enter")
    sync_api.expect(page.locator("#chips .less")).to_have_text("a cat")
    sync_api.expect(page.locator(".tile .words", has_text="tabby")).to_have_count(0)


def test_the_keyboard_is_enough(page):
    page.locator("#q").blur()
    page.keyboard.press("/")
    page.keyboard.type("a cat")
    sync_api.expect(first(page)).to_contain_text("cat")
    page.keyboard.press("Escape")
    page.locator(".tile").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#name")).to_have_text("chelsea.png")
    page.keyboard.press("ArrowRight")
    sync_api.expect(page.locator("#name")).not_to_have_text("chelsea.png")
    page.keyboard.press("ArrowLeft")
    sync_api.expect(page.locator("#name")).to_have_text("chelsea.png")
    page.keyboard.press("c")
    sync_api.expect(page.locator("#said li").first).to_contain_text("cat")
    page.keyboard.press("Escape")
    sync_api.expect(page.locator("#box")).not_to_be_visible()
    assert page.evaluate("document.activeElement.className") == "tile"
    page.go_back()
    page.wait_for_timeout(300)
    assert not page.locator("#box").is_visible()
    page.keyboard.press("?")
    sync_api.expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("m")
    sync_api.expect(page.locator("#map")).to_be_visible()


def test_the_map_shows_all_and_opens_what_is_clicked(page):
    page.click("#show-map")
    sync_api.expect(page.locator("#map-status")).to_contain_text("15 pictures")
    page.locator("#map canvas").focus()
    for _ in range(4):
        page.keyboard.press("+")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#name")).not_to_be_empty()
    page.keyboard.press("Escape")
    assert "view=map" in page.url
    page.click("#show-grid")
    sync_api.expect(page.locator(".tile").first).to_be_visible()


def test_scripts_of_all_directions_are_shown_as_they_are_written(page):
    search(page, '"火箭在发射台上"')
    sync_api.expect(page.locator(".tile")).to_have_count(1)
    page.locator(".tile").first.click()
    arabic = page.locator("#captions li", has_text="صاروخ")
    sync_api.expect(arabic).to_be_visible()
    assert arabic.evaluate("one => getComputedStyle(one).direction") == "rtl"
    chinese = page.locator("#captions li", has_text="火箭")
    assert chinese.evaluate("one => getComputedStyle(one).direction") == "ltr"


DOT = bytes.fromhex(  # a picture of one point
    "47494638396101000100800000000000ffffff21f90401000000002c00000000010001000002024401003b"
)
FRAMES = """async (kind) => {
  const canvas = document.querySelector("#map canvas");
  const at = { clientX: 400, clientY: 300, bubbles: true, cancelable: true };
  const times = [];
  for (let frame = 0; frame < 40; frame += 1) {
    const begin = performance.now();
    const wheel = { ...at, deltaY: frame < 20 ? -60 : 60 };
    const key = { bubbles: true, key: frame % 2 ? "ArrowLeft" : "ArrowRight" };
    canvas.dispatchEvent(
      kind === "zoom" ? new WheelEvent("wheel", wheel) : new KeyboardEvent("keydown", key));
    // The page paints in the next frame; a task after it begins when the frame is done.
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    times.push(performance.now() - begin);
  }
  return times.sort((one, other) => one - other);
}"""


def test_a_map_of_ten_thousand_pictures_stays_fluid(page):
    rng = np.random.default_rng(0)
    middles = rng.random((40, 2))
    x, y = (middles[rng.integers(40, size=10_000)] + rng.normal(0, 0.03, (10_000, 2))).clip(0, 1).T
    many = {"ready": True, "message": None, "ids": list(range(1, 10_001))}
    page.route("**/thumbnail**", lambda route: route.fulfill(body=DOT, content_type="image/gif"))
    page.route("**/api/map**", lambda route: route.fulfill(json=many | {"x": [*x], "y": [*y]}))
    page.click("#show-map")
    sync_api.expect(page.locator("#map-status")).to_contain_text("10,000 pictures")
    for kind in ("zoom", "shift"):
        times = page.evaluate(FRAMES, kind)
        assert times[len(times) // 2] < 100, f"{kind}: {times}"  # ms; a frame alone is 17


@pytest.mark.parametrize("page", list(SIZES), indirect=True)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", ["", "?q=a+cat", "?q=two+dogs+on+a+beach", "?view=map", "item"])
def test_axe_finds_no_serious_fault(page, address, scheme, view):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="has axe-core")
    page.emulate_media(color_scheme=scheme)
    page.goto(address + (view if view != "item" else "?q=a+cat"))
    if view == "?view=map":
        sync_api.expect(page.locator("#map-status")).to_contain_text("15 pictures")
    else:
        page.locator(".tile").first.wait_for()
    if view == "item":
        page.locator(".tile").first.click()
        sync_api.expect(page.locator("#why")).to_contain_text("Why")
    found = axe.Axe().run(page).response["violations"]
    told = [
        f"{one['id']}: {one['help']} ({one['nodes'][0]['html'][:200]})"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert told == []
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= page.viewport_size["width"]  # nothing sticks out
