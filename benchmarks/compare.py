"""Time and memory of this project beside its peers', as a Markdown table. Needs Linux.

    python benchmarks/compare.py encoder --peers ../peers/bin/python

Tasks:
    encoder   the encoder's states of a document
    generate  a text of 128 tokens by beam search with 4 beams
    batch     texts of 64 tokens for 32 documents of 600 tokens
    train     a training step: forward, backward, Adam
    start     from a checkpoint to a model with all weights in memory
    lengths   the encoder at 1,024 to 16,384 tokens; writes lengths.json for docs/figures.py

Contenders have BARThez's sizes and the same random weights:
    ours            this project with LSG attention
    full attention  this project without LSG: PyTorch's fused attention
    original        lsg-converter, by the authors of the paper
    transformers    MBart, with full attention (with --dense, and in batch)
    CTranslate2     MBart in an engine for inference, in float32 and in int8 (generate --dense)
    bound           the linear layers alone: the calls that our model makes, with random inputs of
                    the same shapes; in training, forward and backward, and Adam. In start, reading
                    the file with a copy, which mapping it into memory avoids.
    … one by one    in batch: a document at a time instead of batches of 8,192 tokens

Each contender is a process. They take turns, A B C A B C …, and the first turn is not timed. A
ratio compares runs of the same turn; the table shows the median, the least and the largest.

Memory is the peak of a process in all its turns, above what it held once it had loaded. Training
includes gradients and Adam's averages. With --device cuda, it is what PyTorch allocates there.
"""

import argparse
import json
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
from contender import PEERS, VOCAB_SIZE

from barthez import (TINY, BarthezConfig, BarthezForConditionalGeneration, parse_settings, run,
                     save_model)
from beam_search import GenerationConfig
from tokenizer import BarthezTokenizer

SIZES = {
    "vocab_size": VOCAB_SIZE, "d_model": 768, "encoder_layers": 6, "decoder_layers": 6,
    "encoder_attention_heads": 12, "decoder_attention_heads": 12, "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072, "decoder_start_token_id": 0,
    "init_std": 0.1}  # with less, the model repeats its last token
LENGTHS = 1024, 2048, 4096, 8192, 16384
CONTENDER = Path(__file__).with_name("contender.py")


def contenders(job):
    """The names of the contenders. The others are compared with the first."""
    if job["task"] == "batch":
        return ["ours", "ours, one by one", "full attention", "transformers",
                "transformers, one by one"]
    if not job["dense"]:
        return ["ours", "original", "full attention", "bound"]
    if job["task"] == "generate" and job["device"] == "cpu":
        return ["full attention", "transformers", "CTranslate2 float32", "CTranslate2 int8",
                "bound"]
    return ["full attention", "transformers", "bound"]


def race(job, names):
    """The seconds of the timed turns {name: list} and the peaks of memory {name: bytes}.

    Contenders that do not load are left out.
    """
    seconds, memory, processes = {}, {}, {}
    with ExitStack() as stack:
        for name in names:
            python = job["peers"] if name.startswith(PEERS) else sys.executable
            if python is None:
                continue
            command = [python, "-W", "ignore", CONTENDER, json.dumps(job | {"name": name})]
            process = stack.enter_context(subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            if process.stdout.readline():  # it has loaded
                seconds[name], processes[name] = [], process
        for _ in range(job["rounds"] + 1):
            for name, process in processes.items():
                print(file=process.stdin, flush=True)
                answer = process.stdout.readline()
                if not answer:
                    raise ChildProcessError(f"{name} failed")
                answer = json.loads(answer)
                seconds[name].append(answer["seconds"])
                memory[name] = answer["memory"]
    return {name: turns[1:] for name, turns in seconds.items()}, memory


def print_table(job, seconds, memory):
    first, documents = next(iter(seconds)), job["documents"]
    unit = "seconds per document" if job["task"] == "batch" else "seconds"
    print(f"| {job['task']}, {documents} × {job['length']:,} tokens, {job['dtype']}, "
          f"{job['threads']} threads, {processor(job)} | {unit} | / {first} | GB |")
    print("|---|---|---|---|")
    for name in seconds:
        ratios = [own / other for own, other in zip(seconds[name], seconds[first])]
        print(f"| {name} | {median(seconds[name]) / documents:.3g} "
              f"| **{median(ratios):.2f}** ({min(ratios):.2f} – {max(ratios):.2f}) "
              f"| {memory[name] / 1e9:.2f} |")
    print()
    for name in seconds:
        if name.startswith(PEERS) and job["task"] in ("encoder", "generate"):
            print(f"- {name}: {agreement(job, name, first)}")
    print()


def agreement(job, name, first):
    """How the result of a peer agrees with ours."""
    ours, theirs = (torch.load(f"{job['folder']}/{who}.pt") for who in (first, name))
    if job["task"] == "generate":
        same = (ours == theirs).long().cumprod(0).sum()
        return f"the first {same} of {len(ours)} tokens are equal"
    difference = (ours.double() - theirs.double()).abs()
    return f"states differ by at most {difference.max():.1e}, on average {difference.mean():.1e}"


def processor(job):
    """The name of the GPU, or that of the CPU and the vector instructions that PyTorch uses."""
    if job["device"] == "cuda":
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = found[1] if found else platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def lengths(job):
    """Print a table for each length, and write lengths.json."""
    rows = []
    for length in LENGTHS:
        job = job | {"task": "encoder", "length": length}
        seconds, memory = race(job, ["ours", "full attention", "original"])
        print_table(job, seconds, memory)
        rows += [{"length": length, "contender": name, "seconds": median(seconds[name]),
                  "memory": memory[name]} for name in seconds]
    measured = {"processor": processor(job), "threads": job["threads"], "dtype": job["dtype"],
                "rows": rows}
    Path(__file__).with_name("lengths.json").write_text(json.dumps(measured, indent=1) + "\n")


def write_checkpoint(job):
    """Random weights in the published layout, which all contenders read."""
    positions = LENGTHS[-1] if job["task"] == "lengths" else job["length"] + 128  # for padding
    settings = SIZES | {"max_position_embeddings": positions} | parse_settings(job["set"])
    torch.manual_seed(0)
    model = BarthezForConditionalGeneration(BarthezConfig(**settings))
    model.generation_config = GenerationConfig(forced_eos_token_id=None)
    save_model(model, BarthezTokenizer(TINY / "sentencepiece.bpe.model"), job["folder"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    tasks = ["encoder", "generate", "batch", "train", "start", "lengths"]
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--peers", metavar="PYTHON",
                        help="their interpreter; see benchmarks/README.md (default: no peers)")
    parser.add_argument("--dense", action="store_true", help="models with full attention only")
    parser.add_argument("--length", type=int, help="in tokens (default: 4096; batch: 600)")
    parser.add_argument("--documents", type=int, default=32, help="of batch (default: 32)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile our encoder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5, help="turns that are timed")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="override fields of BarthezConfig, such as sparsity_type=lsh")
    job = vars(parser.parse_args())
    batch = job["task"] == "batch"
    job["length"] = job["length"] or (600 if batch else 4096)
    job["documents"] = job["documents"] if batch else 1
    job["new_tokens"] = 64 if batch else 128
    with tempfile.TemporaryDirectory() as folder:
        job["folder"] = folder
        write_checkpoint(job)
        if job["task"] == "lengths":
            lengths(job)
        else:
            print_table(job, *race(job, contenders(job)))


if __name__ == "__main__":
    run(main)
