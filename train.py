"""Fine-tune BARThez on pairs of document and summary, or measure a model with ROUGE.

    python train.py --model moussaKam/barthez --train train.jsonl --validation validation.jsonl \\
        --output my-model
    python train.py --model my-model --evaluate test.jsonl

Pairs are JSON lines: {"document": "…", "summary": "…"}. The saved model is the one with the best
ROUGE-L on the validation pairs. Run the same command again to resume an interrupted run: the result
is the same to the last bit. On several GPUs or machines: torchrun --nproc-per-node 8 train.py …
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import re
import time
import zipfile
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from barthez import load_model, save_model
from cpu import keep_freed_memory
from load_weights import fcntl, notice, parse_settings, replacing, run

RANK = int(os.environ.get("RANK", "0"))  # the number of this process, as torchrun sets it
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
CHECKPOINT_SECONDS = 300  # between checkpoints: what a kill may cost
REMEDY = "choose another --output, or discard what is there with --start-over"


# ------------------------------------------------------------------------------------------------
# Pairs and batches


def read_lines(path, *keys):
    """The records of a file of JSON lines, each with a text under each of `keys`."""
    records = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)  # UTF-8, with or without a byte order mark
                for key in keys:
                    record[key].encode()  # fails unless this is a text
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                texts = ", ".join(f'"{key}": "…"' for key in keys)
                raise ValueError(f"{path}, line {number}, is not a JSON object "
                                 f"{{{texts}}} in UTF-8: {error!r}") from None
            records.append(record)
    if not records:
        raise ValueError(f"{path} is empty")
    return records


def sample(path, count, *keys):
    """`count` records of a file of JSON lines, or all if it has fewer; always the same ones."""
    records = read_lines(path, *keys)
    return random.Random(0).sample(records, min(count, len(records)))


class Pairs:
    """Documents with their summaries, as ids."""

    def __init__(self, records, tokenizer, max_source_length, max_target_length):
        self.summaries = [record["summary"] for record in records]
        self.sources = [tokenizer.encode(record["document"], max_length=max_source_length)
                        for record in records]
        self.targets = [tokenizer.encode(summary, max_length=max_target_length)
                        for summary in self.summaries]
        self.lengths = [len(s) + len(t) for s, t in zip(self.sources, self.targets)]

    def pair(self, i, rng):
        """The ids of source and target i. `rng` is for data sets that add noise; unused here."""
        return self.sources[i], self.targets[i]


def batches(lengths, batch_tokens, rng):
    """Lists of indices of similar lengths, each of at most batch_tokens tokens with padding.

    Their order is random. A text longer than batch_tokens is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i] * rng.uniform(0.95, 1.05))
    groups, group, longest = [], [], 0
    for i in order:
        longest = max(longest, lengths[i])
        if group and longest * (len(group) + 1) > batch_tokens:
            groups.append(group)
            group, longest = [], lengths[i]
        group.append(i)
    groups.append(group)
    rng.shuffle(groups)
    return groups


def tensors(pairs, pad_token_id, device):
    """The model's arguments for pairs of ids: input_ids, attention_mask (B, S), labels (B, T)."""
    def pad(rows, value):
        length = max(map(len, rows))
        return torch.tensor([row + [value] * (length - len(row)) for row in rows], device=device)

    input_ids = pad([source for source, target in pairs], pad_token_id)
    labels = pad([target for source, target in pairs], -100)
    return {"input_ids": input_ids, "attention_mask": input_ids != pad_token_id, "labels": labels}


def training_batches(data, first, model, options, rank, processes):
    """The batches of one process for each step, from step `first` (counted from 0) on, endlessly.

    data: examples, such as Pairs. A step has options.accumulate batches of `tensors`.
    The random numbers depend on seed, step and rank alone, so that a resumed run draws the same.
    """
    device = next(model.parameters()).device
    per_step = options.accumulate * processes
    stream = itertools.islice(endless_batches(data, options), first * per_step, None)
    for step in itertools.count(first):
        rng = random.Random(f"{options.seed} {step} {rank}")
        torch.manual_seed(rng.getrandbits(63))
        groups = list(itertools.islice(stream, per_step))[rank::processes]
        pairs = [[data.pair(i, rng) for i in group] for group in groups]
        yield [tensors(group, model.config.pad_token_id, device) for group in pairs]


