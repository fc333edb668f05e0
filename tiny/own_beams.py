"""Teach a fine-tuned model to choose among its own summaries ("minimum risk training").

    python -m tiny.own_beams --model fine-tuned --train train.jsonl --validation validation.jsonl \\
        --output my-model

Run it from the project's folder. The loss is the cross-entropy of the summaries, plus the points of
ROUGE (of 100) that the model's own beams are expected to lack, times --weight: S. Shen et al.,
"Minimum Risk Training for Neural Machine Translation" (2016), arXiv:1512.02433.
"""

import torch
import torch.nn.functional as F
from torch import nn

from barthez import shift_right
from cpu import keep_freed_memory
from load_weights import run
from train import load, number, output_folder, rouge, train, training_pairs, training_parser


def parse_arguments():
    parser = training_parser(
        "Teach a fine-tuned model to choose among its own summaries.",
        "python -m tiny.own_beams --model NAME --train FILE --output FOLDER [options]")
    add = parser.add_argument
    add("--train", metavar="FILE", required=True, help="pairs to train on")
    add("--max-target-length", type=number(int, 3), default=128, metavar="N", help="in tokens")
    add("--num-beams", type=number(int, 2, 1000), default=4, help="also in evaluations")
    add("--weight", type=number(float, 0), default=4.0, help="loss for each point of ROUGE")
    return parser.parse_args()


class ExpectedRisk(nn.Module):
    """Cross-entropy and expected lack of ROUGE.

    A beam's probability is the softmax, over the beams of its document, of twice its
    log-probability per token.
    """

    def __init__(self, model, tokenizer, options):
        super().__init__()
        self.model, self.tokenizer, self.options = model, tokenizer, options

    def forward(self, batch):
        """The loss of a batch, summed over the documents."""
        model, tokenizer, options = self.model, self.tokenizer, self.options
        beams, pad = options.num_beams, tokenizer.pad_token_id
        labels = batch["labels"]
        written = model.generate(batch["input_ids"], batch["attention_mask"], num_beams=beams,
                                 num_return_sequences=beams, max_length=options.max_target_length)
        written = written[:, 1:]  # without the start token, (B * beams, L)
        # Otherwise older versions of PyTorch reuse weights that `generate` cast without gradients.
        torch.clear_autocast_cache()

        references = [tokenizer.decode(ids) for ids in labels.masked_fill(labels == -100, pad)]
        lack = [100 - 100 * sum(rouge(tokenizer.decode(ids), references[i // beams])) / 3
                for i, ids in enumerate(written)]
        lack = torch.tensor(lack, device=labels.device).view(-1, beams)

        states, visible = model.model.encoder(batch["input_ids"], batch["attention_mask"])
        cross_kv = model.model.decoder.cross_kv(states)
        own_labels = written.masked_fill(written == pad, -100)
        own_losses = token_losses(model, cross_kv, visible, own_labels)
        own_loss = own_losses.sum(1) / (written != pad).sum(1)  # per token, as beam search compares
        probability = (-2 * own_loss.view(-1, beams)).softmax(1)
        risk = (probability * lack).sum()
        return options.weight * risk + token_losses(model, cross_kv, visible, labels).sum()


def token_losses(model, cross_kv, visible, labels):
    """Cross-entropies of labels (B * copies, T), 0 where they are -100.

    cross_kv, visible: of B documents; each has as many rows of labels as there are copies.
    """
    copies = len(labels) // len(visible)
    cross_kv = [(key.repeat_interleave(copies, 0), value.repeat_interleave(copies, 0))
                for key, value in cross_kv]
    decoder_input_ids = shift_right(labels, model.config.pad_token_id)
    states = model.model.decoder(decoder_input_ids, cross_kv=cross_kv,
                                 cross_visible=visible.repeat_interleave(copies, 0))
    return F.cross_entropy(model.logits(states).mT, labels, reduction="none")


def main():
    keep_freed_memory()
    options = parse_arguments()
    with output_folder(options) as checkpoint:
        model, tokenizer = load(options)
        pairs, evaluate = training_pairs(options, model, tokenizer)
        loss = ExpectedRisk(model, tokenizer, options)
        train(options, checkpoint, loss, tokenizer, pairs, evaluate)


if __name__ == "__main__":
    run(main)
