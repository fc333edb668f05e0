"""LSG-BARThez: the French encoder-decoder BARThez, reading long documents with LSG attention.

    python barthez.py --summarize file.txt

BARThez is an mBART: M. Kamal Eddine et al., "BARThez: a Skilled Pretrained French
Sequence-to-Sequence Model" (2020), arXiv:2010.12321, after Y. Liu et al., arXiv:2001.08210. Its
published code is transformers' models/mbart/modeling_mbart.py (4.36.2), and with LSG
lsg_converter/mbart/modeling_lsg_mbart.py (0.1.9). The modules below bear the checkpoint's names.

The way of a document: text -> ids (tokenizer.py) -> Encoder, whose self-attention is lsg.py's
-> BarthezForConditionalGeneration.generate: beams, each step through the Decoder -> ids -> text.

Letters in the comments on shapes:
    B batch, H heads, D head_dim, E d_model    S tokens of the document, globals included
    T tokens of the decoder, V vocabulary      L tokens generated so far
"""

import argparse
import sys


def parse_arguments():
    """The command line. It stands here, before torch is imported, so that --help is instant."""
    parser = argparse.ArgumentParser(
        prog="barthez.py", description="LSG-BARThez: summaries of long French documents.")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--summarize", nargs="+", metavar="FILE",
                      help="print a summary of each UTF-8 text file; - is standard input")
    task.add_argument("--fill-mask", metavar="TEXT",
                      help="print the 5 likeliest words for <mask> in TEXT, with probabilities")
    task.add_argument("--classify", metavar="TEXT", help="print TEXT's label and its probability")

    model = parser.add_argument_group("the model")
    model.add_argument("--model", metavar="NAME", help="Hub id, folder, or tiny, the bundled model "
                       "(default: a published BARThez that fits the task)")
    model.add_argument("--revision", help="branch, tag, commit or refs/pr/N on the Hub")
    model.add_argument("--device", help="cpu, cuda, … (default: cuda where there is one)")
    model.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    model.add_argument("--dense", action="store_true", help="full attention in place of LSG")
    model.add_argument("--max-source-length", type=int, metavar="N", help="tokens read of a text; "
                       "positions are extended beyond the checkpoint's own if need be")

    beams = parser.add_argument_group("the summary (default: as the checkpoint's config says)")
    beams.add_argument("--num-beams", type=int, metavar="N", help="1 is greedy search")
    beams.add_argument("--max-length", type=int, metavar="N", help="in tokens")
    beams.add_argument("--min-length", type=int, metavar="N", help="in tokens")
    beams.add_argument("--length-penalty", type=float, metavar="X", help="above 0 favours length")
    beams.add_argument("--no-repeat-ngram-size", type=int, metavar="N", help="0 allows repeats")

    lsg = parser.add_argument_group("LSG attention (default: as the checkpoint's config says)")
    lsg.add_argument("--sparsity-type", metavar="TYPE", help="%(choices)s", choices=[
        "norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling", "none"])
    for name in ("block-size", "sparse-block-size", "sparsity-factor", "num-global-tokens",
                 "lsh-num-pre-rounds"):
        lsg.add_argument(f"--{name}", type=int, metavar="N")
    for name in ("mask-first-token", "pool-with-global", "pass-global-tokens-to-decoder"):
        lsg.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_arguments()

import math
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lsg import LSGSelfAttention, check_options, dense_attention

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "swish": F.silu, "tanh": torch.tanh,
               "gelu_new": partial(F.gelu, approximate="tanh")}
GENERATION_SETTINGS = {
    "bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id",
    "forced_eos_token_id", "num_beams", "num_return_sequences", "max_length", "min_length",
    "length_penalty", "no_repeat_ngram_size", "early_stopping"}
ALIASES = {  # other names under which the model card and transformers know keys of config.json
    "hidden_size": "d_model", "num_attention_heads": "encoder_attention_heads",
    "attention_probs_dropout_prob": "attention_dropout", "lsg_num_pre_rounds": "lsh_num_pre_rounds"}
ONEDNN = torch.backends.mkldnn.is_available()
NUM_GLOBAL_EMBEDDINGS = 512  # rows of the published table, of which num_global_tokens are used


