"""Records what the original computes, so that the tests can compare without installing it.

The original is ccdv's lsg-converter 0.1.9 (the code published with ccdv/lsg-barthez-4096) on
transformers 4.36.2 (mBART, generate, BarthezTokenizer). It needs an environment of its own:

    python3.11 -m venv original
    original/bin/pip install torch==2.13.0 transformers==4.36.2 lsg-converter==0.1.9 \\
        sentencepiece "numpy<2"
    original/bin/python tests/goldens/make_goldens.py

It overwrites the data beside this file (about three minutes on one core). On the same machine every
run writes the same bytes; another processor may change the last bits of the tensors.

plain/                  a random BARThez in small, in the published layout, in which every dimension
                        has its own size. The weights are large enough for attention to be far from
                        uniform: a wrong key or a dropped bias shows far above 1e-5.
head_*.safetensors      the tensors that a head adds to plain/ (drop plain's final_logits_bias).

lsg.json, .safetensors  the LSG model, made from plain/ by the original's converter.
  inputs                {name: what it is}; tensors inputs/NAME/{input_ids, attention_mask, labels}.
  cases                 name      tensors: NAME/encoder_last_hidden_state, for some NAME/logits
                        settings  config keys that differ from plain/config.json
                        lsg       false: transformers' own dense MBartForConditionalGeneration
                        input     which input; labels are always passed
                        mask      whether attention_mask was passed
                        seed      torch.manual_seed(seed) came right before the call (LSH draws)
                        loss      of the labels
                        nudge     how far encoder outputs and logits moved when every weight was
                                  multiplied by 1 + 1e-6 * noise: the golden is no near-tie
  errors                settings and input with which the original fails, and how.
gradients.json, .safetensors
                        cases as in lsg.json, on its inputs; NAME/PARAMETER = d loss / d parameter.
                        `rows` lists the parameters; [from, to) are the rows that are kept of a
                        long table, all its others being 0.
heads.json, .safetensors
                        the other heads. `weights`: the head_ file to add to plain/, `inputs`: the
                        tensors NAME/inputs/X to pass by name; outputs NAME/X; loss in the JSON.
conversion.json, .safetensors
  plain_positions       plain/'s two position tables were first cut to this many positions (+ 2)
  source                "plain", or "random": an LSG model with LENGTH positions and the global
                        embeddings random/global_embeddings, of which only the positions change
  seed                  torch.manual_seed(seed) came right before the global embeddings were made
                        (null: no random number is used)
  encoder_positions, decoder_positions, global_embeddings
                        {shape, sha256 of the float32 bytes}; where a sum or a draw may round
                        differently, or as a help, NAME/global_embeddings has the tensor itself.
generation.json         inputs {name: {input_ids, attention_mask}}; each case: model ("lsg" or
                        "dense"), config (settings of that model), eos_bias (added to
                        final_logits_bias[0, 2]), input, mask (whether attention_mask was passed),
                        settings (arguments of generate), output (its ids).
saved.json, .safetensors
                        how the original reads a folder that our save_model wrote. `overrides`:
                        those of load_model; `config`: the text of config.json; then the logits and
                        generated ids of `input`, and the tokenizer's ids and model_max_length.
tokenizer.json          encode: [text, ids]; pairs: [text, pair, ids]; call: arguments and what came
                        back; decode: [ids, text, text without special tokens], no clean-up.
"""

import hashlib
import io
import json
import random
import re
import struct
import sys
import tempfile
import warnings
from pathlib import Path

import sentencepiece
import torch
import transformers
from lsg_converter import conversion_utils
from lsg_converter.mbart import modeling_lsg_mbart as original
from lsg_converter.mbart.convert_mbart_checkpoint import MBartConversionScript
from safetensors.torch import load_file, save_file
from transformers import BarthezTokenizer, MBartForConditionalGeneration

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from barthez import load_model, save_model

PLAIN = HERE / "plain"
LABELS = 5  # target length of the recorded logits
LENGTH = 2100  # max_position_embeddings of the converted model

CORPUS = """
L’été dernier, la ville de Béziers a décidé de fermer ses écoles à midi.
« Où est-elle allée ? » demanda l’œuvre du cœur, « à l'hôpital ! »
Barthez est le meilleur gardien du monde, et il l’a prouvé en 1998.
Il y a 12 345 personnes dans les rues : des élèves, des maîtres et des ouvriers ; tous crient.
Le président de la République s'est rendu à Paris, où il a reçu le ministre.
C’est un très bon résumé du document, n’est-ce pas ? Oui, bien sûr !
Les États-Unis et l'Union européenne ont signé un accord de 67 % sur le gaz.
Nous avons vu des bœufs, des œufs, un garçon naïf et Noël dans la forêt.
Vous pouvez installer ce paquet pour utiliser la bibliothèque (version 2.0) avec le noyau.
Elle a dit qu'elle ne viendrait pas : « je suis fatiguée », puis elle est partie.
Quelques kilomètres plus loin, le train s'arrêta brusquement ; personne ne savait pourquoi...
Ce texte est écrit pour que le modèle apprenne des mots, des zéros et des whiskys.
La mesure ne concerne que les clients mécontents de la politique des réseaux sociaux.
Un fournisseur d'accès de l'État a décidé de bloquer les réseaux après la suppression du compte.
Aujourd'hui, 3 hommes et 4 femmes ont été entendus par la justice à Orléans, 8 rue du Bac.
Le château, la fenêtre, l'île, le goût, l'aiguë, le maïs, la leçon, le jeu, les yeux.
Kévin joue au football à l'école ; Zoé préfère le vélo, et Xavier la quête du graal - 60 fois.
"""


