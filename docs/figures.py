"""Draw the figures of the README: who sees whom, and time and memory against length.

    python docs/figures.py           write who_sees_whom.svg, time.svg and memory.svg
    python docs/figures.py --text    draw who sees whom in the terminal

The two plots show the measurements in benchmarks/lengths.json, which benchmarks/compare.py writes.
Without that file they are not drawn.
"""

import argparse
import json
import math
import sys
from html import escape
from itertools import groupby
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from barthez import run
from lsg import lsg_attention

LENGTHS = ROOT / "benchmarks" / "lengths.json"
SELECTIONS = {
    "norm": "keys of largest norm", "stride": "keys at equal distances",
    "block_stride": "a run of keys from each block", "pooling": "means of neighbors",
    "bos_pooling": "weighted means of neighbors", "lsh": "means of similar keys"}
SIZES = {  # the smallest size that can be drawn, and the default
    "length": (1, 64), "block_size": (1, 8), "sparse_block_size": (0, 8),
    "sparsity_factor": (0, 2), "num_global_tokens": (0, 1)}
LARGEST = 1024
STYLE = """
text { font: 13px "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-size: 15px; font-weight: bold }  .small { font-size: 12px; fill: #59636e }
.background { fill: #ffffff }  .not { fill: #eaeef2 }  .grid { stroke: #d1d9e0 }
.global, .original { fill: #818b98; stroke: #818b98 }
.local, .ours { fill: #3b8ad9; stroke: #3b8ad9 }
.sparse, .full { fill: #f0883e; stroke: #f0883e }
.line { fill: none; stroke-width: 2.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }  .small { fill: #9198a1 }
  .background { fill: #0d1117 }  .not { fill: #21262d }  .grid { stroke: #3d444d }
}"""


def svg(width, height, parts):
    size = f'width="{width}" viewBox="0 0 {width} {height}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{STYLE}</style>",
             rectangle("background", 0, 0, width, height), *parts, "</svg>", ""]
    return "\n".join(parts)


def rectangle(name, x, y, width, height):
    return f'<rect class="{name}" x="{x}" y="{y}" width="{width}" height="{height}"/>'


def text(x, y, words, name="", anchor="start", turn=0):
    place = f'transform="translate({x:.1f} {y:.1f}) rotate({turn})"'
    return f'<text class="{name}" {place} text-anchor="{anchor}">{escape(words)}</text>'


# ------------------------------------------------------------------------------------------------
# Who sees whom


def who_sees_whom(length, num_global_tokens, block_size, **options):
    """One string for each query, with one letter for each key:

    "g"  a global key, or any key of a global query
    "l"  a local key
    "s"  a token that is seen as a sparse key, alone or as part of a mean
    "."  not seen

    With the identity matrix as values, attention returns its weights. A key is seen if its weight
    is above zero. Queries and keys are random, and there is one head.
    """
    T = num_global_tokens + length
    with torch.random.fork_rng(devices=[]):  # keeps the caller's random state
        torch.manual_seed(0)
        query, key = torch.randn(2, 1, 1, T, 16)
        weights = lsg_attention(query, key, torch.eye(T)[None, None], block_size=block_size,
                                num_global_tokens=num_global_tokens, **options)[0, 0]  # (T, T)

    block = (torch.arange(T) - num_global_tokens).div(block_size, rounding_mode="floor")
    letters = ".gls"
    kind = torch.full((T, T), letters.index("s"))
    kind[(block[:, None] - block).abs() <= 1] = letters.index("l")
    kind[:num_global_tokens] = letters.index("g")
    kind[:, :num_global_tokens] = letters.index("g")
    kind[weights == 0] = letters.index(".")
    return ["".join(letters[k] for k in row) for row in kind.tolist()]


def draw_pictures(pictures, caption, size=260):
    """An SVG of pictures, {selection: strings of letters}, three in a row, with a legend."""
    columns = min(3, len(pictures))
    parts = []
    for number, (selection, rows) in enumerate(pictures.items()):
        x = 40 + number % columns * (size + 40)
        y = 60 + number // columns * (size + 80)
        parts.append(text(x, y - 26, selection, "title"))
        parts.append(text(x, y - 9, SELECTIONS[selection], "small"))
        parts.append(rectangle("not", x, y, size, size))
        parts.append(f'<g transform="translate({x} {y}) scale({size / len(rows):.6g})" '
                     'stroke-width="0" shape-rendering="crispEdges">')
        parts += squares(rows)
        parts.append("</g>")
        parts.append(text(x + size / 2, y + size + 16, "key", "small", "middle"))
        parts.append(text(x - 8, y + size / 2, "query", "small", "middle", turn=-90))
    y = 60 + math.ceil(len(pictures) / columns) * (size + 80) - 28
    legend = {"global": 40, "local": 130, "sparse: alone or in a mean": 210, "not seen": 425}
    for words, x in legend.items():
        parts.append(rectangle(words.split()[0].rstrip(":"), x, y - 11, 12, 12))
        parts.append(text(x + 20, y, words))
    parts.append(text(40, y + 26, "Each row is a query, each column a key.", "small"))
    parts.append(text(40, y + 44, caption, "small"))
    return svg(max(40 + columns * (size + 40), 640), y + 62, parts)


