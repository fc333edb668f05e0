"""From a checkpoint to a model: its files (folder or Hub), its tensors, its conversion to LSG.

    model, tokenizer = load_model("moussaKam/barthez-orangesum-abstract")
    python load_weights.py moussaKam/barthez --output my-lsg-barthez

A checkpoint is config.json, model.safetensors (or pytorch_model.bin) and sentencepiece.bpe.model.
The conversion of BARThez to LSG follows lsg-converter 0.1.9, conversion_utils.py and
mbart/convert_mbart_checkpoint.py.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import ssl
import sys
import time
import uuid
import warnings
from dataclasses import asdict, fields
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import (HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request,
                            UnknownHandler)

import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

import barthez
from barthez import ALIASES, BarthezConfig, init_weights
from tokenizer import BarthezTokenizer

TINY = Path(__file__).parent / "tiny"  # the bundled model
ARCHITECTURES = {  # what a published class name ends in -> our class
    "Model": barthez.BarthezModel,
    "ForConditionalGeneration": barthez.BarthezForConditionalGeneration,
    "ForSequenceClassification": barthez.BarthezForSequenceClassification,
    "ForQuestionAnswering": barthez.BarthezForQuestionAnswering,
    "ForCausalLM": barthez.BarthezForCausalLM}
GLOBALS = "model.encoder.global_embeddings.weight"
POSITIONS = "model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"
CONVERSIONS = {  # safetensors that were proposed to a model whose main branch has none
    "moussaKam/barthez": "42bea5aeff64b65241007086b895e6fd17ab6204",
    "moussaKam/barthez-orangesum-abstract": "d297ebaa84d61a069a0cd6922271c4a47ba2554e",
    "moussaKam/barthez-sentiment-classification": "refs/pr/1",
    "moussaKam/mbarthez": "7a86236775ed8eaab6eefc9a90a309c4831fae13"}
# One matrix under four names: a file may hold it under any of them, or copies under several.
EMBEDDINGS = ("model.shared.weight", "model.encoder.embed_tokens.weight",
              "model.decoder.embed_tokens.weight", "lm_head.weight")
HEADS = "lm_head.", "final_logits_bias", "classification_head.", "qa_outputs."
LSG_KEYS = ("adaptive", "block_size", "lsh_num_pre_rounds", "mask_first_token", "num_global_tokens",
            "pass_global_tokens_to_decoder", "pool_with_global", "sparse_block_size",
            "sparsity_factor", "sparsity_type")


def load_model(source, *, revision=None, architecture=None, device=None, dtype=None, lsg=True,
               **overrides):
    """A model in evaluation mode, and its tokenizer.

    source: a folder, a Hub id (with, optionally, its revision), or "tiny", the bundled model.
    architecture: such as "ForSequenceClassification"; default: the one that config.json names.
    dtype: of the weights, whatever the file's; default: float32.
    lsg: False gives full attention. With LSG, a plain BARThez is converted on the way in, to
        4,096 positions unless max_position_embeddings says otherwise.
    overrides: config keys, such as sparsity_type="pooling" or num_global_tokens=16.
    Raises ValueError or OSError with what is wrong and what to do.
    """
    overrides = {ALIASES.get(key, key): value for key, value in overrides.items()}
    unknown = overrides.keys() - {field.name for field in fields(BarthezConfig)} - {"num_labels"}
    if unknown:
        raise ValueError(f"no key of config.json: {', '.join(sorted(unknown))}")
    settings, tensors, tokenizer = read_checkpoint(source, revision, architecture)
    if overrides.keys() & {"num_labels", "id2label"}:  # either implies the other
        settings = {key: settings[key] for key in settings.keys() - {"num_labels", "id2label"}}
    positions = overrides.get("max_position_embeddings")
    if lsg and GLOBALS not in tensors and POSITIONS[0] in tensors:
        convert_to_lsg(settings, tensors, tokenizer, 4096 if positions is None else positions)
    elif positions is not None:
        resize_positions(settings, tensors, positions)
    model = build_model(settings | overrides, tensors, architecture, lsg)
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model.to(device=device, dtype=dtype or torch.float32).eval(), tokenizer


# ------------------------------------------------------------------------------------------------
# Reading


def read_checkpoint(source, revision=None, architecture=None):
    """A checkpoint's settings (a dict), tensors (by name) and tokenizer, which fit together.

    The embeddings' matrix stands under the first of its names, whatever the file calls it.
    """
    files, settings = find_files(source, revision), {}
    for name in ("config.json", "generation_config.json"):  # newer checkpoints have both
        if name in files:
            settings |= read_json(files[name])
            try:
                config = BarthezConfig.from_dict(settings)
            except (TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"{files[name]} does not describe an mBART: {error}") from None
    tensors = read_tensors(files["weights"])
    if "shared.weight" in tensors or "encoder.layer_norm.weight" in tensors:  # saved without a head
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    copies = [tensors.pop(name) for name in tied_names(config) if name in tensors]
    if copies:
        tensors[EMBEDDINGS[0]] = copies[0]
    faults = misfits(lay_out(settings, architecture, GLOBALS in tensors), tensors)
    if faults:
        raise ValueError(f"{files['weights']} does not fit its config.json: {faults}")
    return settings, tensors, BarthezTokenizer(files["sentencepiece.bpe.model"])


def find_files(source, revision):
    """{file name: path}, with the weights, whatever their format, under "weights"."""
    folder = TINY if source == "tiny" else Path(source)
    if not folder.is_dir():
        return hub_files(str(source), revision)
    files = {path.name: path for path in folder.iterdir()}
    for name in ("pytorch_model.bin", "model.safetensors"):  # the last one wins
        if name in files:
            files["weights"] = files[name]
    missing = {"config.json", "weights", "sentencepiece.bpe.model"} - files.keys()
    if missing:
        missing = ", ".join(sorted(missing))
        raise FileNotFoundError(f"{folder} is no checkpoint: it lacks {missing} "
                                "(weights are model.safetensors or pytorch_model.bin)")
    return files


def hub_files(repo_id, revision):
    """The files of a model on the Hub, in its cache, as `find_files` has them.

    A model that is in the cache is used as it is where the Hub cannot be asked for a newer one.
    """
    branch = revision or "main"
    weights = [(branch, "model.safetensors"), (branch, "pytorch_model.bin")]
    if revision is None and repo_id in CONVERSIONS:
        weights.insert(1, (CONVERSIONS[repo_id], "model.safetensors"))

    def first_of(places, find):  # the first that the Hub or the cache has
        for revision, name in places:
            with contextlib.suppress(EntryNotFoundError):
                if path := find(repo_id, name, revision):
                    return path
        raise EntryNotFoundError(f"{repo_id} ({branch}) has none of the files "
                                 + ", ".join(name for _, name in places))

    def find_all(find):
        files = {name: first_of([(branch, name)], find)
                 for name in ("config.json", "sentencepiece.bpe.model")}
        files["weights"] = first_of(weights, find)
        with contextlib.suppress(EntryNotFoundError):  # few models have one
            files["generation_config.json"] = first_of([(branch, "generation_config.json")], find)
        return files

    try:
        in_cache = find_all(cached)
    except EntryNotFoundError:
        return find_all(download)
    try:
        return find_all(functools.partial(download, tries=1))
    except ConnectionError as error:
        say(f"{error} Using {repo_id} from the cache.")
        return in_cache


def read_json(path):
    try:
        settings = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch it again") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no JSON object: fetch it again")
    return settings


def read_tensors(path):
    """All tensors of a file, mapped into memory rather than read. No pickled code is run."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of torch before 1.6 are no archives, and cannot be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(tensor, torch.Tensor) for tensor in dict(tensors).values()):
            raise ValueError("it holds other things than tensors")
        return tensors
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load has no error of its own for a damaged file
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged or no checkpoint ({reason}): fetch it again") from None