# ---------------------------------------------------------------------------- the plain checkpoint

def make_spm(path):
    """A unigram model whose last piece is <mask>, as in the published file."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.strip().splitlines()), model_writer=model,
        model_type="unigram", vocab_size=180, character_coverage=1.0, num_threads=1,
        bos_id=0, pad_id=1, eos_id=2, unk_id=3, minloglevel=2)
    # ModelProto.pieces is field 1: a piece that is appended to the bytes is the last of the list.
    piece = b"\x0a\x06<mask>" + b"\x15" + struct.pack("<f", 0.0) + b"\x18\x03"
    path.write_bytes(model.getvalue() + b"\x0a" + bytes([len(piece)]) + piece)
    return len(sentencepiece.SentencePieceProcessor(model_file=str(path)))


def make_plain():
    PLAIN.mkdir(exist_ok=True)
    vocab_size = make_spm(PLAIN / "sentencepiece.bpe.model")
    settings = dict(
        d_model=24, encoder_layers=2, decoder_layers=3, encoder_attention_heads=3,
        decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=56, vocab_size=vocab_size,
        max_position_embeddings=1024, activation_function="gelu", dropout=0.1,
        attention_dropout=0.1, activation_dropout=0.1, classifier_dropout=0.0,
        scale_embedding=False, init_std=0.02, decoder_start_token_id=2, bos_token_id=0,
        pad_token_id=1, eos_token_id=2, early_stopping=True, no_repeat_ngram_size=3, num_beams=4)
    torch.manual_seed(1)
    model = MBartForConditionalGeneration(transformers.MBartConfig(**settings))
    for name, tensor in sorted(model.state_dict().items()):
        if name in ("lm_head.weight", "model.encoder.embed_tokens.weight",
                    "model.decoder.embed_tokens.weight"):
            continue  # the same memory as model.shared.weight
        # Queries and keys are large, for scores of about ±2; what follows them is small, so that
        # float32 rounding stays near 1e-6.
        tensor.normal_(0.0, 0.35 if "q_proj" in name or "k_proj" in name else 0.2)
        if "norm" in name and name.endswith("weight"):
            tensor += 1.0
    model.model.shared.weight.data[1] = 0.0  # <pad>
    model.save_pretrained(PLAIN, safe_serialization=True)
    (PLAIN / "generation_config.json").unlink(missing_ok=True)  # the published folder has none
    config = dict(model_type="mbart", architectures=["MBartForConditionalGeneration"],
                  is_encoder_decoder=True, num_hidden_layers=2, use_cache=True,
                  tokenizer_class="BarthezTokenizer", **settings)
    write_json(PLAIN / "config.json", dict(sorted(config.items())))
    return vocab_size


# -------------------------------------------------------------------------------------- conversion

class Conversion(MBartConversionScript):
    """The original's converter, with a seed where its draws begin (it ignores its own `seed`)."""

    def update_global(self, *args):
        torch.manual_seed(self.golden_seed)
        super().update_global(*args)

    def update_global_randomly(self, *args):
        torch.manual_seed(self.golden_seed)
        super().update_global_randomly(*args)


def convert(source, length, seed=0, stride=64, random_init=False, resize=False, target=None):
    """Converts the checkpoint in folder `source`; saves it in `target` if that is given.

    random_init: draw the global embeddings. resize: change only the positions of an LSG model.
    """
    conversion_utils.AutoTokenizer = BarthezTokenizer  # Auto* would want the fast tokenizer
    script = Conversion(
        initial_model=str(source), model_name="golden", max_sequence_length=length,
        architecture=None, random_global_init=random_init, global_positional_stride=stride,
        keep_first_global_token=False, resize_lsg=resize, model_kwargs="{}",
        use_token_ids=True, use_auth_token=None, save_model=False, seed=seed,
        config=original.LSGMBartConfig.from_pretrained(source) if resize
        else transformers.MBartConfig.from_pretrained(source))
    script.golden_seed = seed
    model, tokenizer = script.process()
    if target is not None:
        # save_pretrained would look for the code on the Hub: the two files are all that is needed.
        target.mkdir()
        save_file({k: v.contiguous() for k, v in untied(model).items()},
                  target / "model.safetensors", {"format": "pt"})
        write_json(target / "config.json", json.loads(model.config.to_json_string()))
        (target / "sentencepiece.bpe.model").write_bytes(
            (PLAIN / "sentencepiece.bpe.model").read_bytes())
    return model.eval()


def untied(model):
    copies = ("lm_head.weight", "embed_tokens.weight")
    return {k: v for k, v in model.state_dict().items() if not k.endswith(copies)}


