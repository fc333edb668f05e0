"""Rough use: no traceback, hang, crash or lost model, whatever a user does.

A program runs in a fork of this process, so that a crash is seen and does not end the tests.
"""

import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from barthez import ARCHITECTURES, BarthezConfig, load_model, save_model
from load_weights import GLOBALS
from test_cli import OFFLINE, PLAIN, ROOT, TEXT, fails, fork, run
from tokenizer import BarthezTokenizer

TENSORS = load_file(PLAIN / "model.safetensors")
SETTINGS = json.loads((PLAIN / "config.json").read_text())
FILES = "config.json", "model.safetensors", "sentencepiece.bpe.model"
EMBEDDING = "model.shared.weight"
MASK = "--fill-mask", "Il est <mask> à Paris."
IDS = torch.tensor([[0, *range(20, 57), 2]])


@pytest.fixture
def folder(tmp_path):
    """A copy of plain/ that a test may damage."""
    for name in FILES:
        shutil.copyfile(PLAIN / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "texte.txt").write_text(TEXT, "utf-8")
    return tmp_path / "texte.txt"


def change_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(SETTINGS | changes))


def limit_memory(bytes_more):
    """Let this process allocate only so much more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + bytes_more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# ------------------------------------------------------------------------------------------------
# Crafted and odd weights


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def sparse_coo(index):
    return torch.sparse_coo_tensor([[0, index], [0, index]], [1.0, 2.0], (181, 24),
                                   check_invariants=False)


def sparse_csc(index):
    columns = torch.tensor([0] + 23 * [index] + [2])
    return torch.sparse_csc_tensor(columns, [index, 1], [1.0, 2.0], (181, 24),
                                   check_invariants=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [
    lambda: sparse_coo(10**12), lambda: sparse_coo(-7), lambda: sparse_csc(10**9),
    lambda: Call(set, sparse_csc(10**9)), lambda: Call(Counter, sparse_csc(10**9)),
    lambda: torch.quantize_per_tensor(torch.ones(181, 24), 0.1, 0, torch.qint8),
    lambda: torch.nested.nested_tensor([torch.ones(2, 24), torch.ones(3, 24)]),
    lambda: torch.ones(181, 24, device="meta"), lambda: "text"],
    ids=["coo", "negative coo", "csc", "set of csc", "Counter of csc", "quantized", "nested",
         "meta", "text"])
def test_a_crafted_bin_file_is_one_line_that_names_it(folder, make):
    (folder / "model.safetensors").unlink()
    torch.save(TENSORS | {EMBEDDING: make()}, folder / "pytorch_model.bin")
    line = fails("barthez.py", *MASK, "--model", folder)
    assert "pytorch_model.bin" in line
    assert "weights_only" not in line and "\033" not in line and len(line) < 400, line


def test_a_pickle_of_nested_tuples_is_one_line_that_names_the_file(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "whole.bin")
    program = b"\x80\x02}N" + 500_000 * b"\x85" + b"K\x01s."  # {(((…,),),): 1}
    with zipfile.ZipFile(folder / "whole.bin") as whole, \
            zipfile.ZipFile(folder / "pytorch_model.bin", "w") as crafted:
        for name in whole.namelist():
            crafted.writestr(name, program if name.endswith("data.pkl") else whole.read(name))
    assert "pytorch_model.bin" in fails("barthez.py", *MASK, "--model", folder)


def test_a_name_that_is_no_text_is_an_error(folder):
    (folder / "model.safetensors").unlink()
    torch.save(TENSORS | {5: torch.ones(2)}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in fails("barthez.py", *MASK, "--model", folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_sharded_checkpoint_says_what_to_do(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / f"{name}.index.json").write_text('{"weight_map": {}}')
    line = fails("barthez.py", *MASK, "--model", folder)
    assert "sharded" in line and "max_shard_size" in line


def test_names_that_nobody_needs_are_ignored(folder):
    save_file(TENSORS | {"model.encoder.version": torch.tensor([2.0]),
                         "model.decoder.embed_positions._float_tensor": torch.ones(1)},
              folder / "model.safetensors")
    assert run("barthez.py", *MASK, "--model", folder) == run("barthez.py", *MASK, "--model", PLAIN)


def test_tied_copies_that_differ_are_an_error(folder):
    other = TENSORS[EMBEDDING] + 1
    save_file(TENSORS | {"lm_head.weight": other}, folder / "model.safetensors")
    line = fails("barthez.py", *MASK, "--model", folder)
    assert "lm_head.weight" in line and "tie_word_embeddings" in line


def test_a_tokenizer_of_another_model_is_an_error(folder):
    shutil.copyfile(ROOT / "tiny" / "sentencepiece.bpe.model", folder / "sentencepiece.bpe.model")
    line = fails("barthez.py", *MASK, "--model", folder)
    assert "tokenizer" in line and "8000" in line


# ------------------------------------------------------------------------------------------------
# Configurations


VALUES = [None, True, -1, 0, 0.5, 10**9, float("nan"), "24", [1], {"a": None}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", [field.name for field in fields(BarthezConfig)] + ["num_labels"])
def test_a_config_value_of_any_kind_is_accepted_or_one_line(folder, key):
    for value in VALUES:
        change_config(folder, **{key: value})
        try:
            model, _ = load_model(folder, lsg=False)
            model.generate(IDS, max_length=5, num_beams=2)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, error


@pytest.mark.parametrize("changes", [
    {"encoder_layers": 10**9}, {"decoder_layers": 10**6}, {"num_labels": 10**9},
    {"vocab_size": 10**12}, {"d_model": 10**9}, {"sparse_block_size": 10**9},
    {"max_position_embeddings": 10**9}, {"num_beams": 10**9}, {"length_penalty": 1000},
    {"length_penalty": float("nan")}, {"length_penalty": float("inf")}, {"max_length": 10**9},
    {"lsh_num_pre_rounds": 10**9}, {"decoder_attention_heads": 10**9}])
def test_a_number_out_of_range_is_named_at_once(folder, changes):
    change_config(folder, **changes)
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"{next(iter(changes))}|has shape"):
        load_model(folder)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("architectures", [5, "x", [5], ["Nothing"], True, {"a": 1}])
def test_unknown_architectures_are_an_error(folder, architectures):
    change_config(folder, architectures=architectures)
    with pytest.raises(ValueError, match="architecture"):
        load_model(folder)


@pytest.mark.parametrize("setting", [
    "length_penalty=NaN", "length_penalty=1000", "num_beams=true", "max_length=1e400",
    "sparse_block_size=1000000000", "early_stopping=maybe", "block_size=[1]", "nothing=1"])
def test_a_wrong_setting_on_the_command_line_is_named(text_file, setting):
    line = fails("barthez.py", "--summarize", text_file, "--model", PLAIN, "--set", setting)
    assert setting.partition("=")[0] in line


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
    saved = load_model(folder)[0]
    tensors = saved.state_dict()
    return saved.config == model.config and all(
        torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("size", [0, 1000, 300_000])
@pytest.mark.parametrize("killed", [False, True])
def test_a_full_disk_or_a_kill_leaves_the_older_model(tmp_path, size, killed):
    """A file that would be longer than `size` is an error, or ends the process at this byte."""
    old, tokenizer = small_model()
    save_model(old, tokenizer, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    new, _ = small_model(2.0, 1200)

    def save():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if killed else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            save_model(new, tokenizer, tmp_path)
        except OSError:
            sys.exit(5)

    status, _, err = fork(save)
    assert status == (-signal.SIGXFSZ if killed else 5), err
    assert is_saved_in(tmp_path, old)
    if not killed:
        assert {path.name for path in tmp_path.iterdir()} == names
    save_model(new, tokenizer, tmp_path)
    assert is_saved_in(tmp_path, new)
    assert not list(tmp_path.glob("*.incomplete"))


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


def test_two_processes_that_save_into_one_folder_leave_one_model(tmp_path):
    models = [small_model(scale, positions) for scale, positions in ((1.0, 1100), (2.0, 1200))]

    def slow(event, args):  # so that the two processes alternate
        if event in ("open", "os.rename"):
            time.sleep(0.002)

    def save_both():
        sys.addaudithook(slow)
        if os.fork() == 0:
            for _ in range(8):
                save_model(*models[0], tmp_path)
            os._exit(0)
        for _ in range(8):
            save_model(*models[1], tmp_path)
        assert os.wait()[1] == 0

    status, _, err = fork(save_both)
    assert status == 0, err
    assert sum(is_saved_in(tmp_path, model) for model, _ in models) == 1
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "model.safetensors", "sentencepiece.bpe.model", "tokenizer_config.json"}


def test_a_tokenizer_that_is_there_is_not_written_again(tmp_path):
    model, tokenizer = small_model()
    save_model(model, tokenizer, tmp_path)
    before = (tmp_path / "sentencepiece.bpe.model").stat()
    model, tokenizer = load_model(tmp_path)
    save_model(model, tokenizer, tmp_path)
    after = (tmp_path / "sentencepiece.bpe.model").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value):
    old, tokenizer = small_model()
    save_model(old, tokenizer, tmp_path)
    new, _ = small_model(2.0)
    new.get_parameter("model.decoder.layers.1.fc2.weight").data[3, 5] = value
    with pytest.raises(ValueError, match="not saved: model.decoder.layers.1.fc2.weight"):
        save_model(new, tokenizer, tmp_path)
    assert is_saved_in(tmp_path, old)


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nothing", "a\0b"])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, place):
    (tmp_path / "file").write_text("not a folder")
    model, tokenizer = small_model()
    with pytest.raises((OSError, ValueError)):
        save_model(model, tokenizer, tmp_path / place)
    if "\0" not in place:  # no argument can have it
        fails("load_weights.py", PLAIN, "--output", tmp_path / place)


# ------------------------------------------------------------------------------------------------
# Long texts and little memory


def test_positions_are_extended_to_the_text_and_no_further(text_file):
    options = "--summarize", text_file, "--model", PLAIN, "--max-length", 8
    start = time.monotonic()
    limited = run("barthez.py", *options, "--max-source-length", 100_000_000,
                  before=lambda: limit_memory(2 * 10**9))
    assert limited == run("barthez.py", *options) and time.monotonic() - start < 10


def test_not_enough_memory_is_one_line(text_file):
    line = fails("barthez.py", "--summarize", text_file, "--model", PLAIN, "--max-length", 1000,
                 "--num-beams", 1000, before=lambda: limit_memory(5 * 10**8))
    assert "not enough memory" in line and "beams" in line and "lengths" in line


@pytest.mark.parametrize("text", [
    300_000 * " ", 300_000 * "\n", 100_000 * "\u3000", "a" + 300_000 * " " + "b <mask>",
    30_000 * "  <mask>", 300_000 * "<", 100_000 * "é"],
    ids=["spaces", "newlines", "wide", "within", "masks", "brackets", "letters"])
def test_the_tokenizer_takes_time_linear_in_the_text(text):
    tokenizer = BarthezTokenizer(PLAIN / "sentencepiece.bpe.model")
    start = time.process_time()
    tokenizer.encode(text)
    assert time.process_time() - start < 5


# ------------------------------------------------------------------------------------------------
# Tasks, options and devices


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A saved checkpoint of each architecture."""
    folder = tmp_path_factory.mktemp("architectures")
    for name in ARCHITECTURES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # heads are new
            model, tokenizer = load_model(PLAIN, lsg=False, architecture=name)
        save_model(model, tokenizer, folder / name)
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("task", ["summarize", "fill-mask", "classify"])
def test_a_checkpoint_serves_its_task_or_one_line_says_why(checkpoints, text_file, task,
                                                           architecture):
    argument = {"summarize": text_file, "fill-mask": MASK[1], "classify": TEXT}[task]
    command = "barthez.py", f"--{task}", argument, "--model", checkpoints / architecture
    served = ["ForSequenceClassification"] if task == "classify" else [
        "Model", "ForConditionalGeneration"]
    if architecture in served:
        status, out, err = run(*command)
        assert (status, err) == (0, "") and out.strip()
    else:
        line = fails(*command)
        assert architecture in line or "cannot do this" in line or "another task" in line, line


