"""Generation against the ids of the original, and against a beam search in plain lists.

Letters used for shapes:
    B batch    H heads    D head dimension    V vocabulary
    L tokens written so far, the start token included
"""

import functools
import json
import math

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from barthez import BarthezConfig, BarthezForConditionalGeneration, load_model
from beam_search import Cache, GenerationConfig, Hypotheses
from conftest import GOLDENS

RECORDED = json.loads((GOLDENS / "generation.json").read_text())
EOS, PAD, V = 2, 1, 17

# ------------------------------------------------------------------------------------------------
# The original's ids


@functools.cache
def golden_model(kind, config):
    options = {"max_position_embeddings": 2100} if kind == "lsg" else {}
    model, _ = load_model(GOLDENS / "plain", lsg=kind == "lsg", **options, **json.loads(config))
    return model, model.final_logits_bias


def recorded(case):
    """The model of a case, the ids and the mask that `generate` was given."""
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


# ------------------------------------------------------------------------------------------------
# A search in plain lists. It has no cache and runs the whole model again at each step.


def next_log_probs(model, document, texts, config):
    """For each of the texts (lists of ids), the log-probabilities (V) of the next token, a list."""
    documents = torch.tensor([document] * len(texts))
    with torch.no_grad():
        logits = model(documents, decoder_input_ids=torch.tensor(texts)).logits
    rows = logits[:, -1].log_softmax(-1).tolist()
    for text, row in zip(texts, rows):
        forbid(text, row, config)
    return rows


def forbid(text, row, config):
    """Set the log-probabilities of the tokens that may not follow the text to -inf."""
    n = config["no_repeat_ngram_size"]
    if n:
        for i in range(len(text) - n + 1):
            if text[i:i + n - 1] == text[len(text) - n + 1:]:
                row[text[i + n - 1]] = -math.inf
    if len(text) < config["min_length"]:
        row[EOS] = -math.inf
    forced = config["forced_eos_token_id"]
    if len(text) == config["max_length"] - 1 and forced is not None:
        row[:] = [-math.inf] * V
        row[forced] = 0.0


def plain_greedy_search(model, document, config):
    """The text of a document, a list of ids."""
    text = [EOS]
    while len(text) < config["max_length"]:
        row, = next_log_probs(model, document, [text], config)
        text.append(row.index(max(row)))
        if text[-1] == EOS:
            break
    return text


def plain_beam_search(model, document, config):
    """The num_return_sequences best texts of a document, lists of ids."""
    num_beams, penalty = config["num_beams"], config["length_penalty"]
    beams = [(0.0, [EOS])]  # (sum of log-probabilities, text)
    finished = []  # (score, text), the worst first
    done = False

    def finish(log_prob, text):
        finished.append((log_prob / (len(text) - 1) ** penalty, text))
        finished.sort(key=lambda scored: scored[0])
        del finished[:-num_beams]

    while len(beams[0][1]) < config["max_length"] and not done:
        length = len(beams[0][1])
        rows = next_log_probs(model, document, [text for _, text in beams], config)
        candidates = []
        for (log_prob, text), row in zip(beams, rows):
            candidates += [(log_prob + row[token], text, token) for token in range(V)]
        candidates.sort(key=lambda candidate: -candidate[0])

        beams = []
        for rank, (log_prob, text, token) in enumerate(candidates[:2 * num_beams]):
            if token != EOS:
                beams.append((log_prob, text + [token]))
            elif rank < num_beams:
                finish(log_prob, text + [token])
        beams = beams[:num_beams]

        if len(finished) == num_beams:
            if config["early_stopping"] == "never" and penalty > 0:
                length = config["max_length"] - 1
            best_open_score = candidates[0][0] / length ** penalty
            done = config["early_stopping"] is True or finished[0][0] >= best_open_score
    if not done:
        for log_prob, text in beams:
            finish(log_prob, text)
    finished.reverse()
    return [text for _, text in finished[:config["num_return_sequences"]]]


def random_model(seed, lsg=True, **changes):
    """A tiny model whose next tokens are far from certain. Seeds differ in how soon texts end."""
    config = BarthezConfig(**dict(
        vocab_size=V, d_model=12, encoder_layers=1, decoder_layers=2, encoder_attention_heads=3,
        decoder_attention_heads=2, encoder_ffn_dim=10, decoder_ffn_dim=14, lsg=lsg, block_size=4,
        sparse_block_size=4, max_position_embeddings=40, decoder_start_token_id=EOS,
        init_std=0.6) | changes)
    torch.default_generator.manual_seed(seed)
    model = BarthezForConditionalGeneration(config).eval()
    model.final_logits_bias[0, EOS] = seed % 4
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
    "forced_eos_token_id": st.sampled_from([None, EOS])}).filter(
        lambda settings: settings["min_length"] <= settings["max_length"])


