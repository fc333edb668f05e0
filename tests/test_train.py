"""train.py: the data that the model sees, learning, and runs that fail or are interrupted."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import GOLDENS, assert_close
from tokenizer import BarthezTokenizer

ROOT = Path(__file__).parent.parent
SENTENCES = ["Le ministre est à Paris.", "Les élèves sont dans la rue.", "Il a signé un accord.",
             "La ville a fermé ses écoles.", "Elle est partie en train."]
NO_DROPOUT = "dropout=0.0", "attention_dropout=0.0", "activation_dropout=0.0"


def write_pairs(path):
    rng = random.Random(3)
    with open(path, "w") as file:
        for _ in range(24):
            document = rng.choices(SENTENCES, k=rng.randrange(1, 5))
            print(json.dumps({"document": " ".join(document), "summary": document[0]}), file=file)
    return path


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl")


def arguments(pairs, output, *options):
    """A command line that trains the toy model."""
    return [str(argument) for argument in (
        "train.py", "--model", GOLDENS / "plain", "--train", pairs, "--output", output,
        "--batch-tokens", 300, "--learning-rate", 1e-3, "--precision", "float32", "--set",
        "max_position_embeddings=256", "block_size=8", "sparse_block_size=8", "max_length=8",
        *options)]


def main(command, program=train):
    """Run a program in this process."""
    old, sys.argv = sys.argv, command
    try:
        program.main()
    finally:
        sys.argv = old


def run(pairs, output, *options):
    """Train the toy model in this process; returns the saved weights."""
    main(arguments(pairs, output, *options))
    return load_file(output / "model.safetensors")


def run_child(arguments, status=0):
    """Run Python in a process of its own; returns what it prints to stderr."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    child = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, timeout=120,
                           capture_output=True, text=True, check=False)
    assert child.returncode == status, child.stderr
    return child.stderr


def assert_same(a, b, tolerance=0.0):
    """Equal weights. A tolerance leaves out the biases of keys, whose gradients are rounding."""
    assert a.keys() == b.keys()
    for name in a:
        if not (tolerance and name.endswith("k_proj.bias")):
            assert_close(a[name], b[name], tolerance)


# ------------------------------------------------------------------------------------------------
# Data and ROUGE


def test_rouge_by_hand():
    assert train.rouge("le chat dort", "le chat mange") == pytest.approx((2 / 3, 1 / 2, 2 / 3))
    assert train.rouge("a b c d", "d c b a") == pytest.approx((1, 0, 1 / 4))
    assert train.rouge("L’été !", "l’été") == pytest.approx((1, 1, 1))
    assert train.rouge("", "mot") == (0, 0, 0)


