"""The scripts that made the bundled model: text infilling, its own beams, rounding, the recipe."""

import contextlib
import json
import random
import shlex
import shutil
import sys
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file

import train
from barthez import BarthezConfig, BarthezForConditionalGeneration, init_weights, load_model
from conftest import GOLDENS
from test_train import ROOT, SENTENCES, arguments, assert_same, main, write_pairs
from tiny import new_model, own_beams, pretrain
from tiny import round as rounding
from tokenizer import BarthezTokenizer

TOKENIZER = GOLDENS / "plain" / "sentencepiece.bpe.model"


@pytest.fixture
def tokenizer():
    return BarthezTokenizer(TOKENIZER)


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl")


# ------------------------------------------------------------------------------------------------
# Pretraining


def test_infilling_restores_the_text_that_was_damaged(tokenizer):
    documents = [{"document": " ".join(SENTENCES)}]
    (noisy, target), = pretrain.infilling(documents, tokenizer, 300, masked=0.3)
    assert tokenizer.decode(target) == " ".join(SENTENCES)
    assert noisy[0] == target[0] == tokenizer.bos_token_id
    assert noisy[-1] == target[-1] == tokenizer.eos_token_id
    assert set(noisy) <= set(target) | {tokenizer.mask_token_id}


def test_infilling_shuffles_the_sentences(tokenizer):
    documents = [{"document": " ".join(SENTENCES)}]
    (shuffled, target), = pretrain.infilling(documents, tokenizer, 300, masked=0.0)
    assert shuffled != target and sorted(shuffled) == sorted(target)
    text = tokenizer.decode(shuffled)
    assert all(sentence in text for sentence in SENTENCES)


def test_the_masked_share_and_the_span_lengths_are_as_asked():
    rng = random.Random(0)
    left = masks = 0
    for _ in range(300):
        ids = pretrain.mask_spans(range(100), 0.3, -1, rng)
        masks += ids.count(-1)
        left += len(ids) - ids.count(-1)
    assert 0.68 < left / 30000 < 0.72
    assert 2.8 < (30000 - left) / masks < 3.5  # some spans contain masks of others
    assert pretrain.mask_spans(range(50), 0.0, -1, rng) == list(range(50))
    assert set(pretrain.mask_spans(range(50), 1.0, -1, rng)) - {-1} < set(range(50))


def test_pieces_are_whole_sentences_that_fit(tokenizer):
    document = " ".join(SENTENCES * 5)
    room = 40
    pieces = pretrain.split(document, tokenizer, room)
    assert len(pieces) > 3
    assert all(room / 2 < sum(map(len, piece)) <= room for piece in pieces[:-1])
    assert [tokenizer.decode(ids) for piece in pieces for ids in piece] == SENTENCES * 5


def test_documents_without_a_piece_are_an_error(tokenizer):
    with pytest.raises(ValueError, match="no document has a piece of 32 to 298 tokens"):
        pretrain.infilling([{"document": "Oui."}], tokenizer, 300, 0.3)


def test_a_new_model_copies_what_it_attends_to_and_tells_positions_apart():
    torch.manual_seed(0)
    model = BarthezForConditionalGeneration(BarthezConfig(
        vocab_size=40, d_model=64, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=56, lsg=False)).eval()
    init_weights(model, 0.02)
    new_model.init_to_copy(model, 0.02)
    documents = torch.arange(5, 40)[:, None]  # of one word each, which gets all attention
    logits = model(documents, decoder_input_ids=torch.full_like(documents, 2)).logits
    assert logits.argmax(-1).equal(documents)
    positions = model.model.encoder.embed_positions.weight
    near = (positions[:-1] * positions[1:]).sum(1)
    far = (positions[:-12] * positions[12:]).sum(1)
    assert near.min() > 1.4 * far.max() > 0


def test_pretraining_begins_with_a_new_model_and_resumes(pairs, tmp_path):
    documents = tmp_path / "documents.jsonl"
    with open(documents, "w") as file:
        for start in range(5):
            text = " ".join((SENTENCES[start:] + SENTENCES[:start]) * 3)
            print(json.dumps({"document": text}), file=file)
    fresh = tmp_path / "fresh"
    main(["new_model.py", str(GOLDENS / "plain" / "config.json"), str(TOKENIZER), str(fresh)],
         new_model)
    model, tokenizer = load_model(fresh)
    assert model.config.vocab_size == len(tokenizer)
    command = arguments(documents, tmp_path / "new", "--model", fresh, "--validation", documents,
                        "--masked", 0.1, "--max-source-length", 40, "--steps", 4,
                        "--evaluate-every", 2)
    main(command, pretrain)
    first = load_file(tmp_path / "new" / "model.safetensors")

    def interrupted(*rest):
        raise KeyboardInterrupt

    # The same again, interrupted after its first evaluation.
    command[command.index(str(tmp_path / "new"))] = str(tmp_path / "again")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "CHECKPOINT_SECONDS", 0)
        patch.setattr(train, "evaluate_and_save", interrupted)
        main(command, pretrain)
    main(command, pretrain)
    assert_same(load_file(tmp_path / "again" / "model.safetensors"), first)