@pytest.mark.parametrize("options, named", [
    (["--dense", "--block-size", "64"], "block_size"),
    (["--dense", "--set", "num_global_tokens=2"], "num_global_tokens"),
    (["--min-length", "9", "--max-length", "8"], "min_length"), (["--revision", "x"], "revision"),
    (["--max-length", "5000"], "max_length"), (["--max-source-length", "-1"], "max"),
    (["--max-source-length", "0"], "max"), (["--set", "num_return_sequences=2"], "num_return"),
    (["--set", "num_return_sequences=2", "--num-beams", "2"], "num_return"),
    (["--set", "architectures=Model"], "architectures"),
    (["--set", "max_position_embeddings=x"], "expected int")])
def test_an_option_without_effect_is_refused(text_file, options, named):
    line = fails("barthez.py", "--summarize", text_file, "--model", PLAIN, *options)
    assert named in line, line


@pytest.mark.parametrize("options, named", [
    (["--num-beams", "2"], "num_beams"), (["--max-source-length", "5"], "max_source_length"),
    (["--max-source-length", "0"], "max_source_length"), (["--set", "length_penalty=2"], "length"),
    (["--min-length", "2"], "min_length"), (["--set", "num_return_sequences=1"], "num_return")])
@pytest.mark.parametrize("task", ["--classify", "--fill-mask"])
def test_options_of_beam_search_need_a_summary(task, options, named):
    assert named in fails("barthez.py", task, "Il est <mask>.", "--model", PLAIN, *options)


