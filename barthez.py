"""LSG-BARThez: the French encoder-decoder BARThez, reading long documents with LSG attention.

    python barthez.py --summarize file.txt

BARThez is an mBART: M. Kamal Eddine et al., "BARThez: a Skilled Pretrained French
Sequence-to-Sequence Model" (2020), arXiv:2010.12321, after Y. Liu et al., arXiv:2001.08210.
Official code: transformers 4.36.2, models/mbart/modeling_mbart.py; with LSG, lsg-converter 0.1.9,
lsg_converter/mbart/modeling_lsg_mbart.py. Modules are named as in the checkpoint.

The walk of a document: main -> a folder (hub.py) -> config, tensors, tokenizer, with a conversion
to LSG (load_weights.py) -> build_model -> summarize -> ids (tokenizer.py) -> generate -> Encoder ->
lsg_attention (lsg.py) -> Decoder, with the cache of beam_search (beam_search.py) -> ids -> text.
cpu.py makes it faster.

Letters used for shapes:
    B batch    H heads    D head dimension    E d_model    V vocabulary    G global tokens
    T tokens of the sequence that attends     S tokens that it attends to; in cross-attention, those
                                              of the encoded document, with its globals
                                              (in Encoder, T leaves out the globals: S = G + T)
    beams      num_beams: during generation, shapes have "beams" instead of T, since each step reads
               one token per beam
"""

import argparse
import codecs
import json
import math
import sys
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from beam_search import Cache, GenerationConfig, beam_search, check_finite, check_types
from cpu import accelerate, keep_freed_memory, packed_weights
from hub import NoNetwork, find_model
from load_weights import (ALIASES, GLOBALS, NUM_GLOBALS, WEIGHTS, describe, read_checkpoint,
                          resize_positions, write_checkpoint)
from lsg import SPARSITY_TYPES, boolean_mask, check_options, full_attention, lsg_attention

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "swish": F.silu, "tanh": torch.tanh,
               "gelu_new": partial(F.gelu, approximate="tanh")}
LSG_OPTIONS = ("block_size", "sparse_block_size", "sparsity_factor", "sparsity_type",
               "num_global_tokens", "lsh_num_pre_rounds", "adaptive")  # of lsg_attention
OTHER_HEADS = ("classification_head.", "qa_outputs.")  # of models that do not write text
HEADS = OTHER_HEADS + ("lm_head.", "final_logits_bias")


# ------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class BarthezConfig:
    """The keys of config.json that describe a model, with their defaults."""
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
    init_std: float = 0.02  # standard deviation of new weights

    # Special tokens
    bos_token_id: int = 0
    pad_token_id: int = 1
    eos_token_id: int = 2
    decoder_start_token_id: int | None = None  # None: bos_token_id

    # LSG attention; see lsg.py
    lsg: bool = True  # False: full attention, as in the published BARThez
    block_size: int = 128
    sparse_block_size: int = 128
    sparsity_factor: int = 2
    sparsity_type: str | None = "norm"
    num_global_tokens: int = 1
    lsh_num_pre_rounds: int = 1
    adaptive: bool = True
    mask_first_token: bool = False  # mask <s>; the first global token replaces it
    pass_global_tokens_to_decoder: bool = True  # False: drop them after the encoder
    pool_with_global: bool = True  # if they are dropped, the first one replaces <s>

    # Training
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    classifier_dropout: float = 0.0
    encoder_layerdrop: float = 0.0  # probability of skipping a layer
    decoder_layerdrop: float = 0.0
    id2label: dict = field(default_factory=lambda: {0: "LABEL_0", 1: "LABEL_1"})  # of a classifier

    def __post_init__(self):
        """Raises ValueError that names the field, its value and what is allowed."""
        check_types(self)
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(f"activation_function={self.activation_function!r}: choose one of "
                             f"{', '.join(ACTIVATIONS)}")
        for heads in (self.encoder_attention_heads, self.decoder_attention_heads):
            if heads < 1 or self.d_model % heads:
                raise ValueError(f"d_model={self.d_model} is not divisible by {heads} heads")
        if self.lsg:
            options = {name: getattr(self, name) for name in LSG_OPTIONS if name != "adaptive"}
            check_options(**options)
            if not 1 <= self.num_global_tokens <= NUM_GLOBALS:
                raise ValueError(f"num_global_tokens={self.num_global_tokens}: choose 1 to "
                                 f"{NUM_GLOBALS}")


