"""The command line as a user meets it: stdout, stderr and the exit status."""

import json
import multiprocessing
import os
import pty
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from barthez import load_model, summarize
from conftest import GOLDENS

ROOT = Path(__file__).parent.parent
PLAIN = GOLDENS / "plain"
TENSORS = load_file(PLAIN / "model.safetensors")
SETTINGS = json.loads((PLAIN / "config.json").read_text())
TEXT = "Le président de la République s'est rendu à Paris, où il a reçu le ministre.\n"
MASK = "--fill-mask", "Barthez est le <mask> du monde."
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # of new processes
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 557000000\n"


def run(program, *arguments, input="", before=None):
    """(exit status, stdout, stderr) of a program in a fork of this process. torch is imported
    already, so this is fast. A signal is a negative status. `before` is called in the fork."""
    def main():
        sys.argv = [str(ROOT / program), *map(str, arguments)]
        runpy.run_path(sys.argv[0], run_name="__main__")

    return fork(main, input, before)


def fork(action, input="", before=None):
    """(exit status, stdout, stderr) of an action in a fork of this process."""
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as out, \
            tempfile.TemporaryFile() as err:
        stdin.write(input.encode())
        stdin.seek(0)
        process = multiprocessing.get_context("fork").Process(
            target=in_fork, args=(action, before, stdin, out, err))
        process.start()
        process.join(60)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError("no end after 60 seconds")
        out.seek(0)
        err.seek(0)
        return process.exitcode, out.read().decode(), err.read().decode()


def in_fork(action, before, *streams):
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    warnings.showwarning = lambda *warning: print(  # pytest would collect them
        warnings.formatwarning(*warning[:4]), end="", file=sys.stderr)
    if before is not None:
        before()
    action()


def fails(program, *arguments, **options):
    """The one line in which a program says what is wrong."""
    status, out, err = run(program, *arguments, **options)
    assert (status, out) == (2, ""), (status, out, err)
    assert err.count("\n") == 1 and "Traceback" not in err, err
    return err.rstrip("\n")


def summary(file, model, *options, **more):
    """(exit status, stdout, stderr) of --summarize for one file."""
    return run("barthez.py", "--summarize", file, "--model", model, *options, **more)


def make_checkpoint(folder, tensors=TENSORS, files=None, **settings):
    """Write plain/ into a folder, with other tensors or keys of config.json, and more files: {name:
    bytes, or an object to write as JSON}. Returns the folder."""
    folder.mkdir(exist_ok=True)
    shutil.copy(PLAIN / "sentencepiece.bpe.model", folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name, content in ({"config.json": SETTINGS | settings} | (files or {})).items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "texte.txt").write_text(TEXT, "utf-8")
    return tmp_path / "texte.txt"


# ------------------------------------------------------------------------------------------------
# Summaries and masks


def test_only_the_summary_is_printed_for_one_file(text_file):
    command = "barthez.py", "--summarize", text_file, "--model", PLAIN, "--max-length", 12
    status, out, err = run(*command)
    assert (status, err) == (0, "") and out.strip() and out.count("\n") == 1
    assert run("barthez.py", "--summarize", "-", *command[3:], input=TEXT) == (0, out, "")


def test_each_line_of_several_files_names_its_file(tmp_path, text_file):
    """In the order of the files. A file that cannot be read is one line on stderr."""
    (tmp_path / "long.txt").write_text(TEXT * 9, "utf-8")
    _, short, _ = summary(text_file, PLAIN, "--max-length", 12)
    _, long, _ = summary(tmp_path / "long.txt", PLAIN, "--max-length", 12)
    status, out, err = run("barthez.py", "--summarize", tmp_path / "long.txt", tmp_path / "none",
                           "-", tmp_path, text_file, "--model", PLAIN, "--max-length", 12,
                           input=TEXT)
    assert short != long and out == f"{tmp_path}/long.txt\t{long}-\t{short}{text_file}\t{short}"
    assert status == 2 and re.fullmatch(
        rf"barthez.py: .* No such file .*{tmp_path}/none'\nbarthez.py: .*{tmp_path}'\n", err)


def test_a_terminal_shows_which_files_of_how_many(tmp_path, text_file):
    status, out, err = run("barthez.py", "--summarize", text_file, text_file, "--model", PLAIN,
                           "--max-length", 4,
                           before=lambda: setattr(sys.stderr, "isatty", lambda: True))
    assert status == 0 and out.count("\n") == 2
    assert err == "file 1 of 2\r\033[Kfile 2 of 2\r\033[K"


