"""Fine-tune BARThez on pairs of document and summary, or measure a model with ROUGE.

    python train.py --model moussaKam/barthez --train train.jsonl --validation validation.jsonl
    python train.py --model my-model --evaluate test.jsonl

Pairs are JSON lines: {"document": "…", "summary": "…"}. The saved model is the one with the best
ROUGE-L on a sample of the validation pairs; without them, the last. Run the same command again to
resume an interrupted run; on the same CPU and number of threads, the result is bit-identical. On
several GPUs: torchrun --nproc-per-node 8 train.py …

Letters used for shapes: B batch, S tokens of a document, T tokens of a summary, V vocabulary.
"""

import argparse
import hashlib
import json
import os
import random
import re
import sys
import time
import unicodedata
import zipfile
from collections import Counter
from dataclasses import asdict, replace
from datetime import timedelta
from itertools import count, islice
from pathlib import Path

import torch

from barthez import (group_by_length, load_model, pad, parse_settings, run, save_model, shift_right,
                     summarize)
from cpu import keep_freed_memory
from load_weights import replacing

if os.name != "nt":
    import fcntl  # not on Windows

RANK = int(os.environ.get("RANK", "0"))  # the number of this process, as torchrun sets it
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
CHECKPOINT_SECONDS = 300  # between checkpoints; an interruption loses no more
REMEDY = "choose another --output, or delete that folder"


def say(text):
    """Print a line of progress, once for all processes."""
    if RANK == 0:
        print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------
# Pairs and batches


def read_pairs(path, tokenizer, options):
    """Pairs from a file of JSON lines: dicts with document and summary (texts), source and target
    (their ids). Longer texts than the maximum lengths are cut, and their number is reported."""
    pairs = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)  # UTF-8, with or without a byte order mark
            pair["source"] = tokenizer.encode(pair["document"])
            pair["target"] = tokenizer.encode(pair["summary"])
        except Exception as error:  # wrong lines raise errors of many types
            raise ValueError(f"{path}, line {number}, is not a JSON object in UTF-8 with the "
                             f"texts document and summary: {error!r}") from None
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path} is empty")
    for name, texts in (("source", "documents"), ("target", "summaries")):
        limit = getattr(options, f"max_{name}_length")
        too_long = [pair[name] for pair in pairs if len(pair[name]) > limit]
        for ids in too_long:
            ids[limit - 1:] = ids[-1:]  # </s> stays
        if too_long:
            say(f"{len(too_long)} of {len(pairs)} {texts} in {path} are longer than "
                f"--max-{name}-length {limit} tokens: their ends are not read")
    return pairs


def make_batch(pairs, model):
    """input_ids (B, S), attention_mask (B, S), decoder_input_ids (B, T) and labels (B, T)."""
    padding = model.config.pad_token_id
    input_ids = pad([pair["source"] for pair in pairs], padding, model)
    labels = pad([pair["target"] for pair in pairs], -100, model)
    return input_ids, input_ids != padding, shift_right(labels, padding), labels


def shuffled(pairs, options):
    """Yields lists of pairs of similar length, without end, in an order that depends on the seed
    alone. A list has at most options.batch_tokens tokens before padding, or one pair."""
    for epoch in count():
        rng = random.Random(f"{options.seed} {epoch}")
        # Noise, so that the lists differ between epochs. It only adds, so that the limit holds.
        lengths = [len(pair["source"] + pair["target"]) * rng.uniform(1, 1.1) for pair in pairs]
        groups = group_by_length(lengths, options.batch_tokens)
        rng.shuffle(groups)
        for group in groups:
            yield [pairs[i] for i in group]


# ------------------------------------------------------------------------------------------------
# Loss and ROUGE


def cross_entropy(model, batch, label_smoothing=0.0):
    """The loss of a batch, summed over its target tokens."""
    input_ids, attention_mask, decoder_input_ids, labels = batch
    logits = model(input_ids, attention_mask, decoder_input_ids).logits  # (B, T, V)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=label_smoothing)


