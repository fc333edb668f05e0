"""All numbers that the original computed against ours. See goldens/make_goldens.py."""

import hashlib
import json
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from barthez import build_model, load_model, save_model
from conftest import GOLDENS, assert_close
from load_weights import GLOBALS, POSITIONS, add_globals, read_checkpoint, resize_positions

LSG, GRADIENTS, HEADS, CONVERSION = (
    json.loads((GOLDENS / f"{name}.json").read_text())
    for name in ("lsg", "gradients", "heads", "conversion"))

# Faults of the original that ours does not have. A test fails as soon as one of them agrees.
ONE_KEY = "one sparse key per block: the original's keys on the right begin inside the local window"
FACTOR = "factor 1 with small sparse blocks: the original sees local keys twice and no sparse keys"
NUM_GLOBALS = "an impossible number of global tokens is an error here; the original changes it"
NOT_COPIED = {
    "norm_step_1": ONE_KEY, "pooling_step_1": ONE_KEY, "lsh_step_1": ONE_KEY,
    "stride_step_1": ONE_KEY, "block_stride_step_1": ONE_KEY, "bos_pooling_step_1": ONE_KEY,
    "factor_1_sparse_4": FACTOR, "factor_1_sparse_6": FACTOR,
    "mask_first_no_mask_given": "without attention_mask the original's decoder still sees <s>",
    "globals_0_means_1": NUM_GLOBALS, "globals_600_means_512": NUM_GLOBALS}

# Cases in which the original fails with an error of torch, and our message. Others work here.
IMPOSSIBLE = {"norm_block_16_sparse_12_factor_4": "must divide block_size",
              "lsh_block_16_sparse_12_factor_4": "must divide block_size",
              "adaptive_false_21": "adaptive=True"}


@cache
def tensors_of(name):
    return load_file(GOLDENS / f"{name}.safetensors")


