"""LSG-BARThez: the French encoder-decoder BARThez, reading long documents with LSG attention.

    python barthez.py --summarize file.txt

BARThez is an mBART: M. Kamal Eddine et al., "BARThez: a Skilled Pretrained French
Sequence-to-Sequence Model" (2020), arXiv:2010.12321, after Y. Liu et al., arXiv:2001.08210.
Official code: transformers 4.36.2, models/mbart/modeling_mbart.py; with LSG, lsg-converter 0.1.9,
lsg_converter/mbart/modeling_lsg_mbart.py. Modules are named as in the checkpoint.

The walk of a document: main -> summarize_files -> load_model -> read_checkpoint, convert_to_lsg
(load_weights.py), build_model -> summarize -> text to ids (tokenizer.py) -> generate -> Encoder ->
lsg_attention (lsg.py) -> beam_search (beam_search.py), each step by the Decoder -> ids to text.
Whatever comes from cpu.py changes the speed and no result.

Letters used for shapes:
    B batch    H heads    D head dimension    E d_model    V vocabulary    G global tokens
    T tokens of the sequence that attends     S tokens that it attends to; in cross-attention, those
                                              of the encoded document, with its globals
During generation, T is the number of beams: each step reads one token per beam.
"""

import argparse
import math
import sys
import warnings
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from beam_search import Cache, beam_search
from cpu import accelerate, keep_freed_memory, packed_weights, tokens_in_pieces
from load_weights import (EMBEDDING, EMBEDDINGS, GLOBALS, LSG_KEYS, LSG_OPTIONS, NUM_GLOBALS,
                          POSITIONS, NoNetwork, architecture_name, convert_to_lsg, notice,
                          one_line, parse_settings, published_config, read_checkpoint,
                          resize_positions, run, write_checkpoint)
from lsg import SPARSITY_TYPES, boolean_mask, check_options, full_attention, lsg_attention

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "swish": F.silu, "tanh": torch.tanh,
               "gelu_new": partial(F.gelu, approximate="tanh")}
ALIASES = {  # other names that the model card and transformers use for keys of config.json
    "hidden_size": "d_model", "num_attention_heads": "encoder_attention_heads",
    "attention_probs_dropout_prob": "attention_dropout", "lsg_num_pre_rounds": "lsh_num_pre_rounds"}
TOKEN_IDS = ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id",
             "forced_eos_token_id")
BEAM_SETTINGS = ("num_beams", "num_return_sequences", "max_length", "min_length", "length_penalty",
                 "no_repeat_ngram_size", "early_stopping")
OTHER_HEADS = ("classification_head.", "qa_outputs.")  # of models that do not write text
HEADS = ("lm_head.", "final_logits_bias") + OTHER_HEADS


# ------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class BarthezConfig:
    """The keys of config.json, the settings of `generate` among them, with their defaults."""
    vocab_size: int
    d_model: int
    encoder_layers: int
    decoder_layers: int
    encoder_attention_heads: int
    decoder_attention_heads: int
    encoder_ffn_dim: int
    decoder_ffn_dim: int
    max_position_embeddings: int = 1024
    activation_function: str = "gelu"
    scale_embedding: bool = False  # multiply token embeddings by sqrt(d_model); BARThez does not
    tie_word_embeddings: bool = True
    init_std: float = 0.02

    # LSG attention; see lsg.py
    lsg: bool = True  # False: full attention, as in the published BARThez
    block_size: int = 128
    sparse_block_size: int = 128
    sparsity_factor: int = 2
    sparsity_type: str | None = "norm"
    num_global_tokens: int = 1
    lsh_num_pre_rounds: int = 1
    adaptive: bool = True
    mask_first_token: bool = False  # hide <s>: the first global token serves instead
    pass_global_tokens_to_decoder: bool = True  # False: drop them after the encoder
    pool_with_global: bool = True  # if they are dropped, the first one replaces <s>

    # Training
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    classifier_dropout: float = 0.0
    encoder_layerdrop: float = 0.0  # probability of skipping a layer
    decoder_layerdrop: float = 0.0

    # Classification
    id2label: dict = field(default_factory=lambda: label_names(None, None))
    problem_type: str | None = None  # one of CHOICES; None: inferred from the labels

    # Generation
    bos_token_id: int = 0
    pad_token_id: int = 1
    eos_token_id: int = 2
    decoder_start_token_id: int | None = None  # None: bos_token_id
    forced_eos_token_id: int | None = 2  # the last token of a text that reaches max_length
    num_beams: int = 1
    num_return_sequences: int = 1  # texts for each document, at most num_beams
    max_length: int | None = None  # tokens, with the start token; None: 20 (--summarize: 128)
    min_length: int = 0
    length_penalty: float = 1.0  # a text scores its log-probability / length**length_penalty
    no_repeat_ngram_size: int = 0
    early_stopping: bool | str = False  # True: stop at num_beams finished texts; "never": search on

    def __post_init__(self):
        """Raises ValueError that names the field, its value and what is allowed."""
        for f in fields(self):
            check_field(f.name, getattr(self, f.name), f.type)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {list(choices)}")
        for heads in (self.encoder_attention_heads, self.decoder_attention_heads):
            if self.d_model % heads:
                raise ValueError(f"d_model={self.d_model} is not divisible by {heads} heads")
        for name in TOKEN_IDS:
            if (getattr(self, name) or 0) >= self.vocab_size:
                raise ValueError(f"{name}={getattr(self, name)} must be below vocab_size="
                                 f"{self.vocab_size}")
        if self.num_return_sequences > self.num_beams:
            raise ValueError(f"num_return_sequences={self.num_return_sequences} is more than "
                             f"num_beams={self.num_beams}")
        if self.lsg:
            check_options(**{name: getattr(self, name) for name in LSG_OPTIONS})

    @classmethod
    def from_dict(cls, settings):
        """From the contents of a config.json. Unknown keys are ignored.

        null means the default, except where None is allowed.
        """
        settings = without_aliases(settings)
        settings["id2label"] = label_names(settings.get("id2label"), settings.get("num_labels"))
        known = {}
        for f in fields(cls):
            value = settings.get(f.name, f.default)
            may_be_none = isinstance(None, f.type)
            if value is None and not may_be_none:
                value = f.default
            if value is MISSING:
                raise ValueError(f"{f.name} is missing")
            known[f.name] = value
        return cls(**known)

    @property
    def num_labels(self):
        return len(self.id2label)