def shortened_plain(folder, positions):
    """plain/ with its position tables cut to `positions` (+ the 2 offset rows)."""
    folder.mkdir()
    tensors = load_file(PLAIN / "model.safetensors")
    for name, tensor in tensors.items():
        if "embed_positions" in name:
            tensors[name] = tensor[: positions + 2].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((PLAIN / "config.json").read_text())
    write_json(folder / "config.json", config | {"max_position_embeddings": positions})
    (folder / "sentencepiece.bpe.model").write_bytes(
        (PLAIN / "sentencepiece.bpe.model").read_bytes())


def make_conversions(folder):
    for positions in 512, 700, 300:
        shortened_plain(folder / str(positions), positions)
    model = convert(PLAIN, LENGTH, seed=7, random_init=True, target=folder / "random")
    cases, errors = [], []
    tensors = {"random/global_embeddings": model.model.encoder.global_embeddings.weight}
    table = [("default", "plain", dict(length=LENGTH))]  # name, source, options of convert()
    for length in 1500, 600, 1024, 1025, 1026, 2048, 2049, 2051, 2052, 4096, 4100:
        table.append((f"to_{length}", "plain", dict(length=length)))
    for stride in 128, 16, 5, 2, 1024:
        table.append((f"stride_{stride}", "plain", dict(length=LENGTH, stride=stride)))
    for length in 3000, 1500, 2101:
        table.append((f"resize_{length}", "random", dict(length=length, resize=True)))
    table += [("plain_512", "512", dict(length=LENGTH)), ("plain_700", "700", dict(length=LENGTH)),
              ("plain_300", "300", dict(length=900, seed=10))]
    for stride in 1, 48:
        table.append((f"stride_{stride}", "plain", dict(length=LENGTH, stride=stride)))
    for name, source, options in table:
        case = {"name": name, "source": "plain" if source.isdigit() else source,
                "plain_positions": int(source) if source.isdigit() else 1024,
                "options": {k: v for k, v in options.items() if k != "seed"},
                "seed": options.get("seed")}
        try:
            model = convert(PLAIN if source == "plain" else folder / source, **options)
        except Exception as error:
            errors.append(case | {"error": describe(error)})
            continue
        encoder, decoder = model.model.encoder, model.model.decoder
        case["encoder_positions"] = digest(encoder.embed_positions.weight)
        case["decoder_positions"] = digest(decoder.embed_positions.weight)
        case["global_embeddings"] = digest(encoder.global_embeddings.weight)
        if name in ("default", "stride_128", "plain_300"):
            tensors[f"{name}/global_embeddings"] = encoder.global_embeddings.weight
        cases.append(case)
    write("conversion", {"cases": cases, "errors": errors}, tensors)


# ------------------------------------------------------------------------------- encoder, gradients

def make_inputs(vocab_size):
    """Random ids between <s> and </s>; `labels` is a random target, −100 where it is padded."""
    generator = torch.Generator().manual_seed(2)

    def text(length):
        ids = torch.randint(4, vocab_size, (length,), generator=generator)
        ids[0], ids[-1] = 0, 2
        return ids

    def batch(*lengths):
        ids = torch.nn.utils.rnn.pad_sequence([text(n) for n in lengths], True, 1)
        labels = torch.stack([text(LABELS) for _ in lengths])
        labels[-1, LABELS - 1] = -100
        return {"input_ids": ids, "attention_mask": ids.ne(1).long(), "labels": labels}

    inputs = {f"one_{n}": batch(n) for n in (12, 16, 17, 21, 24, 25, 48, 77, 80)}
    inputs["two_80_43"] = batch(80, 43)
    inputs["two_29_61"] = batch(29, 61)
    holes = batch(77)
    holes["attention_mask"] = (torch.rand(1, 77, generator=generator) < 0.6).long()
    inputs["holes_77"] = holes
    # A text that is padded on the left and on the right of whole blocks.
    middle = batch(80)
    middle["attention_mask"][:, :19] = 0
    middle["attention_mask"][:, 50:] = 0
    inputs["middle_80"] = middle
    return inputs


