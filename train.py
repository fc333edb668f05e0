"""Train BARThez: fine-tune a checkpoint on pairs of document and summary, or pretrain a new one.

    python train.py --model moussaKam/barthez --train pairs.jsonl --validation held-out.jsonl \\
        --output my-model
    python train.py --evaluate held-out.jsonl --model my-model

Pairs are JSON lines {"document": …, "summary": …}. Pretraining reads {"document": …} and learns to
restore it: its sentences are shuffled, and spans of it, of Poisson length 3, are each replaced by
one <mask> (M. Lewis et al., "BART" (2019), arXiv:1910.13461, as BARThez was). Or else it learns to
write its main sentences, of which only a <mask> is left (J. Zhang et al., "PEGASUS" (2019),
arXiv:1912.08777).

A fine-tuned model can be taught to choose among what it would write: --expected-rouge adds to the
loss the ROUGE that its own beams lack, each weighed by its likelihood (S. Shen et al., "Minimum
Risk Training for Neural Machine Translation" (2016), arXiv:1512.02433).

Killed and started again with the same arguments, a run goes on from its last checkpoint to the
result it would have had. On several GPUs or machines: torchrun --nproc-per-node 8 train.py …
"""

import argparse
import contextlib
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from barthez import BarthezConfig, BarthezForConditionalGeneration, init_weights, shift_right
from load_weights import load_model, read_json, save_model
from tokenizer import BarthezTokenizer


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="what to start from or evaluate: folder or Hub id")
    parser.add_argument("--new", metavar="CONFIG", help="start afresh, with this config.json")
    parser.add_argument("--tokenizer", metavar="FILE", help="with --new: a SentencePiece model")
    parser.add_argument("--set", nargs="+", metavar="KEY=VALUE", default=[],
                        help="override config keys, such as block_size=64 dropout=0.2")
    parser.add_argument("--train", metavar="FILE", help="pairs to fine-tune on")
    parser.add_argument("--pretrain", metavar="FILE", help="documents to pretrain on")
    parser.add_argument("--gap-sentences", action="store_true",
                        help="with --pretrain: write the main sentences, rather than restore all")
    parser.add_argument("--masked", type=float, default=0.3, metavar="SHARE",
                        help="with --pretrain: how much of a document is masked")
    parser.add_argument("--validation", metavar="FILE", help="pairs (with --pretrain: documents)")
    parser.add_argument("--evaluate", metavar="FILE", help="only print ROUGE on these pairs")
    parser.add_argument("--output", metavar="FOLDER", help="where the best model is saved")
    parser.add_argument("--steps", type=int, default=3000, help="updates of the weights")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="per forward pass, padded")
    parser.add_argument("--accumulate", type=int, default=1, help="forward passes per update")
    parser.add_argument("--max-source-length", type=int, metavar="N",
                        help="in tokens (default: the model's positions)")
    parser.add_argument("--max-target-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--warmup", type=int, default=200, help="steps up to the full rate")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--expected-rouge", type=float, default=0.0, metavar="WEIGHT",
                        help="with --train: loss for each point of ROUGE that the beams lack")
    parser.add_argument("--only-global-embeddings", action="store_true",
                        help="train nothing but the global tokens: cheap adaptation to LSG")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, slower")
    parser.add_argument("--precision", choices=["bfloat16", "float32"],
                        help="of the matrix products (default: bfloat16 where it is fast)")
    parser.add_argument("--evaluate-every", type=int, default=500, metavar="STEPS")
    parser.add_argument("--evaluate-on", type=int, default=200, metavar="N", help="records of it")
    parser.add_argument("--num-beams", type=int, default=4, help="when it writes")
    parser.add_argument("--longer-than", type=int, default=0, metavar="N",
                        help="with --evaluate: only documents of more than N tokens")
    parser.add_argument("--examples", type=int, default=0, metavar="N",
                        help="with --evaluate: print N random summaries too")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------
# The data


class Pairs:
    """Documents with their summaries, as ids."""

    def __init__(self, records, tokenizer, max_source_length, max_target_length):
        self.sources = [tokenizer.encode(record["document"], max_length=max_source_length)
                        for record in records]
        self.summaries = [record["summary"] for record in records]
        self.targets = [tokenizer.encode(summary, max_length=max_target_length)
                        for summary in self.summaries]
        self.lengths = [len(s) + len(t) for s, t in zip(self.sources, self.targets)]

    def pair(self, i, _):
        return self.sources[i], self.targets[i]


