"""The page in a real browser. Skipped where there is none, or nothing to drive it with: `apt-get install chromium chromium-driver` and
`pip install selenium` bring both."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made import made

from cachetune_rag.explaining import html_page
from cachetune_rag.explaining.explanation import Run

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser: pip install selenium")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs Chromium and its driver: apt-get install chromium chromium-driver"
)

Show = Callable[..., Any]
EVIL = '</p></article><script>document.title = "owned"</script><img src="https://example.org/x" onerror="document.title = \'owned\'">'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",  # it looks for its maker's servers otherwise, and a test machine may reach nobody
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1100,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Show:
    """Opens the page of an explanation, and gives the browser."""

    def opened(*, dark: bool = False, width: int = 1100, **fields: Any) -> Any:
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]},
        )
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get_log("browser"), browser.get_log("performance")
        page = tmp_path / "page.html"
        page.write_text(html_page(made(**fields)), encoding="utf-8")
        browser.get(page.as_uri())
        return browser

    return opened


def style(browser: Any, selector: str, name: str) -> str:
    script = "return getComputedStyle(document.querySelector(arguments[0])).getPropertyValue(arguments[1])"
    return str(browser.execute_script(script, selector, name))


def test_its_own_style_is_used_and_nothing_is_asked_of_the_network(show: Show) -> None:
    browser = show()
    assert style(browser, ".text .r", "background-color") == "rgb(255, 223, 158)"
    assert style(browser, ".text .r", "text-decoration-style") == "solid"
    assert style(browser, ".text .s", "text-decoration-style") == "dotted"
    assert browser.get_log("browser") == []
    asked = [
        entry["message"] for entry in browser.get_log("performance") if "Network.requestWillBeSent" in entry["message"]
    ]
    assert all("file://" in message for message in asked)


def test_markup_in_a_chunk_is_text_and_runs_nothing(show: Show) -> None:
    parts = list(made().parts)
    parts[1] = type(parts[1])("chunk", 7, (Run("reused", 30, EVIL), Run("recomputed", 1, EVIL)), 0, 0.1, 0.1)
    browser = show(parts=tuple(parts), question=EVIL)
    assert browser.execute_script("return document.querySelectorAll('script, img').length") == 0
    assert browser.title != "owned"
    assert browser.execute_script("return document.querySelector('#part-1 .text').textContent") == EVIL + EVIL
    # Not even markup that got through could do anything: the page's policy forbids it.
    browser.execute_script(
        "const s = document.createElement('script'); s.textContent = 'document.title = \"owned\"'; document.body.append(s);"
        "const i = document.createElement('img'); i.src = 'https://example.org/x'; document.body.append(i);"
    )
    assert browser.title != "owned"
    assert sum("Content Security Policy" in entry["message"] for entry in browser.get_log("browser")) >= 2


def test_it_is_dark_where_the_reader_wants_that(show: Show) -> None:
    light = style(show(), "body", "background-color"), style(show(), ".text .r", "background-color")
    dark = style(show(dark=True), "body", "background-color"), style(show(dark=True), ".text .r", "background-color")
    assert light == ("rgb(251, 250, 248)", "rgb(255, 223, 158)")
    assert dark == ("rgb(20, 22, 27)", "rgb(106, 71, 0)")


@pytest.mark.parametrize("width", [320, 390, 1100])
def test_nothing_sticks_out_on_a_phone(show: Show, width: int) -> None:
    browser = show(width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_fates_colour_can_be_taken_away_with_the_keyboard(show: Show) -> None:
    browser = show()
    browser.execute_script("document.querySelector('#show-recomputed').focus()")
    assert style(browser, "#prompt .r", "text-decoration-line") == "underline"
    browser.switch_to.active_element.send_keys(" ")
    assert style(browser, "#prompt .r", "text-decoration-line") == "none"
    assert style(browser, "#prompt .r", "background-color") == "rgba(0, 0, 0, 0)"
    assert style(browser, "#prompt .s", "text-decoration-line") == "underline"


def test_a_screen_reader_finds_headings_landmarks_and_names(show: Show) -> None:
    browser = show()
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    said = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored") and "role" in node
    ]
    for wanted in (
        ("heading", "The prompt"), ("heading", "Chunk 1: d0"), ("heading", "Chunk 2"), ("region", "At a glance"), ("navigation", "On this page"),
        ("article", "Chunk 3: d2"), ("checkbox", "recomputed"), ("columnheader", "Expected error left"),
    ):  # fmt: skip
        assert wanted in said
    assert not [role for role, name in said if role in ("image", "img", "link", "checkbox") and not name]
    browser.find_element("id", "say").click()
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    texts = " ".join(str(node.get("name", {}).get("value", "")) for node in nodes)
    assert "(recomputed:)" in texts


def test_keyboard_reaches_the_prompt_first(show: Show) -> None:
    browser = show()
    browser.switch_to.active_element.send_keys("\ue004")  # Tab
    assert browser.switch_to.active_element.get_attribute("href").endswith("#main")
    assert browser.switch_to.active_element.location["x"] >= 0


def test_a_prompt_of_32k_tokens_opens_in_a_second(show: Show) -> None:
    """As the browser counts it: from the navigation's start until everything is laid out and painted. The bound has room for busy machines."""
    begun = time.perf_counter()
    browser = show(count=64, tokens=500)
    took = time.perf_counter() - begun
    seen = browser.execute_script(
        "const [n] = performance.getEntriesByType('navigation'), [p] = performance.getEntriesByName('first-contentful-paint');"
        "return [n.loadEventEnd / 1e3, p ? p.startTime / 1e3 : 0, document.getElementsByTagName('*').length]"
    )
    print(
        f"\nloaded after {seen[0]:.2f} s, painted after {seen[1]:.2f} s, {seen[2]} elements, made and opened in {took:.2f} s"
    )
    assert seen[2] < 20_000
    assert max(seen[:2]) < 5