@dataclass(frozen=True)
class BarthezConfig:
    """What a checkpoint's config.json says, under its own names, and the defaults it goes by.

    The settings of `generate` stand here too: BARThez keeps them in config.json.
    """
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

    # LSG (lsg.py explains them)
    lsg: bool = True  # False: full attention, the plain published BARThez
    block_size: int = 128
    sparse_block_size: int = 128
    sparsity_factor: int = 2
    sparsity_type: str | None = "norm"
    num_global_tokens: int = 1
    lsh_num_pre_rounds: int = 1
    adaptive: bool = True
    mask_first_token: bool = False  # <s> is seen by nobody: the first global stands in for it
    pass_global_tokens_to_decoder: bool = True  # else they are cut off behind the encoder, and
    pool_with_global: bool = True  # … the first one takes the place of <s>

    # Training
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    classifier_dropout: float = 0.0
    encoder_layerdrop: float = 0.0  # probability of skipping a layer
    decoder_layerdrop: float = 0.0

    # Classification
    id2label: dict = field(default_factory=lambda: {0: "LABEL_0", 1: "LABEL_1"})
    problem_type: str | None = None  # regression, {single,multi}_label_classification; None: guess

    # Generation
    bos_token_id: int = 0
    pad_token_id: int = 1
    eos_token_id: int = 2
    decoder_start_token_id: int | None = None  # None: bos_token_id
    forced_eos_token_id: int | None = 2  # comes last where a summary reaches max_length
    num_beams: int = 1
    num_return_sequences: int = 1  # texts for each document, at most num_beams
    max_length: int | None = None  # in tokens, the start token counted; None: 20, as transformers
    min_length: int = 0
    length_penalty: float = 1.0  # a hypothesis scores its log-probability / length**length_penalty
    no_repeat_ngram_size: int = 0
    early_stopping: bool | str = False  # True: stop at num_beams hypotheses; "never": exhaust

    def __post_init__(self):
        for f in fields(self):
            value, kind = getattr(self, f.name), (int, float) if f.type is float else f.type
            if not isinstance(value, kind) or "drop" in f.name and not 0 <= value <= 1:
                raise ValueError(f"{f.name}={value!r} is impossible: "
                                 + ("from 0 to 1" if "drop" in f.name else f"expected {kind}"))
        if self.lsg:
            check_options(self.block_size, self.sparse_block_size, self.sparsity_factor,
                          self.sparsity_type, self.num_global_tokens, self.lsh_num_pre_rounds)
            if not 1 <= self.num_global_tokens <= NUM_GLOBAL_EMBEDDINGS:
                raise ValueError(f"num_global_tokens={self.num_global_tokens}: the table of global "
                                 f"embeddings has 1 to {NUM_GLOBAL_EMBEDDINGS}")
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(f"unknown activation_function {self.activation_function!r}: "
                             f"choose one of {', '.join(ACTIVATIONS)}")
        for heads in (self.encoder_attention_heads, self.decoder_attention_heads):
            if heads < 1 or self.d_model % heads:
                raise ValueError(f"d_model={self.d_model} is not divisible by {heads} heads")
        for name, least in dict(num_beams=1, num_return_sequences=1, min_length=0,
                                no_repeat_ngram_size=0).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: {least} is the least")
        if self.num_return_sequences > self.num_beams:
            raise ValueError(f"num_return_sequences={self.num_return_sequences} is more than "
                             f"num_beams={self.num_beams} can give")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length={self.max_length}: a summary has at least 2 tokens, "
                             "start and end")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping={self.early_stopping!r}: True, False or 'never'")

    @classmethod
    def from_dict(cls, settings):
        """Read the contents of a config.json; unknown keys are ignored, missing sizes an error."""
        settings = {ALIASES.get(key, key): value for key, value in settings.items()}
        if settings.get("id2label"):
            settings["id2label"] = {int(k): label for k, label in settings["id2label"].items()}
        labels = settings.get("num_labels", len(settings.get("id2label") or "ab"))
        if len(settings.get("id2label") or ()) != labels:
            settings["id2label"] = {i: f"LABEL_{i}" for i in range(labels)}
        missing = [f.name for f in fields(cls)
                   if f.name not in settings and f.default is f.default_factory is MISSING]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing")
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in settings.items() if key in known})

    @property
    def num_labels(self):
        return len(self.id2label)


