"""Pretrain a BARThez, new or not, by text infilling: it learns to restore damaged documents.

    python -m tiny.pretrain --model tiny/config.json --tokenizer data/sentencepiece.bpe.model \\
        --train data/pretrain.jsonl --output pretrained

Run it from the project's folder. With --tokenizer, --model is a config.json; without, it is a model
to train further. Documents are JSON lines: {"document": "…"}. The sentences of a piece of text are
shuffled, and spans of it are each replaced by one <mask>, as BARThez was pretrained: M. Lewis et
al., "BART" (2019), arXiv:1910.13461. With --validation, the saved model is the one with the lowest
loss on these documents.
"""

import math
import re
from functools import partial
from pathlib import Path

import torch
from torch import nn

from barthez import BarthezConfig, BarthezForConditionalGeneration, init_weights
from cpu import accelerate, keep_freed_memory
from load_weights import parse_settings, read_json, run
from tokenizer import BarthezTokenizer
from train import (RANK, choose_device, cross_entropy, load, mean_loss, number, output_folder,
                   prepare, read_lines, sample, train, training_parser)

MEAN_SPAN = 3.0  # tokens that one <mask> replaces, on average
SHORTEST_PIECE = 32  # tokens


def parse_arguments():
    parser = training_parser(
        "Pretrain a BARThez by text infilling.",
        "python -m tiny.pretrain --model NAME --train FILE --output FOLDER [options]")
    parser.add_argument("--tokenizer", metavar="FILE", help="a SentencePiece model; it makes a new "
                        "model, of which --model is the config.json")
    parser.add_argument("--train", metavar="FILE", required=True, help="documents to train on")
    parser.add_argument("--masked", type=number(float, 0, 1), default=0.3, metavar="SHARE",
                        help="the share of a piece that is masked")
    return parser.parse_args()


class Infilling:
    """Pieces of documents, as long as max_source_length allows, and damaged versions of them."""

    def __init__(self, records, tokenizer, max_source_length, masked):
        self.tokenizer, self.masked = tokenizer, masked
        room = max_source_length - 2  # without <s> and </s>
        pieces = []
        for record in records:
            pieces += split(record["document"], tokenizer, room)
        self.pieces = [piece for piece in pieces if sum(map(len, piece)) >= SHORTEST_PIECE]
        self.lengths = [2 * sum(map(len, piece)) for piece in self.pieces]
        if not self.pieces:
            raise ValueError(f"no document has a piece of {SHORTEST_PIECE} to {room} tokens: use "
                             "longer documents, or raise --max-source-length")

    def pair(self, i, rng):
        """The ids of a damaged version of piece i, drawn by `rng`, and of the piece."""
        sentences = self.pieces[i]
        shuffled = rng.sample(sentences, len(sentences))
        damaged = mask_spans([id for sentence in shuffled for id in sentence], self.masked,
                             self.tokenizer.mask_token_id, rng)
        target = [id for sentence in sentences for id in sentence]
        bos, eos = [self.tokenizer.bos_token_id], [self.tokenizer.eos_token_id]
        return bos + damaged + eos, bos + target + eos


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


# ------------------------------------------------------------------------------------------------
# A new model


def new_model(options):
    """A model with fresh weights, and its tokenizer."""
    tokenizer = BarthezTokenizer(options.tokenizer)
    settings = read_json(Path(options.model)) | parse_settings(options.set)
    config = BarthezConfig.from_dict(settings | {"vocab_size": len(tokenizer)})
    tokenizer.model_max_length = config.max_position_embeddings
    torch.manual_seed(options.seed)
    model = BarthezForConditionalGeneration(config)
    init_weights(model, config.init_std)
    init_to_copy(model, config.init_std)
    accelerate(model.to(choose_device()))
    prepare(model, options)
    return model, tokenizer


@torch.no_grad()
def init_to_copy(model, std):
    """Change fresh weights such that a few million tokens teach the model to copy.

    Value and output projections of the cross-attention are inverse to each other, so that the
    decoder finds a token likely as soon as it attends to it: A. Trockman and J. Z. Kolter, "Mimetic
    Initialization of Self-Attention Layers" (2023), arXiv:2305.09828. Positions are sinusoids of
    half the size of the token embeddings, so that all positions are distinct from the first step.
    """
    size = model.config.d_model
    model.model.shared.weight *= 2
    for stack in (model.model.encoder, model.model.decoder):
        positions = torch.arange(len(stack.embed_positions.weight))[:, None]
        angles = positions / 10_000 ** (torch.arange(0, size, 2) / size)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        stack.embed_positions.weight[:] = 2 ** 0.5 * std * waves
    for layer in model.model.decoder.layers:
        rotation = 3 ** 0.5 * nn.init.orthogonal_(torch.empty(size, size))
        layer.encoder_attn.v_proj.weight[:] = rotation
        layer.encoder_attn.out_proj.weight[:] = rotation.T


def validate(model, data, options):
    loss = mean_loss(model, data, options.batch_tokens)
    return -loss, f"validation loss {loss:.3f}"


def main():
    keep_freed_memory()
    options = parse_arguments()
    with output_folder(options, RANK) as checkpoint:
        model, tokenizer = new_model(options) if options.tokenizer else load(options)
        arguments = tokenizer, options.max_source_length, options.masked
        data = Infilling(read_lines(options.train, "document"), *arguments)
        evaluate = None
        if options.validation:
            documents = sample(options.validation, options.evaluate_on, "document")
            evaluate = partial(validate, data=Infilling(documents, *arguments), options=options)
        loss = partial(cross_entropy, label_smoothing=0.0)
        train(options, checkpoint, model, tokenizer, data, loss, evaluate)


if __name__ == "__main__":
    run(main)