def test_options_reach_the_model(text_file):
    status, out, _ = summary(
        text_file, PLAIN, "--num-beams", 2, "--max-length", 15, "--min-length", 9,
        "--length-penalty", 2, "--no-repeat-ngram-size", 2, "--sparsity-type", "pooling",
        "--block-size", 8, "--set", "sparse_block_size=8", "sparsity_factor=4",
        "--set", "num_global_tokens=3", "mask_first_token=true")
    model, tokenizer = load_model(PLAIN, sparsity_type="pooling", block_size=8, sparse_block_size=8,
                                  sparsity_factor=4, num_global_tokens=3, mask_first_token=True)
    ids = model.generate(**tokenizer(TEXT), num_beams=2, max_length=15, min_length=9,
                         length_penalty=2.0, no_repeat_ngram_size=2)
    assert (status, out) == (0, tokenizer.decode(ids[0]) + "\n")


def test_fill_mask_prints_five_words_with_their_probabilities():
    status, out, err = run("barthez.py", *MASK, "--model", PLAIN)
    probabilities = [float(line.split()[0]) for line in out.splitlines()]
    assert (status, err, len(probabilities)) == (0, "", 5)
    assert probabilities == sorted(probabilities, reverse=True)
    assert "<mask>" in fails("barthez.py", "--fill-mask", "Rien.", "--model", PLAIN)
    status, out, err = run("barthez.py", "--fill-mask", "Il est " * 20 + "<mask>", "--model", PLAIN,
                           "--max-source-length", 10)
    assert (status, out) == (2, "") and "reading the first 10 of" in err and "<mask>" in err


def test_a_text_that_is_cut_is_named_and_the_advice_reads_all(text_file):
    command = text_file, PLAIN, "--max-length", 8, "--dense"
    text_file.write_text(TEXT * 60, "utf-8")
    status, _, err = summary(*command)
    assert status == 0 and f"{text_file}: reading the first 1,024 of" in err
    advice = re.search(r"(--max-source-length) (\d+)", err).groups()
    assert summary(*command, *advice)[::2] == (0, "")


def test_positions_grow_to_the_limit_or_the_text_and_never_shrink(text_file):
    """A million million positions would not fit in any memory."""
    command = text_file, PLAIN, "--max-length", 30
    assert summary(*command, "--max-source-length", 10**12) == summary(*command)
    status, out, err = summary(*command, "--max-source-length", 20)  # and 29 in the decoder
    assert status == 0 and out.strip() and "first 20 of" in err
    text_file.write_text(TEXT * 60, "utf-8")
    status, out, err = summary(*command, "--dense", "--max-source-length", 1500)
    model, tokenizer = load_model(PLAIN, lsg=False, max_position_embeddings=1500)
    [expected] = summarize(model, tokenizer, [TEXT * 60], max_source_length=1500, max_length=30)
    assert (status, out) == (0, expected + "\n") and "first 1,500 of" in err


# ------------------------------------------------------------------------------------------------
# What a checkpoint says


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_max_new_tokens_wins_over_max_length_of_its_file(tmp_path, text_file, name):
    content = {"max_new_tokens": 4, "max_length": 50}
    content |= SETTINGS if name == "config.json" else {}
    folder = make_checkpoint(tmp_path / "model", files={name: content})
    short, long = (summary(text_file, PLAIN, "--max-length", n) for n in (5, 12))
    assert summary(text_file, folder) == short != long
    assert summary(text_file, PLAIN, "--set", "max_new_tokens=4") == short
    assert summary(text_file, folder, "--max-length", 12) == long


def test_neutral_settings_change_nothing(tmp_path, text_file):
    settings = {"eos_token_id": [2], "forced_eos_token_id": [2], "do_sample": False, "top_k": 50,
                "top_p": 0.9, "temperature": 0.5, "num_beam_groups": 1, "repetition_penalty": 1.0,
                "bad_words_ids": None, "suppress_tokens": []}
    folder = make_checkpoint(tmp_path / "model", files={"generation_config.json": settings})
    assert (summary(text_file, folder, "--max-length", 12)
            == summary(text_file, PLAIN, "--max-length", 12))


def test_settings_that_are_not_included_are_one_notice(tmp_path, text_file):
    settings = {"do_sample": True, "repetition_penalty": 1.2, "forced_bos_token_id": 0,
                "num_beam_groups": 2, "encoder_no_repeat_ngram_size": 3, "min_new_tokens": 5,
                "bad_words_ids": [[7]], "suppress_tokens": [9]}
    folder = make_checkpoint(tmp_path / "model", files={"generation_config.json": settings})
    status, out, err = summary(text_file, folder, "--max-length", 12)
    assert (status, out, "") == summary(text_file, PLAIN, "--max-length", 12)
    assert err.count("\n") == 1
    assert all(f"{name}={value}" in err for name, value in settings.items())


