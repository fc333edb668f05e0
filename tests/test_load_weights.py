"""Loading and saving: names and formats of tensors, conversion, and broken files."""

import io
import json
import os
import pickle
import re
import shutil
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

import load_weights
from barthez import ARCHITECTURES, BarthezForSequenceClassification, load_model, save_model
from conftest import GOLDENS, assert_close
from load_weights import (GLOBALS, POSITIONS, convert_to_lsg, parse_settings, read_checkpoint,
                          read_tensors, resize_positions, spread_positions)

PLAIN = GOLDENS / "plain"
TENSORS = load_file(PLAIN / "model.safetensors")
SETTINGS = json.loads((PLAIN / "config.json").read_text())
SHARED, *COPIES = NAMES = [
    "model.shared.weight", "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight", "lm_head.weight"]  # of one and the same matrix
IDS = torch.tensor([[0, *range(20, 57), 2]])
FILES = "config.json", "model.safetensors", "sentencepiece.bpe.model"
WEIGHTS = (PLAIN / "model.safetensors").read_bytes()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 557000000\n"


@pytest.fixture
def folder(tmp_path):
    """A copy of plain/ that a test may damage."""
    for name in FILES:
        shutil.copyfile(PLAIN / name, tmp_path / name)
    return tmp_path


def change_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(SETTINGS | changes))


def load(folder, **options):
    return load_model(folder, **options)[0]


def small_lsg(folder, **options):
    """LSG with blocks so small that a test text has several; fewer positions load faster."""
    return load(folder, **{"block_size": 8, "sparse_block_size": 8,
                           "max_position_embeddings": 1100} | options)


@torch.no_grad()
def logits_of(model):
    return model(IDS).logits


@pytest.fixture(scope="module")
def plain_logits():
    return logits_of(load(PLAIN, lsg=False))


# ------------------------------------------------------------------------------------------------
# Loading


def test_a_loaded_model_is_ready_to_use():
    model, tokenizer = load_model(str(PLAIN), lsg=False)
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.model_max_length == 1024 and len(tokenizer) == 181
    for name, tensor in TENSORS.items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_plain_barthez_is_converted_to_lsg():
    model, tokenizer = load_model(PLAIN)
    assert model.config.lsg and model.config.max_position_embeddings == 4096
    assert tokenizer.model_max_length == 4096
    for name in POSITIONS:
        table = model.get_parameter(name)
        assert torch.equal(table, torch.cat([TENSORS[name][:2]] + 4 * [TENSORS[name][2:]]))
    assert model.get_parameter(GLOBALS).shape == (512, 24)


def test_global_tokens_are_positions_plus_bos_or_mask():
    rows = load(PLAIN).get_parameter(GLOBALS)
    positions, words = TENSORS[POSITIONS[0]][2:], TENSORS[SHARED]
    assert_close(rows[0], positions[0] + words[0], 1e-6)
    for row, position in ((1, 64), (15, 960), (16, 2), (17, 66), (511, 1022)):
        assert_close(rows[row], positions[position] + words[180], 1e-6)


@pytest.mark.parametrize("n, factor, stride", [(1024, 2, 64), (1100, 2, 32), (512, 1, 4),
                                               (2048, 4, 128), (700, 1, 512)])
def test_consecutive_globals_are_a_stride_apart(n, factor, stride):
    """Of every `factor`-th position: first those in steps of `stride`, then the next ones."""
    expected = [start + step for start in range(0, stride, factor)
                for step in range(0, 512 * factor, stride)]
    table = torch.arange(n)[:, None] * torch.tensor([1, -1, 3])
    assert spread_positions(table, stride).tolist() == [[i, -i, 3 * i] for i in expected]


@pytest.mark.parametrize("length", [5, 1024, 1025, 2051])
def test_positions_are_repeated_or_cut_to_any_length(length):
    model = load(PLAIN, max_position_embeddings=length)
    assert model.config.max_position_embeddings == length
    for name in POSITIONS:
        table, source = model.get_parameter(name), TENSORS[name]
        assert len(table) == length + 2
        assert torch.equal(table[:2], source[:2])
        assert torch.equal(table[2:], source[2:][torch.arange(length) % 1024])


def test_a_dense_model_can_be_made_longer_too():
    model, tokenizer = load_model(PLAIN, lsg=False, max_position_embeddings=1500)
    assert len(model.get_parameter(POSITIONS[0])) == 1502 and tokenizer.model_max_length == 1500
    assert GLOBALS not in model.state_dict()