class Infilling:
    """Pieces of documents, to be restored from what noise leaves of them."""

    SPAN = 3.0  # mean length of what one <mask> replaces

    def __init__(self, records, tokenizer, max_source_length, masked):
        self.masked = masked
        self.bos, self.eos, self.mask = (tokenizer.bos_token_id, tokenizer.eos_token_id,
                                         tokenizer.mask_token_id)
        self.pieces = []  # each a list of sentences, each of ids
        room = max_source_length - 2
        for record in records:
            piece, length = [], 0
            for sentence in re.split(r"(?<=[.!?…;:])\s+|\n+", record["document"]):
                ids = tokenizer.text_to_ids(sentence)[:room]
                if length + len(ids) > room:
                    self.pieces.append(piece)
                    piece, length = [], 0
                piece.append(ids)
                length += len(ids)
            self.pieces.append(piece)
        self.pieces = [piece for piece in self.pieces if sum(map(len, piece)) >= 32]
        self.lengths = [2 * sum(map(len, piece)) for piece in self.pieces]

    def pair(self, i, rng):
        sentences = self.pieces[i]
        target = [id for sentence in sentences for id in sentence]
        noisy = [id for sentence in rng.sample(sentences, len(sentences)) for id in sentence]
        budget, spans = self.masked * len(noisy), []
        while budget > 0:
            spans.append(min(poisson(rng, self.SPAN), len(noisy)))
            budget -= max(spans[-1], 1)
        for span in spans:  # a span of 0 puts a <mask> where nothing is missing
            start = rng.randrange(len(noisy) - span + 1)
            noisy[start:start + span] = [self.mask]
        return [self.bos, *noisy, self.eos], [self.bos, *target, self.eos]


class GapSentences(Infilling):
    """Pieces of documents, whose main sentences are to be written: those whose words the rest of
    the piece says too."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.pieces = [piece for piece in self.pieces if len(piece) > 1]
        self.lengths = [int((1 + self.masked) * sum(map(len, piece))) for piece in self.pieces]

    def pair(self, i, _):
        sentences = self.pieces[i]
        words = Counter(id for sentence in sentences for id in sentence)
        shared = [(Counter(sentence) & (words - Counter(sentence))).total()
                  for sentence in sentences]
        count = max(1, round(self.masked * len(sentences)))
        gaps = sorted(range(len(sentences)), key=shared.__getitem__)[-count:]
        source = [id for k, sentence in enumerate(sentences)
                  for id in ([self.mask] if k in gaps else sentence)]
        target = [id for k in sorted(gaps) for id in sentences[k]]
        return [self.bos, *source, self.eos], [self.bos, *target, self.eos]


def poisson(rng, mean):
    """Knuth's method: how many uniform factors until their product falls below exp(-mean)?"""
    count, product = 0, rng.random()
    while product > math.exp(-mean):
        count, product = count + 1, product * rng.random()
    return count


def read_lines(path, *keys):
    records = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                records.append(record)
                if not all(isinstance(record[key], str) for key in keys):
                    raise ValueError(f"{' and '.join(keys)} must be texts")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{path}, line {number}: {error!r}; expected {{"{keys[0]}": …}}')
    if not records:
        raise ValueError(f"{path} is empty")
    return records


def batches(lengths, batch_tokens, rng):
    """Groups of indices of like length, of at most batch_tokens padded tokens, in random order."""
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
    """What the model takes: pairs of ids -> input_ids, attention_mask, labels."""
    def pad(rows, value):
        length = max(map(len, rows))
        return torch.tensor([row + [value] * (length - len(row)) for row in rows], device=device)

    sources, targets = zip(*pairs)
    input_ids = pad(sources, pad_token_id)
    return {"input_ids": input_ids, "attention_mask": input_ids != pad_token_id,
            "labels": pad(targets, -100)}


# ------------------------------------------------------------------------------------------------
# Evaluation


def rouge(candidate, reference):
    """(ROUGE-1, ROUGE-2, ROUGE-L) as F1 of two texts: C.-Y. Lin, "ROUGE" (2004).

    Words are runs of letters and digits in lower case; nothing is stemmed.
    >>> rouge("le chat dort", "le chat mange")
    (0.666…, 0.5, 0.666…)
    """
    a, b = (re.findall(r"\w+", text.lower()) for text in (candidate, reference))

    def f1(common, n):
        return 2 * common / (len(a) + len(b) - 2 * (n - 1)) if common else 0.0

    def ngrams(words, n):
        return Counter(zip(*(words[i:] for i in range(n))))

    longest = [0] * (len(b) + 1)  # of the common subsequences, row by row
    for word in a:
        before = longest[:]
        for j, other in enumerate(b):
            longest[j + 1] = before[j] + 1 if word == other else max(before[j + 1], longest[j])
    one, two = (f1((ngrams(a, n) & ngrams(b, n)).total(), n) for n in (1, 2))
    return one, two, f1(longest[-1], 1)