# ------------------------------------------------------------------------------------------------
# Converting


def convert_to_lsg(settings, tensors, tokenizer, max_position_embeddings=4096, *, stride=64,
                   random_global_init=False, keep_first_global=False, resize_lsg=False):
    """Make plain BARThez an LSG model, or an LSG model a longer one, in place.

    Global tokens start out as what the model knows already: positions spread over its range, plus
    the embedding of <s> for the first and of <mask> for the others.
    stride: how many positions apart consecutive global tokens stand.
    random_global_init: draw them from the distribution of the token embeddings instead of <mask>.
    keep_first_global, resize_lsg: of an LSG model, keep the first global token, or all.
    """
    if not (GLOBALS in tensors and resize_lsg):
        shared = tensors[EMBEDDINGS[0]]
        words = shared[tokenizer.mask_token_id].repeat(512, 1)
        if random_global_init:
            words = torch.distributions.MultivariateNormal(
                shared.mean(0), torch.cov(shared.T)).sample((512,))
        words[0] = shared[tokenizer.bos_token_id]
        rows = spread_positions(tensors[POSITIONS[0]][2:], stride) + words
        if keep_first_global and GLOBALS in tensors:
            rows[0] = tensors[GLOBALS][0]
        tensors[GLOBALS] = rows
    resize_positions(settings, tensors, max_position_embeddings)


