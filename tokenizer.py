"""BARThez' tokenizer: SentencePiece, with <s> … </s> around a text.

T. Kudo and J. Richardson, "SentencePiece" (2018), arXiv:1808.06226. The ids equal those of
transformers' slow tokenizer, models/barthez/tokenization_barthez.py (4.36.2). Decoding differs: it
keeps French typography, such as the space in "Où ?".
"""

import re
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor

SPECIAL_TOKENS = "<s>", "<pad>", "</s>", "<unk>", "<mask>"


class BarthezTokenizer:
    """Text to ids and back."""

    def __init__(self, model_file, model_max_length=None):
        """model_file: sentencepiece.bpe.model. model_max_length: where `truncation` cuts."""
        self.model_file, self.model_max_length = Path(model_file), model_max_length
        self.pieces = SentencePieceProcessor()
        self.pieces.LoadFromSerializedProto(self.model_file.read_bytes())
        self.special_ids, self.size = {}, self.pieces.get_piece_size()
        for token in SPECIAL_TOKENS:
            id = self.pieces.piece_to_id(token)
            if id == self.pieces.unk_id() and token != "<unk>":
                id = self.size  # not a piece of the model: it follows the last one
                self.size += 1
            self.special_ids[token] = id
        self.bos_token_id = self.special_ids["<s>"]
        self.pad_token_id = self.special_ids["<pad>"]
        self.eos_token_id = self.special_ids["</s>"]
        self.unk_token_id = self.special_ids["<unk>"]
        self.mask_token_id = self.special_ids["<mask>"]
        self.special_tokens = {id: token for token, id in self.special_ids.items()}

    def __len__(self):
        """The size of the vocabulary."""
        return self.size

    def text_to_ids(self, text):
        """The ids of a text without <s> and </s>. Special tokens in the text are recognized."""
        text.encode()  # for surrogates, its UnicodeEncodeError is clearer than SentencePiece's
        # <mask> includes the space before it. The lookbehind makes this linear: each run of spaces
        # is tried once.
        text = re.sub(r"(?<!\s)\s+<mask>", "<mask>", text)
        ids = []
        for part in re.split("(<s>|<pad>|</s>|<unk>|<mask>)", text):
            if part in self.special_ids:
                ids.append(self.special_ids[part])
            else:
                ids += self.pieces.encode(part)
        return ids

    def encode(self, text, pair=None, max_length=None):
        """<s> text </s>, or <s> text </s></s> pair </s>, as a list of ids.

        max_length: cut the longer of the two, from its end, until both fit.
        """
        ids, pair_ids = self.text_to_ids(text), self.text_to_ids(pair or "")
        if max_length is not None:
            room = max_length - (2 if pair is None else 4)
            if room < 0:
                raise ValueError(f"max_length={max_length} leaves no room for <s> and </s>")
            while len(ids) + len(pair_ids) > room:
                longer = ids if len(ids) > len(pair_ids) else pair_ids
                longer.pop()
        bos, eos = [self.bos_token_id], [self.eos_token_id]
        second = [] if pair is None else eos + pair_ids + eos
        return bos + ids + eos + second

    def decode(self, ids, skip_special_tokens=True):
        """The text of a list or 1-D tensor of ids. An id without a piece gives nothing: the
        vocabulary of a model may be padded to a larger size."""
        text, run = "", []  # run: pieces that are not decoded yet
        for id in map(int, ids):
            if id < 0:
                raise ValueError(f"id {id} is not a token: replace -100 by pad_token_id")
            if id in self.special_tokens and not skip_special_tokens:
                space = " " if run else ""
                text += space + self.pieces.decode(run) + self.special_tokens[id]
                run = []
            elif id not in self.special_tokens and id < len(self):
                run.append(id)
        return (text + self.pieces.decode(run)).strip()

    def __call__(self, text, pair=None, *, truncation=False, max_length=None, padding=False,
                 pad_to_multiple_of=None):
        """One text or a list of texts as a batch for a model: `model(**batch)`.

        truncation: True cuts to max_length, by default model_max_length.
        padding: True or "longest" pads to the longest text, "max_length" to max_length;
            pad_to_multiple_of rounds either up.
        Returns {"input_ids", "attention_mask"}, int64 tensors (B, T). Raises ValueError.
        """
        texts = [text] if isinstance(text, str) else list(text)
        pairs = [pair] if isinstance(pair, str) else list(pair or [None] * len(texts))
        if len(texts) != len(pairs):
            raise ValueError(f"{len(texts)} texts, but {len(pairs)} pairs: each text needs its own")
        if padding not in (False, True, "longest", "max_length") or truncation not in (False, True):
            raise ValueError(f"{padding=}, {truncation=}: padding is False, True, 'longest' or "
                             "'max_length', and truncation is False or True")
        if max_length is None:
            max_length = self.model_max_length
        if max_length is None and (truncation or padding == "max_length"):
            raise ValueError("the tokenizer has no model_max_length: give max_length")
        limit = max_length if truncation else None
        rows = [self.encode(text, pair, limit) for text, pair in zip(texts, pairs)]

        length = max(map(len, rows), default=0)
        if not padding and any(len(row) < length for row in rows):
            raise ValueError("texts of different lengths do not fit in a tensor: set padding=True")
        if padding == "max_length":
            length = max(length, max_length)
        if pad_to_multiple_of:
            length += -length % pad_to_multiple_of
        ids = [row + [self.pad_token_id] * (length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        return {"input_ids": torch.tensor(ids, dtype=torch.int64),
                "attention_mask": torch.tensor(mask, dtype=torch.int64)}