def mean_rouge(candidates, references):
    scores = [rouge(*texts) for texts in zip(candidates, references)]
    return [sum(column) / len(scores) for column in zip(*scores)]


def first_sentence(text):
    """The baseline: what a document begins with."""
    return re.split(r"(?<=[.!?])\s|\n", text.strip())[0]


def summarize(model, tokenizer, data, batch_tokens=16384, **settings):
    """The model's summaries of `data`, in its order."""
    device, summaries = next(model.parameters()).device, {}
    for group in batches([len(s) for s in data.sources], batch_tokens, random.Random(0)):
        batch = tensors([data.pair(i, None) for i in group], tokenizer.pad_token_id, device)
        ids = model.generate(batch["input_ids"], batch["attention_mask"], **settings)
        summaries |= {i: tokenizer.decode(row) for i, row in zip(group, ids)}
    return [summaries[i] for i in range(len(data.sources))]


@torch.no_grad()
def mean_loss(model, data, batch_tokens, tokenizer, autocast):
    """Cross-entropy per target token, without label smoothing."""
    device, rng, total, count = next(model.parameters()).device, random.Random(0), 0.0, 0
    for group in batches(data.lengths, batch_tokens, rng):
        batch = tensors([data.pair(i, rng) for i in group], tokenizer.pad_token_id, device)
        with autocast():
            loss = model(**batch).loss.item()
        tokens = (batch["labels"] != -100).sum().item()
        total, count = total + loss * tokens, count + tokens
    return total / count


def report(arguments, model, tokenizer):
    """Print the model's loss, and ROUGE of it and of two baselines, for each "source" that the
    pairs name."""
    records = [record for record in read_lines(arguments.evaluate, "document", "summary")
               if not arguments.longer_than
               or len(tokenizer.encode(record["document"])) > arguments.longer_than]
    data = Pairs(records, tokenizer, arguments.max_source_length, arguments.max_target_length)
    texts = {"model": summarize(model, tokenizer, data, num_beams=arguments.num_beams)}
    texts["first sentence"] = [first_sentence(record["document"]) for record in records]
    if arguments.train:
        common = Counter(record["summary"] for record in read_lines(arguments.train, "summary"))
        texts["most frequent"] = [common.most_common(1)[0][0]] * len(records)
    loss = mean_loss(model, data, 16384, tokenizer, contextlib.nullcontext)
    print(f"cross-entropy per token of the {len(records)} references: {loss:.3f}")
    sources = [record.get("source", "all") for record in records]
    for source in sorted(set(sources)):
        print(f"{source}: {sources.count(source)} documents   ROUGE-1  ROUGE-2  ROUGE-L")
        for name, candidates in texts.items():
            chosen = [i for i, s in enumerate(sources) if s == source]
            scores = mean_rouge([candidates[i] for i in chosen],
                                [data.summaries[i] for i in chosen])
            print(f"  {name:24}" + "".join(f"{score:9.3f}" for score in scores))
    for i in random.Random(arguments.seed).sample(range(len(records)), arguments.examples):
        record = records[i]
        print(f"\n{record.get('name', i)}\n  document   {record['document'][:300]!r}\n"
              f"  reference  {record['summary']}\n  model      {texts['model'][i]}")


# ------------------------------------------------------------------------------------------------
# Training


def start_model(arguments):
    """The model to train, and its tokenizer."""
    overrides = {}
    for setting in arguments.set:
        key, _, value = setting.partition("=")
        try:
            overrides[key] = json.loads(value)
        except ValueError:
            overrides[key] = value
    if not arguments.new:
        return load_model(arguments.model, architecture="ForConditionalGeneration", **overrides)
    tokenizer = BarthezTokenizer(arguments.tokenizer)
    config = BarthezConfig.from_dict(
        read_json(Path(arguments.new)) | {"vocab_size": len(tokenizer)} | overrides)
    tokenizer.model_max_length = config.max_position_embeddings
    torch.manual_seed(arguments.seed)
    model = BarthezForConditionalGeneration(config)
    init_weights(model, config.init_std)
    init_to_copy(model, config.init_std)
    return model, tokenizer