def test_a_padded_vocabulary_writes_nothing_for_ids_without_a_piece(tmp_path, text_file):
    bias = torch.zeros(1, 192)
    bias[0, 185] = 1000
    embedding = torch.cat([TENSORS["model.shared.weight"], torch.zeros(11, 24)])
    folder = make_checkpoint(tmp_path / "model", TENSORS | {
        "model.shared.weight": embedding, "final_logits_bias": bias}, vocab_size=192)
    assert summary(text_file, folder, "--max-length", 3) == (0, "\n", "")
    assert run("barthez.py", *MASK, "--model", folder)[1].startswith("1.000 \n")


@pytest.mark.parametrize("files, said", [
    ({"added_tokens.json": {"<doc>": 181, "<mask>": 190}}, "<doc>"),
    ({"tokenizer_config.json": {"added_tokens_decoder": {"182": {"content": "<sep>"}}}}, "<sep>"),
    ({"generation_config.json": {"eos_token_id": [2, 5]}}, "eos_token_id"),
    ({"config.json": SETTINGS | {"bos_token_id": 1, "pad_token_id": 2, "eos_token_id": 3}},
     "another kind of mBART"),
    ({"config.json": SETTINGS | {"vocab_size": 120}}, "another model"),
    ({"model.safetensors": POINTER}, "git lfs pull")])
def test_a_checkpoint_that_is_not_included_is_refused(tmp_path, text_file, files, said):
    folder = make_checkpoint(tmp_path / "model", files=files)
    line = fails("barthez.py", "--summarize", text_file, "--model", folder)
    assert said in line and str(folder) in line


@pytest.mark.parametrize("value, dtype, said", [
    (float("nan"), "float32", "weights"), (1e5, "float16", "float16"), (1e5, "bfloat16", None)])
def test_numbers_that_are_not_finite_are_an_error(tmp_path, text_file, value, dtype, said):
    """NaN in the weights, and a bias that float16 cannot hold."""
    name = "model.encoder.layers.1.fc2.bias"
    folder = make_checkpoint(tmp_path / "model", TENSORS | {name: TENSORS[name] + value})
    for command in ("--summarize", text_file, "--max-length", 8), MASK:
        command = "barthez.py", *command, "--model", folder, "--dtype", dtype
        if said is None:
            assert run(*command)[0] == 0
        else:
            line = fails(*command)
            assert "not finite" in line and said in line


def test_tied_copies_that_differ_are_an_error_and_its_advice_works(tmp_path):
    tensors = TENSORS | {"lm_head.weight": TENSORS["model.shared.weight"] * 2}
    folder = make_checkpoint(tmp_path / "model", tensors)
    line = fails("barthez.py", *MASK, "--model", folder)
    assert "lm_head.weight" in line
    advice = re.search(r"tie_word_embeddings=\w+", line)[0]
    status, out, err = run("barthez.py", *MASK, "--model", folder, "--set", advice)
    assert (status, err) == (0, "") and out != run("barthez.py", *MASK, "--model", PLAIN)[1]


@pytest.mark.parametrize("head", ["classification_3", "question_answering"])
def test_a_checkpoint_of_another_task_is_refused(tmp_path, text_file, head):
    tensors = TENSORS | load_file(GOLDENS / f"head_{head}.safetensors")
    folder = make_checkpoint(tmp_path / "model", tensors)
    for command in ("--summarize", text_file), MASK:
        assert "another task" in fails("barthez.py", *command, "--model", folder)


@pytest.mark.parametrize("model, said", [
    ("someone/some-model", "no folder"), ("./none", "neither a folder nor a model"),
    (PLAIN / "config.json", "is a file"), (GOLDENS, "lacks config.json")])
def test_a_model_that_is_named_is_never_replaced(text_file, model, said):
    line = fails("barthez.py", "--summarize", text_file, "--model", model)
    assert said in line and str(model) in line


def test_without_a_network_the_bundled_model_writes_with_a_notice(text_file):
    status, out, err = run("barthez.py", "--summarize", text_file,
                           before=lambda: os.chdir(text_file.parent))
    assert status == 0 and out.strip() and err.count("\n") == 1
    assert "bundled" in err and "do not rely on" in err
    for command in ("--summarize", text_file, "--revision", "x"), MASK:
        assert "cannot be reached" in fails("barthez.py", *command)


# ------------------------------------------------------------------------------------------------
# Texts

FRENCH = "L’œuvre d’art a coûté 5 € : où est-elle ?\n"


