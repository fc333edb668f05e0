"""The model: its configuration, its parameters, and each of its parts against the formula.

Letters used for shapes:
    B batch    H heads    D head dimension    E d_model
    T tokens of the sequence that attends     S tokens of the encoded document, globals included
"""

import functools
import math

import pytest
import torch

import barthez
from barthez import (BarthezConfig, BarthezForConditionalGeneration, BarthezForQuestionAnswering,
                     BarthezForSequenceClassification, SkipInit, config_from, shift_right)
from beam_search import GenerationConfig
from conftest import assert_close
from load_weights import GLOBALS

SIZES = dict(vocab_size=19, d_model=12, encoder_layers=2, decoder_layers=3,
             encoder_attention_heads=3, decoder_attention_heads=2, encoder_ffn_dim=10,
             decoder_ffn_dim=14, max_position_embeddings=60, block_size=4, sparse_block_size=4,
             dropout=0.0, init_std=0.4)
SELECTIONS = "norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling", "none"
BARTHEZ = dict(vocab_size=50002, d_model=768, encoder_layers=6, decoder_layers=6,
               encoder_attention_heads=12, decoder_attention_heads=12, encoder_ffn_dim=3072,
               decoder_ffn_dim=3072)


def model_of(kind=BarthezForConditionalGeneration, **changes):
    torch.default_generator.manual_seed(1)
    model = kind(BarthezConfig(**SIZES | changes)).eval()
    for name, tensor in model.state_dict().items():  # biases that are not 0, norms that are not 1
        if name.endswith("bias") or "norm" in name:
            tensor += 0.3 * torch.randn(tensor.shape)
    return model


def text_of(length, seed=5):
    ids = torch.randint(4, 19, (1, length), generator=torch.Generator().manual_seed(seed))
    ids[0, 0], ids[0, -1] = 0, 2
    return ids


def padded(*lengths):
    """Texts of these lengths in one batch, and their mask."""
    ids = torch.full((len(lengths), max(lengths)), 1)
    for row, length in enumerate(lengths):
        ids[row, :length] = text_of(length, seed=row)
    return ids, ids != 1


def decode(model, ids, mask=None):
    """The decoder's states for ids (B, T), after a document of one token."""
    states, visible = model.model.encoder(torch.full((len(ids), 1), 5))
    return model.model.decoder(ids, model.model.decoder.cross_kv(states), visible, mask)


def largest_difference(a, b):
    return (a - b).abs().max().item()


# ------------------------------------------------------------------------------------------------
# Configuration


def test_each_config_takes_its_own_keys_of_config_json():
    settings = SIZES | {"num_beams": 3, "transformers_version": "4.36.2"}
    assert config_from(BarthezConfig, settings) == BarthezConfig(**SIZES)
    assert config_from(GenerationConfig, settings) == GenerationConfig(num_beams=3)


@pytest.mark.parametrize("settings, labels", [
    ({}, {0: "LABEL_0", 1: "LABEL_1"}), ({"num_labels": 1}, {0: "LABEL_0"}),
    ({"id2label": {"0": "a", "1": "b", "2": "c"}, "num_labels": 3}, {0: "a", 1: "b", 2: "c"}),
    ({"id2label": {"0": "a", "1": "b"}, "num_labels": 3},
     {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}),
    ({"id2label": None}, {0: "LABEL_0", 1: "LABEL_1"})])
def test_num_labels_wins_over_id2label(settings, labels):
    config = config_from(BarthezConfig, SIZES | settings)
    assert config.id2label == labels


@pytest.mark.parametrize("name, value", [
    ("num_global_tokens", 0), ("num_global_tokens", 513), ("activation_function", "geglu"),
    ("encoder_attention_heads", 5), ("decoder_attention_heads", 0), ("sparsity_type", "random"),
    ("sparsity_factor", 3), ("d_model", "12"), ("encoder_layers", True), ("adaptive", "yes")])
