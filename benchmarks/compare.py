"""Time and memory of this project beside its peers', as a Markdown table. Needs Linux.

    python benchmarks/compare.py encoder --peers ../peers/bin/python

Tasks:
    encoder   the encoder's states of a document
    generate  a text of 128 tokens by beam search with 4 beams
    train     a training step: forward, backward, Adam
    start     from a checkpoint to a model with all weights in memory
    lengths   the encoder at 1,024 to 16,384 tokens; writes lengths.json for docs/figures.py

Contenders have BARThez's sizes and the same random weights:
    ours            this project with LSG attention
    full attention  this project without LSG: PyTorch's fused attention
    original        lsg-converter, by the authors of the paper
    transformers    MBart, with full attention (with --dense)
    CTranslate2     MBart in an engine for inference, in float32 and in int8 (with --dense)
    bound           the linear layers alone: the calls that our model makes, with random inputs of
                    the same shapes; in training, forward and backward, and Adam. In start, reading
                    the file with a copy, which mapping it into memory avoids.

Each contender is a process. They take turns, A B C A B C …, and the first turn is not timed. A
ratio compares runs of the same turn; the table shows the median, the least and the largest.

Memory is the peak of a process in all its turns, above what it held once it had loaded. Freed
memory is returned to the system at that point; otherwise a contender could reuse it uncounted.
Training includes gradients and Adam's averages.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from contender import PEERS, VOCAB_SIZE, result_file

from barthez import BarthezConfig, BarthezForConditionalGeneration, init_weights, save_model
from load_weights import TINY, parse_settings, run
from tokenizer import BarthezTokenizer

SIZES = {
    "vocab_size": VOCAB_SIZE, "d_model": 768, "encoder_layers": 6, "decoder_layers": 6,
    "encoder_attention_heads": 12, "decoder_attention_heads": 12, "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072, "decoder_start_token_id": 0, "forced_eos_token_id": None}
LENGTHS = 1024, 2048, 4096, 8192, 16384
CONTENDER = Path(__file__).with_name("contender.py")


# ------------------------------------------------------------------------------------------------
# A race


def contenders(job):
    """The names of those who take part. The others are compared with the first."""
    if not job["dense"]:
        return ["ours", "original", "full attention", "bound"]
    engines = PEERS[2:] if job["task"] == "generate" else ()
    return ["full attention", "transformers", *engines, "bound"]


def race(job, names):
    """{name: [{"seconds", "memory"} of each turn]}. Contenders that do not load are left out."""
    turns, processes = {}, {}
    with ExitStack() as stack:
        for name in names:
            process = stack.enter_context(launch(job, name))
            if process.stdout.readline():
                turns[name], processes[name] = [], process
        for _ in range(job["rounds"] + 1):
            for name, process in processes.items():
                print(file=process.stdin, flush=True)
                answer = process.stdout.readline()
                if not answer:
                    raise ChildProcessError(f"{name} failed")
                turns[name].append(json.loads(answer))
    return {name: answers[1:] for name, answers in turns.items()}


def launch(job, name):
    """Start the process of a contender. Its first line of output says that it has loaded."""
    python = job["peers"] if name in PEERS else sys.executable
    command = [python, "-W", "ignore", CONTENDER, json.dumps(job | {"name": name})]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"})


# ------------------------------------------------------------------------------------------------
# Results


def print_table(job, results):
    first = next(iter(results))
    print(f"| {job['task']}, {job['length']:,} tokens, {job['dtype']}, {job['threads']} threads, "
          f"{processor()} | seconds | / {first} | GB |\n|---|---|---|---|")
    for name, turns in results.items():
        ratios = [turn["seconds"] / other["seconds"] for turn, other in zip(turns, results[first])]
        print(f"| {name} | {median_seconds(turns):.3g} "
              f"| **{median(ratios):.2f}** ({min(ratios):.2f} – {max(ratios):.2f}) "
              f"| {turns[-1]['memory'] / 1e9:.2f} |")
    print()
    for name in results:
        if name in PEERS and job["task"] in ("encoder", "generate"):
            print(f"- {name}: {agreement(job, name, first)}")
    print()


def median_seconds(turns):
    return median(turn["seconds"] for turn in turns)


def agreement(job, name, first):
    """How the result of a peer agrees with ours."""
    ours, theirs = (torch.load(result_file(job, who)) for who in (first, name))
    if job["task"] == "generate":
        same = (ours == theirs).long().cumprod(0).sum()
        return f"the first {same} of {len(ours)} tokens are equal"
    difference = (ours.double() - theirs.double()).abs()
    return f"states differ by at most {difference.max():.1e}, on average {difference.mean():.1e}"


def processor():
    """The name of the processor, and the vector instructions that PyTorch uses on it."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = found[1] if found else platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def lengths(job):
    """Print a table for each length, and write lengths.json."""
    rows = []
    for length in LENGTHS:
        job = job | {"task": "encoder", "length": length}
        results = race(job, ["ours", "full attention", "original"])
        print_table(job, results)
        rows += [{"length": length, "contender": name, "seconds": median_seconds(turns),
                  "memory": turns[-1]["memory"]} for name, turns in results.items()]
    measured = {"processor": processor(), "threads": job["threads"], "dtype": job["dtype"],
                "rows": rows}
    Path(__file__).with_name("lengths.json").write_text(json.dumps(measured, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------
# The command line


def write_checkpoint(job):
    """Random weights in the published layout, which all contenders read."""
    positions = LENGTHS[-1] if job["task"] == "lengths" else job["length"] + 128  # for padding
    settings = SIZES | {"max_position_embeddings": positions} | parse_settings(job["set"])
    unknown = settings.keys() - BarthezConfig.__dataclass_fields__.keys()
    if unknown:
        raise ValueError(f"config.json has no key {', '.join(sorted(unknown))}")
    torch.manual_seed(0)
    model = BarthezForConditionalGeneration(BarthezConfig(**settings))
    init_weights(model, 0.1)  # with less, the model repeats its last token
    save_model(model, BarthezTokenizer(TINY / "sentencepiece.bpe.model"), job["folder"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task", choices=["encoder", "generate", "train", "start", "lengths"])
    parser.add_argument("--peers", metavar="PYTHON", required=True,
                        help="the interpreter of the peers' environment; see benchmarks/README.md")
    parser.add_argument("--dense", action="store_true", help="models with full attention only")
    parser.add_argument("--length", type=int, default=4096, help="of the document, in tokens")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5, help="turns that are timed")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="override keys of config.json, such as sparsity_type=lsh")
    job = vars(parser.parse_args())
    if job["rounds"] < 1:
        raise ValueError(f"--rounds {job['rounds']}: choose 1 or more")
    with tempfile.TemporaryDirectory() as job["folder"]:
        write_checkpoint(job)
        if job["task"] == "lengths":
            lengths(job)
        else:
            print_table(job, race(job, contenders(job)))


if __name__ == "__main__":
    run(main)
