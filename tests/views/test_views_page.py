"""A step's page as a file: it holds its trees, needs nothing else, and nothing a model wrote can leave its place."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from view_trees import HOSTILE, Texts, example_records, make_tree

from treerpo_trl.growth import TreeShape
from treerpo_trl.tree import ROOT
from treerpo_trl.views import render_page, tree_records, write_page
from treerpo_trl.views.document import read_asset, script_json
from treerpo_trl.views.files import all_pages
from treerpo_trl.views.html import SCRIPTS, link_page


class Page(HTMLParser):
    """The elements of a page, and what its scripts and styles hold, as a browser's parser would split them."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.contents: list[tuple[str, str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.lasttag in ("script", "style") and data.strip():
            self.contents.append((self.lasttag, data))

    def data(self) -> list:
        """The JSON of the data blocks, in order."""
        blocks = [attributes for tag, attributes in self.elements if tag == "script"]
        texts = [text for tag, text in self.contents if tag == "script"]
        return [json.loads(text) for block, text in zip(blocks, texts, strict=True) if "id" in block]


def page_of(texts_of_nodes: list[str], title="run") -> str:
    texts = Texts()
    scored = make_tree(texts, texts_of_nodes[0], {ROOT: texts_of_nodes[1:]}, [1.0, 0.0])
    return render_page(tree_records([scored], texts, 3, shape=TreeShape((2,), 9, 9)), title=title)


def test_the_page_holds_every_node_of_every_tree():
    records = example_records()
    step, *trees = Page(render_page(records, title="run")).data()
    assert [about["tree"] for about in step["trees"]] == [0, 2, 3, 1]  # most trained nodes first: 4, 2, 2 and 0
    assert [about["kept"] for about in step["trees"]] == [2, 1, 1, 0]
    assert step["scale"] == {"low": 0, "high": 1}
    for tree, columns in zip([0, 2, 3, 1], trees, strict=True):
        nodes = [record for record in records if record["tree"] == tree]
        for name, values in columns.items():
            expected = [node["num_tokens" if name == "tokens" else name] for node in nodes]
            assert values == pytest.approx(expected, nan_ok=True) if name == "advantage" else values == expected, name


def test_the_page_reaches_for_nothing():
    html = render_page(example_records(), title="run")
    assert not re.search(r"https?://|url\(|@import", "".join(text for _, text in Page(html).contents if "{" in text))
    assert not re.search(r"https?:", html)
    for tag, attributes in Page(html).elements:
        assert "src" not in attributes and "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        assert tag != "link" or attributes["href"].startswith("data:")
        assert tag != "a"


def test_the_policy_lets_only_the_packages_code_run():
    page = Page(render_page(example_records(), title="run"))
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert "unsafe" not in policy

    def hashes(tag):
        code = [text for name, text in page.contents if name == tag and not text.startswith(("{", "["))]
        return {f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in code}

    assert set(rules["script-src"].split()) == hashes("script")
    assert set(rules["style-src"].split()) == hashes("style")
    assert (rules["require-trusted-types-for"], rules["trusted-types"]) == ("'script'", "'none'")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_data(text):
    harmless, hostile = page_of(["a", "b", "c"]), page_of([text, text, text])
    assert [tag for tag, _ in Page(hostile).elements] == [tag for tag, _ in Page(harmless).elements]
    step, columns = Page(hostile).data()
    assert step["trees"][0]["prompt"] == text
    assert columns["text"] == [text] * 3
    assert re.findall(r"<!--(?!/?links)", hostile) == []


def test_a_title_is_only_text():
    html = page_of(["a", "b", "c"], title="</title><script>alert(1)</script>{{script}}")
    assert "&lt;/title&gt;&lt;script&gt;alert(1)&lt;/script&gt;{{script}}" in html
    assert [tag for tag, _ in Page(html).elements] == [tag for tag, _ in Page(page_of(["a", "b", "c"])).elements]


def test_json_in_a_script_element():
    value = ["</script>", "<!--", "a & b > c", "\u2028\u2029", "é漢"]
    assert json.loads(script_json(value)) == value
    assert not set("<>&\u2028\u2029") & set(script_json(value))


def test_the_header_says_how_the_step_went():
    html = render_page(example_records(step=1200), title="my run")
    shown = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html.split("<body>")[1].split("<noscript>")[0]))
    assert "Step 1,200 my run" in shown
    # Rewards of the 15 scored rows: 1 + 4 + 2 + 1; 4 of 11 groups were kept.
    assert "Trees 4 Nodes 22 Mean reward 0.533 Groups kept 36% Mean completion 2 tokens" in shown


