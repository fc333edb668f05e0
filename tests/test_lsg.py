"""lsg.py: what it is for, who sees whom, its definition token by token, and then the details.

Letters used for shapes:
    B batch    H heads    D head dimension    T tokens, of which the first G are global
    S sparse keys
"""

import doctest
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lsg
from conftest import assert_close
from lsg import SPARSITY_TYPES, key_table, lsg_attention

every_selection = pytest.mark.parametrize("kind", SPARSITY_TYPES)
SMALL = {"block_size": 4, "sparse_block_size": 4, "sparsity_factor": 2}


def random_inputs(B, H, T, D, value_dim=None, dtype=torch.float32):
    """Query, key and value. The keys of a head differ in length, so that `norm` has one answer."""
    query = torch.randn(B, H, T, D, dtype=dtype)
    key = F.normalize(torch.randn(B, H, T, D, dtype=dtype), dim=-1)
    length = 1 + torch.rand(B, H, T, 1).argsort(2) / 8
    value = torch.randn(B, H, T, value_dim or D, dtype=dtype)
    return query, key * length.to(dtype), value


def mask_of(lengths, T):
    """(B, T), True for the first lengths[b] tokens of row b."""
    return torch.arange(T) < torch.tensor(lengths)[:, None]


def seeded(attend, *args, **options):
    """Call `attend` with a fixed seed: two calls then draw the same directions for lsh."""
    torch.default_generator.manual_seed(7)
    return attend(*args, **options)


def softmax_attention(query, key, value, visible):
    """softmax(query · key / √D) · value over the visible keys; 0 if there is none."""
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return weights.masked_fill(~visible.any(-1, keepdim=True), 0) @ value


# ------------------------------------------------------------------------------------------------
# The property that this project was asked for


@every_selection
@settings(max_examples=20)
@given(sparsity_factor=st.integers(1, 3), kept_per_block=st.integers(1, 3),
       sparse_blocks=st.integers(0, 2), num_global_tokens=st.integers(0, 3),
       padding=st.integers(0, 9))
def test_lsg_equals_full_attention_up_to_two_blocks(
        kind, sparsity_factor, kept_per_block, sparse_blocks, num_global_tokens, padding):
    block_size = sparsity_factor * kept_per_block
    for text_length in range(1, 2 * block_size + 1):
        T = num_global_tokens + text_length
        query, key, value = random_inputs(2, 3, T, 5)
        mask = mask_of([T, max(T - padding, 1)], T)
        actual = lsg_attention(
            query, key, value, mask, block_size=block_size, sparsity_type=kind,
            sparse_block_size=sparse_blocks * block_size, sparsity_factor=sparsity_factor,
            num_global_tokens=num_global_tokens)
        expected = F.scaled_dot_product_attention(query, key, value, mask[:, None, None])
        assert_close(actual, expected)


@every_selection
def test_one_token_more_than_two_blocks_is_not_full_attention(kind):
    query, key, value = random_inputs(2, 3, 1 + 9, 5)
    actual = lsg_attention(query, key, value, sparsity_type=kind, **SMALL)
    assert (actual - F.scaled_dot_product_attention(query, key, value)).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------
# Who sees whom

# One global token and five blocks of four. Each line is for the queries of one block:
#     g the global token    l local    x what the selection keeps of a block    . not seen
# The selection keeps two keys of a block, so sparse_block_size=2 sees one block on either side of
# the local keys, and sparse_block_size=4 sees two.
DRAWINGS = {
    2: """
        g gggg gggg gggg gggg gggg
        g llll llll xxxx .... ....
        g llll llll llll xxxx ....
        g xxxx llll llll llll xxxx
        g .... xxxx llll llll llll
        g .... .... xxxx llll llll""",
    4: """
        g gggg gggg gggg gggg gggg
        g llll llll xxxx xxxx ....
        g llll llll llll xxxx xxxx
        g xxxx llll llll llll xxxx
        g xxxx xxxx llll llll llll
        g .... xxxx xxxx llll llll"""}
