"""Generation: the original's ids to the token, and a beam search that anyone can check by eye."""

import json
import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from barthez import (BarthezConfig, BarthezForConditionalGeneration, Hypotheses, Linear, Past,
                     init_weights, packed)
from conftest import GOLDENS, assert_close
from load_weights import load_model

RECORDED = json.loads((GOLDENS / "generation.json").read_text())
EOS, PAD, V = 2, 1, 17

# ------------------------------------------------------------------------------------------------
# The original's ids


@cache
def golden_model(kind, config):
    options = {"max_position_embeddings": 2100} if kind == "lsg" else {}
    model, _ = load_model(GOLDENS / "plain", lsg=kind == "lsg", **options, **json.loads(config))
    return model, model.final_logits_bias


def recorded(case):
    """The model of a case, and what its `generate` was given."""
    model, bias = golden_model(case["model"], json.dumps(case["config"]))
    model.final_logits_bias = bias.clone()
    model.final_logits_bias[0, EOS] += case["eos_bias"]
    texts = RECORDED["inputs"][case["input"]]
    ids, mask = torch.tensor(texts["input_ids"]), torch.tensor(texts["attention_mask"])
    return model, ids, mask if case["mask"] else None


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: (
    f"{case['input']}-" + "-".join(map(str, case["settings"].values()))))
def test_same_ids_as_the_original(case):
    model, ids, mask = recorded(case)
    assert model.generate(ids, mask, **case["settings"]).tolist() == case["output"]


def test_the_recorded_cases_are_all_there():
    assert len(RECORDED["cases"]) == 147


# ------------------------------------------------------------------------------------------------
# A search in plain lists, which has no cache and runs the whole model again at each step


def next_log_probs(model, document, texts, config):
    """For each of the texts (lists of ids), a list of the log-probabilities of what comes next."""
    with torch.no_grad():
        logits = model(torch.tensor([document] * len(texts)),
                       decoder_input_ids=torch.tensor(texts)).logits
    rows = logits[:, -1].log_softmax(-1).tolist()
    for text, row in zip(texts, rows):
        n = config["no_repeat_ngram_size"]
        for i in range(len(text) - n + 1 if n else 0):
            if text[i:i + n - 1] == text[len(text) - n + 1:]:
                row[text[i + n - 1]] = -math.inf
        if len(text) < config["min_length"]:
            row[EOS] = -math.inf
        if len(text) == config["max_length"] - 1 and config["forced_eos_token_id"] is not None:
            row[:] = [-math.inf] * V
            row[config["forced_eos_token_id"]] = 0.0
    return rows


def greedy_search(model, document, config):
    text = [EOS]
    while len(text) < config["max_length"] and text[1:][-1:] != [EOS]:
        row, = next_log_probs(model, document, [text], config)
        text.append(row.index(max(row)))
    return text


def beam_search(model, document, config):
    count, penalty = config["num_beams"], config["length_penalty"]
    beams, finished, done = [(0.0, [EOS])], [], False

    def finish(score, text):
        finished.append((score / (len(text) - 1) ** penalty, text))
        finished.sort(key=lambda hypothesis: hypothesis[0])
        del finished[:-count]  # the worst goes

    while len(beams[0][1]) < config["max_length"] and not done:
        texts = [text for _, text in beams]
        rows = next_log_probs(model, document, texts, config)
        candidates = sorted(((score + row[token], text, token)
                             for (score, text), row in zip(beams, rows) for token in range(V)),
                            key=lambda candidate: -candidate[0])[:2 * count]
        beams = []
        for rank, (score, text, token) in enumerate(candidates):
            if token != EOS:
                beams.append((score, text + [token]))
            elif rank < count:
                finish(score, text + [token])
        beams = beams[:count]

        if len(finished) == count:
            length = len(texts[0])
            if config["early_stopping"] == "never" and penalty > 0:
                length = config["max_length"] - 1
            done = (config["early_stopping"] is True
                    or finished[0][0] >= candidates[0][0] / length ** penalty)
    if not done:
        for score, text in beams:
            finish(score, text)
    return [text for _, text in finished[::-1][:config["num_return_sequences"]]]


def random_model(seed, lsg=True, **changes):
    """A model so small that the searches above take milliseconds, and undecided enough to need
    them: its next tokens are far from certain."""
    config = BarthezConfig(**dict(
        vocab_size=V, d_model=12, encoder_layers=1, decoder_layers=2, encoder_attention_heads=3,
        decoder_attention_heads=2, encoder_ffn_dim=10, decoder_ffn_dim=14, lsg=lsg, block_size=4,
        sparse_block_size=4, max_position_embeddings=40, decoder_start_token_id=EOS) | changes)
    torch.manual_seed(seed)
    model = BarthezForConditionalGeneration(config).eval()
    init_weights(model, std=0.6)
    model.final_logits_bias[0, EOS] = seed % 4  # some like to end, others do not
    return model


