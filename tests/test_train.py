"""train.py: what it feeds the model, that it learns, and that a killed run loses nothing."""

import contextlib
import json
import random
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from barthez import BarthezConfig, BarthezForConditionalGeneration
from conftest import GOLDENS, assert_close
from load_weights import load_model
from tokenizer import BarthezTokenizer

ROOT = Path(__file__).parent.parent
SENTENCES = ["Le ministre est à Paris.", "Les élèves sont dans la rue.", "Il a signé un accord.",
             "La ville a fermé ses écoles.", "Elle est partie en train."]


@pytest.fixture
def pairs(tmp_path):
    rng = random.Random(3)
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for _ in range(24):
            document = rng.choices(SENTENCES, k=rng.randrange(1, 5))
            print(json.dumps({"document": " ".join(document), "summary": document[0]}), file=file)
    return tmp_path / "pairs.jsonl"


def run(pairs, output, *options, launcher=()):
    """Train the toy model; returns its weights."""
    arguments = ["train.py", "--model", GOLDENS / "plain", "--train", pairs, "--output", output,
                 "--batch-tokens", 300, "--learning-rate", 1e-3, "--warmup", 2, "--set",
                 "max_position_embeddings=256", "block_size=8", "sparse_block_size=8", *options]
    if launcher:
        command = [sys.executable, "-m", *launcher, *map(str, arguments)]
        process = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True,
                                 timeout=120)
        print(process.stderr, file=sys.stderr)
    else:
        old, sys.argv = sys.argv, list(map(str, arguments))
        try:
            train.main()
        finally:
            sys.argv = old
    return load_file(output / "model.safetensors")


def same(a, b, tolerance=0.0):
    """Equal weights; a tolerance leaves out biases of keys, whose gradients are rounding alone."""
    assert a.keys() == b.keys()
    for name in a:
        if not (tolerance and name.endswith("k_proj.bias")):
            assert_close(a[name], b[name], tolerance)


@pytest.mark.parametrize("options", [(), ("--expected-rouge", 2, "--max-target-length", 9)])
def test_a_killed_run_goes_on_to_the_same_result(pairs, tmp_path, monkeypatch, options):
    options = "--steps", 6, "--evaluate-every", 2, "--precision", "float32", *options
    whole = run(pairs, tmp_path / "whole", *options)

    def killed(arguments, model, tokenizer, held_out, autocast, step):
        if step == 4:
            raise KeyboardInterrupt
        return step

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "evaluate", killed)
        run(pairs, tmp_path / "killed", *options)
    same(run(pairs, tmp_path / "killed", *options), whole)


def test_accumulated_batches_count_as_one(pairs, tmp_path):
    options = "--steps", 2, "--precision", "float32", "--batch-tokens"
    dropout = "dropout=0.0", "attention_dropout=0.0", "activation_dropout=0.0"
    once = run(pairs, tmp_path / "once", *dropout, *options, 100000)
    lengths = train.Pairs(train.read_lines(pairs, "document"), BarthezTokenizer(
        GOLDENS / "plain" / "sentencepiece.bpe.model"), None, None).lengths
    several = len(train.batches(lengths, 400, random.Random("1 0")))
    assert several > 2
    same(run(pairs, tmp_path / "several", *dropout, *options, 400, "--accumulate", several),
         once, 3e-4)


def test_two_processes_train_as_one_that_accumulates(pairs, tmp_path, capsys):
    options = ("dropout=0.0", "attention_dropout=0.0", "activation_dropout=0.0", "--steps", 20,
               "--learning-rate", 1e-4, "--precision", "float32")
    two = run(pairs, tmp_path / "two", *options, launcher=(
        "torch.distributed.run", "--standalone", "--nproc-per-node", "2"))
    same(two, run(pairs, tmp_path / "one", *options, "--accumulate", 2), 3e-4)
    losses = re.findall(r"loss (\d+\.\d+)", capsys.readouterr().err)
    assert len(losses) == 2 and abs(float(losses[0]) - float(losses[1])) < 0.002


def test_only_the_global_embeddings_change_if_asked(pairs, tmp_path):
    before = run(pairs, tmp_path / "a", "--steps", 1, "--learning-rate", 0, "--precision",
                 "float32")
    after = run(pairs, tmp_path / "b", "--steps", 2, "--only-global-embeddings",
                "--weight-decay", 0, "--precision", "float32")
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {"model.encoder.global_embeddings.weight"}


