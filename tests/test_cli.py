"""The command line as a user meets it: what is on stdout, on stderr, and the exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import GOLDENS

ROOT = Path(__file__).parent.parent
TEXT = "Le président de la République s'est rendu à Paris, où il a reçu le ministre.\n"


def run(program, *arguments, input=None, **environment):
    """(exit status, stdout, stderr) of a program of ours, on a machine without a network."""
    offline = {"HF_HUB_CACHE": "/nonexistent/hub", "HF_ENDPOINT": "http://127.0.0.1:9",
               "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, ROOT / program, *map(str, arguments)], input=input,
                          capture_output=True, env=os.environ | offline | environment, timeout=100)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def fails(program, *arguments, **options):
    """The one line in which a program says what is wrong."""
    status, out, err = run(program, *arguments, **options)
    assert (status, out) == (2, ""), (status, out, err)
    lines = err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "texte.txt").write_text(TEXT, "utf-8")
    return tmp_path / "texte.txt"


def test_the_summary_and_only_it_is_printed_for_each_text(text_file):
    options = "--model", GOLDENS / "plain", "--max-length", 12
    status, one, err = run("barthez.py", "--summarize", text_file, *options)
    assert (status, err) == (0, "") and one.strip() and one.count("\n") == 1
    both = run("barthez.py", "--summarize", text_file, "-", *options, input=TEXT.encode())
    assert both == (0, one * 2, "")


def test_options_reach_the_model(text_file):
    from load_weights import load_model
    status, out, _ = run(
        "barthez.py", "--summarize", text_file, "--model", GOLDENS / "plain", "--num-beams", 2,
        "--max-length", 15, "--min-length", 9, "--length-penalty", 2, "--no-repeat-ngram-size", 2,
        "--sparsity-type", "pooling", "--block-size", 8, "--sparse-block-size", 8,
        "--sparsity-factor", 4, "--num-global-tokens", 3, "--mask-first-token",
        "--no-pass-global-tokens-to-decoder")
    model, tokenizer = load_model(
        GOLDENS / "plain", sparsity_type="pooling", block_size=8, sparse_block_size=8,
        sparsity_factor=4, num_global_tokens=3, mask_first_token=True,
        pass_global_tokens_to_decoder=False)
    ids = model.generate(**tokenizer(TEXT), num_beams=2, max_length=15, min_length=9,
                         length_penalty=2.0, no_repeat_ngram_size=2)
    assert (status, out) == (0, tokenizer.decode(ids[0]) + "\n")


def test_a_text_that_is_too_long_is_cut_with_a_notice(text_file):
    options = "--summarize", text_file, "--model", GOLDENS / "plain", "--max-length", 8
    status, cut, err = run("barthez.py", *options, "--max-source-length", 20)
    assert status == 0 and "the first 20 are read" in err and "--max-source-length" in err
    text_file.write_text(TEXT * 60, "utf-8")
    status, _, err = run("barthez.py", *options, "--dense")
    assert status == 0 and "the first 1,024 are read" in err
    needed = err.split("--max-source-length ")[1].split()[0]
    assert run("barthez.py", *options, "--dense", "--max-source-length", needed)[::2] == (0, "")


def test_fill_mask_and_classify():
    status, out, _ = run("barthez.py", "--fill-mask", "Barthez est le <mask> du monde.",
                         "--model", GOLDENS / "plain")
    probabilities = [float(line.split()[0]) for line in out.splitlines()]
    assert status == 0 and len(probabilities) == 5
    assert probabilities == sorted(probabilities, reverse=True)
    assert "<mask>" in fails("barthez.py", "--fill-mask", "Rien.", "--model", GOLDENS / "plain")


@pytest.mark.parametrize("content, said", [
    (b"", "is empty"), (b" \n ", "is empty"), (b"\x89PNG\r\n\x00\x00", "is not a text file"),
    ("été".encode("latin-1"), "is not UTF-8"), (None, "cannot be read")])
def test_a_file_that_cannot_be_summarised(tmp_path, content, said):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    line = fails("barthez.py", "--summarize", tmp_path / "a.txt", "--model", GOLDENS / "plain")
    assert said in line and "a.txt" in line


@pytest.mark.parametrize("options, said", [
    (["--num-beams", "0"], "num_beams"), (["--block-size", "7"], "block_size=7"),
    (["--num-global-tokens", "0"], "num_global_tokens"), (["--device", "nowhere"], "nowhere"),
    (["--max-length", "1"], "max_length"), (["--max-source-length", "1"], "max_length=1")])
def test_an_impossible_option(text_file, options, said):
    assert said in fails("barthez.py", "--summarize", text_file, "--model", GOLDENS / "plain",
                         *options)


def test_a_model_that_is_named_is_never_replaced(text_file):
    line = fails("barthez.py", "--summarize", text_file, "--model", "someone/some-model")
    assert "some-model" in line
    assert "no checkpoint" in fails("barthez.py", "--summarize", text_file, "--model",
                                    text_file.parent)


def test_without_a_network_the_bundled_model_stands_in(text_file):
    status, out, err = run("barthez.py", "--summarize", text_file)
    assert status == 0 and out.strip()
    assert len(err.strip().splitlines()) == 1 and "bundled" in err


def test_help_needs_no_torch():
    code = ("import sys; sys.argv = ['barthez.py', '--help']; sys.modules['torch'] = None\n"
            "import runpy; runpy.run_path('barthez.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0 and b"--summarize" in done.stdout


def test_conversion_saves_what_can_be_loaded(tmp_path):
    from load_weights import load_model
    status, _, err = run("load_weights.py", GOLDENS / "plain", "--output", tmp_path / "lsg",
                         "--max-position-embeddings", 1300, "--num-global-tokens", 4)
    assert (status, err) == (0, "")
    model, tokenizer = load_model(tmp_path / "lsg")
    assert model.config.num_global_tokens == 4 and tokenizer.model_max_length == 1300
    assert "stride" in fails("load_weights.py", GOLDENS / "plain", "--output", tmp_path / "other",
                             "--global-positional-stride", 48)
    assert not (tmp_path / "other").exists()
