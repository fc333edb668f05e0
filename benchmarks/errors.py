"""How far our numbers are from the original's, for each selection, head and type.

    python benchmarks/errors.py

compares with what tests/goldens/make_goldens.py recorded in float32, and prints Markdown.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from load_weights import load_model  # noqa: E402

GOLDENS = ROOT / "tests" / "goldens"
NOT_COPIED = ("step_1", "factor_1_sparse_", "no_mask_given")  # the original's faults


def row(name, differences):
    d = torch.cat([difference.flatten() for difference in differences]).abs()
    print(f"| {name} | {d.max():.1e} | {d.mean():.1e} | {d.numel():,} |")


def load(settings, lsg=True, **options):
    if lsg:
        options["max_position_embeddings"] = 2100
    return load_model(GOLDENS / "plain", lsg=lsg, **options, **settings)[0]


def selections(dtype):
    """{selection: differences of encoder states and logits}"""
    cases = json.loads((GOLDENS / "lsg.json").read_text())["cases"]
    tensors = load_file(GOLDENS / "lsg.safetensors")
    found = {}
    for case in cases:
        settings = case["settings"]
        if (any(part in case["name"] for part in NOT_COPIED)
                or not 1 <= settings.get("num_global_tokens", 1) <= 512):
            continue
        model = load(settings, case["lsg"], dtype=dtype)
        inputs = {name: tensors[f"inputs/{case['input']}/{name}"]
                  for name in ("input_ids", "attention_mask", "labels")}
        if not case["mask"]:
            del inputs["attention_mask"]
        if case["seed"] is not None:
            torch.manual_seed(case["seed"])
        out = model(**inputs)
        kind = (settings.get("sparsity_type", "norm") or "none") if case["lsg"] else "dense"
        for name in ("encoder_last_hidden_state", "logits"):
            if f"{case['name']}/{name}" in tensors:
                expected = tensors[f"{case['name']}/{name}"]
                found.setdefault(kind, []).append(getattr(out, name).float() - expected)
    return found


def heads():
    """{architecture: differences of all outputs}"""
    cases = json.loads((GOLDENS / "heads.json").read_text())["cases"]
    tensors = load_file(GOLDENS / "heads.safetensors")
    found = {}
    for case in cases:
        if "decoder_attention_mask" in case["inputs"]:
            continue  # which ours does not take
        model = load(case["settings"], architecture=case["architecture"])
        if case["weights"]:
            extra = load_file(GOLDENS / f"{case['weights']}.safetensors")
            model.load_state_dict(extra, strict=False)
        out = model(**{name: tensors[f"{case['name']}/inputs/{name}"] for name in case["inputs"]})
        for name in ("logits", "start_logits", "end_logits", "last_hidden_state"):
            if f"{case['name']}/{name}" in tensors:
                found.setdefault(case["architecture"], []).append(
                    getattr(out, name) - tensors[f"{case['name']}/{name}"])
    return found


@torch.no_grad()
def main():
    warnings.simplefilter("ignore")  # of new heads
    print("| | largest | mean | numbers |\n|---|---|---|---|")
    for kind, differences in selections(torch.float32).items():
        row(f"`{kind}`, float32", differences)
    for name, differences in heads().items():
        row(f"{name}, float32", differences)
    for kind, differences in selections(torch.bfloat16).items():
        row(f"`{kind}`, bfloat16", differences)


if __name__ == "__main__":
    main()