def spread_positions(positions, stride):
    """512 rows of `positions` (n, E), in an order in which neighbours are `stride` apart."""
    n, E = positions.shape
    if n < 512:  # too few to choose from: more are drawn from their distribution
        extra = (512 - n, 1)
        positions = torch.cat([positions, torch.normal(positions.mean(0).repeat(extra),
                                                       positions.std(0).repeat(extra))])
    factor = max(n // 512, 1)
    step = stride // factor
    if step < 1 or 512 % step:
        raise ValueError(f"a stride of {stride} over {n} positions does not divide 512 tokens: "
                         f"choose {factor} times a power of 2, up to {512 * factor}")
    return positions[:512 * factor:factor].view(-1, step, E).transpose(0, 1).reshape(512, E)


def resize_positions(settings, tensors, max_position_embeddings):
    """Repeat the position tables, or cut them, to max_position_embeddings, in place."""
    if max_position_embeddings < 1:
        raise ValueError(f"{max_position_embeddings=}: choose at least 1")
    for name in POSITIONS:
        if name in tensors:
            unused, rows = tensors[name].split([2, len(tensors[name]) - 2])
            copies = -(-max_position_embeddings // len(rows))
            tensors[name] = torch.cat([unused, rows.repeat(copies, 1)[:max_position_embeddings]])
    settings["max_position_embeddings"] = max_position_embeddings


# ------------------------------------------------------------------------------------------------
# Building


def lay_out(settings, architecture, lsg):
    """The model that the settings describe, without memory for its weights."""
    name = architecture or (settings.get("architectures") or ["ForConditionalGeneration"])[0]
    model_class = ARCHITECTURES.get(name.removeprefix("LSG").removeprefix("MBart"))
    if model_class is None:
        raise ValueError(f"unknown architecture {name!r}: choose one of {', '.join(ARCHITECTURES)}")
    with torch.device("meta"), NoInit():
        return model_class(BarthezConfig.from_dict(settings | {"lsg": lsg}))


class NoInit(TorchFunctionMode):
    """Leaves out random initialisation: on no memory it is no use, but torch takes a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs or {})


def weights_of(model):
    """The weights of a model, {name: tensor}, under the names of a model with a head."""
    prefix = "model." if isinstance(model, barthez.BarthezModel) else ""
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


def tied_names(config):
    return EMBEDDINGS if config.tie_word_embeddings else EMBEDDINGS[:3]


def misfits(model, tensors):
    """All that is missing, unexpected or misshapen, in words; "" if everything fits.

    A checkpoint may be one for another task: what only that task needs is left behind, and the
    model's own head may be missing.
    """
    tied, expected = tied_names(model.config), weights_of(model)
    wanted = {EMBEDDINGS[0] if name in tied else name: t for name, t in expected.items()}
    faults = [f"missing {name}" for name in wanted.keys() - tensors.keys()
              if not name.startswith(HEADS)]
    faults += [f"unexpected {name}" for name in tensors.keys() - wanted.keys()
               if not (name.startswith(HEADS) or name == GLOBALS
                       or name.startswith("model.encoder.") and POSITIONS[0] not in wanted)]
    faults += [f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(t.shape)}"
               for name, t in wanted.items() if name in tensors and tensors[name].shape != t.shape]
    faults += [f"{name} is {t.dtype}" for name, t in tensors.items() if not t.is_floating_point()]
    return "; ".join(sorted(faults))


def build_model(settings, tensors, architecture=None, lsg=True):
    """The model that the settings describe, whose parameters are the tensors of the file.

    A head that the file lacks is initialised, with a warning: it needs training.
    """
    model = lay_out(settings, architecture, lsg)
    if faults := misfits(model, tensors):
        raise ValueError(f"the weights do not fit the configuration: {faults}")
    tied, expected = tied_names(model.config), weights_of(model)
    shared = torch.nn.Parameter(tensors[EMBEDDINGS[0]])
    found = {name: shared if name in tied else tensors.get(name) for name in expected}
    new = [name for name in found if found[name] is None]
    found |= {name: shared.new_zeros(expected[name].shape).detach() for name in new}
    model.load_state_dict(dict(zip(model.state_dict(), found.values())), assign=True)
    for name in sorted({name.partition(".")[0] for name in new} - {"final_logits_bias"}):
        warnings.warn(f"{name} is not in the checkpoint: it is initialised, and needs training")
        init_weights(model.get_submodule(name), model.config.init_std)
    return model


def save_model(model, tokenizer, folder):
    """Save a checkpoint in the published layout, which the original's code reads as well."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    settings = {key: value for key, value in asdict(config).items()
                if key != "lsg" and value is not None and (config.lsg or key not in LSG_KEYS)}
    suffix = next(suffix for suffix, kind in ARCHITECTURES.items() if type(model) is kind)
    settings |= {
        "architectures": [("LSG" if config.lsg else "") + "MBart" + suffix], "model_type": "mbart",
        "is_encoder_decoder": suffix != "ForCausalLM", "is_decoder": suffix == "ForCausalLM",
        "num_hidden_layers": config.encoder_layers, "num_labels": config.num_labels,
        "label2id": {label: i for i, label in config.id2label.items()},
        "forced_eos_token_id": config.forced_eos_token_id,
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    if config.lsg:
        settings |= {"base_model_prefix": "lsg", "sparsity_type": config.sparsity_type}
        settings["auto_map"] = {  # whose code is the original's, on the Hub
            "AutoModel" + kind.removeprefix("Model").replace("ConditionalGeneration", "Seq2SeqLM"):
            f"ccdv/lsg-barthez-4096--modeling_lsg_mbart.LSGMBart{kind}" for kind in ARCHITECTURES}

    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    names = [name for name in weights_of(model) if name in tied_names(config)]
    for name in sorted(names, key=EMBEDDINGS.index)[1:]:  # one copy is enough
        del tensors[name if suffix != "Model" else name.removeprefix("model.")]
    written = folder / "model.safetensors.incomplete"
    save_file(tensors, written, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", written)  # save_file lets nobody else read it
    os.replace(written, folder / "model.safetensors")  # the model may be mapped from that very file
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "model_max_length": config.max_position_embeddings,
        "tokenizer_class": "BarthezTokenizer"}, indent=2) + "\n")
    target = folder / "sentencepiece.bpe.model"
    if tokenizer.model_file.resolve() != target.resolve():
        shutil.copyfile(tokenizer.model_file, target)


