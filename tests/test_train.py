"""train.py: the data that the model sees, learning, and runs that fail or are interrupted."""

import itertools
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import barthez
import train
from conftest import GOLDENS, assert_close
from tokenizer import BarthezTokenizer

ROOT = Path(__file__).parent.parent
TOKENIZER = BarthezTokenizer(GOLDENS / "plain" / "sentencepiece.bpe.model")
SENTENCES = ["Le ministre est à Paris.", "Les élèves sont dans la rue.", "Il a signé un accord.",
             "La ville a fermé ses écoles.", "Elle est partie en train."]
NO_DROPOUT = "--set", "dropout=0.0", "attention_dropout=0.0", "activation_dropout=0.0"


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl")


def write_pairs(path):
    """Write 24 pairs."""
    rng = random.Random(3)
    with open(path, "w") as file:
        for _ in range(24):
            document = rng.choices(SENTENCES, k=rng.randrange(1, 5))
            print(json.dumps({"document": " ".join(document), "summary": document[0]}), file=file)
    return path


def arguments(pairs, output, *options):
    """A command line that trains the toy model."""
    return [str(argument) for argument in (
        "train.py", "--model", GOLDENS / "plain", "--train", pairs, "--output", output,
        "--batch-tokens", 300, "--learning-rate", 1e-3, "--precision", "float32", "--set",
        "max_position_embeddings=256", "block_size=8", "sparse_block_size=8", "max_length=24",
        *options)]


def main(command):
    """Run train.py in this process."""
    old, sys.argv = sys.argv, [str(word) for word in command]
    try:
        train.main()
    finally:
        sys.argv = old


def run(pairs, output, *options):
    """Train the toy model in this process. Returns the saved weights."""
    main(arguments(pairs, output, *options))
    return load_file(output / "model.safetensors")


def assert_same(a, b, tolerance=0.0):
    """Equal weights. A tolerance leaves out the biases of keys, whose gradients are rounding."""
    assert a.keys() == b.keys()
    for name in a:
        if not (tolerance and name.endswith("k_proj.bias")):
            assert_close(a[name], b[name], tolerance)


# ------------------------------------------------------------------------------------------------
# Pairs and batches


def read(path, source=256, target=24):
    options = Namespace(max_source_length=source, max_target_length=target)
    return train.read_pairs(path, TOKENIZER, options)


def test_a_byte_order_mark_and_blank_lines_are_no_pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes('\ufeff{"document": "été", "summary": "a"}\r\n\n{"document": "", '
                     '"summary": "b"}\n\n'.encode())
    assert [pair["source"] for pair in read(path)] == [TOKENIZER.encode("été"), [0, 2]]


GOOD_LINE = b'{"document": "a", "summary": "b"}\n'


@pytest.mark.parametrize("content, message", [
    (b"{", "line 1, "), (b'{"document": 3, "summary": "b"}', "line 1, "), (b'["a"]', "line 1, "),
    (b"[" * 10 ** 6, "line 1, "), (b"\n", "is empty"),
    (GOOD_LINE + '{"document": "été", "summary": "b"}'.encode("latin-1"), "line 2, "),
    (GOOD_LINE * 2 + rb'{"document": "\ud800", "summary": "b"}', "line 3, ")])
