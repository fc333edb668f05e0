"""Fine-tune BARThez on pairs of document and summary, or measure a model with ROUGE.

    python train.py --model moussaKam/barthez --train train.jsonl --validation validation.jsonl \\
        --output my-model
    python train.py --model my-model --evaluate test.jsonl

Pairs are JSON lines: {"document": "…", "summary": "…"}. The saved model is the one with the best
ROUGE-L on a sample of the validation pairs, or without them the last. Run the same command again to
resume an interrupted run: on CPUs, the result is the same to the last bit. On several GPUs, or on
machines that share the folders: torchrun --nproc-per-node 8 train.py …
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import time
import zipfile
from collections import Counter
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from barthez import load_model, save_model, shift_right
from cpu import keep_freed_memory
from load_weights import fcntl, notice, parse_settings, replacing, run

RANK = int(os.environ.get("RANK", "0"))  # the number of this process, as torchrun sets it
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
CHECKPOINT_SECONDS = 300  # between checkpoints: what a kill may cost
REMEDY = "choose another --output, or discard what is there with --start-over"


# ------------------------------------------------------------------------------------------------
# Pairs and batches


def read_lines(path, keys=("document", "summary")):
    """The records of a file of JSON lines, each with a text under each of `keys`."""
    records = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)  # UTF-8, with or without a byte order mark
                for key in keys:
                    record[key].encode()  # fails unless this is a text in Unicode
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}, is not a JSON object in UTF-8 with the "
                                 f"texts {' and '.join(keys)}: {error!r}") from None
            records.append(record)
    if not records:
        raise ValueError(f"{path} is empty")
    return records


def sample(records, count):
    """`count` records, or all if there are fewer; always the same ones."""
    return random.Random(0).sample(records, min(count, len(records)))


def encode_pairs(records, tokenizer, options):
    """The ids of each document and of its summary."""
    pairs = []
    for record in records:
        source = tokenizer.encode(record["document"], max_length=options.max_source_length)
        target = tokenizer.encode(record["summary"], max_length=options.max_target_length)
        pairs.append((source, target))
    return pairs


def group_by_length(pairs, batch_tokens, seed=0):
    """Lists of indices of pairs of similar length, in random order.

    The number of pairs in a list times the longest is at most batch_tokens, unless it is one pair.
    """
    rng = random.Random(seed)
    lengths = [len(source) + len(target) for source, target in pairs]
    # Some noise, so that the groups differ between epochs.
    order = sorted(range(len(pairs)), key=lambda i: lengths[i] * rng.uniform(0.95, 1.05))
    groups, longest = [[]], 0
    for i in order:
        longest = max(longest, lengths[i])
        if groups[-1] and longest * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
            longest = lengths[i]
        groups[-1].append(i)
    rng.shuffle(groups)
    return groups


def tensors(pairs, model):
    """The model's arguments for pairs of ids: input_ids, attention_mask (B, S), labels (B, T)."""
    device, padding = model.lm_head.weight.device, model.config.pad_token_id

    def pad(rows, value):
        length = max(map(len, rows))
        return torch.tensor([row + [value] * (length - len(row)) for row in rows], device=device)

    input_ids = pad([source for source, target in pairs], padding)
    labels = pad([target for source, target in pairs], -100)
    return {"input_ids": input_ids, "attention_mask": input_ids != padding, "labels": labels}


def training_batches(pairs, done, model, options):
    """(step, this process's options.accumulate batches) for each step after the first `done`.

    The random numbers depend on seed, step and rank alone, so that a resumed run draws the same.
    """
    per_step = options.accumulate * PROCESSES
    groups, epoch = [], 0  # groups that are not used yet
    for step in range(1, options.steps + 1):
        while len(groups) < per_step:
            groups += group_by_length(pairs, options.batch_tokens, f"{options.seed} {epoch}")
            epoch += 1
        of_this_process = groups[:per_step][RANK::PROCESSES]
        groups = groups[per_step:]
        if step > done:
            torch.manual_seed(random.Random(f"{options.seed} {step} {RANK}").getrandbits(63))
            yield step, [tensors([pairs[i] for i in group], model) for group in of_this_process]


