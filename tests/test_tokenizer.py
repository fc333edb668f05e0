"""The tokenizer: ids and texts of the original, French typography, batches and mistakes."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import GOLDENS
from tokenizer import SPECIAL_TOKENS, BarthezTokenizer

MODEL_FILE = GOLDENS / "plain" / "sentencepiece.bpe.model"
RECORDED = json.loads((GOLDENS / "tokenizer.json").read_text())
TOKENIZER = BarthezTokenizer(MODEL_FILE)


# ------------------------------------------------------------------------------------------------
# Ids and texts of the original


def test_encode_equals_the_original():
    assert len(TOKENIZER) == RECORDED["vocab_size"]
    assert [[text, TOKENIZER.encode(text)] for text, _ in RECORDED["encode"]] == RECORDED["encode"]


def test_pairs_equal_the_original():
    assert [[*pair, TOKENIZER.encode(*pair)] for *pair, _ in RECORDED["pairs"]] == RECORDED["pairs"]


def test_decode_equals_the_original_without_clean_up():
    assert RECORDED["decode"] == [
        [ids, TOKENIZER.decode(ids, skip_special_tokens=False), TOKENIZER.decode(ids)]
        for ids, *_ in RECORDED["decode"]]


def difference(arguments):
    """Why our answer to a call differs from that of the original, or None.

    The original returns lists. We return tensors, and never more than max_length tokens.
    """
    texts = arguments["text"]
    length, several = arguments.get("max_length"), isinstance(texts, list)
    rows = [len(TOKENIZER.encode(text)) for text in (texts if several else [texts])]
    if arguments.get("truncation") and "text_pair" not in arguments:
        if length == 2 and max(rows) > 2:
            return "the original does not cut a text if only <s> and </s> have room"
        if arguments.get("pad_to_multiple_of"):
            return "the original refuses a max_length that is not a multiple, ours rounds it up"
        rows = [min(row, length) for row in rows]
    padding = arguments.get("padding")
    if several and not padding and len(set(rows)) > 1:
        return "rows of different lengths do not fit in a tensor"
    if several and padding == "max_length" and max(rows) > length:
        return "the original pads each text separately, to rows of different lengths"


def call(arguments):
    arguments = dict(arguments)
    return TOKENIZER(arguments.pop("text"), arguments.pop("text_pair", None), **arguments)


@pytest.mark.parametrize("case", [case for case in RECORDED["call"]
                                  if not difference(case["arguments"])],
                         ids=lambda case: str(list(case["arguments"].values())[1:]))
def test_a_call_equals_the_original(case):
    batch = call(case["arguments"])
    for name in ("input_ids", "attention_mask"):
        assert batch[name].dtype == torch.int64
        expected = case[name] if isinstance(case["arguments"]["text"], list) else [case[name]]
        assert batch[name].tolist() == expected


def test_calls_that_should_differ_from_the_original_do():
    cases = [case for case in RECORDED["call"] if difference(case["arguments"])]
    assert len({difference(case["arguments"]) for case in cases}) == 4
    for case in cases:
        try:
            batch = call(case["arguments"])
        except ValueError:
            assert len(set(map(len, case["input_ids"]))) > 1
            continue
        rows, expected = batch["input_ids"].tolist(), case.get("input_ids")
        assert rows != expected and rows != [expected]


# ------------------------------------------------------------------------------------------------
# French


@pytest.mark.parametrize("text", [
    "Où est-elle ?", "à l'hôpital !", "Il l’a dit : oui ; non.", "« Bonjour », dit-il...",
    "L’été dernier, l'œuvre du cœur a coûté 12 345 zéros (67 %).", "n’est-ce pas ? Oui, bien sûr !",
    "a , b . c ? d ! n't 's 've"])
def test_typography_is_kept(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_texts_are_normalized_to_nfkc():
    assert TOKENIZER.decode(TOKENIZER.encode("e\u0301te\u0301\u00a0! …")) == "été ! ..."


KNOWN = "".join(sorted({TOKENIZER.pieces.id_to_piece(id) for id in range(len(TOKENIZER) - 1)
                        if len(TOKENIZER.pieces.id_to_piece(id)) == 1} - {"▁", "<", ">"}))
words = st.lists(st.text(KNOWN, min_size=1, max_size=8), min_size=1, max_size=6)


@given(words)
def test_decoding_restores_a_text_of_known_characters(words):
    text = " ".join(words)
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.decode(ids) == text


@given(words)
def test_any_white_space_becomes_one_space(words):
    text = "\n " + " \t\u00a0".join(words) + "  "
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == " ".join(words)


@given(words, st.sampled_from(SPECIAL_TOKENS), words)
def test_special_tokens_in_a_text_are_recognized(before, token, after):
    ids = TOKENIZER.encode(f"{' '.join(before)} {token} {' '.join(after)}")
    place = 1 + ids[1:-1].index(TOKENIZER.special_ids[token])
    assert TOKENIZER.decode(ids[:place]) == " ".join(before)
    assert TOKENIZER.decode(ids[place:]) == " ".join(after)
    assert TOKENIZER.decode(ids) == " ".join(before + after)


# ------------------------------------------------------------------------------------------------
# Ids and special tokens


def test_a_mask_that_is_missing_gets_the_next_id(tmp_path):
    piece = b"\n\x0f\n\x06<mask>\x15\0\0\0\0\x18\x03"  # see make_goldens.py
    data = MODEL_FILE.read_bytes()
    assert data.endswith(piece)
    (tmp_path / "spm").write_bytes(data.removesuffix(piece))
    tokenizer = BarthezTokenizer(str(tmp_path / "spm"))
    assert len(tokenizer) == len(TOKENIZER) and tokenizer.mask_token_id == 180
    text = "Barthez est le meilleur <mask> du monde."
    assert tokenizer.encode(text) == TOKENIZER.encode(text)
    assert tokenizer.decode(tokenizer.encode(text), False) == TOKENIZER.decode(
        TOKENIZER.encode(text), False)


def test_decode_accepts_lists_and_tensors():
    ids = TOKENIZER.encode("L’été dernier")
    for form in ids, tuple(ids), torch.tensor(ids), torch.tensor(ids).int():
        assert TOKENIZER.decode(form) == "L’été dernier"
    for empty in [], torch.tensor([]):
        assert TOKENIZER.decode(empty) == ""


# ------------------------------------------------------------------------------------------------
# Batches

LONG, SHORT = "Le château, la fenêtre, l'île, le goût.", "Zoé."


def test_padding_follows_the_text_and_is_masked():
    batch = TOKENIZER([SHORT, LONG], padding="max_length", max_length=29, pad_to_multiple_of=7)
    for text, ids, mask in zip([SHORT, LONG], batch["input_ids"], batch["attention_mask"]):
        expected = TOKENIZER.encode(text)
        padding = 35 - len(expected)
        assert ids.tolist() == expected + [1] * padding
        assert mask.tolist() == [1] * len(expected) + [0] * padding


@given(st.text("aé ", max_size=30), st.text("aé ", max_size=30), st.integers(4, 40))
def test_truncation_cuts_the_end_of_the_longer_text(first, second, limit):
    ids, pair_ids = TOKENIZER.encode(first)[1:-1], TOKENIZER.encode(second)[1:-1]
    cut = TOKENIZER.encode(first, second, max_length=limit)
    assert len(cut) == min(limit, len(ids) + len(pair_ids) + 4)
    end = cut.index(2)
    kept, pair_kept = cut[1:end], cut[end + 2:-1]
    assert cut == [0, *kept, 2, 2, *pair_kept, 2]
    assert kept == ids[:len(kept)] and pair_kept == pair_ids[:len(pair_kept)]
    if len(kept) < len(ids):  # the text that was cut is at most one token shorter than the other
        assert len(kept) >= len(pair_kept) - 1
    if len(pair_kept) < len(pair_ids):
        assert len(pair_kept) >= len(kept) - 1


def test_truncation_defaults_to_model_max_length():
    tokenizer = BarthezTokenizer(MODEL_FILE, model_max_length=5)
    assert tokenizer(LONG, truncation=True)["input_ids"].tolist() == [
        TOKENIZER.encode(LONG)[:4] + [2]]
    assert tokenizer(SHORT, padding="max_length", truncation=True)["input_ids"].shape == (1, 5)
    assert tokenizer(LONG)["input_ids"].tolist() == [TOKENIZER.encode(LONG)]


# ------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("pair, least", [(None, 2), ("b", 4)])
def test_a_max_length_without_room_is_an_error_that_names_it(pair, least):
    assert TOKENIZER.encode("a", pair, max_length=least) == [0, 2, 2, 2][:least]
    with pytest.raises(ValueError, match=f"max_length={least - 1}"):
        TOKENIZER.encode("a", pair, max_length=least - 1)
    with pytest.raises(ValueError, match=f"max_length={least - 1}"):
        TOKENIZER("a", pair, truncation=True, max_length=least - 1)


@pytest.mark.parametrize("options, message", [
    ({"truncation": True}, "give max_length"),
    ({"padding": "max_length"}, "give max_length"),
    ({"padding": "left"}, "padding='left'"),
    ({"truncation": "only_first"}, "truncation='only_first'"),
    ({"pair": ["a"]}, "2 texts, but 1 pairs"),
    ({}, "padding=True")])
def test_an_impossible_batch_is_an_error_that_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        TOKENIZER([SHORT, LONG], **options)


def test_an_id_without_a_piece_gives_nothing_and_a_negative_one_is_an_error():
    assert TOKENIZER.decode([20, 181, 5000, 21]) == TOKENIZER.decode([20, 21])
    with pytest.raises(ValueError, match="-100"):
        TOKENIZER.decode([20, -100])