def test_an_impossible_value_is_an_error_that_names_it(name, value):
    with pytest.raises(ValueError) as error:
        BarthezConfig(**SIZES | {name: value})
    assert str(value) in str(error.value)
    if not name.endswith("_heads"):
        assert name in str(error.value)


def test_null_in_config_json_is_the_default():
    names = "dropout", "id2label", "block_size", "sparsity_type", "num_beams", "max_length"
    settings = SIZES | dict.fromkeys(names)
    config, generation = (config_from(kind, settings) for kind in (BarthezConfig, GenerationConfig))
    assert (config.dropout, len(config.id2label), config.block_size) == (0.1, 2, 128)
    assert generation.num_beams == 1
    assert config.sparsity_type is None and generation.max_length is None  # values of their own


# ------------------------------------------------------------------------------------------------
# Parameters


def test_barthez_has_139_221_504_parameters():
    with torch.device("meta"), SkipInit():
        model = BarthezForConditionalGeneration(BarthezConfig(**BARTHEZ, lsg=False))
    assert sum(parameter.numel() for parameter in model.parameters()) == 139_221_504


def test_embeddings_are_tied_and_can_be_untied():
    tied, free = model_of(), model_of(tie_word_embeddings=False)
    for model in tied, free:
        shared = model.model.shared.weight
        assert model.model.encoder.embed_tokens.weight is shared
        assert model.model.decoder.embed_tokens.weight is shared
        assert (model.lm_head.weight is shared) == (model is tied)


# ------------------------------------------------------------------------------------------------
# The whole model as a formula, with full attention


def oracle(model, ids, mask, decoder_ids):
    """Encoder states and logits of one text: ids and mask (T,), decoder_ids. Uses no module."""
    p, config = dict(model.state_dict()), model.config

    def linear(x, name):
        return x @ p[name + ".weight"].T + p[name + ".bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * p[name + ".weight"] + p[name + ".bias"]

    def attend(x, source, name, num_heads, visible):
        queries = linear(x, f"{name}.q_proj").chunk(num_heads, dim=1)
        keys = linear(source, f"{name}.k_proj").chunk(num_heads, dim=1)
        values = linear(source, f"{name}.v_proj").chunk(num_heads, dim=1)
        contexts = []
        for query, key, value in zip(queries, keys, values):
            scores = query @ key.T / math.sqrt(config.d_model // num_heads)
            contexts.append(scores.masked_fill(~visible, -math.inf).softmax(-1) @ value)
        return linear(torch.cat(contexts, dim=1), f"{name}.out_proj")

    def layer(x, name, num_heads, visible, document=None, document_visible=None):
        normed = norm(x, f"{name}.self_attn_layer_norm")
        x = x + attend(normed, normed, f"{name}.self_attn", num_heads, visible)
        if document is not None:
            normed = norm(x, f"{name}.encoder_attn_layer_norm")
            context = attend(normed, document, f"{name}.encoder_attn", num_heads, document_visible)
            x = x + context
        hidden = linear(norm(x, f"{name}.final_layer_norm"), f"{name}.fc1")
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2  # gelu
        return x + linear(hidden, f"{name}.fc2")

    def embed(ids, stack):
        scale = math.sqrt(config.d_model) if config.scale_embedding else 1
        return (p["model.shared.weight"][ids] * scale
                + p[f"model.{stack}.embed_positions.weight"][2:2 + len(ids)])

    x, visible = embed(ids, "encoder"), mask.bool()
    if config.lsg:
        G = config.num_global_tokens
        x = torch.cat([p[GLOBALS][:G], x])
        visible = torch.cat([torch.ones(G).bool(), visible])
    x = norm(x, "model.encoder.layernorm_embedding")
    for i in range(config.encoder_layers):
        x = layer(x, f"model.encoder.layers.{i}", config.encoder_attention_heads, visible)
    states = norm(x, "model.encoder.layer_norm")

    x = norm(embed(decoder_ids, "decoder"), "model.decoder.layernorm_embedding")
    for i in range(config.decoder_layers):
        x = layer(x, f"model.decoder.layers.{i}", config.decoder_attention_heads,
                  torch.ones(len(x), len(x)).tril().bool(), states, visible)
    x = norm(x, "model.decoder.layer_norm")
    return states, x @ p["lm_head.weight"].T + p["final_logits_bias"]


@pytest.mark.parametrize("changes, length", [
    ({"lsg": False}, 23), ({"lsg": False, "scale_embedding": True}, 23),
    ({"num_global_tokens": 1}, 8), ({"num_global_tokens": 5}, 7),  # up to two blocks: full
    ({"num_global_tokens": 3, "scale_embedding": True}, 6),
    ({"num_global_tokens": 2, "tie_word_embeddings": False}, 8)])
@torch.no_grad()
def test_the_model_equals_its_formula(changes, length):
    model = model_of(**changes)
    ids, mask = text_of(length), torch.ones(length).long()
    mask[-3:] = 0
    decoder_ids = text_of(6, seed=9)
    out = model(ids, mask[None], decoder_input_ids=decoder_ids)
    states, logits = oracle(model, ids[0], mask, decoder_ids[0])
    assert_close(out.encoder_last_hidden_state[0], states)
    assert_close(out.logits[0], logits)


@pytest.mark.parametrize("name", barthez.ACTIVATIONS)
def test_activations_are_their_formulas(name):
    x = torch.tensor([-2.0, -0.5, 0.0, 1.5])
    logistic = 1 / (1 + (-x).exp())
    tanh_gelu = x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)).tanh())
    expected = {"gelu": x * (1 + torch.erf(x / math.sqrt(2))) / 2, "relu": x.clamp(min=0),
                "silu": x * logistic, "swish": x * logistic, "tanh": x.tanh(),
                "gelu_new": tanh_gelu}[name]
    assert_close(barthez.ACTIVATIONS[name](x), expected, 1e-6)
    layer = model_of(activation_function=name).model.encoder.layers[0]
    assert layer.activation is barthez.ACTIVATIONS[name]