# ------------------------------------------------------------------------------------------------
# The Hub
#
# Its download protocol, with the standard library alone. The cache is laid out as the official
# client does, so that each finds what the other fetched:
#
#     models--owner--name/blobs/<etag>        the bytes; the etag is also their checksum
#     models--owner--name/snapshots/<commit>/config.json -> ../../blobs/<etag>
#     models--owner--name/refs/main           the commit that `main` was when last asked
#     .locks/models--owner--name/<etag>.lock  held by the process that fetches this blob

SETTINGS = {  # environment variables, read at each call, and what holds if one is not set
    "HF_ENDPOINT": "https://huggingface.co", "HF_HUB_OFFLINE": "", "HF_TOKEN": "",
    "XDG_CACHE_HOME": "~/.cache", "HF_HOME": "$XDG_CACHE_HOME/huggingface",
    "HF_HUB_CACHE": "$HF_HOME/hub", "HF_TOKEN_PATH": "$HF_HOME/token",
    "HF_HUB_ETAG_TIMEOUT": "10", "HF_HUB_DOWNLOAD_TIMEOUT": "10",  # seconds without a byte
    "HF_HUB_DISABLE_PROGRESS_BARS": "",
}
TRIES = 5  # failures in a row, without a byte gained, before we give up
PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds: the first pause doubles with each failure in a row
LARGE = 10_000_000  # bytes from which a download is announced and its progress shown
COMMIT = re.compile(r"[0-9a-f]{40}")
REPO_ID = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]{0,94}\w)?(/\w([\w.-]{0,94}\w)?)?", re.ASCII)
ENDPOINT = re.compile(r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d{1,5})?(/[\w.~-]+)*", re.ASCII)
LOOPBACK = re.compile(r"https?://(localhost|127(\.\d+){3}|\[::1\])([:/]|$)")