LIMITS = {  # (least, greatest) value of the numbers in config.json; default: 1 to a million
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "classifier_dropout",
                     "encoder_layerdrop", "decoder_layerdrop", "init_std"), (0, 1)),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_beams"), (1, 1000)),
    **dict.fromkeys((*TOKEN_IDS, "sparse_block_size", "sparsity_factor", "min_length",
                     "no_repeat_ngram_size"), (0, 10**6)),
    "num_global_tokens": (1, NUM_GLOBALS), "lsh_num_pre_rounds": (0, 100),
    "max_length": (2, 10**6), "length_penalty": (-50, 50)}
CHOICES = {
    "activation_function": ACTIVATIONS, "early_stopping": (True, False, "never"),
    "problem_type": ("regression", "single_label_classification", "multi_label_classification",
                     None)}


def without_aliases(settings):
    return {ALIASES.get(key, key): value for key, value in settings.items()}


def check_field(name, value, kind):
    """Check the type and the range of one field of the configuration."""
    if kind is float:
        kind = int | float
    is_bool = isinstance(value, bool)  # in Python also an int
    if not isinstance(value, kind) or is_bool and kind not in (bool, bool | str):
        raise ValueError(f"{name}={value!r}: expected {getattr(kind, '__name__', kind)}")
    is_number = isinstance(value, int | float) and not is_bool
    low, high = LIMITS.get(name, (1, 10**6))
    if is_number and not low <= value <= high:
        raise ValueError(f"{name}={value!r}: choose a number from {low} to {high}")


def label_names(id2label, num_labels):
    """The labels as {index: name}, from the values of config.json."""
    id2label = id2label or {}
    check_field("id2label", id2label, dict)
    if num_labels is None:
        num_labels = len(id2label) or 2
    check_field("num_labels", num_labels, int)
    if len(id2label) != num_labels:
        return {i: f"LABEL_{i}" for i in range(num_labels)}
    if {str(index) for index in id2label} != {str(i) for i in range(num_labels)}:
        raise ValueError(f"id2label={id2label!r}: expected {{0: name, 1: name, …}}")
    return {int(index): str(name) for index, name in id2label.items()}


@dataclass
class Output:
    """The results of a model. Unused fields are None."""
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None  # (B, T, V); of a classifier (B, num_labels)
    start_logits: torch.Tensor | None = None  # (B, T)
    end_logits: torch.Tensor | None = None  # (B, T)
    last_hidden_state: torch.Tensor | None = None  # of the decoder, (B, T, E)
    encoder_last_hidden_state: torch.Tensor | None = None  # (B, S, E)


# ------------------------------------------------------------------------------------------------
# Attention and layers


