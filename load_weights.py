"""From a checkpoint to its config (dict), tensors (dict) and tokenizer; the conversion to LSG.

    python load_weights.py moussaKam/barthez --output my-lsg-barthez

A checkpoint is a folder or a model on the Hugging Face Hub that has config.json, model.safetensors
(or pytorch_model.bin) and sentencepiece.bpe.model. The conversion of BARThez to LSG follows
lsg-converter 0.1.9, conversion_utils.py and mbart/convert_mbart_checkpoint.py.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import pickle
import pickletools
import re
import shutil
import socket
import ssl
import sys
import time
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import (HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request,
                            UnknownHandler)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lsg import check_options
from tokenizer import BarthezTokenizer

TINY = Path(__file__).parent / "tiny"  # the bundled model
EMBEDDING = "model.shared.weight"
EMBEDDINGS = (EMBEDDING, "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight",
              "lm_head.weight")  # names of one matrix, if all are tied
GLOBALS = "model.encoder.global_embeddings.weight"
POSITIONS = "model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"
NUM_GLOBALS = 512  # rows of the published table; the first num_global_tokens are used
LSG_KEYS = {  # of config.json, with their defaults
    "adaptive": True, "block_size": 128, "lsh_num_pre_rounds": 1, "mask_first_token": False,
    "num_global_tokens": 1, "pass_global_tokens_to_decoder": True, "pool_with_global": True,
    "sparse_block_size": 128, "sparsity_factor": 2, "sparsity_type": "norm"}
LSG_OPTIONS = ("block_size", "sparse_block_size", "sparsity_factor", "sparsity_type",
               "num_global_tokens", "lsh_num_pre_rounds")  # those that lsg.check_options checks
ARCHITECTURE_NAMES = {  # ends of the published class names: the name of the automatic class
    "Model": "AutoModel", "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering", "ForCausalLM": "AutoModelForCausalLM"}
CONVERSIONS = {  # where safetensors were proposed to a model whose main branch has none
    "moussaKam/barthez": "42bea5aeff64b65241007086b895e6fd17ab6204",
    "moussaKam/barthez-orangesum-abstract": "d297ebaa84d61a069a0cd6922271c4a47ba2554e",
    "moussaKam/barthez-sentiment-classification": "refs/pr/1",
    "moussaKam/mbarthez": "7a86236775ed8eaab6eefc9a90a309c4831fae13"}
HARMLESS = re.compile(r"torch\._utils _rebuild_(tensor_v2|parameter)|collections OrderedDict"
                      r"|torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage")
UNUSED = re.compile(r"model\.(encoder|decoder)\.(version|embed_positions\._float_tensor)")


# ------------------------------------------------------------------------------------------------
# Reading


def read_checkpoint(source, revision=None):
    """The config (dict), the tensors {name: tensor} and the tokenizer of a checkpoint.

    source: a folder, a model's id on the Hub, or "tiny" for the bundled model.
    Names begin with "model.", except those of heads. Tied matrices are one tensor under all names.
    Raises ValueError or OSError; the message says what is wrong and what to do.
    """
    files = find_files(source, revision)
    config = read_json(files["config.json"])
    if "generation_config.json" in files:
        config = config | read_json(files["generation_config.json"])
    tensors = rename(read_tensors(files["weights"]), tied_names(config))
    tokenizer = BarthezTokenizer(files["sentencepiece.bpe.model"])
    vocab_size = config.get("vocab_size")
    if isinstance(vocab_size, int) and len(tokenizer) > vocab_size:
        raise ValueError(f"the tokenizer of {source} has {len(tokenizer)} pieces, but {vocab_size=}"
                         ": it belongs to another model")
    return config, tensors, tokenizer


def find_files(source, revision):
    """{file name: path} of a checkpoint; the weights, in either format, are under "weights"."""
    folder = TINY if source == "tiny" else Path(source)
    if not folder.is_dir():
        return hub_files(str(source), revision)
    if revision is not None:
        raise ValueError(f"revision={revision!r} is for the Hub, but {source} is a folder")
    return collect(in_folder, folder)


def in_folder(folder, filename, _=None):
    """The path of a file in a folder, which has no revisions."""
    path = folder / filename
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a checkpoint, it lacks {filename}")
    return path


def collect(get, source, revision=None):
    """The files of a checkpoint. `get(source, file name, revision)` returns the path of one."""
    config = get(source, "config.json", revision or "main")
    # In the cache, the folder is named after the commit. All files come from it, even if the branch
    # moves meanwhile. A folder of the user has no revisions.
    commit = config.parent.name
    tokenizer = get(source, "sentencepiece.bpe.model", commit)
    files = {"config.json": config, "sentencepiece.bpe.model": tokenizer}
    with suppress(FileNotFoundError):  # few models have one
        files["generation_config.json"] = get(source, "generation_config.json", commit)
    places = [("model.safetensors", commit), ("pytorch_model.bin", commit)]
    if revision is None and source in CONVERSIONS:
        places.insert(1, ("model.safetensors", CONVERSIONS[source]))
    for name, place in places:  # the first that exists
        with suppress(FileNotFoundError):
            return files | {"weights": get(source, name, place)}
    raise FileNotFoundError(
        f"{source} lacks weights: it has no model.safetensors and no pytorch_model.bin. Join "
        "sharded ones with transformers, by save_pretrained(folder, max_shard_size='99GB').")


def read_json(path):
    """The JSON object that a file holds."""
    try:
        contents = json.loads(path.read_text("utf-8"))
        if not isinstance(contents, dict):
            raise ValueError(f"it is a {type(contents).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object ({one_line(error)}). "
                         f"{replace_it(path)}") from None
    return contents


def read_tensors(path):
    """All tensors of a file, {name: tensor}, mapped into memory. No pickled code is run."""
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else read_pickled(path)
        for name, tensor in tensors.items():
            if not (isinstance(name, str) and isinstance(tensor, torch.Tensor)):
                raise ValueError("it holds other things than tensors with names")
            # PyTorch can hardly compute with these types.
            if "float8" in str(tensor.dtype) or "float4" in str(tensor.dtype):
                raise ValueError(f"{name} is {tensor.dtype}")
        return tensors
    except Exception as error:  # safetensors and torch.load raise many kinds for a damaged file
        if isinstance(error, OSError) or out_of_memory(error):
            raise
        reason = "not a pickle of tensors"
        if not isinstance(error, pickle.UnpicklingError):
            reason = one_line(error, 100)
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason}). "
                         f"{replace_it(path)}") from None


def read_pickled(path):
    """The contents of pytorch_model.bin. Refuses a pickle that names more than dense tensors.

    torch.load would run what the pickle names. Even with weights_only, some pickles crash it.
    """
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # files of torch before 1.6 are not
        if is_zip:
            pickles = [torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")]
        else:
            file.seek(0)
            pickles = [file] * 5  # magic number, version, system, tensors, keys
        for stream in pickles:
            for count, (opcode, name, _) in enumerate(pickletools.genops(stream)):
                if opcode.name == "GLOBAL" and not HARMLESS.fullmatch(name):
                    raise ValueError(f"it names {name}")
                if count > 100_000:  # a real model of 520 tensors has 18,000
                    raise ValueError("its pickle is too long")
    return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip))


def replace_it(path):
    """What to do about a file that is wrong."""
    if path.is_symlink():  # from the Hub's cache, where the next run fetches it again
        return f"Delete {path.resolve()} and {path}, and run again to fetch it."
    return "Replace it by a good copy."


def tied_names(config):
    """The names that the embedding has. A tied one is also the output projection, lm_head."""
    tied = config.get("tie_word_embeddings") is not False
    return EMBEDDINGS if tied else EMBEDDINGS[:3]


def rename(tensors, names):
    """Names that begin with "model.", and one tensor for the embedding under all of its names.

    names: those of tied_names.
    """
    if not any(name.startswith("model.") for name in tensors):  # saved from a model without a head
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    tensors = {name: x for name, x in tensors.items() if not UNUSED.fullmatch(name)}
    copies = [tensors[name] for name in names if name in tensors]
    if any(copy.dtype != copies[0].dtype or not torch.equal(copy, copies[0]) for copy in copies):
        raise ValueError(f"tied matrices differ: {', '.join(names)}. Remove the wrong ones"
                         + (", or set tie_word_embeddings to false" if names == EMBEDDINGS else ""))
    if copies:
        embedding = dict.fromkeys(names, copies[0])
        tensors = embedding | tensors | embedding  # model.shared.weight is the first name
    return tensors


# ------------------------------------------------------------------------------------------------
# Conversion. These functions return new dicts and leave their arguments as they are.


def convert_to_lsg(config, tensors, tokenizer, max_position_embeddings=4096, *, stride=64,
                   random_global_init=False, keep_first_global=False, resize_lsg=False):
    """Config and tensors of an LSG model, from those of a plain BARThez or of an LSG model.

    A new global token is a position of the encoder plus the embedding of <s> (for the first) or of
    <mask> (for the others).
    stride: how many positions lie between consecutive global tokens.
    random_global_init: instead of <mask>, draw from the distribution of the token embeddings.
    keep_first_global, resize_lsg: keep the first, or all, of an LSG model's global tokens.
    """
    check_tables(config, tensors, EMBEDDING, POSITIONS[0])
    if not (GLOBALS in tensors and resize_lsg):
        embedding = tensors[EMBEDDING]
        words = embedding[tokenizer.mask_token_id].repeat(NUM_GLOBALS, 1)
        if random_global_init:
            words = embedding.float()
            distribution = torch.distributions.MultivariateNormal(words.mean(0), torch.cov(words.T))
            words = distribution.sample((NUM_GLOBALS,))
        words[0] = embedding[tokenizer.bos_token_id]
        global_tokens = spread_positions(tensors[POSITIONS[0]][2:], stride) + words
        if keep_first_global and GLOBALS in tensors:
            global_tokens[0] = tensors[GLOBALS][0]
        tensors = tensors | {GLOBALS: global_tokens}
    return resize_positions(config, tensors, max_position_embeddings)


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
    if not 1 <= max_position_embeddings <= 10**6:
        raise ValueError(f"{max_position_embeddings=}: choose a number from 1 to {10**6}")
    tables = {name: tensors[name] for name in POSITIONS if name in tensors}
    check_tables(config, tables, *tables)
    for name, table in tables.items():
        unused, rows = table[:2], table[2:]  # mBART does not use the first two rows
        copies = math.ceil(max_position_embeddings / len(rows))
        tables[name] = torch.cat([unused, rows.repeat(copies, 1)[:max_position_embeddings]])
    return config | {"max_position_embeddings": max_position_embeddings}, tensors | tables


def check_tables(config, tensors, *names):
    """Raise ValueError if a table that conversion needs is missing or misshapen."""
    positions = config.get("max_position_embeddings") or 1024
    for name in names:
        rows, columns = config.get("vocab_size"), config.get("d_model")
        if name in POSITIONS and isinstance(positions, int):
            rows = positions + 2
        if name not in tensors:
            raise ValueError(f"missing {name}")
        if tensors[name].shape != (rows, columns):
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, but config.json says "
                             f"{(rows, columns)}")


# ------------------------------------------------------------------------------------------------
# Writing


def published_config(config, architecture, lsg, dtype):
    """The config with the keys by which the code of the published LSG-BARThez knows the model."""
    decoder_only = architecture == "ForCausalLM"
    config = config | {
        "architectures": [("LSG" if lsg else "") + "MBart" + architecture], "model_type": "mbart",
        "is_decoder": decoder_only, "is_encoder_decoder": not decoder_only, "torch_dtype": dtype}
    if lsg:
        config["base_model_prefix"] = "lsg"
        config["auto_map"] = {  # the class is in the code that is published with the original
            auto_class: f"ccdv/lsg-barthez-4096--modeling_lsg_mbart.LSGMBart{name}"
            for name, auto_class in ARCHITECTURE_NAMES.items()}
    return config


def architecture_name(name):
    """The key of ARCHITECTURE_NAMES for a class name, or for the first of a list of them."""
    if isinstance(name, list) and name:
        name = name[0]
    short = str(name or "ForConditionalGeneration").removeprefix("LSG").removeprefix("MBart")
    if short not in ARCHITECTURE_NAMES:
        raise ValueError(f"unknown architecture {name!r}: choose one of "
                         f"{', '.join(ARCHITECTURE_NAMES)}")
    return short


def write_checkpoint(folder, config, tensors, tokenizer):
    """Write config.json, model.safetensors and the tokenizer into a folder.

    Every file is written beside its place and moved there last. If the disk is full, an older
    checkpoint remains.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_config = {"model_max_length": config["max_position_embeddings"],
                        "tokenizer_class": "BarthezTokenizer"}
    tensors = separate(tensors, getattr(torch, config["torch_dtype"]), tied_names(config))
    with locked(folder):
        for leftover in folder.glob("*.incomplete"):  # of a run that was killed
            leftover.unlink()
        with (replacing(folder / "config.json") as config_file,
              replacing(folder / "tokenizer_config.json") as tokenizer_file,
              replacing(folder / "model.safetensors") as weights_file):
            config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            tokenizer_file.write_text(json.dumps(tokenizer_config, indent=2) + "\n")
            try:
                save_file(tensors, weights_file, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"{weights_file} cannot be written: {one_line(error)}") from None
            shutil.copymode(config_file, weights_file)  # save_file lets only the owner read it
            pieces, path = tokenizer.model_file.read_bytes(), folder / "sentencepiece.bpe.model"
            if not (path.is_file() and path.read_bytes() == pieces):
                with replacing(path) as pieces_file:
                    pieces_file.write_bytes(pieces)