def batch_of(documents):
    rows = [torch.tensor(document) for document in documents]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


documents_strategy = st.lists(
    st.lists(st.integers(3, V - 1), min_size=1, max_size=15).map(lambda ids: [0, *ids, EOS]),
    min_size=1, max_size=3)
settings_strategy = st.fixed_dictionaries({
    "num_beams": st.integers(2, 4), "num_return_sequences": st.integers(1, 2),
    "max_length": st.integers(2, 11), "min_length": st.integers(0, 7),
    "no_repeat_ngram_size": st.integers(0, 3),
    "length_penalty": st.sampled_from([-1.0, 0.0, 0.7, 1.0, 2.0]),
    "early_stopping": st.sampled_from([True, False, "never"]),
    "forced_eos_token_id": st.sampled_from([None, EOS])})


@hypothesis_settings(max_examples=20)
@given(st.integers(0, 999), st.booleans(), documents_strategy, settings_strategy)
def test_beam_search_equals_the_plain_search(seed, lsg, documents, settings):
    model = random_model(seed, lsg)
    expected = [text for document in documents for text in beam_search(model, document, settings)]
    assert model.generate(batch_of(documents), **settings).tolist() == batch_of(expected).tolist()


@hypothesis_settings(max_examples=15)
@given(st.integers(0, 999), st.booleans(), documents_strategy, settings_strategy)
def test_one_beam_is_greedy_search(seed, lsg, documents, settings):
    model = random_model(seed, lsg)
    settings |= {"num_beams": 1, "num_return_sequences": 1}
    expected = [greedy_search(model, document, settings) for document in documents]
    assert model.generate(batch_of(documents), **settings).tolist() == batch_of(expected).tolist()


def test_the_searches_disagree_with_each_other():
    """Else the two tests above would say nothing about beams."""
    settings = {"num_beams": 4, "num_return_sequences": 1, "max_length": 9, "min_length": 3,
                "no_repeat_ngram_size": 2, "length_penalty": 1.0, "early_stopping": True,
                "forced_eos_token_id": EOS}
    models, document = [random_model(seed) for seed in range(10)], [0, 5, 9, 7, 4, EOS]
    beams = [beam_search(model, document, settings)[0] for model in models]
    assert sum(text != greedy_search(model, document, settings)
               for model, text in zip(models, beams)) > 4
    assert len({len(text) for text in beams}) > 3


# ------------------------------------------------------------------------------------------------
# Properties


CASES = {name: next(case for case in RECORDED["cases"] if case["input"] == name)
         for name in ("1", "5", "9")}  # several documents of unlike length, with a mask


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_padded_document_gives_the_same_ids_as_alone(name, num_beams):
    model, ids, mask = recorded(CASES[name])
    settings = {"num_beams": num_beams, "max_length": 15, "min_length": 3}
    together = model.generate(ids, mask, **settings)
    for row, seen, text in zip(ids, mask, together):
        length = int(seen.sum())
        alone = model.generate(row[None, :length], seen[None, :length], **settings)[0]
        assert text[:len(alone)].tolist() == alone.tolist()
        assert (text[len(alone):] == PAD).all()


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_ngram_comes_twice(n, num_beams):
    model, ids, mask = recorded(CASES["9"])
    out = model.generate(ids, mask, num_beams=num_beams, no_repeat_ngram_size=n, max_length=26,
                         min_length=24, forced_eos_token_id=None)
    free = model.generate(ids, mask, num_beams=num_beams, no_repeat_ngram_size=0, max_length=26,
                          min_length=24, forced_eos_token_id=None)

    def repeats(text):
        grams = [tuple(gram) for gram in text[text != PAD].unfold(0, n, 1).tolist()]
        return len(grams) - len(set(grams))

    assert sum(map(repeats, out)) == 0 and sum(map(repeats, free)) > 0


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_start_token_counts_among_the_ngrams(num_beams):
    model = random_model(3)
    model.final_logits_bias[0, EOS] = 50.0  # </s>, which is also what texts start with
    out = model.generate(torch.tensor([[0, 5, EOS]]), num_beams=num_beams, max_length=9,
                         no_repeat_ngram_size=1, forced_eos_token_id=None)
    assert out.shape == (1, 9) and (out == EOS).sum() == 1


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("length", [2, 7, 13])
def test_no_text_ends_before_min_length(num_beams, length):
    model, ids, mask = recorded(CASES["9"])
    model.final_logits_bias[0, EOS] = 50.0  # wants nothing but to end
    out = model.generate(ids, mask, num_beams=num_beams, min_length=length, max_length=30)
    assert ((out != PAD).sum(1) == length + 1).all()  # the start token counts, </s> comes after
    assert (out[:, length] == EOS).all()


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("forced", [None, EOS, 9])
def test_no_text_is_longer_than_max_length(num_beams, forced):
    model, ids, mask = recorded(CASES["9"])
    model.final_logits_bias[0, EOS] = -50.0  # never ends by itself
    out = model.generate(ids, mask, num_beams=num_beams, max_length=11, forced_eos_token_id=forced)
    assert out.shape == (len(ids), 11)
    last = out[:, -1].tolist()
    assert EOS not in last if forced is None else last == [forced] * len(ids)