@torch.no_grad()
def test_lsg_equals_the_formula_if_the_window_covers_the_text():
    ids, target = text_of(29), text_of(6, seed=9)
    wide, narrow = (model_of(block_size=size, sparse_block_size=size) for size in (32, 4))
    expected, _ = oracle(wide, ids[0], torch.ones(29), target[0])
    assert_close(wide.model.encoder(ids)[0][0], expected)
    assert largest_difference(narrow.model.encoder(ids)[0][0], expected) > 1e-2


# ------------------------------------------------------------------------------------------------
# Padding


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("kind", SELECTIONS)
@torch.no_grad()
def test_a_padded_row_equals_the_row_alone(kind, cut):
    model = model_of(sparsity_type=kind, num_global_tokens=3,
                     pass_global_tokens_to_decoder=not cut)
    lengths, target = (37, 22, 5), text_of(6, seed=9)
    ids, mask = padded(*lengths)
    torch.manual_seed(4)  # lsh draws the same directions for a batch as for a single text
    out = model(ids, mask, decoder_input_ids=target.expand(3, -1))
    for row, length in enumerate(lengths):
        torch.manual_seed(4)
        alone = model(ids[row:row + 1, :length], decoder_input_ids=target)
        states = alone.encoder_last_hidden_state[0]
        assert_close(out.encoder_last_hidden_state[row, :len(states)], states)
        assert_close(out.logits[row], alone.logits[0])


@pytest.mark.parametrize("hidden", [-math.inf, -10_000])  # in a float and in an integer mask
@pytest.mark.parametrize("changes", [{}, {"lsg": False}])
def test_a_mask_that_is_added_to_scores_is_refused(changes, hidden):
    model, (ids, mask) = model_of(**changes), padded(21, 13)
    with pytest.raises(ValueError, match="attention_mask must be True or 1"):
        model(ids, torch.where(mask, 0, hidden))
    with pytest.raises(ValueError, match="attention_mask must be True or 1"):
        decode(model, ids, torch.where(mask, 0, hidden))


# ------------------------------------------------------------------------------------------------
# The first token and the globals