@dataclass
class Output:
    """What a model returns; what does not concern it stays None. Shapes (B, T, …) or (B, …)."""
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None  # (B, T, V), or (B, num_labels) of a classifier
    start_logits: torch.Tensor | None = None  # (B, T)
    end_logits: torch.Tensor | None = None  # (B, T)
    last_hidden_state: torch.Tensor | None = None  # the decoder's, (B, T, E)
    encoder_last_hidden_state: torch.Tensor | None = None  # (B, S, E)


# ------------------------------------------------------------------------------------------------
# The layers


class Linear(nn.Linear):
    """nn.Linear, whose products on a CPU are oneDNN's where F.linear is slow."""
    packed_weight = None  # the weights as oneDNN orders them

    def forward(self, x):
        weight = self.packed_weight  # once: another thread may be done with it
        if weight is not None:
            return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")
        if not (ONEDNN and x.is_cpu and x.dtype == torch.float32
                and x.numel() >= 512 * self.in_features):
            return super().forward(x)
        # In float32 F.linear is MKL's, which on AMD's CPUs takes 1.2 to 1.4 times as long over many
        # rows as a convolution of width 1: the rows are the pixels of an image, channels last.
        image = x.reshape(1, 1, -1, self.in_features).permute(0, 3, 1, 2)
        y = F.conv2d(image, self.weight[..., None, None], self.bias)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


@contextmanager
def packed(*modules):
    """While this lasts, few rows are multiplied up to three times as fast on a CPU: F.linear brings
    the weights into the order that oneDNN needs for each product anew."""
    layers = [m for module in modules for m in module.modules() if isinstance(m, Linear)]
    try:
        with suppress(AttributeError, RuntimeError):  # a device, type or build without that order
            for layer in layers if not torch.is_autocast_enabled("cpu") else ():
                layer.packed_weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight)
        yield
    finally:
        for layer in layers:
            layer.packed_weight = None


class Attention(nn.Module):
    """Full multi-head attention, of a sequence to itself or to a document."""

    def __init__(self, embed_dim, num_heads, dropout):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.k_proj = Linear(embed_dim, embed_dim)
        self.v_proj = Linear(embed_dim, embed_dim)
        self.q_proj = Linear(embed_dim, embed_dim)
        self.out_proj = Linear(embed_dim, embed_dim)

    def split_heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, length, D)

    def keys_values(self, states):
        """The keys and values of `states` (B, length, E), each (B, H, length, D)."""
        return self.split_heads(self.k_proj(states)), self.split_heads(self.v_proj(states))

    def forward(self, hidden_states, key, value, mask=None, is_causal=False):
        """hidden_states (B, T, E) -> (B, T, E); mask (B, 1, 1 or T, length), True where seen."""
        context = dense_attention(
            self.split_heads(self.q_proj(hidden_states)), key, value, mask,
            self.dropout if self.training else 0.0, is_causal)
        return self.out_proj(context.transpose(1, 2).flatten(2))


class DenseSelfAttention(Attention):
    """Full self-attention in the place of LSGSelfAttention."""

    def forward(self, hidden_states, attention_mask):
        return super().forward(hidden_states, *self.keys_values(hidden_states),
                               attention_mask.bool()[:, None, None])


class FeedForward(nn.Module):
    """What the layers of both stacks have in common: dropouts and the feed-forward half."""

    def __init__(self, config, ffn_dim):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation_function]
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout
        self.fc1 = Linear(config.d_model, ffn_dim)
        self.fc2 = Linear(ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def drop(self, x):
        return F.dropout(x, self.dropout, self.training)

    def feed_forward(self, x):
        def piece(x):
            hidden = self.activation(self.fc1(self.final_layer_norm(x)))
            hidden = F.dropout(hidden, self.activation_dropout, self.training)
            return x + self.drop(self.fc2(hidden))

        # On a CPU piece by piece: what is four times as wide as the text then stays in the cache.
        return torch.cat([piece(p) for p in x.split(1024, dim=1)], dim=1) if x.is_cpu else piece(x)


class EncoderLayer(FeedForward):
    def __init__(self, config):
        super().__init__(config, config.encoder_ffn_dim)
        size = config.d_model, config.encoder_attention_heads
        self.self_attn = (
            LSGSelfAttention(*size, dropout=config.attention_dropout, linear=Linear, **{
                name: getattr(config, name) for name in (
                    "block_size", "sparse_block_size", "sparsity_factor", "sparsity_type",
                    "num_global_tokens", "lsh_num_pre_rounds", "adaptive")})
            if config.lsg else DenseSelfAttention(*size, config.attention_dropout))
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x, attention_mask):
        x = x + self.drop(self.self_attn(self.self_attn_layer_norm(x), attention_mask))
        return self.feed_forward(x)