@hypothesis.settings(max_examples=20)
@given(st.integers(0, 999), st.booleans(), documents_strategy, settings_strategy)
def test_beam_search_equals_the_plain_search(seed, lsg, documents, settings):
    model = random_model(seed, lsg)
    expected = []
    for document in documents:
        expected += plain_beam_search(model, document, settings)
    assert model.generate(batch_of(documents), **settings).tolist() == batch_of(expected).tolist()


@hypothesis.settings(max_examples=15)
@given(st.integers(0, 999), st.booleans(), documents_strategy, settings_strategy)
def test_one_beam_is_greedy_search(seed, lsg, documents, settings):
    model = random_model(seed, lsg)
    settings |= {"num_beams": 1, "num_return_sequences": 1, "early_stopping": "never"}
    expected = [plain_greedy_search(model, document, settings) for document in documents]
    assert model.generate(batch_of(documents), **settings).tolist() == batch_of(expected).tolist()


def test_plain_beam_search_differs_from_plain_greedy_search():
    """Otherwise the two tests above would prove nothing about beams."""
    settings = {"num_beams": 4, "num_return_sequences": 1, "max_length": 9, "min_length": 3,
                "no_repeat_ngram_size": 2, "length_penalty": 1.0, "early_stopping": True,
                "forced_eos_token_id": EOS}
    models, document = [random_model(seed) for seed in range(10)], [0, 5, 9, 7, 4, EOS]
    texts = [plain_beam_search(model, document, settings)[0] for model in models]
    greedy_texts = [plain_greedy_search(model, document, settings) for model in models]
    assert sum(text != greedy for text, greedy in zip(texts, greedy_texts)) > 4
    assert len({len(text) for text in texts}) > 3


# ------------------------------------------------------------------------------------------------
# Properties

THREE_DOCUMENTS = next(case for case in RECORDED["cases"] if case["input"] == "9")


@pytest.mark.parametrize("n, num_beams", [(1, 1), (2, 3), (3, 3)])
def test_no_ngram_is_repeated(n, num_beams):
    model, ids, mask = recorded(THREE_DOCUMENTS)
    settings = {"num_beams": num_beams, "max_length": 26, "min_length": 24,
                "forced_eos_token_id": None}

    def repeats(texts):
        count = 0
        for text in texts:
            ngrams = [tuple(ngram) for ngram in text[text != PAD].unfold(0, n, 1).tolist()]
            count += len(ngrams) - len(set(ngrams))
        return count

    assert repeats(model.generate(ids, mask, **settings, no_repeat_ngram_size=n)) == 0
    assert repeats(model.generate(ids, mask, **settings, no_repeat_ngram_size=0)) > 0


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("length", [2, 7, 13])
def test_no_text_ends_before_min_length(num_beams, length):
    model, ids, mask = recorded(THREE_DOCUMENTS)
    model.final_logits_bias[0, EOS] = 50.0  # ends as soon as it may
    out = model.generate(ids, mask, num_beams=num_beams, min_length=length, max_length=30)
    assert ((out != PAD).sum(1) == length + 1).all()  # the start token counts, </s> does not
    assert (out[:, length] == EOS).all()


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("forced", [None, EOS, 9])
def test_no_text_is_longer_than_max_length(num_beams, forced):
    model, ids, mask = recorded(THREE_DOCUMENTS)
    model.final_logits_bias[0, EOS] = -50.0  # never ends by itself
    out = model.generate(ids, mask, num_beams=num_beams, max_length=11, forced_eos_token_id=forced)
    assert out.shape == (len(ids), 11)
    last = out[:, -1].tolist()
    assert EOS not in last if forced is None else last == [forced] * len(ids)


def test_settings_default_to_those_of_the_checkpoint():
    settings = {"num_beams": 3, "max_length": 7, "min_length": 4, "no_repeat_ngram_size": 2,
                "length_penalty": 2.0, "early_stopping": "never", "forced_eos_token_id": None}
    ids, plain = torch.tensor([[0, 5, 9, EOS], [0, 8, 8, EOS]]), random_model(1)
    expected = plain.generate(ids, **settings)
    model = random_model(1)
    model.generation_config = GenerationConfig(**settings)
    assert torch.equal(model.generate(ids), expected)
    assert plain.generate(ids).tolist() != expected.tolist(), "the settings have no effect"


def test_max_length_is_20_by_default():
    model = random_model(3)
    model.final_logits_bias[0, EOS] = -50.0
    assert model.generate(torch.tensor([[0, 5, EOS]])).shape == (1, 20)


