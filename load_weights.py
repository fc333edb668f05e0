"""Read and write checkpoints: config (dict), tensors (dict) and tokenizer.

A checkpoint is a folder with config.json, model.safetensors (or pytorch_model.bin) and
sentencepiece.bpe.model. The conversion of BARThez to LSG follows lsg-converter 0.1.9,
conversion_utils.py and mbart/convert_mbart_checkpoint.py.
"""

import json
import os
import pickle
import shutil
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tokenizer import SPECIAL_TOKENS, BarthezTokenizer

WEIGHTS = "model.safetensors", "pytorch_model.bin"
EMBEDDING = "model.shared.weight"
EMBEDDINGS = (EMBEDDING, "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight",
              "lm_head.weight")  # names of one matrix, if all are tied
GLOBALS = "model.encoder.global_embeddings.weight"
POSITIONS = "model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"
NUM_GLOBALS = 512  # rows of the published table; the first num_global_tokens are used
ALIASES = {  # other names that the model card and transformers use for keys of config.json
    "hidden_size": "d_model", "num_attention_heads": "encoder_attention_heads",
    "attention_probs_dropout_prob": "attention_dropout", "lsg_num_pre_rounds": "lsh_num_pre_rounds"}
NOT_INCLUDED = {  # settings of generation that change the text, each with its neutral value
    "do_sample": False, "num_beam_groups": 1, "diversity_penalty": 0, "penalty_alpha": 0,
    "repetition_penalty": 1, "encoder_repetition_penalty": 1, "guidance_scale": 1,
    "encoder_no_repeat_ngram_size": 0, "min_new_tokens": 0, "renormalize_logits": False,
    "bad_words_ids": None, "begin_suppress_tokens": None, "exponential_decay_length_penalty": None,
    "force_words_ids": None, "forced_bos_token_id": None, "forced_decoder_ids": None,
    "sequence_bias": None, "stop_strings": None, "suppress_tokens": None}


# ------------------------------------------------------------------------------------------------
# Reading


def read_checkpoint(folder, overrides=None):
    """The config (dict), the tensors {name: tensor} and the tokenizer of a checkpoint.

    overrides: keys of config.json and their values, which replace those of the file.
    A plain BARThez is converted to LSG, with 4,096 positions by default, unless lsg is False.
    max_position_embeddings as an override changes the number of positions of any model.
    Names begin with "model.", except those of heads. Tied matrices are one tensor under all names.
    Raises ValueError or FileNotFoundError; the message says what is wrong and what to do.
    """
    folder, overrides = Path(folder), normalize_settings(overrides or {})
    config_file = find(folder, "config.json")
    tokenizer_file = find(folder, "sentencepiece.bpe.model")
    weights_file = find(folder, *WEIGHTS)

    settings = normalize_settings(read_json(config_file))
    settings |= normalize_settings(read_json(folder / "generation_config.json"))
    warn_of_settings(folder, settings)
    if "id2label" in overrides:
        settings["num_labels"] = None  # the number of labels follows
    config = settings | overrides
    with reading(weights_file):
        tensors = rename(read_tensors(weights_file))
    tensors = tie(tensors, settings, config)
    with reading(tokenizer_file):
        tokenizer = BarthezTokenizer(tokenizer_file)
    check_tokenizer(folder, config, tokenizer)

    positions = overrides.get("max_position_embeddings")
    is_plain = GLOBALS not in tensors and {EMBEDDING, *POSITIONS} <= tensors.keys()
    if is_plain and config.get("lsg") is not False:
        tensors = add_globals(tensors, tokenizer)
        positions = 4096 if positions is None else positions
    if positions is not None:
        config, tensors = resize_positions(config, tensors, positions)
    return config, tensors, tokenizer