@torch.no_grad()
def init_to_copy(model, std):
    """Fresh weights from which a few million tokens teach a model to copy what it reads.

    A decoder that attends to a token at once finds it likely, since value and output projection
    undo each other: A. Trockman and J. Z. Kolter, "Mimetic Initialization of Self-Attention
    Layers" (2023), arXiv:2305.09828. Positions are waves, so that all of them mean something from
    the first step on, and half as loud as the tokens.
    """
    size = model.config.d_model
    model.model.shared.weight *= 2
    for stack in (model.model.encoder, model.model.decoder):
        place = torch.arange(len(stack.embed_positions.weight))[:, None]
        angle = place / 10_000 ** (torch.arange(0, size, 2) / size)
        stack.embed_positions.weight[:] = 2 ** 0.5 * std * torch.cat([angle.sin(), angle.cos()], 1)
    for layer in model.model.decoder.layers:
        rotation = 3 ** 0.5 * nn.init.orthogonal_(torch.empty(size, size))
        layer.encoder_attn.v_proj.weight[:] = rotation
        layer.encoder_attn.out_proj.weight[:] = rotation.T


def loss_with_rouge(arguments, model, tokenizer, batch, autocast):
    """The cross-entropy of the labels, and arguments.expected_rouge for each point of ROUGE that
    the model's own texts are expected to lack, summed over the documents."""
    beams, pad, labels = arguments.num_beams, tokenizer.pad_token_id, batch["labels"]
    model.eval()
    with autocast():
        written = model.generate(batch["input_ids"], batch["attention_mask"], num_beams=beams,
                                 num_return_sequences=beams,
                                 max_length=arguments.max_target_length)[:, 1:]
    model.train()
    references = [tokenizer.decode(ids) for ids in labels.masked_fill(labels == -100, pad)]
    lacking = [100 - 100 * sum(rouge(tokenizer.decode(ids), references[i // beams])) / 3
               for i, ids in enumerate(written)]

    with autocast():
        states, mask = model.model.encoder(batch["input_ids"], batch["attention_mask"])
        document = model.model.decoder.read(states)

        def losses(labels, copies):
            """Cross-entropy, (B * copies, T), 0 behind a text's end."""
            read = [[x.repeat_interleave(copies, 0) for x in layer] for layer in document]
            hidden = model.model.decoder(shift_right(labels, pad), read,
                                         mask.repeat_interleave(copies, 0))
            return F.cross_entropy(model.logits(hidden).mT, labels, reduction="none")

        surprise = losses(written.masked_fill(written == pad, -100), beams).sum(1)
        surprise = surprise / (written != pad).sum(1)  # per token, as beam search compares
        likelihood = (-2 * surprise.view(-1, beams)).softmax(1)
        expected = (likelihood * likelihood.new_tensor(lacking).view_as(likelihood)).sum()
        return arguments.expected_rouge * expected + losses(labels, 1).sum()


def train(arguments, model, tokenizer, rank, world):
    if arguments.pretrain:
        kind = GapSentences if arguments.gap_sentences else Infilling
        keys, last = ["document"], arguments.masked
    else:
        kind, keys, last = Pairs, ["document", "summary"], arguments.max_target_length
    sizes = tokenizer, arguments.max_source_length, last
    data = kind(read_lines(arguments.pretrain or arguments.train, *keys), *sizes)
    held_out = None
    if arguments.validation:
        records = read_lines(arguments.validation, *keys)
        few = random.Random(0).sample(records, min(arguments.evaluate_on, len(records)))
        held_out = kind(few, *sizes)
    device = next(model.parameters()).device
    model.model.encoder.gradient_checkpointing = arguments.gradient_checkpointing
    model.model.decoder.gradient_checkpointing = arguments.gradient_checkpointing
    if arguments.only_global_embeddings:
        model.requires_grad_(False)
        model.model.encoder.global_embeddings.requires_grad_(True)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, arguments.learning_rate, betas=(0.9, 0.98),
                                  weight_decay=arguments.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / arguments.warmup, 1 - step / arguments.steps))

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, arguments.precision == "bfloat16")

    # Everything that the run's future depends on; dropout and noise follow from seed and step.
    state = {"step": 0, "epoch": 0, "position": 0, "best": -math.inf}
    output = Path(arguments.output)
    saved = output / "checkpoint.pt"
    if saved.exists():
        checkpoint = torch.load(saved, map_location=device, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        schedule.load_state_dict(checkpoint["schedule"])
        state = checkpoint["state"]
        say(rank, f"going on from step {state['step']} of {arguments.steps}")

    def groups():  # without end; an epoch's last few that do not make a whole update are left out
        while True:
            epoch = batches(data.lengths, arguments.batch_tokens,
                            random.Random(f"{arguments.seed} {state['epoch']}"))
            size = arguments.accumulate * world
            if len(epoch) < size:
                raise ValueError(f"{len(epoch)} batches are too few for {size} an update: "
                                 "lower --batch-tokens or --accumulate")
            while state["position"] + size <= len(epoch):
                state["position"] += size
                yield epoch[state["position"] - size + rank:state["position"]:world]
            state["epoch"], state["position"] = state["epoch"] + 1, 0

    model.train()
    began, tokens_seen, running = time.time(), 0, None
    for update in groups():
        if state["step"] == arguments.steps:
            break
        step = state["step"]
        torch.manual_seed(hash((arguments.seed, step, rank)))
        rng = random.Random(f"{arguments.seed} {step} {rank}")
        micro_batches = [tensors([data.pair(i, rng) for i in group], tokenizer.pad_token_id, device)
                         for group in update]
        count = torch.stack([(b["labels"] != -100).sum() for b in micro_batches]).sum()
        if world > 1:
            dist.all_reduce(count)
        total = torch.zeros((), device=device)
        for batch in micro_batches:
            labels = batch["labels"]
            if arguments.expected_rouge:
                loss = loss_with_rouge(arguments, model, tokenizer, batch, autocast) / count
            else:
                with autocast():
                    logits = model(**batch).logits
                    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum",
                                           label_smoothing=arguments.label_smoothing) / count
            loss.backward()
            total += loss.detach()
            tokens_seen += batch["input_ids"].numel() + labels.numel()
        if world > 1:  # one exchange for everything: one for each takes many times as long
            sums = [total, *(p.grad for p in weights)]
            vector = nn.utils.parameters_to_vector(sums)
            dist.all_reduce(vector)
            nn.utils.vector_to_parameters(vector, sums)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        state["step"] += 1

        running = total if running is None else running.lerp(total, 0.02)
        if state["step"] % 20 == 0:
            rate = world * tokens_seen / (time.time() - began)
            say(rank, f"step {state['step']}/{arguments.steps}  epoch {state['epoch']}  "
                f"loss {running:.3f}  {rate:,.0f} tokens/s", progress=state["step"] % 20)
        if state["step"] % arguments.evaluate_every == 0 or state["step"] == arguments.steps:
            if rank == 0:
                score = evaluate(arguments, model, tokenizer, held_out, autocast, state["step"])
                if score >= state["best"]:
                    state["best"] = score
                    save_model(model, tokenizer, output)
                checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                              "schedule": schedule.state_dict(), "state": state}
                torch.save(checkpoint, f"{saved}.incomplete")
                os.replace(f"{saved}.incomplete", saved)
            if world > 1:
                dist.barrier()