def test_settings_default_to_the_checkpoints():
    settings = {"num_beams": 3, "max_length": 7, "min_length": 4, "no_repeat_ngram_size": 2,
                "length_penalty": 2.0, "early_stopping": "never", "forced_eos_token_id": None}
    ids, plain = torch.tensor([[0, 5, 9, EOS], [0, 8, 8, EOS]]), random_model(1)
    expected = plain.generate(ids, **settings)
    assert torch.equal(random_model(1, **settings).generate(ids), expected)
    assert plain.generate(ids).tolist() != expected.tolist(), "the comparison says nothing"


def test_max_length_is_20_where_nobody_says_otherwise():
    model = random_model(3)
    model.final_logits_bias[0, EOS] = -50.0
    assert model.generate(torch.tensor([[0, 5, EOS]])).shape == (1, 20)


def test_without_a_mask_padding_is_left_out():
    model, ids, mask = recorded(CASES["1"])
    assert torch.equal(model.generate(ids), model.generate(ids, mask))


@pytest.mark.parametrize("start, first", [(None, 0), (7, 7)])
def test_texts_begin_with_the_start_token(start, first):
    model = random_model(3, decoder_start_token_id=start)
    assert model.generate(torch.tensor([[0, 5, EOS]]), max_length=6)[0, 0] == first


def test_the_document_is_read_once():
    model, calls = random_model(3), []
    for layer in model.model.decoder.layers:
        layer.encoder_attn.k_proj.register_forward_hook(
            lambda layer, inputs, out: calls.append(inputs[0].shape))
    model.generate(torch.tensor([[0, 5, 9, EOS]] * 3), num_beams=4, max_length=9, min_length=8)
    assert calls == [(3, 5, 12)] * 2  # a global and 4 tokens: neither once a beam nor once a step


def test_each_step_reads_only_the_newest_token():
    model, lengths = random_model(3), []
    model.model.decoder.layers[0].fc1.register_forward_hook(
        lambda layer, inputs, out: lengths.append(inputs[0].shape[:2]))
    model.generate(torch.tensor([[0, 5, 9, EOS]] * 3), num_beams=4, max_length=9, min_length=8)
    assert lengths == [(3, 4)] * 8


def test_progress_is_told_at_each_step():
    steps = []
    random_model(3).generate(torch.tensor([[0, 5, EOS]]), max_length=6, min_length=6,
                             progress=lambda *step: steps.append(step))
    assert steps == [(1, 6), (2, 6), (3, 6), (4, 6), (5, 6)]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
def test_weights_are_packed_for_as_long_as_it_writes():
    model, source = random_model(3), torch.tensor([[0, 5, 9, EOS]])
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    states = torch.randn(1, 3, 12)
    plain = [layer(states) for layer in layers if layer.in_features == 12]
    with packed(model):
        assert all(layer.packed_weight is not None for layer in layers)
        for layer, expected in zip((m for m in layers if m.in_features == 12), plain):
            assert_close(layer(states), expected, 1e-6)

    def stop(*_):
        assert model.lm_head.packed_weight is not None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(source, progress=stop)
    assert all(layer.packed_weight is None for layer in layers)