# ------------------------------------------------------------------------------------------------
# Learning from the own beams


OPTIONS = Namespace(num_beams=3, max_target_length=11, weight=0.7)


@pytest.fixture
def writer():
    """A model whose summaries differ in length, its tokenizer, records, their ids, and a batch."""
    model, tokenizer = load_model(GOLDENS / "plain", block_size=8, sparse_block_size=8, dropout=0.0,
                                  attention_dropout=0.0, activation_dropout=0.0,
                                  max_position_embeddings=256)
    model.final_logits_bias[0, tokenizer.eos_token_id] = 2.0
    records = [{"document": " ".join(SENTENCES[i:]), "summary": SENTENCES[i]} for i in range(3)]
    whole = Namespace(max_source_length=None, max_target_length=None)
    ids = train.encode_pairs(records, tokenizer, whole)
    return model, tokenizer, records, ids, train.tensors(ids, model)


def test_the_risk_is_the_expected_lack_of_rouge(writer, monkeypatch):
    model, tokenizer, records, pairs, batch = writer

    def rouge(candidate, reference):  # the toy model's own would be 0
        return len(candidate) / 100, len(reference) / 100, candidate.count("a") / 100

    monkeypatch.setattr(own_beams, "rouge", rouge)

    def log_prob(source, ids):
        """Log-probability of the ids after the start token."""
        logits = model(source, decoder_input_ids=ids[None, :-1]).logits[0]
        return logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum()

    expected, lengths = 0.0, set()
    for record, (source, target) in zip(records, pairs):
        source = torch.tensor([source])
        written = model.generate(source, num_return_sequences=3, num_beams=3, max_length=11)
        written = [ids[ids != tokenizer.pad_token_id] for ids in written]
        lengths |= {len(ids) for ids in written}
        weights = [(2 * log_prob(source, ids) / (len(ids) - 1)).exp() for ids in written]
        points = [100 * sum(rouge(tokenizer.decode(ids), record["summary"])) / 3 for ids in written]
        lack = sum(w * (100 - p) for w, p in zip(weights, points)) / sum(weights)
        expected += 0.7 * lack - log_prob(source, torch.tensor(target[-1:] + target))
    assert len(lengths) > 1
    loss = own_beams.ExpectedRisk(model, tokenizer, OPTIONS)(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_risk_has_gradients_in_bfloat16_too(writer):
    model, tokenizer, _, _, batch = writer
    model.train()
    gradients = []
    for precision in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        model.zero_grad()
        with precision:
            own_beams.ExpectedRisk(model, tokenizer, OPTIONS)(batch).backward()
        gradients.append({name: p.grad.flatten() for name, p in model.named_parameters()})
    assert model.training
    for name in ("model.shared.weight", "model.encoder.layers.0.fc1.weight",
                 "model.decoder.layers.0.encoder_attn.v_proj.weight"):
        similarity = torch.cosine_similarity(gradients[0][name], gradients[1][name], dim=0)
        assert similarity > 0.9, (name, similarity)


def test_a_run_on_own_beams_resumes_to_the_same_result(pairs, tmp_path):
    command = arguments(pairs, tmp_path / "whole", "--max-target-length", 9, "--num-beams", 2,
                        "--steps", 2, "--evaluate-every", 1)
    main(command, own_beams)

    evaluate_and_save = train.evaluate_and_save

    def interrupted(model, tokenizer, evaluate, progress, options):
        if progress["step"] == 2:
            raise KeyboardInterrupt
        evaluate_and_save(model, tokenizer, evaluate, progress, options)

    command[command.index(str(tmp_path / "whole"))] = str(tmp_path / "halves")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "evaluate_and_save", interrupted)
        main(command, own_beams)
    main(command, own_beams)
    assert_same(load_file(tmp_path / "halves" / "model.safetensors"),
                load_file(tmp_path / "whole" / "model.safetensors"))


# ------------------------------------------------------------------------------------------------
# The rest


def test_rounded_weights_are_multiples_of_a_power_of_two(tmp_path):
    shutil.copytree(GOLDENS / "plain", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    before = load_file(path)
    main(["round.py", str(tmp_path / "model")], rounding)
    after = load_file(path)
    assert before.keys() == after.keys()
    for name, matrix in after.items():
        if matrix.dim() != 2 or not before[name].any():
            assert matrix.equal(before[name])
            continue
        grid = matrix[matrix != 0].abs().min()
        assert (matrix / grid).equal((matrix / grid).round()) and grid.log2() == grid.log2().round()
        assert (matrix - before[name]).abs().max() <= grid / 2


def test_the_recipe_has_options_that_the_scripts_take(monkeypatch):
    script = (ROOT / "tiny" / "make.sh").read_text().replace("\\\n", " ")
    programs = {"train.py": train, "tiny.pretrain": pretrain, "tiny.own_beams": own_beams}
    found = []
    for line in script.splitlines():
        words = shlex.split(line, comments=True)
        for name in set(words) & programs.keys():
            monkeypatch.setattr(sys, "argv", words[words.index(name):])
            found.append(programs[name].parse_arguments())
    assert len(found) >= 5
