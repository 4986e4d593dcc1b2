"""Pages in a real browser: themes, contrast, narrow windows, hostile text; the index, and pages that are served."""

import os
import re
import signal
import subprocess
import sys

import pytest
from browser import LOW_CONTRAST, item, open_browser, sync_api, visit, watched_page
from view_trees import HOSTILE, example_records, random_records

from treerpo_trl.growth import TreeShape
from treerpo_trl.views import write_page, write_trees
from treerpo_trl.views.files import step_path
from treerpo_trl.views.index import refresh


pytestmark = pytest.mark.browser
expect = sync_api.expect


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A folder of trees that a process of its own serves, and that process: started here, needed last."""
    folder = tmp_path_factory.mktemp("served") / "my-run" / "trees"
    for step in (5, 10):
        write_trees(example_records(step), step_path(folder, step))
    command = [sys.executable, "-m", "treerpo_trl.views", str(folder), "--serve", "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background processes ignore it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    signal.signal(signal.SIGINT, ignored)
    yield folder, process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def browser(server):
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Addresses of pages: of four trees whose numbers are known, and of one of the paper's size."""
    folder = tmp_path_factory.mktemp("pages")
    write_page(example_records(), folder / "example.html", title="my run")
    write_page(random_records(TreeShape((8, 8, 8), 4, 12)), folder / "paper.html", title="my run")
    return {path.stem: path.as_uri() for path in folder.iterdir()}


@pytest.fixture
def page(browser):
    with watched_page(browser) as page:
        yield page


def test_themes_follow_the_system_until_the_reader_chooses(browser, pages):
    for system, other in (("light", "dark"), ("dark", "light")):
        with watched_page(browser, color_scheme=system) as page:
            page.goto(pages["example"])
            shades = {system: page.evaluate("getComputedStyle(document.body).backgroundColor")}
            button = page.get_by_role("button", name="Dark")
            expect(button).to_have_attribute("aria-pressed", str(system == "dark").lower())
            button.click()
            expect(button).to_have_attribute("aria-pressed", str(other == "dark").lower())
            page.reload()  # the choice stays
            shades[other] = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert shades == {"light": "rgb(245, 246, 248)", "dark": "rgb(15, 19, 23)"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast(browser, pages, scheme):
    with watched_page(browser, color_scheme=scheme) as page:
        page.goto(pages["paper"])
        page.get_by_role("button", name="2", exact=True).click()
        for address, tree in ((pages["paper"], 0), *((pages["example"], tree) for tree in range(4))):
            visit(page, address, tree)
            result = page.evaluate(LOW_CONTRAST)
            assert result["checked"] > 30
            assert result["found"] == []


def test_hostile_text_is_shown_and_never_run(page, pages):
    visit(page, pages["example"], 3)
    page.get_by_role("button", name="2", exact=True).click()
    for row in page.locator("#outline .row").all():
        row.click()
    assert page.evaluate("window.pwned") is None
    assert page.locator("#outline img, #outline script, #outline svg, #path img").count() == 0
    shown = page.locator("#outline .text").evaluate_all("texts => texts.map(text => text.textContent)")
    visible = "\\u{2028}window.pwned = 2\\u{2029}\\x1b[31m\\x00\\x85\\u{202e}gnp.\\u{feff}"
    assert shown == [HOSTILE[0], HOSTILE[1], visible, HOSTILE[4], HOSTILE[2], HOSTILE[0], HOSTILE[1]]


def test_the_policy_stops_what_the_code_might_let_through(browser, pages):
    page = browser.new_page()  # not watched: a browser reports what it refuses
    page.goto(pages["example"])
    for attack in (
        "document.body.innerHTML = '<img src=x onerror=window.pwned=1>'",
        "setTimeout('window.pwned = 1')",
        "document.body.setAttribute('onclick', 'window.pwned = 1'); document.body.click()",
    ):
        with pytest.raises(sync_api.Error, match=r"requires 'Trusted(HTML|Script)'"):
            page.evaluate(f"() => {{ {attack} }}")
    assert page.evaluate("window.pwned") is None
    page.close()


def test_a_narrow_window_scrolls_only_down(browser, pages):
    with watched_page(browser, viewport={"width": 360, "height": 700}) as page:
        for address, tree in (*((pages["example"], tree) for tree in range(4)), (pages["paper"], 0)):
            visit(page, address, tree)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        item(page, "2").locator("> .row").click()
        assert not page.locator("#facts").is_visible()
        page.locator("#reader summary").click()  # always in reach, at the foot
        assert page.locator("#facts").is_visible()


def test_a_page_without_trees_says_so(page, tmp_path):
    write_page([], tmp_path / "empty.html", title="my run")
    page.goto((tmp_path / "empty.html").as_uri())
    assert page.get_by_role("heading", name="No trees").is_visible()
    assert not page.locator("main").is_visible()


def numbers(page) -> dict[str, str]:
    terms, values = (page.locator(f"#numbers {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return dict(zip(terms, values, strict=True))


def test_from_the_index_to_the_steps_and_back(page, tmp_path):
    for step in (5, 10, 20):
        write_trees(example_records(step), step_path(tmp_path, step))
    index, _ = refresh(tmp_path)
    page.goto(index.as_uri())
    assert page.get_by_role("link").all_inner_texts() == ["Step 20", "Step 10", "Step 5"]
    assert page.get_by_role("img", name="Mean reward from step 5 to step 20").is_visible()
    page.get_by_role("link", name="Step 10").click()
    assert numbers(page) == {
        "Trees": "4", "Nodes": "22", "Mean reward": "0.533", "Groups kept": "36%", "Mean completion": "2 tokens",
    }  # fmt: skip
    page.get_by_role("link", name="Step 20 →").click()
    assert page.get_by_role("heading", level=1).inner_text() == "Step 20"
    assert page.locator("nav a").all_inner_texts() == ["← Step 10", "All steps"]
    page.get_by_role("link", name="← Step 10").click()
    page.get_by_role("link", name="← Step 5").click()
    page.get_by_role("link", name="All steps").click()
    assert page.url == index.as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_index_can_be_read(browser, tmp_path, scheme):
    for step in (5, 10):
        write_trees(example_records(step), step_path(tmp_path, step))
    index, _ = refresh(tmp_path)
    with watched_page(browser, color_scheme=scheme, viewport={"width": 360, "height": 700}) as page:
        page.goto(index.as_uri())
        result = page.evaluate(LOW_CONTRAST)
        assert result["checked"] > 20
        assert result["found"] == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_served_folder_shows_new_steps_when_reloaded(server, page):
    folder, process = server
    said = [process.stdout.readline(), process.stdout.readline()]
    assert said[0] == f"2 of 2 pages written; open {folder / 'index.html'}\n"
    (address,) = re.findall(r"^serving (http://127\.0\.0\.1:\d+/)", said[1])
    page.goto(address)
    page.get_by_role("link", name="Step 10").click()
    assert item(page, "1.1").is_visible()
    write_trees(example_records(15), step_path(folder, 15))
    page.get_by_role("link", name="All steps").click()
    page.get_by_role("link", name="Step 15").click()
    assert page.locator("nav a").all_inner_texts() == ["← Step 10", "All steps"]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0
