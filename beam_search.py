"""Beam search, the key/value cache that its beams share, and the hypotheses that it keeps.

Follows transformers 4.36.2, generation/utils.py and generation/beam_search.py, token for token.

Letters used for shapes:
    B batch    H heads    D head dimension    V vocabulary
    beams      num_beams                      L tokens written so far, the start token included
"""

import math

import torch
from torch import nn


def beam_search(next_logits, reorder, start, config, progress=None):
    """The most likely continuations of `start`. One beam is greedy search.

    next_logits: function of the newest tokens (B, beams) that returns logits (B, beams, V).
    reorder: function that tells the cache which beam each beam continues, (B, beams).
    start: the first token of each text, (B,).
    config: the settings of generation; see BarthezConfig. max_length must be set.
    progress: called before each step as progress(tokens written, max_length).
    Returns ids (B * num_return_sequences, L) with L <= max_length: the best text of each document
    first, padded with pad_token_id.
    """
    B, beams, max_length = len(start), config.num_beams, config.max_length
    tokens = start[:, None, None].expand(B, beams, 1)  # (B, beams, L)
    # All beams begin with the same token. Only the first may continue, otherwise all stay the same.
    scores = torch.full((B, beams), -1e9, device=start.device)
    scores[:, 0] = 0
    hypotheses = [Hypotheses(config) for _ in range(B)]

    while tokens.shape[2] < max_length and not all(h.done for h in hypotheses):
        if progress:
            progress(tokens.shape[2], max_length)

        # Score every token that could come next.
        log_probs = next_logits(tokens[:, :, -1]).float().log_softmax(-1)  # (B, beams, V)
        log_probs = forbid(log_probs, tokens, config)
        totals = scores[..., None] + log_probs  # (B, beams, V)

        # Choose candidates: twice the beams, so that enough remain if every beam may end.
        candidate_scores, index = totals.flatten(1).topk(2 * beams)  # (B, 2 * beams)
        candidate_beam = index // totals.shape[2]
        candidate_token = index % totals.shape[2]

        # Finish the hypotheses that end, and continue with the best others.
        beam_lists, token_lists = candidate_beam.tolist(), candidate_token.tolist()
        score_lists = candidate_scores.tolist()
        continuing = [hypotheses[b].update(tokens[b], score_lists[b], beam_lists[b], token_lists[b])
                      for b in range(B)]
        continuing = torch.tensor(continuing, device=start.device)  # (B, beams)
        scores = candidate_scores.gather(1, continuing)
        beam = candidate_beam.gather(1, continuing)
        token = candidate_token.gather(1, continuing)
        reorder(beam)
        tokens = tokens.gather(1, beam[..., None].expand_as(tokens))
        tokens = torch.cat([tokens, token[..., None]], dim=2)

    texts = []
    for b, hypothesis in enumerate(hypotheses):
        texts += hypothesis.best(tokens[b], scores[b].tolist())
    return nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=config.pad_token_id)


def forbid(log_probs, tokens, config):
    """log_probs (B, beams, V), with -inf where a token may not follow tokens (B, beams, L)."""
    n, L = config.no_repeat_ngram_size, tokens.shape[2]
    if 0 < n <= L:
        ngrams = tokens.unfold(2, n, 1)  # (B, beams, L - n + 1, n)
        last = tokens[:, :, None, L - n + 1:]  # the n - 1 newest tokens
        repeats = (ngrams[..., :-1] == last).all(-1)  # (B, beams, L - n + 1)
        batch, beam, position = repeats.nonzero(as_tuple=True)
        log_probs[batch, beam, ngrams[batch, beam, position, -1]] = -math.inf
    if L < config.min_length:
        log_probs[..., config.eos_token_id] = -math.inf
    if L == config.max_length - 1 and config.forced_eos_token_id is not None:
        log_probs = torch.full_like(log_probs, -math.inf)
        log_probs[..., config.forced_eos_token_id] = 0
    return log_probs