def test_a_line_that_is_no_pair_is_named(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.jsonl,? {message}"):
        read(path)


def test_texts_that_are_cut_are_counted_once_and_keep_their_end(pairs, capsys):
    longer = sum(len(pair["source"]) > 40 for pair in read(pairs, target=64))
    assert capsys.readouterr().err == "" and 0 < longer < 24
    rows = [pair["source"] for pair in read(pairs, source=40, target=64)]
    assert capsys.readouterr().err == (f"{longer} of 24 documents in {pairs} are longer than "
                                       "--max-source-length 40 tokens: their ends are not read\n")
    assert max(map(len, rows)) == 40
    assert all(row[-1] == TOKENIZER.eos_token_id for row in rows)


def test_batches_have_every_pair_once_keep_their_size_and_differ_between_epochs():
    lengths = [random.Random(i).randrange(5, 90) for i in range(200)]
    pairs = [{"i": i, "source": [7, 7], "target": (length - 2) * [7]}
             for i, length in enumerate(lengths)]

    def two_epochs(seed):
        lists = train.shuffled(pairs, Namespace(seed=seed, batch_tokens=300))
        for _ in range(2):
            epoch = []
            while sum(map(len, epoch)) < len(pairs):
                epoch.append([pair["i"] for pair in next(lists)])
            assert sorted(itertools.chain(*epoch)) == list(range(200))
            assert max(len(group) * max(lengths[i] for i in group) for group in epoch) <= 300
            yield sorted(epoch)

    first, second = two_epochs(seed=1)
    assert first != second
    assert [first, second] == list(two_epochs(seed=1)) != list(two_epochs(seed=2))


# ------------------------------------------------------------------------------------------------
# Loss and ROUGE


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_the_formula(pairs, smoothing):
    model, _ = barthez.load_model(GOLDENS / "plain")
    batch = train.make_batch(read(pairs)[:5], model)
    loss = train.cross_entropy(model, batch, smoothing)
    input_ids, attention_mask, decoder_input_ids, labels = batch
    assert (labels == -100).any() and not attention_mask.all()
    log_p = model(input_ids, attention_mask, decoder_input_ids).logits.double().log_softmax(-1)
    expected = 0
    for row, targets in zip(log_p, labels):
        for position, target in zip(row, targets[targets != -100]):
            expected -= (1 - smoothing) * position[target] + smoothing * position.mean()
    assert_close(loss / expected, torch.ones((), dtype=torch.float64), 1e-6)


def test_rouge_is_the_definition():
    rng = random.Random(0)
    for _ in range(50):
        a, b = rng.choices("xyz", k=rng.randrange(2, 8)), rng.choices("xyz", k=rng.randrange(2, 8))
        for n in 1, 2:
            left, right = ([tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
                           for words in (a, b))
            common = sum(min(left.count(gram), right.count(gram)) for gram in {*left})
            f1 = train.rouge(" ".join(a), " ".join(b))[n - 1]
            assert f1 == pytest.approx(2 * common / (len(left) + len(right)))
        common = max(length for length in range(len(a) + 1)
                     if {*itertools.combinations(a, length)} & {*itertools.combinations(b, length)})
        f1 = train.rouge(" ".join(a), " ".join(b))[2]
        assert f1 == pytest.approx(2 * common / (len(a) + len(b)))


@pytest.mark.parametrize("other", [
    "Les e\u0301le\u0300ves de\u0301ploient de\u0301ja\u0300 l\u2019affiche",  # NFD
    "Les élèves déploient déjà l’a\ufb03che",  # a ligature
    "Les élè\u00adves dé\u00adploient déjà l’af\u00adfiche"])  # soft hyphens
def test_rouge_of_the_same_words_in_another_encoding_is_one(other):
    assert train.rouge("Les élèves déploient déjà l’affiche", other) == (1, 1, 1)
    assert train.rouge(other, "Les élèves déploient déjà l’affiche !") == (1, 1, 1)
    assert train.rouge("", other) == (0, 0, 0)


# ------------------------------------------------------------------------------------------------
# Learning


def test_the_loss_falls(pairs, tmp_path, capsys):
    run(pairs, tmp_path / "model", "--steps", 8, "--evaluate-every", 4, "--validation", pairs,
        "--evaluate-on", 2, "--num-beams", 1)
    losses = re.findall(r"cross-entropy per token (\d+\.\d+)", capsys.readouterr().err)
    assert len(losses) == 2 and float(losses[1]) < float(losses[0]) - 0.1


def test_the_learning_rate_rises_and_falls_linearly(pairs, tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def step_and_note(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_and_note)
    run(pairs, tmp_path / "model", "--steps", 5, "--warmup", 0.6, "--learning-rate", 0.01)
    assert rates == pytest.approx([0.01 / 3, 0.02 / 3, 0.006, 0.004, 0.002])


def test_accumulated_batches_count_as_one(pairs, tmp_path):
    lists = train.shuffled(read(pairs), Namespace(seed=1, batch_tokens=400))
    assert sum(map(len, itertools.islice(lists, 5))) == 24  # all pairs
    options = *NO_DROPOUT, "--steps", 1, "--batch-tokens"
    once = run(pairs, tmp_path / "once", *options, 100000)
    assert_same(run(pairs, tmp_path / "five", *options, 400, "--accumulate", 5), once, 3e-4)


def test_options_of_the_update_have_an_effect(pairs, tmp_path):
    usual = run(pairs, tmp_path / "usual", "--steps", 1)["model.shared.weight"]
    for name, value in (("label-smoothing", 0.5), ("weight-decay", 0.5), ("seed", 2)):
        changed = run(pairs, tmp_path / name, "--steps", 1, f"--{name}", value)
        assert not changed["model.shared.weight"].equal(usual), name


def test_only_the_global_embeddings_change_if_asked(pairs, tmp_path):
    before = run(pairs, tmp_path / "a", "--steps", 1, "--learning-rate", 0)
    after = run(pairs, tmp_path / "b", "--steps", 2, "--only-global-embeddings",
                "--weight-decay", 0)
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {"model.encoder.global_embeddings.weight"}


def test_the_best_model_is_saved_not_the_last(pairs, tmp_path, monkeypatch):
    weights, scores = [], [0.1, 0.3, 0.2]

    def measure(model, *_):
        weights.append({name: weight.clone() for name, weight in model.state_dict().items()})
        return scores[len(weights) - 1], "measured"

    monkeypatch.setattr(train, "measure", measure)
    saved = run(pairs, tmp_path / "model", "--steps", 3, "--evaluate-every", 1, "--validation",
                pairs)
    assert_same(saved, {name: weights[1][name] for name in saved})


@pytest.mark.parametrize("in_checkpoint, given, max_length, num_beams", [
    (9, [], 9, 3), (None, [], 128, 3), (9, ["--max-target-length", 14], 14, 3),
    (9, ["--num-beams", 2], 9, 2)])
def test_the_saved_model_writes_as_it_was_measured(pairs, tmp_path, capsys, in_checkpoint, given,
                                                   max_length, num_beams):
    shutil.copytree(GOLDENS / "plain", tmp_path / "start")
    config = json.loads((tmp_path / "start" / "config.json").read_text())
    config |= {"max_length": in_checkpoint, "num_beams": 3, "no_repeat_ngram_size": 0}
    (tmp_path / "start" / "config.json").write_text(json.dumps(config))
    command = arguments(pairs, tmp_path / "model", "--model", tmp_path / "start", "--steps", 1,
                        "--validation", pairs, "--evaluate-on", 1, *given)
    command.remove("max_length=24")
    main(command)
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (saved["max_length"], saved["num_beams"]) == (max_length, num_beams)
    model, tokenizer = barthez.load_model(tmp_path / "model")
    [pair] = random.Random(0).sample(read(pairs), 1)
    [summary] = barthez.summarize(model, tokenizer, [pair["document"]])
    assert f"for example {summary!r}\n" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# Interrupted runs


def test_an_interrupted_run_resumes_to_the_same_result(pairs, tmp_path, capsys, monkeypatch):
    options = ("--steps", 4, "--evaluate-every", 2, "--validation", pairs, "--evaluate-on", 1,
               "--num-beams", 2, "--max-target-length", 8)
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    whole = run(pairs, tmp_path / "whole", *options)
    for module, name, call, resumed_after in (
            (train, "update", 4, 3), (train, "measure", 1, 1), (train, "save_model", 2, 3),
            (torch, "save", 4, 2)):
        calls, function = itertools.count(1), getattr(module, name)

        def interrupted(*arguments):
            if next(calls) == call:
                if name == "save":
                    Path(arguments[1]).write_bytes(b"half")
                raise KeyboardInterrupt
            return function(*arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, interrupted)
            run(pairs, tmp_path / name, *options)
        assert_same(run(pairs, tmp_path / name, *options), whole)
        assert f"resuming after step {resumed_after} of 4" in capsys.readouterr().err


def test_a_finished_run_is_not_repeated_wherever_its_files_are(pairs, tmp_path, capsys):
    first = run(pairs, tmp_path / "model", "--steps", 2)
    capsys.readouterr()
    moved = shutil.move(tmp_path / "model", tmp_path / "moved"), shutil.move(pairs, tmp_path / "x")
    assert_same(run(moved[1], moved[0], "--steps", 2, "--gradient-checkpointing"), first)
    said = capsys.readouterr().err
    assert "loss" not in said and f"the best model, of step 2, is in {moved[0]}\n" in said


def refused(pairs, tmp_path, message, *options):
    """The run is refused, and leaves the folder as it is."""
    before = (tmp_path / "model" / "config.json").read_bytes()
    remedy = "choose another --output, or delete that folder"
    with pytest.raises(ValueError, match=f"{message}.*: .*{remedy}$"):
        run(pairs, tmp_path / "model", "--steps", 1, *options)
    assert (tmp_path / "model" / "config.json").read_bytes() == before


@pytest.mark.parametrize("options, difference", [
    ([], "number of processes was 1 and is now 2"), (["--steps", 2], "steps was 1 and is now 2"),
    (["--model", "copy"], "model was .*plain and is now .*copy"),
    (["--set", "dropout=0.5"], r"\(dropout was 0.1 and is now 0.5\)"),
    (["--train", "other.jsonl"], r"\(sha256 of --train was \w+ and is now \w+\)")])
def test_another_run_does_not_resume(pairs, tmp_path, monkeypatch, options, difference):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDENS / "plain", "copy")
    Path("other.jsonl").write_text(pairs.read_text().replace("Paris", "Lyon"))
    run(pairs, tmp_path / "model", "--steps", 1)
    if not options:
        monkeypatch.setattr(train, "PROCESSES", 2)
    refused(pairs, tmp_path, difference, *options)


@pytest.mark.parametrize("damage", ["cut", "one bit", "another program"])
def test_a_damaged_checkpoint_is_refused(pairs, tmp_path, damage):
    path = tmp_path / "model" / "checkpoint.pt"
    weights = run(pairs, tmp_path / "model", "--steps", 1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[:1000] if damage == "cut" else content)
    if damage == "another program":
        torch.save({"model": weights}, path)
    refused(pairs, tmp_path, "is damaged or is not from this program")


def test_a_model_without_checkpoint_is_not_replaced(pairs, tmp_path):
    shutil.copytree(GOLDENS / "plain", tmp_path / "model")
    refused(pairs, tmp_path, "has a model, but no checkpoint.pt")


def test_a_second_run_into_the_same_folder_is_refused(pairs, tmp_path, monkeypatch):
    update, command = train.update, arguments(pairs, tmp_path / "model", "--steps", 1)

    def update_while_another_starts(*arguments):
        with pytest.raises(ValueError, match="another run is using .*: choose another --output"):
            main(command)
        return update(*arguments)

    monkeypatch.setattr(train, "update", update_while_another_starts)
    main(command)
    main(command)


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
    loss = train.cross_entropy
    monkeypatch.setattr(train, "cross_entropy", lambda *a: loss(*a) * float("inf"))
    with pytest.raises(ValueError, match="step 1: the gradients are not finite; lower --learning"):
        run(pairs, tmp_path / "model", "--steps", 3)
    assert not (tmp_path / "model" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize("options, message", [
    (["--steps", "0"], "begin at 1"), (["--max-source-length", "-3"], "at least 3"),
    (["--warmup", "200"], "--warmup is from 0 to 1"),
    (["--max-target-length", "30", "--set", "min_length=40"], "min_length=40: choose 0 to max_length"),
    (["--evaluate", "x"], "not allowed with argument --train"),
    (["--validation", "/nonexistent"], "/nonexistent")])
def test_a_wrong_option_is_one_line_and_status_2(pairs, tmp_path, monkeypatch, capsys, options,
                                                 message):
    monkeypatch.setattr(sys, "argv", arguments(pairs, tmp_path / "model", *options))
    with pytest.raises(SystemExit, match="^2$"):
        barthez.run(train.main)
    said = capsys.readouterr().err
    assert said.startswith("train.py: ") and message in said and said.count("\n") == 1


@pytest.mark.parametrize("name", ["--max-source-length", "--max-target-length"])
def test_more_tokens_than_positions_are_refused_with_advice_that_works(pairs, tmp_path, name):
    with pytest.raises(ValueError, match="the model has 256 positions") as error:
        run(pairs, tmp_path / "model", "--steps", 1, name, 300)
    advice = re.search(r"--set (\S+)", str(error.value)).group(1)
    run(pairs, tmp_path / "model", "--steps", 1, name, 300, "--set", advice)


def test_evaluation_prints_rouge_of_the_model_and_of_the_first_sentence(pairs, capsys, monkeypatch):
    command = ["train.py", "--model", GOLDENS / "plain", "--evaluate", pairs, "--num-beams", 1,
               "--set", "max_position_embeddings=256", "max_length=24"]
    main(command)
    first, second, third, _ = capsys.readouterr().out.splitlines()
    assert first == "24 pairs"
    assert second == "first sentence  ROUGE-1 1.000  ROUGE-2 1.000  ROUGE-L 1.000"
    assert re.fullmatch(r"model           (ROUGE-[12L] 0\.\d{3}  ){3}"
                        r"cross-entropy per token \d+\.\d{3}", third)
    monkeypatch.setattr(train, "RANK", 1)  # only the first of several processes prints
    main(command)
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------
# Several processes

THREE_STEPS = *NO_DROPOUT, "--steps", 3, "--learning-rate", 1e-4
TRAIN_AND_PRINT_NORMS = """
import barthez, torch, train
clip = torch.nn.utils.clip_grad_norm_
def clip_and_print(weights, most):
    norm = clip(weights, most)
    train.say(f"norm {norm:.4f}")
    return norm
torch.nn.utils.clip_grad_norm_ = clip_and_print
barthez.run(train.main)
"""


@pytest.fixture(scope="module", autouse=True)
def two_processes(tmp_path_factory):
    """A run of two processes and its folder. It begins before the first test of this file and goes
    on while the others run."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(TRAIN_AND_PRINT_NORMS)
    _, *words = arguments(write_pairs(folder / "pairs.jsonl"), folder / "model",
                          *THREE_STEPS, "--accumulate", 2)
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         folder / "script.py", *words], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    yield process, folder
    process.terminate()
    process.wait()


def test_two_processes_train_as_one_that_accumulates(two_processes, tmp_path, capsys, monkeypatch):
    process, folder = two_processes
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", torch.nn.utils.clip_grad_norm_)
    monkeypatch.setattr(sys, "argv", arguments(folder / "pairs.jsonl", tmp_path, *THREE_STEPS,
                                               "--accumulate", 4))
    exec(TRAIN_AND_PRINT_NORMS, {})
    printed = process.communicate(timeout=120)[1]
    assert process.returncode == 0, printed
    two, one = (torch.tensor([float(x) for x in re.findall(r"(?:loss|norm) (\d+\.\d+)", text)])
                for text in (printed, capsys.readouterr().err))
    assert len(one) == 5  # two lines of progress, three norms
    assert_close(two, one, 2e-3)
    assert_same(load_file(folder / "model" / "model.safetensors"),
                load_file(tmp_path / "model.safetensors"), 3e-4)
