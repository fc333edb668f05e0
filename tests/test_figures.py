"""docs/figures.py: the picture of who sees whom, and the plots of time and memory."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from test_cli import fails, run
from test_lsg import DRAWINGS, KEPT_OF_A_BLOCK

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import figures

SVG = "{http://www.w3.org/2000/svg}"
OPTIONS = "--length", 20, "--block-size", 4, "--sparse-block-size", 2
MEASURED = {"processor": "Brand <X> & Co", "threads": 2, "dtype": "float32", "rows": [
    {"length": length, "contender": contender, "seconds": factor * length / 1000,
     "memory": int(factor * length * 1e5)}
    for length in (1024, 2048, 4096)
    for contender, factor in (("ours", 1.0), ("full attention", 1.01), ("original", 3.0))]}


def picture(selection):
    return figures.who_sees_whom(20, sparsity_type=selection, block_size=4, sparsity_factor=2,
                                 sparse_block_size=2, num_global_tokens=1)


def hand_drawn(kept_of_a_block):
    """The lines of test_lsg.py's drawing, with a line for each query of a block."""
    drawing = DRAWINGS[2].replace("xxxx", kept_of_a_block).replace(" ", "")
    of_global, *of_blocks = drawing.split()
    lines = [of_global]
    for line in of_blocks:
        lines += 4 * [line]
    return lines


# ------------------------------------------------------------------------------------------------
# Who sees whom


@pytest.mark.parametrize("selection", [kind for kind in figures.SELECTIONS if kind != "norm"])
def test_the_picture_equals_the_drawing(selection):
    assert picture(selection) == hand_drawn(KEPT_OF_A_BLOCK[selection][0])


def test_norm_shows_two_tokens_of_each_block():
    """Which two depends on the random keys."""
    for line, expected in zip(picture("norm"), hand_drawn("ssss"), strict=True):
        assert line.replace("s", ".") == expected.replace("s", ".")
        for first in range(1, 21, 4):
            assert line[first:first + 4].count("s") == expected[first:first + 4].count("s") / 2


def test_squares_cover_exactly_the_letters():
    rows = picture("stride")
    painted = [["."] * len(row) for row in rows]
    for square in figures.squares(rows):
        node = ElementTree.fromstring(square)
        x, y, width, height = (int(node.get(name)) for name in ("x", "y", "width", "height"))
        for i in range(y, y + height):
            for j in range(x, x + width):
                assert painted[i][j] == "."
                painted[i][j] = node.get("class")[0]
    assert ["".join(row) for row in painted] == rows


# ------------------------------------------------------------------------------------------------
# Time and memory


def test_plots_show_the_measurements_on_logarithmic_axes():
    plots = {name: ElementTree.fromstring(svg) for name, svg in figures.plots(MEASURED).items()}
    for plot in plots.values():
        points = {}
        for line in plot.iter(f"{SVG}polyline"):
            points[line.get("class").split()[0]] = [
                tuple(map(float, point.split(","))) for point in line.get("points").split()]
        assert points.keys() == {"ours", "full", "original"}
        for (x0, y0), (x1, y1), (x2, y2) in points.values():
            assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)  # twice the length
            assert y1 - y0 == pytest.approx(y2 - y1, abs=0.11) and y1 < y0  # twice the value
        assert points["original"][0][1] < points["ours"][0][1]
    for name, words in (("time.svg", {"ours: 4.1", "original: 12.3", "seconds", "4,096"}),
                        ("memory.svg", {"ours: 0.41", "original: 1.23", "2,048"})):
        texts = {node.text for node in plots[name].iter(f"{SVG}text")}
        assert words | {"float32, 2 threads, Brand <X> & Co"} <= texts


# ------------------------------------------------------------------------------------------------
# The command


def test_committed_figures_are_what_the_command_writes(tmp_path):
    assert run("docs/figures.py", "--output", tmp_path)[::2] == (0, "")
    written = {file.name: file.read_text("utf-8") for file in tmp_path.iterdir()}
    committed = {file.name: file.read_text("utf-8") for file in (ROOT / "docs").glob("*.svg")}
    assert written == committed and "who_sees_whom.svg" in written


def test_the_picture_is_printed_as_text():
    status, out, err = run("docs/figures.py", "--text", *OPTIONS, "--sparsity-type", "stride")
    assert (status, out.split(), err) == (0, ["stride", *hand_drawn("s.s.")], "")
    status, out, err = run("docs/figures.py", "--text", *OPTIONS)
    assert figures.SELECTIONS.keys() <= set(out.split())


@pytest.mark.parametrize("words, said", [
    (["--block-size", "7"], "block_size=7"), (["--length", "100000"], "length=100000"),
    (["--output", "/nonexistent"], "/nonexistent"), (["--sparsity-type", "random"], "random")])
def test_a_mistake_is_one_line_and_status_2(words, said):
    assert said in fails("docs/figures.py", *words)