def test_batches_contain_every_pair_once_and_keep_their_size():
    lengths = [random.Random(i).randrange(5, 90) for i in range(200)]
    pairs = [(length // 2 * [7], (length - length // 2) * [7]) for length in lengths]
    groups = train.group_by_length(pairs, 300)
    assert sorted(i for group in groups for i in group) == list(range(200))
    assert max(len(group) * max(lengths[i] for i in group) for group in groups) <= 300


def test_lines_with_a_byte_order_mark_and_blank_lines_can_be_read(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"document": "\xc3\xa9t\xc3\xa9"}\r\n\n{"document": ""}\n\n')
    assert train.read_lines(path, ["document"]) == [{"document": "été"}, {"document": ""}]


GOOD_LINE = b'{"document": "a", "summary": "b"}\n'


@pytest.mark.parametrize("content, line", [
    (b"{", 1), (b'{"document": 3, "summary": "b"}', 1), (b'{"document": "a"}', 1), (b'["a"]', 1),
    (b"3", 1), (b"null", 1), (b"[" * 10 ** 6, 1),
    (GOOD_LINE + '{"document": "été", "summary": "b"}'.encode("latin-1"), 2),
    (GOOD_LINE + GOOD_LINE + rb'{"document": "\ud800", "summary": "b"}', 3)])
def test_a_line_that_is_no_pair_is_named(tmp_path, content, line):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad.jsonl, line {line}, "):
        train.read_lines(path)


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl is empty"):
        train.read_lines(tmp_path / "empty.jsonl")


# ------------------------------------------------------------------------------------------------
# Learning


def test_the_loss_falls(pairs, tmp_path, capsys):
    run(pairs, tmp_path / "model", "--steps", 12, "--evaluate-every", 6, "--validation", pairs,
        "--evaluate-on", 2, "--num-beams", 1)
    losses = re.findall(r"validation loss (\d+\.\d+)", capsys.readouterr().err)
    assert len(losses) == 2 and float(losses[1]) < float(losses[0]) - 0.1


def test_accumulated_batches_count_as_one(pairs, tmp_path):
    options = *NO_DROPOUT, "--steps", 1, "--batch-tokens"
    once = run(pairs, tmp_path / "once", *options, 100000)
    tokenizer = BarthezTokenizer(GOLDENS / "plain" / "sentencepiece.bpe.model")
    lengths = Namespace(max_source_length=None, max_target_length=None)
    ids = train.encode_pairs(train.read_lines(pairs), tokenizer, lengths)
    several = len(train.group_by_length(ids, 400, "1 0"))
    assert several > 2
    several = run(pairs, tmp_path / "several", *options, 400, "--accumulate", several)
    assert_same(several, once, 3e-4)


PRINT_NORMS = """
import load_weights, torch, train
clip = torch.nn.utils.clip_grad_norm_
def clip_and_print(weights, most):
    norm = clip(weights, most)
    train.say(f"norm {norm:.4f}")
    return norm
torch.nn.utils.clip_grad_norm_ = clip_and_print
"""


def test_two_processes_train_as_one_that_accumulates(pairs, tmp_path, capsys, monkeypatch):
    options = *NO_DROPOUT, "--steps", 6, "--learning-rate", 1e-4
    script = tmp_path / "script.py"
    script.write_text(PRINT_NORMS + "load_weights.run(train.main)")
    command = arguments(pairs, tmp_path / "two", *options, "--accumulate", 2)
    printed_by_two = run_child(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                                "2", str(script), *command[1:]])

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", torch.nn.utils.clip_grad_norm_)
    exec(PRINT_NORMS, {})
    one = run(pairs, tmp_path / "one", *options, "--accumulate", 4)
    numbers = [torch.tensor([float(x) for x in re.findall(r"(?:loss|norm) (\d+\.\d+)", printed)])
               for printed in (printed_by_two, capsys.readouterr().err)]
    assert len(numbers[1]) == 8  # two lines of progress, six norms
    assert_close(numbers[0], numbers[1], 2e-3)
    assert_same(load_file(tmp_path / "two" / "model.safetensors"), one, 3e-4)


def test_only_the_global_embeddings_change_if_asked(pairs, tmp_path):
    before = run(pairs, tmp_path / "a", "--steps", 1, "--learning-rate", 0)
    after = run(pairs, tmp_path / "b", "--steps", 2, "--only-global-embeddings",
                "--weight-decay", 0)
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {"model.encoder.global_embeddings.weight"}


def test_gradient_checkpointing_changes_no_result(pairs, tmp_path):
    without = run(pairs, tmp_path / "a", "--steps", 2)
    assert_same(run(pairs, tmp_path / "b", "--steps", 2, "--gradient-checkpointing"), without, 1e-6)


def test_the_best_model_is_saved_not_the_last(pairs, tmp_path, monkeypatch):
    weights, scores = [], [0.1, 0.3, 0.2]

    def evaluate(model):
        weights.append({name: weight.clone() for name, weight in model.state_dict().items()})
        return scores[len(weights) - 1], "evaluated"

    training_pairs = train.training_pairs
    monkeypatch.setattr(train, "training_pairs", lambda *a: (training_pairs(*a)[0], evaluate))
    saved = run(pairs, tmp_path / "model", "--steps", 3, "--evaluate-every", 1)
    assert_same(saved, {name: weights[1][name] for name in saved})


def test_bfloat16_is_the_default_only_where_the_processor_has_it(monkeypatch, pairs, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for supported, precision in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda s=supported: s)
        options = train.training_parser("", "").parse_args(["--model", str(GOLDENS / "plain")])
        train.load(options)
        assert options.precision == precision


# ------------------------------------------------------------------------------------------------
# Interrupted runs


KILLED = """
import os, signal, train
train.CHECKPOINT_SECONDS = 0
update = train.update
def update_until_killed(module, optimizer, step, *rest):
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(module, optimizer, step, *rest)
train.update = update_until_killed
train.main()
"""


def test_a_killed_run_resumes_to_the_same_result(pairs, tmp_path, capsys):
    options = "--steps", 8, "--evaluate-every", 4, "--validation", pairs, "--evaluate-on", 2
    whole = run(pairs, tmp_path / "whole", *options)
    command = arguments(pairs, tmp_path / "killed", *options)
    run_child(["-c", KILLED, *command[1:]], status=-signal.SIGKILL)
    assert_same(run(pairs, tmp_path / "killed", *options), whole)
    assert "resuming after step 5 of 8" in capsys.readouterr().err


def test_a_finished_run_is_not_repeated(pairs, tmp_path, capsys):
    first = run(pairs, tmp_path / "model", "--steps", 2)
    capsys.readouterr()
    assert_same(run(pairs, tmp_path / "model", "--steps", 2), first)
    said = capsys.readouterr().err
    assert "loss" not in said
    assert f"The best model, that of step 2, is in {tmp_path / 'model'}." in said


@pytest.mark.parametrize("options, difference", [
    (["--steps", 1], "steps was 2 and is now 1"),
    (["--learning-rate", 0.5], r"learning_rate was 0.001 and is now 0.5"),
    (["--seed", 7], "seed was 1 and is now 7"),
    (["--model", "other"], "model was .* and is now"),
    (["--set", "dropout=0.5"], "set was .* and is now"),
    (["--train", "other.jsonl"], "train was .* and is now")])
def test_a_run_with_other_options_does_not_resume(pairs, tmp_path, options, difference):
    run(pairs, tmp_path / "model", "--steps", 2)
    if "other.jsonl" in options:
        options = ["--train", tmp_path / "other.jsonl"]
        options[1].write_text(pairs.read_text().replace("Paris", "Lyon"))
    if "other" in options:
        options = ["--model", tmp_path / "other"]
        run(pairs, tmp_path / "other", "--steps", 1)
    with pytest.raises(ValueError, match=difference):
        run(pairs, tmp_path / "model", "--steps", 2, *options)
    run(pairs, tmp_path / "model", "--steps", 2, *options, "--start-over")


@pytest.mark.parametrize("damage", ["cut", "empty", "one bit", "text", "another program"])
def test_a_damaged_checkpoint_is_one_line_with_the_remedy(pairs, tmp_path, damage):
    path = tmp_path / "model" / "checkpoint.pt"
    before = run(pairs, tmp_path / "model", "--steps", 2)
    content = bytearray(path.read_bytes())
    if damage == "another program":
        torch.save({"model": before}, path)
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes({"cut": content[:1000], "empty": b"", "one bit": content,
                          "text": b"text"}[damage])
    with pytest.raises(ValueError, match="is damaged or is not from this program.*--start-over"):
        run(pairs, tmp_path / "model", "--steps", 2)
    assert_same(run(pairs, tmp_path / "model", "--steps", 2, "--start-over"), before)


def test_a_second_run_into_the_same_folder_is_refused(pairs, tmp_path):
    options = train.training_parser("", "").parse_args(
        ["--model", "plain", "--output", str(tmp_path / "model")])
    with train.output_folder(options), pytest.raises(ValueError, match="another run is using"):
        run(pairs, tmp_path / "model", "--steps", 1)
    run(pairs, tmp_path / "model", "--steps", 1)


def test_a_model_from_elsewhere_is_not_replaced(pairs, tmp_path):
    shutil.copytree(GOLDENS / "plain", tmp_path / "model")
    before = (tmp_path / "model" / "config.json").read_text()
    with pytest.raises(ValueError, match="has a model.*--start-over"):
        run(pairs, tmp_path / "model", "--steps", 1)
    assert (tmp_path / "model" / "config.json").read_text() == before
    run(pairs, tmp_path / "model", "--steps", 1, "--start-over")


def test_a_full_disk_is_noticed_before_training(pairs, tmp_path):
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
    try:
        with pytest.raises(OSError, match="checkpoint.pt cannot be written; is the disk full"):
            run(pairs, tmp_path / "model", "--steps", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert os.listdir(tmp_path / "model") == ["train.lock"]


def test_a_model_that_diverges_is_not_saved(pairs, tmp_path, monkeypatch):
    before = run(pairs, tmp_path / "model", "--steps", 3, "--evaluate-every", 1)

    def infinite(loss, batch):
        return loss.model(**batch).logits.sum() * float("inf")

    monkeypatch.setattr(train.CrossEntropy, "forward", infinite)
    with pytest.raises(ValueError, match="step 1: the gradients are not finite"):
        run(pairs, tmp_path / "model", "--steps", 3, "--start-over")
    assert_same(load_file(tmp_path / "model" / "model.safetensors"), before)


def test_weights_that_are_not_finite_are_not_saved(pairs, tmp_path, monkeypatch):
    def update(module, *rest):
        module.model.model.shared.weight.data[5] = float("nan")
        return torch.tensor(0.0)

    monkeypatch.setattr(train, "update", update)
    with pytest.raises(ValueError, match="finite"):
        run(pairs, tmp_path / "model", "--steps", 1, "--validation", pairs, "--evaluate-on", 1)
    assert not (tmp_path / "model" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize("options, message", [
    (["--steps", "-1"], "--steps: -1 is not a number from 1 to"),
    (["--steps", "0"], "--steps"), (["--accumulate", "0"], "--accumulate"),
    (["--evaluate-every", "0"], "--evaluate-every"), (["--evaluate-on", "0"], "--evaluate-on"),
    (["--label-smoothing", "2"], "--label-smoothing: 2 is not a number from 0 to 1"),
    (["--warmup", "200"], "--warmup: 200 is not a number from 0 to 1"),
    (["--learning-rate", "nan"], "--learning-rate"), (["--batch-tokens", "x"], "--batch-tokens"),
    (["--max-source-length", "2"], "--max-source-length"),
    (["--max-source-length", "257"], "the model has 256 positions"),
    (["--max-target-length", "1000"], "--set max_position_embeddings=1000"),
    (["--examples", "1"], "--examples has no effect"),
    (["--evaluate", "x"], "not allowed with argument --train"),
    (["--output", ""], "--output is missing"), (["--output", "/dev/null/x"], "/dev/null"),
    (["--validation", "/nonexistent"], "/nonexistent"),
    (["--model", "/nonexistent"], "/nonexistent"),
    (["--set", "dropout"], "KEY=VALUE"), (["--set", "nothing=1"], "nothing"),
    (["--set", "lsg=false", "--only-global-embeddings"], "--only-global-embeddings")])
def test_a_wrong_option_is_refused(pairs, tmp_path, capsys, options, message):
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        run(pairs, tmp_path / "model", *options)
    assert message in str(error.value) + capsys.readouterr().err
    assert not (tmp_path / "model" / "checkpoint.pt").exists()


def test_a_mistake_is_status_2_and_one_line_below_the_usage(pairs, tmp_path):
    command = arguments(pairs, tmp_path / "model", "--warmup", 200)
    said = run_child(command, status=2).splitlines()
    assert said[0].startswith("usage: train.py --model NAME (--train FILE ")
    assert len(said) == 2 and said[1].startswith("train.py: error: argument --warmup: 200 is not")


def test_options_that_generate_refuses_are_found_before_training(pairs, tmp_path):
    with pytest.raises(ValueError, match="min_length"):
        run(pairs, tmp_path / "model", "min_length=200", "--validation", pairs, "--steps", 1)
    assert not (tmp_path / "model" / "checkpoint.pt").exists()


def test_small_data_and_odd_options_work(pairs, tmp_path, capsys):
    one = tmp_path / "one.jsonl"
    one.write_text(pairs.read_text().splitlines()[0])
    run(pairs, tmp_path / "a", "--steps", 1, "--warmup", 0, "--batch-tokens", 1,
        "--accumulate", 30, "--validation", one)
    run(one, tmp_path / "b", "--steps", 2, "--warmup", 1, "--accumulate", 2, "--validation", one)
    said = capsys.readouterr().err
    assert said.count("validation loss") == 2 and "step 1/2  loss" in said
    assert "checkpoint.pt there serves only to resume" in said


def evaluation(pairs, *options):
    """A command line that evaluates the toy model."""
    return [str(argument) for argument in (
        "train.py", "--model", GOLDENS / "plain", "--evaluate", pairs, "--num-beams", 1,
        "--set", "max_position_embeddings=256", "max_length=8", *options)]


def test_evaluation_prints_rouge_of_the_model_and_of_the_first_sentence(pairs, capsys):
    main(evaluation(pairs, "--examples", 1000))
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"cross-entropy per token of the 24 summaries: \d+\.\d{3}", lines[0])
    assert lines[1].split() == ["all:", "24", "documents", "ROUGE-1", "ROUGE-2", "ROUGE-L"]
    assert lines[2].split()[0] == "model"
    assert lines[3].split() == ["first", "sentence", "1.000", "1.000", "1.000"]
    assert sum(line.startswith("  reference  ") for line in lines) == 24


def test_evaluation_of_long_documents_only(pairs, capsys):
    main(evaluation(pairs, "--longer-than", 20))
    assert "of the 24" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="no document is longer than 1000 tokens"):
        main(evaluation(pairs, "--longer-than", 1000))


def test_only_the_first_of_several_processes_prints_an_evaluation(pairs, capsys, monkeypatch):
    monkeypatch.setattr(train, "RANK", 1)
    main(evaluation(pairs))
    assert capsys.readouterr().out == ""