def separate(tensors, dtype, embeddings):
    """Contiguous tensors of one type that share no memory, as safetensors needs them. Of several
    names of the embedding, the first is kept."""
    separated, seen = {}, set()
    for name, tensor in tensors.items():
        shared = tensor.data_ptr() in seen
        embedding = name in embeddings or f"model.{name}" in embeddings
        if not (shared and embedding):
            separated[name] = tensor.detach().to("cpu", dtype, copy=shared).contiguous()
            seen.add(tensor.data_ptr())
    return separated


@contextmanager
def replacing(path):
    """Yields a name beside `path` to write to. It becomes `path` if all goes well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.incomplete")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path):
    """Waits until no other process holds the lock of a file or folder, and holds it."""
    if fcntl is None:
        yield
        return
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags)
    try:
        with suppress(OSError):  # some network drives have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------
# Command lines: what load_weights.py, barthez.py and train.py have in common


def run(main):
    """Run a program. A user's mistake is one line on stderr and exit status 2; Ctrl-C is 130."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, mode))
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
    try:
        main()
        sys.stdout.flush()
        return
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except (ValueError, OSError) as error:
        message, status = one_line(error), 2
    except Exception as error:
        if not out_of_memory(error):
            raise
        message, status = "not enough memory: lower the lengths, the beams or the batch", 2
    notice(f"{Path(sys.argv[0]).name}: {message}")
    with suppress(OSError):
        sys.stdout.flush()
    discard(sys.stdout)
    sys.exit(status)


