"""Every command and every Python block of the README works as it is written there."""

import json
import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path

import pytest

from barthez import load_model, save_model
from conftest import GOLDENS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs one of the README's commands in this process and returns what it prints.
    The toy model replaces those on the Hub."""
    def run(line, folder):
        # The shell's part.
        line = line.partition(" > ")[0].replace("articles/*.txt", "file.txt file.txt")
        toy = str(GOLDENS / "plain")
        program, *words = shlex.split(line)[1:]
        words = [toy if word.startswith("moussaKam/") else word for word in words]
        if program == "barthez.py" and "--model" not in words:
            words += ["--model", toy]
        if "--train" in words:
            words += ["--steps", "2", "--max-target-length", "9", "--batch-tokens", "400", "--set", "block_size=16",
                      "sparse_block_size=16", "max_position_embeddings=128"]
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [str(ROOT / program), *words])
        runpy.run_path(sys.argv[0], run_name="__main__")
        return capsys.readouterr().out

    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # a program changes it
    return run


@pytest.mark.filterwarnings("ignore:the checkpoint has no")
def test_python_blocks_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, "README.md", "exec"), names)
    assert names["states"].shape[::2] == (1, 256) and names["loss"].isfinite()
    assert names["ids"].shape[0] == 4
    assert capsys.readouterr().out.endswith("torch.Size([2, 501, 64])\n")
    assert (tmp_path / "my-model" / "model.safetensors").exists()


def test_commands_run_in_their_order(run, tmp_path):
    pair = json.dumps({"document": "Le train est parti. La ville dort.", "summary": "Le train."})
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.jsonl").write_text(f"{pair}\n" * 3)
    (tmp_path / "file.txt").write_text("Le train est parti. La ville dort.")
    lines = [line for language, block in BLOCKS if language == "bash"
             for line in block.strip().splitlines() if line.startswith("python ")]
    assert len(lines) >= 6
    for line in lines:
        printed = run(line, tmp_path)
        if "*.txt" in line:
            assert printed.count("file.txt\t") == 2
    assert (tmp_path / "my-model" / "model.safetensors").exists()


def test_the_line_that_converts_works(tmp_path, monkeypatch):
    line, = re.findall(r"`(save_model\(.*\))`", README)
    monkeypatch.chdir(tmp_path)
    exec(line.replace("moussaKam/barthez", str(GOLDENS / "plain")),
         {"load_model": load_model, "save_model": save_model})
    assert load_model("my-lsg-barthez")[0].config.max_position_embeddings == 16384


def test_the_first_command_prints_what_is_shown_below_it(run):
    line = next(block for language, block in BLOCKS if "--summarize" in block)
    shown = next(block for language, block in BLOCKS if not language)
    assert run("python " + line.partition(".venv/bin/python ")[2], ROOT) == shown


def test_the_line_for_tests_installs_and_tests():
    line = next(block for language, block in BLOCKS if "-m pytest" in block)
    assert "pip install -q -r requirements.txt" in line and line.count("\n") == 1
    for name in ("torch==2.13.0", "pytest", "hypothesis", "sentencepiece", "safetensors", "numpy"):
        assert name in (ROOT / "requirements.txt").read_text()


@pytest.mark.parametrize("name", re.findall(r"\]\(([\w/.]+)\)", README))
def test_links_lead_to_files(name):
    assert (ROOT / name).exists()