@pytest.mark.parametrize("length", [7, 30])  # full attention, and blocks
@pytest.mark.parametrize("passed", [True, False])
@torch.no_grad()
def test_a_masked_first_token_is_never_seen(length, passed):
    options = dict(mask_first_token=True, num_global_tokens=2, pass_global_tokens_to_decoder=passed)
    model, target = model_of(**options), text_of(6, seed=9)
    ids = text_of(length)
    other = ids.clone()
    other[0, 0] = 11
    a, b = (model(x, decoder_input_ids=target) for x in (ids, other))
    if passed:
        assert_close(a.logits, b.logits)
        keep = [i for i in range(length + 2) if i != 2]
        assert_close(a.encoder_last_hidden_state[:, keep], b.encoder_last_hidden_state[:, keep])
    else:  # the first global token replaces it, and is masked in the decoder as well
        assert_close(a.encoder_last_hidden_state, b.encoder_last_hidden_state)
        assert_close(a.logits, b.logits)
    model = model_of(**options | {"mask_first_token": False})
    a, b = (model(x, decoder_input_ids=target) for x in (ids, other))
    difference = largest_difference(a.encoder_last_hidden_state, b.encoder_last_hidden_state)
    assert difference > 1e-3, "without the option, it is seen"


@pytest.mark.parametrize("passed", [True, False])
@torch.no_grad()
def test_the_decoder_does_not_see_a_masked_first_token(passed):
    model = model_of(mask_first_token=True, num_global_tokens=2,
                     pass_global_tokens_to_decoder=passed)
    states, mask = model.model.encoder(text_of(9))
    assert mask.tolist() == [[True] * 2 * passed + [False] + [True] * 8]
    assert states.shape == (1, 9 + 2 * passed, 12)


@pytest.mark.parametrize("length", [7, 30])
@torch.no_grad()
def test_global_tokens_are_passed_pooled_or_dropped(length):
    ids, G = text_of(length), 3
    options = dict(num_global_tokens=G)
    passed, mask = model_of(**options).model.encoder(ids)
    assert passed.shape[1] == mask.shape[1] == G + length and mask.all()
    for pool in True, False:
        states, mask = model_of(**options, pass_global_tokens_to_decoder=False,
                                pool_with_global=pool).model.encoder(ids)
        assert mask.shape == (1, length) and mask.all()
        assert_close(states[:, 1:], passed[:, G + 1:])
        assert_close(states[:, 0], passed[:, 0 if pool else G])


# ------------------------------------------------------------------------------------------------
# Losses and decoder inputs


def test_shift_right_moves_the_last_token_to_the_front():
    assert shift_right(torch.tensor([[5, 6, 2, 1], [5, 6, 7, 2], [8, 2, -100, -100]]), 1).tolist() \
        == [[2, 5, 6, 2], [2, 5, 6, 7], [2, 8, 2, 1]]


@torch.no_grad()
def test_the_loss_is_the_mean_over_the_labels_that_count():
    model, ids = model_of(), text_of(20).expand(2, -1)
    labels = torch.tensor([[7, 9, 4, 2], [8, 2, -100, -100]])
    out = model(ids, labels=labels)
    assert_close(out.logits, model(ids, decoder_input_ids=shift_right(labels, 1)).logits)
    logs = out.logits.log_softmax(-1)
    losses = [-logs[row, i, labels[row, i]] for row in range(2) for i in range(4)
              if labels[row, i] != -100]
    assert len(losses) == 6
    assert_close(out.loss, sum(losses) / 6)


@torch.no_grad()
def test_classification_reads_the_state_of_the_last_end():
    model = model_of(BarthezForSequenceClassification, id2label={0: "a", 1: "b", 2: "c"})
    ids = torch.tensor([[0, 5, 2, 2, 7, 9, 2, 1, 1], [0, 8, 6, 4, 5, 7, 9, 9, 2]])
    out = model(ids, ids != 1)
    dense, out_proj = model.classification_head.values()
    for row, place in ((0, 6), (1, 8)):
        expected = out_proj(dense(out.last_hidden_state[row, place]).tanh())
        assert_close(out.logits[row], expected)


