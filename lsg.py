"""LSG attention: each query sees a Local window, a Sparse choice of keys around it, Global keys.

Paper: C. Condevaux and S. Harispe, "LSG Attention: Extrapolation of pretrained Transformers to long
sequences" (2022), arXiv:2210.15497. Official code: lsg-converter 0.1.9,
lsg_converter/mbart/modeling_lsg_mbart.py. This file needs torch and nothing else: copy it.

A sequence is num_global_tokens global tokens, then the text, cut into blocks of block_size tokens.
The queries of one block share their keys:

    global   the num_global_tokens first tokens
    local    the block itself and its two neighbours: 3 * block_size tokens
    sparse   sparse_block_size keys on either side of the local window, out of a thinned copy of the
             text in which each run of sparsity_factor tokens has left one key (see `select`)

so that a query costs num_global_tokens + 2 * sparse_block_size + 3 * block_size keys, however long
the text is. A global query sees everything. A text of at most 2 * block_size tokens is all local,
and gets full attention.

Letters in the comments on shapes:
    B batch, H heads, D head_dim               T tokens in all, the G global ones first
    N blocks of block_size queries             S sparse keys made from the text
    K keys that one block of queries sees
"""

import argparse
import math
import re
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def lsg_attention(query, key, value, attention_mask=None, *, block_size=128, sparse_block_size=128,
                  sparsity_factor=2, sparsity_type="norm", num_global_tokens=1,
                  lsh_num_pre_rounds=1, adaptive=True, dropout_p=0.0):
    """Attend as `scaled_dot_product_attention(query, key, value)` does, at linear cost.

    query, key, value: (B, H, T, D), the num_global_tokens global tokens first.
    attention_mask: (B, T), nonzero where a key may be seen, zero for padding; None: no padding.
    sparse_block_size: 0 leaves out the sparse keys, as does sparsity_type None or "none".
    adaptive: pad a text whose length is no multiple of block_size; else such a text is an error.
    Returns (B, H, T, D). Raises ValueError for options that do not fit together.

    >>> x = torch.randn(1, 2, 1 + 64, 8)
    >>> lsg_attention(x, x, x, block_size=8, sparse_block_size=8).shape
    torch.Size([1, 2, 65, 8])
    """
    check_options(block_size, sparse_block_size, sparsity_factor, sparsity_type,
                  num_global_tokens, lsh_num_pre_rounds)
    B, H, T, D = query.shape
    G, text_length = num_global_tokens, T - num_global_tokens
    if text_length < 0:
        raise ValueError(f"{num_global_tokens=}, but there are only {T} tokens in all")
    if attention_mask is None:
        attention_mask = torch.ones(B, T, device=query.device)
    visible = attention_mask.bool()[:, None]  # (B, 1, T)

    if text_length <= 2 * block_size:
        return dense_attention(query, key, value, visible[:, :, None], dropout_p)
    if text_length % block_size and not adaptive:
        raise ValueError(f"a text of {text_length} tokens is no multiple of {block_size=}: "
                         "pad it, or set adaptive=True")

    padding = -text_length % block_size
    if padding:
        query, key, value = (F.pad(x, (0, 0, 0, padding)) for x in (query, key, value))
        visible = F.pad(visible, (0, padding))
    step, sparse = 0, ()  # step: sparse keys left by each block
    if sparse_block_size and sparsity_factor > 0 and sparsity_type not in (None, "none"):
        step = block_size // sparsity_factor
        sparse = select(query[:, :, G], key[:, :, G:], value[:, :, G:], visible[:, :, G:],
                        block_size, min(block_size, sparse_block_size), sparsity_factor,
                        sparsity_type, lsh_num_pre_rounds)
    table = key_table((text_length + padding) // block_size, G, block_size, step,
                      sparse_block_size, query.device)

    # On a CPU few heads at a time: what they gather then stays in the cache until it is used.
    heads = max(1, 20_000 // table.numel()) if query.is_cpu else B * H
    parts = (x.flatten(0, 1).split(heads)
             for x in (query, key, value, visible.expand(-1, H, -1), *sparse))
    # Training does not keep what was gathered either: the backward pass gathers it again.
    call = partial(checkpoint, attend, use_reentrant=False) if torch.is_grad_enabled() else attend
    out = [call(query, keys[:3], keys[3:], table, G, dropout_p).transpose(0, 1)
           for query, *keys in zip(*parts)]  # (T + padding, heads, D) each
    return torch.cat(out, dim=1)[:T].unflatten(1, (B, H)).permute(1, 2, 0, 3)


def key_table(num_blocks, num_global_tokens, block_size, step, sparse_block_size, device=None):
    """Which keys each block of queries sees: (N, K) rows of [globals | text | sparse keys].

    -1 stands for a place beyond either end of the text. `step` is the number of sparse keys made
    from one block, 0 for none. Blocks of two, one global and no sparse key:

    >>> key_table(num_blocks=3, num_global_tokens=1, block_size=2, step=0, sparse_block_size=0)
    tensor([[ 0, -1, -1,  1,  2,  3,  4],
            [ 0,  1,  2,  3,  4,  5,  6],
            [ 0,  3,  4,  5,  6, -1, -1]])
    """
    block = torch.arange(num_blocks, device=device)[:, None]
    offset = torch.arange(max(num_global_tokens, 3 * block_size, sparse_block_size), device=device)

    def window(first, size, base, length):  # `size` places from `first` on, in a part of the row
        place = first + offset[:size]
        return torch.where((0 <= place) & (place < length), base + place, -1)

    text, sparse = num_global_tokens, num_global_tokens + num_blocks * block_size
    columns = [window(0 * block, num_global_tokens, 0, num_global_tokens),
               window((block - 1) * block_size, 3 * block_size, text, num_blocks * block_size)]
    if step:  # the sparse keys of block i begin at i * step; those of the local window are left out
        before, after = (block - 1) * step - sparse_block_size, (block + 2) * step
        columns += [window(before, sparse_block_size, sparse, num_blocks * step),
                    window(after, sparse_block_size, sparse, num_blocks * step)]
    return torch.cat(columns, dim=1)


def attend(query, keys, sparse, table, num_global_tokens, dropout_p=0.0):
    """The attention of some heads: globals to everything, each block to its row of the table.

    query: (heads, T, D). keys: what it attends to, as key and value, (heads, T, D), and visible,
    (heads, T); sparse: the same of the sparse keys, or (). table: (N, K). Returns (heads, T, D).

    A block's keys are copied side by side, so that one fused call serves all blocks.
    """
    G, N = num_global_tokens, len(table)
    key, value, visible = (x[:, None] for x in keys)
    from_globals = dense_attention(query[:, None, :G], key, value, visible[:, :, None],
                                   dropout_p)  # (heads, 1, G, D)
    rows = [torch.cat(both, dim=1) for both in zip(keys, sparse)] or keys
    index = table.clamp(min=0).flatten()
    key, value, visible = (x.index_select(1, index).unflatten(1, table.shape)
                           for x in rows)  # (heads, N, K, D) twice, (heads, N, K)
    mask = (visible & (table >= 0))[:, :, None]  # (heads, N, 1, K)
    query = query[:, G:].unflatten(1, (N, -1))  # (heads, N, block_size, D)
    from_text = dense_attention(query, key, value, mask, dropout_p)
    return torch.cat([from_globals[:, 0], from_text.flatten(1, 2)], dim=1)


def dense_attention(query, key, value, mask=None, dropout_p=0.0, is_causal=False):
    """`scaled_dot_product_attention`, written out where that is slow: on a CPU for few queries of
    many keys, and in bfloat16 also for a block of them, and for training.

    query (…, T, D); key, value (…, K, D); mask (…, 1 or T, K), True where seen.
    """
    half = query.dtype == torch.bfloat16
    few = query.shape[-2] <= (256 if half else 8)
    if not (query.is_cpu and (few or half and torch.is_grad_enabled())):
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal)
    query = query / math.sqrt(query.shape[-1])
    # (…, T, K). In float32 a product whose left-hand factor has more rows is the faster one.
    scores = query @ key.mT if half else (key @ query.mT).mT
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    return F.dropout(scores.softmax(-1), dropout_p) @ value


