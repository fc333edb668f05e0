"""lsg.py against attention written out token by token, and what must hold of any LSG attention.

`oracle` is the definition, slow and plain: a dense attention in which each query may look only at
certain tokens and at certain mixtures of tokens. The rest follows from the outside: short texts get
full attention, nothing out of reach matters, padding is as good as absent, gradients are right.
"""

import ast
import doctest
import math
import os
import shutil
import subprocess
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lsg
from conftest import assert_close
from lsg import SPARSITY_TYPES, LSGSelfAttention, lsg_attention

every_selection = pytest.mark.parametrize("kind", SPARSITY_TYPES)
SMALL = {"block_size": 4, "sparse_block_size": 4, "sparsity_factor": 2}


# ------------------------------------------------------------------------------------------------
# The definition, token by token


def oracle(query, key, value, mask=None, *, block_size, sparse_block_size, sparsity_factor=2,
           sparsity_type="norm", num_global_tokens=1, lsh_num_pre_rounds=1):
    """LSG attention as a dense one. It looks at T tokens, then at mixtures, `step` for each block.

    A short text is no case of its own: its two blocks are neighbours, so everything is local.
    """
    (B, H, T, D), G = query.shape, num_global_tokens
    block = [(t - G) // block_size for t in range(T)]
    step = block_size // sparsity_factor
    rounds = lsh_rounds(H, D, min(block_size, sparse_block_size), sparsity_factor, sparsity_type,
                        lsh_num_pre_rounds)
    out = []
    for b, h in product(range(B), range(H)):
        tokens = set(range(T) if mask is None else mask[b].nonzero().flatten().tolist())
        groups = thin_out(key[b, h], tokens, G, h, block_size, sparse_block_size, sparsity_factor,
                          sparsity_type, rounds)
        share = [shares(query[b, h, G:], key[b, h], g, sparsity_type, rounds) for g in groups]
        mix = torch.stack([*torch.eye(T, dtype=key.dtype), *share])  # (T + groups, T)
        seen = [[j in tokens and (t < G or j < G or abs(block[t] - block[j]) <= 1)
                 for j in range(T)]
                + [t >= G and group != []
                   and ((block[t] - 1) * step - sparse_block_size <= s < (block[t] - 1) * step
                        or (block[t] + 2) * step <= s < (block[t] + 2) * step + sparse_block_size)
                   for s, group in enumerate(groups)]
                for t in range(T)]
        scores = query[b, h] @ (mix @ key[b, h]).T / math.sqrt(D)  # (T, T + groups)
        weights = scores.masked_fill(~torch.tensor(seen), -math.inf).softmax(-1)
        out.append(weights @ (mix @ value[b, h]))
    return torch.stack(out).unflatten(0, (B, H))


def thin_out(key, tokens, G, head, block_size, sparse_block_size, factor, kind, rounds):
    """The tokens that each sparse key of one head is made of: none where there is only padding."""
    if kind in (None, "none") or sparse_block_size == 0:
        return []
    padded = math.ceil((len(key) - G) / block_size) * block_size
    step, chunk = block_size // factor, min(block_size, sparse_block_size)

    def runs(size):
        return [[G + first + i for i in range(size)] for first in range(0, padded, size)]

    def longest(run, count):  # in the original's order, which tells where a window cuts the run
        found = sorted((t for t in run if t in tokens), key=lambda t: key[t].norm().item())[-count:]
        return [[]] * (count - len(found)) + [[t] for t in found]

    if factor == 1:
        groups = runs(1)
    elif kind == "norm":
        groups = [group for run in runs(chunk) for group in longest(run, chunk // factor)]
    elif kind == "stride":
        groups = [[run[head % factor]] for run in runs(factor)]
    elif kind == "block_stride":
        groups = [[run[(head * step + i) % block_size]] for run in runs(block_size)
                  for i in range(step)]
    elif rounds:
        groups = [group for run in runs(chunk)
                  for group in hashed(key, [t for t in run if t in tokens], head, rounds)]
    else:  # pooling and bos_pooling
        groups = runs(factor)
    return [[t for t in group if t in tokens] for group in groups]


def shares(text_query, key, group, kind, rounds):
    """How much each token of a group counts in its mixture, as a row of T numbers."""
    share = key.new_ones(len(group)) / max(len(group), 1)
    if kind == "bos_pooling" or kind == "lsh" and not rounds:
        share = (key[group] @ text_query[0] / math.sqrt(key.shape[1])).softmax(0)
    return share @ torch.eye(len(key), dtype=key.dtype)[group]


def lsh_rounds(H, D, chunk, factor, kind, pre_rounds):
    """The random directions of each round, and its number of buckets."""
    if kind != "lsh" or factor == 1 or chunk // factor <= 1:  # one bucket alone needs no hash
        return []
    return [(torch.randn(1, H, 1, D, buckets // 2), buckets)
            for buckets in [chunk] * pre_rounds + [chunk // factor]]


def hashed(key, tokens, head, rounds):
    """Groups of tokens: those whose sums of keys are nearest to the same direction, or opposite."""
    groups = [[t] for t in tokens]
    for directions, count in rounds:
        buckets = [[] for _ in range(count)]
        for group in groups:
            if group:
                nearness = key[group].sum(0) @ directions[0, head, 0].to(key.dtype)
                buckets[torch.cat([nearness, -nearness]).argmax()] += group
        groups = buckets
    return groups


# ------------------------------------------------------------------------------------------------
# Random texts and options


def tensors(B, H, T, D, *, value_dim=None, dtype=torch.float32):
    """Query, key and value; keys of unequal length, so that `norm` has something to choose from."""
    query, key = torch.randn(2, B, H, T, D, dtype=dtype)
    length = torch.stack([torch.randperm(T) for _ in range(B * H)]).view(B, H, T, 1)
    key = F.normalize(key, dim=-1) * (1 + length.to(dtype) / 8)
    return query, key, torch.randn(B, H, T, value_dim or D, dtype=dtype)


def lengths_to_mask(lengths, T):
    return (torch.arange(T) < torch.tensor(lengths)[:, None]).long()


def seed(number):
    """As torch.manual_seed, which takes a millisecond to remember the call for GPUs to come."""
    torch.default_generator.manual_seed(number)


def drawn_alike(attend, *args, **options):
    """Calls that are compared must draw the same directions for lsh."""
    seed(7)
    return attend(*args, **options)


def fitting_sizes(kind):
    """(block_size, sparse_block_size, sparsity_factor): sparse blocks smaller, equal, larger."""
    smaller, equal, larger = [], [], []
    for block_size, factor in product((1, 2, 3, 4, 6, 8, 9), range(1, 10)):
        for sparse_block_size in range(2 * block_size + 2):
            chunk = min(block_size, max(1, sparse_block_size))
            whole = block_size % chunk == 0 and chunk % factor == 0
            if block_size % factor == 0 and (whole or factor == 1 or kind not in ("norm", "lsh")):
                group = (equal if sparse_block_size == block_size
                         else smaller if sparse_block_size < block_size else larger)
                group.append((block_size, sparse_block_size, factor))
    return smaller, equal, larger


@st.composite
def options(draw, kind):
    """Any options that fit together, with any factor where none is needed."""
    # The three groups alike, though one may be far larger than another.
    group = draw(st.sampled_from(fitting_sizes(kind)))
    block_size, sparse_block_size, factor = draw(st.sampled_from(group))
    if kind in (None, "none") or sparse_block_size == 0:
        factor = draw(st.integers(1, 5))
    return {"block_size": block_size, "sparse_block_size": sparse_block_size,
            "sparsity_factor": factor, "sparsity_type": kind,
            "num_global_tokens": draw(st.integers(1, 4)),
            "lsh_num_pre_rounds": draw(st.integers(0, 2))}


@st.composite
def calls(draw, kind, blocks):
    """(query, key, value, mask, lengths), options. Beyond its length, a row is large garbage.

    blocks: the least and the most that the text may have; the last of them need not be full.
    """
    chosen = draw(options(kind))
    B, H, D, value_dim = draw(st.tuples(*[st.integers(1, n) for n in (3, 5, 6, 4)]))
    text = draw(st.integers(*blocks)) * chosen["block_size"]
    text -= draw(st.integers(0, chosen["block_size"] - 1))
    G, T = chosen["num_global_tokens"], chosen["num_global_tokens"] + text
    seed(draw(st.integers(0, 999)))
    # In float64 no two directions of lsh are so nearly as near that rounding decides.
    query, key, value = tensors(B, H, T, D, value_dim=value_dim,
                                dtype=torch.float64 if kind == "lsh" else torch.float32)
    lengths = [T] + draw(st.lists(st.integers(G + 1, T), min_size=B - 1, max_size=B - 1))
    mask = lengths_to_mask(lengths, T)
    if draw(st.booleans()):  # holes, in the globals too; the first global is always seen
        mask[:, 1:] *= torch.rand(B, T - 1) < 0.7
    beyond = ~lengths_to_mask(lengths, T).bool()[:, None, :, None]
    query, key, value = (x + 50 * beyond * torch.randn_like(x) for x in (query, key, value))
    mask = mask.to(draw(st.sampled_from([torch.bool, torch.int64, torch.float32])))
    return (query, key, value, mask, lengths), chosen


# ------------------------------------------------------------------------------------------------
# Values


def test_the_shape_is_that_of_the_query():
    query, key, value = tensors(2, 3, 5 + 29, 7)
    out = lsg_attention(query, key, value, num_global_tokens=5, **SMALL)
    assert out.shape == (2, 3, 34, 7) and out.dtype == torch.float32


@every_selection
@settings(max_examples=40)
@given(data=st.data())
def test_equals_the_oracle_at_any_length_for_any_options(kind, data):
    (query, key, value, mask, _), chosen = data.draw(calls(kind, blocks=(3, 7)))
    actual = drawn_alike(lsg_attention, query, key, value, mask, **chosen)
    expected = drawn_alike(oracle, query, key, value, mask, **chosen)
    rows = mask.bool()[:, None, :, None]  # what a padded query sees is nobody's concern
    assert_close(actual * rows, expected * rows)


@every_selection
@settings(max_examples=20)
@given(data=st.data())
def test_is_full_attention_up_to_two_blocks(kind, data):
    (query, key, value, mask, _), chosen = data.draw(calls(kind, blocks=(1, 2)))
    expected = F.scaled_dot_product_attention(query, key, value, mask.bool()[:, None, None])
    assert_close(lsg_attention(query, key, value, mask, **chosen), expected)


@every_selection
def test_one_token_more_than_two_blocks_is_no_longer_full_attention(kind):
    for text, is_full in (8, True), (9, False):
        query, key, value = tensors(2, 3, 1 + text, 5)
        out = lsg_attention(query, key, value, sparsity_type=kind, **SMALL)
        full = F.scaled_dot_product_attention(query, key, value)
        assert ((out - full).abs().max() < 1e-5) == is_full


@pytest.mark.parametrize("kind", SPARSITY_TYPES[:6])
def test_is_full_attention_where_all_keys_are_kept_and_seen(kind):
    query, key, value = tensors(2, 3, 2 + 37, 5)
    mask = lengths_to_mask((39, 26), 39)
    out = lsg_attention(query, key, value, mask, sparsity_type=kind, num_global_tokens=2,
                        block_size=4, sparse_block_size=40, sparsity_factor=1)
    assert_close(out, F.scaled_dot_product_attention(query, key, value, mask.bool()[:, None, None]))


@pytest.mark.parametrize("off", [{"sparsity_type": None}, {"sparsity_type": "none"},
                                 {"sparse_block_size": 0}, {"sparsity_factor": 0}])
def test_all_ways_to_leave_out_the_sparse_keys_agree(off):
    query, key, value = tensors(2, 3, 1 + 31, 5)
    expected = oracle(query, key, value, block_size=5, sparse_block_size=0)
    assert_close(lsg_attention(query, key, value, **{"block_size": 5, "sparse_block_size": 5,
                                                     "sparsity_factor": 5} | off), expected)


def test_local_attention_alone_takes_any_block_size():
    query, key, value = tensors(2, 3, 1 + 31, 5)
    expected = oracle(query, key, value, block_size=5, sparse_block_size=0)
    for off in {"sparsity_type": None}, {"sparse_block_size": 0}:
        assert_close(lsg_attention(query, key, value, block_size=5, **off), expected)


@pytest.mark.parametrize("G", [0, 1, 3, 512])
def test_any_number_of_globals(G):
    query, key, value = tensors(1, 2, G + 21, 5)
    actual, expected = (attend(query, key, value, num_global_tokens=G, **SMALL)
                        for attend in (lsg_attention, oracle))
    assert_close(actual, expected)


def test_lsh_depends_on_its_draw_and_on_its_pre_rounds():
    query, key, value = tensors(1, 2, 1 + 64, 5)
    lsh = {"sparsity_type": "lsh", "block_size": 8, "sparse_block_size": 8, "sparsity_factor": 2}
    first, second = (lsg_attention(query, key, value, **lsh) for _ in range(2))
    assert (first - second).abs().max() > 1e-3
    by_rounds = [drawn_alike(lsg_attention, query, key, value, lsh_num_pre_rounds=n, **lsh)
                 for n in (0, 1, 2)]
    for one, other in (0, 1), (1, 2), (0, 2):
        assert (by_rounds[one] - by_rounds[other]).abs().max() > 1e-3


@every_selection
def test_without_adaptive_a_whole_number_of_blocks_gives_the_same(kind):
    query, key, value = tensors(2, 3, 1 + 24, 5)
    padded, exact = (drawn_alike(lsg_attention, query, key, value, sparsity_type=kind,
                                 adaptive=adaptive, **SMALL) for adaptive in (True, False))
    assert torch.equal(padded, exact)


# ------------------------------------------------------------------------------------------------
# Locality. With the identity for values, attention returns its weights: who sees whom.


def seen_by(query, key, mask=None, **options):
    """(B, H, T, T), true where the query of that row gives weight to the token of that column."""
    B, H, T, _ = query.shape
    value = torch.eye(T).expand(B, H, T, T)
    return drawn_alike(lsg_attention, query, key, value, mask, **options) > 0


# One global and five blocks of four, a line for each block of queries. xxxx: what the selection
# keeps of a block; two of its keys are left, so that sparse_block_size=2 sees one block on either
# side, and 4 sees two.
PICTURES = {2: """
g gggg gggg gggg gggg gggg
g llll llll xxxx .... ....
g llll llll llll xxxx ....
g xxxx llll llll llll xxxx
g .... xxxx llll llll llll
g .... .... xxxx llll llll""", 4: """
g gggg gggg gggg gggg gggg
g llll llll xxxx xxxx ....
g llll llll llll xxxx xxxx
g xxxx llll llll llll xxxx
g xxxx xxxx llll llll llll
g .... xxxx xxxx llll llll"""}
KEPT_OF_A_BLOCK = {  # by head, if the keys of each block are 3, 4, 1 and 2 long
    ("norm", 2): [".s.s", ".s.s", ".s.s"],  # the longest of two
    ("norm", 4): ["ss..", "ss..", "ss.."],  # the two longest of four
    "stride": ["s.s.", ".s.s", "s.s."],
    "block_stride": ["ss..", "..ss", "ss.."],
    "pooling": ["ssss", "ssss", "ssss"],
    "bos_pooling": ["ssss", "ssss", "ssss"],
    "lsh": ["ssss", "ssss", "ssss"],
    "none": ["....", "....", "...."],
    None: ["....", "....", "...."],
}


def rows_of_picture(sparse_block_size, kept):
    """One string of 1 + 20 letters for each of the 1 + 20 queries."""
    picture = PICTURES[sparse_block_size].replace("xxxx", kept).replace(" ", "")
    of_global, *of_blocks = picture.split()
    return [of_global] + [row for row in of_blocks for _ in range(4)]


@every_selection
@pytest.mark.parametrize("sparse_block_size", [2, 4])
def test_who_sees_whom_is_as_drawn(kind, sparse_block_size):
    query, key = torch.randn(2, 2, 3, 21, 5)
    key[:, :, 1:] = F.normalize(key[:, :, 1:], dim=-1) * torch.tensor([3, 4, 1, 2] * 5)[:, None]
    seen = seen_by(query, key, sparsity_type=kind, block_size=4, sparsity_factor=2,
                   sparse_block_size=sparse_block_size)
    by_head = KEPT_OF_A_BLOCK.get((kind, sparse_block_size)) or KEPT_OF_A_BLOCK[kind]
    for head, kept in enumerate(by_head):
        rows = [[letter != "." for letter in row]
                for row in rows_of_picture(sparse_block_size, kept)]
        assert torch.equal(seen[:, head], torch.tensor(rows).expand(2, -1, -1)), head


def test_a_window_that_ends_within_a_chunk_sees_the_shorter_of_its_longest_keys_first():
    key = F.normalize(torch.randn(1, 1, 21, 5), dim=-1)
    key[:, :, 1:] *= torch.tensor([3, 4, 1, 2] * 5)[:, None]
    seen = seen_by(key, key, sparsity_type="norm", block_size=4, sparsity_factor=2,
                   sparse_block_size=5)  # the two keys of two blocks, and one of a third
    kept_by_first, kept_by_last = (seen[0, 0, t, 1:].view(5, 4).int().tolist() for t in (1, 20))
    assert kept_by_first[2:] == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert kept_by_last[:3] == [[0, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize("kind", ["stride", "block_stride", "pooling", "bos_pooling", "none"])
@pytest.mark.parametrize("sparse_block_size", [2, 4])
def test_the_picture_that_the_file_draws_is_that_of_its_first_head(kind, sparse_block_size):
    rows = lsg.who_sees_whom(20, sparsity_type=kind, block_size=4, sparsity_factor=2,
                             sparse_block_size=sparse_block_size, num_global_tokens=1)
    rows = [row.lower() for row in rows]  # S is s with more weight
    assert rows == rows_of_picture(sparse_block_size, KEPT_OF_A_BLOCK[kind][0])


@every_selection
def test_padding_is_seen_by_nobody(kind):
    query, key, _ = tensors(2, 3, 2 + 31, 5)
    mask = lengths_to_mask((28, 13), 33)
    mask[:, 4:7] = mask[:, 1] = 0
    seen = seen_by(query, key, mask, sparsity_type=kind, num_global_tokens=2, **SMALL)
    assert not (seen & ~mask.bool()[:, None, None]).any()


@every_selection
@pytest.mark.parametrize("token", [0, 2, 7, 14, 22, 33])
def test_a_token_changes_exactly_the_queries_that_see_it(kind, token):
    chosen = SMALL | {"sparsity_type": kind, "num_global_tokens": 2}
    query, key, value = tensors(2, 3, 2 + 37, 5)
    other_key, other_value = key.clone(), value.clone()
    other_key[:, :, token] = 2 * torch.randn(2, 3, 5)
    other_value[:, :, token] = torch.randn(2, 3, 5)
    before = drawn_alike(lsg_attention, query, key, value, **chosen)
    after = drawn_alike(lsg_attention, query, other_key, other_value, **chosen)
    # norm may see a token before its change, or after it, or both
    seen = seen_by(query, key, **chosen) | seen_by(query, other_key, **chosen)
    assert torch.equal((before != after).any(-1), seen[..., token])
    assert seen[..., token].all() if token < 2 else not seen[..., token].all()


@every_selection
@pytest.mark.parametrize("token", [0, 1, 2, 17])
def test_a_query_changes_its_own_output_only(kind, token):
    query, key, value = tensors(2, 3, 1 + 30, 5)
    other = query.clone()
    other[:, :, token] += 1
    before, after = (drawn_alike(lsg_attention, q, key, value, sparsity_type=kind, **SMALL)
                     for q in (query, other))
    changed = (before != after).any(-1)
    if kind == "bos_pooling" and token == 1:  # the first query of the text weighs the sparse keys
        assert changed[..., 1:].all() and not changed[..., 0].any()
    else:
        assert changed[..., token].all() and changed.sum() == 2 * 3


# ------------------------------------------------------------------------------------------------
# Padding


@every_selection
@settings(max_examples=25)
@given(data=st.data())
def test_a_padded_row_equals_the_row_alone(kind, data):
    (query, key, value, mask, lengths), chosen = data.draw(calls(kind, blocks=(1, 7)))
    batch = drawn_alike(lsg_attention, query, key, value, mask, **chosen)
    for b, length in enumerate(lengths):
        row = [x[b:b + 1, :, :length] for x in (query, key, value)] + [mask[b:b + 1, :length]]
        assert_close(batch[b:b + 1, :, :length], drawn_alike(lsg_attention, *row, **chosen))


@every_selection
def test_no_mask_is_a_mask_of_ones(kind):
    query, key, value = tensors(2, 3, 2 + 31, 5)
    chosen = SMALL | {"sparsity_type": kind, "num_global_tokens": 2}
    without, ones = (drawn_alike(lsg_attention, query, key, value, mask, **chosen)
                     for mask in (None, torch.ones(2, 33)))
    assert torch.equal(without, ones)


@every_selection
def test_the_callers_tensors_are_left_as_they_were(kind):
    inputs = [*tensors(2, 3, 1 + 31, 5), lengths_to_mask((32, 19), 32)]
    copies = [x.clone() for x in inputs]
    lsg_attention(*inputs, sparsity_type=kind, **SMALL)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies))


# ------------------------------------------------------------------------------------------------
# Gradients


@every_selection
def test_gradients_are_those_of_finite_differences(kind):
    inputs = [x.requires_grad_() for x in tensors(1, 2, 1 + 13, 3, dtype=torch.float64)]
    mask = lengths_to_mask((12,), 14)
    assert torch.autograd.gradcheck(
        lambda *x: drawn_alike(lsg_attention, *x, mask, sparsity_type=kind, **SMALL), inputs,
        fast_mode=True)


@every_selection
def test_gradients_equal_those_of_the_oracle_and_padding_has_none(kind):
    inputs = tensors(2, 3, 2 + 31, 5, dtype=torch.float64)
    mask, weights = lengths_to_mask((33, 20), 33), torch.randn(2, 3, 33, 5)
    mask[:, 9] = 0
    rows = mask.bool()[:, None, :, None]

    def gradients(attend):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = drawn_alike(attend, *leaves, mask, sparsity_type=kind, num_global_tokens=2, **SMALL)
        return torch.autograd.grad((out * rows * weights).sum(), leaves)

    for actual, expected in zip(gradients(lsg_attention), gradients(oracle)):
        assert_close(actual, expected, 1e-5 if kind == "pooling" else 1e-7)
        assert not (actual * ~rows).any()


# ------------------------------------------------------------------------------------------------
# Dropout


@pytest.mark.parametrize("call", ["none", "mask", "causal"])
def test_what_bfloat16_trains_with_is_the_fused_attention(call):
    query, key, value = (x.bfloat16().requires_grad_() for x in tensors(2, 3, 9, 7))
    mask = torch.rand(2, 1, 1, 9) < 0.7 if call == "mask" else None
    options = dict(mask=mask, is_causal=call == "causal")
    out = lsg.dense_attention(query, key, value, **options)
    out.float().square().sum().backward()
    exact = [x.detach().float().requires_grad_() for x in (query, key, value)]
    expected = lsg.dense_attention(*exact, **options)
    expected.square().sum().backward()
    assert (out - expected).abs().max() < 0.02
    for x, y in zip((query, key, value), exact):
        assert (x.grad - y.grad).abs().max() < 0.02 * y.grad.abs().max()


@pytest.mark.parametrize("text", [7, 21])
def test_dropout_leaves_the_mean_as_it_is(text):
    query, key, value = tensors(1, 2, 1 + text, 3)
    out = lsg_attention(query, key, value, **SMALL)
    many = [x.expand(2000, -1, -1, -1) for x in (query, key, value)]
    dropped = lsg_attention(*many, dropout_p=0.3, **SMALL)
    changed = ((dropped - out).abs().amax(-1) > 1e-3).float().mean((0, 1))  # of each query
    assert changed.min() > 0.5
    assert_close(dropped.mean(0, keepdim=True), out, 0.1)


def test_only_training_drops_anything():
    x = torch.randn(2, 1 + 21, 12)
    layer, plain = (LSGSelfAttention(12, 3, dropout=p, **SMALL) for p in (0.5, 0.0))
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), plain(x))
    assert (layer.train()(x) - plain(x)).abs().amax(-1).min() > 1e-4


# ------------------------------------------------------------------------------------------------
# The module


def test_the_module_has_mbarts_names():
    state = LSGSelfAttention(12, 3).state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == {
        f"{name}_proj.{part}": shape for name in ("k", "v", "q", "out")
        for part, shape in (("weight", (12, 12)), ("bias", (12,)))}


@every_selection
def test_the_module_is_four_projections_around_the_function(kind):
    chosen = SMALL | {"sparsity_type": kind, "num_global_tokens": 2}
    layer, x = LSGSelfAttention(15, 3, **chosen), torch.randn(2, 2 + 31, 15)
    mask = lengths_to_mask((33, 20), 33)
    query, key, value = ((x @ p.weight.T + p.bias).view(2, 33, 3, 5).permute(0, 2, 1, 3)
                         for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    out = drawn_alike(lsg_attention, query, key, value, mask, **chosen)
    out = out.permute(0, 2, 1, 3).reshape(2, 33, 15) @ layer.out_proj.weight.T + layer.out_proj.bias
    assert_close(drawn_alike(layer, x, mask), out)


def test_every_parameter_of_the_module_gets_a_gradient():
    layer = LSGSelfAttention(12, 3, **SMALL)
    layer(torch.randn(2, 1 + 21, 12)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        if name != "k_proj.bias":  # adds the same to all scores of a query, which softmax removes
            assert parameter.grad.abs().max() > 1e-3, name


# ------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("mistake, named", [
    ({"sparsity_type": "strided"}, ["'strided'", "'block_stride'", "'norm'"]),
    ({"block_size": 6, "sparsity_factor": 4}, ["block_size=6", "sparsity_factor=4"]),
    ({"sparsity_type": "norm", "sparse_block_size": 3, "sparsity_factor": 2},
     ["norm", "sparse_block_size=3", "block_size=4", "sparsity_factor=2"]),
    ({"sparsity_type": "norm", "sparse_block_size": 6, "block_size": 8},
     ["norm", "sparse_block_size=6", "block_size=8"]),
    ({"sparsity_type": "lsh", "sparse_block_size": 2, "sparsity_factor": 4},
     ["lsh", "sparse_block_size=2", "sparsity_factor=4"]),
    ({"block_size": 0}, ["block_size=0"]),
    ({"block_size": -4}, ["block_size=-4"]),
    ({"sparse_block_size": -1}, ["sparse_block_size=-1"]),
    ({"lsh_num_pre_rounds": -1}, ["lsh_num_pre_rounds=-1"]),
    ({"num_global_tokens": -1}, ["num_global_tokens=-1"]),
    ({"adaptive": False}, ["21", "block_size=4"]),
])
def test_a_mistake_is_a_value_error_that_names_the_values(mistake, named):
    x = torch.randn(2, 3, 1 + 21, 5)
    with pytest.raises(ValueError) as error:
        lsg_attention(x, x, x, **SMALL | mistake)
    for words in named:
        assert words in str(error.value)


def test_more_globals_than_tokens_are_an_error():
    with pytest.raises(ValueError, match="num_global_tokens=5, but there are only 4 tokens"):
        lsg_attention(*tensors(2, 3, 4, 7), num_global_tokens=5)
    assert lsg_attention(*tensors(2, 3, 4, 7), num_global_tokens=4).shape == (2, 3, 4, 7)


def test_a_mistake_shows_on_a_short_text_too():
    x = torch.randn(2, 3, 1 + 5, 7)
    with pytest.raises(ValueError, match="block_size=4.*sparsity_factor=3"):
        lsg_attention(x, x, x, **SMALL | {"sparsity_factor": 3})


def test_without_adaptive_a_short_text_of_any_length_is_fine():
    x = torch.randn(2, 3, 1 + 7, 5)
    assert_close(lsg_attention(x, x, x, adaptive=False, **SMALL),
                 F.scaled_dot_product_attention(x, x, x))


def test_a_width_that_the_heads_cannot_share_is_a_value_error():
    with pytest.raises(ValueError, match="embed_dim=14.*num_heads=4"):
        LSGSelfAttention(14, 4)


# ------------------------------------------------------------------------------------------------
# Types, layouts, and the file by itself


@every_selection
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_is_near_single(kind, dtype, tolerance):
    inputs = [x.to(dtype) for x in tensors(2, 3, 1 + 31, 6)]
    mask = lengths_to_mask((32, 19), 32)
    chosen = SMALL | {"sparsity_type": kind}
    half = drawn_alike(lsg_attention, *inputs, mask, **chosen)
    single = drawn_alike(lsg_attention, *[x.float() for x in inputs], mask, **chosen)
    assert half.dtype == dtype
    rows = mask.bool()[:, None, :, None]
    assert_close(half.float() * rows, single * rows, tolerance)


@every_selection
def test_double_precision_is_more_precise(kind):
    inputs = tensors(2, 3, 1 + 31, 6, dtype=torch.float64)
    actual, expected = (drawn_alike(attend, *inputs, sparsity_type=kind, **SMALL)
                        for attend in (lsg_attention, oracle))
    assert actual.dtype == torch.float64
    # the original adds 1e-6 to the numbers that pooling divides by
    assert_close(actual, expected, 1e-5 if kind == "pooling" else 1e-7)


@every_selection
def test_any_layout_in_memory_gives_the_same(kind):
    inputs = tensors(2, 3, 1 + 31, 6)
    scattered = [x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for x in inputs]
    assert not any(x.is_contiguous() for x in scattered)
    mask = lengths_to_mask((32, 19), 32)
    actual, expected = (drawn_alike(lsg_attention, *x, m, sparsity_type=kind, **SMALL)
                        for x, m in ((scattered, mask.T.contiguous().T), (inputs, mask)))
    assert_close(actual, expected, 1e-6)


def test_a_copy_of_the_file_needs_torch_and_nothing_else(tmp_path):
    shutil.copy(lsg.__file__, tmp_path)
    imported = set()
    for node in ast.walk(ast.parse((tmp_path / "lsg.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch"}
    code = """if True:
        import lsg, torch
        x = torch.randn(2, 1 + 300, 12)
        print(lsg.__file__, *lsg.LSGSelfAttention(12, 3)(x).shape)"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.stderr == "" and done.returncode == 0
    assert done.stdout.split() == [str(tmp_path / "lsg.py"), "2", "301", "12"]


def test_the_examples_in_the_docstrings_are_true():
    result = doctest.testmod(lsg, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted >= 2 and result.failed == 0
