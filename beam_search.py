"""Beam search: its settings, the key/value cache that the beams share, and the texts that it keeps.

Follows transformers 4.36.2, generation/utils.py and generation/beam_search.py, token for token.

Letters used for shapes:
    B batch    H heads    D head dimension    V vocabulary
    beams      num_beams                      L tokens written so far, the start token included
"""

import math
from dataclasses import dataclass, fields
from typing import get_args

import torch
from torch import nn


@dataclass(frozen=True)
class GenerationConfig:
    """The settings of `generate`, which config.json and generation_config.json may contain."""
    num_beams: int = 1  # 1 is greedy search
    num_return_sequences: int = 1  # texts for each document, at most num_beams
    max_length: int | None = None  # tokens, with the start token; None: 20
    min_length: int = 0
    length_penalty: float = 1.0  # a text scores its log-probability / length**length_penalty
    no_repeat_ngram_size: int = 0  # 0 allows repetition
    early_stopping: bool | str = False  # True: at num_beams texts; "never": when none can win
    forced_eos_token_id: int | None = 2  # the last token of a text that reaches max_length

    def __post_init__(self):
        check_types(self)
        longest = math.inf if self.max_length is None else self.max_length
        for name, holds, allowed in (
                ("num_beams", self.num_beams >= 1, "at least 1"),
                ("num_return_sequences", 1 <= self.num_return_sequences <= self.num_beams,
                 "1 to num_beams"),
                ("max_length", longest >= 2, "at least 2"),
                ("min_length", 0 <= self.min_length <= longest, "0 to max_length"),
                ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "at least 0"),
                ("length_penalty", math.isfinite(self.length_penalty), "a finite number"),
                ("early_stopping", self.early_stopping in (True, False, "never"),
                 "true, false or never")):
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {allowed}")


def check_types(config):
    """Raise ValueError if a field of a dataclass is not of its type. A float may also be an int."""
    for field in fields(config):
        value = getattr(config, field.name)
        kinds = get_args(field.type) or (field.type,)  # int | None has the arguments int and None
        if float in kinds:
            kinds += (int,)
        if type(value) not in kinds:  # a bool is no int here
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{field.name}={value!r}: expected {names}")


def beam_search(next_logits, reorder, start, settings, eos_token_id, pad_token_id):
    """The most likely continuations of `start`. One beam is greedy search.

    next_logits: function of the newest tokens (B, beams) that returns logits (B, beams, V).
    reorder: function that tells the cache which beam each beam continues, (B, beams).
    start: the first token of each text, (B,).
    settings: a GenerationConfig whose max_length is set.
    Returns ids (B * num_return_sequences, L) with L <= max_length: the best text of each document
    first, padded with pad_token_id. Raises ValueError if logits are not finite.
    """
    B, beams = len(start), settings.num_beams
    tokens = start[:, None, None].expand(B, beams, 1)  # (B, beams, L)
    # All beams begin with the same token. Only the first may continue, otherwise all beams stay
    # identical.
    scores = torch.full((B, beams), -1e9, device=start.device)
    scores[:, 0] = 0
    hypotheses = [Hypotheses(settings) for _ in range(B)]

    while tokens.shape[2] < settings.max_length and not all(h.done for h in hypotheses):
        # Score every token that could come next.
        logits = next_logits(tokens[:, :, -1])  # (B, beams, V)
        check_finite(logits)
        log_probs = logits.float().log_softmax(-1)
        forbid(log_probs, tokens, settings, eos_token_id)
        totals = scores[..., None] + log_probs  # (B, beams, V)

        # Choose candidates: twice the beams, so that enough remain if every beam may end.
        candidate_scores, index = totals.flatten(1).topk(2 * beams)  # (B, 2 * beams)
        candidate_beam = index // totals.shape[2]
        candidate_token = index % totals.shape[2]

        # Keep the texts that end among the `beams` best candidates.
        ends = candidate_token == eos_token_id  # (B, 2 * beams)
        for b, rank in ends[:, :beams].nonzero().tolist():
            text = torch.cat([tokens[b, candidate_beam[b, rank]], candidate_token[b, rank, None]])
            hypotheses[b].add(text, candidate_scores[b, rank].item())
        for hypothesis, best_score in zip(hypotheses, candidate_scores[:, 0].tolist()):
            hypothesis.done |= hypothesis.is_done(best_score, tokens.shape[2])

        # Continue with the best candidates that do not end: sorting moves the others behind them.
        ranks = ends.int().argsort(dim=1, stable=True)[:, :beams]
        scores = candidate_scores.gather(1, ranks)
        beam = candidate_beam.gather(1, ranks)
        token = candidate_token.gather(1, ranks)
        reorder(beam)
        tokens = tokens.gather(1, beam[..., None].expand_as(tokens))
        tokens = torch.cat([tokens, token[..., None]], dim=2)

    texts = []
    for b in range(B):
        for ids, score in zip(tokens[b], scores[b].tolist()):
            hypotheses[b].add(ids, score)
        best = hypotheses[b].kept[::-1][:settings.num_return_sequences]
        texts += [ids for _, ids in best]
    return nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=pad_token_id)