KEPT_OF_A_BLOCK = {  # for each head, if the keys of each block have the lengths 3, 4, 1 and 2
    "norm": ["ss..", "ss..", "ss.."],
    "stride": ["s.s.", ".s.s", "s.s."],
    "block_stride": ["ss..", "..ss", "ss.."],
    "pooling": ["ssss", "ssss", "ssss"],
    "bos_pooling": ["ssss", "ssss", "ssss"],
    "lsh": ["ssss", "ssss", "ssss"],
    "none": ["....", "....", "...."],
    None: ["....", "....", "...."]}
KEPT_BY_NORM_IN_CHUNKS_OF_TWO = [".s.s", ".s.s", ".s.s"]  # sparse_block_size=2 halves the chunks


def visible_keys(query, key, mask=None, **options):
    """(B, H, T, T), True where a query gives weight to a token.

    With the identity as values, attention returns its weights.
    """
    B, H, T, _ = query.shape
    value = torch.eye(T).expand(B, H, T, T)
    return seeded(lsg_attention, query, key, value, mask, **options) > 0


def draw(visible):
    """A line of x and . for each query of visible (T, T)."""
    return ["".join("x" if seen else "." for seen in row) for row in visible.tolist()]


def expected_lines(drawing, kept):
    """The drawing as `draw` has it: a line for each of the 1 + 20 queries."""
    of_global, *of_blocks = drawing.replace("xxxx", kept).replace(" ", "").split()
    lines = [of_global]
    for line in of_blocks:
        lines += 4 * [line]
    return ["".join("." if letter == "." else "x" for letter in line) for line in lines]


@every_selection
@pytest.mark.parametrize("sparse_block_size", [2, 4])
def test_each_query_sees_the_keys_in_the_drawing(kind, sparse_block_size):
    query, key = torch.randn(2, 2, 3, 1 + 20, 5)
    key[:, :, 1:] = F.normalize(key[:, :, 1:], dim=-1) * torch.tensor([3, 4, 1, 2] * 5)[:, None]
    visible = visible_keys(query, key, sparsity_type=kind, block_size=4, sparsity_factor=2,
                           sparse_block_size=sparse_block_size)
    kept_by_head = KEPT_OF_A_BLOCK[kind]
    if kind == "norm" and sparse_block_size == 2:
        kept_by_head = KEPT_BY_NORM_IN_CHUNKS_OF_TWO
    for b, head in product(range(2), range(3)):
        expected = expected_lines(DRAWINGS[sparse_block_size], kept_by_head[head])
        assert draw(visible[b, head]) == expected


def test_the_drawing_in_the_docstring_of_the_file_is_true():
    drawn, = (line.split() for line in lsg.__doc__.splitlines() if line.split()[:2] == ["g", "."])
    query, key = torch.randn(2, 1, 1, 1 + 28, 5)
    visible = visible_keys(query, key, sparsity_type="stride", block_size=4, sparsity_factor=2,
                           sparse_block_size=2)
    expected = ["." if letter == "." else "x" for letter in drawn]
    for line in draw(visible[0, 0])[1 + 12:1 + 16]:  # block 3
        assert line == "".join(expected)


def test_a_window_that_ends_inside_a_chunk_sees_the_smaller_kept_keys_first():
    key = F.normalize(torch.randn(1, 1, 1 + 20, 5), dim=-1)
    key[:, :, 1:] *= torch.tensor([3, 4, 1, 2] * 5)[:, None]
    # Five sparse keys are the two of one block, the two of the next, and one of a third.
    visible = visible_keys(key, key, sparsity_type="norm", block_size=4, sparsity_factor=2,
                           sparse_block_size=5)
    first, last = draw(visible[0, 0])[1], draw(visible[0, 0])[20]
    assert first == "x" + "xxxx" + "xxxx" + "xx.." + "xx.." + "x..."
    assert last == "x" + ".x.." + "xx.." + "xx.." + "xxxx" + "xxxx"


@every_selection
def test_padding_is_never_seen(kind):
    query, key, _ = random_inputs(2, 3, 2 + 31, 5)
    mask = mask_of([28, 13], 33)
    mask[:, 4:7] = False
    mask[:, 1] = False
    visible = visible_keys(query, key, mask, sparsity_type=kind, num_global_tokens=2, **SMALL)
    assert not (visible & ~mask[:, None, None]).any()