@pytest.mark.parametrize("device", ["meta", "hpu", "xla", "mps", "cuda:7", "vulkan", "nowhere", ""])
def test_a_device_that_is_not_there_is_one_line(device):
    line = fails("barthez.py", *MASK, "--model", PLAIN, "--device", device)
    assert "device" in line and len(line) < 300, line


def test_dtype_may_be_text():
    model, _ = load_model(PLAIN, lsg=False, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["nonsense", "nn", "int64", torch.int64, "save", 5])
def test_a_dtype_that_cannot_be_used_is_an_error(dtype):
    with pytest.raises(ValueError, match="dtype"):
        load_model(PLAIN, dtype=dtype)


@pytest.mark.parametrize("device", ["nowhere", "hpu", "meta"])
def test_a_device_that_cannot_be_used_is_an_error(device):
    with pytest.raises(ValueError, match="device"):
        load_model(PLAIN, device=device)


def test_each_bad_file_is_one_line_and_the_others_are_summarized(tmp_path, text_file):
    (tmp_path / "latin.txt").write_bytes("été".encode("latin-1"))
    options = "--model", PLAIN, "--max-length", 8
    _, one, _ = run("barthez.py", "--summarize", text_file, *options)
    status, out, err = run("barthez.py", "--summarize", tmp_path / "none.txt", text_file, tmp_path,
                           tmp_path / "latin.txt", text_file, *options)
    assert (status, out) == (2, one * 2)
    lines = err.splitlines()
    assert len(lines) == 3 and "Traceback" not in err
    for line, name in zip(lines, ["none.txt", str(tmp_path), "latin.txt"]):
        assert name in line