def evaluate(arguments, model, tokenizer, held_out, autocast, step):
    """A score for the model as it is, the higher the better; without held-out pairs, the step."""
    if not held_out:
        return step
    model.eval()
    loss = mean_loss(model, held_out, arguments.batch_tokens, tokenizer, autocast)
    line, score = f"step {step}: validation loss {loss:.3f}", -loss
    if not arguments.pretrain:
        with autocast():
            candidates = summarize(model, tokenizer, held_out, num_beams=arguments.num_beams)
        scores = mean_rouge(candidates, held_out.summaries)
        line += "  ROUGE-1 {:.3f}  ROUGE-2 {:.3f}  ROUGE-L {:.3f}".format(*scores)
        line += f"\n    {candidates[0]!r}\n    {candidates[1]!r}"
        score = scores[2]
    say(0, line)
    model.train()
    return score


def say(rank, line, progress=False):
    """A line for the first process; one that is only progress is overwritten by the next."""
    if rank == 0 and (not progress or sys.stderr.isatty()):
        print(f"\r{line:<72}", end="" if progress else "\n", file=sys.stderr, flush=True)


def main():
    arguments = parse_arguments()
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0),
                                                                            ("WORLD_SIZE", 1)))
    cuda = torch.cuda.is_available()
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
    if bool(arguments.model) == bool(arguments.new):
        raise ValueError("give either --model, or --new with --tokenizer")
    if not (arguments.evaluate or arguments.output and (arguments.train or arguments.pretrain)):
        raise ValueError("give --evaluate, or --output with --train or --pretrain")
    model, tokenizer = start_model(arguments)
    model.to(device)
    arguments.max_source_length = arguments.max_source_length or tokenizer.model_max_length
    if arguments.precision is None:
        fast = torch.cuda.is_bf16_supported() if cuda else torch.backends.mkldnn.is_available()
        arguments.precision = "bfloat16" if fast else "float32"
    if arguments.evaluate:
        report(arguments, model, tokenizer)
    else:
        train(arguments, model, tokenizer, rank, world)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