class EntryNotFoundError(FileNotFoundError):
    """The revision lacks this file (offline: the cache does); it may have another."""


class Transient(Exception):
    """(reason, seconds): a failure worth another try, after the pause that the server asks for."""


def download(repo_id: str, filename: str, revision: str = "main", tries: int = TRIES) -> Path:
    """The path of a model's file in the Hub cache, to where it is fetched first if need be.

    `revision` is a branch, a tag, `refs/pr/2` or a commit; the Hub is not asked for a cached file
    of a full commit. Where asking or fetching fails, a cached copy is better than none, and it is
    used at once: the Hub is asked `tries` times only if there is none.

    Raises EntryNotFoundError if the revision lacks the file, FileNotFoundError if the repository
    or the revision is missing, PermissionError if it is gated, private or the token refused,
    ConnectionError if the network fails, OSError if the cache cannot be written, ValueError for
    a name or a setting that cannot be right: one line each, which says what to do.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise ValueError(f"{repo_id!r} is no folder, and no model's name on the Hub (owner/name).")
    for name in (filename, revision):
        if {"", ".", ".."} & set(name.split("/")) or re.search(r'[\x00-\x1f\x7f\\:*?"<>|]', name):
            raise ValueError(f"{name!r} cannot be a file or a revision of a model on the Hub.")
    what, cache = f"{filename} of {repo_id} ({revision})", setting("HF_HUB_CACHE")
    have, offline = cached(repo_id, filename, revision), switched_on("HF_HUB_OFFLINE")
    if have and (offline or COMMIT.fullmatch(revision)):
        return have
    if offline:
        raise EntryNotFoundError(f"{what} is not in {cache}: unset HF_HUB_OFFLINE to fetch it.")
    try:
        return refresh(repo_id, filename, revision, what, tries=1 if have else tries)
    except OSError as error:
        if error.errno is not None:  # the system's; our own carry a message and no number
            error = OSError(f"Cannot write {what} to {cache}: {error.strerror}. Free some space, "
                            "or set HF_HUB_CACHE to a folder that you can write to.")
        if not have or isinstance(error, EntryNotFoundError):
            raise error
        say(f"{error} Using the copy in the cache.")
        return have


def cached(repo_id: str, filename: str, revision: str = "main") -> Path | None:
    """The file if it is in the cache, without asking the Hub whether the revision has moved."""
    folder, commit = repo_folder(repo_id), revision
    with contextlib.suppress(OSError):
        if not COMMIT.fullmatch(revision):
            commit = (folder / "refs" / revision).read_text(errors="replace").strip()
        path = folder / "snapshots" / commit / filename
        if COMMIT.fullmatch(commit) and path.is_file():
            return path
    return None


def refresh(repo_id: str, filename: str, revision: str, what: str, tries: int) -> Path:
    """Asks which commit and which bytes are meant, and brings into the cache what it lacks."""
    url = f"/{repo_id}/resolve/{{}}/{quote(filename)}"
    commit, etag, size = persist(lambda: metadata(url.format(quote(revision, "")), what), tries)
    if COMMIT.fullmatch(revision) and commit != revision:
        raise trouble(f"The Hub answered with commit {commit} when asked for {what}")
    folder = repo_folder(repo_id)
    blob, pointer = folder / "blobs" / etag, folder / "snapshots" / commit / filename
    blob.parent.mkdir(parents=True, exist_ok=True)
    if not pointer.is_file():
        with locked(folder.parent / ".locks" / folder.name / f"{etag}.lock") as alone:
            if not blob.is_file():
                if size >= LARGE:
                    say(f"Downloading {what}: {size / 1e6:,.0f} MB to {blob.parent}")
                # Without locks, under a name of our own: two writers would spoil each other's.
                partial = blob.with_name(f"{etag}{'' if alone else uuid.uuid4()}.incomplete")
                partial.touch()
                try:  # by commit from here on: a branch may move between the two requests
                    persist(lambda: append(url.format(commit), what, partial, etag, size), TRIES,
                            gained=lambda: os.path.getsize(partial))
                    os.replace(partial, blob)
                finally:
                    if not alone:  # nobody would ever resume it
                        partial.unlink(missing_ok=True)
            with in_one_step(pointer, blob.parent) as name:
                try:
                    os.symlink(os.path.relpath(blob, pointer.parent), name)
                except OSError:  # Windows grants symlinks to few, and some disks know none
                    shutil.copyfile(blob, name)
    ref = folder / "refs" / revision
    if commit != revision and not (ref.is_file() and ref.read_bytes() == commit.encode()):
        with in_one_step(ref, blob.parent) as name:
            name.write_text(commit)
    return pointer


def metadata(url: str, what: str) -> tuple[str, str, int]:
    """The file's commit, its etag and its size in bytes."""
    with ask("HEAD", url, what) as answer:
        headers = answer.headers
    etag = (headers.get("X-Linked-Etag") or headers.get("ETag", "")).removeprefix("W/").strip('"')
    size = headers.get("X-Linked-Size") or answer.status == 200 and headers.get("Content-Length")
    commit = headers.get("X-Repo-Commit", "")
    # Commit and etag become names in the cache, and the etag is the checksum: nothing else will do.
    if not (COMMIT.fullmatch(commit) and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag)
            and re.fullmatch(r"[0-9]{1,15}", size or "")):
        raise trouble(f"{urlsplit(answer.url).hostname} does not answer as the Hub does")
    return commit, etag, int(size)