def config_from(kind, settings):
    """A BarthezConfig or GenerationConfig from the keys of config.json. Others are ignored.

    null means the default, except where None is allowed. num_labels wins over id2label.
    """
    labels = settings.get("id2label") or {}
    num_labels = settings.get("num_labels") or len(labels) or 2
    if len(labels) != num_labels:
        labels = {i: f"LABEL_{i}" for i in range(num_labels)}
    settings = settings | {"id2label": {int(i): label for i, label in labels.items()}}
    return kind(**{f.name: settings[f.name] for f in fields(kind) if f.name in settings and (
        settings[f.name] is not None or isinstance(None, f.type))})


@dataclass
class Output:
    """The results of a model. Unused fields are None."""
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None  # (B, T, V); of a classifier (B, labels)
    start_logits: torch.Tensor | None = None  # (B, T)
    end_logits: torch.Tensor | None = None  # (B, T)
    last_hidden_state: torch.Tensor | None = None  # of the decoder, (B, T, E)
    encoder_last_hidden_state: torch.Tensor | None = None  # (B, S, E)


# ------------------------------------------------------------------------------------------------
# Attention and layers


class Attention(nn.Module):
    """Multi-head attention: project, attend, project back.

    lsg_options: those of lsg_attention; None: full attention.
    """

    def __init__(self, embed_dim, num_heads, dropout, lsg_options=None):
        super().__init__()
        self.num_heads, self.dropout, self.lsg_options = num_heads, dropout, lsg_options
        self.attention = full_attention  # cpu.accelerate replaces it
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

        The caller makes the keys and values, since those of a document serve all steps of the
        decoder, and those of earlier tokens come from a cache.
        visible: broadcastable to (B, H, T, S); for LSG attention (B, 1, 1, S).
        """
        query = self.split_heads(self.q_proj(x))  # (B, H, T, D)
        dropout_p = self.dropout if self.training else 0.0
        if self.lsg_options is None:
            context = self.attention(query, key, value, visible, dropout_p)  # (B, H, T, D)
        else:
            context = lsg_attention(query, key, value, visible[:, 0, 0], dropout_p=dropout_p,
                                    attention=self.attention, **self.lsg_options)
        return self.out_proj(context.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Self-attention and feed-forward. Each normalizes its input and is added to it (pre-norm)."""

    def __init__(self, config, num_heads, ffn_dim, lsg_options=None):
        super().__init__()
        self.self_attn = Attention(config.d_model, num_heads, config.attention_dropout, lsg_options)
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
            # (B, H, all tokens written so far by all beams, D); visible picks each beam's own.
            key, value = layer_cache.append(key, value)
        return x + self.dropout(self.self_attn(normed, key, value, visible))

    def feed_forward(self, x):
        hidden = self.activation(self.fc1(self.final_layer_norm(x)))  # (B, T, ffn_dim)
        return x + self.dropout(self.fc2(self.activation_dropout(hidden)))

    def forward(self, x, visible):
        x = self.attend_to_itself(x, visible)
        if not x.is_cpu or torch.compiler.is_compiling():
            return self.feed_forward(x)
        # 1,024 tokens at a time: `hidden`, four times as wide as x, then needs less memory.
        return torch.cat([self.feed_forward(piece) for piece in x.split(1024, dim=1)], dim=1)


