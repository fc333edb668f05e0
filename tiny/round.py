"""Round the matrices of a model, so that the file compresses better and a repository stays small.

    python -m tiny.round FOLDER

Each matrix becomes multiples of a power of two, about a fifth of its standard deviation; position
embeddings, half of it.
"""

import argparse
import math
import shutil
from pathlib import Path

from safetensors.torch import save_file

from load_weights import read_tensors, replacing, run


def round_matrix(name, matrix):
    parts = 2 if "positions" in name else 5
    grid = 2.0 ** round(math.log2(matrix.float().std() / parts))
    return (matrix / grid).round() * grid


def main():
    parser = argparse.ArgumentParser(description="Round the matrices of a model, in place.")
    parser.add_argument("folder", help="the folder of model.safetensors")
    path = Path(parser.parse_args().folder, "model.safetensors")
    weights = read_tensors(path)
    for name, weight in weights.items():
        if weight.dim() == 2 and weight.any():
            weights[name] = round_matrix(name, weight)
    with replacing(path) as temporary:
        save_file(weights, temporary, {"format": "pt"})
        shutil.copymode(path, temporary)  # save_file lets only the owner read it


if __name__ == "__main__":
    run(main)