class Hypotheses:
    """The finished texts of one document. Keeps the num_beams best."""

    def __init__(self, config):
        self.config = config
        self.kept = []  # (score, ids) in the order of arrival
        self.done = False

    def update(self, tokens, scores, beams, next_tokens):
        """Finish the candidates that end. Returns the indices of the num_beams that continue.

        tokens: (beams, L). scores, beams, next_tokens: lists of the 2 * num_beams candidates, best
        first: the log-probability of the text, the beam that it continues, and its new token.
        """
        num_beams, L = self.config.num_beams, tokens.shape[1]
        continuing = []
        for rank, (score, beam, token) in enumerate(zip(scores, beams, next_tokens)):
            if token != self.config.eos_token_id:
                continuing.append(rank)
            elif rank < num_beams and not self.done:
                ids = torch.cat([tokens[beam], tokens.new_tensor([token])])
                self.add(ids, score, length=L)
        self.done = self.done or self.is_done(scores[0], L)
        return continuing[:num_beams]

    def add(self, ids, log_prob, length):
        """Keep the text if it is among the best. length: its tokens without the start token."""
        score = log_prob / length ** self.config.length_penalty
        if len(self.kept) == self.config.num_beams:
            worst = min(range(len(self.kept)), key=lambda i: self.kept[i][0])
            if score <= self.kept[worst][0]:
                return
            del self.kept[worst]
        self.kept.append((score, ids))

    def is_done(self, best_log_prob, length):
        """Whether to stop: the open beams are unlikely to beat the worst text that is kept."""
        config = self.config
        if len(self.kept) < config.num_beams:
            return False
        if config.num_beams == 1 or config.early_stopping is True:
            return True
        if config.early_stopping == "never" and config.length_penalty > 0:
            length = config.max_length - 1  # a longer text could still score higher
        worst = min(score for score, _ in self.kept)
        return worst >= best_log_prob / length ** config.length_penalty

    def best(self, tokens, scores):
        """The ids of the num_return_sequences best texts, the best first.

        Unless the search is done, the open beams join: tokens (beams, L) and their scores.
        """
        if not self.done:
            for ids, score in zip(tokens, scores):
                self.add(ids, score, length=len(ids) - 1)
        best = sorted(self.kept, key=lambda kept: kept[0])[::-1]  # among equals, the latest first
        return [ids for _, ids in best[:self.config.num_return_sequences]]


class Cache:
    """The keys and values of the tokens written so far.

    The beams of a document form one sequence for the decoder: each step appends one token per beam.
    Keys are written once and never moved. Only `ancestors` changes when beams split or die:
    ancestors[b, i, t * beams + j] says whether token j of step t is in the history of beam i.
    """

    def __init__(self, config, batch_size, like):
        """like: a tensor of the data type and device that the cache shall have."""
        beams, heads = config.num_beams, config.decoder_attention_heads
        shape = batch_size, heads, config.max_length * beams, config.d_model // heads
        self.layers = [LayerCache(like.new_empty(shape), like.new_empty(shape))
                       for _ in range(config.decoder_layers)]
        self.position = -1  # of the newest token
        itself = torch.eye(beams, dtype=torch.bool, device=like.device)
        self.itself = itself.expand(batch_size, -1, -1)  # (B, beams, beams)
        self.ancestors = self.itself[..., :0]  # (B, beams, L * beams)

    def next_step(self):
        """Make room for a token per beam. Returns who sees whom: (B, 1, beams, L * beams)."""
        self.position += 1
        self.ancestors = torch.cat([self.ancestors, self.itself], dim=-1)
        return self.ancestors[:, None]

    def reorder(self, beam):
        """Beam i continues the former beam[i]. beam: (B, beams)."""
        self.ancestors = self.ancestors.gather(1, beam[..., None].expand_as(self.ancestors))


class LayerCache:
    """The keys and values of one layer, each (B, H, max_length * beams, D)."""

    def __init__(self, key, value):
        self.key, self.value = key, value
        self.length = 0

    def append(self, key, value):
        """Store key and value (B, H, beams, D). Returns all that are stored."""
        start, self.length = self.length, self.length + key.shape[2]
        self.key[:, :, start:self.length] = key
        self.value[:, :, start:self.length] = value
        return self.key[:, :, :self.length], self.value[:, :, :self.length]
