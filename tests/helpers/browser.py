"""A real browser for the tests of pages: how it is started, and a watch on everything that goes wrong in it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


sync_api = pytest.importorskip("playwright.sync_api", reason="pages are tested in a browser, driven by playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("pages are tested in a browser: install chromium", allow_module_level=True)

# Nothing of the browser's own may reach for the network or need a display.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def open_browser() -> Iterator[sync_api.Browser]:
    """A browser without a window."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def watched_page(browser: sync_api.Browser, **options) -> Iterator[sync_api.Page]:
    """A page in a context of its own, which must log nothing, fail at nothing and ask for nothing but documents."""
    context = browser.new_context(**{"viewport": {"width": 1400, "height": 900}, **options})
    page = context.new_page()
    page.set_default_timeout(10_000)
    said: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: request.resource_type == "document" or said.append(f"asked for {request.url}"))
    page.on("requestfailed", lambda request: said.append(f"failed: {request.url}"))
    yield page
    assert said == []
    context.close()


def visit(page, address: str, tree: int) -> None:
    """Open a page at a tree; on a page that is open already, only the tree changes."""
    page.goto(f"{address}#tree={tree}")
    sync_api.expect(page.locator("#tree-name")).to_have_text(f"Tree {tree}")


def choose_prompt(page, tree: int) -> None:
    """Click on a tree in the list of prompts."""
    page.locator("#prompt-list a", has_text=f"Tree {tree}").click()
    sync_api.expect(page.locator("#tree-name")).to_have_text(f"Tree {tree}")


def item(page, name: str):
    """The item of the outline that is called so, such as 1.2."""
    return page.locator(f"[role=treeitem]:has(> .row .name:text-is('{name}'))")


def facts(page, name: str) -> list[str]:
    return item(page, name).locator("> .row .facts > *").all_text_contents()


def names(page) -> list[str]:
    """Names of the items that can be seen, from top to bottom."""
    return page.locator("#outline .name").evaluate_all(
        "names => names.filter(name => !name.closest('[hidden]')).map(name => name.textContent)"
    )


def selected(page) -> str:
    (name,) = page.locator("[aria-selected=true] > .row .name").all_text_contents()
    return name


# For the page to evaluate: every piece of text with too little contrast to its background (WCAG AA: 4.5).
LOW_CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const pixel = (layers) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of layers) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
  };
  const luminance = (rgb) => rgb
    .map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let checked = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    const layers = [];
    for (let above = element; above; above = above.parentElement) {
      layers.unshift(getComputedStyle(above).backgroundColor);
    }
    const background = pixel(layers);
    const style = getComputedStyle(element);
    const text = pixel([...layers, element instanceof SVGElement ? style.fill : style.color]);
    const [light, dark] = [luminance(text), luminance(background)].sort((a, b) => b - a);
    checked += 1;
    const ratio = (light + 0.05) / (dark + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)}: ${element.className} ${walker.currentNode.data.slice(0, 30)}`);
  }
  return { checked, found };
}"""