class DecoderLayer(FeedForward):
    def __init__(self, config):
        super().__init__(config, config.decoder_ffn_dim)
        size = config.d_model, config.decoder_attention_heads, config.attention_dropout
        self.self_attn = Attention(*size)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = Attention(*size)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x, mask, document, document_mask, past=None):
        """x (B, T, E). Without a mask, attention is causal. `document` is the pair of the encoded
        document's keys and values, or None; `past` a function that files away the new keys and
        values and returns them with all those before."""
        normed = self.self_attn_layer_norm(x)
        key, value = self.self_attn.keys_values(normed)
        if past is not None:
            key, value = past(key, value)
        x = x + self.drop(self.self_attn(normed, key, value, mask, is_causal=mask is None))
        if document is not None:
            normed = self.encoder_attn_layer_norm(x)
            x = x + self.drop(self.encoder_attn(normed, *document, document_mask))
        return self.feed_forward(x)


# ------------------------------------------------------------------------------------------------
# The two stacks


class PositionalEmbedding(nn.Embedding):
    """Learned positions. mBART's table begins with two rows that no position uses."""
    OFFSET = 2

    def __init__(self, num_positions, embed_dim):
        super().__init__(num_positions + self.OFFSET, embed_dim)

    def forward(self, first, length):
        """The rows (length, E) of positions first, first + 1, …"""
        last = first + length + self.OFFSET
        if last > self.num_embeddings:
            raise ValueError(
                f"{first + length} tokens, but the model knows {self.num_embeddings - self.OFFSET} "
                "positions: cut the text, or load the model with a larger max_position_embeddings")
        return self.weight[first + self.OFFSET:last]


class Stack(nn.Module):
    """What encoder and decoder have in common."""

    def __init__(self, config, shared, layers, layerdrop):
        super().__init__()
        self.config, self.layerdrop = config, layerdrop
        self.embed_tokens = shared
        self.embed_positions = PositionalEmbedding(config.max_position_embeddings, config.d_model)
        self.embed_scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.layernorm_embedding = nn.LayerNorm(config.d_model)
        self.layers = nn.ModuleList(layers)
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.gradient_checkpointing = False  # True: training keeps only what enters each layer

    def normalize(self, x):
        return F.dropout(self.layernorm_embedding(x), self.config.dropout, self.training)

    def run(self, layer, *args):
        if self.training and self.layerdrop and torch.rand(()) < self.layerdrop:
            return args[0]
        if self.training and self.gradient_checkpointing:
            return checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)


class Encoder(Stack):
    def __init__(self, config, shared):
        layers = [EncoderLayer(config) for _ in range(config.encoder_layers)]
        super().__init__(config, shared, layers, config.encoder_layerdrop)
        if config.lsg:
            self.global_embeddings = nn.Embedding(NUM_GLOBAL_EMBEDDINGS, config.d_model)

    def forward(self, input_ids, attention_mask=None):
        """input_ids (B, length), attention_mask (B, length), nonzero where not padding.

        Returns the states (B, S, E) and the mask (B, S) that the decoder is to attend with. The
        globals come first, if they are passed on.
        """
        config = self.config
        mask = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
        x = self.embed_tokens(input_ids) * self.embed_scale  # (B, length, E)
        x = x + self.embed_positions(0, input_ids.shape[1])
        if config.lsg:
            G = config.num_global_tokens
            if config.mask_first_token:
                mask = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, 1:]], dim=1)
            x = torch.cat([self.global_embeddings.weight[:G].expand(len(x), -1, -1), x], dim=1)
            mask = F.pad(mask, (G, 0), value=True)

        x = self.normalize(x)
        for layer in self.layers:
            x = self.run(layer, x, mask)
        x = self.layer_norm(x)

        if config.lsg and not config.pass_global_tokens_to_decoder:
            # mask_first_token leaves nothing of <s>, so that the global takes its place regardless
            first = 0 if config.pool_with_global or config.mask_first_token else G
            x = torch.cat([x[:, first:first + 1], x[:, G + 1:]], dim=1)
            mask = mask[:, G:]
        return x, mask