def test_overrides_are_config_keys():
    model = small_lsg(PLAIN, sparsity_type="pooling", num_global_tokens=16, num_beams=7,
                      attention_probs_dropout_prob=0.25)
    assert (model.config.sparsity_type, model.config.num_global_tokens) == ("pooling", 16)
    assert (model.config.num_beams, model.config.attention_dropout) == (7, 0.25)
    options = model.model.encoder.layers[1].self_attn.attend.keywords
    assert options["sparsity_type"] == "pooling" and options["num_global_tokens"] == 16
    assert model.model.encoder.layers[1].self_attn.dropout == 0.25


def test_an_override_wins_over_both_names_of_a_key(folder):
    change_config(folder, attention_probs_dropout_prob=0.5)
    assert load(folder).config.attention_dropout == 0.5
    assert load(folder, attention_dropout=0.25).config.attention_dropout == 0.25


def test_an_override_that_does_not_exist_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="sparsity_typ"):
        load(PLAIN, sparsity_typ="pooling")


@pytest.mark.parametrize("override, message", [
    ({"sparsity_type": "nrom"}, "'nrom'"), ({"num_global_tokens": 0}, "num_global_tokens=0"),
    ({"block_size": 10, "sparsity_factor": 4}, "sparsity_factor=4"),
    ({"d_model": 48}, r"\(24, 24\), not \(48, 48\)"),
    ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
    ({"architecture": "ForTranslation"}, "ForTranslation")])
def test_an_impossible_override_is_an_error_that_names_it(override, message):
    with pytest.raises(ValueError, match=message):
        load(PLAIN, **override)


