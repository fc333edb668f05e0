"""How far our numbers are from the original's, for each selection, each head and three data types.

    python benchmarks/errors.py

Compares states and logits of a small random model with those that tests/goldens/make_goldens.py
recorded in float32, and prints Markdown. In float64, only the rounding of the recorded numbers is
left. The model is too small for near ties, where rounding decides which keys `norm` and `lsh`
choose; benchmarks/README.md shows them at full size.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from barthez import load_model

GOLDENS = ROOT / "tests" / "goldens"
FAULTS = "step_1", "factor_1_sparse_", "no_mask_given", "globals_0", "globals_600"  # not copied
OUTPUTS = "encoder_last_hidden_state", "last_hidden_state", "logits", "start_logits", "end_logits"


def differences(dtype):
    """{selection or architecture: differences from all that was recorded of it}"""
    found = {}
    for file in ("lsg", "heads"):
        tensors = load_file(GOLDENS / f"{file}.safetensors")
        for case in json.loads((GOLDENS / f"{file}.json").read_text())["cases"]:
            kind, inputs = kind_of(case), inputs_of(case, tensors)
            if any(fault in case["name"] for fault in FAULTS) or "decoder_attention_mask" in inputs:
                continue  # our heads do not take such a mask
            model = load(case, dtype)
            if case.get("seed") is not None:
                torch.manual_seed(case["seed"])
            out = model(**inputs)
            for name in OUTPUTS:
                expected = tensors.get(f"{case['name']}/{name}")
                if expected is not None:
                    difference = getattr(out, name).double() - expected
                    found.setdefault(kind, []).append(difference.abs().flatten())
    return {kind: torch.cat(parts) for kind, parts in found.items()}


def kind_of(case):
    if "architecture" in case:
        return case["architecture"]
    if not case["lsg"]:
        return "full attention"
    return case["settings"].get("sparsity_type", "norm") or "none"


def inputs_of(case, tensors):
    prefix = f"inputs/{case['input']}/" if "input" in case else f"{case['name']}/inputs/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
            if name.startswith(prefix) and (case.get("mask", True) or "attention_mask" not in name)}


def load(case, dtype):
    options = {"max_position_embeddings": 2100} if case.get("lsg", True) else {"lsg": False}
    model, _ = load_model(GOLDENS / "plain", architecture=case.get("architecture"), dtype=dtype,
                          **options, **case["settings"])
    if case.get("weights"):
        model.load_state_dict(load_file(GOLDENS / f"{case['weights']}.safetensors"), strict=False)
    return model


@torch.no_grad()
def main():
    warnings.simplefilter("ignore")  # about new heads
    torch.set_num_threads(1)  # more threads slow a small model down
    columns = [differences(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    print("| | float64: largest | mean | float32: largest | mean | bfloat16: largest | mean |")
    print("|---" * 7 + "|")
    for kind in columns[0]:
        cells = [f"{column[kind].max():.1e} | {column[kind].mean():.1e}" for column in columns]
        print(f"| {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