def check_finite(logits):
    """Raise ValueError if logits are NaN or infinite: the text would be meaningless."""
    if not logits.isfinite().all():
        cause = "its weights are damaged"
        if logits.dtype == torch.float16:
            cause = "float16 overflows: use bfloat16 or float32"
        raise ValueError(f"the model computes numbers that are not finite ({cause})")


def forbid(log_probs, tokens, settings, eos_token_id):
    """Set log_probs (B, beams, V) to -inf where a token may not follow tokens (B, beams, L)."""
    n, L = settings.no_repeat_ngram_size, tokens.shape[2]
    if 0 < n <= L:
        ngrams = tokens.unfold(2, n, 1)  # (B, beams, L - n + 1, n)
        last = tokens[:, :, None, L - n + 1:]  # the n - 1 newest tokens
        repeats = (ngrams[..., :-1] == last).all(-1)  # (B, beams, L - n + 1)
        batch, beam, position = repeats.nonzero(as_tuple=True)
        log_probs[batch, beam, ngrams[batch, beam, position, -1]] = -math.inf
    if L < settings.min_length:
        log_probs[..., eos_token_id] = -math.inf
    if L == settings.max_length - 1 and settings.forced_eos_token_id is not None:
        log_probs[:] = -math.inf
        log_probs[..., settings.forced_eos_token_id] = 0


class Hypotheses:
    """The finished texts of one document. Keeps the num_beams best."""

    def __init__(self, settings):
        self.settings = settings
        self.kept = []  # (score, ids), the worst first; among equals, the oldest first
        self.done = False  # then no more texts are added

    def add(self, ids, log_prob):
        """Keep the text ids (L,) if it is among the best. The start token does not count."""
        score = log_prob / (len(ids) - 1) ** self.settings.length_penalty
        is_full = len(self.kept) == self.settings.num_beams
        if self.done or (is_full and score <= self.kept[0][0]):
            return
        self.kept.append((score, ids))
        self.kept.sort(key=lambda kept: kept[0])
        del self.kept[:-self.settings.num_beams]

    def is_done(self, best_log_prob, length):
        """Whether to stop: the open beams are unlikely to beat the worst text that is kept."""
        settings = self.settings
        if len(self.kept) < settings.num_beams:
            return False
        if settings.num_beams == 1 or settings.early_stopping is True:
            return True
        if settings.early_stopping == "never" and settings.length_penalty > 0:
            length = settings.max_length - 1  # a longer text could still score higher
        return self.kept[0][0] >= best_log_prob / length ** settings.length_penalty


class Cache:
    """The keys and values of the tokens written so far.

    The beams of a document form one sequence for the decoder: each step appends one token per beam.
    Keys are written once and never moved, and those of the document are read once for all its
    beams. `ancestors` masks each beam's own history: ancestors[b, i, t * beams + j] says whether
    token j of step t is in the history of beam i. For example, two beams write two tokens each:

        step 0   step 1                  after reorder([1, 1]), both beams continue the former 1:
        1 0      1 0     beam 0          0 1      0 1     beam 0
        0 1      0 1     beam 1          0 1      0 1     beam 1
    """

    def __init__(self, like, num_layers, num_beams, max_length):
        """like: keys (B, H, S, D) with the sizes, dtype and device of the cache."""
        self.layers = [LayerCache(like, max_length * num_beams) for _ in range(num_layers)]
        self.position = -1  # of the newest token
        itself = torch.eye(num_beams, dtype=torch.bool, device=like.device)
        self.itself = itself.expand(len(like), -1, -1)  # (B, beams, beams)
        self.ancestors = self.itself[..., :0]  # (B, beams, L * beams)

    def next_step(self):
        """Make room for a token per beam. Returns the mask: (B, 1, beams, L * beams)."""
        self.position += 1
        self.ancestors = torch.cat([self.ancestors, self.itself], dim=-1)
        return self.ancestors[:, None]

    def reorder(self, beam):
        """Beam i continues the former beam[i]. beam: (B, beams)."""
        self.ancestors = self.ancestors.gather(1, beam[..., None].expand_as(self.ancestors))


class LayerCache:
    """The keys and values of one layer, each (B, H, max_length * beams, D)."""

    def __init__(self, like, capacity):
        B, H, _, D = like.shape
        self.key = like.new_empty(B, H, capacity, D)
        self.value = like.new_empty(B, H, capacity, D)
        self.length = 0

    def append(self, key, value):
        """Store key and value (B, H, beams, D). Returns all that are stored."""
        start, self.length = self.length, self.length + key.shape[2]
        self.key[:, :, start:self.length] = key
        self.value[:, :, start:self.length] = value
        return self.key[:, :, :self.length], self.value[:, :, :self.length]