def endless_batches(data, options):
    """The batches of one epoch after the other."""
    for epoch in itertools.count():
        rng = random.Random(f"{options.seed} {epoch}")
        yield from batches(data.lengths, options.batch_tokens, rng)


def training_pairs(options, model, tokenizer):
    """The pairs of options.train, and a function that evaluates a model on options.validation."""
    keys = "document", "summary"
    lengths = options.max_source_length, options.max_target_length
    pairs = Pairs(read_lines(options.train, *keys), tokenizer, *lengths)
    if not options.validation:
        return pairs, None
    records = sample(options.validation, options.evaluate_on, *keys)
    # If the model cannot write with these options, say so before hours of training.
    summarize(model, tokenizer, Pairs(records[:1], tokenizer, *lengths), options)
    held_out = Pairs(records, tokenizer, *lengths)
    return pairs, partial(validate, tokenizer=tokenizer, data=held_out, options=options)


# ------------------------------------------------------------------------------------------------
# Evaluation


def rouge(candidate, reference):
    """(ROUGE-1, ROUGE-2, ROUGE-L) as F1 of two texts: C.-Y. Lin, "ROUGE" (2004).

    Words are runs of letters and digits in lower case, without stemming.
    >>> rouge("le chat dort", "le chat mange")
    (0.666…, 0.5, 0.666…)
    """
    a = re.findall(r"\w+", candidate.lower())
    b = re.findall(r"\w+", reference.lower())

    def f1(common, n):
        return 2 * common / (len(a) + len(b) - 2 * (n - 1)) if common else 0.0

    def ngrams(words, n):
        return Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))

    longest = [0] * (len(b) + 1)  # length of the longest common subsequence, row by row
    for word in a:
        above = longest[:]
        for j, other in enumerate(b):
            longest[j + 1] = above[j] + 1 if word == other else max(above[j + 1], longest[j])
    unigrams = (ngrams(a, 1) & ngrams(b, 1)).total()
    bigrams = (ngrams(a, 2) & ngrams(b, 2)).total()
    return f1(unigrams, 1), f1(bigrams, 2), f1(longest[-1], 1)


def mean_rouge(candidates, references):
    """The means of ROUGE-1, ROUGE-2 and ROUGE-L over two lists of texts."""
    scores = [rouge(*texts) for texts in zip(candidates, references)]
    return [sum(column) / len(scores) for column in zip(*scores)]


def first_sentence(text):
    """The baseline: the first sentence or line of a document."""
    return re.split(r"(?<=[.!?])\s|\n", text.strip())[0]


@torch.no_grad()
def mean_loss(model, data, batch_tokens):
    """Cross-entropy per target token, without label smoothing."""
    device = next(model.parameters()).device
    rng = random.Random(0)
    total, count = 0.0, 0
    for group in batches(data.lengths, batch_tokens, rng):
        pairs = [data.pair(i, rng) for i in group]
        batch = tensors(pairs, model.config.pad_token_id, device)
        tokens = (batch["labels"] != -100).sum().item()
        total += model(**batch).loss.item() * tokens
        count += tokens
    return total / count


def summarize(model, tokenizer, data, options, batch_tokens=16384):
    """The model's summaries of Pairs, in their order."""
    max_length = model.config.max_length or options.max_target_length
    max_length = min(max_length, model.config.max_position_embeddings)
    device = next(model.parameters()).device
    lengths = [len(source) for source in data.sources]
    summaries = [""] * len(lengths)
    for group in batches(lengths, batch_tokens, random.Random(0)):
        pairs = [data.pair(i, None) for i in group]
        batch = tensors(pairs, tokenizer.pad_token_id, device)
        ids = model.generate(batch["input_ids"], batch["attention_mask"], max_length=max_length,
                             num_beams=options.num_beams, num_return_sequences=1)
        for i, row in zip(group, ids):
            summaries[i] = tokenizer.decode(row)
    return summaries