def find(folder, *names):
    """The path of the first of these files that exists."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    message = f"{folder} is not a checkpoint: it lacks {' and '.join(names)}"
    if "sentencepiece.bpe.model" in names:
        message += ". BARThez models use that of moussaKam/barthez"
    elif list(folder.glob("*.index.json")):
        message += (". Join sharded weights with transformers: "
                    "save_pretrained(folder, max_shard_size='99GB')")
    raise FileNotFoundError(message)


@contextmanager
def reading(path):
    """Turn any error inside into a ValueError that names the file and what to do."""
    try:
        yield
    except Exception as error:  # damaged files raise errors of many types
        advice = "If it is damaged, replace it with a good copy."
        if path.stat().st_size < 1000 and b"git-lfs" in path.read_bytes():
            advice = "It is a git LFS pointer: run git lfs pull in its folder."
        elif path.resolve().parent.name == "blobs":  # in the Hub's cache
            advice = f"If it is damaged, delete {path.resolve()}, and run again to download it."
        raise ValueError(f"{path} cannot be read ({describe(error)}). {advice}") from error


def describe(error):
    """The message of an error in one line. Its type is added, except for ValueError and OSError."""
    message = " ".join(str(error).split())[:600]
    if isinstance(error, (ValueError, OSError)) and message:
        return message
    return f"{type(error).__name__}: {message}"


def read_json(path):
    """The JSON object in a file; {} if the file does not exist."""
    if not path.is_file():
        return {}
    with reading(path):
        return dict(json.loads(path.read_text("utf-8-sig")))


def normalize_settings(settings):
    """Replace aliases, max_new_tokens and lists of one id by the names and types used here."""
    settings = {ALIASES.get(key, key): value for key, value in settings.items()}
    new_tokens = settings.pop("max_new_tokens", None)
    if new_tokens is not None:  # max_length counts the start token, too
        if type(new_tokens) is not int:
            raise ValueError(f"max_new_tokens={new_tokens!r}: expected int")
        settings["max_length"] = new_tokens + 1
    for name in ("eos_token_id", "forced_eos_token_id"):
        if isinstance(settings.get(name), list):
            if len(settings[name]) != 1:
                raise ValueError(f"{name}={settings[name]}: several are not supported")
            [settings[name]] = settings[name]
    return settings


def warn_of_settings(folder, settings):
    """Warn of settings of generation that are not supported and would change the text."""
    found = [f"{name}={settings[name]}" for name, neutral in NOT_INCLUDED.items()
             if settings.get(name) not in (None, [], neutral)]
    if found:
        warnings.warn(f"{folder} sets {', '.join(found)}, which is not supported: texts "
                      "will differ from those of other programs")


def read_tensors(path):
    """All tensors of a file, {name: tensor}, mapped into memory. No pickled code is run."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if torch.__version__ < (2, 10):
        raise ValueError("this torch may run code in a .bin file (CVE-2026-24747): upgrade to "
                         "torch 2.10, or use model.safetensors")
    try:  # mmap needs a zip file, which torch writes since 1.6
        tensors = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:  # its message advises running the code
        raise ValueError("it is not a checkpoint, or holds more than tensors") from None
    for name, tensor in tensors.items():
        is_dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not (
            tensor.is_quantized or tensor.is_nested or tensor.is_meta)
        if not is_dense:
            raise ValueError(f"{name!r} is not a dense tensor")
    return tensors


def rename(tensors):
    """Add the prefix "model.", which a file without a head lacks. Drop unused tensors."""
    if not any(name.startswith("model.") for name in tensors):  # saved from a model without a head
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    # Old checkpoints contain a version and a _float_tensor.
    return {name: tensor for name, tensor in tensors.items()
            if not name.endswith((".version", "._float_tensor"))}


def tie(tensors, settings, config):
    """The tensors with one tensor for the embedding under all of its names.

    settings: those of the file. config: the same with overrides, by which lm_head is tied or not.
    """
    names, names_in_file = tied_names(config), tied_names(settings)
    stored = [name for name in names_in_file if name in tensors]
    if not stored:
        return tensors
    embedding = tensors[stored[0]]
    different = [name for name in stored
                 if name in names and not torch.equal(tensors[name], embedding)]
    if different:
        raise ValueError(f"{', '.join(different)} differs from {stored[0]}: if it is lm_head.weight"
                         " alone, set tie_word_embeddings=false")
    if len(names) < len(names_in_file):  # untied by an override: lm_head begins as a copy
        head = tensors.get("lm_head.weight", embedding).clone()
        tensors = tensors | {"lm_head.weight": head}
    return tensors | dict.fromkeys(names, embedding)


def tied_names(config):
    """The names of the embedding. If it is tied, lm_head.weight is one of them."""
    return EMBEDDINGS if config.get("tie_word_embeddings") is not False else EMBEDDINGS[:3]