class DecoderLayer(Layer):
    """The same, with attention to the document in between."""

    def __init__(self, config):
        heads = config.decoder_attention_heads
        super().__init__(config, heads, config.decoder_ffn_dim)
        self.encoder_attn = Attention(config.d_model, heads, config.attention_dropout)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x, visible, cross_kv, cross_visible, layer_cache):
        """x (B, T, E) -> (B, T, E). cross_kv: the layer's keys and values of the document."""
        x = self.attend_to_itself(x, visible, layer_cache)
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
        """Embeddings of input_ids (B, T) plus those of positions first to end - 1 -> (B, T, E).

        During generation, all beams have the same position.
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
        lsg_options = None
        if config.lsg:
            lsg_options = {name: getattr(config, name) for name in LSG_OPTIONS}
        layers = [Layer(config, config.encoder_attention_heads, config.encoder_ffn_dim, lsg_options)
                  for _ in range(config.encoder_layers)]
        super().__init__(config, shared, layers, config.encoder_layerdrop)
        if config.lsg:
            self.global_embeddings = nn.Embedding(NUM_GLOBALS, config.d_model)

    def forward(self, input_ids, attention_mask=None):
        """input_ids (B, T); attention_mask (B, T), True or 1 except for padding; None: no padding.

        Returns the states (B, S, E) and which of them the decoder may see (B, S). S = G + T, and
        the global tokens come first. If pass_global_tokens_to_decoder is False, S = T.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        visible = boolean_mask(attention_mask)
        x = self.embed(input_ids, 0, input_ids.shape[1])  # (B, T, E)
        if self.config.lsg:
            x, visible = self.prepend_globals(x, visible)
        x = self.dropout(self.layernorm_embedding(x))
        for layer in self.layers:
            x = self.run_layer(layer, x, visible[:, None, None])
        x = self.layer_norm(x)
        if self.config.lsg and not self.config.pass_global_tokens_to_decoder:
            x, visible = self.drop_globals(x, visible)
        return x, visible

    def prepend_globals(self, x, visible):
        """x (B, T, E) and visible (B, T) -> (B, G + T, E) and (B, G + T)."""
        G = self.config.num_global_tokens
        global_tokens = self.global_embeddings.weight[:G].expand(len(x), -1, -1)
        if self.config.mask_first_token:
            visible = F.pad(visible[:, 1:], (1, 0), value=False)
        return torch.cat([global_tokens, x], dim=1), F.pad(visible, (G, 0), value=True)

    def drop_globals(self, x, visible):
        """x (B, G + T, E) and visible (B, G + T) -> (B, T, E) and (B, T)."""
        G, text = self.config.num_global_tokens, x[:, self.config.num_global_tokens:]
        # mask_first_token alone also replaces <s>, as in the original, though it is masked then.
        if self.config.pool_with_global or self.config.mask_first_token:
            text = torch.cat([x[:, :1], text[:, 1:]], dim=1)  # the first global token replaces <s>
        return text, visible[:, G:]


class Decoder(Stack):
    def __init__(self, config, shared):
        layers = [DecoderLayer(config) for _ in range(config.decoder_layers)]
        super().__init__(config, shared, layers, config.decoder_layerdrop)

    def cross_kv(self, encoder_states):
        """Each layer's keys and values of the document, for its cross-attention."""
        pairs = [layer.encoder_attn.keys_values(encoder_states) for layer in self.layers]
        # Contiguous, since they are read at every step.
        return [(key.contiguous(), value.contiguous()) for key, value in pairs]

    def forward(self, input_ids, cross_kv, cross_visible, attention_mask=None, cache=None):
        """input_ids, attention_mask (B, T), cross_visible (B, S) -> states (B, T, E).

        A token sees itself and those before it.
        cache: a beam_search.Cache. input_ids (B, beams) are then the newest tokens. The beams of a
            document have the same position; each has its own history.
        """
        if cache is not None:
            # Advances cache.position. (B, 1, beams, all tokens written so far by all beams)
            visible = cache.next_step()
            x = self.embed(input_ids, cache.position, cache.position + 1)
        else:
            T = input_ids.shape[1]
            visible = torch.ones(T, T, dtype=torch.bool, device=input_ids.device).tril()
            x = self.embed(input_ids, 0, T)
        if attention_mask is not None:
            visible = visible & boolean_mask(attention_mask)[:, None, None]  # (B, 1, T, T)
        cross_visible = cross_visible[:, None, None]  # (B, 1, 1, S)
        x = self.dropout(self.layernorm_embedding(x))
        for i, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[i]
            x = self.run_layer(layer, x, visible, cross_kv[i], cross_visible, layer_cache)
        return self.layer_norm(x)


# ------------------------------------------------------------------------------------------------
# Models


