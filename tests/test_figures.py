"""docs/figures.py: the picture of who sees whom, and the plots of time and memory."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import figures

SVG = "{http://www.w3.org/2000/svg}"

# One global token and five blocks of four tokens. One line for the global query and for each block
# of queries. "xxxx" is replaced by the tokens of a block that are seen as sparse keys. A block
# leaves two sparse keys, so that sparse_block_size=2 reaches one block on either side, and 4 two.
PICTURES = {2: """
g gggg gggg gggg gggg gggg
g llll llll xxxx .... ....
g llll llll llll xxxx ....
g xxxx llll llll llll xxxx
g .... xxxx llll llll llll
g .... .... xxxx llll llll""", 4: """
g gggg gggg gggg gggg gggg
g llll llll xxxx xxxx ....
g llll llll llll xxxx xxxx
g xxxx llll llll llll xxxx
g xxxx xxxx llll llll llll
g .... xxxx xxxx llll llll"""}
SEEN = {"stride": "s.s.", "block_stride": "ss..", "pooling": "ssss", "bos_pooling": "ssss",
        "lsh": "ssss", "none": "...."}

MEASURED = {"processor": "Brand <X> & Co", "threads": 2, "dtype": "float32", "rows": [
    {"length": length, "contender": contender, "seconds": factor * length / 1000,
     "memory": int(factor * length * 1e5)}
    for length in (1024, 2048, 4096)
    for contender, factor in (("ours", 1.0), ("full attention", 1.01), ("original", 3.0))]}


def who_sees_whom(selection, sparse_block_size):
    return figures.who_sees_whom(20, sparsity_type=selection, block_size=4, sparsity_factor=2,
                                 sparse_block_size=sparse_block_size, num_global_tokens=1)


def hand_drawn(sparse_block_size, seen):
    picture = PICTURES[sparse_block_size].replace("xxxx", seen).replace(" ", "")
    global_row, *block_rows = picture.split()
    return [global_row] + [row for row in block_rows for _ in range(4)]


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, words)])
    figures.main()


def texts(svg):
    return [node.text for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


# ------------------------------------------------------------------------------------------------
# Who sees whom


@pytest.mark.parametrize("sparse_block_size", [2, 4])
@pytest.mark.parametrize("selection", SEEN)
def test_picture_equals_the_hand_drawn_one(selection, sparse_block_size):
    rows = who_sees_whom(selection, sparse_block_size)
    assert rows == hand_drawn(sparse_block_size, SEEN[selection])


@pytest.mark.parametrize("sparse_block_size", [2, 4])
def test_norm_shows_two_tokens_of_each_block(sparse_block_size):
    rows = who_sees_whom("norm", sparse_block_size)
    for row, expected in zip(rows, hand_drawn(sparse_block_size, "ssss")):
        assert row.replace("s", ".") == expected.replace("s", ".")
        for first in range(1, 21, 4):
            assert row[first:first + 4].count("s") == expected[first:first + 4].count("s") // 2


def test_drawing_keeps_the_random_state():
    before = torch.random.get_rng_state()
    who_sees_whom("lsh", 4)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_squares_cover_exactly_the_letters():
    rows = who_sees_whom("stride", 4)
    painted = [["."] * len(row) for row in rows]
    for square in figures.squares(rows):
        node = ElementTree.fromstring(square)
        x, y, width, height = (int(node.get(name)) for name in ("x", "y", "width", "height"))
        for i in range(y, y + height):
            for j in range(x, x + width):
                assert painted[i][j] == "."
                painted[i][j] = node.get("class")[0]
    assert ["".join(row) for row in painted] == rows


def test_picture_names_its_selections_colors_and_axes():
    words = texts(figures.draw_pictures({"norm": ["g.", ".l"], "lsh": ["gs", "ll"]}, "caption"))
    assert {"norm", "lsh", "global", "local", "not seen", "key", "query", "caption"} <= set(words)


# ------------------------------------------------------------------------------------------------
# Time and memory


def test_plot_has_logarithmic_axes():
    for svg in figures.plots(MEASURED).values():
        lines = ElementTree.fromstring(svg).iter(f"{SVG}polyline")
        points = {line.get("class").split()[0]: [
            [float(number) for number in point.split(",")] for point in line.get("points").split()]
            for line in lines}
        assert points.keys() == {"ours", "full", "original"}
        for (x0, y0), (x1, y1), (x2, y2) in points.values():
            assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)  # twice the length
            assert y1 - y0 == pytest.approx(y2 - y1, abs=0.11) and y1 < y0  # twice the value
        triple = points["ours"][0][1] - points["original"][0][1]
        double = points["ours"][0][1] - points["ours"][1][1]
        assert triple / double == pytest.approx(math.log2(3), abs=0.01)


def test_plot_names_its_lines_lengths_and_processor():
    time, memory = (texts(svg) for svg in figures.plots(MEASURED).values())
    assert {"ours: 4.1", "full attention: 4.14", "original: 12.3", "seconds"} <= set(time)
    assert {"ours: 0.41", "full attention: 0.414", "original: 1.23", "GB above the loaded model"} <= set(memory)
    for words in (time, memory):
        assert {"1,024", "2,048", "4,096", "float32, 2 threads, Brand <X> & Co"} <= set(words)


def test_labels_of_close_lines_do_not_overlap():
    svg = ElementTree.fromstring(figures.plots(MEASURED)["time.svg"])
    heights = [float(node.get("transform").split()[1].rstrip(")"))
               for node in svg.iter(f"{SVG}text") if ": " in node.text]
    assert len(heights) == 3
    assert heights[1] - heights[0] >= 16 and heights[2] - heights[1] >= 16


# ------------------------------------------------------------------------------------------------
# The command


def test_committed_figures_are_what_the_command_writes(monkeypatch, tmp_path):
    call(monkeypatch, "--output", tmp_path)
    written = {file.name: file.read_text("utf-8") for file in tmp_path.iterdir()}
    committed = {file.name: file.read_text("utf-8") for file in (ROOT / "docs").glob("*.svg")}
    assert written == committed
    assert "who_sees_whom.svg" in written


def test_plots_are_drawn_if_there_are_measurements(monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "LENGTHS", tmp_path / "lengths.json")
    call(monkeypatch, "--output", tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"who_sees_whom.svg"}
    figures.LENGTHS.write_text(json.dumps(MEASURED))
    call(monkeypatch, "--output", tmp_path)
    for name in ("who_sees_whom.svg", "time.svg", "memory.svg"):
        ElementTree.parse(tmp_path / name)


def test_text_is_printed(monkeypatch, capsys):
    options = ("--length", 20, "--block-size", 4, "--sparse-block-size", 2)
    call(monkeypatch, "--text", *options, "--sparsity-type", "stride")
    assert capsys.readouterr().out.split() == ["stride", *hand_drawn(2, "s.s.")]
    call(monkeypatch, "--text", *options)
    assert set(figures.SELECTIONS) <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize("words, named", [
    (["--block-size", "7"], "block_size=7 .*sparsity_factor=2"),
    (["--block-size", "-8"], "block_size=-8"),
    (["--length", "0"], "length=0"),
    (["--length", "100000"], "length=100000"),
    (["--num-global-tokens", "-99"], "num_global_tokens=-99"),
    (["--sparse-block-size", "1000000000"], "sparse_block_size=1000000000"),
    (["--output", "/nonexistent"], "/nonexistent")])
def test_mistakes_are_errors_that_name_the_option(words, named, monkeypatch):
    with pytest.raises((ValueError, OSError), match=named):
        call(monkeypatch, *words)


@pytest.mark.parametrize("words", [
    ["--sparsity-factor", "two"], ["--sparsity-type", "random"], ["--text", "--output", "."],
    ["--blok-size", "8"]])
def test_unreadable_options_are_one_line_and_status_2(words, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, *words)
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and words[0] in error


def test_a_single_length_is_an_error(monkeypatch, tmp_path):
    rows = [row for row in MEASURED["rows"] if row["length"] == 1024]
    (tmp_path / "lengths.json").write_text(json.dumps(MEASURED | {"rows": rows}))
    monkeypatch.setattr(figures, "LENGTHS", tmp_path / "lengths.json")
    with pytest.raises(ValueError, match="two or more"):
        call(monkeypatch, "--output", tmp_path)


def run(folder, *words):
    return subprocess.run([sys.executable, ROOT / "docs" / "figures.py", *words], cwd=folder,
                          check=False, capture_output=True, text=True, timeout=60)


def test_script_runs_from_another_folder(tmp_path):
    done = run(tmp_path, "--text", "--sparsity-type", "norm")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 67


def test_mistake_is_one_line_and_status_2(tmp_path):
    done = run(tmp_path, "--text", "--block-size", "7")
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"figures\.py: .*block_size=7 .*\n", done.stderr)