class Attention(nn.Module):
    """Multi-head attention: project, attend by the function `attend`, project back."""

    def __init__(self, embed_dim, num_heads, dropout, attend=full_attention):
        super().__init__()
        self.num_heads, self.dropout, self.attend = num_heads, dropout, attend
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def split_heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, D)

    def keys_values(self, states):
        """The keys and values of states (B, S, E), each (B, H, S, D)."""
        return self.split_heads(self.k_proj(states)), self.split_heads(self.v_proj(states))

    def forward(self, x, key, value, visible):
        """x (B, T, E), key and value (B, H, S, D) -> (B, T, E).

        visible: (B, S) if `attend` is lsg_attention, otherwise broadcastable to (B, H, T, S).
        """
        query = self.split_heads(self.q_proj(x))  # (B, H, T, D)
        dropout_p = self.dropout if self.training else 0.0
        context = self.attend(query, key, value, visible, dropout_p=dropout_p)  # (B, H, T, D)
        return self.out_proj(context.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Self-attention and feed-forward. Each normalizes its input and is added to it (pre-norm)."""

    def __init__(self, config, num_heads, ffn_dim, attend=full_attention):
        super().__init__()
        self.self_attn = Attention(config.d_model, num_heads, config.attention_dropout, attend)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.activation = ACTIVATIONS[config.activation_function]
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def attend_to_itself(self, x, visible, layer_cache=None):
        """x (B, T, E) -> (B, T, E). With a cache, it sees the earlier tokens, too."""
        normed = self.self_attn_layer_norm(x)
        key, value = self.self_attn.keys_values(normed)
        if layer_cache is not None:
            key, value = layer_cache.append(key, value)  # (B, H, all tokens written so far, D)
        return x + self.dropout(self.self_attn(normed, key, value, visible))

    @tokens_in_pieces
    def feed_forward(self, x):
        hidden = self.activation(self.fc1(self.final_layer_norm(x)))  # (B, T, ffn_dim)
        return x + self.dropout(self.fc2(self.activation_dropout(hidden)))

    def forward(self, x, visible):
        return self.feed_forward(self.attend_to_itself(x, visible))


class DecoderLayer(Layer):
    """The same, with attention to the document in between."""

    def __init__(self, config):
        heads = config.decoder_attention_heads
        super().__init__(config, heads, config.decoder_ffn_dim)
        self.encoder_attn = Attention(config.d_model, heads, config.attention_dropout)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x, visible, cross_kv, cross_visible, layer_cache):
        """x (B, T, E). cross_kv: the layer's keys and values of the document; None: no document."""
        x = self.attend_to_itself(x, visible, layer_cache)
        if cross_kv is not None:
            normed = self.encoder_attn_layer_norm(x)
            x = x + self.dropout(self.encoder_attn(normed, *cross_kv, cross_visible))
        return self.feed_forward(x)


# ------------------------------------------------------------------------------------------------
# Encoder and decoder


class Stack(nn.Module):
    """Embeddings, layers and a final norm: the parts that encoder and decoder share."""

    def __init__(self, config, shared, layers, layerdrop):
        super().__init__()
        self.config, self.layerdrop = config, layerdrop
        self.embed_tokens = shared
        # mBART does not use the first two rows.
        self.embed_positions = nn.Embedding(config.max_position_embeddings + 2, config.d_model)
        self.embed_scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.layernorm_embedding = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(layers)
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.gradient_checkpointing = False  # True: training keeps only the inputs of each layer

    def embed(self, input_ids, first, end):
        """Token embeddings of input_ids (B, T) plus those of the positions first, …, end - 1.

        They are T positions, or one for all tokens. Returns (B, T, E).
        """
        if end > self.config.max_position_embeddings:
            raise ValueError(
                f"{end} tokens, but the model has {self.config.max_position_embeddings} positions: "
                f"cut the text, or load the model with max_position_embeddings={end}")
        positions = self.embed_positions.weight[first + 2:end + 2]  # (T or 1, E)
        return self.embed_tokens(input_ids) * self.embed_scale + positions

    def run_layer(self, layer, x, *inputs):
        """In training, a layer may be skipped, or computed again in the backward pass."""
        if self.training and self.layerdrop and torch.rand(()) < self.layerdrop:
            return x
        if self.training and self.gradient_checkpointing:
            return checkpoint(layer, x, *inputs, use_reentrant=False)
        return layer(x, *inputs)


class Encoder(Stack):
    def __init__(self, config, shared):
        attend = full_attention
        if config.lsg:
            options = {name: getattr(config, name) for name in LSG_OPTIONS}
            attend = partial(lsg_attention, adaptive=config.adaptive, **options)
        layers = [Layer(config, config.encoder_attention_heads, config.encoder_ffn_dim, attend)
                  for _ in range(config.encoder_layers)]
        super().__init__(config, shared, layers, config.encoder_layerdrop)
        if config.lsg:
            self.global_embeddings = nn.Embedding(NUM_GLOBALS, config.d_model)  # the first G serve

    def forward(self, input_ids, attention_mask=None):
        """input_ids (B, T); attention_mask (B, T), True or 1 except for padding.

        Returns the states (B, S, E) and which of them the decoder may see (B, S). S = G + T, and
        the global tokens come first. If pass_global_tokens_to_decoder is False, S = T.
        """
        config = self.config
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        visible = boolean_mask(attention_mask)
        x = self.embed(input_ids, 0, input_ids.shape[1])  # (B, T, E)
        if config.lsg:
            G = config.num_global_tokens
            global_tokens = self.global_embeddings.weight[:G].expand(len(x), -1, -1)
            x = torch.cat([global_tokens, x], dim=1)  # (B, G + T, E)
            if config.mask_first_token:
                visible = F.pad(visible[:, 1:], (1, 0), value=False)
            visible = F.pad(visible, (G, 0), value=True)  # (B, G + T)
        x = self.dropout(self.layernorm_embedding(x))
        # lsg_attention takes (B, S), full_attention (B, 1, 1, S).
        layer_visible = visible if config.lsg else visible[:, None, None]
        for layer in self.layers:
            x = self.run_layer(layer, x, layer_visible)
        x = self.layer_norm(x)

        if config.lsg and not config.pass_global_tokens_to_decoder:
            # With mask_first_token, the first row is useless, and the decoder does not see it.
            first = 0 if config.pool_with_global or config.mask_first_token else G
            x = torch.cat([x[:, first:first + 1], x[:, G + 1:]], dim=1)  # (B, T, E)
            visible = visible[:, G:]
        return x, visible


class Decoder(Stack):
    def __init__(self, config, shared):
        layers = [DecoderLayer(config) for _ in range(config.decoder_layers)]
        super().__init__(config, shared, layers, config.decoder_layerdrop)

    def cross_kv(self, encoder_states):
        """Each layer's keys and values of the document, for its cross-attention."""
        pairs = [layer.encoder_attn.keys_values(encoder_states) for layer in self.layers]
        # Contiguous, since they are read at every step.
        return [(key.contiguous(), value.contiguous()) for key, value in pairs]

    def forward(self, input_ids, cross_kv=None, cross_visible=None, attention_mask=None,
                cache=None):
        """input_ids, attention_mask (B, T), cross_visible (B, S) -> states (B, T, E).

        A token sees itself and those before it.
        cache: see beam_search.Cache. The T tokens are then the newest ones of the beams of each
        document: they have the same position, see the same document, and their own histories.
        """
        if cache is not None:
            visible = cache.next_step()  # (B, 1, beams, all tokens written so far by all beams)
            x = self.embed(input_ids, cache.position, cache.position + 1)
        else:
            T = input_ids.shape[1]
            visible = torch.ones(T, T, dtype=torch.bool, device=input_ids.device).tril()
            x = self.embed(input_ids, 0, T)
        if attention_mask is not None:
            visible = visible & boolean_mask(attention_mask)[:, None, None]  # (B, 1, T, T)
        if cross_visible is not None:
            cross_visible = cross_visible[:, None, None]  # (B, 1, 1, S)
        x = self.dropout(self.layernorm_embedding(x))
        for i, layer in enumerate(self.layers):
            layer_kv = None if cross_kv is None else cross_kv[i]
            layer_cache = None if cache is None else cache.layers[i]
            x = self.run_layer(layer, x, visible, layer_kv, cross_visible, layer_cache)
        return self.layer_norm(x)


# ------------------------------------------------------------------------------------------------
# Models


class BarthezModel(nn.Module):
    """Encoder and decoder without a head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        self.encoder = Encoder(config, self.shared)
        self.decoder = Decoder(config, self.shared)

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None):
        """All (B, length). decoder_input_ids default to the input, shifted right."""
        if decoder_input_ids is None:
            decoder_input_ids = shift_right(input_ids, self.config.pad_token_id)
        encoder_states, cross_visible = self.encoder(input_ids, attention_mask)
        cross_kv = self.decoder.cross_kv(encoder_states)
        states = self.decoder(decoder_input_ids, cross_kv, cross_visible)
        return Output(last_hidden_state=states, encoder_last_hidden_state=encoder_states)


def shift_right(ids, pad_token_id):
    """The decoder input for a target (B, T): the last token, </s>, moves to the front.

    Padding is -100 or pad_token_id: [5, 6, 2, 1] becomes [2, 5, 6, 2].
    """
    ids = ids.masked_fill(ids == -100, pad_token_id)
    last = ((ids != pad_token_id).sum(1, keepdim=True) - 1).clamp(min=0)
    return torch.cat([ids.gather(1, last), ids[:, :-1]], dim=1)


class BarthezForConditionalGeneration(nn.Module):
    """Writes text: summaries, titles, the words that <mask> hides."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = BarthezModel(config)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.shared.weight

    def logits(self, states):
        return self.lm_head(states) + self.final_logits_bias

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, labels=None):
        """All (B, length) -> logits (B, T, V), T of the decoder. Labels of -100 do not count."""
        if labels is not None and decoder_input_ids is None:
            decoder_input_ids = shift_right(labels, self.config.pad_token_id)
        out = self.model(input_ids, attention_mask, decoder_input_ids)
        out.logits = self.logits(out.last_hidden_state)
        if labels is not None:
            out.loss = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
        return out

    @torch.no_grad()
    @packed_weights
    def generate(self, input_ids, attention_mask=None, *, progress=None, **settings):
        """Write texts for each document by beam search; one beam is greedy search.

        input_ids, attention_mask: (B, T). Without a mask, pad_token_id is padding.
        settings: TOKEN_IDS and BEAM_SETTINGS; those not given are the checkpoint's.
        progress: called before each step as progress(tokens written, max_length).
        Returns ids (B * num_return_sequences, L), the best text of each document first. Each begins
        with the start token; pad_token_id follows </s>. Dropout is off.
        """
        config = generation_config(self.config, settings)
        if attention_mask is None:
            attention_mask = input_ids != config.pad_token_id
        start = input_ids.new_full((len(input_ids),), config.decoder_start_token_id)
        with evaluation_mode(self):
            encoder_states, cross_visible = self.model.encoder(input_ids, attention_mask)
            cross_kv = self.model.decoder.cross_kv(encoder_states)
            cache = Cache(config, len(input_ids), like=encoder_states)

            def next_logits(tokens):  # (B, beams) -> (B, beams, V)
                states = self.model.decoder(tokens, cross_kv, cross_visible, cache=cache)
                return self.logits(states)

            return beam_search(next_logits, cache.reorder, start, config, progress)


