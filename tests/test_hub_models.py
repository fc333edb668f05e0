"""Whole models from the Hub: which file is taken, and that it loads, from repositories as found."""

import io
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save

import load_weights
from conftest import GOLDENS, assert_close
from hub_server import Hub
from load_weights import load_model, read_tensors

REPO = "moussaKam/barthez-orangesum-abstract"
SMALL = {name: (GOLDENS / "plain" / name).read_bytes()
         for name in ("config.json", "sentencepiece.bpe.model")}
WEIGHTS = load_file(GOLDENS / "plain" / "model.safetensors")
SAFETENSORS = {"model.safetensors": (GOLDENS / "plain" / "model.safetensors").read_bytes()}
IDS = torch.tensor([[0, 42, 17, 99, 5, 2]])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        yield hub


def pickled(tensors):
    file = io.BytesIO()
    torch.save(tensors, file)
    return {"pytorch_model.bin": file.getvalue()}


def outputs(source, **options):
    model, _ = load_model(source, **options)
    with torch.no_grad():
        return model(IDS).logits


def fetched(hub):
    """The names of the weights that the storage network has sent."""
    return [path.split("?")[0].rpartition("/")[2] for server, verb, path, _ in hub.log
            if server == "cdn" and verb == "GET" and "sentencepiece" not in path]


def test_safetensors_on_main(hub):
    hub.add(REPO, SMALL | SAFETENSORS | pickled(WEIGHTS))
    assert_close(outputs(REPO), outputs(GOLDENS / "plain"), 0)
    assert fetched(hub) == ["model.safetensors"]


def test_safetensors_of_a_known_conversion(hub, monkeypatch):
    hub.add(REPO, SMALL | pickled(WEIGHTS))
    commit = hub.add(REPO, SMALL | SAFETENSORS, "refs/pr/2")
    monkeypatch.setitem(load_weights.CONVERSIONS, REPO, commit)
    assert_close(outputs(REPO), outputs(GOLDENS / "plain"), 0)
    assert fetched(hub) == ["model.safetensors"]
    hub.close()  # from here on there is no network
    assert_close(outputs(REPO), outputs(GOLDENS / "plain"), 0)


def test_a_revision_that_is_named_is_what_is_loaded(hub):
    hub.add(REPO, SMALL | pickled({name: 2 * tensor for name, tensor in WEIGHTS.items()}))
    hub.add(REPO, SMALL | SAFETENSORS, "refs/pr/7")
    assert_close(outputs(REPO, revision="refs/pr/7"), outputs(GOLDENS / "plain"), 0)


@pytest.mark.parametrize("copies", [
    ["model.shared.weight"], ["lm_head.weight"], ["model.encoder.embed_tokens.weight"],
    ["model.shared.weight", "model.encoder.embed_tokens.weight",
     "model.decoder.embed_tokens.weight"]])
@pytest.mark.parametrize("pack", [pickled, lambda tensors: {"model.safetensors": save(tensors)}])
def test_embeddings_under_any_names_in_either_format(hub, copies, pack):
    tensors = {name: tensor for name, tensor in WEIGHTS.items() if name != "model.shared.weight"}
    tensors |= {name: WEIGHTS["model.shared.weight"].clone() for name in copies}
    hub.add("someone/model", SMALL | pack(tensors))
    # where a tensor begins in memory may change the last bit of a product
    assert_close(outputs("someone/model"), outputs(GOLDENS / "plain"))


def test_settings_of_generate_may_stand_in_a_file_of_their_own(hub):
    settings = {"num_beams": 7, "max_length": 31}
    hub.add(REPO, SMALL | SAFETENSORS | {"generation_config.json": json.dumps(settings).encode()})
    config = load_model(REPO)[0].config
    assert (config.num_beams, config.max_length) == (7, 31)


def test_a_model_in_the_cache_needs_no_network(hub, capsys, monkeypatch):
    hub.add(REPO, SMALL | SAFETENSORS)
    expected = outputs(REPO)
    hub.close()
    assert_close(outputs(REPO), expected, 0)
    assert "cache" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_close(outputs(REPO), expected, 0)
    assert capsys.readouterr().err == ""


def test_a_repository_without_weights_says_so(hub):
    hub.add(REPO, dict(SMALL))
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_model(REPO)


# ------------------------------------------------------------------------------------------------
# Damaged files

WHOLE = save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}, {"format": "pt"})
HEADER = int.from_bytes(WHOLE[:8], "little")


def read(tmp_path, content, name="model.safetensors"):
    (tmp_path / name).write_bytes(content)
    try:
        return read_tensors(tmp_path / name)
    except ValueError as error:
        message = str(error)
        assert name in message and "\n" not in message, message


@given(data=st.data())
def test_a_truncated_file_is_an_error_that_names_it(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    assert read(folder, WHOLE[:data.draw(st.integers(0, len(WHOLE) - 1))]) is None


@given(data=st.data())
def test_a_mutated_header_is_read_or_an_error_that_names_the_file(tmp_path_factory, data):
    content = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, 8 + HEADER - 1))] = data.draw(st.integers(0, 255))
    read(tmp_path_factory.mktemp("mutated"), bytes(content))


@pytest.mark.parametrize("change", [
    {"data_offsets": [0, 20]}, {"data_offsets": [8, 32]}, {"data_offsets": [0, 2 ** 40]},
    {"shape": [2, 4]}, {"shape": [-2, 3]}, {"dtype": "F33"}, {"data_offsets": [24, 0]}])
def test_a_wrong_header_is_an_error_that_names_the_file(tmp_path, change):
    header = json.loads(WHOLE[8:8 + HEADER])
    header["a"] |= change
    header = json.dumps(header).encode()
    assert read(tmp_path, len(header).to_bytes(8, "little") + header + WHOLE[8 + HEADER:]) is None


@pytest.mark.parametrize("size", [0, 2 ** 63, 10 ** 8 + 1, 2 ** 64 - 1])
def test_an_impossible_header_size_is_an_error(tmp_path, size):
    assert read(tmp_path, size.to_bytes(8, "little") + WHOLE[8:]) is None


@given(data=st.data())
def test_a_damaged_bin_file_is_an_error_that_names_it(tmp_path_factory, data):
    content = bytearray(pickled({"a": torch.ones(3)})["pytorch_model.bin"])
    content = content[:data.draw(st.integers(0, len(content)))]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    read(tmp_path_factory.mktemp("bin"), bytes(content), "pytorch_model.bin")
