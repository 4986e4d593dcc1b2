"""`python -m treerpo_trl.views`: which pages it writes, the index, and what it says when something is wrong."""

import os
import re
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from view_trees import example_records

from treerpo_trl.views import build_index, read_trees, write_page, write_trees
from treerpo_trl.views.__main__ import main
from treerpo_trl.views.charts import scale_of
from treerpo_trl.views.files import all_pages, step_path
from treerpo_trl.views.index import refresh
from treerpo_trl.views.serve import make_server


@pytest.fixture
def folder(tmp_path):
    """A run's trees of steps 5 and 10, without pages."""
    folder = tmp_path / "my-run" / "trees"
    for step in (5, 10):
        write_trees(example_records(step), step_path(folder, step))
    return folder


def age(path, seconds: float) -> None:
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))


def test_pages_and_index_are_written_and_named(folder, capsys):
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == f"2 of 2 pages written; open {folder / 'index.html'}\n"
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.html", "step_000005.html", "step_000005.parquet", "step_000010.html", "step_000010.parquet",
    ]  # fmt: skip
    for page in folder.glob("*.html"):
        assert "my-run" in page.read_text(encoding="utf-8")


def test_a_runs_output_directory_will_do(folder, capsys):
    assert main([str(folder.parent)]) == 0
    assert str(folder / "index.html") in capsys.readouterr().out


def test_only_missing_and_outdated_pages_are_written(folder):
    assert refresh(folder) == (folder / "index.html", [5, 10])
    assert refresh(folder)[1] == []
    age(step_path(folder, 5, ".html"), 60)
    assert refresh(folder)[1] == [5]
    step_path(folder, 10, ".html").unlink()
    assert refresh(folder)[1] == [10]
    assert refresh(folder, rebuild=True)[1] == [5, 10]
    # Links to new neighbours do not make an outdated page look new.
    age(step_path(folder, 10, ".html"), 60)
    write_trees(example_records(15), step_path(folder, 15))
    write_page(example_records(15), step_path(folder, 15, ".html"), title="my-run")
    build_index(folder)
    assert "step_000015.html" in step_path(folder, 10, ".html").read_text(encoding="utf-8")
    assert refresh(folder)[1] == [10]


def test_options_reach_the_pages(folder):
    assert main([str(folder), "--max-trees", "1"]) == 0
    assert "(1 to 1 on this page)" in step_path(folder, 5, ".html").read_text(encoding="utf-8")
    assert len(list(folder.glob("step_*.html"))) == 8
    for page in all_pages(step_path(folder, 5, ".html")):  # the further ones lead to the neighbours too
        assert 'href="step_000010.html"' in page.read_text(encoding="utf-8")
    assert main([str(folder), "--rebuild"]) == 0
    assert "on this page" not in step_path(folder, 5, ".html").read_text(encoding="utf-8")
    assert len(list(folder.glob("step_*.html"))) == 2


def test_the_index_lists_every_step_and_links_those_with_pages(folder):
    write_page(example_records(5), step_path(folder, 5, ".html"), title="my-run")
    index = build_index(folder)
    assert index == folder / "index.html"
    html = index.read_text(encoding="utf-8")
    rows = [re.sub(r"<[^>]*>", " ", row).split() for row in re.findall(r"<tr>(.*?)</tr>", html)[1:]]
    assert rows == [["Step", step, "4", "22", "0.533", "36%", "2", "tokens"] for step in ("10", "5")]
    assert re.findall(r'href="(step.*?)"', html) == ["step_000005.html"]
    assert html.count("<polyline") == 3
    assert not re.search(r"https?:|<script src|<link rel=.stylesheet", html)


def test_charts_have_a_scale_on_which_steps_and_numbers_lie_where_they_belong(folder):
    records = example_records(20)
    for record in records:
        record["reward"] = None if record["reward"] is None else record["reward"] / 2
    write_trees(records, step_path(folder, 20))
    html = build_index(folder).read_text(encoding="utf-8")
    assert "Mean reward from step 5 to step 20: 0.267 to 0.533, now 0.267" in html
    reward, kept, _ = re.findall(r"<svg.*?</svg>", html)
    assert re.findall(r'text-anchor="end">([\d.%]+)<', reward) == ["0", "0.5", "1"]
    assert re.findall(r'text-anchor="end">([\d.%]+)<', kept) == ["0%", "50%", "100%"]
    heights = dict(re.findall(r'y1="([\d.]+)".*?text-anchor="end">([\d.]+)<', reward))
    bottom, middle = (float(height) for height, tick in heights.items() if tick in ("0", "0.5"))
    (line,) = re.findall(r'points="(.*?)"', reward)
    points = [tuple(map(float, point.split(","))) for point in line.split()]
    assert (points[1][0] - points[0][0]) * 3 == pytest.approx(points[2][0] - points[0][0], abs=0.2)
    for (_, height), number in zip(points, (0.5333, 0.5333, 0.2667), strict=True):
        assert (bottom - height) / (bottom - middle) * 0.5 == pytest.approx(number, abs=2e-3)