def test_new_weights_write_new_texts():
    model, other, source = random_model(3), random_model(5), torch.tensor([[0, 5, 9, EOS]])
    settings = {"num_beams": 3, "max_length": 9, "min_length": 6}
    first, expected = model.generate(source, **settings), other.generate(source, **settings)
    for new, old in zip(other.state_dict().values(), model.state_dict().values()):
        old.data.copy_(new)
    assert model.generate(source, **settings).equal(expected) and not first.equal(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_types_that_cannot_be_packed_write_all_the_same(dtype):
    source, settings = torch.tensor([[0, 5, 9, EOS]]), {"num_beams": 3, "max_length": 9}
    expected = random_model(3).generate(source, **settings)
    assert random_model(3).to(dtype).generate(source, **settings).equal(expected)


def test_autocast_packs_nothing():
    model, packed_at_step = random_model(3), []
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(torch.tensor([[0, 5, 9, EOS]]), max_length=9, progress=lambda *_:
                       packed_at_step.append(model.lm_head.packed_weight is not None))
    assert packed_at_step and not any(packed_at_step)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model = random_model(3).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    out = model.generate(torch.tensor([[0, 5, EOS]]), max_length=6)
    assert not out.requires_grad and torch.is_grad_enabled()
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_was_written_can_be_learnt_from():
    model = random_model(3)
    document = torch.tensor([[0, 5, EOS]])
    written = model.generate(document, max_length=6)
    model(document, decoder_input_ids=written, labels=written).loss.backward()
    assert model.model.shared.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("setting, value", [
    ("num_beam", 2), ("temperature", 0.7), ("sparsity_type", "pooling"), ("dropout", 0.5),
    ("max_position_embeddings", 99), ("decoder_layers", 1)])
def test_a_setting_that_generate_cannot_follow_is_an_error_that_names_it(setting, value):
    with pytest.raises(ValueError, match=f"{setting}$"):
        random_model(3).generate(torch.tensor([[0, 5, EOS]]), **{setting: value}, num_beams=2)


@pytest.mark.parametrize("setting, value", [
    ("num_beams", 0), ("num_return_sequences", 0), ("num_return_sequences", 2), ("max_length", 1),
    ("min_length", -1), ("no_repeat_ngram_size", -1), ("early_stopping", "sometimes")])
def test_an_impossible_setting_is_an_error_that_names_it(setting, value):
    with pytest.raises(ValueError, match=f"{setting}={value!r}"):
        random_model(3).generate(torch.tensor([[0, 5, EOS]]), **{setting: value})


def test_a_max_length_beyond_the_positions_is_an_error_before_anything_is_computed():
    model, steps = random_model(3), []
    model.final_logits_bias[0, EOS] = -50.0
    with pytest.raises(ValueError, match="max_length=42.*40 positions"):
        model.generate(torch.tensor([[0, 5, EOS]]), max_length=42,
                       progress=lambda *step: steps.append(step))
    assert not steps
    # The last token that is written is never read: there is a position for each of the others.
    assert model.generate(torch.tensor([[0, 5, EOS]]), max_length=41).shape == (1, 41)


@hypothesis_settings(max_examples=20)
@given(st.integers(1, 4), st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), max_size=6))
def test_the_cache_shows_each_beam_its_own_past(beams, splits):
    """Keys are tagged with the number of their step and beam, and followed in plain lists."""
    model = random_model(3, decoder_layers=1)
    past = Past(BarthezConfig(**vars(model.config) | {"num_beams": beams}), 1, len(splits) + 2,
                torch.zeros(1))
    histories = [[] for _ in range(beams)]
    for step, split in enumerate([*splits, [0, 0, 0, 0]]):
        mask = past.open_step()[0, 0]  # (beams, slots)
        tags = [100 * step + beam for beam in range(beams)]
        new = torch.tensor(tags).float()[None, None, :, None].expand(1, 2, beams, 6)
        keys, values = past.append(0, new, -new)
        histories = [history + [tag] for history, tag in zip(histories, tags)]
        for seen, history in zip(mask, histories):
            assert keys[0, 1, seen, 0].tolist() == history
            assert values[0, 1, seen, 0].tolist() == [-tag for tag in history]
        beam = [origin % beams for origin in split[:beams]]
        past.reorder(torch.tensor([beam]))
        histories = [histories[origin] for origin in beam]


finished = st.lists(st.tuples(st.sampled_from([-0.5, -1.0, -2.0, -3.5]), st.integers(1, 6)),
                    min_size=1, max_size=9)


@hypothesis_settings(max_examples=30)
@given(finished, st.integers(1, 4), st.sampled_from([-1.0, 0.0, 1.0, 2.0]))
def test_the_best_finished_texts_are_kept_and_of_equals_the_later(finished, num_beams, penalty):
    config = BarthezConfig(**vars(random_model(3).config)
                           | {"num_beams": num_beams, "num_return_sequences": min(2, num_beams),
                              "length_penalty": penalty})
    hypotheses, kept = Hypotheses(config, max_length=9), []
    for name, (log_prob, length) in enumerate(finished):
        hypotheses.add(name, log_prob, length)
        score = log_prob / length ** penalty
        if len(kept) < num_beams or score > min(kept)[0]:
            kept = sorted([*kept, (score, name)])[-num_beams:]
    assert sorted(hypotheses.kept) == kept
    hypotheses.done = True
    assert hypotheses.best(None, None) == [name for _, name in kept[:-3:-1]]