def check_tokenizer(folder, config, tokenizer):
    """Raise ValueError if the tokenizer does not belong to the model, or lacks tokens."""
    vocab_size = config.get("vocab_size")
    if isinstance(vocab_size, int) and len(tokenizer) > vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} pieces, but {vocab_size=}: it "
                         "belongs to another model")
    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        id = getattr(tokenizer, name)
        if config.get(name) not in (None, id):
            raise ValueError(f"{name} is {config[name]!r} in config.json, but {id} in "
                             "sentencepiece.bpe.model: it is not a BARThez but another kind of "
                             "mBART, such as mbart-large-cc25, which is not supported")
    added = read_json(folder / "added_tokens.json")  # {token: id}
    decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    added |= {token["content"]: int(id) for id, token in decoder.items()}
    new = [token for token, id in added.items()
           if id >= len(tokenizer) and token not in SPECIAL_TOKENS]
    if new:
        raise ValueError("tokens that were added to sentencepiece.bpe.model are not supported: "
                         f"{', '.join(new[:5])}")


# ------------------------------------------------------------------------------------------------
# Conversion. These functions return new dicts; their arguments are unchanged.


def add_globals(tensors, tokenizer, stride=64):
    """The tensors of a plain BARThez and the table of global tokens of an LSG model.

    A global token is a position of the encoder plus the embedding of <s> (for the first) or of
    <mask> (for the others).
    Consecutive global tokens are `stride` positions apart.
    """
    embedding = tensors[EMBEDDING]
    words = embedding[tokenizer.mask_token_id].repeat(NUM_GLOBALS, 1)
    words[0] = embedding[tokenizer.bos_token_id]
    positions = spread_positions(tensors[POSITIONS[0]][2:], stride)
    return tensors | {GLOBALS: positions + words}


def spread_positions(positions, stride):
    """512 rows of positions (n, E), ordered so that neighbors are `stride` positions apart."""
    n, E = positions.shape
    if n < NUM_GLOBALS:  # draw the missing ones from the distribution of the others
        extra = positions.mean(0) + positions.std(0) * torch.randn(NUM_GLOBALS - n, E)
        positions = torch.cat([positions, extra])
    factor = max(n // NUM_GLOBALS, 1)
    step = stride // factor
    if step < 1 or NUM_GLOBALS % step:
        raise ValueError(f"a stride of {stride} over {n} positions does not divide 512 tokens: "
                         f"choose {factor} times a power of 2, up to {512 * factor}")
    kept = positions[:NUM_GLOBALS * factor:factor]  # (512, E)
    return kept.view(-1, step, E).transpose(0, 1).reshape(NUM_GLOBALS, E)


def resize_positions(config, tensors, max_position_embeddings):
    """Repeat the rows of the position tables, or cut them, to max_position_embeddings."""
    if not isinstance(max_position_embeddings, int) or max_position_embeddings < 1:
        raise ValueError(f"{max_position_embeddings=}: choose a whole number above 0")
    tensors = dict(tensors)
    for name in POSITIONS:
        unused, rows = tensors[name][:2], tensors[name][2:]  # mBART does not use the first two
        index = torch.arange(max_position_embeddings) % len(rows)
        tensors[name] = torch.cat([unused, rows[index]])
    return config | {"max_position_embeddings": max_position_embeddings}, tensors


# ------------------------------------------------------------------------------------------------
# Writing


def write_checkpoint(folder, config, tensors, tokenizer):
    """Write config.json, model.safetensors and the tokenizer into a folder.

    Files are written under temporary names, then renamed. If the disk is full, an older
    checkpoint remains.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_config = {"model_max_length": config["max_position_embeddings"],
                        "tokenizer_class": "BarthezTokenizer"}
    copies = tied_names(config)[1:]  # names of the embedding besides the first
    tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
               if name not in copies and f"model.{name}" not in copies}
    with (replacing(folder / "config.json") as config_file,
          replacing(folder / "tokenizer_config.json") as tokenizer_file,
          replacing(folder / "model.safetensors") as weights_file,
          replacing(folder / "sentencepiece.bpe.model") as pieces_file):
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        tokenizer_file.write_text(json.dumps(tokenizer_config, indent=2) + "\n")
        save_file(tensors, weights_file, metadata={"format": "pt"})
        shutil.copymode(config_file, weights_file)  # save_file lets only the owner read it
        shutil.copyfile(tokenizer.model_file, pieces_file)
    (folder / "generation_config.json").unlink(missing_ok=True)  # config.json has its settings


@contextmanager
def replacing(path):
    """Yields a temporary path, which is renamed to `path` if no error occurs."""
    temporary = path.with_name(f"{path.name}.incomplete")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