def lsg_table():
    """(name, settings, input, options) of the cases; options: mask, seed, logits, lsg."""
    types = ("norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling")
    small = {"block_size": 8, "sparse_block_size": 8}
    table = []

    def add(name, settings, source="one_77", **options):
        settings = small | settings
        if settings.get("sparsity_type") == "lsh":
            options.setdefault("seed", len(table))
        table.append((name, settings, source, options))

    for kind in types:
        # bos_pooling makes a chunk of nothing but padding visible, and so does lsh when it turns
        # into it. It gets lengths at which no such chunk exists.
        bos = kind == "bos_pooling"
        one = "one_80" if bos else "one_77"
        t = {"sparsity_type": kind}
        add(kind, t, one, logits=True)
        add(f"{kind}_factor_4", t | {"sparsity_factor": 4}, one)
        add(f"{kind}_globals_5", t | {"num_global_tokens": 5}, one)
        add(f"{kind}_sparse_16", t | {"sparse_block_size": 16}, one)
        add(f"{kind}_block_12_sparse_6", t | {"block_size": 12, "sparse_block_size": 6},
            "one_80" if not bos else "one_48")
        add(f"{kind}_block_16_sparse_12_factor_4",
            t | {"block_size": 16, "sparse_block_size": 12, "sparsity_factor": 4}, one)
        add(f"{kind}_step_1", t | {"sparsity_factor": 8}, "one_80" if kind == "lsh" else one)
        add(f"{kind}_step_3", t | {"block_size": 12, "sparse_block_size": 12,
                                   "sparsity_factor": 4}, one)
        if not bos:
            add(f"{kind}_two", t | {"num_global_tokens": 3}, "two_80_43", logits=True)
            add(f"{kind}_two_factor_4", t | {"sparsity_factor": 4}, "two_29_61")
            add(f"{kind}_holes", t, "holes_77")
            add(f"{kind}_middle", t, "middle_80")

    add("norm_sparse_4", {"sparse_block_size": 4})
    add("norm_sparse_12", {"sparse_block_size": 12})
    add("lsh_sparse_4", {"sparse_block_size": 4, "sparsity_type": "lsh"})
    add("lsh_sparse_4_is_bos_pooling",
        {"sparse_block_size": 4, "sparsity_type": "lsh", "sparsity_factor": 4}, "one_80")
    for rounds in (0, 2):
        add(f"lsh_rounds_{rounds}", {"sparsity_type": "lsh", "lsh_num_pre_rounds": rounds})
    for kind in ("norm", "lsh"):  # with factor 1 every selection is the same: all keys
        add(f"{kind}_factor_1", {"sparsity_type": kind, "sparsity_factor": 1})
    add("factor_1_two", {"sparsity_factor": 1}, "two_80_43")
    add("factor_1_sparse_4", {"sparsity_factor": 1, "sparse_block_size": 4})
    add("factor_1_sparse_6", {"sparsity_factor": 1, "sparse_block_size": 6})
    add("factor_1_sparse_16", {"sparsity_factor": 1, "sparse_block_size": 16})
    add("factor_1_block_9", {"sparsity_factor": 1, "block_size": 9, "sparse_block_size": 9})
    add("local_none", {"sparsity_type": "none"}, logits=True)
    add("local_none_25", {"sparsity_type": "none"}, "one_25")
    add("local_null_25", {"sparsity_type": None}, "one_25")
    add("local_sparse_0_25", {"sparse_block_size": 0}, "one_25")
    add("local_factor_0_25", {"sparsity_factor": 0}, "one_25")
    add("local_two", {"sparsity_type": "none"}, "two_80_43")
    for length in (12, 16, 17, 24, 25):  # full attention up to 2 * block_size
        add(f"length_{length}", {"num_global_tokens": 3}, f"one_{length}")
    add("adaptive_false_80", {"adaptive": False}, "one_80")
    add("adaptive_false_12", {"adaptive": False}, "one_12")
    add("adaptive_false_21", {"adaptive": False}, "one_21")
    add("mask_first", {"mask_first_token": True}, logits=True)
    add("mask_first_no_mask_given", {"mask_first_token": True}, mask=False, logits=True)
    add("mask_first_globals_3_cut", {"mask_first_token": True, "num_global_tokens": 3,
                                     "pass_global_tokens_to_decoder": False}, logits=True)
    add("mask_first_two", {"mask_first_token": True}, "two_80_43", logits=True)
    add("mask_first_pool_false", {"mask_first_token": True, "pool_with_global": False,
                                  "pass_global_tokens_to_decoder": False}, logits=True)
    add("no_mask_given", {}, mask=False, logits=True)
    add("pool_false", {"pool_with_global": False}, logits=True)
    for pool in (True, False):
        add(f"globals_cut_pool_{str(pool).lower()}",
            {"pass_global_tokens_to_decoder": False, "pool_with_global": pool,
             "num_global_tokens": 4}, logits=True)
    add("globals_cut_two", {"pass_global_tokens_to_decoder": False, "num_global_tokens": 2},
        "two_29_61", logits=True)
    add("globals_cut_short", {"pass_global_tokens_to_decoder": False, "num_global_tokens": 2},
        "one_12", logits=True)
    add("globals_0_means_1", {"num_global_tokens": 0})
    add("globals_512", {"num_global_tokens": 512, "pass_global_tokens_to_decoder": False})
    add("globals_600_means_512", {"num_global_tokens": 600,
                                  "pass_global_tokens_to_decoder": False})
    add("scale_embedding", {"scale_embedding": True}, logits=True)
    add("default_block_128", {"block_size": 128, "sparse_block_size": 128}, "two_80_43")
    for source in ("one_77", "two_80_43"):
        table.append((f"dense_{source}", {}, source, {"lsg": False, "logits": True}))
    table.append(("dense_scale_embedding", {"scale_embedding": True}, "one_77",
                  {"lsg": False, "logits": True}))
    return table