def test_generation_in_training_mode_has_no_dropout():
    model, _ = load_model(PLAIN, max_position_embeddings=1100)
    expected = model.generate(IDS, max_length=12)
    model.train()
    model.model.decoder.eval()  # a mixture, which must come back
    modes = [module.training for module in model.modules()]
    for _ in range(3):
        assert torch.equal(model.generate(IDS, max_length=12), expected)
    assert [module.training for module in model.modules()] == modes


# ------------------------------------------------------------------------------------------------
# load_weights.py


@pytest.mark.parametrize("options, named", [
    (["--output", ""], "--output"), (["--max-position-embeddings", "0"], "max_position_embeddings"),
    (["--max-position-embeddings", "100000000"], "max_position_embeddings"),
    (["--global-positional-stride", "0"], "stride"), (["--architecture", "Nothing"], "Nothing"),
    (["--global-positional-stride", "-64"], "stride"), (["--revision", "main"], "revision"),
    (["--set", "block_size=7"], "block_size"), (["--set", "block_size=x"], "block_size"),
    (["--set", "nothing=1"], "nothing"),
    (["--set", "dropout=2"], "dropout"), (["--set", "num_beams=0"], "num_beams"),
    (["--set", "adaptive=5"], "adaptive"), (["--set", "mask_first_token=x"], "mask_first_token")])
def test_a_wrong_option_of_the_conversion_is_named(tmp_path, options, named):
    line = fails("load_weights.py", PLAIN, "--output", tmp_path / "lsg", *options)
    assert named in line, line
    assert not (tmp_path / "lsg").exists()


def test_a_decoder_without_encoder_cannot_be_converted(checkpoints, tmp_path):
    line = fails("load_weights.py", checkpoints / "ForCausalLM", "--output", tmp_path / "lsg")
    assert "model.encoder.embed_positions.weight" in line
    assert not (tmp_path / "lsg").exists()


def test_conversion_says_that_it_replaces_trained_global_tokens(tmp_path):
    model, tokenizer = small_model()
    save_model(model, tokenizer, tmp_path / "lsg")
    command = "load_weights.py", tmp_path / "lsg", "--max-position-embeddings", 1200, "--output"
    status, _, err = run(*command, tmp_path / "replaced")
    assert status == 0 and err.count("\n") == 1 and "--resize-lsg" in err
    assert run(*command, tmp_path / "kept", "--resize-lsg") == (0, "", "")
    kept = load_model(tmp_path / "kept")[0]
    assert torch.equal(kept.get_parameter(GLOBALS), model.get_parameter(GLOBALS))


# ------------------------------------------------------------------------------------------------
# Terminals, streams and signals