def validate(model, tokenizer, data, options):
    """ROUGE-L on Pairs, as a score, and a text with the other measures."""
    loss = mean_loss(model, data, options.batch_tokens)
    summaries = summarize(model, tokenizer, data, options)
    one, two, longest = mean_rouge(summaries, data.summaries)
    return longest, (f"validation loss {loss:.3f}  ROUGE-1 {one:.3f}  ROUGE-2 {two:.3f}  "
                     f"ROUGE-L {longest:.3f}\n    for example {summaries[0]!r}")


def report(model, tokenizer, options):
    """Print loss and ROUGE of a model and of a baseline, for each "source" that the pairs name."""
    records = [record for record in read_lines(options.evaluate, "document", "summary")
               if not options.longer_than
               or len(tokenizer.encode(record["document"])) > options.longer_than]
    if not records:
        raise ValueError(f"{options.evaluate}: no document is longer than {options.longer_than} "
                         "tokens; lower --longer-than")
    data = Pairs(records, tokenizer, options.max_source_length, options.max_target_length)
    loss = mean_loss(model, data, options.batch_tokens)
    print(f"cross-entropy per token of the {len(records)} summaries: {loss:.3f}", flush=True)
    written = summarize(model, tokenizer, data, options)
    firsts = [first_sentence(record["document"]) for record in records]
    sources = [str(record.get("source", "all")) for record in records]
    for source in sorted(set(sources)):
        chosen = [i for i, name in enumerate(sources) if name == source]
        references = [data.summaries[i] for i in chosen]
        print(f"{source}: {len(chosen)} documents   ROUGE-1  ROUGE-2  ROUGE-L")
        for name, texts in (("model", written), ("first sentence", firsts)):
            scores = mean_rouge([texts[i] for i in chosen], references)
            print(f"  {name:24}" + "".join(f"{score:9.3f}" for score in scores))
    count = min(options.examples, len(records))
    for i in random.Random(options.seed).sample(range(len(records)), count):
        print(f"\n{records[i].get('name', i)}\n  document   {records[i]['document'][:300]!r}\n"
              f"  reference  {data.summaries[i]}\n  model      {written[i]}")


# ------------------------------------------------------------------------------------------------
# Training


def say(text):
    """Print a line of progress, once for all processes."""
    if RANK == 0:
        notice(text)


def cross_entropy(model, batch, label_smoothing):
    """The loss of a batch, summed over its target tokens."""
    logits = model(**batch).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum",
                           label_smoothing=label_smoothing)


def autocast(model, options):
    device = next(model.parameters()).device
    return torch.autocast(device.type, torch.bfloat16, options.precision == "bfloat16")