def training_pairs(options, model, tokenizer):
    """The pairs of options.train, and a function that evaluates a model on options.validation."""
    pairs = encode_pairs(read_lines(options.train), tokenizer, options)
    if not options.validation:
        return pairs, None
    records = sample(read_lines(options.validation), options.evaluate_on)
    # If the model cannot write with these options, say so before hours of training.
    summarize(model, tokenizer, encode_pairs(records[:1], tokenizer, options), options)
    return pairs, partial(validate, tokenizer=tokenizer, records=records, options=options)


# ------------------------------------------------------------------------------------------------
# Loss and ROUGE


class CrossEntropy(nn.Module):
    """The loss of a model. It is a module because DistributedDataParallel wraps modules."""

    def __init__(self, model, label_smoothing):
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, batch):
        """The loss of a batch, summed over its target tokens."""
        decoder_input_ids = shift_right(batch["labels"], self.model.config.pad_token_id)
        logits = self.model(batch["input_ids"], batch["attention_mask"], decoder_input_ids).logits
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum",
                               label_smoothing=self.label_smoothing)


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
def mean_loss(model, pairs, options):
    """Cross-entropy per target token, without label smoothing."""
    loss = CrossEntropy(model, label_smoothing=0.0)
    total = 0.0
    for group in group_by_length(pairs, options.batch_tokens):
        total += loss(tensors([pairs[i] for i in group], model)).item()
    return total / sum(len(target) for source, target in pairs)


def summarize(model, tokenizer, pairs, options):
    """The model's summaries of the sources, in their order."""
    summaries = [""] * len(pairs)
    # Twice the tokens of a training batch, since generation keeps no activations.
    for group in group_by_length(pairs, 2 * options.batch_tokens):
        batch = tensors([pairs[i] for i in group], model)
        ids = model.generate(batch["input_ids"], batch["attention_mask"],
                             max_length=model.config.max_length or options.max_target_length,
                             num_beams=options.num_beams, num_return_sequences=1)
        for i, row in zip(group, ids):
            summaries[i] = tokenizer.decode(row)
    return summaries


def validate(model, tokenizer, records, options):
    """ROUGE-L, as a score, and a text with the other measures."""
    pairs = encode_pairs(records, tokenizer, options)
    loss = mean_loss(model, pairs, options)
    summaries = summarize(model, tokenizer, pairs, options)
    one, two, longest = mean_rouge(summaries, [record["summary"] for record in records])
    return longest, (f"validation loss {loss:.3f}  ROUGE-1 {one:.3f}  ROUGE-2 {two:.3f}  "
                     f"ROUGE-L {longest:.3f}\n    for example {summaries[0]!r}")


def report(model, tokenizer, options):
    """Print loss and ROUGE of a model and of a baseline, for each "source" that the pairs name."""
    records = [record for record in read_lines(options.evaluate)
               if len(tokenizer.encode(record["document"])) > options.longer_than]
    if not records:
        raise ValueError(f"{options.evaluate}: no document is longer than {options.longer_than} "
                         "tokens; lower --longer-than")
    pairs = encode_pairs(records, tokenizer, options)
    loss = mean_loss(model, pairs, options)
    print(f"cross-entropy per token of the {len(records)} summaries: {loss:.3f}", flush=True)
    for record, summary in zip(records, summarize(model, tokenizer, pairs, options)):
        record["source"] = str(record.get("source", "all"))
        record["model"] = summary
        record["first sentence"] = first_sentence(record["document"])
    for source in sorted({record["source"] for record in records}):
        group = [record for record in records if record["source"] == source]
        references = [record["summary"] for record in group]
        print(f"{source}: {len(group)} documents   ROUGE-1  ROUGE-2  ROUGE-L")
        for name in ("model", "first sentence"):
            one, two, longest = mean_rouge([record[name] for record in group], references)
            print(f"  {name:24}{one:9.3f}{two:9.3f}{longest:9.3f}")
    for record in random.Random(options.seed).sample(records, min(options.examples, len(records))):
        print(f"\n{record.get('name', '')}\n  document   {record['document'][:300]!r}\n"
              f"  reference  {record['summary']}\n  model      {record['model']}")