def test_a_terminal_that_lacks_a_character_gets_a_replacement(text_file):
    command = "barthez.py", "--summarize", text_file, "--model", PLAIN, "--max-length", 40
    status, whole, _ = run(*command)
    assert status == 0 and not whole.isascii()
    replaced = run(*command, before=lambda: sys.stdout.reconfigure(encoding="ascii"))
    assert replaced == (0, whole.encode("ascii", "replace").decode(), "")


def close(number, name):
    """Close a standard stream, as a shell does with >&-. Python then has None for it."""
    def before():
        os.close(number)
        setattr(sys, name, None)
    return before


def fill(number, name):
    """Let a standard stream be a full disk."""
    def before():
        stream = open("/dev/full", "w")
        os.dup2(stream.fileno(), number)
        setattr(sys, name, open(number, "w", encoding="utf-8"))
    return before


def test_a_closed_stdin_is_one_line():
    line = fails("barthez.py", "--summarize", "-", "--model", PLAIN, before=close(0, "stdin"))
    assert "empty" in line


@pytest.mark.parametrize("spoil", [close, fill], ids=["closed", "full"])
def test_the_summary_comes_without_stderr(text_file, spoil):
    options = "--model", PLAIN, "--max-source-length", 20, "--max-length", 8
    command = "barthez.py", "--summarize", text_file, *options
    status, out, err = run(*command)
    assert status == 0 and "first 20" in err
    assert run(*command, before=spoil(2, "stderr")) == (0, out, "")


def test_an_error_without_stderr_still_has_its_status():
    command = "barthez.py", "--fill-mask", "Rien.", "--model", PLAIN
    assert run(*command, before=close(2, "stderr")) == (2, "", "")
    assert run(*command, before=fill(2, "stderr")) == (2, "", "")


def test_a_full_stdout_is_one_line():
    assert "space" in fails("barthez.py", *MASK, "--model", PLAIN, before=fill(1, "stdout"))


def test_a_closed_stdout_is_no_traceback():
    status, out, err = run("barthez.py", *MASK, "--model", PLAIN, before=close(1, "stdout"))
    assert status in (0, 2) and out == "" and "Traceback" not in err


@pytest.mark.parametrize("task", ["--fill-mask", "--classify", "--summarize", "--model", "--set",
                                  "--device", "--revision"])
def test_an_argument_that_is_not_utf8_is_one_line(text_file, task):
    bad = "a\udcff<mask>=\udcff"  # as Python decodes the byte 255 of an argument
    rest = () if task in ("--fill-mask", "--classify", "--summarize") else MASK
    if task != "--model":
        rest += "--model", PLAIN
    fails("barthez.py", task, bad, *rest)


def test_a_file_name_that_is_not_utf8_is_read(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.txt"
    with open(path, "w", encoding="utf-8") as file:
        file.write(TEXT)
    options = "--model", PLAIN, "--max-length", 8
    status, out, err = run("barthez.py", "--summarize", os.fsdecode(path), *options,
                           "--max-source-length", 20)
    assert status == 0 and out and err.count("\n") == 1


@pytest.mark.parametrize("seconds", [0.001, 0.5])
def test_an_interrupt_is_one_line_and_status_130(text_file, seconds):
    """SIGINT, so many seconds after the program has opened the text: at once, or as it writes."""
    text_file.write_text(TEXT * 100, "utf-8")

    def before():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        sys.addaudithook(start_clock)

    def start_clock(event, args):
        if event == "open" and text_file.name in str(args[0]):
            signal.setitimer(signal.ITIMER_REAL, seconds)

    status, out, err = run("barthez.py", "--summarize", text_file, "--model", PLAIN, "--max-length",
                           1000, "--num-beams", 64, "--set", "early_stopping=never",
                           before=before)
    assert (status, out) == (130, "") and err.count("\n") <= 2 and "Traceback" not in err, err


def test_an_interrupt_while_progress_is_shown_on_a_terminal(text_file):
    """A new process whose stderr is a terminal."""
    terminal, stderr = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / "barthez.py", "--summarize", text_file, "--model", PLAIN,
         "--max-length", "1000", "--num-beams", "64", "--set", "early_stopping=never"],
        stdout=subprocess.PIPE, stderr=stderr, env=os.environ | OFFLINE)
    os.close(stderr)
    shown = b""
    while b" written" not in shown:
        shown += os.read(terminal, 1000)
    process.send_signal(signal.SIGINT)
    try:
        while chunk := os.read(terminal, 1000):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    assert process.wait(20) == 130 and process.stdout.read() == b""
    process.stdout.close()
    os.close(terminal)
    assert b"tokens read" in shown and b"interrupted" in shown and b"Traceback" not in shown
