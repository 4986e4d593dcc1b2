"""A step's page in a real browser: what it shows, folding, keys, the overview, filters, speed."""

import statistics
import time

import pytest
from browser import choose_prompt, facts, item, names, open_browser, selected, sync_api, visit, watched_page
from view_trees import LONG, example_records, random_records

from treerpo_trl.growth import TreeShape
from treerpo_trl.views import write_page


pytestmark = pytest.mark.browser
expect = sync_api.expect
PAPER = TreeShape((8, 8, 8), 4, 12)
IN_SIGHT = """row => {
  const box = row.getBoundingClientRect(), tools = document.querySelector(".tools").getBoundingClientRect();
  return box.top >= tools.bottom && box.bottom <= innerHeight;
}"""
# The colour of a cell of the overview with a value, faded as that of a pruned node or not.
SAMPLE = """([value, faded]) => {
  const cell = document.createElement("div");
  cell.className = `cell value ${value < 0.5 ? "low" : "high"}${faded ? " faded" : ""}`;
  cell.style.setProperty("--much", Math.abs(2 * value - 1));
  document.getElementById("icicle").append(cell);
  const colour = getComputedStyle(cell).backgroundColor;
  cell.remove();
  return colour;
}"""
SAME_COLOUR = """([first, second]) => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const [one, other] = [first, second].map((colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  });
  return one.every((part, index) => Math.abs(part - other[index]) <= 2);
}"""


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Addresses of pages: of four trees whose numbers are known, of one of three levels, of the paper's size."""
    folder = tmp_path_factory.mktemp("pages")
    write_page(example_records(), folder / "example.html", title="my run")
    write_page(random_records(TreeShape((2, 2, 2), 4, 12)), folder / "levels.html", title="my run")
    write_page(random_records(PAPER, characters=1200), folder / "paper.html", title="my run")
    return {path.stem: path.as_uri() for path in folder.iterdir()}


@pytest.fixture
def page(browser):
    with watched_page(browser) as page:
        yield page