def rouge(candidate, reference):
    """(ROUGE-1, ROUGE-2, ROUGE-L) as F1 of two texts: C.-Y. Lin, "ROUGE" (2004).

    Words are runs of letters and digits. Case, ligatures and soft hyphens do not matter.
    >>> rouge("Le chat dort.", "Le chat mange.")
    (0.6666666666666666, 0.5, 0.6666666666666666)
    """
    def words(text):
        text = unicodedata.normalize("NFKC", text.replace("\N{SOFT HYPHEN}", ""))
        return re.findall(r"\w+", text.lower())

    a, b = words(candidate), words(reference)
    unigrams = (Counter(a) & Counter(b)).total()
    bigrams = (Counter(zip(a, a[1:])) & Counter(zip(b, b[1:]))).total()
    longest = [0] * (len(b) + 1)  # length of the longest common subsequence, row by row
    for word in a:
        above = longest[:]
        for j, other in enumerate(b):
            longest[j + 1] = above[j] + 1 if word == other else max(above[j + 1], longest[j])
    # F1 is twice the common ones, divided by all those of both texts.
    total = max(1, len(a) + len(b))
    return 2 * unigrams / total, 2 * bigrams / max(1, total - 2), 2 * longest[-1] / total


def mean_rouge(texts, pairs):
    """The mean ROUGE of texts against the summaries of pairs: ROUGE-L, and a line with all three."""
    scores = [rouge(text, pair["summary"]) for text, pair in zip(texts, pairs)]
    one, two, longest = (sum(column) / len(scores) for column in zip(*scores))
    return longest, f"ROUGE-1 {one:.3f}  ROUGE-2 {two:.3f}  ROUGE-L {longest:.3f}"


@torch.no_grad()
def measure(model, tokenizer, pairs, options):
    """ROUGE-L of a model's summaries, and a text with all measures and one summary."""
    loss = 0.0
    model.eval()
    for group in group_by_length([len(pair["source"]) for pair in pairs], options.batch_tokens):
        loss += cross_entropy(model, make_batch([pairs[i] for i in group], model)).item()
    loss /= sum(len(pair["target"]) for pair in pairs)
    # Twice the tokens of a training batch, since generation keeps no activations.
    summaries = list(summarize(model, tokenizer, [pair["document"] for pair in pairs],
                               max_source_length=options.max_source_length,
                               batch_tokens=2 * options.batch_tokens))
    score, text = mean_rouge(summaries, pairs)
    return score, f"{text}  cross-entropy per token {loss:.3f}\n    for example {summaries[0]!r}"


def evaluate(options):
    """Print ROUGE of a model and of a baseline, the first sentence of each document."""
    if RANK > 0:
        return  # one process is enough
    model, tokenizer = load(options)
    pairs = read_pairs(options.evaluate, tokenizer, options)
    sentences = [re.split(r"(?<=[.!?])\s|\n", pair["document"].strip())[0] for pair in pairs]
    print(f"{len(pairs)} pairs\nfirst sentence  {mean_rouge(sentences, pairs)[1]}", flush=True)
    print(f"model           {measure(model, tokenizer, pairs, options)[1]}")


# ------------------------------------------------------------------------------------------------
# Training and checkpoints