def section(name, prefix):
    """The tensors of a file whose names begin with `prefix`. Their new names lack it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors_of(name).items()
            if key.startswith(prefix)}


@cache
def checkpoint(lsg):
    """The settings and tensors of plain/, read and converted once for all tests."""
    overrides = {"max_position_embeddings": 2100} if lsg else {"lsg": False}
    settings, tensors, _ = read_checkpoint(GOLDENS / "plain", overrides)
    return settings, tensors


def build(changes, lsg=True, architecture=None, head=None):
    settings, tensors = checkpoint(lsg)
    extra = tensors_of(head) if head else {}
    return build_model(settings | changes, tensors | extra, architecture)


def run(case):
    model = build(case["settings"], case.get("lsg", True))
    inputs = section("lsg", f"inputs/{case['input']}/")
    if not case.get("mask", True):
        del inputs["attention_mask"]
    if case["seed"] is not None:
        torch.manual_seed(case["seed"])
    return model, model(**inputs)


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["name"])


@each([case for case in LSG["cases"] if case["name"] not in NOT_COPIED])
def test_states_logits_and_loss_equal_the_original(case):
    with torch.no_grad():
        _, out = run(case)
    for name, expected in section("lsg", case["name"] + "/").items():
        assert_close(getattr(out, name), expected)
    assert out.loss.item() == pytest.approx(case["loss"], abs=1e-5, rel=0)


@each([case for case in LSG["cases"] if case["name"] in NOT_COPIED])
def test_repaired_faults_give_other_numbers(case):
    try:
        with torch.no_grad():
            _, out = run(case)
    except ValueError:
        return
    differences = [(getattr(out, name) - expected).abs().max()
                   for name, expected in section("lsg", case["name"] + "/").items()]
    assert max(differences) > 1e-3


@each([case for case in LSG["errors"] if case["name"] in IMPOSSIBLE])
def test_an_impossible_option_is_an_error_that_names_the_remedy(case):
    with pytest.raises(ValueError, match=IMPOSSIBLE[case["name"]]):
        run(case)


@each([case for case in LSG["errors"] if case["name"] not in IMPOSSIBLE])
def test_cases_that_fail_in_the_original_work_here(case):
    with torch.no_grad():
        _, out = run(case)
        _, local = run(case | {"settings": case["settings"] | {"sparsity_type": "none"}})
    assert out.encoder_last_hidden_state.isfinite().all()
    assert (out.encoder_last_hidden_state - local.encoder_last_hidden_state).abs().max() > 1e-2


@each(GRADIENTS["cases"])
def test_gradients_equal_the_original(case):
    model, out = run(case)
    model.zero_grad()
    out.loss.backward()
    parameters = dict(model.named_parameters())
    expected = section("gradients", case["name"] + "/")
    assert expected.keys() == case["rows"].keys()
    for name, rows in case["rows"].items():
        gradient = parameters[name].grad
        if rows is not None:
            first, last = rows
            assert not gradient[:first].any() and not gradient[last:].any(), name
            gradient = gradient[first:last]
        assert_close(gradient, expected[name])
    assert out.loss.item() == pytest.approx(case["loss"], abs=1e-5, rel=0)


@each(HEADS["cases"])
@torch.no_grad()
def test_heads_equal_the_original(case):
    model = build(case["settings"], architecture=case["architecture"], head=case["weights"])
    inputs = section("heads", case["name"] + "/inputs/")
    assert sorted(inputs) == case["inputs"]
    padding = inputs.pop("decoder_attention_mask", None)
    out = model(**inputs)
    if padding is not None:  # our heads have no such argument, but the decoder has
        states, document_visible = model.encoder(inputs["input_ids"], inputs["attention_mask"])
        cross_kv = model.decoder.cross_kv(states)
        out.last_hidden_state = model.decoder(inputs["decoder_input_ids"], cross_kv,
                                              document_visible, padding)
    for name, expected in section("heads", case["name"] + "/").items():
        if not name.startswith("inputs/"):
            assert_close(getattr(out, name), expected)
    if case["loss"] is None:
        assert out.loss is None
    else:
        assert out.loss.item() == pytest.approx(case["loss"], abs=1e-5, rel=0)


@pytest.fixture(scope="module")
def random_globals(tmp_path_factory):
    """A saved LSG checkpoint with the recorded random global embeddings."""
    folder = tmp_path_factory.mktemp("random_globals")
    model, tokenizer = load_model(GOLDENS / "plain", max_position_embeddings=2100)
    recorded = tensors_of("conversion")["random/global_embeddings"]
    model.model.encoder.global_embeddings.weight.data.copy_(recorded)
    save_model(model, tokenizer, folder)
    return folder


def converted(case, random_globals):
    """The tensors of a case of conversion.json."""
    length = case["options"]["length"]
    if case["source"] == "random":
        model, _ = load_model(random_globals, max_position_embeddings=length)
        return model.state_dict()
    settings, tensors, tokenizer = read_checkpoint(GOLDENS / "plain", {"lsg": False})
    rows = case["plain_positions"] + 2
    tensors = tensors | {table: tensors[table][:rows] for table in POSITIONS}
    if case["seed"] is not None:
        torch.manual_seed(case["seed"])
    tensors = add_globals(tensors, tokenizer, case["options"].get("stride", 64))
    return resize_positions(settings, tensors, length)[1]


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@each(CONVERSION["cases"])
def test_conversions_equal_the_original(case, random_globals):
    tensors, length = converted(case, random_globals), case["options"]["length"]
    for table, expected in zip(POSITIONS, (case["encoder_positions"], case["decoder_positions"])):
        # The original counts the two unused rows when it computes the number of copies, and so
        # lacks the last positions of some lengths. Ours has all.
        rows, columns = expected["shape"]
        assert tensors[table].shape == (length + 2, columns) and rows <= length + 2
        assert digest(tensors[table][:rows]) == expected["sha256"]
        assert torch.equal(tensors[table][rows:], tensors[table][2:length + 4 - rows])
    expected = section("conversion", case["name"] + "/").get("global_embeddings")
    if expected is None:
        assert digest(tensors[GLOBALS]) == case["global_embeddings"]["sha256"]
    else:
        assert_close(tensors[GLOBALS], expected)


@each(CONVERSION["errors"])
def test_an_impossible_stride_is_an_error_that_names_it(case, random_globals):
    with pytest.raises(ValueError, match=f"stride of {case['options']['stride']}"):
        converted(case, random_globals)


def test_the_original_reads_our_checkpoints(tmp_path):
    """The original read the same folder when the goldens were made."""
    recorded = json.loads((GOLDENS / "saved.json").read_text())
    save_model(*load_model(GOLDENS / "plain", **recorded["overrides"]), tmp_path)
    assert (tmp_path / "config.json").read_text() == recorded["config"]
    model, tokenizer = load_model(tmp_path)
    inputs = section("lsg", f"inputs/{recorded['input']}/")
    assert_close(model(**inputs).logits, tensors_of("saved")["logits"])
    ids = model.generate(inputs["input_ids"], inputs["attention_mask"], max_length=20)
    assert ids.tolist() == recorded["ids"]
    assert tokenizer.encode(recorded["text"]) == recorded["text_ids"]
    assert tokenizer.model_max_length == recorded["model_max_length"]
