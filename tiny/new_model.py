"""Make a BARThez with fresh weights, for tiny/pretrain.py.

    python -m tiny.new_model tiny/config.json data/sentencepiece.bpe.model new

Run it from the project's folder.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from barthez import BarthezConfig, BarthezForConditionalGeneration, init_weights, save_model
from load_weights import read_json, run
from tokenizer import BarthezTokenizer


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


def main():
    parser = argparse.ArgumentParser(description="Make a BARThez with fresh weights.")
    parser.add_argument("config", help="a config.json")
    parser.add_argument("tokenizer", help="a SentencePiece model; it sets the vocab_size")
    parser.add_argument("output", help="the folder to write")
    arguments = parser.parse_args()
    tokenizer = BarthezTokenizer(arguments.tokenizer)
    settings = read_json(Path(arguments.config)) | {"vocab_size": len(tokenizer)}
    config = BarthezConfig.from_dict(settings)
    tokenizer.model_max_length = config.max_position_embeddings
    torch.manual_seed(1)
    model = BarthezForConditionalGeneration(config)
    init_weights(model, config.init_std)
    init_to_copy(model, config.init_std)
    save_model(model, tokenizer, arguments.output)


if __name__ == "__main__":
    run(main)