def train(options):
    """Fine-tune options.model on options.train, and save the best model in options.output."""
    model, tokenizer = load(options)
    pairs = read_pairs(options.train, tokenizer, options)
    validation = read_pairs(options.validation, tokenizer, options) if options.validation else []
    validation = random.Random(0).sample(validation, min(options.evaluate_on, len(validation)))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True,
                                  weight_decay=options.weight_decay)

    checkpoint = options.output / "checkpoint.pt"
    progress = {"run": describe_run(options, model), "step": 0, "best_step": 0, "best_score": 0.0}
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, progress["run"], model, optimizer)
        say(f"resuming after step {progress['step']} of {options.steps}")
    elif RANK == 0:  # a full disk shows before training
        save_checkpoint(checkpoint, progress, model, optimizer)

    parallel = model
    if PROCESSES > 1:  # average the gradients; the others wait while the first process evaluates
        torch.distributed.init_process_group(timeout=timedelta(days=1))
        skips_layers = model.config.encoder_layerdrop + model.config.decoder_layerdrop > 0
        parallel = torch.nn.parallel.DistributedDataParallel(
            model, find_unused_parameters=skips_layers)
    # A resumed run skips the lists already used, and draws the same random numbers.
    used = progress["step"] * options.accumulate * PROCESSES
    lists = islice(shuffled(pairs, options), used + RANK, None, PROCESSES)
    began = saved = time.monotonic()
    for step in range(progress["step"] + 1, options.steps + 1):
        torch.manual_seed(random.Random(f"{options.seed} {step} {RANK}").getrandbits(63))
        batches = [make_batch(part, model) for part in islice(lists, options.accumulate)]
        loss = update(parallel, optimizer, step, batches, options)
        progress["step"] = step
        if step % 20 == 0 or step in (1, options.steps):
            say(f"step {step}/{options.steps}  loss {loss:.3f}  {time.monotonic() - began:.0f} s")
        is_measured = step % options.evaluate_every == 0 or step == options.steps
        if RANK == 0 and is_measured:
            score = 0.0
            if validation:
                score, text = measure(model, tokenizer, validation, options)
                say(f"step {step}: {text}")
            if score >= progress["best_score"]:  # without validation, the last model is the best
                save_model(model, tokenizer, options.output)
                progress.update(best_step=step, best_score=score)
        if RANK == 0 and (is_measured or time.monotonic() - saved > CHECKPOINT_SECONDS):
            save_checkpoint(checkpoint, progress, model, optimizer)
            saved = time.monotonic()
    say(f"the best model, of step {progress['best_step']}, is in {options.output}")
    if PROCESSES > 1:
        torch.distributed.barrier()  # the others wait for the last evaluation
        torch.distributed.destroy_process_group()


def update(model, optimizer, step, batches, options):
    """Update the weights once. Returns the mean loss per target token, over all processes."""
    tokens = sum((labels != -100).sum() for *_, labels in batches)
    if PROCESSES > 1:
        torch.distributed.all_reduce(tokens)
    mean = 0
    model.train()
    for i, batch in enumerate(batches, 1):
        model.require_backward_grad_sync = i == len(batches)  # for DistributedDataParallel
        with torch.autocast(tokens.device.type, torch.bfloat16, options.precision == "bfloat16"):
            loss = cross_entropy(model, batch, options.label_smoothing) / tokens
        (loss * PROCESSES).backward()  # DistributedDataParallel divides by their number
        mean += loss.detach()
    if PROCESSES > 1:
        torch.distributed.all_reduce(mean)
    # The learning rate rises linearly during the warm-up, and falls linearly to 0 at the end.
    warmup = max(1, round(options.warmup * options.steps))
    group = optimizer.param_groups[0]
    group["lr"] = options.learning_rate * min(step / warmup, 1 - (step - 1) / options.steps)
    if not torch.nn.utils.clip_grad_norm_(group["params"], 1.0).isfinite():
        raise ValueError(f"step {step}: the gradients are not finite; lower --learning-rate, and "
                         f"{REMEDY}")
    optimizer.step()
    optimizer.zero_grad()
    return mean


def describe_run(options, model):
    """Everything that determines the result of a run, as {name: value}."""
    run = asdict(model.config) | asdict(model.generation_config) | vars(options)
    for name in ("output", "revision", "set", "gradient_checkpointing"):
        del run[name]
    for name in ("train", "validation"):
        path = run.pop(name)
        run[f"sha256 of --{name}"] = path and hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return run | {"number of processes": PROCESSES}