def squares(rows):
    """The letters as rectangles, one unit per letter. Equal neighbors are drawn together."""
    names = {"g": "global", "l": "local", "s": "sparse"}
    y = 0
    for row, equal_rows in groupby(rows):
        height = len(list(equal_rows))
        x = 0
        for letter, equal_letters in groupby(row):
            width = len(list(equal_letters))
            if letter in names:
                yield rectangle(names[letter], x, y, width, height)
            x += width
        y += height


# ------------------------------------------------------------------------------------------------
# Time and memory against length


def plots(measured):
    """{file name: SVG} of the content of benchmarks/lengths.json."""
    caption = "{dtype}, {threads} threads, {processor}".format(**measured)
    seconds, gigabytes = {}, {}
    for row in measured["rows"]:
        seconds.setdefault(row["contender"], {})[row["length"]] = row["seconds"]
        gigabytes.setdefault(row["contender"], {})[row["length"]] = row["memory"] / 1e9
    return {"time.svg": draw_plot("Time of the encoder", "seconds", caption, seconds),
            "memory.svg": draw_plot("Peak memory of the encoder", "GB above the loaded model",
                                    caption, gigabytes)}


def draw_plot(title, unit, caption, lines):
    """An SVG of lines, {contender: {length: value}}, with logarithmic axes."""
    lengths = sorted({length for line in lines.values() for length in line})
    values = [value for line in lines.values() for value in line.values()]
    if len(lengths) < 2:
        raise ValueError(f"{LENGTHS} has {len(lengths)} lengths: a plot needs two or more")
    round_numbers = [digit * 10.0 ** power for power in range(-6, 9) for digit in (1, 2, 5)]
    low = max(number for number in round_numbers if number <= min(values))
    high = min(number for number in round_numbers if number >= max(values))

    def across(length):
        return 60 + 400 * math.log(length / lengths[0]) / math.log(lengths[-1] / lengths[0])

    def down(value):
        return 330 - 260 * math.log(value / low) / math.log(high / low)

    parts = [text(24, 30, title, "title"), text(24, 50, unit, "small")]
    for number in round_numbers:
        if low <= number <= high:
            parts.append(f'<path class="grid" d="M60 {down(number):.1f}h400"/>')
            parts.append(text(52, down(number) + 4, f"{number:g}", "small", "end"))
    for length in lengths:
        parts.append(text(across(length), 350, f"{length:,}", "small", "middle"))
    parts.append(text(260, 372, "tokens", "small", "middle"))
    parts.append(text(24, 400, caption, "small"))

    label = 0
    for contender, line in sorted(lines.items(), key=lambda item: -max(item[1].values())):
        name = contender.split()[0]
        points = [(across(length), down(line[length])) for length in sorted(line)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="{name} line" points="{path}"/>')
        parts += [f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in points]
        x, y = points[-1]
        label = max(y + 4, label + 17)  # below the label of the line above
        parts.append(text(x + 12, label, f"{contender}: {line[max(line)]:.3g}"))
    return svg(640, 418, parts)


# ------------------------------------------------------------------------------------------------
# Command line


def main():
    parser = argparse.ArgumentParser(description="Draw the figures of the README.",
                                     usage=argparse.SUPPRESS)
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--text", action="store_true",
                        help="draw who sees whom in the terminal; write no file")
    target.add_argument("--output", type=Path, metavar="FOLDER", default=Path(__file__).parent,
                        help="write the SVG files there; default: the folder of this script")
    for name, (_, default) in SIZES.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default,
                            help="default: %(default)s")
    parser.add_argument("--sparsity-type", choices=SELECTIONS, help="default: all six selections")
    arguments = parser.parse_args()

    options = {name: getattr(arguments, name) for name in SIZES}
    for name, (least, _) in SIZES.items():
        if not least <= options[name] <= LARGEST:
            raise ValueError(f"{name}={options[name]} cannot be drawn: "
                             f"choose a number from {least} to {LARGEST}")
    pictures = {selection: who_sees_whom(**options, sparsity_type=selection)
                for selection in SELECTIONS if arguments.sparsity_type in (None, selection)}
    if arguments.text:
        for selection, rows in pictures.items():
            print(selection, *rows, "", sep="\n")
        return

    caption = ", ".join(f"{name}={value}" for name, value in options.items())
    files = {"who_sees_whom.svg": draw_pictures(pictures, caption)}
    if LENGTHS.exists():
        files |= plots(json.loads(LENGTHS.read_text(encoding="utf-8")))
    for name, content in files.items():
        path = arguments.output / name
        path.write_text(content, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    run(main)