class Decoder(Stack):
    def __init__(self, config, shared):
        layers = [DecoderLayer(config) for _ in range(config.decoder_layers)]
        super().__init__(config, shared, layers, config.decoder_layerdrop)

    def read(self, states):
        """The cross-attention's keys and values of an encoded document, for each layer."""
        return [tuple(x.contiguous() for x in layer.encoder_attn.keys_values(states))
                for layer in self.layers]

    def forward(self, input_ids, document=None, document_mask=None, mask=None, past=None):
        """input_ids (B, T), document from `read`, document_mask (B, S) -> states (B, T, E).

        mask (B, 1, T, keys) replaces the causal one. With `past`, the T tokens are the beams of one
        step, which all have the same position.
        """
        x = self.embed_tokens(input_ids) * self.embed_scale  # (B, T, E)
        x = x + (self.embed_positions(past.step, 1) if past else
                 self.embed_positions(0, input_ids.shape[1]))
        x = self.normalize(x)
        if document_mask is not None:
            document_mask = document_mask[:, None, None]  # (B, 1, 1, S)
        for i, layer in enumerate(self.layers):
            inputs = x, mask, document and document[i], document_mask
            x = layer(*inputs, partial(past.append, i)) if past else self.run(layer, *inputs)
        return self.layer_norm(x)


def shift_right(ids, pad_token_id):
    """mBART's decoder input for a target: its last token, </s>, wraps round to the front.

    ids (B, T), -100 or pad_token_id behind the end: [5 6 2 1] -> [2 5 6 2]
    """
    ids = ids.masked_fill(ids == -100, pad_token_id)
    last = ((ids != pad_token_id).sum(1, keepdim=True) - 1).clamp(min=0)
    return torch.cat([ids.gather(1, last), ids[:, :-1]], dim=1)


class BarthezModel(nn.Module):
    """Encoder and decoder without a head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        self.encoder = Encoder(config, self.shared)
        self.decoder = Decoder(config, self.shared)

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None):
        """All (B, length); without decoder_input_ids the input is reconstructed."""
        if decoder_input_ids is None:
            decoder_input_ids = shift_right(input_ids, self.config.pad_token_id)
        states, mask = self.encoder(input_ids, attention_mask)
        hidden = self.decoder(decoder_input_ids, self.decoder.read(states), mask)
        return Output(last_hidden_state=hidden, encoder_last_hidden_state=states)


def init_weights(model, std):
    """Draw fresh weights as mBART does: normal with deviation `std`, biases 0."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for module in model.modules():  # last, since a head may share the embedding's matrix
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight.data[module.padding_idx])


# ------------------------------------------------------------------------------------------------
# The heads


class BarthezForSequenceClassification(nn.Module):
    """A label for a text: the decoder reads the text once more; its last </s> decides."""

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
            raise ValueError("a text without </s> cannot be classified: let it end in "
                             f"eos_token_id={self.config.eos_token_id}")
        last = is_eos.cumsum(1).argmax(1)  # the first place where the count is full
        x = out.last_hidden_state[torch.arange(len(last)), last]  # (B, E)
        for layer in self.classification_head.values():
            x = layer(F.dropout(x, self.config.classifier_dropout, self.training))
            if layer is self.classification_head["dense"]:
                x = torch.tanh(x)
        out.logits = x
        if labels is not None:
            out.loss = self.loss(out.logits, labels)
        return out

    def loss(self, logits, labels):
        single = labels.dtype in (torch.int64, torch.int32)
        problem = self.config.problem_type or (
            "regression" if self.config.num_labels == 1 else
            "single_label_classification" if single else "multi_label_classification")
        if problem == "regression":
            return F.mse_loss(logits.squeeze(), labels.squeeze())
        if problem == "single_label_classification":
            return F.cross_entropy(logits, labels.flatten())
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
            T = out.start_logits.shape[1]  # answers that were cut off with the text do not count
            out.loss = sum(F.cross_entropy(logits, place.flatten().clamp(0, T), ignore_index=T) / 2
                           for logits, place in ((out.start_logits, start_positions),
                                                 (out.end_logits, end_positions)))
        return out