def load(folder, settings, kind="ForConditionalGeneration", lsg=True):
    """The settings go through the config's constructor, as if they stood in config.json: those that
    are given to from_pretrained escape the checks (num_global_tokens=0 would not become 1)."""
    folder, prefix = (folder, "LSGMBart") if lsg else (PLAIN, "MBart")
    config = original.LSGMBartConfig if lsg else transformers.MBartConfig
    config = config(**json.loads((folder / "config.json").read_text()) | settings)
    cls = getattr(original, prefix + kind)  # the module re-exports transformers' dense classes
    model, info = cls.from_pretrained(folder, config=config, output_loading_info=True)
    expected = "embed_tokens|lm_head|classification_head|qa_outputs"
    missing = [k for k in info["missing_keys"] if not re.search(expected, k)]
    assert not missing, missing
    return model.eval()


def nudged(model, size=1e-6, seed=3):
    """Multiplies every weight by 1 + size * noise, in place."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.mul_(1 + size * torch.randn(tensor.shape, generator=generator))
    return model


def call(model, tensors, mask, seed):
    if seed is not None:
        torch.manual_seed(seed)
    # mask_first_token writes into the mask: give it a copy.
    return model(input_ids=tensors["input_ids"], labels=tensors["labels"],
                 attention_mask=tensors["attention_mask"].clone() if mask else None)


def make_lsg(folder, inputs):
    cases, errors = [], []
    tensors = {f"inputs/{name}/{k}": v for name, d in inputs.items() for k, v in d.items()}
    for name, settings, source, options in lsg_table():
        lsg, seed, mask = options.get("lsg", True), options.get("seed"), options.get("mask", True)
        case = {"name": name, "settings": settings, "lsg": lsg, "input": source, "mask": mask,
                "seed": seed}
        try:
            model = load(folder, settings, lsg=lsg)
            with torch.no_grad():
                out = call(model, inputs[source], mask, seed)
                near = call(nudged(model), inputs[source], mask, seed)
        except (AssertionError, RuntimeError, IndexError) as error:
            errors.append(case | {"error": describe(error)})
            continue
        case["loss"] = out.loss.item()
        case["nudge"] = max((a - b).abs().max().item() for a, b in [
            (out.logits, near.logits),
            (out.encoder_last_hidden_state, near.encoder_last_hidden_state)])
        cases.append(case)
        tensors[f"{name}/encoder_last_hidden_state"] = out.encoder_last_hidden_state
        if options.get("logits"):
            tensors[f"{name}/logits"] = out.logits
    about = {name: " + ".join(str(int(n)) for n in d["attention_mask"].sum(1))
             + f" of {d['input_ids'].shape[1]} tokens" for name, d in inputs.items()}
    write("lsg", {"inputs": about, "cases": cases, "errors": errors}, tensors)


def make_gradients(folder, inputs):
    cases, tensors = [], {}
    for kind in ("norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling", "none"):
        name, source = kind, "one_80" if kind == "bos_pooling" else "two_80_43"
        settings = {"block_size": 8, "sparse_block_size": 8, "num_global_tokens": 5,
                    "sparsity_type": kind}
        seed = 5 if kind == "lsh" else None
        model = load(folder, settings)
        out = call(model, inputs[source], True, seed)
        out.loss.backward()
        parameters = dict(model.named_parameters())
        rows = {"model.encoder.global_embeddings.weight": [0, 5],
                "model.encoder.embed_positions.weight": [2, 82],
                "model.decoder.embed_positions.weight": [2, 2 + LABELS],
                "model.encoder.layers.0.self_attn.q_proj.weight": None,
                "model.encoder.layers.0.self_attn.k_proj.weight": None}
        if kind == "norm":
            rows |= {k: None for k in (
                "model.shared.weight", "model.encoder.layernorm_embedding.weight",
                "model.encoder.layers.1.self_attn.v_proj.bias", "model.encoder.layers.1.fc1.weight",
                "model.decoder.layers.2.encoder_attn.k_proj.weight",
                "model.decoder.layers.0.self_attn.q_proj.weight", "model.decoder.layer_norm.bias")}
        for key, span in rows.items():
            gradient = parameters[key].grad
            if span:
                kept, gradient = gradient.abs().sum(), gradient[slice(*span)].clone()
                assert torch.isclose(kept, gradient.abs().sum()), "gradient outside the kept rows"
            tensors[f"{name}/{key}"] = gradient
        cases.append({"name": name, "settings": settings, "input": source, "seed": seed,
                      "loss": out.loss.item(), "rows": rows})
    write("gradients", {"cases": cases}, tensors)


# -------------------------------------------------------------------------------------------- heads

def make_heads(folder, inputs):
    generator = torch.Generator().manual_seed(4)
    weights = {
        "head_classification_3": {
            "classification_head.dense.weight": (24, 24), "classification_head.dense.bias": (24,),
            "classification_head.out_proj.weight": (3, 24),
            "classification_head.out_proj.bias": (3,)},
        # This one is not used. The next was drawn after it.
        "classification_1": {"dense.weight": (24, 24), "dense.bias": (24,),
                             "out_proj.weight": (1, 24), "out_proj.bias": (1,)},
        "head_question_answering": {"qa_outputs.weight": (2, 24), "qa_outputs.bias": (2,)},
    }
    for name, shapes in weights.items():
        weights[name] = {k: torch.randn(s, generator=generator) * 0.4 for k, s in shapes.items()}
        if name.startswith("head_"):
            save_file(weights[name], HERE / f"{name}.safetensors", {"format": "pt"})

    two, one = inputs["two_80_43"], inputs["one_77"]
    source = {k: two[k] for k in ("input_ids", "attention_mask")}
    short = {k: v for k, v in one.items() if k != "labels"}
    target = two["labels"].clamp(min=1)  # −100 -> <pad>
    target_mask = torch.ones_like(target)
    target_mask[1, -1] = 0
    small = {"block_size": 8, "sparse_block_size": 8}
    cut = small | {"pass_global_tokens_to_decoder": False, "num_global_tokens": 3}
    three = small | {"num_labels": 3}
    classify, answer = "ForSequenceClassification", "ForQuestionAnswering"
    table = [  # name, head, settings, weights, inputs
        ("base", "Model", small, None, source | {"decoder_input_ids": target}),
        ("base_decoder_mask", "Model", small, None,
         source | {"decoder_input_ids": target, "decoder_attention_mask": target_mask}),
        ("base_no_decoder_input", "Model", cut, None, source),
        ("base_one_cut", "Model", cut, None, short | {"decoder_input_ids": target[:1]}),
        ("generation", "ForConditionalGeneration", small, None, source | {"labels": two["labels"]}),
        ("generation_decoder_input", "ForConditionalGeneration", small, None,
         source | {"decoder_input_ids": target}),
        ("classification", classify, three, "head_classification_3", source),
        ("classification_single", classify, three, "head_classification_3",
         source | {"labels": torch.tensor([2, 0])}),
        ("classification_cut", classify, cut | {"num_labels": 3}, "head_classification_3", short),
        ("question", answer, small, "head_question_answering", source),
        ("question_loss", answer, small, "head_question_answering",
         source | {"start_positions": torch.tensor([3, 17]),
                   "end_positions": torch.tensor([9, 40])}),
        ("question_loss_beyond", answer, small, "head_question_answering",
         source | {"start_positions": torch.tensor([3, 80]),
                   "end_positions": torch.tensor([95, 40])}),
        ("question_cut", answer, cut, "head_question_answering", short),
    ]
    cases, tensors = [], {}
    for name, head, settings, file, kwargs in table:
        model = load(folder, settings, head)
        for key, value in weights.get(file, {}).items():
            model.get_parameter(key).data.copy_(value)
        with torch.no_grad():
            out = model(**{k: v.clone() for k, v in kwargs.items()})
        cases.append({"name": name, "architecture": "LSGMBart" + head, "settings": settings,
                      "weights": file, "inputs": sorted(kwargs),
                      "loss": None if out.get("loss") is None else out.loss.item()})
        tensors |= {f"{name}/inputs/{k}": v for k, v in kwargs.items()}
        for key in ("logits", "start_logits", "end_logits", "last_hidden_state",
                    "encoder_last_hidden_state"):
            if out.get(key) is not None:
                if key == "encoder_last_hidden_state" and name not in ("base", "base_one_cut"):
                    continue  # lsg.safetensors has enough of them
                tensors[f"{name}/{key}"] = out[key]
    write("heads", {"cases": cases}, tensors)


# -------------------------------------------------------------------------------- our checkpoints

def make_saved(folder, inputs):
    """What the original makes of a folder that this project wrote."""
    overrides = {"max_position_embeddings": 1300, "num_global_tokens": 5, "block_size": 8,
                 "sparse_block_size": 8, "sparsity_type": "pooling"}
    save_model(*load_model(PLAIN, **overrides), folder)
    logits, results = read_with_original(folder, inputs["two_80_43"])
    write_json(HERE / "saved.json", {
        "overrides": overrides, "config": (folder / "config.json").read_text(),
        "input": "two_80_43", **results})
    save_file({"logits": logits.contiguous()}, HERE / "saved.safetensors", {"format": "pt"})


def read_with_original(folder, inputs):
    """The original's logits for the inputs, and what it generates and tokenizes."""
    model, info = original.LSGMBartForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"], info
    tokenizer = BarthezTokenizer.from_pretrained(folder)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        logits = model.eval()(ids, attention_mask=mask, labels=inputs["labels"]).logits
    generated = model.generate(ids, attention_mask=mask, max_length=20)
    text = "« Où est-elle ? »"
    text_ids = tokenizer(text)["input_ids"]
    return logits, {"ids": generated.tolist(), "text": text, "text_ids": text_ids,
                    "model_max_length": tokenizer.model_max_length}