def generation_config(config, settings):
    """The config for one call of `generate`. Raises ValueError if the settings do not fit."""
    known = TOKEN_IDS + BEAM_SETTINGS
    unknown = settings.keys() - set(known)
    if unknown:
        raise ValueError(f"generate has no setting {', '.join(sorted(unknown))}: choose among "
                         f"{', '.join(known)}")
    config = replace(config, **settings)  # checks the values
    if config.max_length is None:
        config = replace(config, max_length=20)
    if config.decoder_start_token_id is None:
        config = replace(config, decoder_start_token_id=config.bos_token_id)
    max_length, positions = config.max_length, config.max_position_embeddings
    if max_length - 1 > positions:  # the last token is not read again
        raise ValueError(f"{max_length=}, but the decoder has {positions} positions: choose at "
                         f"most {positions + 1}")
    if config.min_length > max_length:
        raise ValueError(f"min_length={config.min_length} is above {max_length=}")
    return config


@contextmanager
def evaluation_mode(model):
    """Switches dropout off for a while."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class BarthezForSequenceClassification(nn.Module):
    """A label for a text, from the decoder's state at the position of the last </s>."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = BarthezModel(config)
        self.classification_head = nn.ModuleDict({
            "dense": nn.Linear(config.d_model, config.d_model),
            "out_proj": nn.Linear(config.d_model, config.num_labels)})

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, labels=None):
        """labels: (B,) of classes, (B,) or (B, num_labels) of numbers -> logits (B, num_labels)."""
        out = self.model(input_ids, attention_mask, decoder_input_ids)
        is_eos = input_ids == self.config.eos_token_id
        if not is_eos.any(1).all():
            raise ValueError("a text without </s> cannot be classified: end it with "
                             f"eos_token_id={self.config.eos_token_id}")
        last = is_eos.cumsum(1).argmax(1)  # the first of the positions with the largest count
        x = out.last_hidden_state[torch.arange(len(last)), last]  # (B, E)
        drop = partial(F.dropout, p=self.config.classifier_dropout, training=self.training)
        x = torch.tanh(self.classification_head["dense"](drop(x)))
        out.logits = self.classification_head["out_proj"](drop(x))
        if labels is not None:
            out.loss = self.loss(out.logits, labels)
        return out

    def loss(self, logits, labels):
        """Mean squared error, cross-entropy, or binary cross-entropy, by problem_type."""
        problem_type = self.config.problem_type
        if problem_type is None and self.config.num_labels == 1:
            problem_type = "regression"
        elif problem_type is None and labels.dtype in (torch.int64, torch.int32):
            problem_type = "single_label_classification"
        if problem_type == "regression":
            return F.mse_loss(logits.squeeze(), labels.squeeze())
        if problem_type == "single_label_classification":
            return F.cross_entropy(logits, labels.flatten().long())
        return F.binary_cross_entropy_with_logits(logits, labels)


