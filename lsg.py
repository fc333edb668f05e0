"""LSG attention: each token sees Local, Sparse and Global keys, at a cost linear in the length.

Paper: C. Condevaux and S. Harispe, "LSG Attention: Extrapolation of pretrained Transformers to long
sequences" (2022), arXiv:2210.15497. The original code: lsg-converter 0.1.9,
lsg_converter/mbart/modeling_lsg_mbart.py. This file needs only torch, 2.6 or later: copy it (MIT).

The first num_global_tokens tokens are global: they see every token. The others, the text, are cut
into blocks of block_size tokens, and all queries of a block see the same keys:

    global  the global tokens
    local   the block and its two neighbors
    sparse  a subsample, one key per sparsity_factor tokens: the nearest sparse_block_size sparse
            keys on either side of the local keys

With block_size=4, sparsity_factor=2, sparse_block_size=2 and sparsity_type="stride", the queries of
block 3 see, in the first head, the keys marked g, l and s:

            global  block 0  block 1  block 2  block 3  block 4  block 5  block 6
               g    . . . .  s . s .  l l l l  l l l l  l l l l  s . s .  . . . .

That is at most num_global_tokens + 3 * block_size + 2 * sparse_block_size keys, however long the
text is. The sparse keys cover sparse_block_size * sparsity_factor tokens on either side of the local
keys. A text of at most two blocks gets full attention, since its blocks are neighbors.

Letters used for shapes:
    B batch    H heads     D head dimension    T tokens, of which the first G are global
    N blocks   M sparse keys, N * block_size / sparsity_factor, or none
    K columns of the key table: the keys of a block
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

SPARSITY_TYPES = ("norm", "stride", "block_stride", "pooling", "bos_pooling", "lsh", "none", None)


def full_attention(query, key, value, visible=None, dropout_p=0.0):
    """softmax(query · key / √D) · value over the visible keys; 0 if there is none.

    query (…, queries, D), key and value (…, keys, D), and visible (…, queries or 1, keys), True
    where a key may be seen.
    """
    return F.scaled_dot_product_attention(query, key, value, visible, dropout_p)


def lsg_attention(query, key, value, attention_mask=None, *, block_size=128, sparse_block_size=128,
                  sparsity_factor=2, sparsity_type="norm", num_global_tokens=1,
                  lsh_num_pre_rounds=1, adaptive=True, dropout_p=0.0, attention=full_attention):
    """Bidirectional self-attention.

    query, key, value: (B, H, T, D), the global tokens first. These may be the text's own first
        tokens, such as <s>. Apply rotary positions before. Scores are divided by √D.
    attention_mask: (B, T), True or 1 where a key may be seen, global tokens included. Pad on the
        right. A query that sees no key gets 0. Outputs at padding are not zeroed.
    block_size, sparse_block_size, sparsity_factor, num_global_tokens: see the top of this file.
    sparsity_type: how the text is subsampled; see *Sparse keys*. "none" or None leaves out the
        sparse keys, as does sparse_block_size=0 or sparsity_factor=0. "lsh" is random.
    adaptive: True pads a text to whole blocks; False raises ValueError instead.
    dropout_p: of attention weights; pass 0 in evaluation.
    attention: a replacement for full_attention, with the same arguments.
    Returns (B, H, T, D). Raises ValueError if shapes or options do not fit together.

    >>> x = torch.randn(1, 2, 1 + 64, 8)
    >>> lsg_attention(x, x, x, block_size=8, sparse_block_size=8).shape
    torch.Size([1, 2, 65, 8])
    """
    check_options(block_size, sparse_block_size, sparsity_factor, sparsity_type,
                  num_global_tokens, lsh_num_pre_rounds)
    B, H, T, _ = query.shape
    G, text_length = num_global_tokens, T - num_global_tokens
    if text_length < 0:
        raise ValueError(f"{num_global_tokens=}, but the sequence has only {T} tokens")
    if attention_mask is None:
        attention_mask = query.new_ones(B, T, dtype=torch.bool)
    if not query.shape[:3] == key.shape[:3] == value.shape[:3] or attention_mask.shape != (B, T):
        raise ValueError("query, key and value must be (B, H, T, D) with equal B, H and T, and "
                         f"attention_mask (B, T), but they are {tuple(query.shape)}, "
                         f"{tuple(key.shape)}, {tuple(value.shape)}, {tuple(attention_mask.shape)}")
    visible = boolean_mask(attention_mask)[:, None]  # (B, 1, T)
    if text_length <= 2 * block_size:
        return attention(query, key, value, visible[:, :, None], dropout_p)

    padding = -text_length % block_size
    if padding and not adaptive:
        raise ValueError(f"the text has {text_length} tokens, not a multiple of {block_size=}: "
                         "pad it, or set adaptive=True")
    if padding:
        query, key, value = (F.pad(x, (0, 0, 0, padding)) for x in (query, key, value))
        visible = F.pad(visible, (0, padding))
    visible = visible.expand(-1, H, -1)  # (B, H, T + padding)

    num_blocks = (text_length + padding) // block_size
    sparse_per_block = 0
    if uses_sparse_keys(sparse_block_size, sparsity_factor, sparsity_type):
        sparse_per_block = block_size // sparsity_factor
        sparse = sparse_keys(
            query[:, :, G:], key[:, :, G:], value[:, :, G:], visible[:, :, G:], sparsity_type,
            sparsity_factor, block_size, min(block_size, sparse_block_size), lsh_num_pre_rounds)
        # Append the sparse keys to the text.
        key, value, visible = (torch.cat(x, dim=2) for x in zip((key, value, visible), sparse))
        del sparse  # frees memory
    table = key_table(num_blocks, G, block_size, sparse_per_block, sparse_block_size, query.device)

    # On a CPU, process a few heads at a time, so that the gathered keys, about 20,000, fit in its
    # cache. Not in torch.compile, which would compile again for each number of pieces.
    heads_per_piece = B * H
    if query.is_cpu and not torch.compiler.is_compiling():
        heads_per_piece = max(1, 20_000 // table.numel())
    pieces = zip(*(x.flatten(0, 1).split(heads_per_piece) for x in (query, key, value, visible)))
    arguments = table, G, dropout_p, attention
    if query.requires_grad or key.requires_grad or value.requires_grad:
        # Compute each piece again in the backward pass, to save memory.
        out = [checkpoint(attend, *piece, *arguments, use_reentrant=False) for piece in pieces]
    else:
        out = [attend(*piece, *arguments) for piece in pieces]
    return torch.cat(out).unflatten(0, (B, H))[:, :, :T]


def attend(query, key, value, visible, table, G, dropout_p, attention):
    """LSG attention of the heads of one piece: query (heads, T, D) -> (heads, T, D).

    The text is padded to whole blocks. The sparse keys follow it: key and value are
    (heads, T + M, D), and visible is (heads, T + M). table (N, K): see `key_table`.
    """
    T = query.shape[1]
    # The global queries attend to every token.
    from_globals = attention(query[:, :G], key[:, :T], value[:, :T], visible[:, None, :T],
                             dropout_p)

    # Each block of queries attends to the keys in its row of the table. Where the table has -1,
    # key 0 is gathered and masked.
    index = table.clamp(min=0).flatten()
    block_key = key.index_select(1, index).unflatten(1, table.shape)  # (heads, N, K, D)
    block_value = value.index_select(1, index).unflatten(1, table.shape)  # (heads, N, K, D)
    block_visible = visible.index_select(1, index).unflatten(1, table.shape) & (table >= 0)
    block_query = query[:, G:].unflatten(1, (len(table), -1))  # (heads, N, block_size, D)
    from_text = attention(block_query, block_key, block_value, block_visible[:, :, None], dropout_p)
    return torch.cat([from_globals, from_text.flatten(1, 2)], dim=1)


def key_table(num_blocks, num_global_tokens, block_size, sparse_per_block, sparse_block_size,
              device=None):
    """Which keys each block of queries sees: (N, K) indices into globals, text and sparse keys.

    The columns are the global keys, the local keys, and the sparse keys before and after them. -1
    marks positions outside the text. For example, with one global token (0), ten tokens of text in
    blocks of two (1 to 10), and one sparse key per block (11 to 15):

    >>> key_table(5, 1, block_size=2, sparse_per_block=1, sparse_block_size=1)
    tensor([[ 0, -1, -1,  1,  2,  3,  4, -1, 13],
            [ 0,  1,  2,  3,  4,  5,  6, -1, 14],
            [ 0,  3,  4,  5,  6,  7,  8, 11, 15],
            [ 0,  5,  6,  7,  8,  9, 10, 12, -1],
            [ 0,  7,  8,  9, 10, -1, -1, 13, -1]])
    """
    block = torch.arange(num_blocks, device=device)[:, None]  # (N, 1)
    num_text, num_sparse = num_blocks * block_size, num_blocks * sparse_per_block

    def window(first, size, length, offset):
        """Row i: `size` indices from first[i] on, plus offset; -1 outside 0 to length - 1."""
        position = first + torch.arange(size, device=device)  # (N, size)
        return torch.where((0 <= position) & (position < length), offset + position, -1)

    globals_ = torch.arange(num_global_tokens, device=device).expand(num_blocks, -1)
    local = window((block - 1) * block_size, 3 * block_size, num_text, num_global_tokens)
    # `before` stops just before the sparse keys of the previous block, and `after` starts just
    # after those of the next block.
    size = min(sparse_block_size, num_sparse)  # 0 if there are no sparse keys
    offset = num_global_tokens + num_text
    before = window((block - 1) * sparse_per_block - size, size, num_sparse, offset)
    after = window((block + 2) * sparse_per_block, size, num_sparse, offset)
    return torch.cat([globals_, local, before, after], dim=1)


def boolean_mask(mask):
    """The mask as booleans. Raises ValueError if it looks additive: if it has values other than 0
    and 1, or no 1. torch.compile skips this check."""
    is_checked = mask.dtype != torch.bool and not torch.compiler.is_compiling()
    if is_checked and not (((mask == 0) | (mask == 1)).all() and mask.any()):
        raise ValueError("attention_mask must be True or 1 where a key may be seen, False or 0 "
                         "elsewhere (for an additive mask: pass mask == 0)")
    return mask.bool()


# ------------------------------------------------------------------------------------------------
# Sparse keys: six ways to subsample the text
#
#     norm           in each chunk of tokens, the keys of largest norm
#     stride         every sparsity_factor-th key; each head starts one token later
#     block_stride   a run of keys in each block; each head takes the next run
#     pooling        the mean of each group of sparsity_factor tokens
#     bos_pooling    the same, weighted by the attention of the first token after the global ones
#     lsh            in each chunk of tokens, the means of the keys in the same bucket of a hash
#
# As in the original, sparse_block_size has two roles. It is the number of sparse keys seen on
# either side. For norm and lsh, it also limits chunk_size = min(block_size, sparse_block_size).


def uses_sparse_keys(sparse_block_size, sparsity_factor, sparsity_type):
    return sparse_block_size > 0 and sparsity_factor > 0 and sparsity_type not in ("none", None)


def sparse_keys(query, key, value, visible, sparsity_type, factor, block_size, chunk_size,
                lsh_num_pre_rounds):
    """The keys and values (B, H, M, D) of the subsample, and whether they may be seen (B, H, M).

    query, key, value (B, H, N * block_size, D) and visible (B, H, N * block_size) are those of the
    text. The other arguments are explained above.
    """
    if factor == 1:  # every key is kept
        return key, value, visible
    if sparsity_type == "lsh" and chunk_size == factor:  # one bucket per chunk needs no hash
        sparsity_type = "bos_pooling"  # as in the original
    if sparsity_type == "lsh":
        return lsh(key, value, visible, chunk_size, factor, lsh_num_pre_rounds)
    if sparsity_type == "norm":
        return select(norm(key, visible, chunk_size, factor), key, value, visible)
    if sparsity_type == "stride":
        return select(stride(key, factor), key, value, visible)
    if sparsity_type == "block_stride":
        return select(block_stride(key, block_size, factor), key, value, visible)

    # pooling and bos_pooling average each group of `factor` tokens.
    key, value, visible = (x.unflatten(2, (-1, factor)) for x in (key, value, visible))
    if sparsity_type == "pooling":
        weight = (visible / (visible.sum(-1, keepdim=True) + 1e-6)).to(key.dtype)
    else:  # the attention weights of the text's first token within each group
        score = torch.einsum("bhd,bhmfd->bhmf", query[:, :, 0], key) / math.sqrt(key.shape[-1])
        weight = score.masked_fill(~visible, torch.finfo(score.dtype).min).softmax(-1)
    weight = weight[..., None]  # (B, H, M, factor, 1)
    return (weight * key).sum(3), (weight * value).sum(3), visible.any(3)


def select(index, *tensors):
    """The tokens at `index` (B or 1, H, M) of tensors (B, H, N * block_size, …)."""
    B, H = tensors[0].shape[:2]
    batch = torch.arange(B, device=index.device)[:, None, None]
    head = torch.arange(H, device=index.device)[:, None]
    return [x[batch, head, index] for x in tensors]


def norm(key, visible, chunk_size, factor):
    """In each chunk, the indices (B, H, M) of the chunk_size / factor keys of largest norm."""
    key_norm = key.norm(dim=-1).masked_fill(~visible, -1)  # (B, H, N * block_size)
    index = key_norm.unflatten(2, (-1, chunk_size)).topk(chunk_size // factor).indices
    # Ascending, as in the original: the order matters where sparse_block_size cuts a chunk.
    index = index.flip(-1)
    first = torch.arange(0, key.shape[2], chunk_size, device=key.device)[:, None]
    return (first + index).flatten(2)


def stride(key, factor):
    """Indices (H, M): of each `factor` tokens, head h takes number h % factor."""
    head = torch.arange(key.shape[1], device=key.device)
    token = torch.arange(key.shape[2], device=key.device).view(-1, factor)  # (M, factor)
    return token[:, head % factor].T


def block_stride(key, block_size, factor):
    """Indices (H, M): of the `factor` runs of each block, head h takes number h % factor."""
    head = torch.arange(key.shape[1], device=key.device)
    token = torch.arange(key.shape[2], device=key.device)
    run = token.view(-1, factor, block_size // factor)  # (N, factor, block_size / factor)
    return run[:, head % factor].transpose(0, 1).flatten(1)


def lsh(key, value, visible, chunk_size, factor, pre_rounds):
    """The mean of the keys of each chunk that fall into the same bucket of a random hash.

    The last round has chunk_size / factor buckets. The `pre_rounds` rounds before it have
    chunk_size buckets each: they merge keys that are nearly equal, which are then hashed as one.
    In a round, each of num_buckets // 2 random directions is a bucket, and so is its opposite. A
    key goes to the one with the largest dot product. If num_buckets is odd, one stays empty.
    """
    _, H, _, D = key.shape
    precise = torch.promote_types(key.dtype, torch.float32)
    # The number of tokens in each sum, at first 0 or 1: (B, H, N * block_size, 1)
    count = visible[..., None].to(precise)
    sums = [x.unflatten(2, (-1, chunk_size)) for x in (key * count, value * count, count)]
    for num_buckets in [chunk_size] * pre_rounds + [chunk_size // factor]:
        key_sum = sums[0]  # (B, H, chunks, chunk_size, D)
        directions = torch.randn(1, H, 1, D, num_buckets // 2, device=key.device)
        with torch.no_grad():
            similarity = F.normalize(key_sum, dim=-1) @ directions.to(key_sum.dtype)
            bucket = torch.cat([similarity, -similarity], dim=-1).argmax(-1)  # (…, chunk_size)
            buckets = torch.arange(num_buckets, device=key.device)[:, None]
            members = (bucket[..., None, :] == buckets).to(key_sum.dtype)
        sums = [members @ x for x in sums]  # (B, H, chunks, num_buckets, …)
    key_sum, value_sum, count = (x.flatten(2, 3).to(precise) for x in sums)
    size = count.clamp(min=1)
    return (key_sum / size).to(key.dtype), (value_sum / size).to(key.dtype), count[..., 0] > 0


def check_options(block_size, sparse_block_size, sparsity_factor, sparsity_type,
                  num_global_tokens, lsh_num_pre_rounds):
    """Raises ValueError if the options do not fit together; the message says what to do."""
    if sparsity_type not in SPARSITY_TYPES:
        raise ValueError(f"unknown sparsity_type {sparsity_type!r}: choose one of {SPARSITY_TYPES}")
    for name, value, least in (
            ("block_size", block_size, 1), ("sparse_block_size", sparse_block_size, 0),
            ("sparsity_factor", sparsity_factor, 0), ("num_global_tokens", num_global_tokens, 0),
            ("lsh_num_pre_rounds", lsh_num_pre_rounds, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}")
    if not uses_sparse_keys(sparse_block_size, sparsity_factor, sparsity_type):
        return
    if block_size % sparsity_factor:
        raise ValueError(f"{block_size=} is not divisible by {sparsity_factor=}: "
                         "choose a sparsity_factor that divides it")
    chunk_size = min(block_size, sparse_block_size)
    whole_chunks = block_size % chunk_size == 0 and chunk_size % sparsity_factor == 0
    if sparsity_type in ("norm", "lsh") and sparsity_factor > 1 and not whole_chunks:
        raise ValueError(
            f"{sparsity_type} subsamples chunks of min({block_size=}, {sparse_block_size=}) tokens:"
            f" they must divide block_size and be divisible by {sparsity_factor=}")