# --------------------------------------------------------------------------------------- generation

def make_generation(folder, vocab_size):
    rng = random.Random(6)

    def batch(*lengths):
        rows = [[0] + [rng.randrange(4, vocab_size) for _ in range(n - 2)] + [2] for n in lengths]
        width = max(lengths)
        return {"input_ids": [r + [1] * (width - len(r)) for r in rows],
                "attention_mask": [[1] * len(r) + [0] * (width - len(r)) for r in rows]}

    lsg, cut, first = ({"block_size": 8, "sparse_block_size": 8} | d for d in (
        {}, {"num_global_tokens": 4, "sparsity_type": "pooling",
             "pass_global_tokens_to_decoder": False},
        {"sparsity_type": "block_stride", "mask_first_token": True}))

    def stopping(beams):  # the least length keeps a bare </s> from winning most of them
        return [{"num_beams": beams, "early_stopping": stop, "length_penalty": penalty,
                 "max_length": 26, "min_length": 3 + beams} for stop in (True, False, "never")
                for penalty in (0.5, 1.0, 2.0, 0.0, -1.0)]

    lengths = [{}, {"max_length": 2}, {"max_length": 3, "forced_eos_token_id": None},
               {"max_length": 7}, {"max_length": 60, "early_stopping": False},
               {"max_length": 60, "num_beams": 1},
               {"max_length": 30, "length_penalty": 0.5, "early_stopping": "never"}]
    minimal = [{"min_length": n, "num_beams": beams, "max_length": 22, "early_stopping": False,
                "length_penalty": penalty}
               for beams, penalty in ((1, 1.0), (3, 2.0), (4, 1.0)) for n in (0, 5, 12, 20)]
    grams = [{"no_repeat_ngram_size": n, "forced_eos_token_id": forced, "num_beams": beams,
              "max_length": 18} for n in (0, 2, 3) for forced in (None, 2) for beams in (1, 3)]
    several = [{"num_beams": beams, "num_return_sequences": count, "max_length": 14,
                "min_length": 4, "early_stopping": stop}
               for beams, count in ((2, 2), (4, 3), (5, 5)) for stop in (True, False)]
    groups = [  # model, config, lengths of the texts, mask given, settings, how many must differ
        ("lsg", lsg, (40,), True, stopping(2), 5), ("lsg", lsg, (33, 20), True, stopping(3), 6),
        ("lsg", cut, (40, 9), True, stopping(4), 6), ("dense", {}, (23, 50), True, stopping(5), 6),
        ("dense", {}, (11,), False, stopping(4), 4),
        ("lsg", first, (12, 45), True, lengths, 6), ("dense", {}, (31, 9, 20), True, lengths, 6),
        ("lsg", cut, (40, 21), False, minimal, 8), ("dense", {}, (25,), True, minimal, 7),
        ("lsg", lsg, (50, 23, 9), True, grams, 8), ("dense", {}, (9, 30), True, grams, 8),
        ("lsg", cut, (33, 12), True, several, 6), ("dense", {}, (17,), True, several, 5)]
    inputs, cases, count = {}, [], []
    for index, (kind, config, sizes, mask, settings, wanted) in enumerate(groups):
        best = []
        for attempt in range(20):  # draw texts until the settings make a difference
            bias = rng.choice((1.5, 2.0, 2.5, 3.0))
            source = batch(*sizes)
            models = []
            # The first model is as it is. Two others, nudged, tell the near-ties, which are no
            # fair question: only what all three say is kept.
            for nudge in (0, 1e-4, -1e-4):
                models.append(nudged(load(folder, config, lsg=kind == "lsg"), nudge))
                models[-1].final_logits_bias[0, 2] += bias
            found = []
            for setting in settings:
                outputs = []
                for model in models:
                    tensors = {k: torch.tensor(v) for k, v in source.items()}
                    if not mask:
                        del tensors["attention_mask"]
                    outputs.append(model.generate(**tensors, **setting).tolist())
                if outputs[0] == outputs[1] == outputs[2]:
                    found.append({"model": kind, "config": config, "eos_bias": bias,
                                  "input": str(index), "mask": mask, "settings": setting,
                                  "output": outputs[0]})
            if len(different(found)) > len(different(best)):
                best, inputs[str(index)] = found, source
            if len(different(best)) >= wanted:
                break
        cases += best
        count.append(f"{len(different(best))} of {len(best)} (wanted {wanted})")
    write("generation", {"inputs": inputs, "cases": cases}, different=count)