class BarthezForQuestionAnswering(nn.Module):
    """Where in the text an answer starts and ends."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = BarthezModel(config)
        self.qa_outputs = nn.Linear(config.d_model, 2)

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None,
                start_positions=None, end_positions=None):
        """start_positions, end_positions (B,) -> start_logits, end_logits (B, T)."""
        out = self.model(input_ids, attention_mask, decoder_input_ids)
        out.start_logits, out.end_logits = self.qa_outputs(out.last_hidden_state).unbind(-1)
        if start_positions is not None and end_positions is not None:
            start_loss = self.loss(out.start_logits, start_positions)
            out.loss = (start_loss + self.loss(out.end_logits, end_positions)) / 2
        return out

    def loss(self, logits, positions):
        T = logits.shape[1]  # positions from T on were cut off with the text and do not count
        return F.cross_entropy(logits, positions.flatten().clamp(0, T), ignore_index=T)


class BarthezForCausalLM(nn.Module):
    """The decoder alone, as a language model. Shift labels yourself, as in the original."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        shared = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        self.model = nn.ModuleDict({"decoder": Decoder(config, shared)})  # for the names
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = shared.weight

    def forward(self, input_ids, attention_mask=None, labels=None):
        """All (B, T) -> logits (B, T, V)."""
        states = self.model["decoder"](input_ids, attention_mask=attention_mask)
        logits = self.lm_head(states)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(loss=loss, logits=logits, last_hidden_state=states)