def test_trees_that_do_not_fit_on_a_page_are_on_further_ones(tmp_path):
    """Each page lists all trees and says on which page they are; together they hold each once."""
    write_page(example_records(), tmp_path / "step_000010.html", title="run", max_trees=3)
    names = ["step_000010.html", "step_000010-2.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    pages = [Page((tmp_path / name).read_text(encoding="utf-8")).data() for name in names]
    for number, (step, *trees) in enumerate(pages):
        assert step["pages"] == names and step["page"] == number
        assert [(about["tree"], about["page"]) for about in step["trees"]] == [(0, 0), (2, 0), (3, 0), (1, 1)]
        prompts = [about["prompt"] for about in step["trees"] if about["page"] == number]
        assert [columns["text"][0] for columns in trees] == prompts
    first, second = ((tmp_path / name).read_text(encoding="utf-8") for name in names)
    assert "4 (1 to 3 on this page)" in first and "4 (4 to 4 on this page)" in second
    assert 'id="tree-3"' in second and 'id="tree-3"' not in first
    assert render_page(example_records(), title="run", max_trees=3) == first


def test_pages_that_are_not_needed_any_more_are_removed(tmp_path):
    path = tmp_path / "step_000010.html"
    others = [tmp_path / name for name in ("step_000010-2.txt", "step_000010-b.html", "step_000100-2.html")]
    for other in others:
        other.write_text("mine")
    write_page(example_records(), path, title="run", max_trees=1)
    assert [page.name for page in all_pages(path)] == [
        "step_000010.html",
        *(f"step_000010-{n}.html" for n in (2, 3, 4)),
    ]
    write_page(example_records(), path, title="run", max_trees=2)
    assert [page.name for page in all_pages(path)] == ["step_000010.html", "step_000010-2.html"]
    write_page(example_records(), path, title="run")
    assert all_pages(path) == [path]
    assert all(other.read_text() == "mine" for other in others)


def test_rewards_outside_the_unit_interval_stretch_the_scale():
    texts = Texts()
    trees = [make_tree(texts, "?", {ROOT: ["a", "b"]}, [0.0, 1.0])]
    records = tree_records(trees, texts, 3, shape=TreeShape((2,), 9, 9))
    for record, value in zip(records, (0.5, -2.0, 3.0), strict=True):
        record["value"] = value
    assert Page(render_page(records, title="run")).data()[0]["scale"] == {"low": -2.0, "high": 3.0}
    records[1]["value"], records[2]["value"] = float("nan"), float("inf")
    assert Page(render_page(records, title="run")).data()[1]["value"] == [0.5, None, None]


def test_a_page_of_no_trees():
    html = render_page([], title="run")
    assert "No trees" in html
    assert Page(html).data()[0]["trees"] == []


def test_a_page_of_two_steps_is_refused():
    with pytest.raises(ValueError, match=r"one step, got records of steps \[1, 2\]"):
        render_page(example_records(1) + example_records(2), title="run")


def test_links_are_put_into_the_page_once(tmp_path):
    path = tmp_path / "step_000010.html"
    write_page(example_records(), path, title="run")
    plain = path.read_text(encoding="utf-8")
    link_page(path, 5, 20)
    linked = path.read_text(encoding="utf-8")
    links = [attributes["href"] for tag, attributes in Page(linked).elements if tag == "a"]
    assert links == ["step_000005.html", "index.html", "step_000020.html"]
    assert re.sub(r"<nav.*?</nav>", "", linked) == plain
    before = path.stat()
    link_page(path, 5, 20)
    assert path.stat() == before  # what links as it should is not touched
    link_page(path, None, None)
    assert [a["href"] for tag, a in Page(path.read_text(encoding="utf-8")).elements if tag == "a"] == ["index.html"]
    assert path.stat().st_mtime_ns == before.st_mtime_ns  # nor does it look newer than it is
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_package_ships_what_pages_are_made_of():
    shipped = {file.name for file in files("treerpo_trl.views").joinpath("assets").iterdir()}
    assert shipped >= {*SCRIPTS, "theme.js", "base.css", "page.css", "page.html", "index.css", "index.html"}
    for name in shipped:
        assert read_asset(name).strip()