# ------------------------------------------------------------------------------------------------
# The six ways to thin out the text. Each takes key, value (B, H, length, D) and visible
# (B, 1, length) without the globals, and returns what is left: (B, H, S, D) twice and (B, H, S),
# where S = length / sparsity_factor. A key made of padding alone is not visible.


def select(first_query, key, value, visible, block_size, chunk, factor, sparsity_type, pre_rounds):
    """The sparse keys, their values and which of them are visible."""
    B, H, _, _ = key.shape
    if factor == 1:
        return key, value, visible.expand(-1, H, -1)
    if sparsity_type == "norm":
        return take(key, value, visible, largest_norm(key, visible, chunk, factor))
    if sparsity_type == "stride":
        return take(key, value, visible, stride(key, factor))
    if sparsity_type == "block_stride":
        return take(key, value, visible, block_stride(key, block_size, factor))
    if sparsity_type == "pooling":
        return pooling(key, value, visible, factor)
    if sparsity_type == "lsh" and chunk // factor > 1:
        return lsh(key, value, visible, chunk, factor, pre_rounds)
    return bos_pooling(first_query, key, value, visible, factor)


def take(key, value, visible, index):
    """The keys at `index` (B or 1, H, S), with their values and their share of the mask."""
    B, H, length, _ = key.shape
    index = index.expand(B, H, -1)
    # With all heads end to end, whole rows are looked up, which is far faster than `gather`.
    rows = index + torch.arange(0, B * H * length, length, device=key.device).view(B, H, 1)
    key, value = (F.embedding(rows, x.flatten(0, 2)) for x in (key, value))
    return key, value, visible.expand(-1, H, -1).gather(2, index)