ARCHITECTURES = {kind.__name__.removeprefix("Barthez"): kind for kind in (
    BarthezModel, BarthezForConditionalGeneration, BarthezForSequenceClassification,
    BarthezForQuestionAnswering, BarthezForCausalLM)}


# ------------------------------------------------------------------------------------------------
# Loading and saving


def load_model(source, *, revision=None, architecture=None, device=None, dtype=None, lsg=True,
               **overrides):
    """A model in evaluation mode, and its tokenizer.

    source: a folder, a model's id on the Hub, or "tiny" for the bundled model.
    revision: a branch, tag, commit or refs/pr/N on the Hub.
    architecture: one of ARCHITECTURES; default: the one that config.json names.
    device, dtype: where and how the weights are kept; default: the CPU and float32.
    lsg: False gives full attention. Otherwise a BARThez without global tokens is converted to LSG,
        with 4,096 positions or the given max_position_embeddings.
    overrides: keys of config.json, such as sparsity_type="pooling" or num_global_tokens=16.
    Raises ValueError or OSError; the message says what is wrong and what to do.
    """
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
             "float64": torch.float64, None: torch.float32}
    dtype = types.get(dtype, dtype)
    if dtype not in types.values():
        raise ValueError(f"{dtype=}: choose float32, bfloat16, float16 or float64")
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device fails in its own way
        raise ValueError(f"{device=} cannot be used: {one_line(error, 100)}") from None
    overrides = without_aliases(overrides)
    unknown = overrides.keys() - {f.name for f in fields(BarthezConfig)} - {"num_labels"}
    if unknown:
        raise ValueError(f"config.json has no key {', '.join(sorted(unknown))}")
    settings, tensors, tokenizer = read_checkpoint(source, revision)
    settings = without_aliases(settings)
    if overrides.keys() & {"num_labels", "id2label"}:  # overriding one replaces both
        settings = settings | {"num_labels": None, "id2label": None}
    positions = overrides.get("max_position_embeddings")
    try:
        if positions is not None:
            check_field("max_position_embeddings", positions, int)
        architecture = architecture_name(architecture or settings.get("architectures"))
        has_encoder = POSITIONS[0] in tensors  # a causal model has none
        if lsg and has_encoder and GLOBALS not in tensors:
            settings, tensors = convert_to_lsg(settings, tensors, tokenizer, positions or 4096)
        elif positions is not None:
            settings, tensors = resize_positions(settings, tensors, positions)
        config = BarthezConfig.from_dict(settings | overrides | {"lsg": lsg})
        model = build_model(config, architecture, tensors)
    except ValueError as error:
        raise ValueError(f"{source} cannot be loaded: {error}") from None
    tokenizer.model_max_length = config.max_position_embeddings
    model = model.to(device, dtype).eval()
    accelerate(model)
    return model, tokenizer


class SkipInit(TorchFunctionMode):
    """Skips initialization on the meta device: it has no effect and takes two seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs or {})


class HeadWarning(UserWarning):
    """The checkpoint was made for another task than the model."""


def build_model(config, architecture, tensors):
    """The model whose parameters are the given tensors, with the names of read_checkpoint.

    Raises ValueError if the tensors do not fit. Warns if the checkpoint lacks the model's head, or
    has the head of another task.
    """
    with torch.device("meta"), SkipInit():  # shapes without memory
        model = ARCHITECTURES[architecture](config)
    # The names of the model without a head lack the prefix "model.".
    named = nn.ModuleDict({"model": model}) if architecture == "Model" else model
    check_tensors(named.state_dict(), tensors, architecture)

    shared = nn.Parameter(tensors[EMBEDDING])  # one parameter under all of its names
    given = {"final_logits_bias": torch.zeros(1, config.vocab_size)} | tensors
    given |= dict.fromkeys(EMBEDDINGS[:3], shared)  # all but lm_head.weight
    if config.tie_word_embeddings:
        given["lm_head.weight"] = shared
    elif "lm_head.weight" in given:  # it may be the embedding's tensor, but is trained apart
        given["lm_head.weight"] = given["lm_head.weight"].clone()
    missing = named.load_state_dict(given, strict=False, assign=True).missing_keys

    for head in sorted({name.partition(".")[0] for name in missing}):
        warnings.warn(f"the checkpoint has no {head}: it is initialized and needs training",
                      HeadWarning)
        init_weights(model.get_submodule(head).to_empty(device="cpu"), config.init_std)
    if hasattr(model, "lm_head") and any(name.startswith(OTHER_HEADS) for name in tensors):
        warnings.warn("the checkpoint was made for another task: its head is not used",
                      HeadWarning)
    return model


def check_tensors(state, tensors, architecture):
    """Raise ValueError that names all missing, unexpected and misshapen tensors."""
    may_be_unused = *HEADS, GLOBALS
    if architecture == "ForCausalLM":
        may_be_unused += "model.encoder.", EMBEDDING
    faults = [f"missing {name}" for name in state.keys() - tensors.keys()
              if not name.startswith(HEADS)]
    faults += [f"unexpected {name}" for name in tensors.keys() - state.keys()
               if not name.startswith(may_be_unused)]
    for name in state.keys() & tensors.keys():
        shape, dtype = tuple(tensors[name].shape), tensors[name].dtype
        if shape != state[name].shape:
            faults.append(f"{name} has shape {shape}, not {tuple(state[name].shape)}")
        if not dtype.is_floating_point:
            faults.append(f"{name} is {dtype}")
    if faults:
        shown = sorted(faults)[:10] + ([f"{len(faults) - 10} more"] if len(faults) > 10 else [])
        raise ValueError(f"the weights do not fit the configuration: {'; '.join(shown)}")


def init_weights(model, std):
    """Draw weights as mBART does: normal with standard deviation `std`, biases and padding 0."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for module in model.modules():  # last, since lm_head may share the matrix of the embedding
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight.data[module.padding_idx])


