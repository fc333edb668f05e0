"""Many texts at once: summarize gives what one text at a time gives, in order."""

from itertools import count, cycle, islice

import pytest
import torch

from barthez import group_by_length, load_model, save_model, summarize
from conftest import GOLDENS

SENTENCE = "Le président s'est rendu à Paris, où il a reçu le ministre. "
TEXTS = [SENTENCE * n for n in (3, 1, 9, 2, 1, 4)]
SETTINGS = {"max_length": 12, "num_beams": 2}


@pytest.fixture(scope="module")
def checkpoint():
    """LSG with small blocks, so that the texts have several."""
    return load_model(GOLDENS / "plain", block_size=8, sparse_block_size=8,
                      max_position_embeddings=400)


@pytest.mark.parametrize("batch_tokens", [1, 100, 8192])
def test_summaries_are_in_order_and_those_of_single_texts(checkpoint, batch_tokens):
    model, tokenizer = checkpoint
    expected = [tokenizer.decode(model.generate(**tokenizer(text), **SETTINGS)[0])
                for text in TEXTS]
    assert len(set(expected)) > 2
    assert list(summarize(*checkpoint, TEXTS, batch_tokens=batch_tokens, **SETTINGS)) == expected


def test_batches_are_of_similar_length_and_at_most_batch_tokens(checkpoint, monkeypatch):
    """Texts 0 to 63 are one window, sorted by length; the others are the next one."""
    (model, tokenizer), batches = checkpoint, []
    generate = model.generate

    def note(ids, mask, **settings):
        batches.append(mask.sum(1).tolist())
        return generate(ids, mask, **settings)

    monkeypatch.setattr(model, "generate", note)
    texts = list(islice(cycle(TEXTS), 70))
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert len(list(summarize(model, tokenizer, texts, batch_tokens=300, max_length=3))) == 70
    assert sum(batches, []) == sorted(lengths[:64]) + sorted(lengths[64:])
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(batch) <= 300
    assert any(len(batch) > 1 for batch in batches) and max(lengths) > 300


@pytest.mark.parametrize("lengths, groups", [
    ([], [[]]), ([9], [[0]]), ([3, 1, 2], [[1, 2], [0]]), ([2, 2, 2, 2], [[0, 1], [2, 3]])])
def test_groups_of_indices(lengths, groups):
    assert group_by_length(lengths, 5) == groups


def test_texts_are_read_as_they_are_needed(checkpoint):
    """An endless iterator. The first window of 64 texts is read, and no other."""
    numbers = count()
    summaries = summarize(*checkpoint, (SENTENCE for _ in numbers), max_length=3)
    assert next(summaries) == next(summaries)
    assert next(numbers) == 64


def test_no_text_gives_no_summary(checkpoint):
    assert list(summarize(*checkpoint, [])) == []


def test_nothing_is_cut_without_max_source_length(checkpoint):
    model, tokenizer = checkpoint
    long = SENTENCE * 20
    with pytest.raises(ValueError, match="400 positions"):
        list(summarize(*checkpoint, [SENTENCE, long], **SETTINGS))
    [summary] = summarize(*checkpoint, [long], max_source_length=50, **SETTINGS)
    ids = torch.tensor([tokenizer.encode(long, max_length=50)])
    assert summary == tokenizer.decode(model.generate(ids, **SETTINGS)[0])


def test_the_settings_of_the_checkpoint_count_unless_others_are_given(tmp_path):
    """All but num_return_sequences: each text has one summary."""
    save_model(*load_model(GOLDENS / "plain", max_length=7, num_return_sequences=3), tmp_path)
    model, tokenizer = load_model(tmp_path)
    for settings in {}, {"max_length": 20, "num_beams": 3}:
        expected = [tokenizer.decode(model.generate(**tokenizer(text), **settings)[0])
                    for text in TEXTS[:3]]
        assert list(summarize(model, tokenizer, TEXTS[:3], **settings)) == expected


def test_one_text_in_place_of_a_list_is_an_error(checkpoint):
    with pytest.raises(ValueError, match=r"\[text\]"):
        list(summarize(*checkpoint, SENTENCE))
