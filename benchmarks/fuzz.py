"""Thousands of damaged checkpoints and odd command lines, and a count of how they end.

    python benchmarks/fuzz.py --seed 3

Each case is a forked process, which depends on the seed and its number alone. Needs Linux.
Good ends are ok (exit status 0), clean (a message and status 2, or 130 after Ctrl-C) and memory (a
message that there is not enough). Faults are traceback, signal (a crash), hang (no end within 20
seconds) and lost (a model in a folder of the output cannot be loaded any more).
"""

import argparse
import json
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import load, save

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from barthez import ARCHITECTURES, BEAM_SETTINGS, load_model, save_model
from load_weights import EMBEDDINGS, LSG_KEYS, run

FAULTS = "traceback", "signal", "hang", "lost"
PLAIN = ROOT / "tests" / "goldens" / "plain"  # a small model
DAMAGED = Path("DAMAGED")  # a checkpoint in the folder of a case
WEIGHTS = DAMAGED / "model.safetensors"
ODD = [None, True, False, -1, 0, 1, 2, 0.5, 7, 181, 10**4, 10**6, 10**9, 10**30, 2**31, 2**63,
       1e308, float("nan"), float("inf"), "", "x", "24", "lsh", "never", "F16", "I64", "BOOL",
       "é\ud800", "a" * 10**4, [], [1], [0], [24, 181], ["x", None], {}, {"0": "a"}, [[[[]]]]]
KEYS = [*LSG_KEYS, *BEAM_SETTINGS, "id2label", "num_labels", "problem_type", "architectures",
        "tie_word_embeddings", "vocab_size", "max_position_embeddings", "__metadata__", "x"]