def out_of_memory(error):
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in (
            "allocate memory", "out of memory", "bad_alloc", "could not create a primitive"))


def notice(text, end="\n"):
    """Print to stderr. If that is full or closed, the program continues."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def discard(stream):
    """From now on, discard what is written to the stream."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def one_line(error, length=1000):
    """The message of an error, in one line."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def parse_settings(settings):
    """["KEY=VALUE", …] as a dict. Values are JSON, or else text."""
    values = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: expected KEY=VALUE, such as block_size=64")
        if key in ("source", "revision", "architecture", "device", "dtype"):
            raise ValueError(f"--set {key}: config.json has no such key")
        try:
            values[key] = json.loads(value)
        except (ValueError, RecursionError):
            values[key] = value
    return values


def main():
    parser = argparse.ArgumentParser(
        description="Convert BARThez to LSG, or lengthen an LSG model, and save it in a folder.")
    parser.add_argument("source", help="folder or Hub id")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--revision", help="branch, tag, commit or refs/pr/N on the Hub")
    parser.add_argument("--architecture", help=f"one of {', '.join(ARCHITECTURE_NAMES)}")
    parser.add_argument("--max-position-embeddings", type=int, default=4096, metavar="N")
    parser.add_argument("--global-positional-stride", type=int, default=64, metavar="N",
                        help="positions between consecutive global tokens")
    parser.add_argument("--random-global-init", action="store_true",
                        help="draw the global tokens from the distribution of the words")
    parser.add_argument("--keep-first-global", action="store_true",
                        help="keep the first global token of an LSG model")
    parser.add_argument("--resize-lsg", action="store_true",
                        help="keep all global tokens of an LSG model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--seed", type=int, default=123)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="set options of LSG, such as sparsity_type=pooling")
    arguments = parser.parse_args()
    if not arguments.output:
        raise ValueError("--output is empty: name a folder")

    settings = parse_settings(arguments.set)
    for key, value in settings.items():
        if key not in LSG_KEYS:
            raise ValueError(f"--set {key}: choose among {', '.join(LSG_KEYS)}")
        if isinstance(LSG_KEYS[key], bool) and not isinstance(value, bool):
            raise ValueError(f"--set {key}={value}: expected true or false")
    torch.manual_seed(arguments.seed % 2**63)  # torch takes no larger one
    config, tensors, tokenizer = read_checkpoint(arguments.source, arguments.revision)
    architecture = architecture_name(arguments.architecture or config.get("architectures"))
    if GLOBALS in tensors and not arguments.resize_lsg:
        notice(f"{arguments.source} is an LSG model, whose global tokens are replaced: add "
               "--resize-lsg to keep them")
    config, tensors = convert_to_lsg(
        config, tensors, tokenizer, arguments.max_position_embeddings,
        stride=arguments.global_positional_stride, random_global_init=arguments.random_global_init,
        keep_first_global=arguments.keep_first_global, resize_lsg=arguments.resize_lsg)
    config = LSG_KEYS | config | settings
    if config["num_global_tokens"] not in range(1, NUM_GLOBALS + 1):
        raise ValueError(f"num_global_tokens={config['num_global_tokens']}: choose 1 to "
                         f"{NUM_GLOBALS}")
    check_options(**{key: config[key] for key in LSG_OPTIONS})
    config = published_config(config, architecture, True, arguments.dtype)
    write_checkpoint(arguments.output, config, tensors, tokenizer)


# ------------------------------------------------------------------------------------------------
# A model on the Hub, and in the cache that the Hub's clients share

COMMIT = re.compile("[0-9a-f]{40}")


class NoNetwork(ConnectionError):
    """No address, no connection, or offline mode; and the cache lacks the file."""


def hub_files(repo_id, revision=None):
    """The files of a model on the Hub, in the cache.

    revision: a branch, a tag, refs/pr/N or a commit.
    A model that is complete in the cache is used if the Hub cannot be asked or refuses.
    """
    if not re.fullmatch(r"(?a:\w[\w.-]*(/\w[\w.-]*)?)", repo_id):
        raise ValueError(f"{repo_id!r} is neither a folder nor a model on the Hub (owner/name).")
    try:
        old = collect(cached, repo_id, revision)
    except FileNotFoundError:
        return collect(download, repo_id, revision)
    try:
        if download(repo_id, "config.json", revision or "main", tries=1) == old["config.json"]:
            return old  # the revision has not moved
        return collect(functools.partial(download, tries=1), repo_id, revision)
    except OSError as error:
        notice(f"{error} The model in the cache is used.")
        return old


def cached(repo_id, filename, revision):
    """The path of a file in the cache."""
    folder = repo_folder(repo_id)
    ref = folder / "refs" / revision
    commit = ref.read_text(errors="replace") if ref.is_file() else revision
    return in_folder(folder / "snapshots" / commit, filename)


def link(blob, folder, commit, filename, revision):
    """Give a blob its name in a commit, and note that the revision is this commit."""
    path, ref = folder / "snapshots" / commit / filename, folder / "refs" / revision
    if not path.is_file():
        with replacing(path) as name:
            try:
                os.symlink(os.path.relpath(blob, path.parent), name)
            except OSError:  # Windows allows it to few
                shutil.copyfile(blob, name)
    if revision != commit and not (ref.is_file() and ref.read_bytes() == commit.encode()):
        with replacing(ref) as name:
            name.write_text(commit)
    return path


def repo_folder(repo_id):
    return hf_path("HF_HUB_CACHE", "hub") / f"models--{repo_id.replace('/', '--')}"


def hf_path(variable, name):
    """The path in an environment variable, or else `name` in the folder of the Hub's clients."""
    home = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    path = os.environ.get(variable) or f"{os.environ.get('HF_HOME') or home}/{name}"
    return Path(os.path.expandvars(os.path.expanduser(path)))