class BarthezForCausalLM(nn.Module):
    """The decoder alone, as a language model. labels are not shifted, as in the original."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        shared = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        self.model = nn.ModuleDict({"decoder": Decoder(config, shared)})
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = shared.weight

    def forward(self, input_ids, attention_mask=None, labels=None):
        """All (B, T) -> logits (B, T, V)."""
        mask = None
        if attention_mask is not None:
            T = input_ids.shape[1]
            causal = torch.ones(T, T, dtype=torch.bool, device=input_ids.device).tril()
            mask = causal & attention_mask.bool()[:, None, None]  # (B, 1, T, T)
        hidden = self.model["decoder"](input_ids, mask=mask)
        logits = self.lm_head(hidden)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(loss=loss, logits=logits, last_hidden_state=hidden)


class BarthezForConditionalGeneration(nn.Module):
    """The model that writes: summaries, titles, the words behind a <mask>."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = BarthezModel(config)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.shared.weight

    def logits(self, hidden):
        return self.lm_head(hidden) + self.final_logits_bias

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, labels=None):
        """All (B, length) -> logits (B, T, V); labels of -100 do not count in the loss."""
        if labels is not None and decoder_input_ids is None:
            decoder_input_ids = shift_right(labels, self.config.pad_token_id)
        out = self.model(input_ids, attention_mask, decoder_input_ids)
        out.logits = self.logits(out.last_hidden_state)
        if labels is not None:
            out.loss = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
        return out

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, *, progress=None, **settings):
        """Write texts for each document, by beam search; one beam is greedy search.

        input_ids, attention_mask (B, length). `settings` are GENERATION_SETTINGS, and default to
        the checkpoint's config. `progress(tokens written, max_length)` is called before each step.
        Returns ids (B * num_return_sequences, L), a document's best text first, each with the start
        token first and padded with pad_token_id behind </s>.
        Follows transformers 4.36.2, generation/utils.py and beam_search.py, to the token.
        """
        unknown = settings.keys() - GENERATION_SETTINGS
        if unknown:
            raise ValueError(f"generate has no setting {', '.join(sorted(unknown))}")
        config = replace(self.config, **settings)
        max_length = config.max_length or 20
        positions = config.max_position_embeddings
        if max_length - 1 > positions:  # the last token that is written is not read again
            raise ValueError(f"{max_length=}, but the decoder knows {positions} positions")
        if attention_mask is None:
            attention_mask = input_ids != config.pad_token_id
        states, document_mask = self.model.encoder(input_ids, attention_mask)

        B, beams = len(input_ids), config.num_beams
        past = Past(config, B, max_length, states)
        start = config.decoder_start_token_id
        tokens = input_ids.new_full(
            (B, beams, 1), config.bos_token_id if start is None else start)  # (B, beams, L)
        # All beams begin alike: only the first may be extended, lest they stay alike.
        scores = states.new_full((B, beams), -1e9, dtype=torch.float32)
        scores[:, 0] = 0
        hypotheses = [Hypotheses(config, max_length) for _ in range(B)]

        with packed(self.model.decoder, self.lm_head):
            document = self.model.decoder.read(states)
            while tokens.shape[2] < max_length and not all(h.done for h in hypotheses):
                if progress:
                    progress(tokens.shape[2], max_length)
                hidden = self.model.decoder(tokens[:, :, -1], document, document_mask,
                                            mask=past.open_step(), past=past)  # (B, beams, E)
                log_probs = self.logits(hidden).float().log_softmax(-1)  # (B, beams, V)
                log_probs = constrain(log_probs, tokens, config, max_length) + scores[..., None]
                # Twice as many as needed: were every beam's best an </s>, enough would be left.
                best, index = log_probs.flatten(1).topk(2 * beams)  # (B, 2 * beams)
                beam, token = index // log_probs.shape[2], index % log_probs.shape[2]
                keep = torch.tensor([h.update(*candidates) for h, *candidates in zip(
                    hypotheses, tokens, best.tolist(), beam.tolist(), token.tolist())],
                    device=best.device)  # (B, beams): which candidates become the beams
                scores, beam, token = (x.gather(1, keep) for x in (best, beam, token))
                past.reorder(beam)
                tokens = torch.cat([tokens.gather(1, beam[..., None].expand_as(tokens)),
                                    token[..., None]], dim=2)

        texts = [text for h, *beams in zip(hypotheses, tokens, scores.tolist())
                 for text in h.best(*beams)]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=config.pad_token_id)
        return ids[:, :max_length]


# ------------------------------------------------------------------------------------------------
# Generation


