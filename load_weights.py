"""From a checkpoint to a model: its files (folder or Hub), its tensors, its conversion to LSG.

    model, tokenizer = load_model("moussaKam/barthez-orangesum-abstract")
    python load_weights.py moussaKam/barthez --output my-lsg-barthez

A checkpoint is config.json, model.safetensors (or pytorch_model.bin) and sentencepiece.bpe.model.
The conversion of BARThez to LSG follows lsg-converter 0.1.9, conversion_utils.py and
mbart/convert_mbart_checkpoint.py.
"""

import argparse
import json
import os
import shutil
import sys
import warnings
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

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
    lsg: False gives full attention. With LSG, a plain BARThez is converted on the way in, to
        4,096 positions unless max_position_embeddings says otherwise.
    overrides: config keys, such as sparsity_type="pooling" or num_global_tokens=16.
    Raises ValueError or OSError with what is wrong and what to do.
    """
    settings, tensors, tokenizer = read_checkpoint(source, revision)
    overrides = {ALIASES.get(key, key): value for key, value in overrides.items()}
    unknown = overrides.keys() - {field.name for field in fields(BarthezConfig)} - {"num_labels"}
    if unknown:
        raise ValueError(f"no key of config.json: {', '.join(sorted(unknown))}")
    positions = overrides.get("max_position_embeddings")
    if lsg and GLOBALS not in tensors and POSITIONS[0] in tensors:
        convert_to_lsg(settings, tensors, tokenizer, positions or 4096)
    elif positions:
        resize_positions(settings, tensors, positions)
    model = build_model(settings | overrides, tensors, architecture, lsg)
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model.to(device=device, dtype=dtype).eval(), tokenizer


# ------------------------------------------------------------------------------------------------
# Reading


def read_checkpoint(source, revision=None):
    """The settings (dict), tensors (dict by name) and tokenizer of a checkpoint."""
    files = find_files(source, revision)
    settings = read_json(files["config.json"])
    if "generation_config.json" in files:  # where newer checkpoints keep their settings of generate
        settings |= read_json(files["generation_config.json"])
    try:
        BarthezConfig.from_dict(settings)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{files['config.json']} is not an mBART's: {error}") from None
    tensors = read_tensors(files["weights"])
    if "shared.weight" in tensors or "encoder.layer_norm.weight" in tensors:  # saved without a head
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
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
        raise FileNotFoundError(f"{folder} is no checkpoint: it lacks {', '.join(sorted(missing))} "
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
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of torch before 1.6 are no archives, and cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load has no error of its own for a damaged file
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason}): fetch it again") from None


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
        shared = next(tensors[name] for name in EMBEDDINGS if name in tensors)
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
        raise ValueError(f"a stride of {stride} over {n} positions leaves {step} between 512 global "
                         f"tokens: choose {factor} times a power of 2, up to {512 * factor}")
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


def build_model(settings, tensors, architecture=None, lsg=True):
    """The model that the settings describe, with these tensors for weights.

    The module is laid out without memory; the tensors of the file become its parameters as they
    are. A head that the file lacks is initialised, with a warning: it needs training.
    """
    name = architecture or (settings.get("architectures") or ["ForConditionalGeneration"])[0]
    model_class = ARCHITECTURES.get(name.removeprefix("LSG").removeprefix("MBart"))
    if model_class is None:
        raise ValueError(f"unknown architecture {name!r}: choose one of {', '.join(ARCHITECTURES)}")
    with torch.device("meta"):
        model = model_class(BarthezConfig.from_dict(settings | {"lsg": lsg}))
    prefix = "model." if model_class is barthez.BarthezModel else ""
    expected = {prefix + name: tensor for name, tensor in model.state_dict().items()}

    tied = EMBEDDINGS if model.config.tie_word_embeddings else EMBEDDINGS[:3]
    embedding = next((torch.nn.Parameter(tensors[name]) for name in tied if name in tensors), None)
    found = {name: tensor for name, tensor in tensors.items() if name in expected}
    found |= {name: embedding for name in tied if name in expected and embedding is not None}
    # A checkpoint for another task: what only that task needs is left behind.
    spare = {name for name in tensors if name.startswith(HEADS + EMBEDDINGS) or
             name == GLOBALS or "model.encoder.layers.0.fc1.weight" not in expected}
    new = {name: tensor for name, tensor in expected.items()
           if name not in found and name.startswith(HEADS)}
    faults = [f"missing {name}" for name in expected.keys() - found.keys() - new.keys()]
    faults += [f"unexpected {name}" for name in tensors.keys() - expected.keys() - spare]
    faults += [f"{name} has shape {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
               for name in found if found[name].shape != expected[name].shape]
    faults += [f"{name} is {tensor.dtype}" for name, tensor in found.items()
               if not tensor.is_floating_point()]
    if faults:
        raise ValueError("the weights do not fit config.json: " + "; ".join(sorted(faults)))

    found |= {name: torch.zeros(tensor.shape) for name, tensor in new.items()}
    model.load_state_dict({name.removeprefix(prefix): found[name] for name in expected}, assign=True)
    for name in {name.partition(".")[0] for name in new} - {"final_logits_bias"}:
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
        settings |= {"base_model_prefix": "lsg", "sparsity_type": config.sparsity_type, "auto_map": {
            "AutoModel" + kind.removeprefix("Model").replace("ConditionalGeneration", "Seq2SeqLM"):
            f"modeling_lsg_mbart.LSGMBart{kind}" for kind in ARCHITECTURES}}

    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    first = "shared.weight" if suffix == "Model" else "model.shared.weight"
    tied = EMBEDDINGS if config.tie_word_embeddings else EMBEDDINGS[:3]
    for name in tied if first in tensors else tied[2:3]:
        if name != first:
            tensors.pop(name if first.startswith("model.") else name.removeprefix("model."), None)
    written = folder / "model.safetensors.incomplete"
    save_file(tensors, written, metadata={"format": "pt"})
    os.replace(written, folder / "model.safetensors")  # the model may be mapped from that very file
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "model_max_length": config.max_position_embeddings,
        "tokenizer_class": "BarthezTokenizer"}, indent=2) + "\n")
    target = folder / "sentencepiece.bpe.model"
    if tokenizer.model_file.resolve() != target.resolve():
        shutil.copyfile(tokenizer.model_file, target)


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
    save_model(build_model(settings, tensors, arguments.architecture), tokenizer, arguments.output)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"load_weights.py: {error}", file=sys.stderr)
        sys.exit(2)