def different(cases):
    return {str(case["output"]) for case in cases}


# ---------------------------------------------------------------------------------------- tokenizer

WORDS = ["L’été", "est là", "à", "œuvre", "« Bonjour »", "l'hôpital", " ?", " !", " : ", "1998",
         "12 345", "personnes", "e\u0301te\u0301", "\u00a0", "\u202f", "\u2009", "\u200b", "\ufeff",
         "\u200d", "\u00ad", "日本語", "😀", "👩‍👩‍👧", "\t", "\n", "\r\n", "\x00", "\x07", "\x7f",
         "\u2028", "ﬁn", "①", "Ⅳ", "½", "…", "—", "“q”", "▁", "▁a", "<", ">", "<s", "s>", "</",
         "mask", "<Mask>", "<mask >", "<MASK>", "ÀÉÎ", "ß", "Ω", "%", "€", "a" * 40, "\u3000",
         "\u0301"]
SPECIALS = ["<s>", "</s>", "<pad>", "<unk>", "<mask>"]


def make_texts():
    texts = ["", " ", "   ", "\n", "\t", "\n\n ", "\u00a0", "\u200b", "a", " a", "a ", "  a  b  ",
             *WORDS, *(f"a{w}b" for w in WORDS), "Barthez est le meilleur <mask> du monde."]
    for s in SPECIALS:
        texts += [s, f" {s}", f"{s} ", f"  {s}  ", f"a{s}b", f"a {s} b", f"a  {s}  b", f"a\n{s}\nb",
                  f"a\u00a0{s}\u00a0b", f"{s}{s}", f"{s} {s}", f"{s}a", f"a{s}", f"{s} a", f"a {s}",
                  f"\n{s}", f"été {s}. Oui", f"{s[:-1]}{s}", f"{s}{s[1:]}", s.upper()]
        texts += [s + other for other in SPECIALS] + [f"{s} {other}" for other in SPECIALS]
    texts += CORPUS.strip().splitlines()
    rng = random.Random(8)
    alphabet = list("aeéêœlLsz01 .,?!'’«»<>/  \n\t\u00a0") + ["pad", "unk", "mask", "s"]
    for _ in range(300):
        texts.append("".join(rng.choice(rng.choice((alphabet, alphabet, alphabet, SPECIALS, WORDS)))
                             for _ in range(rng.randrange(1, 25))))
    return list(dict.fromkeys(texts))