class BarthezModel(nn.Module):
    """Encoder and decoder without a head."""

    def __init__(self, config):
        super().__init__()
        self.config, self.generation_config = config, GenerationConfig()
        self.shared = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        self.encoder = Encoder(config, self.shared)
        self.decoder = Decoder(config, self.shared)
        init_weights(self, config)

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None):
        """All (B, length). decoder_input_ids default to the input, shifted right."""
        if decoder_input_ids is None:
            decoder_input_ids = shift_right(input_ids, self.config.pad_token_id)
        encoder_states, cross_visible = self.encoder(input_ids, attention_mask)
        cross_kv = self.decoder.cross_kv(encoder_states)
        states = self.decoder(decoder_input_ids, cross_kv, cross_visible)
        return Output(last_hidden_state=states, encoder_last_hidden_state=encoder_states)


def init_weights(module, config):
    """Draw weights as mBART does: normal with standard deviation init_std, biases and <pad> 0."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            nn.init.normal_(layer.weight, std=config.init_std)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
            nn.init.zeros_(layer.weight.data[layer.padding_idx])


def shift_right(ids, pad_token_id):
    """The decoder input for a target (B, T): the last token, </s>, moves to the front.

    BARThez was trained so: the first token of a text is predicted from </s>. Therefore its
    config.json sets decoder_start_token_id to </s>.
    Padding is -100 or pad_token_id: [5, 6, 2, 1] becomes [2, 5, 6, 2].
    """
    ids = ids.masked_fill(ids == -100, pad_token_id)
    last = ((ids != pad_token_id).sum(1, keepdim=True) - 1).clamp(min=0)
    return torch.cat([ids.gather(1, last), ids[:, :-1]], dim=1)


class BarthezForConditionalGeneration(nn.Module):
    """Writes text: summaries, titles, the words that <mask> replaces."""

    def __init__(self, config):
        super().__init__()
        self.config, self.generation_config = config, GenerationConfig()
        self.model = BarthezModel(config)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        init_weights(self.lm_head, config)
        self.tie_weights()

    def tie_weights(self):
        if self.config.tie_word_embeddings:
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
    def generate(self, input_ids, attention_mask=None, **settings):
        """Write texts for each document by beam search; one beam is greedy search.

        input_ids, attention_mask: (B, T). Without a mask, pad_token_id is padding.
        settings: those of GenerationConfig; those not given are the checkpoint's. max_length is 20
            if neither has one.
        Returns ids (B * num_return_sequences, L), the best text of each document first. Each begins
        with the start token; pad_token_id follows </s>. Call model.eval() before, as for any model.
        """
        config, generation = self.config, replace(self.generation_config, **settings)
        if generation.max_length is None:
            generation = replace(generation, max_length=20)
        positions = config.max_position_embeddings
        if generation.max_length - 1 > positions:  # the last token is not read again
            raise ValueError(f"max_length={generation.max_length}, but the decoder has {positions} "
                             f"positions: choose at most {positions + 1}")
        if attention_mask is None:
            attention_mask = input_ids != config.pad_token_id
        first = config.decoder_start_token_id
        if first is None:
            first = config.bos_token_id
        start = input_ids.new_full((len(input_ids),), first)
        with packed_weights(self):
            encoder_states, cross_visible = self.model.encoder(input_ids, attention_mask)
            cross_kv = self.model.decoder.cross_kv(encoder_states)
            cache = Cache(cross_kv[0][0], config.decoder_layers, generation.num_beams,
                          generation.max_length)

            def next_logits(tokens):  # (B, beams) -> (B, beams, V)
                states = self.model.decoder(tokens, cross_kv, cross_visible, cache=cache)
                return self.logits(states)

            return beam_search(next_logits, cache.reorder, start, generation, config.eos_token_id,
                               config.pad_token_id)


class BarthezForSequenceClassification(nn.Module):
    """A label for a text, from the decoder's state at the position of the last </s>."""

    def __init__(self, config):
        super().__init__()
        self.config, self.generation_config = config, GenerationConfig()
        self.model = BarthezModel(config)
        self.classification_head = nn.ModuleDict({
            "dense": nn.Linear(config.d_model, config.d_model),
            "out_proj": nn.Linear(config.d_model, len(config.id2label))})
        init_weights(self.classification_head, config)

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, labels=None):
        """labels: (B,), int64 -> logits (B, labels). Compute other losses from the logits."""
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
            out.loss = F.cross_entropy(out.logits, labels.flatten())
        return out