@every_selection
@pytest.mark.parametrize("token", [0, 2, 7, 14, 22, 33])
def test_a_key_changes_exactly_the_queries_that_see_it(kind, token):
    options = SMALL | {"sparsity_type": kind, "num_global_tokens": 2}
    query, key, value = random_inputs(2, 3, 2 + 37, 5)
    other_key, other_value = key.clone(), value.clone()
    other_key[:, :, token] = 2 * torch.randn(2, 3, 5)
    other_value[:, :, token] = torch.randn(2, 3, 5)
    before = seeded(lsg_attention, query, key, value, **options)
    after = seeded(lsg_attention, query, other_key, other_value, **options)
    # `norm` may keep the key before its change, after it, or both times.
    visible = visible_keys(query, key, **options) | visible_keys(query, other_key, **options)
    assert torch.equal((before != after).any(-1), visible[..., token])
    is_global = token < 2
    assert visible[..., token].all() == is_global


@every_selection
@pytest.mark.parametrize("token", [0, 1, 2, 17])
def test_a_query_changes_only_its_own_output(kind, token):
    query, key, value = random_inputs(2, 3, 1 + 30, 5)
    other = query.clone()
    other[:, :, token] += 1
    before = seeded(lsg_attention, query, key, value, sparsity_type=kind, **SMALL)
    after = seeded(lsg_attention, other, key, value, sparsity_type=kind, **SMALL)
    expected = torch.zeros(2, 3, 31, dtype=torch.bool)
    expected[..., token] = True
    if kind == "bos_pooling" and token == 1:  # the first query of the text weighs the sparse keys
        expected[..., 1:] = True
    assert torch.equal((before != after).any(-1), expected)


# ------------------------------------------------------------------------------------------------
# The definition, token by token