# ------------------------------------------------------------------------------------------------
# Training


def say(text):
    """Print a line of progress, once for all processes."""
    if RANK == 0:
        notice(text)


def distribute(loss):
    """Let the gradients of a loss be averaged over all processes."""
    if PROCESSES == 1:
        return loss
    dist.init_process_group(timeout=timedelta(days=1))  # as long as an evaluation may take
    layerdrop = max(loss.model.config.encoder_layerdrop, loss.model.config.decoder_layerdrop)
    return DistributedDataParallel(loss, gradient_as_bucket_view=True,
                                   find_unused_parameters=layerdrop > 0)


def update(module, optimizer, step, batches, options):
    """Update the weights once; returns the mean loss per target token, over all processes."""
    tokens = sum((batch["labels"] != -100).sum() for batch in batches)
    if PROCESSES > 1:
        dist.all_reduce(tokens)
    mean = 0
    for batch in batches:
        more = PROCESSES > 1 and batch is not batches[-1]
        with module.no_sync() if more else nullcontext():
            with torch.autocast(tokens.device.type, torch.bfloat16,
                                options.precision == "bfloat16"):
                loss = module(batch) / tokens
            (loss * PROCESSES).backward()  # DistributedDataParallel divides by their number
        mean += loss.detach()
    if PROCESSES > 1:
        dist.all_reduce(mean)

    warmup = max(1, round(options.warmup * options.steps))
    group = optimizer.param_groups[0]
    group["lr"] = options.learning_rate * min(step / warmup, 1 - (step - 1) / options.steps)
    norm = nn.utils.clip_grad_norm_(group["params"], 1.0)
    if not norm.isfinite():
        raise ValueError(f"step {step}: the gradients are not finite; use a lower --learning-rate, "
                         "with --start-over")
    optimizer.step()
    optimizer.zero_grad()
    return mean


def evaluate_and_save(model, tokenizer, evaluate, progress, options):
    """Evaluate a model, and save it if it is the best of its run so far."""
    step = progress["step"]
    score = step  # the last model is the best, unless they are compared
    if evaluate:
        model.eval()
        score, text = evaluate(model)
        model.train()
        say(f"step {step}: {text}")
    if score >= progress["best_score"]:
        save_model(model, tokenizer, options.output)
        progress.update(best_step=step, best_score=score)


def train(options, checkpoint, loss, tokenizer, pairs, evaluate=None):
    """Train loss.model, and save the best model in options.output.

    options: those of training_parser.
    checkpoint: the path that output_folder yields.
    loss: a module such as CrossEntropy; loss(batch) is a sum over the target tokens.
    pairs: ids of sources and targets, as encode_pairs returns.
    evaluate: evaluate(model) returns a score, the higher, the better, and a text to print.
        Without it, the last model is the best.
    Raises ValueError if the checkpoint is from another run, or if the model diverges.
    """
    model = loss.model
    description = describe_run(options, model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True,
                                  weight_decay=options.weight_decay)
    progress = {"step": 0, "best_step": 0, "best_score": -math.inf}
    if checkpoint.exists() and not options.start_over:
        progress = load_checkpoint(checkpoint, description, model, optimizer)
        say(f"resuming after step {progress['step']} of {options.steps}")
    elif RANK == 0:  # now, so that a full disk is noticed before training
        save_checkpoint(checkpoint, description, progress, model, optimizer)
    module = distribute(loss)
    done = progress["step"]
    began = saved = time.monotonic()
    losses = []  # since the last line
    model.train()
    for step, batches in training_batches(pairs, done, model, options):
        losses.append(update(module, optimizer, step, batches, options))
        progress["step"] = step
        if step % 20 == 0 or step in (1, options.steps):
            seconds = (time.monotonic() - began) / (step - done)
            say(f"step {step}/{options.steps}  loss {sum(losses) / len(losses):.3f}  "
                f"{seconds:.2f} s per step")
            losses.clear()
        if RANK > 0:
            continue  # the first process evaluates and saves
        evaluated = step % options.evaluate_every == 0 or step == options.steps
        if evaluated:
            evaluate_and_save(model, tokenizer, evaluate, progress, options)
        if evaluated or time.monotonic() - saved > CHECKPOINT_SECONDS:
            save_checkpoint(checkpoint, description, progress, model, optimizer)
            saved = time.monotonic()
    say(f"The best model, that of step {progress['best_step']}, is in {options.output}. "
        "checkpoint.pt there serves only to resume this run; you may delete it.")
    if PROCESSES > 1:
        dist.barrier()  # the others wait for the last evaluation
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------
# Interrupted runs: what is saved of a run, and what keeps two runs apart