class BarthezForQuestionAnswering(nn.Module):
    """Where in the text an answer starts and ends."""

    def __init__(self, config):
        super().__init__()
        self.config, self.generation_config = config, GenerationConfig()
        self.model = BarthezModel(config)
        self.qa_outputs = nn.Linear(config.d_model, 2)
        init_weights(self.qa_outputs, config)

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


ARCHITECTURES = {kind.__name__.removeprefix("Barthez"): kind for kind in (
    BarthezModel, BarthezForConditionalGeneration, BarthezForSequenceClassification,
    BarthezForQuestionAnswering)}
AUTO_CLASSES = ("AutoModel", "AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification",
                "AutoModelForQuestionAnswering")  # transformers' names for them


# ------------------------------------------------------------------------------------------------
# Loading and saving

TINY = Path(__file__).parent / "tiny"  # the bundled model
CONVERSIONS = {  # where safetensors were proposed to a model whose main branch has none
    "moussaKam/barthez": "42bea5aeff64b65241007086b895e6fd17ab6204",
    "moussaKam/barthez-orangesum-abstract": "d297ebaa84d61a069a0cd6922271c4a47ba2554e",
    "moussaKam/barthez-sentiment-classification": "refs/pr/1",
    "moussaKam/mbarthez": "7a86236775ed8eaab6eefc9a90a309c4831fae13"}


def load_model(source, *, revision=None, architecture=None, device=None, dtype=torch.float32,
               **overrides):
    """A model in evaluation mode, and its tokenizer.

    source: a folder, a model's id on the Hub, or "tiny" for the bundled model.
    revision: a branch, tag, commit or refs/pr/N on the Hub.
    architecture: one of ARCHITECTURES; default: the one that config.json names.
    device, dtype: where and how the weights are kept; default: the CPU and float32.
    overrides: keys of config.json, such as sparsity_type="pooling" or num_beams=2. lsg=False gives
        full attention. Otherwise a BARThez without global tokens is converted to LSG, with 4,096
        positions or the given max_position_embeddings.
    Raises ValueError or OSError; the message says what is wrong and what to do. Warns if the
    checkpoint lacks the head of the model, or has the head of another task.
    """
    check_names(overrides)
    folder = find_folder(source, revision)
    with loading(source):
        settings, tensors, tokenizer = read_checkpoint(folder, overrides)
        model = build_model(settings, tensors, architecture)
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model.to(device=device, dtype=dtype), tokenizer


def check_names(overrides):
    """Raise ValueError for keys that config.json does not have."""
    known = {f.name for kind in (BarthezConfig, GenerationConfig) for f in fields(kind)}
    unknown = overrides.keys() - known - ALIASES.keys() - {"num_labels", "max_new_tokens"}
    if unknown:
        raise ValueError(f"config.json has no key {', '.join(sorted(unknown))}")


def find_folder(source, revision=None):
    """The folder of a checkpoint: `source` itself, or that of a model on the Hub in the cache."""
    folder = TINY if source == "tiny" else Path(source)
    if folder.is_file():
        raise ValueError(f"{source} is a file: name the folder that holds the checkpoint")
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for the Hub, but {source} is a folder")
        return folder
    # An older torch does not read a .bin file safely: see read_tensors in load_weights.py.
    readable = WEIGHTS if torch.__version__ >= (2, 10) else WEIGHTS[:1]
    return find_model(str(source), revision, CONVERSIONS.get(source), readable)


@contextmanager
def loading(source):
    """Whatever goes wrong inside is an error that names the checkpoint."""
    try:
        yield
    except OSError:  # names its file
        raise
    except Exception as error:  # a damaged checkpoint may raise any
        raise ValueError(f"{source} cannot be loaded: {describe(error)}") from error