def save_checkpoint(path, progress, model, optimizer):
    state = {"progress": progress, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with replacing(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's error for a full disk
            raise OSError(f"{path} cannot be written; is the disk full? ({error})") from None


def load_checkpoint(path, run, model, optimizer):
    """Restore model and optimizer, and return the progress. Raises ValueError if the file is
    damaged, or belongs to another run; the message names what differs."""
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        progress, before = state["progress"], state["progress"]["run"]
    except Exception:  # damaged files raise errors of many types
        raise ValueError(f"{path} is damaged or is not from this program: {REMEDY}") from None
    changes = [f"{name} was {before.get(name)} and is now {value}"
               for name, value in run.items() if before.get(name) != value]
    if changes:
        raise ValueError(f"{path} is from another run ({'; '.join(changes)}): use the same "
                         f"options, {REMEDY}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return progress


# ------------------------------------------------------------------------------------------------
# The command line


def main():
    keep_freed_memory()
    options = parse_arguments()
    if options.evaluate:
        return evaluate(options)
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.lock", "a") as lock:
        try:
            if os.name != "nt" and RANK == 0:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released with the process
        except BlockingIOError:
            raise ValueError(f"another run is using {folder}: choose another --output") from None
        except OSError:  # some network drives do not support locks
            pass
        if (folder / "config.json").exists() and not (folder / "checkpoint.pt").exists():
            raise ValueError(f"{folder} has a model, but no checkpoint.pt to resume from: {REMEDY}")
        train(options)


def parse_arguments():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n\n")[0])
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--train", metavar="FILE", help="fine-tune on these pairs")
    task.add_argument("--evaluate", metavar="FILE", help="print ROUGE on these pairs")
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub id")
    add("--revision", help="branch, tag, commit or refs/pr/N on the Hub")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="override keys of config.json, such as dropout=0.2")
    add("--max-target-length", dest="set", action="append", type="max_length={}".format,
        metavar="N", help="in tokens (default: the model's max_length, otherwise 128)")
    add("--num-beams", dest="set", action="append", type="num_beams={}".format, metavar="N")
    add("--max-source-length", type=int, metavar="N", help="(default: the model's positions)")
    add("--validation", metavar="FILE", help="pairs for choosing the best model")
    add("--output", type=Path, default=Path("my-model"), help="folder for the best model")
    add("--steps", type=int, default=3000, help="updates of the weights")
    add("--batch-tokens", type=int, default=8192, help="per forward pass, before padding")
    add("--accumulate", type=int, default=1, metavar="N", help="forward passes per step")
    add("--learning-rate", type=float, default=5e-5)
    add("--warmup", type=float, default=0.1, metavar="SHARE", help="of the steps")
    add("--weight-decay", type=float, default=0.01)
    add("--label-smoothing", type=float, default=0.1)
    add("--only-global-embeddings", action="store_true", help="train only the global tokens")
    add("--gradient-checkpointing", action="store_true", help="less memory, slower")
    add("--precision", choices=["bfloat16", "float32"], help="default: bfloat16 where supported")
    add("--evaluate-every", type=int, default=500, metavar="STEPS")
    add("--evaluate-on", type=int, default=200, metavar="N", help="validation pairs")
    add("--seed", type=int, default=1)
    options = parser.parse_args()
    least = min(options.steps, options.accumulate, options.evaluate_every, options.evaluate_on)
    if least < 1 or not 0 <= options.warmup <= 1:
        parser.error("numbers of steps, batches and pairs begin at 1, and --warmup is from 0 to 1")
    if options.max_source_length is not None and options.max_source_length < 3:
        parser.error("--max-source-length: choose at least 3, for <s>, a token and </s>")
    return options


def load(options):
    """The model and its tokenizer. Sets the options that depend on them and on the processor."""
    device, has_bfloat16 = "cpu", torch.cpu._is_avx512_bf16_supported()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        device, has_bfloat16 = "cuda", torch.cuda.is_bf16_supported(including_emulation=False)
    options.precision = options.precision or ("bfloat16" if has_bfloat16 else "float32")
    model, tokenizer = load_model(options.model, architecture="ForConditionalGeneration",
                                  revision=options.revision, device=device,
                                  **parse_settings(options.set))
    if options.only_global_embeddings:
        model.requires_grad_(False)
        model.model.encoder.global_embeddings.requires_grad_(True)
    model.model.encoder.gradient_checkpointing = options.gradient_checkpointing
    model.model.decoder.gradient_checkpointing = options.gradient_checkpointing

    positions = model.config.max_position_embeddings
    options.max_source_length = options.max_source_length or positions
    options.max_target_length = model.generation_config.max_length or 128
    longest = max(options.max_source_length, options.max_target_length)
    if longest > positions:
        raise ValueError(f"the model has {positions} positions: --set max_position_embeddings="
                         f"{longest} makes room for {longest} tokens")
    # Saved with the model, so that it generates as it was evaluated.
    model.generation_config = replace(model.generation_config, max_length=options.max_target_length)
    return model, tokenizer


if __name__ == "__main__":
    run(main)
