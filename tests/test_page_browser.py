"""report.html in a real browser: it loads nothing, nothing overflows, it sorts, and it obeys light
and dark. Needs Playwright (the extra `browser`) and an installed Chromium.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minilora.summarization.report.page import write_report
from tests.test_page import HOSTILE, save_run

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of 30 dialogues with one that attacks, and an unfinished run."""
    folder = tmp_path_factory.mktemp("pages")
    run = save_run(folder / "run")
    unfinished = save_run(folder / "unfinished", end=False, scored=False)
    found = json.loads((run / "evaluation.json").read_text())
    found["examples"] = [
        example | {"rouge1_finetuned": example["rouge1_base"] + (7 * i) % 30 - 15 + 0.5}
        for i, example in enumerate((found["examples"] * 8)[:30])
    ]
    (run / "evaluation.json").write_text(json.dumps(found))
    written = {"one": run, "unfinished": unfinished}
    for name, directory in written.items():
        write_report(directory, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in written}


@pytest.fixture
def show(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    """Open a page; at the end of the test it must have said and asked for nothing."""
    said: list[str] = []
    asked: list[str] = []
    contexts = []

    def show(name: str, width: int = 1280, scheme: str = "light", **more: Any) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, **more
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(pages[name].as_uri())
        return page

    show.said = said  # type: ignore[attr-defined]
    yield show
    for context in contexts:
        context.close()
    assert said == []
    assert asked == [url for url in asked if url.startswith("file:")]
    assert len(asked) == len(contexts)


# Whatever reaches beyond the window's right edge, save what scrolls within itself.
OVERFLOWING = """() => [...document.body.querySelectorAll("*")]
    .filter(e => e.getClientRects().length && !e.closest(".scroll *, title"))
    .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5
              || e.getBoundingClientRect().left < -0.5)
    .map(e => e.outerHTML.slice(0, 100))"""
# Texts of plots that leave their plot, and elements whose own content is cut off.
CUT = """() => [...document.querySelectorAll("svg.plot text")].filter(e => {
        const [a, b] = [e.getBoundingClientRect(), e.closest("svg").getBoundingClientRect()];
        return a.width && (a.left < b.left - 0.5 || a.right > b.right + 0.5
                           || a.top < b.top - 0.5 || a.bottom > b.bottom + 0.5);
    }).map(e => e.textContent)"""


@pytest.mark.parametrize("name", ["one", "unfinished"])
def test_nothing_overflows(show: Any, name: str) -> None:
    page = show(name)
    for width in (375, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(OVERFLOWING) == []
        assert page.evaluate(CUT) == []


def gains(page: Any) -> list[float]:
    """Of the dialogues that can be seen, in their order on the page."""
    cards = page.locator(".card:visible")
    return [float(v.split()[0]) for v in cards.evaluate_all("all => all.map(c => c.dataset.gain)")]


def test_dialogues_are_sorted_and_shown_ten_at_a_time(show: Any) -> None:
    page = show("one")
    before = gains(page)
    assert len(before) == 10
    every = [(7 * i) % 30 - 15 + 0.5 for i in range(30)]
    assert before == every[:10]
    for label, wanted in (
        ("biggest gain", sorted(every, reverse=True)),
        ("biggest drop", sorted(every)),
        ("biggest change", sorted(every, key=lambda gain: -abs(gain))),
        ("as in the data", every),
    ):
        page.get_by_role("button", name=label).click()
        found = gains(page)
        assert [abs(v) for v in found] == [abs(v) for v in wanted[:10]]
        assert label == "biggest change" or found == wanted[:10]
        pressed = page.locator("[aria-pressed=true]").all_text_contents()
        assert pressed == [label]
    page.get_by_role("button", name="Show 10 more").click()
    assert gains(page) == every[:20]
    page.get_by_role("button", name="Show all").click()
    assert gains(page) == every
    assert page.locator("#count").text_content() == "30 of 30 shown"
    assert not page.get_by_role("button", name="Show all").is_visible()


def test_a_hostile_dialogue_stays_text(show: Any) -> None:
    page = show("one")
    page.get_by_role("button", name="Show all").click()
    assert page.evaluate("document.scripts.length") == 1
    assert page.evaluate("document.images.length") == 0
    text = re.sub(r"[\x00\ud83d]", "\ufffd", HOSTILE)
    assert text in page.locator(".card .chat").nth(1).text_content()
    assert text in page.locator(".card h3").nth(1).text_content()


def test_the_policy_stops_what_would_slip_through(show: Any) -> None:
    page = show("one")
    page.evaluate(
        """() => { const s = document.createElement("script");
                   s.textContent = "window.ran = true"; document.body.append(s); }"""
    )
    assert page.evaluate("window.ran") is None
    assert "Content Security Policy" in show.said[0]
    show.said.clear()


def test_light_and_dark_by_the_system_and_by_the_button(show: Any) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(251, 251, 250)", "rgb(22, 24, 28)"
    page = show("one", scheme="dark")
    assert page.evaluate(ground) == dark
    seen = []
    for _ in range(3):
        page.locator("#theme").click()
        seen.append((page.locator("#theme").text_content(), page.evaluate(ground)))
    assert seen == [("theme: light", light), ("theme: dark", dark), ("theme: auto", dark)]
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    assert not page.locator("#theme").is_visible()


# The least contrast of any text with what is behind it (WCAG 2.1, 1.4.3), by painting both.
CONTRAST = """() => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const paint = colours => {
        canvas.clearRect(0, 0, 1, 1);
        for (const c of colours) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const light = rgb => rgb.map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    let least = [99, ""];
    for (const e of document.body.querySelectorAll("*")) {
        const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
        if (!own || !e.getClientRects().length) continue;
        const behind = [];
        for (let p = e; p; p = p.parentElement) behind.unshift(getComputedStyle(p).backgroundColor);
        const style = getComputedStyle(e);
        const ink = e.closest("svg") ? style.fill : style.color;
        const [a, b] = [light(paint([...behind, ink])), light(paint(behind))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < least[0]) least = [ratio, e.outerHTML.slice(0, 120)];
    }
    return least;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_readable(show: Any, scheme: str) -> None:
    ratio, where = show("one", scheme=scheme).evaluate(CONTRAST)
    assert ratio >= 4.5, where


def test_without_a_script_everything_is_there(show: Any) -> None:
    page = show("one", java_script_enabled=False)
    assert page.locator(".card:visible").count() == 30
    assert not page.locator("#sort").is_visible()