def endpoint():
    address = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    if not re.match("https?://", address):
        raise ValueError(f"HF_ENDPOINT={address} must begin with https:// (or http://).")
    return address


def is_on(variable):
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")


# ------------------------------------------------------------------------------------------------
# The Hub's download protocol

ETAG = re.compile('(?:W/)?"?([0-9a-f]{40}|[0-9a-f]{64})"?')  # git's blob sha1, or sha256
LARGE = 10_000_000  # bytes from which a download shows its progress
FAMILIES = {}  # host -> (own address, port 0) to bind to, of the family that reaches the host


class Retry(Exception):
    """Another attempt may succeed, after `pause` seconds. gained: whether bytes came."""

    def __init__(self, reason, pause=0, gained=False):
        super().__init__(reason)
        self.pause, self.gained = pause, gained


def download(repo_id, filename, revision="main", tries=5):
    """The path of a file in the cache, brought up to date unless `revision` is a cached commit."""
    what, folder = f"{filename} of {repo_id} ({revision})", repo_folder(repo_id)
    if is_on("HF_HUB_OFFLINE") or COMMIT.fullmatch(revision):
        with suppress(FileNotFoundError):
            return cached(repo_id, filename, revision)
    if is_on("HF_HUB_OFFLINE"):
        raise NoNetwork(f"{what} is not in {folder.parent}: unset HF_HUB_OFFLINE to download it.")
    failures = 0
    while True:
        try:
            return download_once(repo_id, filename, revision, what)
        except Retry as error:
            fault = error
            if not FAMILIES:  # no host was ever reached
                raise NoNetwork(f"{fault}: check the network and any proxy.") from None
        except OSError as error:
            if error.errno is None:  # not of the disk, but one of ours, with a message
                raise
            raise OSError(f"Cannot write {what} to {folder.parent}: {error.strerror}. Free some "
                          "space, or set HF_HUB_CACHE to another folder.") from error
        failures = 0 if fault.gained else failures + 1
        pause = max(fault.pause, (2 ** failures) // 2, 1)  # 1, 2, 4, 8
        if failures >= tries or pause > 310:  # the Hub counts requests in windows of 300 s
            raise ConnectionError(f"{fault}. Try again later: a partial download is continued.")
        notice(f"{fault}: next attempt in {pause} s.")
        time.sleep(pause)


def download_once(repo_id, filename, revision, what):
    """One attempt: learn the commit and the etag, which is the checksum and names the blob."""
    folder, page = repo_folder(repo_id), f"{endpoint()}/{repo_id}"
    url = f"{page}/resolve/{quote(revision, safe='')}/{quote(filename)}"
    commit = etag = None
    for answer, url in follow_redirects(url):
        if answer.status >= 400:
            raise refusal(answer, page, what)
        commit = commit or COMMIT.fullmatch(answer.headers.get("X-Repo-Commit", ""))
        etag = etag or ETAG.fullmatch(answer.headers.get("X-Linked-ETag", ""))
        if answer.status == 200 and "X-Repo-Commit" in answer.headers:
            # Another host's etag would be no checksum.
            etag = etag or ETAG.fullmatch(answer.headers.get("ETag", ""))
        if commit and etag:
            break
    else:
        raise ConnectionError(f"{urlsplit(url).hostname} does not answer as the Hub does. Log in "
                              "to this network in a browser, or check HF_ENDPOINT.")
    blob = folder / "blobs" / etag[1]
    if not blob.is_file():
        lock = folder.parent / ".locks" / folder.name / f"{etag[1]}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock):
            if not blob.is_file():  # another process may have brought it
                download_blob(url, blob, what)
    return link(blob, folder, commit[0], filename, revision)


def download_blob(url, blob, what):
    """Download what an earlier attempt left to do of `blob`, and verify its checksum."""
    partial = blob.with_name(f"{blob.name}.incomplete")
    partial.parent.mkdir(parents=True, exist_ok=True)
    size = partial.stat().st_size if partial.is_file() else 0
    for answer, _ in follow_redirects(url, size):
        if answer.status in (200, 206):
            write_body(answer, partial, size, what)
        elif answer.status != 416 and "Location" not in answer.headers:  # 416: nothing is left
            raise busy(answer, what)  # the addresses of the storage expire
    digest = hashlib.sha256()
    if len(blob.name) == 40:
        digest = hashlib.sha1(b"blob %d\0" % partial.stat().st_size)
    with open(partial, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != blob.name:
        partial.unlink()
        if size:
            raise Retry(f"The parts of {what} do not fit together")
        raise ConnectionError(f"{what} arrived damaged and was deleted: try again without proxies.")
    os.replace(partial, blob)


def write_body(answer, partial, size, what):
    """Append the answer to the `size` bytes of `partial`, or replace them if it is the whole file.

    Large files show their progress.
    """
    start = size if answer.status == 206 else 0
    total = start + int(answer.headers.get("Content-Length") or 0)
    large = total >= LARGE
    if large:
        notice(f"Downloading {what}, {total / 1e6:,.0f} MB, to {partial.parent}")
    shows = large and sys.stderr.isatty() and not is_on("HF_HUB_DISABLE_PROGRESS_BARS")
    begun = shown = time.monotonic()
    done, ended = start, False
    with open(partial, "ab" if start else "wb") as file:
        while not ended:
            try:
                block = answer.read1(1 << 18)
            except (OSError, HTTPException):  # of the network; `write` raises those of the disk
                break
            ended = not block
            done += file.write(block)
            now = time.monotonic()
            if shows and (now > shown + 0.2 or ended):
                shown, rate = now, (done - start + 1) / max(now - begun, 0.01)
                left = time.strftime("%H:%M:%S", time.gmtime((total - done) / rate))
                notice(f"\r{done / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, {left} left ",
                       end="\n" if ended else "")
    if not ended or done < total:
        raise Retry(f"The connection broke at {done:,} bytes", gained=done > size)


def follow_redirects(url, start=0):
    """GET the bytes from `start` on. Yields each answer, and the address that it leads to."""
    for _ in range(10):
        with request(url, start) as answer:
            url = urljoin(url, answer.headers.get("Location", ""))
            yield answer, url
        if "Location" not in answer.headers:
            break


def request(url, start):
    """The answer to one GET. The token goes to the endpoint alone; urllib would forward it."""
    headers = {"User-Agent": "lsg-barthez"}
    if start:
        headers["Range"] = f"bytes={start}-"
    if urlsplit(url)[:2] == urlsplit(endpoint())[:2]:
        token = os.environ.get("HF_TOKEN")
        if not token:
            with suppress(OSError):
                token = hf_path("HF_TOKEN_PATH", "token").read_text(errors="replace")
        if token:
            headers["Authorization"] = f"Bearer {''.join(token.split())}"
    opener = OpenerDirector()
    for handler in ProxyHandler(), OneFamily(), UnknownHandler():
        opener.add_handler(handler)
    try:
        return opener.open(Request(url, headers=headers), timeout=15)
    except (OSError, HTTPException) as error:
        reason, host = getattr(error, "reason", error), urlsplit(url).hostname
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise ConnectionError(f"{host}: {reason.verify_message}. Check the clock; on macOS run "
                                  "'Install Certificates.command' of Python; or set SSL_CERT_FILE "
                                  "to a file such as /etc/ssl/cert.pem.") from error
        raise Retry(f"{host} does not answer ({reason})") from error


class OneFamily(HTTPHandler, HTTPSHandler):
    """Connects by IPv4, or else by IPv6: one that swallows packets costs a single timeout."""

    def do_open(self, connection, request, **options):
        host = request.host
        if host not in FAMILIES:
            FAMILIES[host] = (own_address(host, connection.default_port), 0)
        return super().do_open(connection, request, source_address=FAMILIES[host], **options)


def own_address(host, default_port):
    """The address to bind to, of the family by which the host can be reached."""
    server = urlsplit(f"//{host}")
    for family, own in (socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::"):
        with suppress(OSError):
            port = server.port or default_port
            address = socket.getaddrinfo(server.hostname, port, family)[0][4]
            socket.create_connection(address[:2], timeout=5).close()
            return own
    raise Retry(f"{server.hostname} cannot be reached")


def busy(answer, what):
    """The error that asks for another attempt, after the pause that the answer names."""
    limit = (re.search(r"r=0;t=(\d+)", answer.headers.get("RateLimit", ""))
             or re.fullmatch(r"(\d+)", answer.headers.get("Retry-After", "")))
    host, pause = urlsplit(answer.url).hostname, int(limit[1]) + 1 if limit else 0
    said = answer.headers.get("X-Error-Message") or answer.reason
    return Retry(f"{host} answered {answer.status} {said} for {what}", pause)


def refusal(answer, page, what):
    """The error that an answer of the Hub means."""
    if answer.status in (408, 429, 500, 502, 503, 504):
        return busy(answer, what)
    code, host = answer.headers.get("X-Error-Code"), urlsplit(answer.url).hostname
    said = answer.headers.get("X-Error-Message") or answer.reason
    if code == "EntryNotFound":
        return FileNotFoundError(f"There is no {what}: see {page}.")
    if code == "RevisionNotFound":
        return FileNotFoundError(f"There is no such revision: {what}. See {page}.")
    if code == "GatedRepo":
        return PermissionError(f"{page} is gated: accept its terms there, and set HF_TOKEN.")
    if "Invalid credentials" in said:
        return PermissionError("The Hub rejects your token: renew or remove it (HF_TOKEN).")
    if code == "RepoNotFound" or answer.status in (401, 404):
        return FileNotFoundError(f"{page} is missing or private: check it, or set HF_TOKEN.")
    return ConnectionError(f"{host} answered {answer.status} {said}: check proxies, HF_ENDPOINT.")


if __name__ == "__main__":
    run(main)