def save_model(model, tokenizer, folder):
    """Save a checkpoint in the published layout, which the original's code reads as well.

    Raises ValueError if a weight is not finite, OSError if the folder cannot be written. An older
    checkpoint in the folder is replaced only when the new one is complete.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"not saved: {name} has values that are not finite")
    config = model.config
    settings = asdict(config) | {
        "num_hidden_layers": config.encoder_layers, "num_labels": config.num_labels,
        "label2id": {label: index for index, label in config.id2label.items()}}
    for f in fields(config):
        is_default_null = f.default is None and settings[f.name] is None
        if is_default_null or f.name == "lsg" or f.name in LSG_KEYS and not config.lsg:
            del settings[f.name]
    architecture = type(model).__name__.removeprefix("Barthez")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    settings = published_config(settings, architecture, config.lsg, dtype)
    write_checkpoint(folder, settings, model.state_dict(), tokenizer)


# ------------------------------------------------------------------------------------------------
# The command line

TASKS = {  # the default model and the architecture
    "summarize": ("moussaKam/barthez-orangesum-abstract", "ForConditionalGeneration"),
    "fill-mask": ("moussaKam/barthez", "ForConditionalGeneration"),
    "classify": ("moussaKam/barthez-sentiment-classification", "ForSequenceClassification")}
OPTIONS = {  # keys of config.json that have an option of their own
    "num_beams": "1 is greedy search", "max_length": "in tokens", "min_length": "in tokens",
    "length_penalty": "above 0 favors long texts", "no_repeat_ngram_size": "0 allows repetition",
    "block_size": "of LSG attention", "sparsity_type": ", ".join(SPARSITY_TYPES[:-1])}


def parse_arguments():
    """The arguments, and the keys of config.json that they override."""
    parser = argparse.ArgumentParser(description="Summarize long French documents.")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--summarize", nargs="+", metavar="FILE",
                      help="print a summary of each UTF-8 text file; - is standard input")
    task.add_argument("--fill-mask", metavar="TEXT",
                      help="print the 5 most likely words for <mask> in TEXT")
    task.add_argument("--classify", metavar="TEXT", help="print the label of TEXT")
    parser.add_argument("--model", help="Hub id, folder, or tiny, the bundled model (default: "
                        "a published BARThez made for the task)")
    parser.add_argument("--revision", help="branch, tag, commit or refs/pr/N on the Hub")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda, … (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--max-source-length", type=int, metavar="N",
                        help="read at most N tokens of a text, with new positions if needed")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="override keys of config.json, such as sparsity_factor=4")
    # The other options are short for --set.
    parser.add_argument("--dense", dest="set", action="append_const", const="lsg=false",
                        help="full attention instead of LSG")
    for key, text in OPTIONS.items():
        parser.add_argument("--" + key.replace("_", "-"), dest="set", action="append",
                            type=(key + "={}").format, metavar="VALUE", help=text)
    arguments = parser.parse_args()

    overrides = parse_settings(arguments.set)
    given = {name for name, value in vars(arguments).items() if value is not None}
    useless = {"num_return_sequences"}  # one text is printed
    if overrides.get("lsg") is False:
        useless |= LSG_KEYS.keys()
    if not arguments.summarize:
        useless |= {"max_source_length", *BEAM_SETTINGS}
    unused = useless & (given | overrides.keys())
    if unused:
        raise ValueError(f"{', '.join(sorted(unused))}: no effect here, leave it out")
    return arguments, overrides


def main():
    keep_freed_memory()
    arguments, overrides = parse_arguments()
    if arguments.summarize:
        summarize_files(arguments, overrides)
    elif arguments.fill_mask is not None:
        fill_mask(arguments.fill_mask, *load("fill-mask", arguments, overrides))
    else:
        classify(arguments.classify, *load("classify", arguments, overrides))


def load(task, arguments, overrides):
    """The model and tokenizer for a task. A checkpoint that was made for another is an error."""
    default_model, architecture = TASKS[task]
    source = default_model if arguments.model is None else arguments.model
    options = overrides | {"architecture": architecture, "device": arguments.device,
                           "dtype": arguments.dtype}
    options["num_return_sequences"] = 1  # whatever the checkpoint says, one is printed
    with warnings.catch_warnings():
        warnings.simplefilter("error", HeadWarning)
        try:
            return load_model(source, revision=arguments.revision, **options)
        except HeadWarning as warning:
            raise ValueError(f"{source} was not made for --{task}: {warning}") from None
        except NoNetwork as error:
            if arguments.model is not None or task != "summarize":
                raise
            notice(f"{error} Using the small bundled model instead. It was trained only on "
                   "descriptions of software and manual pages.")
            arguments.model, arguments.revision = "tiny", None
            return load(task, arguments, overrides)


def summarize_files(arguments, overrides):
    """Print a summary of each file, and one line on stderr for each file that cannot be read."""
    texts = []  # (name, text)
    for name in arguments.summarize:
        try:
            texts.append((name, read_text(name)))
        except (ValueError, OSError) as error:
            notice(f"barthez.py: {error}")
    if not texts:
        sys.exit(2)
    model, tokenizer = load("summarize", arguments, overrides)
    limit = arguments.max_source_length
    if limit is None:
        limit = tokenizer.model_max_length
    # Only the model's tokenizer tells how many tokens there are. Then more positions may be needed.
    needed = min(limit, max(len(tokenizer.encode(text)) for _, text in texts))
    if needed > tokenizer.model_max_length:
        overrides = overrides | {"max_position_embeddings": needed}
        del model
        model, tokenizer = load("summarize", arguments, overrides)
    for name, text in texts:
        print(summarize(model, tokenizer, name, text, limit), flush=True)
    if len(texts) < len(arguments.summarize):
        sys.exit(2)


def read_text(name):
    """The text of a file, or of standard input for -."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise OSError(f"{name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 (byte {error.start}): convert it, for example with "
                         "iconv -f latin1 -t utf-8") from None
    if "\0" in text:
        raise ValueError(f"{name} is not a text file")
    if not text.strip():
        raise ValueError(f"{name} is empty")
    return text