def test_a_text_without_end_cannot_be_classified():
    with pytest.raises(ValueError, match="</s>"):
        model_of(BarthezForSequenceClassification)(torch.tensor([[0, 5, 2], [0, 5, 6]]))


def test_labels_of_a_classifier_are_whole_numbers():
    model, ids = model_of(BarthezForSequenceClassification), text_of(9)
    loss = model(ids, labels=torch.tensor([1])).loss
    assert_close(loss, -model(ids).logits.log_softmax(-1)[0, 1])
    for labels in torch.tensor([1.0]), torch.tensor([[0.0, 1.0]]):
        with pytest.raises((ValueError, RuntimeError)):
            model(ids, labels=labels)


@torch.no_grad()
def test_the_decoder_does_not_see_ahead():
    model, ids = model_of(), text_of(20)
    other = ids.clone()
    other[0, 12] = 4 + (ids[0, 12] - 3) % 15
    a, b = decode(model, ids), decode(model, other)
    assert_close(a[:, :12], b[:, :12])
    assert largest_difference(a[:, 12:], b[:, 12:]) > 1e-3
    mask = torch.ones_like(ids)
    assert_close(decode(model, ids, mask), a)
    mask[0, 12] = 0
    a, b = decode(model, ids, mask), decode(model, other, mask)
    assert_close(a[:, 13:], b[:, 13:])


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_text_beyond_the_positions_is_an_error_that_names_the_remedy(stack):
    model = model_of()
    read = model.model.encoder if stack == "encoder" else functools.partial(decode, model)
    read(text_of(60))
    with pytest.raises(ValueError, match="61 tokens.*60 positions.*max_position_embeddings"):
        read(text_of(61))


# ------------------------------------------------------------------------------------------------
# Training


def trained(**changes):
    return model_of(**changes).train()


@pytest.mark.parametrize("length", [7, 30])
@torch.no_grad()
def test_dropout_is_applied_to_embeddings_and_sublayers(length):
    """If all is dropped, the residual stream is 0 and the final norm returns its bias."""
    model, ids = trained(dropout=1.0), text_of(length)
    states, _ = model.model.encoder(ids)
    assert_close(states, model.model.encoder.layer_norm.bias.expand_as(states))
    hidden = model(ids, decoder_input_ids=text_of(6)).last_hidden_state
    assert_close(hidden, model.model.decoder.layer_norm.bias.expand_as(hidden))


@pytest.mark.parametrize("length", [7, 30])
@pytest.mark.parametrize("name, next_layer", [
    ("attention_dropout", "out_proj.weight"), ("activation_dropout", "fc2.weight")])
@torch.no_grad()
def test_dropout_inside_a_sublayer_is_applied_in_both_stacks(name, next_layer, length):
    """If all is dropped, the next layer returns its bias."""
    model, ids, target = trained(**{name: 1.0}), text_of(length), text_of(6)
    actual = model(ids, decoder_input_ids=target)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(next_layer):
            parameter.zero_()
    expected = model.eval()(ids, decoder_input_ids=target)
    assert_close(actual.encoder_last_hidden_state, expected.encoder_last_hidden_state)
    assert_close(actual.logits, expected.logits)