class SkipInit(TorchFunctionMode):
    """Skip initialization on the meta device: it has no effect and takes a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs or {})


def build_model(settings, tensors, architecture=None):
    """The model whose parameters are the given tensors, in evaluation mode.

    settings, tensors: as read_checkpoint returns them. architecture: see load_model.
    Raises RuntimeError with all names that are missing, unexpected or misshapen.
    """
    kind = find_architecture(architecture or settings.get("architectures"))
    config = config_from(BarthezConfig, settings)
    with torch.device("meta"), SkipInit():  # shapes without memory
        model = kind(config)
    model.generation_config = config_from(GenerationConfig, settings)
    # The names of the model without a head lack the prefix "model.".
    named = nn.ModuleDict({"model": model}) if kind is BarthezModel else model
    names = named.state_dict().keys()

    # A head that the model lacks, and the global tokens if lsg=False, are dropped. Any other tensor
    # that it lacks is an error.
    given = {"final_logits_bias": torch.zeros(1, config.vocab_size)} | tensors
    given = {name: x for name, x in given.items()
             if name in names or not name.startswith((*HEADS, GLOBALS))}
    new = [name for name in names - given.keys() if name.startswith(OTHER_HEADS)]
    if new:
        head = new[0].partition(".")[0]
        warnings.warn(f"the checkpoint has no {head}: it is initialized and needs training")
        init_weights(model.get_submodule(head).to_empty(device="cpu"), config)
        given |= {name: named.get_parameter(name) for name in new}
    if kind is BarthezForConditionalGeneration and other_head(tensors):
        warnings.warn("the checkpoint was made for another task: its head is not used")
    named.load_state_dict(given, assign=True)
    if kind is BarthezForConditionalGeneration:
        model.tie_weights()  # assigning gave lm_head a parameter of its own
    accelerate(model)
    return model.eval()


def find_architecture(names):
    """The class for a published name, or for the first of a list of them, as config.json has it."""
    name = names[0] if isinstance(names, list) and names else names or "ForConditionalGeneration"
    short = str(name).removeprefix("LSG").removeprefix("MBart")
    if short not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {name!r}: choose one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[short]


def other_head(tensors):
    """Whether the checkpoint was made for another task than to write text."""
    return any(name.startswith(OTHER_HEADS) for name in tensors)


def save_model(model, tokenizer, folder):
    """Save a checkpoint in the published layout, which the original's code reads as well.

    Raises ValueError if a weight is not finite. An older checkpoint in the folder is replaced only
    when the new one is complete.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"not saved: {name} has values that are not finite")
    config, architecture = model.config, type(model).__name__.removeprefix("Barthez")
    settings = asdict(config) | asdict(model.generation_config) | {
        "architectures": [("LSG" if config.lsg else "") + "MBart" + architecture],
        "model_type": "mbart", "is_encoder_decoder": True,
        "num_hidden_layers": config.encoder_layers,
        "label2id": {label: index for index, label in config.id2label.items()},
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    if settings["max_length"] is None:
        del settings["max_length"]  # transformers takes no null
    if config.lsg:
        settings["base_model_prefix"] = "lsg"
        settings["auto_map"] = {  # the classes in the code that is published with the original
            auto: f"ccdv/lsg-barthez-4096--modeling_lsg_mbart.LSGMBart{name}"
            for auto, name in zip(AUTO_CLASSES, ARCHITECTURES)}
    write_checkpoint(folder, settings, model.state_dict(), tokenizer)


# ------------------------------------------------------------------------------------------------
# Summaries


def summarize(model, tokenizer, texts, *, max_source_length=None, batch_tokens=8192, **settings):
    """Yields the summary of each text, in order.

    Texts of similar length are summarized together: each window of 64 texts is sorted by length and
    cut into batches of at most batch_tokens tokens, padding included, or of one text.
    max_source_length: read so many tokens of each text. Otherwise a text that has more tokens than
        the model has positions raises ValueError.
    settings: those of GenerationConfig. max_length is 128 if neither they nor the model have one.
    With sparsity_type="lsh", which draws for a batch at once, the batches change the summaries.
    """
    if isinstance(texts, str):
        raise ValueError("texts is one text: write [text]")
    settings = {"max_length": model.generation_config.max_length or 128} | settings
    settings["num_return_sequences"] = 1
    texts = iter(texts)
    while window := list(islice(texts, 64)):
        rows = [tokenizer.encode(text, max_length=max_source_length) for text in window]
        summaries, written = {}, 0
        for batch in group_by_length([len(row) for row in rows], batch_tokens):
            ids = pad([rows[i] for i in batch], tokenizer.pad_token_id, model)
            out = model.generate(ids, ids != tokenizer.pad_token_id, **settings)
            summaries |= {i: tokenizer.decode(row) for i, row in zip(batch, out)}
            while written in summaries:  # as soon as those before it are ready, too
                yield summaries[written]
                written += 1


def group_by_length(lengths, batch_tokens):
    """Lists of indices, short texts first. The number of texts in a list times their greatest
    length is at most batch_tokens, unless there is only one."""
    groups = [[]]
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups[-1] and lengths[i] * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(i)
    return groups


def pad(rows, value, model):
    """Lists of numbers as one tensor (B, T) on the model's device, filled up with `value`."""
    length = max(map(len, rows))
    rows = [row + [value] * (length - len(row)) for row in rows]
    return torch.tensor(rows, device=next(model.parameters()).device)


# ------------------------------------------------------------------------------------------------
# The command line

DEFAULT_MODELS = {"summarize": "moussaKam/barthez-orangesum-abstract",
                  "fill_mask": "moussaKam/barthez"}
OPTIONS = {  # keys of config.json that have an option of their own
    "num_beams": "1 is greedy search", "max_length": "in tokens", "min_length": "in tokens",
    "length_penalty": "above 0 favors long texts", "no_repeat_ngram_size": "0 allows repetition",
    "block_size": "of LSG attention", "sparsity_type": ", ".join(SPARSITY_TYPES[:-1])}
NOT_TEXT = {  # how files begin that have to be converted
    b"%PDF": "is a PDF: convert it with pdftotext",
    b"PK\x03\x04": "is a Word, OpenDocument or other packed file: convert it with pandoc -t plain",
    b"{\\rtf": "is an RTF file: convert it with pandoc -t plain",
    b"\xd0\xcf\x11\xe0": "is an old Word file: save it as .docx, then convert it with pandoc",
    b"<!DOCTYPE html": "is a web page: convert it with pandoc -t plain",
    b"<html": "is a web page: convert it with pandoc -t plain"}


def main():
    keep_freed_memory()
    options, overrides = parse_arguments()
    check_names(overrides)
    if options.summarize:
        summarize_files(options, overrides)
    else:
        fill_mask(options, overrides)


def parse_arguments():
    """The arguments, and the keys of config.json that they override."""
    # Without a usage, an error is one line.
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n\n")[0])
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--summarize", nargs="+", metavar="FILE",
                      help="print a summary of each text file; - is standard input")
    task.add_argument("--fill-mask", metavar="TEXT",
                      help="print the 5 most likely words for <mask> in TEXT")
    add = parser.add_argument
    add("--model", help="Hub id, folder, or tiny, the bundled model (default: a published BARThez)")
    add("--revision", help="branch, tag, commit or refs/pr/N on the Hub")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, …")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    add("--max-source-length", type=int, metavar="N",
        help="read at most N tokens of a text, with new positions if needed")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="override keys of config.json, such as sparsity_factor=4")
    # The other options are short for --set.
    add("--dense", dest="set", action="append_const", const="lsg=false",
        help="full attention instead of LSG")
    for key, text in OPTIONS.items():
        add("--" + key.replace("_", "-"), dest="set", action="append", metavar="VALUE", help=text,
            type=(key + "={}").format)
    options = parser.parse_args()
    if options.max_source_length is not None and options.max_source_length < 3:
        raise ValueError("--max-source-length: choose at least 3, for <s>, a token and </s>")
    return options, parse_settings(options.set)