def test_a_byte_order_mark_names_the_encoding(tmp_path):
    encoded = {"utf-8": FRENCH.encode(), "utf-8-sig": FRENCH.encode("utf-8-sig"),
               "little": FRENCH.encode("utf-16"), "big": b"\xfe\xff" + FRENCH.encode("utf-16-be")}
    for name, data in encoded.items():
        (tmp_path / name).write_bytes(data)
    status, out, err = run("barthez.py", "--summarize", *[tmp_path / name for name in encoded],
                           "--model", PLAIN, "--max-length", 12)
    assert (status, err) == (0, "") and len({line.split("\t")[1] for line in out.splitlines()}) == 1


@pytest.mark.skipif(not shutil.which("iconv"), reason="needs iconv")
@pytest.mark.parametrize("text", [FRENCH, "LIBERTÉ\xa0: égalité"])
def test_the_advice_for_a_file_from_windows_gives_the_right_text(tmp_path, text):
    (tmp_path / "a.txt").write_bytes(text.encode("cp1252"))
    line = fails("barthez.py", "--summarize", tmp_path / "a.txt", "--model", PLAIN)
    advice = re.search("iconv -f .* -t utf-8", line)[0].split()
    assert subprocess.check_output(advice + [tmp_path / "a.txt"]).decode() == text


@pytest.mark.parametrize("data, said", [
    (b" \n ", "is empty"), (b"\x89PNG\r\n\x1a\n\0\0", "not a text file"),
    ("été".encode("utf-16-le"), "not a text file"), ("été".encode("utf-32"), "not a text file"),
    (FRENCH.encode() + b"\xe9" + FRENCH.encode(), "is damaged"),
    ("ete".encode("utf-16") + b"x", "is damaged"), (b"\n%PDF-1.4\n1 0 obj", "pdftotext"),
    (b"PK\x03\x04", "pandoc"), (b"{\\rtf1 a}", "pandoc"), (b"\xd0\xcf\x11\xe0\0", "as .docx")])
def test_a_file_that_is_no_text_is_named_with_advice(tmp_path, data, said):
    (tmp_path / "a.txt").write_bytes(data)
    line = fails("barthez.py", "--summarize", tmp_path / "a.txt", "--model", PLAIN)
    assert said in line and str(tmp_path / "a.txt") in line and "iconv" not in line


# ------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("options, said", [
    (["--block-size", "7"], "block_size"), (["--max-source-length", "0"], "--max-source-length"),
    (["--set", "max_new_tokens=many"], "max_new_tokens='many'"),
    (["--set", "length_penalty=NaN"], "length_penalty"), (["--set", "block_size"], "block_size=''"),
    (["--set", "num_global_tokens=[1]"], "num_global_tokens"), (["--set", "blocksize=8"], "size"),
    (["--set", "max_position_embeddings=0"], "max_position"), (["--revision", "x"], "revision"),
    (["--device", "nowhere"], "nowhere")])
def test_an_impossible_option_is_named(text_file, options, said):
    assert said in fails("barthez.py", "--summarize", text_file, "--model", PLAIN, *options)


def test_the_developer_mode_shows_the_traceback():
    """`python -X dev` sets this flag."""
    status, out, err = run("barthez.py", *MASK, "--model", ROOT / "none", before=lambda: setattr(
        sys, "flags", SimpleNamespace(dev_mode=True)))
    assert (status, out) == (1, "") and "Traceback" in err


def test_not_enough_memory_is_one_line(text_file):
    def limit_memory():  # to half a gigabyte more than this process has
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 5 * 10**8
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    assert "memory" in fails("barthez.py", "--summarize", text_file, "--model", PLAIN,
                             "--max-length", 1000, "--num-beams", 1000, before=limit_memory)


def test_a_terminal_that_lacks_a_character_gets_a_replacement(text_file):
    status, whole, _ = summary(text_file, PLAIN, "--max-length", 40)
    assert status == 0 and not whole.isascii()
    replaced = summary(text_file, PLAIN, "--max-length", 40,
                       before=lambda: sys.stdout.reconfigure(encoding="ascii"))
    assert replaced == (0, whole.encode("ascii", "replace").decode(), "")


def test_an_interrupt_while_a_terminal_shows_progress_is_status_130(text_file):
    terminal, stderr = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / "barthez.py", "--summarize", text_file, "--model", PLAIN,
         "--max-length", "1000", "--num-beams", "64", "--set", "early_stopping=never"],
        stdout=subprocess.PIPE, stderr=stderr, env=os.environ | ENVIRONMENT)
    shown = b""
    while b"file 1 of 1" not in shown:
        shown += os.read(terminal, 1000)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == (b"", None) and process.returncode == 130
    os.write(stderr, b"the end")
    assert b"Traceback" not in shown + os.read(terminal, 10_000)
