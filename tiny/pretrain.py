"""Pretrain a BARThez by text infilling: it learns to restore damaged documents.

    python -m tiny.pretrain --model new --train data/pretrain.jsonl --output pretrained

Run it from the project's folder. --model may be one that tiny/new_model.py made. Documents are JSON
lines: {"document": "…"}. The sentences of a piece of text are shuffled, and spans of it are each
replaced by one <mask>, as BARThez was pretrained: M. Lewis et al., "BART" (2019), arXiv:1910.13461.
Each piece is damaged once, so that all epochs see the same damage. With --validation, the saved
model is the one with the lowest loss on these documents.
"""

import math
import random
import re
from functools import partial

from cpu import keep_freed_memory
from load_weights import run
from train import (CrossEntropy, load, mean_loss, number, output_folder, read_lines, sample, train,
                   training_parser)

MEAN_SPAN = 3.0  # tokens that one <mask> replaces, on average
SHORTEST_PIECE = 32  # tokens


def parse_arguments():
    parser = training_parser(
        "Pretrain a BARThez by text infilling.",
        "python -m tiny.pretrain --model NAME --train FILE --output FOLDER [options]")
    parser.add_argument("--train", metavar="FILE", required=True, help="documents to train on")
    parser.add_argument("--masked", type=number(float, 0, 1), default=0.3, metavar="SHARE",
                        help="the share of a piece that is masked")
    return parser.parse_args()


def infilling(records, tokenizer, max_source_length, masked):
    """Pieces of documents, as ids, each as (damaged, whole)."""
    rng = random.Random(0)
    room = max_source_length - 2  # without <s> and </s>
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    pairs = []
    for record in records:
        for sentences in split(record["document"], tokenizer, room):
            whole = join(sentences)
            if len(whole) >= SHORTEST_PIECE:
                shuffled = join(rng.sample(sentences, len(sentences)))
                damaged = mask_spans(shuffled, masked, tokenizer.mask_token_id, rng)
                pairs.append((bos + damaged + eos, bos + whole + eos))
    if not pairs:
        raise ValueError(f"no document has a piece of {SHORTEST_PIECE} to {room} tokens: use "
                         "longer documents, or raise --max-source-length")
    return pairs


def join(sentences):
    return [id for sentence in sentences for id in sentence]


def split(document, tokenizer, room):
    """Pieces of at most `room` tokens, each a list of sentences, each a list of ids."""
    pieces, piece, length = [], [], 0
    for sentence in re.split(r"(?<=[.!?…;:])\s+|\n+", document):
        ids = tokenizer.text_to_ids(sentence)[:room]
        if length + len(ids) > room:
            pieces.append(piece)
            piece, length = [], 0
        piece.append(ids)
        length += len(ids)
    return pieces + [piece]


def mask_spans(ids, share, mask_token_id, rng):
    """Replace random spans by one mask each, until `share` of the ids is gone.

    A span of length 0 inserts a mask; it counts as one id.
    """
    ids = list(ids)
    left = share * len(ids)
    while left > 0:
        span = min(poisson(MEAN_SPAN, rng), len(ids))
        start = rng.randrange(len(ids) - span + 1)
        ids[start:start + span] = [mask_token_id]
        left -= max(span, 1)
    return ids


def poisson(mean, rng):
    """A Poisson number: how many uniform factors keep a product above exp(-mean)? (Knuth)"""
    count, product = 0, rng.random()
    while product > math.exp(-mean):
        count += 1
        product *= rng.random()
    return count


def validate(model, pairs, options):
    loss = mean_loss(model, pairs, options)
    return -loss, f"validation loss {loss:.3f}"


def main():
    keep_freed_memory()
    options = parse_arguments()
    with output_folder(options) as checkpoint:
        model, tokenizer = load(options)
        arguments = tokenizer, options.max_source_length, options.masked
        pairs = infilling(read_lines(options.train, ["document"]), *arguments)
        evaluate = None
        if options.validation:
            documents = sample(read_lines(options.validation, ["document"]), options.evaluate_on)
            evaluate = partial(validate, pairs=infilling(documents, *arguments), options=options)
        loss = CrossEntropy(model, label_smoothing=0.0)
        train(options, checkpoint, loss, tokenizer, pairs, evaluate)


if __name__ == "__main__":
    run(main)