def parse_settings(settings):
    """["KEY=VALUE", …] as a dict. Values are JSON, or else text."""
    values = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    return values


def load(options, overrides, task, texts):
    """A model that writes, its tokenizer, and how many tokens of each text it reads.

    texts: pairs of name and text. One line on stderr names each text that is cut.
    """
    source = DEFAULT_MODELS[task] if options.model is None else options.model
    try:
        folder = find_folder(source, options.revision)
    except NoNetwork as error:
        if (options.model, options.revision, task) != (None, None, "summarize"):
            raise
        folder = TINY
        warnings.warn(f"{error} A tiny bundled model writes instead, which knows only descriptions "
                      "of software: do not rely on its summaries.")
    with loading(source):
        settings, tensors, tokenizer = read_checkpoint(folder, overrides)
        if other_head(tensors):
            raise ValueError("it was made for another task than to write text")
        lengths = [len(tokenizer.encode(text)) for _, text in texts]
        limit = options.max_source_length
        if limit is not None:
            needed = min(limit, max(lengths))
            if needed > settings["max_position_embeddings"]:
                settings, tensors = resize_positions(settings, tensors, needed)
        model = build_model(settings, tensors, "ForConditionalGeneration")
    limit = limit or model.config.max_position_embeddings
    for (name, _), length in zip(texts, lengths):
        if length > limit:
            warnings.warn(f"{name}: reading the first {limit:,} of {length:,} tokens; "
                          f"--max-source-length {length} reads all")
    return model.to(options.device, getattr(torch, options.dtype)), tokenizer, limit


