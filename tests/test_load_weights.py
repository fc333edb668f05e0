"""Loading and saving: names and formats of tensors, conversion, broken files, and older models."""

import json
import os
import re
import resource
import signal
import sys
import time
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from barthez import ARCHITECTURES, load_model, save_model
from conftest import GOLDENS, assert_close
from load_weights import GLOBALS, POSITIONS, read_tensors, reading
from test_cli import PLAIN, POINTER, TENSORS, fork, make_checkpoint
from tokenizer import BarthezTokenizer

SHARED, *COPIES = NAMES = [
    "model.shared.weight", "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight", "lm_head.weight"]  # of one and the same matrix
IDS = torch.tensor([[0, *range(20, 57), 2]])
WEIGHTS = (PLAIN / "model.safetensors").read_bytes()
reads_bin = pytest.mark.skipif(torch.__version__ < (2, 10), reason="this torch reads no .bin")


@pytest.fixture
def folder(tmp_path):
    """A copy of plain/ that a test may damage."""
    return make_checkpoint(tmp_path)


def save_bin(folder, content, zipped=True):
    """Replace the weights by pytorch_model.bin."""
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


def load(folder, **options):
    return load_model(folder, **options)[0]


@torch.no_grad()
def logits_of(model):
    return model(IDS).logits


@pytest.fixture(scope="module")
def plain_logits():
    return logits_of(load(PLAIN, lsg=False))


# ------------------------------------------------------------------------------------------------
# Loading


def test_a_loaded_model_is_ready_to_use():
    model = load(str(PLAIN), lsg=False)
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in TENSORS.items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_global_tokens_are_positions_plus_bos_or_mask():
    rows = load(PLAIN).get_parameter(GLOBALS)
    positions, words = TENSORS[POSITIONS[0]][2:], TENSORS[SHARED]
    assert_close(rows[0], positions[0] + words[0], 1e-6)
    for row, position in ((1, 64), (15, 960), (16, 2), (17, 66), (511, 1022)):
        assert_close(rows[row], positions[position] + words[180], 1e-6)


@pytest.mark.parametrize("lsg", [False, True])
@pytest.mark.parametrize("length", [None, 5, 1025, 2051])
def test_positions_are_repeated_or_cut_to_any_length(length, lsg):
    """A plain BARThez becomes LSG with 4,096 positions by default, or stays as it is."""
    model, tokenizer = load_model(PLAIN, lsg=lsg, max_position_embeddings=length)
    length = length or (4096 if lsg else 1024)
    assert model.config.max_position_embeddings == tokenizer.model_max_length == length
    assert model.config.lsg == (GLOBALS in model.state_dict()) == lsg
    for name in POSITIONS:
        table, source = model.get_parameter(name), TENSORS[name]
        assert len(table) == length + 2
        assert torch.equal(table[:2], source[:2])
        assert torch.equal(table[2:], source[2:][torch.arange(length) % 1024])


def test_an_lsg_model_keeps_its_globals_when_it_becomes_longer(tmp_path):
    model, tokenizer = load_model(PLAIN, max_position_embeddings=1100)
    with torch.no_grad():
        model.get_parameter(GLOBALS).normal_()
    save_model(model, tokenizer, tmp_path)
    same, longer = load(tmp_path), load(tmp_path, max_position_embeddings=1300)
    assert same.config.max_position_embeddings == 1100  # and not 4096: it is no plain BARThez
    for other in same, longer:
        assert torch.equal(other.get_parameter(GLOBALS), model.get_parameter(GLOBALS))
    table = model.get_parameter(POSITIONS[0])
    assert torch.equal(longer.get_parameter(POSITIONS[0]), torch.cat([table, table[2:202]]))
    assert GLOBALS not in load(tmp_path, lsg=False).state_dict()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["ForConditionalGeneration", "ForSequenceClassification"])
def test_all_weights_have_the_type_that_is_asked_for_or_float32(folder, kind):
    make_checkpoint(folder, {name: tensor.half() for name, tensor in TENSORS.items()})
    for options in {}, {"dtype": torch.bfloat16}:
        model = load(folder, lsg=False, device="cpu", architecture=kind, **options)
        expected = options.get("dtype", torch.float32)
        assert {weights.dtype for weights in model.parameters()} == {expected}