def largest_norm(key, visible, chunk, factor):
    """norm: of each chunk, the keys of largest norm, 1 in `factor`: those that weigh most."""
    norm = key.detach().norm(dim=-1).masked_fill(~visible, -1)  # (B, H, length)
    # from short to long, which matters where a window of sparse keys ends within a chunk
    index = norm.unflatten(2, (-1, chunk)).topk(chunk // factor).indices.flip(-1)
    first = torch.arange(0, key.shape[2], chunk, device=key.device)[:, None]
    return (index + first).flatten(2)  # (B, H, S)


def stride(key, factor):
    """stride: every `factor`-th key, each head starting one further: heads share the work."""
    _, H, length, _ = key.shape
    index = torch.arange(0, length, factor, device=key.device)
    return (index + torch.arange(H, device=key.device)[:, None] % factor)[None]  # (1, H, S)


def block_stride(key, block_size, factor):
    """block_stride: of each block one run of block_size // factor keys, each head the next one."""
    _, H, length, _ = key.shape
    run = block_size // factor
    head = torch.arange(H, device=key.device)[:, None, None]
    index = (head * run + torch.arange(run, device=key.device)) % block_size
    first = torch.arange(0, length, block_size, device=key.device)[:, None]
    return (first + index).flatten(1)[None]  # (1, H, S)


def pooling(key, value, visible, factor):
    """pooling: the mean of every `factor` neighbours, padding left out."""
    seen = visible.unflatten(2, (-1, factor))  # (B, 1, S, factor)
    weight = (seen / (seen.sum(-1, keepdim=True) + 1e-6)).to(key.dtype)
    return blend(key, weight), blend(value, weight), seen.any(-1).expand(-1, key.shape[1], -1)


def bos_pooling(first_query, key, value, visible, factor):
    """bos_pooling: the mean of `factor` neighbours, weighted as the first query sees them."""
    seen, D = visible.unflatten(2, (-1, factor)), key.shape[-1]
    score = (key @ first_query[..., None] / math.sqrt(D)).view(*key.shape[:2], -1, factor)
    weight = score.masked_fill(~seen, torch.finfo(score.dtype).min).softmax(-1)  # (B, H, S, factor)
    return blend(key, weight), blend(value, weight), seen.any(-1).expand(-1, key.shape[1], -1)


def blend(x, weight):
    """Weighted sums of neighbours: x (B, H, length, D), weight (B, H or 1, S, factor)."""
    factor = weight.shape[-1]
    return sum(weight[..., i, None] * x[:, :, i::factor] for i in range(factor))  # (B, H, S, D)


def lsh(key, value, visible, chunk, factor, pre_rounds):
    """lsh: of each chunk, the means of keys that fall into the same bucket of a random hash.

    `pre_rounds` rounds into as many buckets as there are keys come first: they join what is nearly
    equal, so that a frequent token does not outweigh the rest of its bucket in the last round.
    """
    dtype, H = key.dtype, key.shape[1]
    count = visible.expand(-1, H, -1)[..., None].to(torch.promote_types(dtype, torch.float32))
    parts = [(x * count).unflatten(2, (-1, chunk)) for x in (key, value, count)]  # (B,H,n,chunk,D)
    for buckets in [chunk] * pre_rounds + [chunk // factor]:
        parts = lsh_round(*parts, buckets)
    key, value, count = (x.flatten(2, 3) for x in parts)  # sums so far
    return ((key / (count + 1e-8)).to(dtype), (value / (count + 1e-8)).to(dtype), count[..., 0] > 0)


def lsh_round(key, value, count, buckets):
    """Sum up each bucket: the keys nearest to one of `buckets // 2` directions, or its opposite."""
    _, H, _, _, D = key.shape
    directions = torch.randn(1, H, 1, D, buckets // 2, device=key.device).to(key.dtype)
    with torch.no_grad():
        cosine = (F.normalize(key, dim=-1) * count.clamp(0, 1)) @ directions
        bucket = torch.cat([cosine, -cosine], dim=-1).argmax(-1)[..., None, :]
        members = bucket == torch.arange(buckets, device=key.device)[:, None]
        members = members.to(key.dtype)  # (B, H, n, buckets, chunk): a sum is a matrix product
    return [members @ x for x in (key, value, count)]  # (B, H, n, buckets, D or 1)


SPARSITY_TYPES = "norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling", "none", None


def check_options(block_size, sparse_block_size, sparsity_factor, sparsity_type,
                  num_global_tokens, lsh_num_pre_rounds):
    """Raise ValueError, naming the values and the remedy, where options do not fit together."""
    if sparsity_type not in SPARSITY_TYPES:
        raise ValueError(f"unknown sparsity_type {sparsity_type!r}: choose one of {SPARSITY_TYPES}")
    if block_size < 1 or min(sparse_block_size, num_global_tokens, lsh_num_pre_rounds) < 0:
        raise ValueError(f"{block_size=}, {sparse_block_size=}, {num_global_tokens=}, "
                         f"{lsh_num_pre_rounds=}: block_size is at least 1, the others at least 0")
    if not sparse_block_size or sparsity_factor <= 0 or sparsity_type in ("none", None):
        return
    if block_size % sparsity_factor:
        raise ValueError(f"{block_size=} is not divisible by {sparsity_factor=}: "
                         "choose a sparsity_factor that divides it")
    chunk = min(block_size, sparse_block_size)
    if sparsity_type in ("norm", "lsh") and sparsity_factor > 1 and (
            block_size % chunk or chunk % sparsity_factor):
        raise ValueError(
            f"{sparsity_type} thins out chunks of min({block_size=}, {sparse_block_size=}) tokens, "
            f"which must divide block_size and be divisible by {sparsity_factor=}")


class LSGSelfAttention(nn.Module):
    """Multi-head self-attention with LSG, under mBART's names; `options` as for `lsg_attention`."""

    def __init__(self, embed_dim, num_heads, *, dropout=0.0, linear=nn.Linear, **options):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"{embed_dim=} is not divisible by {num_heads=}")
        self.num_heads, self.dropout, self.options = num_heads, dropout, options
        self.k_proj = linear(embed_dim, embed_dim)
        self.v_proj = linear(embed_dim, embed_dim)
        self.q_proj = linear(embed_dim, embed_dim)
        self.out_proj = linear(embed_dim, embed_dim)

    def forward(self, hidden_states, attention_mask=None):
        """hidden_states (B, T, embed_dim), the globals first; attention_mask (B, T)."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj))  # (B, H, T, D)
        context = lsg_attention(query, key, value, attention_mask, **self.options,
                                dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(context.transpose(1, 2).flatten(2))  # (B, T, embed_dim)


# ------------------------------------------------------------------------------------------------
# Who sees whom? `python lsg.py` draws it.


def who_sees_whom(length, **options):
    """Rows of queries and columns of keys, as `lsg_attention` itself has it: "." is a key that is
    not seen, "g" global, "l" local, and sparse is "S" or, where it counts less than average, "s".

    With the identity for values, what attention returns is its weights.
    """
    G, block_size = options["num_global_tokens"], options["block_size"]
    with torch.random.fork_rng(devices=[]):  # which leaves the caller's random numbers alone
        torch.manual_seed(0)
        query, key = torch.randn(2, 1, 1, G + length, 16)  # one text, one head
        weights = lsg_attention(query, key, torch.eye(G + length)[None, None], **options)[0, 0]

    block = (torch.arange(G + length) - G).div(block_size, rounding_mode="floor")
    kind = 2 * ((block[:, None] - block).abs() <= 1)
    kind[:G], kind[:, :G] = 1, 1
    sparse = (kind == 0) & (weights > 0)
    average = (weights * sparse).sum(1, keepdim=True) / sparse.sum(1, keepdim=True)
    kind[sparse] = torch.where(weights < average, 3, 4)[sparse]
    kind[weights == 0] = 0
    return ["".join(".glsS"[k] for k in row) for row in kind.tolist()]


def svg(pictures):
    """Pictures, {title: rows of characters}, side by side as an SVG."""
    colours = {"g": "#d08700", "l": "#2f6f9f", "s": "#e8a59d", "S": "#c0392b"}
    size = len(next(iter(pictures.values())))
    step, parts = size + 6, []
    for i, (title, rows) in enumerate(pictures.items()):
        parts.append(f'<text x="{i * step}" y="-3" font-size="8" '
                     f'font-family="sans-serif">{title}</text>'
                     f'<path d="M{i * step} 0h{size}v{size}h-{size}z" fill="#f2f2f2"/>')
        for kind, colour in colours.items():
            runs = [f"M{i * step + run.start()} {y + 0.5}h{run.end() - run.start()}"
                    for y, row in enumerate(rows) for run in re.finditer(f"{kind}+", row)]
            parts.append(f'<path d="{"".join(runs)}" stroke="{colour}"/>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-2 -12 {step * len(pictures)} '
            f'{size + 14}">\n' + "\n".join(parts) + "\n</svg>\n")


def main():
    parser = argparse.ArgumentParser(description="Draw which keys (across) each query (down) sees.")
    for option, default in (("--length", 64), ("--block-size", 8), ("--sparse-block-size", 8),
                            ("--sparsity-factor", 4), ("--num-global-tokens", 1)):
        parser.add_argument(option, type=int, default=default, help="default: %(default)s")
    parser.add_argument("--sparsity-type", choices=SPARSITY_TYPES[:-1], help="default: all six")
    parser.add_argument("--svg", metavar="FILE", help="draw there instead of in the terminal")
    options = vars(parser.parse_args())
    file, chosen = options.pop("svg"), options.pop("sparsity_type")
    pictures = {kind: who_sees_whom(**options, sparsity_type=kind)
                for kind in ([chosen] if chosen else SPARSITY_TYPES[:6])}
    if file:
        with open(file, "w", encoding="utf-8") as out:
            out.write(svg(pictures))
    else:
        for kind, rows in pictures.items():
            print(f"\n{kind}", *rows, sep="\n")


if __name__ == "__main__":
    main()
