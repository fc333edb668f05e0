"""Each difference that docs/differences.md lists, shown on small texts and models.

The original is not needed. Its numbers, where they matter, are those of goldens/. Some differences
are shown by another file of tests; the page then names that file.
"""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

import beam_search
from barthez import load_model
from conftest import GOLDENS, assert_close
from cpu import fast_attention
from load_weights import GLOBALS, POSITIONS, add_globals, read_checkpoint, resize_positions
from lsg import full_attention, lsg_attention

ROOT = Path(__file__).parent.parent
SELECTIONS = "norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling"
EOS, PAD = 2, 1
every_selection = pytest.mark.parametrize("kind", SELECTIONS)


def model(architecture=None, lsg=True, dtype=None, **changes):
    """goldens/plain as an LSG model with blocks of 8; `changes` are keys of its config."""
    sizes = {"block_size": 8, "sparse_block_size": 8} if lsg else {}
    return load_model(GOLDENS / "plain", architecture=architecture, lsg=lsg, dtype=dtype,
                      **sizes | changes)[0]


def text(length):
    ids = torch.randint(4, 180, (1, length))
    ids[0, 0], ids[0, -1] = 0, EOS
    return ids


def padded(ids, length):
    """The ids with padding up to `length`, and their mask."""
    padding = 0, length - ids.shape[1]
    return F.pad(ids, padding, value=PAD), F.pad(torch.ones_like(ids), padding)


def golden(name):
    with safe_open(GOLDENS / "lsg.safetensors", "pt") as file:
        return file.get_tensor(name)


def weights(query, key, **options):
    """The weights of attention (H, T, T). With the identity as values, it returns them."""
    H, T = query.shape[1:3]
    return lsg_attention(query, key, torch.eye(T).expand(1, H, T, T), **options)[0]


# ------------------------------------------------------------------------------------------------
# The page


def test_the_page_and_the_tests_name_each_other():
    page = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
    here = Path(__file__).name
    named = {(file or here, name) for file, name in re.findall(
        r"`(?:(test_\w+\.py)::)?(test_\w+)`", page)}
    tests = {(file.name, name) for file in Path(__file__).parent.glob("test_*.py")
             for name in re.findall(r"^def (test_\w+)", file.read_text("utf-8"), re.M)}
    assert not named - tests, "the page names tests that do not exist"
    unnamed = {name for file, name in tests - named if file == here}
    assert unnamed == {"test_the_page_and_the_tests_name_each_other"}


# ------------------------------------------------------------------------------------------------
# Sparse keys


@pytest.mark.parametrize("block_size, sparse_block_size, factor", [
    (8, 4, 4), (8, 8, 8), (8, 16, 8), (32, 8, 8)])
def test_lsh_with_one_key_per_chunk_is_bos_pooling(block_size, sparse_block_size, factor):
    query, key, value = torch.randn(3, 2, 3, 1 + 5 * block_size, 6)
    options = {"block_size": block_size, "sparse_block_size": sparse_block_size,
               "sparsity_factor": factor}
    lsh, bos_pooling = (lsg_attention(query, key, value, sparsity_type=kind, **options)
                        for kind in ("lsh", "bos_pooling"))
    assert torch.equal(lsh, bos_pooling)


@pytest.mark.parametrize("chunk, filled", [(6, 2), (8, 4)])  # of 3 and of 4 buckets
def test_lsh_fills_an_even_number_of_buckets(chunk, filled):
    most = 0
    for _ in range(20):  # draws
        query, key = torch.randn(2, 1, 1, 1 + 5 * chunk, 16)
        row = weights(query, key, block_size=chunk, sparse_block_size=chunk, sparsity_factor=2,
                      sparsity_type="lsh", lsh_num_pre_rounds=0)[0, 1]
        of_chunk = row[1 + 2 * chunk:1 + 3 * chunk].tolist()  # a chunk outside the local keys
        most = max(most, len({round(weight, 6) for weight in of_chunk}))
    assert most == filled  # the tokens of one bucket have the same weight


@pytest.mark.parametrize("kind, seen", [("stride", "xx.." * 2), ("block_stride", "xxxx....")])
def test_strides_never_choose_some_tokens_if_heads_are_few(kind, seen):
    query, key = torch.randn(2, 1, 2, 1 + 40, 16)  # two heads, a factor of four
    by_any = (weights(query, key, sparsity_type=kind, block_size=8, sparse_block_size=8,
                      sparsity_factor=4) > 0).any(0)
    for block in range(2, 5):
        columns = by_any[1, 1 + 8 * block:9 + 8 * block]
        assert "".join(".x"[x] for x in columns.tolist()) == seen


# ------------------------------------------------------------------------------------------------
# mask_first_token


def test_mask_first_token_does_not_change_the_mask_of_the_caller():
    mask = torch.ones(1, 77, dtype=torch.bool)
    model(mask_first_token=True)(text(77), mask)
    assert mask.all()


@torch.no_grad()
def test_mask_first_token_needs_no_mask():
    ids, labels = golden("inputs/one_77/input_ids"), golden("inputs/one_77/labels")
    out = model(mask_first_token=True)(ids, labels=labels)
    # The original agrees if it is given a mask of ones, but not without a mask.
    assert_close(out.encoder_last_hidden_state, golden("mask_first/encoder_last_hidden_state"))
    cases = json.loads((GOLDENS / "lsg.json").read_text())["cases"]
    losses = {case["name"]: case["loss"] for case in cases}
    assert out.loss.item() == pytest.approx(losses["mask_first"], abs=1e-5, rel=0)
    assert abs(out.loss.item() - losses["mask_first_no_mask_given"]) > 1e-3