@torch.no_grad()
def test_classifier_dropout_is_applied_before_both_layers():
    model, ids = trained(kind=BarthezForSequenceClassification, classifier_dropout=0.5), text_of(9)
    inputs = []
    for layer in model.classification_head.values():
        layer.register_forward_hook(lambda layer, given, out: inputs.append(given[0]))
    hidden = model(ids).last_hidden_state[:, 8]
    first, second = inputs
    dropped = first == 0
    assert 0 < dropped.sum() < 12 and 0 < (second == 0).sum() < 12
    assert_close(first, torch.where(dropped, 0, hidden * 2))


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "activation_dropout"])
@torch.no_grad()
def test_dropout_is_off_in_evaluation_and_random_in_training(name):
    ids, target = text_of(30), text_of(6)
    plain = model_of()(ids, decoder_input_ids=target).logits
    model = model_of(**{name: 0.5})
    assert torch.equal(model(ids, decoder_input_ids=target).logits, plain)
    first, second = (model.train()(ids, decoder_input_ids=target).logits for _ in range(2))
    assert first.isfinite().all() and largest_difference(first, second) > 1e-2


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@torch.no_grad()
def test_layerdrop_skips_layers_in_training_only(stack):
    model, ids, target = trained(**{f"{stack}_layerdrop": 1.0}), text_of(30), text_of(6)
    skipped = model(ids, decoder_input_ids=target).logits
    whole = model.eval()(ids, decoder_input_ids=target).logits
    assert_close(whole, model_of()(ids, decoder_input_ids=target).logits)
    setattr(getattr(model.model, stack), "layers", torch.nn.ModuleList())
    assert_close(skipped, model(ids, decoder_input_ids=target).logits)


@torch.no_grad()
def test_layerdrop_decides_for_each_layer_separately():
    model, ids = trained(encoder_layerdrop=0.5, encoder_layers=3), text_of(9)
    states = {tuple(model.model.encoder(ids)[0][0, 0].tolist()) for _ in range(60)}
    assert len(states) == 8  # 2 ** 3 choices


@pytest.mark.parametrize("kind", ["norm", "lsh"])
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    gradients, runs = [], []
    for checkpointing in False, True:
        model = trained(sparsity_type=kind, dropout=0.2, attention_dropout=0.2)
        model.model.encoder.gradient_checkpointing = checkpointing
        model.model.decoder.gradient_checkpointing = checkpointing
        count = []
        for layer in [*model.model.encoder.layers, *model.model.decoder.layers]:
            layer.fc1.register_forward_hook(lambda *args: count.append(args[0]))
        torch.manual_seed(6)
        model(text_of(30), labels=text_of(6, seed=9)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        runs.append(len(count))
    assert runs == [5, 10]  # each layer runs again in the backward pass
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, 1e-6)


@pytest.mark.parametrize("kind, labels", [
    (BarthezForConditionalGeneration, text_of(6, seed=9)),
    (BarthezForSequenceClassification, torch.tensor([1]))])
def test_every_parameter_has_a_gradient(kind, labels):
    model = trained(kind=kind, num_global_tokens=2)
    model(text_of(30), labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        is_key_bias = name.endswith("k_proj.bias")  # it does not change the softmax
        assert is_key_bias or parameter.grad.abs().max() > 1e-6, name


def test_gradients_equal_finite_differences():
    model = model_of(sparsity_type="pooling").double()
    ids, labels = text_of(30), text_of(6, seed=9)
    model(ids, labels=labels).loss.backward()
    for name in (GLOBALS, "model.shared.weight", "model.encoder.layers.0.self_attn.k_proj.weight",
                 "model.decoder.layers.1.encoder_attn.v_proj.weight"):
        parameter = model.get_parameter(name)
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter += 1e-6 * direction
            above = model(ids, labels=labels).loss
            parameter -= 2e-6 * direction
            below = model(ids, labels=labels).loss
            parameter += 1e-6 * direction
        assert_close((parameter.grad * direction).sum(), (above - below) / 2e-6, 1e-6)


@pytest.mark.parametrize("kind", [BarthezForConditionalGeneration, BarthezForQuestionAnswering,
                                  BarthezForSequenceClassification])
def test_fresh_weights_are_drawn_as_mbart_does(kind):
    sizes = {"d_model": 96, "vocab_size": 500, "tie_word_embeddings": False, "init_std": 0.03}
    model = kind(BarthezConfig(**SIZES | sizes))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == name.endswith("weight")).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            rows = parameter[2:] if name == "model.shared.weight" else parameter
            assert rows.std().item() == pytest.approx(0.03, rel=0.2), name
    assert not model.model.shared.weight[1].any()  # <pad>