def test_expected_rouge_is_that_of_the_beams_by_their_likelihood():
    model, tokenizer = load_model(GOLDENS / "plain", block_size=8, sparse_block_size=8, dropout=0.0,
                                  attention_dropout=0.0, activation_dropout=0.0,
                                  max_position_embeddings=256)
    model.final_logits_bias[0, tokenizer.eos_token_id] = 2.0  # so that lengths differ
    data = train.Pairs([{"document": " ".join(SENTENCES[i:]), "summary": SENTENCES[i]}
                        for i in range(3)], tokenizer, None, None)
    settings = {"num_beams": 3, "max_length": 11}
    expected, lengths = 0.0, set()
    for source, summary, target in zip(data.sources, data.summaries, data.targets):
        source = torch.tensor([source])

        def log_prob(ids):
            """Of what follows the start token, in sum."""
            logits = model(source, decoder_input_ids=ids[None, :-1]).logits[0]
            return logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum()

        written = [ids[ids != tokenizer.pad_token_id] for ids in model.generate(
            source, num_return_sequences=3, **settings)]
        lengths |= {len(ids) for ids in written}
        weights = [(2 * log_prob(ids) / (len(ids) - 1)).exp() for ids in written]
        points = [100 * sum(train.rouge(tokenizer.decode(ids), summary)) / 3 for ids in written]
        lacking = sum(w * (100 - p) for w, p in zip(weights, points)) / sum(weights)
        expected += 0.7 * lacking - log_prob(torch.tensor(target[-1:] + target))
    assert len(lengths) > 1
    batch = train.tensors([data.pair(i, None) for i in range(3)], tokenizer.pad_token_id, "cpu")
    arguments = Namespace(num_beams=3, max_target_length=11, expected_rouge=0.7)
    loss = train.loss_with_rouge(arguments, model, tokenizer, batch, contextlib.nullcontext)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert model.training and model.model.encoder.embed_positions.weight.grad.abs().sum() > 0


def test_pretraining_restores_what_noise_leaves(pairs, tmp_path):
    tokenizer = BarthezTokenizer(GOLDENS / "plain" / "sentencepiece.bpe.model")
    records = [{"document": " ".join(SENTENCES)}]
    data = train.Infilling(records, tokenizer, 300, masked=0.3)
    noisy, target = data.pair(0, random.Random(1))
    assert tokenizer.decode(target) == " ".join(SENTENCES)
    masks = noisy.count(tokenizer.mask_token_id)
    kept = len(noisy) - 2 - masks
    assert masks > 3 and 0.55 < kept / (len(target) - 2) < 0.8
    assert set(noisy) <= set(target) | {tokenizer.mask_token_id}


def test_gap_sentences_are_those_that_say_what_the_rest_says():
    tokenizer = BarthezTokenizer(GOLDENS / "plain" / "sentencepiece.bpe.model")
    main = "Le chat noir dort et la souris mange du fromage."
    document = f"Il pleut sur toute la ville. Le chat noir dort. {main} La souris mange du fromage."
    data = train.GapSentences([{"document": document}], tokenizer, 300, 0.25)
    source, target = data.pair(0, None)
    assert tokenizer.decode(target) == main
    assert source.count(tokenizer.mask_token_id) == 1
    without = [id for id in source if id != tokenizer.mask_token_id]
    assert tokenizer.decode(without) == document.replace(main + " ", "")
    assert not train.GapSentences([{"document": main}], tokenizer, 300, 0.25).pieces


def test_a_new_model_finds_likely_what_it_attends_to_and_positions_alike_that_are_near():
    torch.manual_seed(0)
    model = BarthezForConditionalGeneration(BarthezConfig(
        vocab_size=40, d_model=64, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=56, lsg=False)).eval()
    train.init_weights(model, 0.02)
    train.init_to_copy(model, 0.02)
    documents = torch.arange(5, 40)[:, None]  # of one word each: all attention goes to that
    logits = model(documents, decoder_input_ids=torch.full_like(documents, 2)).logits
    assert logits.argmax(-1).equal(documents)
    positions = model.model.encoder.embed_positions.weight
    near, far = ((positions[:-n] * positions[n:]).sum(1) for n in (1, 12))
    assert near.min() > 1.4 * far.max() > 0


def test_batches_hold_every_pair_once_and_keep_their_size():
    lengths = [random.Random(i).randrange(5, 90) for i in range(200)]
    groups = train.batches(lengths, 300, random.Random(0))
    assert sorted(i for group in groups for i in group) == list(range(200))
    assert max(len(group) * max(lengths[i] for i in group) for group in groups) <= 300


def test_rouge_by_hand():
    assert train.rouge("le chat dort", "le chat mange") == pytest.approx((2 / 3, 1 / 2, 2 / 3))
    assert train.rouge("a b c d", "d c b a") == pytest.approx((1, 0, 1 / 4))
    assert train.rouge("L’été !", "l’été") == pytest.approx((1, 1, 1))
    assert train.rouge("", "mot") == (0, 0, 0)


@pytest.mark.parametrize("line, said", [
    ("", "empty"), ("{", "line 1"), ('{"document": 3}', "line 1"), ('["a"]', "line 1")])
def test_a_file_of_pairs_that_cannot_be_read(tmp_path, line, said):
    (tmp_path / "bad.jsonl").write_text(line)
    with pytest.raises(ValueError, match=said):
        train.read_lines(tmp_path / "bad.jsonl", "document", "summary")