@pytest.mark.parametrize("start, first", [(None, 0), (7, 7)])
def test_texts_begin_with_the_start_token_which_counts_as_an_ngram(start, first):
    model = random_model(3, decoder_start_token_id=start)
    model.final_logits_bias[0, first] = 50.0
    text, = model.generate(torch.tensor([[0, 5, EOS]]), max_length=6, no_repeat_ngram_size=1)
    assert text[0] == first and not (text[1:] == first).any()


def test_a_step_reads_only_the_newest_tokens_and_not_the_document():
    model, documents, steps = random_model(3), [], []
    layer = model.model.decoder.layers[0]
    layer.encoder_attn.k_proj.register_forward_hook(
        lambda layer, inputs, out: documents.append(inputs[0].shape))
    layer.fc1.register_forward_hook(lambda layer, inputs, out: steps.append(inputs[0].shape))
    model.generate(torch.tensor([[0, 5, 9, EOS]] * 3), num_beams=4, max_length=9, min_length=8)
    assert documents == [(3, 5, 12)]  # once, a global token and 4 others
    assert steps == [(3, 4, 12)] * 8  # a token for each of 4 beams


def test_generate_does_not_change_the_model():
    model, document = random_model(3).train(), torch.tensor([[0, 5, EOS]])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    written = model.generate(document, max_length=6)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model(document, decoder_input_ids=written, labels=written).loss.backward()  # no inference mode


@pytest.mark.parametrize("setting, value", [
    ("num_beams", 0), ("num_beams", True), ("num_return_sequences", 2), ("max_length", 1),
    ("min_length", None), ("no_repeat_ngram_size", -1), ("length_penalty", math.nan),
    ("length_penalty", "1"), ("early_stopping", "sometimes"), ("forced_eos_token_id", [2])])
def test_an_impossible_setting_is_an_error_that_names_it(setting, value):
    with pytest.raises(ValueError) as error:
        random_model(3).generate(torch.tensor([[0, 5, EOS]]), **{setting: value})
    assert f"{setting}={value!r}" in str(error.value)


def test_a_max_length_beyond_the_positions_is_an_error():
    model = random_model(3)
    model.final_logits_bias[0, EOS] = -50.0
    with pytest.raises(ValueError, match="max_length=42.*40 positions"):
        model.generate(torch.tensor([[0, 5, EOS]]), max_length=42)
    # The last token needs no position, since the decoder does not read it.
    assert model.generate(torch.tensor([[0, 5, EOS]]), max_length=41).shape == (1, 41)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_an_error(value):
    model = random_model(3)
    model.final_logits_bias[0, 7] = value
    with pytest.raises(ValueError, match="not finite") as error:
        model.generate(torch.tensor([[0, 5, EOS]]), num_beams=2)
    assert "float16" not in str(error.value)


@hypothesis.settings(max_examples=20)
@given(st.integers(1, 4), st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), max_size=6))
def test_the_cache_shows_each_beam_its_own_history(beams, splits):
    """Each key holds the number of its step and beam. Plain lists keep the history of each beam."""
    cache = Cache(torch.zeros(1, 2, 3, 6), num_layers=1, num_beams=beams,
                  max_length=len(splits) + 1)
    histories = [[] for _ in range(beams)]
    for step, split in enumerate(splits + [[0, 0, 0, 0]]):
        visible = cache.next_step()[0, 0]  # (beams, L * beams)
        tags = [100 * step + beam for beam in range(beams)]
        new = torch.tensor(tags).float()[None, None, :, None].expand(1, 2, beams, 6)
        keys, values = cache.layers[0].append(new, -new)
        histories = [history + [tag] for history, tag in zip(histories, tags)]
        for row, history in zip(visible, histories):
            assert keys[0, 1, row, 0].tolist() == history
            assert values[0, 1, row, 0].tolist() == [-tag for tag in history]
        beam = [origin % beams for origin in split[:beams]]
        cache.reorder(torch.tensor([beam]))
        histories = [histories[origin] for origin in beam]


@pytest.mark.parametrize("early_stopping, penalty, length", [
    (False, 2.0, 4), (False, -1.0, 4), ("never", -1.0, 4),
    ("never", 2.0, 10)])  # max_length - 1, the most that an open beam may still reach
def test_a_search_stops_when_no_open_beam_can_win(early_stopping, penalty, length):
    """An open beam is scored as if it ended at `length`. The worst text that is kept scores -3."""
    hypotheses = Hypotheses(GenerationConfig(
        num_beams=2, max_length=11, early_stopping=early_stopping, length_penalty=penalty))
    hypotheses.add([EOS, 5], -1.0)
    assert not hypotheses.is_done(-1000.0, 4), "too few texts are kept"
    hypotheses.add([EOS, 6], -3.0)
    limit = -3 * length ** penalty
    assert hypotheses.is_done(1.01 * limit, 4) and not hypotheses.is_done(0.99 * limit, 4)