def summarize_files(options, overrides):
    """Print a summary of each file, and one line on stderr for each file that cannot be read."""
    texts = []
    for name in options.summarize:
        try:
            texts.append((name, read_text(name)))
        except (ValueError, OSError) as error:
            print(f"barthez.py: {error}", file=sys.stderr)
    if not texts:
        sys.exit(2)
    model, tokenizer, limit = load(options, overrides, "summarize", texts)
    summaries = summarize(model, tokenizer, [text for _, text in texts], max_source_length=limit)
    on_terminal = sys.stderr.isatty()
    for number, (name, _) in enumerate(texts, 1):
        if on_terminal:
            print(f"file {number} of {len(texts)}", end="", file=sys.stderr, flush=True)
        summary = next(summaries)
        if on_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)  # clear the line
        print(summary if len(options.summarize) == 1 else f"{name}\t{summary}", flush=True)
    if len(texts) < len(options.summarize):
        sys.exit(2)


def read_text(name):
    """The text of a file, or of standard input for -."""
    data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    for start, advice in NOT_TEXT.items():
        if data[:1024].lstrip().startswith(start):
            raise ValueError(f"{name} {advice}")
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if is_utf16 else "utf-8-sig"
    text = data.decode(encoding, "replace")
    if "\0" in text:
        raise ValueError(f"{name} is not a text file")
    if not text.strip():
        raise ValueError(f"{name} is empty")
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        # In a damaged file, most letters with accents are valid; in one from Windows, hardly any.
        invalid = text.count("\ufffd")
        valid = sum(not character.isascii() for character in text) - invalid
        if is_utf16 or valid > invalid:
            raise ValueError(f"{name} is damaged at byte {error.start}: get a good copy") from None
        raise ValueError(f"{name} is not UTF-8 (byte {error.start}): convert it, for example with "
                         "iconv -f cp1252 -t utf-8") from None
    return text


@torch.inference_mode()
def fill_mask(options, overrides):
    """Print the five most likely words for each <mask> and their probabilities."""
    text = options.fill_mask
    model, tokenizer, limit = load(options, overrides, "fill_mask", [("--fill-mask", text)])
    ids = pad([tokenizer.encode(text, max_length=limit)], 0, model)  # (1, T)
    positions = (ids[0] == tokenizer.mask_token_id).nonzero()[:, 0]
    if not len(positions):
        raise ValueError(f"--fill-mask needs a <mask> among the first {limit:,} tokens of its text")
    logits = model(ids).logits[0, positions]  # (masks, V)
    check_finite(logits)
    for probabilities, words in zip(*logits.float().softmax(-1).topk(5)):
        for probability, word in zip(probabilities, words):
            print(f"{probability:.3f} {tokenizer.decode([word])}")


def run(main):
    """Run a program. An error is one line on stderr and exit status 2, Ctrl-C is 130; `python -X
    dev` shows the traceback."""
    program = Path(sys.argv[0]).name
    warnings.formatwarning = lambda message, *_: f"{program}: {message}\n"
    try:
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        print(f"{program}: {describe(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run(main)