class WithLoss(nn.Module):
    """A model and its loss as one module: DistributedDataParallel wraps modules."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch):
        return self.loss(self.model, batch)


def distribute(module):
    """Let the gradients of a module be averaged over all processes."""
    if PROCESSES == 1:
        return module
    dist.init_process_group(timeout=timedelta(days=1))  # as long as an evaluation may take
    config = module.model.config
    skips_layers = config.encoder_layerdrop > 0 or config.decoder_layerdrop > 0
    return DistributedDataParallel(module, gradient_as_bucket_view=True,
                                   find_unused_parameters=skips_layers)


def update(module, optimizer, step, batches, options):
    """Update the weights once; returns this process's part of the mean loss per target token.

    batches: of `tensors`, one for each forward pass. The mean is over those of all processes.
    """
    tokens = sum((batch["labels"] != -100).sum() for batch in batches)
    if PROCESSES > 1:
        dist.all_reduce(tokens)
    mean = 0
    for batch in batches:
        more = PROCESSES > 1 and batch is not batches[-1]
        with module.no_sync() if more else contextlib.nullcontext():
            with autocast(module, options):
                loss = module(batch) / tokens
            (loss * PROCESSES).backward()  # DistributedDataParallel divides by their number
        mean += loss.detach()

    warmup = max(1, round(options.warmup * options.steps))
    group = optimizer.param_groups[0]
    group["lr"] = options.learning_rate * min(step / warmup, 1 - (step - 1) / options.steps)
    norm = nn.utils.clip_grad_norm_(group["params"], 1.0)
    if not norm.isfinite():
        raise ValueError(f"step {step}: the gradients are not finite; use a lower --learning-rate")
    optimizer.step()
    optimizer.zero_grad()
    return mean


def evaluate_and_save(model, tokenizer, evaluate, progress, options):
    """Evaluate a model, and save it if it is the best of its run so far."""
    step = score = progress["step"]
    if evaluate:
        model.eval()
        with autocast(model, options):
            score, text = evaluate(model)
        model.train()
        say(f"step {step}: {text}")
    if not score < progress["best_score"]:  # NaN is not, so that save_model refuses such a model
        save_model(model, tokenizer, options.output)
        progress.update(best_step=step, best_score=score)


def train(options, checkpoint, model, tokenizer, data, loss, evaluate=None):
    """Train a model, and save the best one in options.output.

    options: those of training_parser.
    checkpoint: the path that output_folder yields.
    data: examples, such as Pairs: `lengths` in tokens, and `pair(i, rng)`.
    loss: loss(model, batch) returns the loss of a batch, summed over its target tokens.
    evaluate: evaluate(model) returns a score, the higher, the better, and a text to print.
        Without it, the last model is the best.
    Raises ValueError if the checkpoint is from another run, or if the model diverges.
    """
    description = describe_run(options, model, PROCESSES)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.98), fused=True,
                                  weight_decay=options.weight_decay)
    progress = {"step": 0, "best_step": 0, "best_score": -math.inf}
    if checkpoint.exists() and not options.start_over:
        progress = load_checkpoint(checkpoint, description, model, optimizer)
        say(f"resuming after step {progress['step']} of {options.steps}")
    elif RANK == 0:  # before any work, so that a full disk is noticed now
        save_checkpoint(checkpoint, description, progress, model, optimizer)
    module = distribute(WithLoss(model, loss))
    stream = training_batches(data, progress["step"], model, options, RANK, PROCESSES)
    saved = time.monotonic()
    total, seconds, steps = 0, 0, 0  # loss, time and number of the steps since the last line
    model.train()
    for step in range(progress["step"] + 1, options.steps + 1):
        began = time.monotonic()
        batches = next(stream)
        total += update(module, optimizer, step, batches, options)
        seconds += time.monotonic() - began
        steps += 1
        progress["step"] = step

        if step % 20 == 0 or step in (1, options.steps):
            if PROCESSES > 1:
                dist.all_reduce(total)
            say(f"step {step}/{options.steps}  loss {total / steps:.3f}  "
                f"{seconds / steps:.2f} s per step")
            total, seconds, steps = 0, 0, 0
        evaluated = step % options.evaluate_every == 0 or step == options.steps
        if evaluated and RANK == 0:
            evaluate_and_save(model, tokenizer, evaluate, progress, options)
        if RANK == 0 and (evaluated or time.monotonic() - saved > CHECKPOINT_SECONDS):
            save_checkpoint(checkpoint, description, progress, model, optimizer)
            saved = time.monotonic()
        if evaluated and PROCESSES > 1:
            dist.barrier()  # the others wait for the first one
    say(f"The best model, that of step {progress['best_step']}, is in {options.output}. "
        "checkpoint.pt there serves only to resume this run; you may delete it.")
    if PROCESSES > 1:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------
# Interrupted runs: what is saved of a run, and what keeps two runs apart


@contextlib.contextmanager
def output_folder(options, rank):
    """Make options.output and keep other runs out of it; yields the path of the checkpoint.

    Raises ValueError if another run uses the folder, or if its model is not from a run.
    """
    if not options.output:
        raise ValueError("--output is missing: name a folder for the model")
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    with open(folder / "train.lock", "a") as lock:
        try:
            if fcntl and rank == 0:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
        except BlockingIOError:
            raise ValueError(f"another run is using {folder}: choose another --output") from None
        except OSError:  # some network drives have no locks
            pass
        if (folder / "config.json").exists() and not checkpoint.exists() and not options.start_over:
            raise ValueError(f"{folder} has a model, but no checkpoint.pt to resume from: {REMEDY}")
        yield checkpoint


def describe_run(options, model, processes):
    """All that decides the result of a run: options, number of processes, digests of the inputs."""
    run = vars(options) | {"processes": processes}
    for name in ("output", "start_over", "revision", "gradient_checkpointing"):
        del run[name]  # these do not
    for name in ("train", "validation", "tokenizer"):
        if run.get(name):
            run[name] = digest([Path(run[name]).read_bytes()])
    weights = [p.detach().cpu().flatten().view(torch.uint8).numpy() for p in model.parameters()]
    run["model"] = digest([repr(model.config).encode(), *weights])
    return run


def digest(contents):
    sha = hashlib.sha256()
    for content in contents:
        sha.update(content)
    return sha.hexdigest()[:12]


def save_checkpoint(path, run, progress, model, optimizer):
    """Write the state of a run. `progress` is a dict of numbers that load_checkpoint returns."""
    state = {"run": run, "progress": progress, "model": model.state_dict(),
             "optimizer": optimizer.state_dict()}
    with replacing(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's error for a full disk
            raise OSError(f"{path} cannot be written; is the disk full? ({error})") from None


def load_checkpoint(path, run, model, optimizer):
    """Restore model and optimizer from a checkpoint of the same run; returns its progress.

    Raises ValueError if the file is damaged, or if it is from another run: it names the options
    that differ.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        before, progress = state["run"], state["progress"]
        changes = [f"{name} was {before.get(name)} and is now {value}"
                   for name, value in run.items() if before.get(name) != value]
    except Exception:  # zipfile and torch raise many types for a damaged file
        raise ValueError(f"{path} is damaged or is not from this program: {REMEDY}") from None
    if changes:
        raise ValueError(f"{path} is from another run ({'; '.join(changes)}): use the same "
                         f"options, {REMEDY}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return progress


# ------------------------------------------------------------------------------------------------
# The command line


def number(kind, least, most=10 ** 9):
    """An argparse type: a number, int or float, from `least` to `most`."""
    def convert(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} to {most}")
        return value
    convert.__name__ = kind.__name__  # argparse says "invalid int value"
    return convert


def training_parser(description, usage):
    """A parser with the options that fine-tuning shares with the scripts in tiny/."""
    parser = argparse.ArgumentParser(description=description, usage=usage)
    add = parser.add_argument
    add("--model", metavar="NAME", required=True, help="folder or Hub id")
    add("--revision", help="branch, tag, commit or refs/pr/N on the Hub")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="override keys of config.json, such as dropout=0.2")
    add("--validation", metavar="FILE", help="JSON lines that decide which model is the best")
    add("--output", metavar="FOLDER", help="where the best model is saved")
    add("--start-over", action="store_true", help="replace the model and the run in that folder")
    add("--steps", type=number(int, 1), default=3000, help="updates of the weights")
    add("--batch-tokens", type=number(int, 1), default=8192, help="per forward pass, padded")
    add("--accumulate", type=number(int, 1, 10_000), default=1, help="forward passes per step")
    add("--max-source-length", type=number(int, 3), metavar="N",
        help="in tokens (default: the model's positions)")
    add("--learning-rate", type=number(float, 0), default=5e-5)
    add("--warmup", type=number(float, 0, 1), default=0.1, metavar="SHARE",
        help="the share of the steps in which the learning rate rises")
    add("--weight-decay", type=number(float, 0), default=0.01)
    add("--gradient-checkpointing", action="store_true", help="less memory, slower")
    add("--precision", choices=["bfloat16", "float32"], help="of matrix products in training "
        "(default: bfloat16 where the processor computes it, otherwise float32)")
    add("--evaluate-every", type=number(int, 1), default=500, metavar="STEPS")
    add("--evaluate-on", type=number(int, 1), default=200, metavar="N", help="validation examples")
    add("--seed", type=number(int, 0), default=1)
    return parser