@pytest.mark.parametrize(
    ("low", "high", "is_share", "ticks"),
    [
        (0.41, 0.43, True, [0, 0.5, 1]),  # noise of a reward does not fill the chart
        (0, 0, True, [0, 0.5, 1]),
        (-0.5, 0.7, True, [-0.5, 0, 0.5, 1]),  # nor is a reward cut off
        (27.3, 27.4, False, [20, 25, 30, 35]),  # nor does noise of a length
        (200, 900, False, [0, 500, 1000]),
        (0, 0, False, [0, 0.2, 0.4, 0.6]),
        (1.5e6, 1.5e6, False, [1e6, 1.5e6, 2e6]),
    ],
)
def test_noise_does_not_look_like_a_trend(low, high, is_share, ticks):
    assert scale_of(low, high, is_share) == pytest.approx(ticks)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.booleans())
def test_a_scale_spans_its_numbers_and_half_of_what_they_are_around(low, width, is_share):
    ticks = scale_of(low, low + width, is_share)
    steps = [second - first for first, second in pairwise(ticks)]
    assert 3 <= len(ticks) <= 6
    rounding = 1e-6 * (abs(low) + width + 1)
    assert ticks[0] - rounding <= low and low + width <= ticks[-1] + rounding
    assert max(steps) == pytest.approx(min(steps))
    middle = low + width / 2
    assert ticks[-1] - ticks[0] >= 0.49 * abs(middle) or ticks[0] == 0


def test_a_step_without_rewards_or_trees_has_its_row(tmp_path):
    write_trees([], step_path(tmp_path, 1))
    assert refresh(tmp_path)[1] == [1]
    assert "<td>0</td><td>0</td><td>–</td><td>–</td><td>–</td>" in (tmp_path / "index.html").read_text(
        encoding="utf-8"
    )


def test_a_broken_file_is_named_and_left_out(folder, caplog, capsys):
    step_path(folder, 7).write_bytes(b"half a file")
    assert main([str(folder)]) == 0
    (warning,) = caplog.messages
    assert "left out" in warning and "step_000007.parquet is broken" in warning
    assert "Step 7" not in (folder / "index.html").read_text(encoding="utf-8")
    assert step_path(folder, 10, ".html").exists()
    assert not step_path(folder, 7, ".html").exists()


def test_damaged_data_below_a_whole_footer_are_named(folder, caplog):
    path = step_path(folder, 5)
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    path.write_bytes(data)
    assert refresh(folder)[1] == [10]
    assert "step_000005.parquet is broken" in caplog.text


def test_what_is_missing_is_said(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 1
    assert f"error: there is no folder {tmp_path / 'nowhere'}" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1
    assert f"error: {tmp_path} holds no trees: there is no step_*.parquet in it" in capsys.readouterr().err
    step_path(tmp_path, 1).write_bytes(b"")
    assert main([str(tmp_path)]) == 1
    assert "none of the 1 step_*.parquet files" in capsys.readouterr().err


def test_a_port_that_is_taken_is_said(folder, capsys):
    with make_server(folder, "127.0.0.1", 0) as server:
        assert main([str(folder), "--serve", "--port", str(server.server_port)]) == 1
    assert re.search(r"cannot listen at 127.0.0.1, port \d+: .*in use; choose another --port", capsys.readouterr().err)


def test_the_server_brings_the_index_up_to_date(folder, caplog):
    with make_server(folder, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def get(name: str) -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/{name}", timeout=20) as response:
                assert response.headers["Cache-Control"] == "no-store"
                return response.read().decode()

        assert "step_000010.html" in get("")
        write_trees(example_records(15), step_path(folder, 15))
        # Many readers at once do not get in one another's way.
        with ThreadPoolExecutor(8) as readers:
            pages = list(readers.map(get, ["", "index.html", "?reload"] * 4))
        assert all("step_000015.html" in page for page in pages)
        assert "Step 15" in get("step_000015.html")
        assert read_trees(step_path(folder, 15)) == example_records(15)
        for path in folder.glob("*.parquet"):
            path.unlink()
        assert "step_000015.html" in get("")  # the last good index, and a warning
        assert "the index stays as it was" in caplog.text
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get("../../secret")
        server.shutdown()
