"""The command lines as a user meets them: stdout, stderr and the exit status."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from barthez import load_model
from conftest import GOLDENS

ROOT = Path(__file__).parent.parent
PLAIN = GOLDENS / "plain"
TEXT = "Le président de la République s'est rendu à Paris, où il a reçu le ministre.\n"
OFFLINE = {"HF_HUB_CACHE": "/nonexistent/hub", "HF_ENDPOINT": "http://127.0.0.1:9",
           "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def start(program, *arguments, **environment):
    """(exit status, stdout, stderr) of a program in a new process, which takes two seconds."""
    done = subprocess.run([sys.executable, ROOT / program, *map(str, arguments)],
                          capture_output=True, env=os.environ | OFFLINE | environment, timeout=100)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def run(program, *arguments, input="", before=None):
    """(exit status, stdout, stderr) of a program in a fork of this process. torch is imported
    already, so this is fast. A signal is a negative status. `before` is called in the fork."""
    def main():
        os.environ.update(OFFLINE)
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
            process.join()
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
    if before is not None:
        before()
    action()


def fails(program, *arguments, **options):
    """The one line in which a program says what is wrong."""
    status, out, err = run(program, *arguments, **options)
    assert (status, out) == (2, ""), (status, out, err)
    assert err.count("\n") == 1 and "Traceback" not in err, err
    return err.rstrip("\n")


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "texte.txt").write_text(TEXT, "utf-8")
    return tmp_path / "texte.txt"


def test_only_the_summary_is_printed_for_each_text(text_file):
    options = "--model", PLAIN, "--max-length", 12
    status, one, err = start("barthez.py", "--summarize", text_file, *options)
    assert (status, err) == (0, "") and one.strip() and one.count("\n") == 1
    both = run("barthez.py", "--summarize", text_file, "-", *options, input=TEXT)
    assert both == (0, one * 2, "")


def test_options_reach_the_model(text_file):
    status, out, _ = run(
        "barthez.py", "--summarize", text_file, "--model", PLAIN, "--num-beams", 2,
        "--max-length", 15, "--min-length", 9, "--length-penalty", 2, "--no-repeat-ngram-size", 2,
        "--sparsity-type", "pooling", "--block-size", 8, "--set", "sparse_block_size=8",
        "sparsity_factor=4", "--set", "num_global_tokens=3", "mask_first_token=true",
        "pass_global_tokens_to_decoder=false")
    model, tokenizer = load_model(
        PLAIN, sparsity_type="pooling", block_size=8, sparse_block_size=8, sparsity_factor=4,
        num_global_tokens=3, mask_first_token=True, pass_global_tokens_to_decoder=False)
    ids = model.generate(**tokenizer(TEXT), num_beams=2, max_length=15, min_length=9,
                         length_penalty=2.0, no_repeat_ngram_size=2)
    assert (status, out) == (0, tokenizer.decode(ids[0]) + "\n")


def test_a_text_that_is_too_long_is_cut_with_a_notice(text_file):
    options = "--summarize", text_file, "--model", PLAIN, "--max-length", 8
    status, _, err = run("barthez.py", *options, "--max-source-length", 20)
    assert status == 0 and "first 20 of" in err and "--max-source-length" in err
    text_file.write_text(TEXT * 60, "utf-8")
    status, _, err = run("barthez.py", *options, "--dense")
    assert status == 0 and "first 1,024 of" in err and err.count("\n") == 1
    needed = err.split("--max-source-length ")[1].split()[0]
    assert run("barthez.py", *options, "--dense", "--max-source-length", needed)[::2] == (0, "")


def test_fill_mask_prints_five_words_with_their_probabilities():
    options = "--model", PLAIN
    status, out, _ = run("barthez.py", "--fill-mask", "Barthez est le <mask> du monde.", *options)
    probabilities = [float(line.split()[0]) for line in out.splitlines()]
    assert status == 0 and len(probabilities) == 5
    assert probabilities == sorted(probabilities, reverse=True)
    assert "<mask>" in fails("barthez.py", "--fill-mask", "Rien.", *options)


@pytest.mark.parametrize("content, said", [
    (b"", "is empty"), (b" \n ", "is empty"), (b"\x89PNG\r\n\x00\x00", "is not"),
    ("été".encode("latin-1"), "is not UTF-8"), (None, "cannot be read")])
def test_a_file_that_cannot_be_summarized_is_named(tmp_path, content, said):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    line = fails("barthez.py", "--summarize", tmp_path / "a.txt", "--model", PLAIN)
    assert said in line and "a.txt" in line


@pytest.mark.parametrize("options, said", [
    (["--num-beams", "0"], "num_beams"), (["--block-size", "7"], "block_size"),
    (["--set", "num_global_tokens=0"], "num_global_tokens"), (["--device", "nowhere"], "nowhere"),
    (["--max-length", "1"], "max_length"), (["--max-source-length", "1"], "max_length=1"),
    (["--set", "blocksize=8"], "blocksize"), (["--set", "block_size"], "KEY=VALUE")])
def test_an_impossible_option_is_named(text_file, options, said):
    assert said in fails("barthez.py", "--summarize", text_file, "--model", PLAIN, *options)


def test_an_unknown_option_is_an_error():
    status, out, err = run("barthez.py", "--sumarize", "a.txt")
    assert (status, out) == (2, "") and err.startswith("usage:") and "Traceback" not in err


def test_a_model_that_is_named_is_never_replaced(text_file):
    line = fails("barthez.py", "--summarize", text_file, "--model", "someone/some-model")
    assert "some-model" in line
    line = fails("barthez.py", "--summarize", text_file, "--model", text_file.parent)
    assert "not a checkpoint" in line and str(text_file.parent) in line


def test_without_a_network_the_bundled_model_is_used(text_file):
    status, out, err = run("barthez.py", "--summarize", text_file,
                           before=lambda: os.chdir(text_file.parent))
    assert status == 0 and out.strip()
    assert err.count("\n") == 1 and "bundled" in err


def test_conversion_saves_a_model_that_can_be_loaded(tmp_path):
    status, _, err = start("load_weights.py", PLAIN, "--output", tmp_path / "lsg",
                           "--max-position-embeddings", 1300, "--set", "num_global_tokens=4")
    assert (status, err) == (0, ""), err
    model, tokenizer = load_model(tmp_path / "lsg")
    assert model.config.num_global_tokens == 4 and tokenizer.model_max_length == 1300


def test_a_stride_that_does_not_fit_writes_nothing(tmp_path):
    line = fails("load_weights.py", PLAIN, "--output", tmp_path / "lsg",
                 "--global-positional-stride", 48)
    assert "stride of 48" in line and not (tmp_path / "lsg").exists()