def append(url: str, what: str, partial: Path, etag: str, size: int) -> None:
    """One request for the bytes that `partial` lacks; returns once it is complete and verified."""
    start = os.path.getsize(partial)
    if start != size:
        with ask("GET", url, what, **({"Range": f"bytes={start}-"} if start else {})) as answer:
            sent = answer.headers.get("Content-Range", "")
            if answer.status == 416 or answer.status == 206 and f"bytes {start}-" not in sent:
                os.truncate(partial, 0)
                raise Transient("The server cannot resume the download", 0)
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise trouble(f"{what} came compressed, though nobody asked for it")
            if answer.headers.get_content_type() == "text/html":
                raise trouble(f"A web page (a login?) came instead of {what}")
            with open(partial, "ab" if answer.status == 206 else "wb") as file:
                for block in body(answer, file.tell(), size):
                    file.write(block)
                    if file.tell() > size:  # an endless answer must not fill the disk
                        break
    length = os.path.getsize(partial)
    if length < size:
        raise Transient(f"The connection closed at {length:,} of {size:,} bytes", 0)
    # sha256, or git's own sum for the small files that are kept in git itself
    digest = hashlib.sha256() if len(etag) == 64 else hashlib.sha1(b"blob %d\0" % size)
    with open(partial, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != etag or length != size:
        os.truncate(partial, 0)
        if start:  # then what was left from before may be at fault: once more, from the beginning
            raise Transient(f"The parts of {what} do not fit together", 0)
        raise trouble(f"What came as {what} has a wrong size or checksum and was deleted")


def body(answer: HTTPResponse, done: int, size: int):
    """Yields the answer's bytes, with a line of progress where stderr is a terminal."""
    quiet = size < LARGE or switched_on("HF_HUB_DISABLE_PROGRESS_BARS") or not sys.stderr.isatty()
    first, begun, shown = done, time.monotonic(), 0.0
    try:
        while block := answer.read1(1 << 18):
            yield block
            done, now = done + len(block), time.monotonic()
            if not quiet and (now - shown > 0.2 or done >= size):
                shown, rate = now, (done - first) / max(now - begun, 1e-3)  # bytes a second
                left = int((size - done) / rate)
                print(f"\r{done / 1e6:8,.1f} of {size / 1e6:,.1f} MB, {rate / 1e6:.1f} MB/s, "
                      f"{left // 60}:{left % 60:02} left ", end="", file=sys.stderr, flush=True)
    except (OSError, HTTPException) as error:
        # Only the network raises in here: a full disk does where the block is written.
        raise Transient(f"The download broke off ({type(error).__name__})", 0) from error
    finally:
        if not quiet:
            say("")


def persist(action, tries: int, gained=lambda: 0):
    """Calls `action` until it gets through or has failed `tries` times without gaining a byte."""
    failures, most = 0, gained()
    while True:
        try:
            return action()
        except Transient as fault:
            (reason, wait), now = fault.args, gained()
            failures, most = (1, now) if now > most else (failures + 1, most)
            if failures >= tries:
                raise trouble(reason) from fault
            pause = min(max(wait, PAUSE * 2 ** (failures - 1)), LONGEST_PAUSE)
            say(f"{reason}: trying again in {pause:.0f} s.")
            time.sleep(pause)


def ask(method: str, path: str, what: str, **headers: str) -> HTTPResponse:
    """One request, of which only useful answers come back: 2xx, 416, and to a HEAD also the
    redirect that describes a large file.

    Redirects are followed by hand: urllib would hand the token to every host on the way, and
    turn a redirected HEAD into a GET.
    """
    home, token = hub()
    timeout = seconds("HF_HUB_ETAG_TIMEOUT" if method == "HEAD" else "HF_HUB_DOWNLOAD_TIMEOUT")
    headers.update({"User-Agent": "lsg-barthez", "Accept-Encoding": "identity"})
    url, host, target = home + path, home, ""
    for _ in range(10):
        try:
            url = urljoin(url, target)
            host, at_home = urlsplit(url).hostname or host, urljoin(url, "/") == urljoin(home, "/")
            request = Request(url, headers=headers, method=method)
            if token and at_home:
                request.add_header("Authorization", f"Bearer {token}")
            # A bare opener follows no redirect, opens no local file and raises for no status. A
            # request to this very machine must not leave it through a proxy.
            opener, proxies = OpenerDirector(), {} if LOOPBACK.match(url) else None
            scheme = HTTPSHandler if url.startswith("https:") else HTTPHandler
            for part in scheme(), ProxyHandler(proxies), UnknownHandler():
                opener.add_handler(part)
            answer = opener.open(request, timeout=timeout)
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", type(error).__name__)  # never the address: signed
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise trouble(f"The certificate of {host} is not valid (is this computer's clock "
                              f"right?): {reason.verify_message}") from error
            if isinstance(reason, socket.gaierror):  # most often, there is no network at all
                raise trouble(f"The address of {host} is not to be had") from error
            raise Transient(f"{host} cannot be reached ({reason})", 0) from error
        target, status = answer.headers.get("Location"), answer.status
        described = method == "HEAD" and answer.headers.get("X-Linked-Etag")
        if status < 300 or status == 416 or status < 400 and described:
            return answer
        answer.close()
        if status in (408, 429, 500, 502, 503, 504):
            reason = f"{host} answered HTTP {status} {HTTPStatus(status).phrase}"
            raise Transient(reason, retry_after(answer.headers))
        if status >= 400 or not target:
            raise refusal(answer, what, home + path.partition("/resolve/")[0] if at_home else "")
    raise trouble(f"{host} redirects in circles")


def refusal(answer: HTTPResponse, what: str, page: str) -> OSError:
    """The error that a 4xx means. `page` is the model's, "" if it is not the Hub that answers."""
    code, status = answer.headers.get("X-Error-Code"), answer.status
    if "Invalid credentials" in answer.headers.get("X-Error-Message", ""):
        code = "BadToken"
    absent = (f"{page} does not exist, or is private or gated: check its name, or set HF_TOKEN to "
              "a token that may read it.")
    kind, text = {
        "EntryNotFound": (EntryNotFoundError, f"There is no {what}: see {page}/tree/main"),
        "RevisionNotFound": (FileNotFoundError, f"No such revision: {what}. See {page}/tree/main"),
        "RepoNotFound": (FileNotFoundError, absent),
        "GatedRepo": (PermissionError, f"{page} is gated: accept its terms there, set HF_TOKEN."),
        "BadToken": (PermissionError, "The Hub rejects your token: renew or remove it (HF_TOKEN)."),
    }.get(code) or {
        401: (PermissionError, absent),
        403: (PermissionError, f"{page} may not be read with this token, or a proxy forbids it."),
        404: (FileNotFoundError, absent),
    }.get(status, (None, ""))
    if page and kind:
        return kind(text)
    return trouble(f"{urlsplit(answer.url).hostname} answered HTTP {status} for {what}")


def trouble(reason: str) -> ConnectionError:
    return ConnectionError(f"{' '.join(reason.split())}. Check the network, HF_ENDPOINT and any "
                           "proxy, then try again.")


def retry_after(headers) -> float:
    """The pause asked for, in seconds; a date is compared with the server's clock, not ours."""
    until = headers.get("Retry-After", "")
    with contextlib.suppress(TypeError, ValueError):
        if until.isdecimal():
            return float(until)
        now = parsedate_to_datetime(headers["Date"])
        return (parsedate_to_datetime(until) - now).total_seconds()
    return 0.0


def hub() -> tuple[str, str]:
    """The Hub's address, and the user's token or ""."""
    home, token = setting("HF_ENDPOINT").rstrip("/"), setting("HF_TOKEN")
    if not ENDPOINT.fullmatch(home):
        raise ValueError("HF_ENDPOINT is not an address such as https://huggingface.co")
    with contextlib.suppress(OSError):  # most users have no token
        token = (token or Path(setting("HF_TOKEN_PATH")).read_text(errors="replace")).strip()
    if not re.fullmatch(r"[!-~]*", token):  # http.client would print it in its complaint
        raise ValueError("The token (HF_TOKEN, or its file) has characters that no token has.")
    if token and home.startswith("http:") and not LOOPBACK.match(home):
        raise ValueError(f"The token is never sent unencrypted: let HF_ENDPOINT begin with https, "
                         f"unlike {home}, or remove HF_TOKEN and the token's file.")
    return home, token


def setting(variable: str) -> str:
    default = re.sub(r"\$(\w+)", lambda other: setting(other[1]), SETTINGS[variable])
    return os.path.expandvars(os.path.expanduser(os.environ.get(variable) or default))


def switched_on(variable: str) -> bool:
    return setting(variable).upper() in ("1", "ON", "YES", "TRUE")


def seconds(variable: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(setting(variable))) < 1e6:
            return value
    raise ValueError(f"{variable} must be a number of seconds, such as 10.")


def repo_folder(repo_id: str) -> Path:
    return Path(setting("HF_HUB_CACHE"), "models--" + repo_id.replace("/", "--"))


def say(text: str) -> None:
    print(text, file=sys.stderr)


@contextlib.contextmanager
def locked(path: Path):
    """Holds the lock that the official client holds too; yields whether there are locks here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            import fcntl  # not on Windows
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("Another process is downloading this file: waiting for it.")
                fcntl.flock(file, fcntl.LOCK_EX)
            works = True
        except (ImportError, OSError):  # some network drives have no locks
            works = False
        yield works


@contextlib.contextmanager
def in_one_step(path: Path, scratch: Path):
    """Yields a name in `scratch` to write to, which becomes `path` once that has succeeded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = scratch / f"{uuid.uuid4()}.incomplete"
    try:
        yield name
        os.replace(name, path)
    finally:
        name.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------
# The command line


def main():
    parser = argparse.ArgumentParser(
        description="Convert BARThez to LSG, or lengthen an LSG model, and save it as a folder.")
    parser.add_argument("source", help="folder or Hub id")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--revision", help="branch, tag, commit or refs/pr/N on the Hub")
    parser.add_argument("--architecture", help=f"one of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--max-position-embeddings", type=int, default=4096, metavar="N")
    parser.add_argument("--global-positional-stride", type=int, default=64, metavar="N",
                        help="how many positions apart consecutive global tokens stand")
    parser.add_argument("--random-global-init", action="store_true",
                        help="draw the global tokens from the distribution of the words")
    parser.add_argument("--keep-first-global", action="store_true",
                        help="of an LSG model, keep the first global token")
    parser.add_argument("--resize-lsg", action="store_true",
                        help="of an LSG model, keep all global tokens: only change its length")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--seed", type=int, default=123)
    for key in LSG_KEYS:
        parser.add_argument("--" + key.replace("_", "-"), type=json.loads if key != "sparsity_type"
                            else str, help="LSG parameter, kept in config.json")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    settings, tensors, tokenizer = read_checkpoint(arguments.source, arguments.revision)
    convert_to_lsg(settings, tensors, tokenizer, arguments.max_position_embeddings,
                   stride=arguments.global_positional_stride, resize_lsg=arguments.resize_lsg,
                   random_global_init=arguments.random_global_init,
                   keep_first_global=arguments.keep_first_global)
    settings |= {key: value for key in LSG_KEYS if (value := getattr(arguments, key)) is not None}
    model = build_model(settings, tensors, arguments.architecture)
    save_model(model.to(getattr(torch, arguments.dtype)), tokenizer, arguments.output)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"load_weights.py: {error}", file=sys.stderr)
        sys.exit(2)