def summarize(model, tokenizer, name, text, limit):
    """The summary of the first `limit` tokens of a text. `name` is for notices."""
    ids, whole = tokenizer.encode(text, max_length=limit), len(tokenizer.encode(text))
    if len(ids) < whole:
        notice(f"{name}: reading the first {len(ids):,} of {whole:,} tokens; --max-source-length "
               f"{whole} reads all")

    def progress(written, max_length):
        notice(f"\r{name}: {len(ids):,} tokens read, {written} of up to {max_length} written",
               end="")

    on_terminal = sys.stderr.isatty()
    out = model.generate(torch.tensor([ids], device=model.lm_head.weight.device),
                         max_length=model.config.max_length or 128,
                         progress=progress if on_terminal else None)
    if on_terminal:
        notice("\r\033[K", end="")
    return tokenizer.decode(out[0])


@torch.inference_mode()
def fill_mask(text, model, tokenizer):
    """Print the five most likely words for each <mask> and their probabilities."""
    ids = tokenizer(text, truncation=True)["input_ids"].to(model.lm_head.weight.device)  # (1, T)
    positions = (ids[0] == tokenizer.mask_token_id).nonzero()[:, 0]
    if not len(positions):
        raise ValueError("--fill-mask needs a <mask> in its text")
    logits = model(ids).logits[0, positions]  # (masks, V)
    for probabilities, words in zip(*logits.float().softmax(-1).topk(5)):
        for probability, word in zip(probabilities, words):
            print(f"{probability:.3f} {tokenizer.decode([word])}")


@torch.inference_mode()
def classify(text, model, tokenizer):
    """Print the label of the text and its probability, or the number that a regression predicts."""
    ids = tokenizer(text, truncation=True)["input_ids"].to(model.model.shared.weight.device)
    logits = model(ids).logits[0].float()  # (num_labels,)
    if len(logits) == 1:
        print(f"{logits.item():.3f}")
        return
    probabilities = logits.softmax(-1)
    if model.config.problem_type == "multi_label_classification":
        probabilities = logits.sigmoid()
    probability, label = probabilities.max(-1)
    print(f"{model.config.id2label[label.item()]} {probability:.3f}")


if __name__ == "__main__":
    run(main)