class Past:
    """The keys and values of the tokens written so far.

    The beams of a document are to the decoder what the tokens of a sequence are: one row of
    queries, whose mask tells which keys are whose. Keys are written once and never moved: when
    beams split or die, only `ancestors` (B, beams, slots) changes, which says which slots hold
    a beam's own tokens.
    """

    def __init__(self, config, batch_size, max_length, like):
        self.beams, self.step = config.num_beams, -1
        heads, slots = config.decoder_attention_heads, max_length * config.num_beams
        self.layers = [like.new_empty(2, batch_size, heads, slots, config.d_model // heads)
                       for _ in range(config.decoder_layers)]  # keys, values
        self.own = torch.eye(self.beams, dtype=torch.bool, device=like.device).expand(
            batch_size, -1, -1)
        self.ancestors = self.own[..., :0]

    def open_step(self):
        """Give each beam a slot for its newest token; returns the mask (B, 1, beams, slots)."""
        self.step += 1
        self.ancestors = torch.cat([self.ancestors, self.own], dim=-1)
        return self.ancestors[:, None]

    def append(self, layer, *key_value):
        """Store a layer's key and value (B, H, beams, D) of this step; returns all until now."""
        end = self.ancestors.shape[-1]
        for store, new in zip(self.layers[layer], key_value):
            store[:, :, end - self.beams:end] = new
        return self.layers[layer][:, :, :, :end].unbind(0)

    def reorder(self, beam):
        """Beam i goes on from what was beam[i]; beam (B, beams)."""
        self.ancestors = self.ancestors.gather(1, beam[..., None].expand_as(self.ancestors))


def constrain(log_probs, tokens, config, max_length):
    """Forbid what may not come next: log_probs (B, beams, V) after tokens (B, beams, L)."""
    n, L = config.no_repeat_ngram_size, tokens.shape[2]
    if 0 < n <= L:
        grams = tokens.unfold(2, n, 1)  # (B, beams, L - n + 1, n)
        repeated = (grams[..., :-1] == tokens[:, :, None, L - n + 1:]).all(-1)
        batch, beam, place = repeated.nonzero(as_tuple=True)
        log_probs[batch, beam, grams[batch, beam, place, -1]] = -math.inf
    if L < config.min_length:
        log_probs[..., config.eos_token_id] = -math.inf
    if L == max_length - 1 and config.forced_eos_token_id is not None:
        log_probs = torch.full_like(log_probs, -math.inf)
        log_probs[..., config.forced_eos_token_id] = 0
    return log_probs


class Hypotheses:
    """The finished texts of one document, of which the num_beams best are kept."""

    def __init__(self, config, max_length):
        self.config, self.max_length = config, max_length
        self.kept, self.done = [], False  # kept: (score, ids), in the order of arrival

    def add(self, ids, log_prob, length):
        """`length` counts the written tokens, </s> included and the start token left out."""
        score = log_prob / length ** self.config.length_penalty
        if len(self.kept) == self.config.num_beams:
            worst = min(range(len(self.kept)), key=lambda i: self.kept[i][0])
            if score <= self.kept[worst][0]:
                return
            del self.kept[worst]
        self.kept.append((score, ids))

    def update(self, tokens, log_probs, beams, next_tokens):
        """Sort one step's candidates, best first: finish those that end, return which go on.

        tokens (beams, L); the others are lists of 2 * num_beams.
        """
        L, going_on = tokens.shape[1], []
        for rank, (log_prob, beam, token) in enumerate(zip(log_probs, beams, next_tokens)):
            if token != self.config.eos_token_id:
                going_on.append(rank)
            elif rank < self.config.num_beams and not self.done:
                end = tokens.new_tensor([token])
                self.add(torch.cat([tokens[beam], end]), log_prob, length=L)
        self.done = self.done or self.is_done(log_probs[0], L)
        return going_on[:self.config.num_beams]

    def is_done(self, best_log_prob, length):
        """Can no open beam become better than the worst that is kept?"""
        if len(self.kept) < self.config.num_beams:
            return False
        if self.config.num_beams == 1 or self.config.early_stopping not in (False, "never"):
            return True
        if self.config.early_stopping == "never" and self.config.length_penalty > 0:
            length = self.max_length - 1  # a longer text could still do better
        worst = min(score for score, _ in self.kept)
        return worst >= best_log_prob / length ** self.config.length_penalty

    def best(self, tokens, scores):
        """The num_return_sequences best texts, the best one first.

        The open beams (tokens (beams, L), scores) are included unless done.
        """
        if not self.done:
            for ids, log_prob in zip(tokens, scores):
                self.add(ids, log_prob, length=len(ids) - 1)
        best = sorted(self.kept, key=lambda kept: kept[0])[::-1]  # of equals, the later first
        return [ids for _, ids in best[:self.config.num_return_sequences]]


# ------------------------------------------------------------------------------------------------
# The command line

DEFAULT_MODELS = {"summarize": "moussaKam/barthez-orangesum-abstract",
                  "fill_mask": "moussaKam/barthez",
                  "classify": "moussaKam/barthez-sentiment-classification"}


def read_text(name):
    """The text of a file, or of standard input for -."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else open(name, "rb").read()
    except OSError as error:
        raise OSError(f"{name} cannot be read: {error.strerror}") from None
    if b"\0" in data:
        raise ValueError(f"{name} is not a text file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 (byte {error.start}): convert it, for example with "
                         f"iconv -f latin1 -t utf-8") from None
    if not text.strip():
        raise ValueError(f"{name} is empty")
    return text


def load(arguments, task):
    """The model and tokenizer that the command line asks for."""
    from load_weights import load_model
    overrides = {f.name: value for f in fields(BarthezConfig)
                 if (value := getattr(arguments, f.name, None)) is not None}
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    options = dict(revision=arguments.revision, lsg=not arguments.dense, device=device,
                   dtype=getattr(torch, arguments.dtype))
    source = arguments.model or DEFAULT_MODELS[task]
    try:
        model, tokenizer = load_model(source, **options, **overrides)
    except OSError as error:
        if arguments.model or task != "summarize":
            raise
        print(f"{source} is neither cached nor reachable ({error}). The bundled model stands in; "
              "it knows descriptions of software and manual pages, and little else.",
              file=sys.stderr)
        source = "tiny"
        model, tokenizer = load_model(source, **options, **overrides)
    if (arguments.max_source_length or 0) > tokenizer.model_max_length:
        overrides["max_position_embeddings"] = arguments.max_source_length
        model, tokenizer = load_model(source, **options, **overrides)
    return model, tokenizer


def summarize(model, tokenizer, name, text, max_source_length=None):
    """The summary of a text; `name` is what a notice calls it."""
    whole = tokenizer.encode(text)
    ids = tokenizer.encode(text, max_length=max_source_length or tokenizer.model_max_length)
    if len(ids) < len(whole):
        print(f"{name}: {len(whole):,} tokens, of which the first {len(ids):,} are read; "
              f"--max-source-length {len(whole)} reads all", file=sys.stderr)

    def progress(step, steps):
        print(f"\r{name}: {len(ids):,} tokens read, {step} of up to {steps} written", end="",
              file=sys.stderr, flush=True)

    out = model.generate(torch.tensor([ids], device=model.lm_head.weight.device),
                         max_length=model.config.max_length or 128,
                         progress=progress if sys.stderr.isatty() else None)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return tokenizer.decode(out[0])


def main(arguments):
    task = next(task for task in DEFAULT_MODELS if getattr(arguments, task) is not None)
    if task == "summarize":
        texts = [(name, read_text(name)) for name in arguments.summarize]
        model, tokenizer = load(arguments, task)
        for name, text in texts:
            print(summarize(model, tokenizer, name, text, arguments.max_source_length), flush=True)
        return

    model, tokenizer = load(arguments, task)
    batch = tokenizer(getattr(arguments, task), truncation=True)
    batch = {name: tensor.to(model.model.shared.weight.device) for name, tensor in batch.items()}
    with torch.inference_mode():
        logits = model(**batch).logits
    if task == "classify":
        probability, label = logits[0].softmax(-1).max(-1)
        print(f"{model.config.id2label[label.item()]} {probability:.3f}")
        return
    masks = (batch["input_ids"][0] == tokenizer.mask_token_id).nonzero()
    if not len(masks):
        raise ValueError("--fill-mask needs a <mask> in its text")
    for place in masks[:, 0]:
        for probability, id in zip(*logits[0, place].softmax(-1).topk(5)):
            print(f"{probability:.3f} {tokenizer.decode([id])}")


if __name__ == "__main__":
    try:
        main(arguments)
    except (ValueError, OSError) as error:
        print(f"barthez.py: {error}", file=sys.stderr)
        sys.exit(2)