NAMES = [b"ctorch\nFloatStorage\n", b"ctorch\nQInt8Storage\n", b"ccollections\nOrderedDict\n",
         b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_sparse_tensor\n"]
PAIR = '{"document": "Le ministre est à Paris. Il y a été reçu.", "summary": "Il y est."}\n'
FILES = {"stdin": PAIR, "stderr": "", "PAIRS": PAIR * 8, "BROKEN": PAIR + "{", "BAD": "a\0"}
COMMANDS = ["barthez.py --model OLDER --max-length 9 --summarize PAIRS -",
            "barthez.py --model OLDER --fill-mask Il<mask>",
            "barthez.py --model ../../bases/ForSequenceClassification --classify Il",
            "load_weights.py OLDER --output OUT --max-position-embeddings 700",
            "load_weights.py OLDER --output OLDER",
            "train.py --model OLDER --train PAIRS --validation PAIRS --steps 2 --output OUT",
            "train.py --model OLDER --train PAIRS --steps 2 --output OLDER --start-over",
            "train.py --model OLDER --evaluate PAIRS --set max_length=9",
            "docs/figures.py --output ."]
VALUES = ["0", "1", "-1", "2", "3", "8", "0.5", "1e308", "nan", "9" * 11, "", "x", "é", "\udcff",
          "=", "a/b", "/dev/null/x", ".", "..", "-", "--", "meta", "tiny", "OUT", "OLDER", *FILES]
SURROUNDINGS = ["nothing"] * 10 + ["memory", "disk", "Ctrl-C"] * 2 + [
    "stdin closed", "stdout closed", "stderr closed", "stdout full", "stderr full"]


def mutate_json(rng, value):
    """A JSON value with a part of another kind or magnitude, or without it."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        value = value.copy()
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value[key] = mutate_json(rng, value[key])
        if rng.random() < 0.1:
            del value[key]
        return value
    near = [value + 1, value - 1, -value, value / 2] if isinstance(value, int) else [[value]]
    return rng.choice(rng.choice([near, ODD]))


def mutate_bytes(rng, data):
    """Bytes, such as the opcodes of a pickle, of which some are replaced, removed or added."""
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        place = rng.randrange(min(len(data), rng.choice([8, 64, 600, 25_000, 10**9])) + 1)
        place = rng.choice([place, place, place, len(data) - place])
        new = rng.choice([rng.randbytes(1)] * 9 + NAMES) * rng.choice([1, 1, 1, 1, 0, 1000])
        end = place + rng.choice([len(new)] * 6 + [0, 1, 10, place])
        data = data[:place] + new + data[end:]
        if rng.random() < 0.2:
            data = data.replace(rng.choice(NAMES), rng.choice(NAMES))
    return data


def damage_config(rng):
    config = json.loads((DAMAGED / "config.json").read_bytes())
    for _ in range(rng.choice([0, 0, 1, 3])):
        config[rng.choice(KEYS)] = rng.choice(ODD)
    text = json.dumps(mutate_json(rng, config))
    odd = ["[" * 10**5, '{"a":' * 10**5, "\ufeff" + text, text.replace("1", "1" * 5000)]
    path = DAMAGED / rng.choice(["config.json"] * 4 + ["generation_config.json"])
    path.write_text(rng.choice([text] * 40 + odd), rng.choice(["utf-8"] * 30 + ["utf-16"]))


def damage_header(rng):
    data = WEIGHTS.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(mutate_json(rng, json.loads(data[8:8 + size]))).encode()
    WEIGHTS.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size:])


def damage_tensors(rng, changes=1):
    """Tensors of other names, shapes, types and values, or that share memory, in three formats."""
    tensors = load(WEIGHTS.read_bytes())
    embedding = [name for name in tensors if name.endswith("shared.weight")]  # the tied matrix
    for name in rng.choices([*tensors, *embedding * 20], k=changes):
        x = tensors[name]
        other = tensors[rng.choice(list(tensors))]
        others = [x[None], x[0], x[1:], x[:0], x.flatten(), x[:1].expand(x.shape), x / 0,
                  x * 1e30, x.long(), x.double(), x.to(torch.float8_e4m3fn), other, x]
        if rng.random() < 0.3:
            del tensors[name]
            name = rng.choice([name + "x", "model." + name, name[6:], *EMBEDDINGS])
        tensors[name] = rng.choice(others)
    if rng.random() < 0.5:
        WEIGHTS.write_bytes(save({name: x.contiguous().clone() for name, x in tensors.items()}))
    else:
        pickle = WEIGHTS.rename(DAMAGED / "pytorch_model.bin")
        torch.save(tensors, pickle, _use_new_zipfile_serialization=rng.random() < 0.5)


def damage_file(rng):
    damage_tensors(rng, changes=0)
    paths = sorted(DAMAGED.iterdir(), key=os.path.getsize)
    path = rng.choice(paths + paths[-2:] * 2)  # mostly the vocabulary or the weights
    other = Path("../../bases", rng.choice(list(ARCHITECTURES)), path.name)
    if other.exists() and rng.random() < 0.2:
        shutil.copy(other, path)
    else:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))


def checkpoint_case(rng):
    """Load a damaged checkpoint, use it and save it over an older one, perhaps on a full disk."""
    damage = rng.choice([damage_config, damage_tensors, damage_file] * 3 + [damage_header])

    def program():
        shutil.copytree(Path("../../bases", rng.choice(["plain", *ARCHITECTURES])), DAMAGED)
        damage(rng)
        model, tokenizer = load_model(DAMAGED, lsg=rng.random() < 0.5)
        batch = tokenizer(["Il est allé à Paris.", "Le ministre <mask> ."], padding=True)
        with torch.inference_mode():
            model.generate(**batch, max_length=6) if hasattr(model, "generate") else model(**batch)
        limit(rng, rng.choice(["nothing", "disk"]))
        save_model(model, tokenizer, "OLDER")
    return damage.__name__, "nothing", lambda: run(program)


def command_case(rng):
    """Run one of COMMANDS with more options, in a process that may be limited."""
    words = rng.choice(COMMANDS).split()
    options = [x for x in (ROOT / words[0]).read_text("utf-8").split('"') if x[:2] == "--"]
    for _ in range(rng.choice([0, 0, 1, 1, 1, 2, 3])):
        settings = [f"{rng.choice(KEYS)}={json.dumps(rng.choice(ODD))}" for _ in range(20)]
        words.append(rng.choice(options))
        words += rng.choices(VALUES + settings, k=rng.choice([0, 1, 1, 1, 1, 2]))

    def program():
        sys.argv = [str(ROOT / words[0]), *words[1:]]
        runpy.run_path(sys.argv[0], run_name="__main__")
    return " ".join(words), rng.choice(SURROUNDINGS), program


def end_of(case):
    """(title, outcome, text on stderr) of (checkpoint_case or command_case, seed, number)."""
    make_case, seed, number = case
    rng = random.Random(f"{make_case.__name__} {seed} {number}")
    title, surrounding, program = make_case(rng)
    folder = Path(f"{make_case.__name__}_{number}", "work")  # in another one: .. is among VALUES
    shutil.copytree("template", folder)
    status = execute(program, rng, folder, surrounding)
    printed = (folder / "stderr").read_text("utf-8", "backslashreplace")
    outcomes = {0: "ok", 2: "clean", 130: "clean", -signal.SIGALRM: "hang"}
    outcome = outcomes.get(status, "signal" if status < 0 else "traceback")
    if "not enough memory" in printed or "error return without exception set" in printed:
        outcome = "memory"
    for path in folder.glob("O*/config.json"):  # of OLDER and OUT
        new = path.stat().st_mtime > (PLAIN / "config.json").stat().st_mtime
        if new and execute(lambda: load_model(path.parent.name, lsg=False), rng, folder, "nothing"):
            outcome, printed = "lost", (folder / "stderr").read_text("utf-8", "replace")
    shutil.rmtree(folder.parent)
    return f"{title} ({surrounding})", outcome, printed[-1000:]


def execute(program, rng, folder, surrounding):
    """The exit status of a forked process that calls a function as Python runs a program."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        signal.alarm(20)
        os.chdir(folder)
        for number, name in enumerate(["stdin", "stdout", "stderr"]):
            path = "/dev/full" if surrounding == name + " full" else name
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
            setattr(sys, name, open(number, "w" if number else "r", 1, "utf-8", closefd=False))
            if surrounding == name + " closed":
                os.close(number)
                setattr(sys, name, None)
        limit(rng, surrounding)
        program()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def limit(rng, surrounding):
    """Limit the memory or the files of this process, or interrupt it soon."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    free = rng.choice([3 * 10**7, 10**8, 4 * 10**8]) if surrounding == "memory" else 3 * 10**9
    resource.setrlimit(resource.RLIMIT_AS, (used + free, -1))
    if surrounding == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (rng.choice([0, 500, 10**5, 3 * 10**5]), -1))
    if surrounding == "Ctrl-C":
        signal.signal(signal.SIGVTALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_VIRTUAL, rng.choice([0.1, 0.3, 0.7]))


def main():
    parser = argparse.ArgumentParser(description="Count how odd checkpoints and commands end.")
    for name, default in {"seed": 1, "checkpoints": 10_000, "commands": 300, "jobs": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    options = parser.parse_args()
    counts = Counter()
    cases = [(checkpoint_case, options.seed, i) for i in range(options.checkpoints)]
    cases += [(command_case, options.seed, i) for i in range(options.commands)]
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": "/nonexistent", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in ARCHITECTURES:
            model, tokenizer = load_model(PLAIN, architecture=name, block_size=8,
                                          max_position_embeddings=600)
            save_model(model, tokenizer, Path("bases", name))
        shutil.copytree(PLAIN, "bases/plain")
        shutil.copytree(PLAIN, "template/OLDER")
        for name, text in FILES.items():
            Path("template", name).write_text(text, "utf-8")
        with get_context("fork").Pool(options.jobs) as pool, suppress(KeyboardInterrupt):
            for case, (title, outcome, printed) in zip(cases, pool.imap(end_of, cases)):
                counts[title.split()[0], outcome] += 1
                if outcome in FAULTS:
                    print(outcome, case[0].__name__, case[2], ascii(title), printed, flush=True)
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind:16} {outcome:9} {count:6,}")
    sys.exit(any(outcome in FAULTS for kind, outcome in counts))


if __name__ == "__main__":
    run(main)