def reader(page) -> dict[str, str]:
    terms, values = (page.locator(f"#facts {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return dict(zip(terms, values, strict=True))


def test_every_field_is_shown(page, pages):
    page.goto(pages["example"])
    assert page.title() == "Step 10 · my run"
    assert page.locator("#tree-numbers").inner_text() == "4 nodes · 3 leaves · 2 of 2 groups kept"
    assert facts(page, "Prompt") == ["V 0.25", "Prompt", "1 tok", "4 rows"]
    assert facts(page, "1") == ["V 0.50", "1", "A +1.33", "μ 0.25", "1 tok", "2 rows"]
    assert facts(page, "2") == [
        "V 0.00", "2", "A −1.33", "μ 0.25", "2 tok", "2 rows", "ended", "reward 0.00", "answer It is 9.",
    ]  # fmt: skip
    assert facts(page, "1.1") == ["V 1.00", "1.1", "A +2.00", "μ 0.50", "2 tok", "ended", "reward 1.00", "answer 7"]
    assert facts(page, "1.2")[5:] == ["truncated", "reward 0.00", "answer So 8"]
    assert item(page, "1").locator("> .row .text").evaluate("text => text.textContent") == "Add them.\n"
    item(page, "1.2").locator("> .row").click()
    assert reader(page) == {
        "Value": "0.00", "Advantage": "−2.00", "Group mean": "0.5000", "Group range": "1.0000", "Group": "of 2, kept",
        "Reward": "0", "Answer": "So 8", "Tokens": "1", "Path tokens": "2", "Rows": "1", "State": "truncated",
        "Index, depth": "4, 2",
    }  # fmt: skip
    texts = page.locator("#path .text").evaluate_all("texts => texts.map(text => text.textContent)")
    assert texts == ["What is 3 + 4?\n", "Add them.\n", "So 8"]
    choose_prompt(page, 1)
    assert facts(page, "1")[2:4] == ["pruned", "μ 1.00"]
    assert page.locator("[role=group].pruned").count() == 3
    choose_prompt(page, 3)
    assert facts(page, "1.1")[:3] == ["V none", "1.1", "no value"]
    assert "no reward" in facts(page, "1.1")


def test_all_trees_of_a_step_are_reached_and_the_one_with_most_trained_nodes_is_shown(page, tmp_path):
    """From files alone, over several pages."""
    write_page(example_records(), tmp_path / "step_000010.html", title="my run", max_trees=2)
    address = (tmp_path / "step_000010.html").as_uri()
    page.goto(address)
    assert page.locator("#tree-name").inner_text() == "Tree 0"
    for tree, file in ((1, "step_000010-2"), (3, "step_000010-2"), (2, "step_000010"), (1, "step_000010-2")):
        choose_prompt(page, tree)
        assert page.url.split("#")[0].endswith(f"/{file}.html")
        assert page.locator("#prompt-list [aria-current=true] b").inner_text() == f"Tree {tree}"
        assert page.locator("#prompt-list a").count() == 4
    page.goto(f"{address}#tree=1&node=2")  # an address may name a tree of another page
    page.wait_for_url("**/step_000010-2.html#tree=1&node=2")
    assert selected(page) == "2"
    page.goto((tmp_path / "step_000010-2.html").as_uri())
    assert page.locator("#tree-name").inner_text() == "Tree 3"  # of this page, the one with most


def test_the_overview_names_its_rows_and_the_legend_has_its_colours(page, pages):
    page.goto(pages["levels"])
    assert page.locator("#icicle .depth").all_inner_texts() == ["Prompt", "Depth 1", "Depth 2", "Depth 3"]
    left = page.locator("#icicle .cell").first.bounding_box()["x"]
    for label in page.locator("#icicle .depth").all():
        assert label.bounding_box()["x"] + label.bounding_box()["width"] <= left
    ends = """ramp => getComputedStyle(ramp).backgroundImage.match(/(rgb|oklab|color)\\([^)]*\\)/g)"""
    found = {}
    for name in ("", ".faded"):
        colours = page.locator(f".ramp{name or ':not(.faded)'}").evaluate(ends)
        for value, colour in zip((0.0, 0.5, 1.0), colours, strict=True):
            cell = page.evaluate(SAMPLE, [value, bool(name)])
            found[name, value] = (cell, colour)
    for cell, colour in found.values():
        assert page.evaluate(SAME_COLOUR, [cell, colour]), found


def test_folding_with_the_mouse(page, pages):
    page.goto(pages["levels"])
    everything = ["Prompt", "1", "1.1", "1.1.1", "1.1.2", "1.2", "1.2.1", "1.2.2"]
    everything += [name.replace("1", "2", 1) for name in everything[1:]]
    assert names(page) == everything
    item(page, "1").locator("> .row .caret").click()
    assert names(page) == ["Prompt", "1", *everything[8:]]
    assert item(page, "1").get_attribute("aria-expanded") == "false"
    item(page, "1").locator("> .row .caret").click()
    assert names(page) == everything
    page.get_by_role("button", name="1", exact=True).click()
    assert names(page) == ["Prompt", "1", "2"]
    assert page.locator("#shown").inner_text() == "2 of 14 nodes unfolded"
    page.get_by_role("button", name="3", exact=True).click()
    assert names(page) == everything
    # Folding what holds the selected node selects the fold.
    item(page, "2.1.2").locator("> .row").click()
    item(page, "2").locator("> .row .caret").click()
    assert selected(page) == "2"
    # So does an unfolding to a depth that hides it.
    item(page, "2").locator("> .row .caret").click()
    item(page, "2.1.2").locator("> .row").click()
    page.get_by_role("button", name="2", exact=True).click()
    assert selected(page) == "2.1"


def test_keys_follow_the_tree_pattern(page, pages):
    page.goto(pages["levels"])
    page.get_by_role("button", name="1", exact=True).click()
    page.locator("#outline [tabindex='0']").focus()

    def press(*keys: str) -> str:
        for key in keys:
            page.keyboard.press(key)
        assert page.evaluate("document.activeElement.ariaSelected") == "true"
        assert page.locator("#outline [tabindex='0']").count() == 1  # the tree is one stop of the Tab key
        return selected(page)

    assert press("ArrowDown") == "1"
    assert press("ArrowRight") == "1"  # unfolds
    assert names(page) == ["Prompt", "1", "1.1", "1.2", "2"]
    assert press("ArrowRight") == "1.1"  # goes in
    assert press("ArrowDown", "ArrowDown") == "2"
    assert press("ArrowUp") == "1.2"
    assert press("*") == "1.2"  # unfolds siblings
    assert names(page) == ["Prompt", "1", "1.1", "1.1.1", "1.1.2", "1.2", "1.2.1", "1.2.2", "2"]
    assert press("End") == "2"
    assert press("Enter") == "2"  # unfolds
    assert names(page)[-2:] == ["2.1", "2.2"]
    assert press("Enter") == "2"  # folds
    assert names(page)[-1] == "2"
    assert press("ArrowUp") == "1.2.2"
    assert press("ArrowRight", "Enter", " ") == "1.2.2"  # a leaf with a short text
    assert press("ArrowLeft") == "1.2"  # goes out
    assert press("ArrowLeft") == "1.2"  # folds
    assert press("ArrowDown", "ArrowDown") == "2"
    assert press("Home") == "Prompt"
    assert press("p") == "Prompt"  # no other begins with it
    levels = page.locator("[role=treeitem]").evaluate_all(
        "items => items.map(item => [item.ariaLevel, item.ariaPosInSet, item.ariaSetSize])"
    )
    assert levels[:3] == [["1", "1", "1"], ["2", "1", "2"], ["3", "1", "2"]]
    tree = page.get_by_role("tree", name="Nodes of the tree")
    expect(tree.get_by_role("treeitem", expanded=True).first).to_be_visible()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#outline')") is None


def test_typing_goes_to_the_next_node_that_begins_so(page, pages):
    visit(page, pages["example"], 1)
    page.locator("#outline [tabindex='0']").focus()
    for key, name in (("s", "2"), ("a", "1"), ("A", "1.1"), ("d", "2.2")):
        page.keyboard.press(key)
        assert selected(page) == name


def test_overview_outline_and_reader_show_the_same_node(page, pages):
    page.goto(pages["levels"])
    page.get_by_role("button", name="1", exact=True).click()
    page.locator("#icicle .cell[data-node='14']").click()
    assert selected(page) == "2.2.2"
    assert page.locator("#reader-name").inner_text() == "Node 2.2.2"
    assert page.locator("#icicle .selected").get_attribute("data-node") == "14"
    assert page.locator("#icicle .path").evaluate_all("cells => cells.map(cell => cell.dataset.node)") == [
        "0",
        "2",
        "6",
    ]
    page.keyboard.press("ArrowUp")
    assert page.locator("#icicle .selected").get_attribute("data-node") == "13"
    page.locator("#path button", has_text="Node 2.2").first.click()
    assert selected(page) == "2.2"
    page.locator("#icicle .cell[data-node='3']").hover()
    assert page.locator("#pointed").inner_text().startswith("Node 1.1 · V ")
    # The address names the node; it leads back to it.
    page.wait_for_url("**#tree=0&node=6")
    page.reload()
    assert selected(page) == "2.2"


def test_the_overview_zooms(page, pages):
    page.goto(pages["paper"])
    leaf = page.locator("#icicle .cell[data-node='584']")
    assert leaf.bounding_box()["width"] < 2
    # The first click shows the node in the outline, far down; the second must still meet its cell.
    page.locator("#icicle .cell[data-node='72']").dblclick()
    assert leaf.bounding_box()["width"] > 60
    assert page.locator("#icicle .cell").count() == 2 + 1 + 8
    page.get_by_role("button", name="Zoom out").click()
    assert page.locator("#icicle .cell").count() == 585
    page.get_by_role("button", name="Zoom to 8.8").click()
    item(page, "2").locator("> .row").click()  # what is selected elsewhere is shown
    assert page.locator("#icicle .selected").is_visible()


def test_filters(page, pages):
    page.goto(pages["example"])
    prompts = page.locator("#prompt-list a:visible b")
    page.get_by_role("searchbox", name="Search prompts").fill("what IS")
    assert prompts.all_inner_texts() == ["Tree 0", "Tree 2", "Tree 1"]
    assert page.locator("#prompt-count").inner_text() == "3 of 4"
    page.locator("#search").fill("is 2")
    assert prompts.all_inner_texts() == ["Tree 2"]
    choose_prompt(page, 2)
    assert names(page) == ["Prompt", "1", "1.1", "1.2", "2", "2.1", "2.2"]
    page.locator("#search").fill("")
    page.get_by_label("Only kept groups").check()
    assert names(page) == ["Prompt", "1", "1.1", "1.2"]  # a pruned node on the way to a kept group stays
    assert page.locator("#icicle .cell").count() == 4
    assert page.locator("#shown").inner_text() == "3 of 3 nodes unfolded"
    assert prompts.all_inner_texts() == ["Tree 0", "Tree 2", "Tree 3"]
    visit(page, pages["example"], 1)
    assert names(page) == ["Prompt"]
    expect(page.get_by_text("No group of this tree was kept.")).to_be_visible()
    page.get_by_label("Only kept groups").uncheck()
    assert len(names(page)) == 7


def test_long_texts_fold(page, pages):
    visit(page, pages["example"], 1)
    text = item(page, "1").locator("> .row .text")
    folded = text.bounding_box()["height"]
    assert folded < 80
    item(page, "1").get_by_role("button", name="Show all").click()
    assert text.evaluate("text => text.textContent") == LONG
    assert text.bounding_box()["height"] > folded
    page.keyboard.press(" ")
    assert text.bounding_box()["height"] == folded
    assert item(page, "2").locator("> .row button").count() == 0


def test_a_tree_of_584_nodes_loads_and_folds_in_less_than_a_second(page, pages):
    def load() -> float:
        start = time.perf_counter()
        page.goto(pages["paper"], wait_until="commit")
        page.locator("#outline [role=treeitem] >> nth=8").wait_for()
        return time.perf_counter() - start

    def fold() -> float:
        start = time.perf_counter()
        page.get_by_role("button", name="3", exact=True).click()
        assert page.locator("[role=treeitem]").count() == 585
        page.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")  # until it is painted
        seconds = time.perf_counter() - start
        page.locator("#outline [tabindex='0']").focus()
        page.keyboard.press("End")
        assert page.locator("[aria-selected=true] > .row").evaluate(IN_SIGHT)
        page.keyboard.press("Home")
        assert page.locator("[aria-selected=true] > .row").evaluate(IN_SIGHT)
        page.get_by_role("button", name="1", exact=True).click()
        return seconds

    loads, folds = [load() for _ in range(3)], [fold() for _ in range(2)]
    print(f"load {statistics.median(loads):.2f} s, unfold all {statistics.median(folds):.2f} s")
    assert min(loads) < 1
    assert min(folds) < 1