def oracle(query, key, value, mask=None, *, block_size, sparse_block_size, sparsity_factor=2,
           sparsity_type="norm", num_global_tokens=1, lsh_num_pre_rounds=1):
    """LSG attention as full attention with a mask, over the tokens and the sparse keys.

    A text of one or two blocks needs no special case: its blocks are neighbors, so all is local.
    """
    B, H, T, D = query.shape
    G = num_global_tokens
    block = [(t - G) // block_size for t in range(T)]
    num_blocks = math.ceil((T - G) / block_size)
    per_block = block_size // sparsity_factor
    uses_sparse_keys = sparsity_type not in (None, "none") and sparse_block_size > 0
    S = num_blocks * per_block if uses_sparse_keys else 0
    sparse_options = {"kind": sparsity_type, "factor": sparsity_factor, "block_size": block_size,
                      "chunk": min(block_size, sparse_block_size)}
    rounds = lsh_rounds(H, D, pre_rounds=lsh_num_pre_rounds, **sparse_options)

    def sees_token(t, other):
        return t < G or other < G or abs(block[t] - block[other]) <= 1

    def sees_sparse_key(t, s):
        if t < G:
            return False
        before, after = (block[t] - 1) * per_block, (block[t] + 2) * per_block
        return before - sparse_block_size <= s < before or after <= s < after + sparse_block_size

    token_window = torch.tensor([[sees_token(t, other) for other in range(T)] for t in range(T)])
    sparse_window = torch.tensor([[sees_sparse_key(t, s) for s in range(S)] for t in range(T)])
    out = []
    for b, h in product(range(B), range(H)):
        visible = torch.ones(T).bool() if mask is None else mask[b].bool()
        text_key, text_visible = key[b, h, G:], visible[G:].tolist()
        weights = torch.zeros(S, T, dtype=key.dtype)  # of the tokens in each sparse key
        if S:
            groups = sparse_groups(text_key, text_visible, h, num_blocks, rounds, **sparse_options)
            first_query = query[b, h, G]
            is_bos = sparsity_type == "bos_pooling" or sparsity_type == "lsh" and not rounds
            weights = torch.stack([
                F.pad(group_weights(group, text_key, first_query if is_bos else None), (G, 0))
                for group in groups])
        keys = torch.cat([key[b, h], weights @ key[b, h]])  # (T + S, D)
        values = torch.cat([value[b, h], weights @ value[b, h]])
        window = torch.cat([token_window & visible, sparse_window.bool() & weights.any(1)], dim=1)
        out.append(softmax_attention(query[b, h], keys, values, window))
    return torch.stack(out).unflatten(0, (B, H))


def split(tokens, size):
    return [tokens[first:first + size] for first in range(0, len(tokens), size)]


def sparse_groups(key, visible, head, num_blocks, rounds, kind, factor, block_size, chunk):
    """For each sparse key of a head, the visible tokens of the text that it is made of.

    key (length, D) and visible, a list, are those of the text.
    """
    tokens = list(range(num_blocks * block_size))
    visible = visible + [False] * (len(tokens) - len(visible))
    groups = []
    if factor == 1:
        groups = split(tokens, 1)
    elif kind == "norm":
        for run in split(tokens, chunk):
            groups += longest([t for t in run if visible[t]], key, chunk // factor)
    elif kind == "stride":
        for run in split(tokens, factor):
            groups.append([run[head % factor]])
    elif kind == "block_stride":
        kept = block_size // factor
        for run in split(tokens, block_size):
            groups += [[run[(head * kept + i) % block_size]] for i in range(kept)]
    elif rounds:
        for run in split(tokens, chunk):
            groups += buckets_of([t for t in run if visible[t]], key, head, rounds)
    else:  # pooling, bos_pooling, and lsh with a single bucket
        groups = split(tokens, factor)
    return [[t for t in group if visible[t]] for group in groups]


def longest(tokens, key, count):
    """The tokens whose keys are longest, the shorter first. Empty groups fill the front."""
    kept = sorted(tokens, key=lambda t: key[t].norm().item())[-count:]
    return [[]] * (count - len(kept)) + [[t] for t in kept]


def group_weights(group, key, first_query):
    """The weight of each token of the text in a sparse key, (length,).

    The mean of the group, or what the first query of the text would give to its tokens.
    """
    weights = key.new_ones(len(group)) / max(len(group), 1)
    if first_query is not None:
        weights = (key[group] @ first_query / math.sqrt(key.shape[1])).softmax(0)
    return weights @ torch.eye(len(key), dtype=key.dtype)[group]


def lsh_rounds(H, D, pre_rounds, kind, factor, block_size, chunk):
    """The number of buckets of each round and its random directions (H, D, buckets // 2)."""
    if kind != "lsh" or factor == 1 or chunk <= factor:  # a single bucket needs no hash
        return []
    rounds = []
    for buckets in [chunk] * pre_rounds + [chunk // factor]:
        rounds.append((buckets, torch.randn(1, H, 1, D, buckets // 2)[0, :, 0]))
    return rounds


def buckets_of(tokens, key, head, rounds):
    """Groups of tokens whose sums of keys point in the direction of the same bucket."""
    groups = [[t] for t in tokens]
    for num_buckets, directions in rounds:
        buckets = [[] for _ in range(num_buckets)]
        for group in groups:
            if group:
                similarity = key[group].sum(0) @ directions[head].to(key.dtype)
                buckets[torch.cat([similarity, -similarity]).argmax()] += group
        groups = buckets
    return groups


# ------------------------------------------------------------------------------------------------
# Random texts and options for the comparison


def fitting_sizes(kind):
    """(block_size, sparse_block_size, sparsity_factor) that fit together.

    In three lists: sparse blocks smaller than a block, of the same size, and larger.
    """
    smaller, equal, larger = [], [], []
    for block_size, factor in product((1, 2, 3, 4, 6, 8, 9), range(1, 10)):
        if block_size % factor:
            continue
        for sparse_block_size in range(2 * block_size + 2):
            chunk = min(block_size, max(sparse_block_size, 1))
            whole_chunks = block_size % chunk == 0 and chunk % factor == 0
            if kind in ("norm", "lsh") and factor > 1 and not whole_chunks:
                continue
            sizes = block_size, sparse_block_size, factor
            if sparse_block_size < block_size:
                smaller.append(sizes)
            elif sparse_block_size == block_size:
                equal.append(sizes)
            else:
                larger.append(sizes)
    return smaller, equal, larger


@st.composite
def random_options(draw, kind):
    """Any options that fit together; without sparse keys, with any sparsity_factor."""
    sizes = draw(st.sampled_from(fitting_sizes(kind)))  # each list as often, whatever its length
    block_size, sparse_block_size, factor = draw(st.sampled_from(sizes))
    if kind in (None, "none") or sparse_block_size == 0:
        factor = draw(st.integers(1, 5))
    return {"block_size": block_size, "sparse_block_size": sparse_block_size,
            "sparsity_factor": factor, "sparsity_type": kind,
            "num_global_tokens": draw(st.integers(0, 4)),
            "lsh_num_pre_rounds": draw(st.integers(0, 2))}


@st.composite
def random_calls(draw, kind, min_blocks):
    """(query, key, value, mask), the lengths of the texts, and options.

    Texts have up to seven blocks; the last one may be partly filled. Padding is large garbage.
    """
    options = draw(random_options(kind))
    G, block_size = options["num_global_tokens"], options["block_size"]
    B, H, D = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    text_length = draw(st.integers(min_blocks, 7)) * block_size
    text_length -= draw(st.integers(0, block_size - 1))
    T = G + text_length
    torch.default_generator.manual_seed(draw(st.integers(0, 999)))
    # In float64, two directions of lsh are never so nearly equal that rounding decides.
    dtype = torch.float64 if kind == "lsh" else torch.float32
    inputs = random_inputs(B, H, T, D, draw(st.integers(1, 4)), dtype)
    lengths = [T] + draw(st.lists(st.integers(G + 1, T), min_size=B - 1, max_size=B - 1))
    mask = mask_of(lengths, T)
    padding = ~mask[:, None, :, None]
    query, key, value = (x + 50 * padding * torch.randn_like(x) for x in inputs)
    if draw(st.booleans()):  # holes, in the global tokens too
        mask &= torch.rand(B, T) < 0.7
    return (query, key, value, mask), lengths, options


# ------------------------------------------------------------------------------------------------
# Comparison with the definition


@every_selection
@settings(max_examples=40)
@given(data=st.data())
def test_equals_the_definition_for_any_length_and_options(kind, data):
    (query, key, value, mask), _, options = data.draw(random_calls(kind, min_blocks=3))
    actual = seeded(lsg_attention, query, key, value, mask, **options)
    expected = seeded(oracle, query, key, value, mask, **options)
    rows = mask[:, None, :, None]  # what the queries of the padding see does not matter
    assert_close(actual * rows, expected * rows)


@pytest.mark.parametrize("off", [{"sparsity_type": None}, {"sparsity_type": "none"},
                                 {"sparse_block_size": 0}, {"sparsity_factor": 0}])
def test_all_ways_to_leave_out_the_sparse_keys_agree(off):
    query, key, value = random_inputs(2, 3, 1 + 31, 5)
    options = {"block_size": 5, "sparse_block_size": 5, "sparsity_factor": 5} | off
    expected = oracle(query, key, value, block_size=5, sparse_block_size=0)
    assert_close(lsg_attention(query, key, value, **options), expected)


@pytest.mark.parametrize("kind", SPARSITY_TYPES[:6])
def test_equals_full_attention_if_all_keys_are_kept_and_seen(kind):
    query, key, value = random_inputs(2, 3, 2 + 37, 5)
    mask = mask_of([39, 26], 39)
    actual = lsg_attention(query, key, value, mask, sparsity_type=kind, num_global_tokens=2,
                           block_size=4, sparse_block_size=40, sparsity_factor=1)
    expected = F.scaled_dot_product_attention(query, key, value, mask[:, None, None])
    assert_close(actual, expected)


@pytest.mark.parametrize("kind", SPARSITY_TYPES[:6])
def test_a_huge_sparse_block_size_costs_no_more_than_the_whole_text(kind):
    query, key, value = random_inputs(2, 3, 1 + 30, 5)
    options = {"sparsity_type": kind, "block_size": 4, "sparsity_factor": 2}
    huge = seeded(lsg_attention, query, key, value, sparse_block_size=10**9, **options)
    enough = seeded(lsg_attention, query, key, value, sparse_block_size=32, **options)
    assert_close(huge, enough)
    table = key_table(8, 1, block_size=4, sparse_per_block=2, sparse_block_size=10**9)
    assert table.shape == (8, 1 + 3 * 4 + 2 * 16)


def test_lsh_depends_on_its_draw_and_on_its_pre_rounds():
    query, key, value = random_inputs(1, 2, 1 + 64, 5)
    options = {"sparsity_type": "lsh", "block_size": 8, "sparse_block_size": 8}
    first = lsg_attention(query, key, value, **options)
    second = lsg_attention(query, key, value, **options)
    assert (first - second).abs().max() > 1e-3
    none, one, two = (seeded(lsg_attention, query, key, value, lsh_num_pre_rounds=n, **options)
                      for n in (0, 1, 2))
    for a, b in (none, one), (one, two), (none, two):
        assert (a - b).abs().max() > 1e-3


@every_selection
@pytest.mark.parametrize("text_length", [7, 24])
def test_short_texts_and_whole_blocks_give_the_same_without_adaptive(kind, text_length):
    query, key, value = random_inputs(2, 3, 1 + text_length, 5)
    adaptive = seeded(lsg_attention, query, key, value, sparsity_type=kind, **SMALL)
    exact = seeded(lsg_attention, query, key, value, sparsity_type=kind, adaptive=False, **SMALL)
    assert torch.equal(adaptive, exact)


# ------------------------------------------------------------------------------------------------
# Masks and padding


@every_selection
@settings(max_examples=25)
@given(data=st.data())
def test_a_padded_row_equals_the_row_alone(kind, data):
    inputs, lengths, options = data.draw(random_calls(kind, min_blocks=1))
    query, key, value, mask = inputs
    batch = seeded(lsg_attention, query, key, value, mask, **options)
    for b, length in enumerate(lengths):
        row = [x[b:b + 1, :, :length] for x in (query, key, value)]
        alone = seeded(lsg_attention, *row, mask[b:b + 1, :length], **options)
        assert_close(batch[b:b + 1, :, :length], alone)


@every_selection
@pytest.mark.parametrize("text_length", [7, 31])
def test_no_mask_is_a_mask_of_ones(kind, text_length):
    query, key, value = random_inputs(2, 3, 2 + text_length, 5)
    options = SMALL | {"sparsity_type": kind, "num_global_tokens": 2}
    without = seeded(lsg_attention, query, key, value, **options)
    ones = seeded(lsg_attention, query, key, value, torch.ones(2, 2 + text_length), **options)
    assert_close(without, ones, 1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.bfloat16])
def test_a_mask_of_zeros_and_ones_may_have_any_type(dtype):
    query, key, value = random_inputs(2, 3, 1 + 31, 5)
    mask = mask_of([32, 19], 32)
    actual = lsg_attention(query, key, value, mask.to(dtype), **SMALL)
    assert torch.equal(actual, lsg_attention(query, key, value, mask, **SMALL))


@pytest.mark.parametrize("text_length", [7, 31])
@pytest.mark.parametrize("hidden", [-math.inf, -1e4, 0.5, 0])
def test_a_mask_of_other_numbers_is_refused(hidden, text_length):
    """A mask that is added to the scores has 0 where a key may be seen."""
    query, key, value = random_inputs(2, 3, 1 + text_length, 5)
    mask = torch.zeros(2, 1 + text_length)
    mask[1, 3:] = hidden
    with pytest.raises(ValueError, match="attention_mask must be True or 1"):
        lsg_attention(query, key, value, mask, **SMALL)


@every_selection
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text_length", [7, 31])
def test_a_row_without_visible_keys_is_zero(kind, dtype, text_length):
    inputs = random_inputs(2, 3, 2 + text_length, 5, dtype=dtype)
    mask = mask_of([2 + text_length, 0], 2 + text_length)
    inputs = [x.requires_grad_() for x in inputs]
    out = lsg_attention(*inputs, mask, sparsity_type=kind, num_global_tokens=2, **SMALL)
    assert not out[1].any() and out[0].abs().amax(-1).min() > 0
    out.float().square().sum().backward()
    for x in inputs:
        assert x.grad.isfinite().all() and not x.grad[1].any()


@every_selection
def test_the_tensors_of_the_caller_do_not_change(kind):
    inputs = [*random_inputs(2, 3, 1 + 31, 5), mask_of([32, 19], 32)]
    copies = [x.clone() for x in inputs]
    lsg_attention(*inputs, sparsity_type=kind, **SMALL)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies))


@pytest.mark.parametrize("text_length", [9, 31])
@pytest.mark.parametrize("training", [False, True])
def test_autocast_gives_its_data_type(text_length, training):
    inputs = [x.requires_grad_(training) for x in random_inputs(1, 3, 1 + text_length, 5)]
    with torch.autocast("cpu", torch.bfloat16):
        assert lsg_attention(*inputs, **SMALL).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------
# Gradients and dropout


@every_selection
def test_gradients_equal_finite_differences(kind):
    inputs = [x.requires_grad_() for x in random_inputs(1, 2, 1 + 13, 3, dtype=torch.float64)]
    mask = mask_of([12], 14)

    def attend(*inputs):
        return seeded(lsg_attention, *inputs, mask, sparsity_type=kind, **SMALL)

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


@every_selection
def test_gradients_equal_those_of_the_definition(kind):
    inputs = random_inputs(2, 3, 2 + 31, 5, dtype=torch.float64)
    mask, weights = mask_of([33, 20], 33), torch.randn(2, 3, 33, 5)
    mask[:, 9] = False
    rows = mask[:, None, :, None]

    def gradients(attend):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = seeded(attend, *leaves, mask, sparsity_type=kind, num_global_tokens=2, **SMALL)
        return torch.autograd.grad((out * rows * weights).sum(), leaves)

    for actual, expected in zip(gradients(lsg_attention), gradients(oracle)):
        assert_close(actual, expected, 1e-5 if kind == "pooling" else 1e-7)
        assert not (actual * ~rows).any(), "padding has a gradient"


@pytest.mark.parametrize("text_length", [7, 21])
def test_dropout_preserves_the_mean(text_length):
    query, key, value = random_inputs(1, 2, 1 + text_length, 3)
    out = lsg_attention(query, key, value, **SMALL)
    many = [x.expand(2000, -1, -1, -1) for x in (query, key, value)]
    dropped = lsg_attention(*many, dropout_p=0.3, **SMALL)
    changed = (dropped - out).abs().amax(-1) > 1e-3
    assert changed.float().mean((0, 1)).min() > 0.5  # of each query
    assert_close(dropped.mean(0, keepdim=True), out, 0.1)


# ------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("mistake, words", [
    ({"sparsity_type": "strided"}, ["'strided'", "'block_stride'", "'norm'"]),
    ({"block_size": 6, "sparsity_factor": 4}, ["block_size=6", "sparsity_factor=4"]),
    ({"sparsity_type": "norm", "sparse_block_size": 3, "sparsity_factor": 2},
     ["norm", "sparse_block_size=3", "block_size=4", "sparsity_factor=2"]),
    ({"sparsity_type": "lsh", "sparse_block_size": 2, "sparsity_factor": 4},
     ["lsh", "sparse_block_size=2", "sparsity_factor=4"]),
    ({"block_size": 0}, ["block_size=0"]),
    ({"sparsity_factor": 2.0}, ["sparsity_factor=2.0"]),
    ({"num_global_tokens": -1}, ["num_global_tokens=-1"]),
    ({"adaptive": False}, ["21", "block_size=4"])])
def test_an_impossible_option_is_an_error_that_names_the_values(mistake, words):
    short, long = torch.randn(2, 3, 1 + 5, 5), torch.randn(2, 3, 1 + 21, 5)
    for x in [long] if "adaptive" in mistake else [short, long]:
        with pytest.raises(ValueError) as error:
            lsg_attention(x, x, x, **SMALL | mistake)
        for word in words:
            assert word in str(error.value)


def test_more_global_tokens_than_tokens_are_an_error():
    x = torch.randn(2, 3, 4, 7)
    with pytest.raises(ValueError, match="num_global_tokens=5.*4 tokens"):
        lsg_attention(x, x, x, num_global_tokens=5)
    assert lsg_attention(x, x, x, num_global_tokens=4).shape == (2, 3, 4, 7)


# ------------------------------------------------------------------------------------------------
# Types and examples


@every_selection
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_is_near_single_precision(kind, dtype, tolerance):
    inputs = [x.to(dtype) for x in random_inputs(2, 3, 1 + 31, 6)]
    mask = mask_of([32, 19], 32)
    half = seeded(lsg_attention, *inputs, mask, sparsity_type=kind, **SMALL)
    single = [x.float() for x in inputs]
    single = seeded(lsg_attention, *single, mask, sparsity_type=kind, **SMALL)
    assert half.dtype == dtype
    rows = mask[:, None, :, None]
    assert_close(half.float() * rows, single * rows, tolerance)


def test_the_examples_in_the_docstrings_are_true():
    result = doctest.testmod(lsg, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted >= 2 and result.failed == 0