def make_tokenizer(vocab_size):
    tokenizer = BarthezTokenizer(str(PLAIN / "sentencepiece.bpe.model"))
    texts, rng = make_texts(), random.Random(9)
    encode = [[t, tokenizer(t).input_ids] for t in texts]
    pairs = [[a, b, tokenizer(a, b).input_ids] for a, b in
             [("a", "b"), ("", ""), ("Où ?", ""), ("", "Ici !"), ("a <mask>", " <mask> b"),
              ("L’été", "« l'hôpital »"), ("<s>", "</s>")]]
    long, short = CORPUS.strip().splitlines()[1], "Où est-elle ?"
    other = CORPUS.strip().splitlines()[4]
    table = []
    for text in (long, short, [short, long], ["", long, "a"]):
        for options in ({}, {"truncation": True, "max_length": 10},
                        {"truncation": True, "max_length": 2},
                        {"truncation": True, "max_length": 3},
                        {"truncation": True, "max_length": 1000},
                        {"padding": True}, {"padding": "longest"},
                        {"padding": True, "pad_to_multiple_of": 8},
                        {"padding": "max_length", "max_length": 25, "truncation": True},
                        {"padding": "max_length", "max_length": 9, "truncation": True,
                         "pad_to_multiple_of": 8},
                        {"padding": "longest", "max_length": 12, "truncation": True},
                        {"padding": "max_length", "max_length": 6}):
            table.append({"text": text, **options})
    for a, b in ((long, short), (short, long), (long, other), (short, short), ("", long)):
        for options in ({}, {"truncation": True, "max_length": 20},
                        {"truncation": True, "max_length": 21},
                        {"truncation": True, "max_length": 9},
                        {"truncation": True, "max_length": 30, "padding": "max_length"}):
            table.append({"text": a, "text_pair": b, **options})
    table.append({"text": [long, short], "text_pair": [short, other], "padding": True,
                  "truncation": True, "max_length": 40})
    calls = []
    for arguments in table:
        try:
            out = tokenizer(**arguments)
            calls.append({"arguments": arguments, "input_ids": out["input_ids"],
                          "attention_mask": out["attention_mask"]})
        except Exception as error:
            calls.append({"arguments": arguments, "error": describe(error)})
    sequences = [ids for _, ids in encode] + [[], [0], [1, 1], [2, 0], [vocab_size - 1], [3, 3]]
    sequences += [[rng.randrange(vocab_size) if rng.random() < 0.8 else rng.choice((0, 1, 2, 3))
                   for _ in range(rng.randrange(1, 20))] for _ in range(100)]
    decode = [[ids, *(tokenizer.decode(ids, skip_special_tokens=skip,
                                       clean_up_tokenization_spaces=False)
                      for skip in (False, True))] for ids in sequences]
    write("tokenizer", {"vocab_size": vocab_size, "encode": encode, "pairs": pairs, "call": calls,
                        "decode": decode})


# -------------------------------------------------------------------------------------------- files

def describe(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]


def digest(tensor):
    data = tensor.detach().contiguous().numpy().tobytes()
    return {"shape": list(tensor.shape), "sha256": hashlib.sha256(data).hexdigest()}


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=True) + "\n")


def write(name, sections, tensors=None, **counts):
    """One line of JSON for each case, so that a change shows in a diff."""
    parts = []
    for key, value in sections.items():
        lines = [json.dumps(v) for v in value] if isinstance(value, list) else None
        parts.append(f"{json.dumps(key)}: " + (json.dumps(value) if lines is None else
                                               "[\n" + ",\n".join(lines) + "\n]"))
    (HERE / f"{name}.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")
    if tensors is not None:
        save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()},
                  HERE / f"{name}.safetensors", {"format": "pt"})
    print(name, {k: len(v) for k, v in sections.items() if hasattr(v, "__len__")}, counts)


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    vocab_size = make_plain()
    make_tokenizer(vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_conversions(folder)
        convert(PLAIN, LENGTH, target=folder / "lsg")
        inputs = make_inputs(vocab_size)
        make_lsg(folder / "lsg", inputs)
        make_gradients(folder / "lsg", inputs)
        make_heads(folder / "lsg", inputs)
        make_saved(folder / "saved", inputs)
        make_generation(folder / "lsg", vocab_size)


if __name__ == "__main__":
    main()