def test_generation_config_is_merged_into_config_json(folder):
    (folder / "generation_config.json").write_text('{"num_beams": 6, "max_new_tokens": 76}')
    save_model(*load_model(folder, lsg=False), folder)
    assert not (folder / "generation_config.json").exists()
    settings = load(folder, lsg=False).generation_config
    assert (settings.num_beams, settings.max_length, settings.no_repeat_ngram_size) == (6, 77, 3)


@pytest.mark.parametrize("text", [300_000 * " ", "a" + 300_000 * "\n" + "b <mask>",
                                  30_000 * "  <mask>", 300_000 * "<", 100_000 * "é"])
def test_the_tokenizer_takes_time_linear_in_the_text(text):
    tokenizer = BarthezTokenizer(PLAIN / "sentencepiece.bpe.model")
    start = time.process_time()
    tokenizer.encode(text)
    assert time.process_time() - start < 5


# ------------------------------------------------------------------------------------------------
# One matrix under four names


@pytest.mark.parametrize("names", [*([name] for name in COPIES), COPIES[:2], NAMES], ids=str)
@pytest.mark.parametrize("lsg", [False, True])
def test_tied_weights_may_have_any_of_their_names(folder, names, lsg, plain_logits):
    """SHARED is the one that is saved."""
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != SHARED}
    make_checkpoint(folder, tensors | {name: TENSORS[SHARED].clone() for name in names})
    model, tokenizer = load_model(folder, lsg=lsg)
    parameters = [model.state_dict(keep_vars=True)[name] for name in NAMES]
    assert all(parameter is parameters[0] for parameter in parameters)
    assert torch.equal(parameters[0], TENSORS[SHARED])
    if not lsg:
        assert torch.equal(logits_of(model), plain_logits)
    save_model(model, tokenizer, folder)
    saved = load_file(folder / "model.safetensors")
    assert [name for name in NAMES if name in saved] == [SHARED]


def test_untied_weights_can_be_tied_and_saved(folder):
    other = torch.randn(181, 24)
    make_checkpoint(folder, TENSORS | {"lm_head.weight": other}, tie_word_embeddings=False)
    model = load(folder, lsg=False)
    assert torch.equal(model.lm_head.weight, other)
    assert torch.equal(model.model.shared.weight, TENSORS[SHARED])
    assert model.model.encoder.embed_tokens.weight is model.model.shared.weight
    save_model(*load_model(folder, lsg=False, tie_word_embeddings=True), folder)
    assert torch.equal(load(folder, lsg=False).lm_head.weight, TENSORS[SHARED])


@reads_bin
@pytest.mark.parametrize("names", [[SHARED, "lm_head.weight"], ["lm_head.weight"]], ids=str)
def test_tied_weights_can_be_untied(folder, names):
    """lm_head begins as a copy, and shares no memory."""
    others = {name: tensor for name, tensor in TENSORS.items() if name != SHARED}
    save_bin(folder, others | dict.fromkeys(names, TENSORS[SHARED]))
    model = load(folder, lsg=False, tie_word_embeddings=False)
    head, embedding = model.lm_head.weight, model.model.shared.weight
    assert torch.equal(head, embedding) and head.data_ptr() != embedding.data_ptr()


def test_a_file_may_lack_the_prefix_and_the_bias_and_have_old_names(folder, plain_logits):
    """The file of a model without a head, saved by an old program."""
    tensors = {name.removeprefix("model."): tensor for name, tensor in TENSORS.items()
               if name != "final_logits_bias"}
    make_checkpoint(folder, tensors | {"encoder.version": torch.tensor([2.0])})
    expected = plain_logits - TENSORS["final_logits_bias"]
    assert_close(logits_of(load(folder, lsg=False)), expected)


# ------------------------------------------------------------------------------------------------
# pytorch_model.bin


@reads_bin
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_bin_file_is_read_as_well(folder, zipped, plain_logits):
    # As published: one tensor under several names.
    save_bin(folder, TENSORS | {name: TENSORS[SHARED] for name in COPIES}, zipped)
    model = load(folder, lsg=False)
    assert torch.equal(logits_of(model), plain_logits)
    assert model.lm_head.weight is model.model.shared.weight


