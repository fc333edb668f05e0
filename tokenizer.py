"""BARThez' tokenizer: SentencePiece, with <s> … </s> around a text.

T. Kudo and J. Richardson, "SentencePiece" (2018), arXiv:1808.06226. The ids equal those of
transformers' slow tokenizer, models/barthez/tokenization_barthez.py (4.36.2); decoding differs in
leaving French typography alone (" ?" keeps its space).
"""

import re
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor

SPECIAL_TOKENS = "<s>", "<pad>", "</s>", "<unk>", "<mask>"


class BarthezTokenizer:
    """Text to ids and back, by the pieces of `sentencepiece.bpe.model`.

    >>> tokenizer.encode("Il fait beau.")          # <s> ▁Il ▁fait ▁beau . </s>
    >>> tokenizer.encode("Où ?", "Ici !")          # <s> ▁Où ▁? </s> </s> ▁Ici ▁! </s>
    """

    def __init__(self, model_file, model_max_length=None):
        """model_max_length: where `truncation=True` cuts if no max_length is given."""
        model_file = Path(model_file)
        if not model_file.is_file():
            raise FileNotFoundError(f"{model_file}: no such file; a BARThez checkpoint has its "
                                    "tokenizer in sentencepiece.bpe.model")
        self.model_file, self.model_max_length = model_file, model_max_length
        self.pieces = SentencePieceProcessor()
        try:
            self.pieces.LoadFromSerializedProto(model_file.read_bytes())
        except RuntimeError:
            raise ValueError(f"{model_file} is not a SentencePiece model: fetch it again") from None

        # A special token that is no piece of the model comes behind the last piece.
        self.special_ids = {}
        for token in SPECIAL_TOKENS:
            id = self.pieces.piece_to_id(token)
            missing = id == self.pieces.unk_id() and token != "<unk>"
            self.special_ids[token] = len(self) if missing else id
        self.bos_token_id, self.pad_token_id, self.eos_token_id, self.unk_token_id, \
            self.mask_token_id = self.special_ids.values()
        self.special_tokens = {id: token for token, id in self.special_ids.items()}

    def __len__(self):
        """The size of the vocabulary."""
        return max(self.pieces.get_piece_size(), *(i + 1 for i in self.special_ids.values()), 0)

    def text_to_ids(self, text):
        """The ids of a text alone; special tokens that it spells out are recognised."""
        ids = []
        # <mask> stands for a word: it takes the space before it along
        for part in re.split(r"(<s>|<pad>|</s>|<unk>|\s*<mask>)", text):
            special = self.special_ids.get(part.lstrip())
            ids += self.pieces.encode(part) if special is None else [special]
        return ids

    def encode(self, text, pair=None, max_length=None):
        """<s> text </s>, or <s> text </s></s> pair </s>, as a list of ids.

        max_length: cut the longer of the two, from its end, until all fits.
        """
        bos, eos = [self.bos_token_id], [self.eos_token_id]
        ids, pair_ids = self.text_to_ids(text), None if pair is None else self.text_to_ids(pair)
        if max_length is not None:
            room = max_length - (2 if pair is None else 4)
            if room < 0:
                raise ValueError(f"max_length={max_length} leaves no room for <s> and </s>")
            while len(ids) + len(pair_ids or []) > room:
                longer = ids if pair is None or len(ids) > len(pair_ids) else pair_ids
                longer.pop()
        ids = bos + ids + eos
        return ids if pair is None else ids + eos + pair_ids + eos

    def decode(self, ids, skip_special_tokens=True):
        """The text of a list or 1-D tensor of ids."""
        text, run = "", []  # run: ids since the last special token, which SentencePiece joins
        ids = [int(id) for id in ids]
        if skip_special_tokens:
            ids = [id for id in ids if id not in self.special_tokens]
        for i, id in enumerate(ids):
            if id not in self.special_tokens:
                run.append(id)
                continue
            if i == 0 or ids[i - 1] not in self.special_tokens:
                text += " "
            text += self.pieces.decode(run) + self.special_tokens[id]
            run = []
        return (text + self.pieces.decode(run)).strip()

    def __call__(self, text, pair=None, *, truncation=False, max_length=None, padding=False,
                 pad_to_multiple_of=None):
        """Ids of one text or a list of texts, as a batch that a model takes: `model(**batch)`.

        truncation: cut to max_length, or else model_max_length.
        padding: True or "longest" pads to the longest text, "max_length" to that length;
        pad_to_multiple_of rounds either up.
        Returns {"input_ids", "attention_mask"}, int64 tensors (batch, length).
        """
        texts = [text] if isinstance(text, str) else list(text)
        pairs = ([None] * len(texts) if pair is None else
                 [pair] if isinstance(pair, str) else list(pair))
        if len(texts) != len(pairs):
            raise ValueError(f"{len(texts)} texts, but {len(pairs)} pairs: each text needs its own")
        if padding not in (False, True, "longest", "max_length"):
            raise ValueError(f"{padding=}: choose False, True, 'longest' or 'max_length'")
        if max_length is None:
            max_length = self.model_max_length
            if max_length is None and (truncation or padding == "max_length"):
                raise ValueError("the tokenizer knows no model_max_length: give max_length")
        limit = max_length if truncation else None
        rows = [self.encode(*both, limit) for both in zip(texts, pairs)]

        lengths = {len(row) for row in rows}
        if not padding and len(lengths) > 1:
            raise ValueError("texts of different lengths make no tensor: set padding=True")
        length = max(lengths, default=0)
        if padding == "max_length":
            length = max(length, max_length)
        if padding and pad_to_multiple_of:
            length += -length % pad_to_multiple_of
        pad = [self.pad_token_id]
        ids = [row + pad * (length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        return {"input_ids": torch.tensor(ids, dtype=torch.int64),
                "attention_mask": torch.tensor(mask, dtype=torch.int64)}