def test_labels_can_be_renamed_and_their_number_changed(folder):
    kind = {"architecture": "ForSequenceClassification", "lsg": False}
    labels = {0: "sport", 1: "culture", 2: "science"}
    with pytest.warns(UserWarning):
        model, tokenizer = load_model(PLAIN, **kind, num_labels=2)
    save_model(model, tokenizer, folder)
    del model.classification_head["out_proj"]
    tensors = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items()
               if not name.startswith("classification_head")}
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning):
        model = load(folder, **kind, id2label=labels)
    assert model.config.id2label == labels
    assert model.classification_head["out_proj"].weight.shape == (3, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_that_of_all_parameters(dtype):
    model = load(PLAIN, lsg=False, dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.lm_head.weight is model.model.shared.weight


def test_read_checkpoint_returns_config_tensors_and_tokenizer():
    config, tensors, tokenizer = read_checkpoint(PLAIN)
    assert config == SETTINGS and len(tokenizer) == 181
    assert tensors.keys() >= TENSORS.keys() - set(COPIES)
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor)


@pytest.mark.parametrize("convert", [
    lambda *checkpoint: convert_to_lsg(*checkpoint, 1300),
    lambda config, tensors, tokenizer: resize_positions(config, tensors, 1300)],
    ids=["convert_to_lsg", "resize_positions"])
def test_conversion_leaves_its_arguments_as_they_are(convert):
    config, tensors, tokenizer = read_checkpoint(PLAIN)
    before = dict(config), {name: tensor.clone() for name, tensor in tensors.items()}
    new_config, new_tensors = convert(config, tensors, tokenizer)
    assert new_config["max_position_embeddings"] == 1300
    assert len(new_tensors[POSITIONS[0]]) == len(new_tensors[POSITIONS[1]]) == 1302
    assert config == before[0] and tensors.keys() == before[1].keys()
    for name, tensor in before[1].items():
        assert torch.equal(tensors[name], tensor)


@pytest.mark.parametrize("setting, value", [
    ("block_size=64", 64), ("dropout=0.5", 0.5), ("adaptive=false", False),
    ("sparsity_type=norm", "norm"), ("sparsity_type=null", None), ("adaptive=True", "True"),
    ('early_stopping="never"', "never"), ("problem_type=a=b", "a=b"), ("problem_type=", "")])
def test_values_of_settings_are_json_or_text(setting, value):
    assert parse_settings([setting]) == {setting.partition("=")[0]: value}


def test_a_setting_without_a_value_is_an_error():
    with pytest.raises(ValueError, match="block_size.*KEY=VALUE"):
        parse_settings(["block_size"])


def test_nothing_is_written_to_the_checkpoint():
    model = load(PLAIN, lsg=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (PLAIN / "model.safetensors").read_bytes() == WEIGHTS
    assert load(PLAIN, lsg=False).get_parameter(SHARED).any()


# ------------------------------------------------------------------------------------------------
# One matrix under four names

VARIANTS = {
    "shared": [SHARED], "encoder": [COPIES[0]], "decoder": [COPIES[1]], "lm_head": [COPIES[2]],
    "encoder and decoder": COPIES[:2], "all": NAMES, "all but shared": COPIES}


@pytest.mark.parametrize("names", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("lsg", [False, True])
def test_tied_weights_may_have_any_of_their_names(folder, names, lsg, plain_logits):
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != SHARED}
    tensors |= {name: TENSORS[SHARED].clone() for name in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder, lsg=lsg)
    parameters = [model.state_dict(keep_vars=True)[name] for name in NAMES]
    assert all(parameter is parameters[0] for parameter in parameters)
    assert torch.equal(parameters[0], TENSORS[SHARED])
    if not lsg:
        assert torch.equal(logits_of(model), plain_logits)


def test_untied_weights_stay_different(folder):
    change_config(folder, tie_word_embeddings=False)
    other = torch.randn(181, 24)
    save_file(TENSORS | {"lm_head.weight": other}, folder / "model.safetensors")
    model = load(folder, lsg=False)
    assert torch.equal(model.lm_head.weight, other)
    assert torch.equal(model.model.shared.weight, TENSORS[SHARED])
    assert model.model.encoder.embed_tokens.weight is model.model.shared.weight


def test_tied_weights_can_be_untied_and_saved(folder, tmp_path):
    model, tokenizer = load_model(folder, lsg=False, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight += 1
    assert torch.equal(model.model.shared.weight, TENSORS[SHARED])
    save_model(model, tokenizer, tmp_path / "untied")
    again, _ = load_model(tmp_path / "untied", lsg=False)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_untied_weights_can_be_tied_and_saved(folder, tmp_path):
    change_config(folder, tie_word_embeddings=False)
    save_file(TENSORS | {"lm_head.weight": torch.randn(181, 24)}, folder / "model.safetensors")
    model, tokenizer = load_model(folder, lsg=False, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.shared.weight
    save_model(model, tokenizer, tmp_path / "tied")
    again, _ = load_model(tmp_path / "tied", lsg=False)
    assert torch.equal(again.lm_head.weight, TENSORS[SHARED])


@pytest.mark.parametrize("both", [True, False])
def test_float8_is_refused(folder, both):
    tensors = TENSORS | {"lm_head.weight": TENSORS[SHARED].to(torch.float8_e4m3fn)}
    if both:
        tensors[SHARED] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="float8"):
        load_model(folder)


def test_final_logits_bias_is_optional(folder, plain_logits):
    tensors = dict(TENSORS)
    bias = tensors.pop("final_logits_bias")
    save_file(tensors, folder / "model.safetensors")
    assert_close(logits_of(load(folder, lsg=False)), plain_logits - bias)


def test_a_file_of_the_base_model_has_no_prefix(folder, plain_logits):
    tensors = {name.removeprefix("model."): tensor for name, tensor in TENSORS.items()
               if name != "final_logits_bias"}
    save_file(tensors, folder / "model.safetensors")
    expected = plain_logits - TENSORS["final_logits_bias"]
    assert_close(logits_of(load(folder, lsg=False)), expected)
    change_config(folder, architectures=["MBartModel"])
    base = load(folder, lsg=False)
    with torch.no_grad():
        assert_close(base(IDS).last_hidden_state @ TENSORS[SHARED].T, expected)


# ------------------------------------------------------------------------------------------------
# pytorch_model.bin


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_bin_file_is_read_as_well(folder, zipped, plain_logits):
    (folder / "model.safetensors").unlink()
    tensors = TENSORS | {name: TENSORS[SHARED] for name in COPIES}  # as published: shared memory
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    model = load(folder, lsg=False)
    assert torch.equal(logits_of(model), plain_logits)
    assert model.lm_head.weight is model.model.shared.weight


def test_safetensors_are_preferred_to_a_bin_file(folder, plain_logits):
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert torch.equal(logits_of(load(folder, lsg=False)), plain_logits)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("way", ["zip", "legacy", "pickle"])
def test_pickled_code_is_not_run(folder, way):
    (folder / "model.safetensors").unlink()
    path, target = folder / "pytorch_model.bin", folder / "exploded"
    content = TENSORS | {"bomb": Bomb(target)}
    if way == "pickle":
        path.write_bytes(pickle.dumps(content["bomb"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(ValueError, match="pytorch_model.bin") as error:
        load(folder)
    assert not target.exists()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.zeros(2),
                                     {"state_dict": {"a": torch.zeros(2)}}],
                         ids=["list", "number", "tensor", "nested"])
def test_a_bin_file_of_something_else_is_named(folder, content):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
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
    tensors["model.shared.weight"] = torch.zeros(181, 24, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(folder, lsg=lsg)
    message = str(error.value)
    assert "missing model.encoder.layers.1.fc1.bias" in message
    assert "unexpected model.encoder.layers.2.fc1.bias" in message
    assert "model.decoder.layers.0.fc2.weight has shape (24, 55), not (24, 56)" in message
    assert "model.decoder.layer_norm.bias is torch.int64" in message
    assert "model.shared.weight is torch.int8" in message and "\n" not in message


@pytest.mark.parametrize("lsg", [False, True])
@pytest.mark.parametrize("name", [SHARED, *POSITIONS])
def test_a_missing_table_is_named(folder, name, lsg):
    save_file({key: tensor for key, tensor in TENSORS.items() if key != name},
              folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"missing {name}"):
        load(folder, lsg=lsg)


@pytest.mark.parametrize("name, shape", [
    (SHARED, (120, 24)), (SHARED, (181,)), (POSITIONS[0], (1026, 23)), (POSITIONS[0], (1,)),
    (POSITIONS[1], (0, 24))])
def test_a_misshapen_table_is_named_before_it_is_converted(folder, name, shape):
    save_file(TENSORS | {name: torch.zeros(shape)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name}|embedding"):
        load(folder)


@pytest.mark.parametrize("kind, head", [
    ("ForSequenceClassification", "classification_head"), ("ForQuestionAnswering", "qa_outputs")])
def test_a_new_head_is_drawn_with_a_warning(kind, head):
    with pytest.warns(UserWarning, match=f"the checkpoint has no {head}.*needs training"):
        model = load(PLAIN, lsg=False, architecture=kind)
    for name, parameter in model.get_submodule(head).named_parameters():
        if name.endswith("weight"):
            assert 0.003 < parameter.std() < 0.1
        else:
            assert not parameter.any()
    for name in TENSORS.keys() & model.state_dict().keys():
        assert torch.equal(model.state_dict()[name], TENSORS[name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_all_weights_have_the_type_that_is_asked_for_or_float32(folder, dtype):
    save_file({name: tensor.bfloat16() for name, tensor in TENSORS.items()},
              folder / "model.safetensors")
    model = load(folder, lsg=False, dtype=dtype, architecture="ForSequenceClassification")
    assert {weights.dtype for weights in model.parameters()} == {dtype or torch.float32}
    assert logits_of(model).isfinite().all()


@pytest.mark.filterwarnings("error")
def test_no_warning_if_the_checkpoint_has_the_head(folder):
    head = load_file(GOLDENS / "head_classification_3.safetensors")
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != "final_logits_bias"}
    save_file(tensors | head, folder / "model.safetensors")
    change_config(folder, architectures=["MBartForSequenceClassification"], num_labels=3)
    model = load(folder, lsg=False)
    assert isinstance(model, BarthezForSequenceClassification)
    for name, tensor in head.items():
        assert torch.equal(model.get_parameter(name), tensor)


@pytest.mark.parametrize("prefix", ["", "MBart", "LSGMBart"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore")
def test_each_architecture_is_known_by_all_its_names(prefix, kind):
    assert type(load(PLAIN, lsg=False, architecture=prefix + kind)) is ARCHITECTURES[kind]


# ------------------------------------------------------------------------------------------------
# Broken files


def broken(name, data):
    return pytest.param(name, data, id=f"{name}-{len(data)}")


@pytest.mark.parametrize("name, data", [
    broken("config.json", b""), broken("config.json", b"{"), broken("config.json", b"[1]"),
    broken("config.json", b"\xff\xfe"), broken("config.json", b'{"a":' * 100_000),
    broken("generation_config.json", b"nonsense"),
    broken("model.safetensors", b""), broken("model.safetensors", WEIGHTS[:7]),
    broken("model.safetensors", WEIGHTS[:1000]), broken("model.safetensors", WEIGHTS[:-1]),
    broken("model.safetensors", WEIGHTS + b"x"), broken("model.safetensors", POINTER),
    broken("pytorch_model.bin", b""), broken("pytorch_model.bin", POINTER),
    broken("pytorch_model.bin", b"PK\x03\x04" + bytes(99)),
    broken("sentencepiece.bpe.model", b""), broken("sentencepiece.bpe.model", POINTER)])
def test_a_broken_file_is_named_in_one_line(folder, name, data):
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(folder / name))) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_damaged_file_of_the_cache_says_which_files_to_delete(folder):
    (folder / "blob").write_bytes(WEIGHTS[:1000])
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("blob")
    with pytest.raises(ValueError, match=f"Delete .*{folder / 'blob'}.*run again") as error:
        load(folder)
    assert str(folder / "model.safetensors") in str(error.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kept", [0.999, 0.5, 0.01])
def test_a_truncated_bin_file_is_named_in_one_line(folder, kept, zipped):
    path = folder / "pytorch_model.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:int(kept * path.stat().st_size)])
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pytorch_model.bin") as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    what = "weights" if name == "model.safetensors" else name
    with pytest.raises(FileNotFoundError, match=f"lacks:? {what}") as error:
        load(folder)
    assert str(folder) in str(error.value)


def test_generation_config_overrides_config(folder):
    (folder / "generation_config.json").write_text('{"num_beams": 6, "max_length": 77}')
    config = load(folder, lsg=False).config
    assert (config.num_beams, config.max_length, config.no_repeat_ngram_size) == (6, 77, 3)


# ------------------------------------------------------------------------------------------------
# Random damage

SMALL = save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}, {"format": "pt"})
HEADER = int.from_bytes(SMALL[:8], "little")  # its length in bytes


def read(folder, content, name="model.safetensors"):
    """The tensors of a file, or None after an error of one line."""
    (folder / name).write_bytes(content)
    try:
        return read_tensors(folder / name)
    except ValueError as error:
        assert "damaged or not a checkpoint" in str(error) and "\n" not in str(error), error


@given(data=st.data())
def test_a_truncated_file_is_an_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    assert read(folder, SMALL[:data.draw(st.integers(0, len(SMALL) - 1))]) is None


@given(data=st.data())
def test_a_mutated_header_is_read_or_an_error(tmp_path_factory, data):
    content = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, 8 + HEADER - 1))] = data.draw(st.integers(0, 255))
    read(tmp_path_factory.mktemp("mutated"), bytes(content))


@pytest.mark.parametrize("change", [
    {"data_offsets": [0, 20]}, {"data_offsets": [8, 32]}, {"data_offsets": [0, 2 ** 40]},
    {"shape": [2, 4]}, {"shape": [-2, 3]}, {"dtype": "F33"}, {"data_offsets": [24, 0]}])
def test_a_wrong_header_is_an_error(tmp_path, change):
    header = json.loads(SMALL[8:8 + HEADER])
    header["a"] |= change
    header = json.dumps(header).encode()
    assert read(tmp_path, len(header).to_bytes(8, "little") + header + SMALL[8 + HEADER:]) is None


@pytest.mark.parametrize("size", [0, 2 ** 63, 10 ** 8 + 1, 2 ** 64 - 1])
def test_an_impossible_header_size_is_an_error(tmp_path, size):
    assert read(tmp_path, size.to_bytes(8, "little") + SMALL[8:]) is None


@given(data=st.data())
def test_a_damaged_bin_file_is_read_or_an_error(tmp_path_factory, data):
    file = io.BytesIO()
    torch.save({"a": torch.ones(3)}, file)
    content = bytearray(file.getvalue())[:data.draw(st.integers(0, file.tell()))]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    read(tmp_path_factory.mktemp("bin"), bytes(content), "pytorch_model.bin")


# ------------------------------------------------------------------------------------------------
# Saving


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


UNTIED = {"tie_word_embeddings": False}


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("options", [
    {"lsg": False}, {"sparsity_type": None, "num_global_tokens": 7}, UNTIED],
    ids=["dense", "lsg", "untied"])
@pytest.mark.filterwarnings("ignore")
def test_what_is_saved_loads_and_saves_as_the_same_bytes(folder, tmp_path, kind, options):
    if options == UNTIED:
        change_config(folder, **UNTIED)
        save_file(TENSORS | {"lm_head.weight": torch.randn(181, 24)}, folder / "model.safetensors")
    lsg = options.get("lsg", True)
    model, tokenizer = load_model(folder, architecture=kind, max_position_embeddings=1100,
                                  forced_eos_token_id=None, num_labels=3, **options)
    save_model(model, tokenizer, tmp_path / "once")
    again, tokenizer = load_model(tmp_path / "once", lsg=lsg)
    save_model(again, tokenizer, tmp_path / "twice")
    assert files_of(tmp_path / "once") == files_of(tmp_path / "twice")
    assert type(again) is type(model) and again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_a_saved_checkpoint_has_the_published_layout(tmp_path):
    save_model(*load_model(PLAIN, max_position_embeddings=1100), tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert files_of(folder).keys() == {"config.json", "model.safetensors", "tokenizer_config.json",
                                       "sentencepiece.bpe.model"}
    assert load_file(folder / "model.safetensors").keys() == TENSORS.keys() | {GLOBALS}
    settings = json.loads((folder / "config.json").read_text())
    assert settings["architectures"] == ["LSGMBartForConditionalGeneration"]
    assert settings["auto_map"]["AutoModelForSeq2SeqLM"] == (
        "ccdv/lsg-barthez-4096--modeling_lsg_mbart.LSGMBartForConditionalGeneration")
    assert settings["max_position_embeddings"] == 1100 and settings["model_type"] == "mbart"
    assert {"sparsity_type", "block_size", "num_global_tokens", "adaptive"} <= settings.keys()
    known = {key: value for key, value in SETTINGS.items() if key in settings}
    changed = {key for key, value in known.items() if settings[key] != value}
    assert changed == {"architectures", "max_position_embeddings"}
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 1100


def test_a_dense_checkpoint_has_no_lsg_keys(tmp_path):
    save_model(*load_model(PLAIN, lsg=False), tmp_path)
    assert files_of(tmp_path)["model.safetensors"] == WEIGHTS
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["architectures"] == ["MBartForConditionalGeneration"]
    assert not any("lsg" in key or "sparse" in key or "global" in key for key in settings)
    assert "auto_map" not in settings


def test_a_model_can_be_saved_over_its_own_files(folder, monkeypatch):
    def save_new_file(tensors, path, **options):  # older releases of safetensors write in place
        assert not os.path.exists(path), "the model's tensors are mapped from this file"
        save_file(tensors, path, **options)

    monkeypatch.setattr(load_weights, "save_file", save_new_file)
    model, tokenizer = load_model(folder, max_position_embeddings=1100)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, tokenizer, folder)
    again = load(folder)
    assert not list(folder.glob("*.incomplete"))
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)
        assert torch.equal(again.state_dict()[name], tensor)


def test_tensors_that_share_memory_are_all_saved(folder):
    (folder / "model.safetensors").unlink()
    bias = torch.randn(24)  # one tensor under several names, as torch.save keeps it
    names = [f"model.encoder.layers.{layer}.self_attn.{kind}_proj.bias"
             for layer in (0, 1) for kind in "kvq"]
    torch.save(TENSORS | dict.fromkeys(names, bias), folder / "pytorch_model.bin")
    model, tokenizer = load_model(folder, lsg=False)
    save_model(model, tokenizer, folder / "saved")
    again = load(folder / "saved", lsg=False)
    for name in names:
        assert torch.equal(again.get_parameter(name), bias)
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("names", VARIANTS.values(), ids=VARIANTS)
def test_of_tied_weights_the_shared_embedding_is_saved(folder, names, monkeypatch):
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != SHARED}
    tensors |= {name: TENSORS[SHARED].clone() for name in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(sys, "argv", ["", str(folder), "--output", str(folder / "lsg")])
    load_weights.main()
    saved = load_file(folder / "lsg" / "model.safetensors")
    assert [name for name in NAMES if name in saved] == [SHARED]


def test_an_untied_projection_that_shares_memory_is_saved(folder, monkeypatch):
    (folder / "model.safetensors").unlink()
    change_config(folder, tie_word_embeddings=False)
    torch.save(TENSORS | {"lm_head.weight": TENSORS[SHARED]}, folder / "pytorch_model.bin")
    monkeypatch.setattr(sys, "argv", ["", str(folder), "--output", str(folder / "lsg")])
    load_weights.main()
    assert torch.equal(load(folder / "lsg").lm_head.weight, TENSORS[SHARED])


@pytest.mark.parametrize("value", [None, True])
def test_null_in_the_config_means_the_default(folder, value):
    change_config(folder, tie_word_embeddings=value, num_beams=None, dropout=None)
    model, tokenizer = load_model(folder, lsg=False)
    assert model.lm_head.weight is model.model.shared.weight
    assert model.config.num_beams == 1 and model.config.dropout == 0.1
    save_model(model, tokenizer, folder)
    assert torch.equal(logits_of(load(folder, lsg=False)), logits_of(model))


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