def test_mask_first_token_implies_pool_with_global():
    ids, cut = text(77), {"mask_first_token": True, "pass_global_tokens_to_decoder": False}
    pooled, _ = model(pool_with_global=True, **cut).model.encoder(ids)
    not_pooled, _ = model(pool_with_global=False, **cut).model.encoder(ids)
    whole, _ = model(mask_first_token=True).model.encoder(ids)  # the global token comes first
    assert torch.equal(pooled, not_pooled)
    assert_close(pooled, torch.cat([whole[:, :1], whole[:, 2:]], dim=1))


# ------------------------------------------------------------------------------------------------
# Lengths and conversion


def test_a_text_may_fill_all_positions():
    ids = text(77)  # padding to whole blocks would need 80
    all_taken, _ = model(max_position_embeddings=77).model.encoder(ids)
    some_left, _ = model(max_position_embeddings=100).model.encoder(ids)
    assert torch.equal(all_taken, some_left)


def test_conversion_changes_only_positions_and_globals():
    settings, tensors, tokenizer = read_checkpoint(GOLDENS / "plain", {"lsg": False})
    before = dict(settings), dict(tensors)
    new_tensors = add_globals(tensors, tokenizer)
    new_settings, new_tensors = resize_positions(settings, new_tensors, 1500)
    assert settings == before[0] and tensors.keys() == before[1].keys()
    assert new_settings == settings | {"max_position_embeddings": 1500}
    assert new_tensors.keys() == tensors.keys() | {GLOBALS}
    for name, tensor in before[1].items():
        assert tensors[name] is tensor, "the argument has changed"
        if name not in POSITIONS:
            assert torch.equal(new_tensors[name], tensor), name


# ------------------------------------------------------------------------------------------------
# Options


def test_the_names_on_the_model_card_are_accepted():
    config = model(attention_probs_dropout_prob=0.25, lsg_num_pre_rounds=3).config
    assert config.attention_dropout == 0.25 and config.lsh_num_pre_rounds == 3


@pytest.mark.parametrize("option", [
    "head_mask", "inputs_embeds", "output_attentions", "output_hidden_states", "encoder_outputs",
    "decoder_attention_mask", "return_dict"])
def test_options_that_are_not_included_are_refused(option):
    with pytest.raises(TypeError, match=option):
        model()(text(9), **{option: None})


# ------------------------------------------------------------------------------------------------
# Training


@every_selection
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_selection_trains_in_mixed_precision(kind, dtype):
    trained = model(sparsity_type=kind).train()
    ids, mask = padded(text(25), 70)  # most chunks are padding
    with torch.autocast("cpu", dtype):
        loss = trained(ids, mask, labels=ids[:, :6]).loss
    loss.backward()
    gradient = trained.model.encoder.layers[0].self_attn.k_proj.weight.grad
    assert gradient.isfinite().all() and gradient.abs().max() > 1e-4


# ------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("attention", [full_attention, fast_attention])
@pytest.mark.parametrize("num_queries", [1, 8, 9, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_a_query_without_visible_keys_gets_zeros(attention, num_queries, dtype, training):
    query = torch.randn(2, 3, num_queries, 8, dtype=dtype)
    key, value = torch.randn(2, 2, 3, 10, 8, dtype=dtype)
    leaves = [x.requires_grad_(training) for x in (query, key, value)]
    visible = torch.rand(2, 1, num_queries, 10) < 0.7
    visible[1, :, num_queries // 2] = False
    out = attention(*leaves, visible)
    assert not out[1, :, num_queries // 2].any() and out[0].any()
    if training:
        out.float().square().sum().backward()
        assert all(x.grad.isfinite().all() for x in leaves)
        assert not query.grad[1, :, num_queries // 2].any()


@torch.no_grad()
def test_a_row_of_padding_affects_no_other_row():
    ids, mask = text(20).repeat(2, 1), torch.ones(2, 20)
    mask[1] = 0
    for encoder in model(lsg=False).model.encoder, model().model.encoder:
        states, _ = encoder(ids, mask)
        assert states.isfinite().all()
        assert_close(states[:1], encoder(ids[:1])[0])


def test_beams_are_scored_in_single_precision(monkeypatch):
    dtypes, forbid = [], beam_search.forbid

    def recording(log_probs, *inputs):
        dtypes.append(log_probs.dtype)
        return forbid(log_probs, *inputs)

    monkeypatch.setattr(beam_search, "forbid", recording)
    model(dtype=torch.bfloat16).generate(text(20), max_length=6)
    assert dtypes and set(dtypes) == {torch.float32}


# ------------------------------------------------------------------------------------------------
# Packages


def test_three_packages_are_enough():
    """Fewer for two files that can be copied alone."""
    imports = {}
    for name in "lsg", "barthez", "beam_search", "cpu", "hub", "tokenizer", "load_weights":
        modules = imports[name] = set()
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module.partition(".")[0])
        modules -= set(sys.stdlib_module_names)
    assert imports["lsg"] == {"torch"} and not imports["hub"]
    assert set().union(*imports.values()) - set(imports) == {
        "torch", "safetensors", "sentencepiece"}