def test_safetensors_are_preferred_to_a_bin_file(folder, plain_logits):
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert torch.equal(logits_of(load(folder, lsg=False)), plain_logits)


def test_an_older_torch_refuses_a_bin_file(folder, monkeypatch):
    save_bin(folder, TENSORS)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    with pytest.raises(ValueError, match="torch 2.10, or .*safetensors"):
        load(folder)


class Bomb:
    """Pickled as a call that makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


@reads_bin
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickled_code_is_not_run(folder, zipped, monkeypatch):
    monkeypatch.chdir(folder)
    save_bin(folder, TENSORS | {"bomb": Bomb()}, zipped)
    with pytest.raises(ValueError, match="pytorch_model.bin") as error:
        load(folder)
    assert not (folder / "exploded").exists()
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


@reads_bin
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [
    lambda: {"a": torch.eye(9).to_sparse_coo()}, lambda: {"a": torch.ones(9, device="meta")},
    lambda: {"a": torch.quantize_per_tensor(torch.ones(9), 0.1, 0, torch.qint8)},
    lambda: {"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
    lambda: {"a": TENSORS}, lambda: {5: torch.ones(9)}, lambda: torch.ones(9)],
    ids=["sparse", "meta", "quantized", "nested", "dict", "name", "tensor"])
def test_only_dense_tensors_come_out_of_a_bin_file(folder, make):
    save_bin(folder, make())
    with pytest.raises(ValueError, match="pytorch_model.bin.*(dense tensor|attribute)"):
        load(folder)


# ------------------------------------------------------------------------------------------------
# Tensors that do not fit


@pytest.mark.parametrize("lsg", [False, True])
def test_missing_unexpected_and_misshapen_tensors_are_reported_together(folder, lsg):
    tensors = dict(TENSORS)
    del tensors["model.encoder.layers.1.fc1.bias"]
    tensors["model.encoder.layers.2.fc1.bias"] = torch.zeros(40)
    tensors["model.decoder.layers.0.fc2.weight"] = torch.zeros(24, 55)
    tensors["model.decoder.layer_norm.bias"] = torch.zeros(24, dtype=torch.int64)
    make_checkpoint(folder, tensors)
    with pytest.raises(ValueError) as error:
        load(folder, lsg=lsg)
    message = str(error.value)
    assert 'Missing key(s) in state_dict: "model.encoder.layers.1.fc1.bias"' in message
    assert 'Unexpected key(s) in state_dict: "model.encoder.layers.2.fc1.bias"' in message
    assert "size mismatch for model.decoder.layers.0.fc2.weight" in message
    assert "model.decoder.layer_norm.bias" in message and "\n" not in message


@pytest.mark.parametrize("lsg", [False, True])
@pytest.mark.parametrize("name", [SHARED, *POSITIONS])
def test_a_missing_table_is_named(folder, name, lsg):
    make_checkpoint(folder, {key: tensor for key, tensor in TENSORS.items() if key != name})
    with pytest.raises(ValueError, match=f"[Mm]issing .*{name}|KeyError: '{name}'"):
        load(folder, lsg=lsg)


@pytest.mark.parametrize("kind, head", [
    ("ForSequenceClassification", "classification_head"), ("ForQuestionAnswering", "qa_outputs")])
def test_a_new_head_is_drawn_with_a_warning(kind, head):
    with pytest.warns(UserWarning, match=f"the checkpoint has no {head}.*needs training"):
        model = load(PLAIN, lsg=False, architecture=kind)
    weights = [p for p in model.get_submodule(head).parameters() if p.dim() == 2]
    assert weights and all(0.003 < weight.std() < 0.1 for weight in weights)
    for name in TENSORS.keys() & model.state_dict().keys():
        assert torch.equal(model.state_dict()[name], TENSORS[name])


@pytest.mark.filterwarnings("error")
def test_a_head_of_the_checkpoint_is_used_without_a_warning(folder):
    head = load_file(GOLDENS / "head_classification_3.safetensors")
    make_checkpoint(folder, TENSORS | head, num_labels=3)
    model = load(folder, lsg=False, architecture="ForSequenceClassification")
    for name, tensor in head.items():
        assert torch.equal(model.get_parameter(name), tensor)
    with pytest.warns(UserWarning, match="another task"):
        load(folder, lsg=False)


# ------------------------------------------------------------------------------------------------
# Broken files


@pytest.mark.parametrize("name, data", [
    ("config.json", b"[1]"), ("config.json", b"\xff\xfe"), ("config.json", b'{"a":' * 100_000),
    ("generation_config.json", b"nonsense"), ("model.safetensors", b""),
    ("model.safetensors", WEIGHTS[:-1]), ("pytorch_model.bin", b""),
    ("pytorch_model.bin", POINTER), ("sentencepiece.bpe.model", b"<html>"),
    ("sentencepiece.bpe.model", POINTER), ("config.json", POINTER)],
    ids=lambda value: value if isinstance(value, str) else len(value))
def test_a_broken_file_is_named_in_one_line(folder, name, data):
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(folder / name))) as error:
        load(folder)
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    if data == POINTER and (name != "pytorch_model.bin" or torch.__version__ >= (2, 10)):
        assert "git lfs pull" in str(error.value)


def test_a_damaged_file_of_the_cache_says_which_file_to_delete(folder):
    (folder / "blobs").mkdir()
    (folder / "model.safetensors").rename(folder / "blobs" / "0123")
    (folder / "model.safetensors").symlink_to("blobs/0123")
    (folder / "blobs" / "0123").write_bytes(WEIGHTS[:1000])
    with pytest.raises(ValueError, match=f"elete {folder}/blobs/0123.* run again"):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "sentencepiece.bpe.model"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"{folder}.* lacks {name}") as error:
        load(folder)
    assert ("moussaKam/barthez" in str(error.value)) == (name == "sentencepiece.bpe.model")


def test_a_sharded_checkpoint_says_what_to_do(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(FileNotFoundError, match="sharded.*max_shard_size"):
        load(folder)


@pytest.mark.parametrize("format", ["safetensors", pytest.param("zip", marks=reads_bin),
                                    pytest.param("legacy", marks=reads_bin)])
@pytest.mark.filterwarnings("ignore")
@given(data=st.data())
def test_a_damaged_file_is_read_or_an_error(tmp_path_factory, format, data):
    """Cut somewhere, and some bytes changed."""
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}
    path = tmp_path_factory.mktemp("damaged") / "pytorch_model.bin"
    if format == "safetensors":
        path = path.with_name("model.safetensors")
        save_file(tensors, path, {"format": "pt"})
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=format == "zip")
    content = path.read_bytes()
    content = bytearray(content[:data.draw(st.integers(1, len(content)))])
    for _ in range(data.draw(st.integers(0, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        with reading(path):
            read_tensors(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error), error


# ------------------------------------------------------------------------------------------------
# Saving


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("options", [
    {"lsg": False}, {"sparsity_type": None, "num_global_tokens": 7},
    {"tie_word_embeddings": False}],
    ids=["dense", "lsg", "untied"])
@pytest.mark.filterwarnings("ignore")
def test_what_is_saved_loads_and_saves_as_the_same_bytes(tmp_path, kind, options):
    model, tokenizer = load_model(PLAIN, architecture=kind, max_position_embeddings=1100,
                                  forced_eos_token_id=None, **options,
                                  id2label={0: "sport", 1: "culture", 2: "science"})
    if "tie_word_embeddings" in options and kind == "ForConditionalGeneration":
        model.lm_head.weight.data.normal_()
    save_model(model, tokenizer, tmp_path / "once")
    again, tokenizer = load_model(tmp_path / "once")
    save_model(again, tokenizer, tmp_path / "twice")
    assert files_of(tmp_path / "once") == files_of(tmp_path / "twice")
    assert type(again) is type(model) and again.config == model.config
    assert again.generation_config == model.generation_config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_a_saved_checkpoint_has_the_published_layout(tmp_path):
    """test_golden.py compares config.json."""
    folder = tmp_path / "new" / "folder"
    save_model(*load_model(PLAIN, max_position_embeddings=1100), folder)
    assert files_of(folder).keys() == {"config.json", "model.safetensors", "tokenizer_config.json",
                                       "sentencepiece.bpe.model"}
    assert load_file(folder / "model.safetensors").keys() == TENSORS.keys() | {GLOBALS}
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 1100


def test_a_dense_checkpoint_stays_dense_unless_lsg_is_asked_for(tmp_path):
    save_model(*load_model(PLAIN, lsg=False), tmp_path)
    assert files_of(tmp_path)["model.safetensors"] == WEIGHTS
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["architectures"] == ["MBartForConditionalGeneration"]
    assert "auto_map" not in settings
    assert not load(tmp_path).config.lsg and load(tmp_path, lsg=True).config.lsg


@reads_bin
def test_tensors_that_share_memory_are_all_saved(folder):
    """As torch.save keeps them: one tensor under several names, and parts of one tensor."""
    names = [f"model.encoder.layers.{layer}.self_attn.{kind}_proj.bias"
             for layer in (0, 1) for kind in "kvq"]
    same, *parts = torch.randn(4 * 24).chunk(4)
    biases = dict(zip(names, [same, same, same, *parts]))
    save_bin(folder, TENSORS | biases | {"lm_head.weight": TENSORS[SHARED]})
    model, tokenizer = load_model(folder, lsg=False, tie_word_embeddings=False)
    save_model(model, tokenizer, folder / "saved")
    again = load(folder / "saved", lsg=False)
    for name, bias in biases.items():
        assert torch.equal(again.get_parameter(name), bias)
    assert torch.equal(again.lm_head.weight, TENSORS[SHARED])


# ------------------------------------------------------------------------------------------------
# Saving over an older model


def small_model(scale=1.0, positions=1100):
    model, tokenizer = load_model(PLAIN, max_position_embeddings=positions)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model, tokenizer


def is_saved_in(folder, model):
    """Whether the folder holds a loadable model that equals this one."""
    saved = load(folder)
    tensors = saved.state_dict()
    return saved.config == model.config and all(
        torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value):
    old, tokenizer = small_model()
    save_model(old, tokenizer, tmp_path)
    new, _ = small_model(2.0)
    new.get_parameter("model.decoder.layers.1.fc2.weight").data[3, 5] = value
    with pytest.raises(ValueError, match="not saved: model.decoder.layers.1.fc2.weight"):
        save_model(new, tokenizer, tmp_path)
    assert is_saved_in(tmp_path, old)


@pytest.mark.parametrize("size", [0, 300_000])
def test_a_full_disk_leaves_the_older_model(tmp_path, size):
    """A file that would be longer than `size` is an error."""
    old, tokenizer = small_model()
    save_model(old, tokenizer, tmp_path)
    names = files_of(tmp_path).keys()
    new, _ = small_model(2.0, 1200)

    def save():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        with pytest.raises(Exception, match="too large"):
            save_model(new, tokenizer, tmp_path)

    assert fork(save) == (0, "", "")
    assert is_saved_in(tmp_path, old) and files_of(tmp_path).keys() == names


def test_a_kill_at_any_point_leaves_the_old_or_the_new_model(tmp_path):
    """The process is killed before it opens or moves a file for the first, second, … time."""
    old, tokenizer = small_model()
    new, _ = small_model(2.0)
    save_model(old, tokenizer, tmp_path)
    found = []

    def save(remaining):
        def kill(event, args):
            nonlocal remaining
            if event in ("open", "os.rename", "os.remove") and str(tmp_path) in str(args):
                remaining -= 1
                if remaining < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        save_model(new, tokenizer, tmp_path)

    for point in range(200):
        status, _, err = fork(partial(save, point))
        assert status in (0, -signal.SIGKILL), err
        found.append("new" if is_saved_in(tmp_path, new) else
                     "old" if is_saved_in(tmp_path, old) else "neither")
        if status == 0:
            break
        save_model(old, tokenizer, tmp_path)
    assert len(found) > 5 and set(found) == {"old", "new"}, found
    assert found[-1] == "new" and not list(tmp_path.glob("*.incomplete"))