@contextmanager
def output_folder(options):
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
            if fcntl and RANK == 0:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
        except BlockingIOError:
            raise ValueError(f"another run is using {folder}: choose another --output") from None
        except OSError:  # some network drives have no locks
            pass
        if (folder / "config.json").exists() and not checkpoint.exists() and not options.start_over:
            raise ValueError(f"{folder} has a model, but no checkpoint.pt to resume from: {REMEDY}")
        yield checkpoint


def describe_run(options, model):
    """All that decides the result of a run: options, number of processes, digests of the inputs."""
    run = vars(options) | {"processes": PROCESSES}
    for name in ("output", "start_over", "revision", "gradient_checkpointing"):
        del run[name]  # these do not decide it
    for name in ("train", "validation"):
        if run[name]:
            run[name] = hashlib.sha256(Path(run[name]).read_bytes()).hexdigest()[:12]
    digest = hashlib.sha256(repr(model.config).encode())
    for weight in model.parameters():
        digest.update(weight.detach().cpu().flatten().view(torch.uint8).numpy())
    run["model"] = digest.hexdigest()[:12]
    return run


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
    add("--start-over", action="store_true", help="replace the model and the run in that folder "
        "(leave it out to resume)")
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
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= gpus:
        raise ValueError(f"there are more processes than GPUs: use --nproc-per-node {gpus}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def load(options):
    """The model that --model and --set name, on this process's device, and its tokenizer.

    Fills in the options that depend on the model and the processor, and checks the lengths.
    """
    model, tokenizer = load_model(options.model, architecture="ForConditionalGeneration",
                                  revision=options.revision, device=choose_device(),
                                  **parse_settings(options.set))
    for stack in (model.model.encoder, model.model.decoder):
        stack.gradient_checkpointing = options.gradient_checkpointing
    if options.precision is None:
        if torch.cuda.is_available():
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            supported = torch.cpu._is_avx512_bf16_supported()
        options.precision = "bfloat16" if supported else "float32"
    positions = model.config.max_position_embeddings
    options.max_source_length = options.max_source_length or positions
    for name in ("max_source_length", "max_target_length"):
        length = getattr(options, name, 0)
        if length > positions:
            raise ValueError(f"--{name.replace('_', '-')} {length}: the model has {positions} "
                             f"positions; --set max_position_embeddings={length} adds more")
    return model, tokenizer


def main():
    keep_freed_memory()
    options = parse_arguments()
    if options.evaluate:
        if RANK == 0:
            report(*load(options), options)
        return
    with output_folder(options) as checkpoint:
        model, tokenizer = load(options)
        if options.only_global_embeddings:
            if not model.config.lsg:
                raise ValueError("--only-global-embeddings: the model has none, due to lsg=false")
            model.requires_grad_(False)
            model.model.encoder.global_embeddings.requires_grad_(True)
        pairs, evaluate = training_pairs(options, model, tokenizer)
        loss = CrossEntropy(model, options.label_smoothing)
        train(options, checkpoint, loss, tokenizer, pairs, evaluate)


if __name__ == "__main__":
    run(main)