def parse_arguments():
    parser = training_parser(
        "Fine-tune BARThez on pairs of document and summary, or measure a model with ROUGE.",
        "train.py --model NAME (--train FILE --output FOLDER | --evaluate FILE) [options]")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--train", metavar="FILE", help="fine-tune on these pairs")
    task.add_argument("--evaluate", metavar="FILE", help="print ROUGE on these pairs")
    add = parser.add_argument
    add("--longer-than", type=number(int, 0), default=0, metavar="N",
        help="with --evaluate: only documents of more than N tokens")
    add("--examples", type=number(int, 0), default=0, metavar="N",
        help="with --evaluate: print N summaries too")
    add("--max-target-length", type=number(int, 3), default=128, metavar="N", help="in tokens")
    add("--num-beams", type=number(int, 1, 1000), default=4, help="for the summaries")
    add("--label-smoothing", type=number(float, 0, 1), default=0.1)
    add("--only-global-embeddings", action="store_true",
        help="train only the global tokens: cheap adaptation to LSG")
    options = parser.parse_args()
    for name in ("output", "validation") if options.evaluate else ("longer_than", "examples"):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} has no effect here; leave it out")
    return options


def choose_device():
    """The GPU that torchrun means for this process, or the CPU."""
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= gpus:
        raise ValueError(f"there are more processes than GPUs: use --nproc-per-node {gpus}")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def prepare(model, options):
    """Fill in the options that depend on the model and the processor, and check the lengths."""
    positions = model.config.max_position_embeddings
    options.max_source_length = options.max_source_length or positions
    for name in ("max_source_length", "max_target_length"):
        length = getattr(options, name, 0)
        if length > positions:
            raise ValueError(f"--{name.replace('_', '-')} {length}: the model has {positions} "
                             f"positions; --set max_position_embeddings={length} adds more")
    if options.precision is None:
        computes_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        if torch.cuda.is_available():
            computes_bfloat16 = partial(torch.cuda.is_bf16_supported, including_emulation=False)
        options.precision = "bfloat16" if computes_bfloat16() else "float32"
    for stack in (model.model.encoder, model.model.decoder):
        stack.gradient_checkpointing = options.gradient_checkpointing


def load(options):
    """The model that --model and --set name, on this process's device, and its tokenizer."""
    model, tokenizer = load_model(options.model, architecture="ForConditionalGeneration",
                                  revision=options.revision, device=choose_device(),
                                  **parse_settings(options.set))
    prepare(model, options)
    return model, tokenizer


def main():
    keep_freed_memory()
    options = parse_arguments()
    if options.evaluate:
        if RANK == 0:
            report(*load(options), options)
        return
    with output_folder(options, RANK) as checkpoint:
        model, tokenizer = load(options)
        if options.only_global_embeddings:
            if not model.config.lsg:
                raise ValueError("--only-global-embeddings: the model has none, due to lsg=false")
            model.requires_grad_(False)
            model.model.encoder.global_embeddings.requires_grad_(True)
        data, evaluate = training_pairs(options, model, tokenizer)
        loss = partial(cross_entropy, label_smoothing=options.label_smoothing)
        train(options, checkpoint, model, tokenizer, data, loss, evaluate)


if __name__ == "__main__":
    run(main)
