"""Our speed and memory beside those of our peers: ratios, measured in one run.

    python benchmarks/compare.py encoder --peers ../peers/bin/python

runs with our own environment. The peers have one of their own, which is made thus:

    python3.11 -m venv ../peers
    ../peers/bin/pip install torch==2.13.0 transformers==4.36.2 lsg-converter==0.1.9 \\
        sentencepiece "numpy<2" ctranslate2==4.8.5

All models have BARThez' sizes and the same random weights. The contenders are

    ours           this repository, with LSG attention
    floor          the encoder's matrix products alone: projections, and feed-forward with GELU
    F.linear       the same by F.linear, where our own float32 products are convolutions
    kernel         the attention of its blocks alone, over keys that lie ready in the cache
    dense          our encoder with full attention, fused, and without a mask to slow it down
    products       our encoder, and of each decoding step the products of weights and beams alone
    reading        our encoder, and each step's weights, document keys and values read once: not
                   even a product, but what every step must do
    bound          of a training step: floor, the products of the decoder's keys and values, and
                   kernel, all forward and backward, and Adam
    original       lsg_converter.mbart, by the authors of the paper
    transformers   MBart, full attention
    CTranslate2    MBart in an engine made for inference, in float32 and in int8

Each is a process that loads what it measures, then runs it once for each line it is sent, so that
they take turns on one machine: A B A B … A ratio is the median of those of runs side by side, with
the least and the largest. Memory is that of a contender's first run, which does not count as time:
the peak of its resident memory (Linux) or of the GPU's, above what it held when it was loaded; of
training, the peak in all.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
SIZES = dict(vocab_size=50002, d_model=768, encoder_layers=6, decoder_layers=6,
             encoder_attention_heads=12, decoder_attention_heads=12, encoder_ffn_dim=3072,
             decoder_ffn_dim=3072, decoder_start_token_id=0, forced_eos_token_id=None)
PROJECTIONS = "q_proj", "k_proj", "v_proj", "out_proj"
SELECTIONS = "norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling"
PEERS = "original", "transformers", "ctranslate2"


# ------------------------------------------------------------------------------------------------
# A contender. `job` is a dict: the command line's settings, and its own.


def worker(job):
    """Load at the first line of standard input, run once for each further; answer in JSON."""
    answers, sys.stdout, run = sys.stdout, sys.stderr, None  # libraries may print
    try:
        import torch
        torch.set_num_threads(job["threads"])
        for line in sys.stdin:
            answer = {}
            if run is None:
                run = globals()[job["work"]](job)
            else:
                torch.manual_seed(1)  # lsh draws
                loaded, _ = held_and_peak(job, restart=True)
                begin = time.perf_counter()
                result = run()
                if job["device"] == "cuda":
                    torch.cuda.synchronize()
                answer["seconds"] = time.perf_counter() - begin
                _, answer["peak"] = held_and_peak(job)
                answer["above"] = answer["peak"] - loaded
                torch.save(result, job["result"])
            print(json.dumps(answer), file=answers, flush=True)
    except Exception as error:  # a peer that is not there, too little memory, …
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(json.dumps({"failed": reason}), file=answers, flush=True)


def held_and_peak(job, restart=False):
    """The bytes that this process, or its tensors on the GPU, hold; the most since a restart."""
    if job["device"] == "cuda":
        from torch import cuda
        if restart:
            cuda.reset_peak_memory_stats()
        return cuda.memory_allocated(), cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        if restart:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return [1024 * int(re.search(rf"{name}:\s+(\d+)", status)[1])
                for name in ("VmRSS", "VmHWM")]
    return 0, 0  # no Linux


def new_model(job):
    """Ours, the original or transformers': settings and weights have the same names in all."""
    import torch
    settings = SIZES | {"max_position_embeddings": job["positions"],
                        "attention_dropout": job["attention_dropout"]}
    lsg = {"sparsity_type": job["sparsity_type"]}
    torch.set_default_dtype(getattr(torch, job["dtype"]))
    if job["who"] == "original":
        from lsg_converter.mbart import modeling_lsg_mbart as original
        model = original.LSGMBartForConditionalGeneration(
            original.LSGMBartConfig(**settings, **lsg))
    elif job["who"] in PEERS:
        from transformers import MBartConfig, MBartForConditionalGeneration
        model = MBartForConditionalGeneration(MBartConfig(**settings, normalize_before=True))
    else:
        sys.path.insert(0, str(ROOT))
        import barthez
        model = barthez.BarthezForConditionalGeneration(
            barthez.BarthezConfig(**settings, **lsg, lsg=job["lsg"]))
    torch.set_default_dtype(torch.float32)

    if not os.path.exists(job["weights"]):  # the first to come draws them
        for part, std in (model, 0.02), (model.model.encoder.layers, 0.06), (
                model.model.decoder.layers, 0.06):  # with less it would but repeat its last token
            barthez.init_weights(part, std)
        torch.save(model.state_dict(), job["weights"])
    weights = torch.load(job["weights"], mmap=True)  # a copy on the heap would blur the memory
    if not hasattr(model.model.encoder, "global_embeddings"):
        del weights["model.encoder.global_embeddings.weight"]
    model.load_state_dict(weights)
    return model.to(job["device"]).eval()


def random_ids(length, job):
    import torch
    ids = torch.randint(5, SIZES["vocab_size"], (1, length), generator=torch.manual_seed(2))
    return ids.to(job["device"])


def encoder_work(job):
    import torch
    encoder, ids = new_model(job).model.encoder, random_ids(job["length"], job)
    if not job["lsg"]:
        from barthez import Attention, DenseSelfAttention
        DenseSelfAttention.forward = lambda self, x, mask: Attention.forward(
            self, x, *self.keys_values(x))
    if job["compiled"]:
        encoder = torch.compile(encoder, fullgraph=True)
    return torch.inference_mode()(lambda: encoder(ids)[0][:, -job["length"]:])  # without globals


def floor_work(job):
    import torch
    model, x = new_model(job).model, torch.randn(job["length"], SIZES["d_model"])
    if job["plain"]:
        from barthez import Linear
        Linear.forward = torch.nn.Linear.forward
    x = x.to(job["device"], getattr(torch, job["dtype"])).requires_grad_(job["backward"])
    products = []
    for layer in model.encoder.layers:
        products += map(layer.self_attn.get_submodule, PROJECTIONS)
        products.append(torch.nn.Sequential(layer.fc1, torch.nn.GELU(), layer.fc2))
    if job["backward"]:  # training also has the keys and values that the decoder reads
        for layer in model.decoder.layers:
            products += layer.encoder_attn.k_proj, layer.encoder_attn.v_proj

    @torch.inference_mode(not job["backward"])
    def run():
        for product in products:
            y = product(x)
            if job["backward"]:
                y.backward(y.detach())  # any gradient will do

    return run


def kernel_work(job):
    import torch
    sys.path.insert(0, str(ROOT))
    from lsg import dense_attention
    layers, heads, block, head_dim = 6, 12, 128, 64
    query, key = (torch.randn(1, job["length"] // block, rows, head_dim, device=job["device"],
                              dtype=getattr(torch, job["dtype"]), requires_grad=job["backward"])
                  for rows in (block, 1 + 5 * block))
    mask = torch.ones(1, query.shape[1], 1, key.shape[2], dtype=torch.bool, device=job["device"])
    dropout = job["attention_dropout"] if job["backward"] else 0.0

    @torch.inference_mode(not job["backward"])
    def attention():
        for _ in range(layers * heads):
            out = dense_attention(query, key, key, mask, dropout)
            if job["backward"]:
                out.backward(out.detach())

    return attention


def generate_work(job):
    import torch
    model, ids, length = new_model(job), random_ids(job["length"], job), job["new_tokens"] + 1
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=job["beams"],
                                  min_length=length, max_length=length)[0, 1:]


def decoding_work(job):
    import torch
    model, ids = new_model(job), random_ids(job["length"], job)
    from barthez import packed
    decoder = model.model.decoder
    layers = [module for name, module in (*decoder.layers.named_modules(),
                                          ("lm_head", model.lm_head))
              if isinstance(module, torch.nn.Linear)
              and not name.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))]
    beams = [layer.weight.new_ones(1, job["beams"], layer.in_features) for layer in layers]

    @torch.inference_mode()
    def run():
        document = decoder.read(model.model.encoder(ids)[0])
        with packed(*layers if job["step"] == "products" else ()):
            for _ in range(job["new_tokens"]):
                if job["step"] == "products":
                    for layer, x in zip(layers, beams):
                        layer(x)
                else:  # the fastest way to touch all of a tensor
                    for tensor in (*(layer.weight for layer in layers),
                                   *(x for pair in document for x in pair)):
                        tensor.flatten().view(torch.float32).amax()

    return run


def ctranslate2_work(job):
    import ctranslate2
    import torch
    from ctranslate2.converters.transformers import MBartLoader
    words, folder = [str(id) for id in range(SIZES["vocab_size"])], job["weights"] + ".ctranslate2"
    if not os.path.exists(folder):  # what its TransformersConverter does, without a tokenizer
        loader = MBartLoader()
        with torch.no_grad():
            spec = loader.get_model_spec(new_model(job | {"dtype": "float32", "device": "cpu"}))
        loader.set_vocabulary(spec, words)
        spec.config.bos_token = spec.config.decoder_start_token = words[0]
        spec.config.eos_token, spec.config.unk_token = words[2:4]
        spec.validate()
        spec.optimize()
        os.mkdir(folder)
        spec.save(folder)
    engine = ctranslate2.Translator(folder, device=job["device"], compute_type=job["dtype"],
                                    inter_threads=1, intra_threads=job["threads"])
    text, new = [words[id] for id in random_ids(job["length"], job)[0]], job["new_tokens"]

    def generate():
        result, = engine.translate_batch([text], beam_size=job["beams"], max_decoding_length=new,
                                         min_decoding_length=new, max_input_length=0)
        return torch.tensor([int(word) for word in result.hypotheses[0]])

    return generate


def adam(model):
    """An optimizer that has made its averages, by a step that changed nothing."""
    import torch
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def train_work(job):
    model, ids, labels = new_model(job).train(), *(
        random_ids(length, job) for length in (job["length"], job["new_tokens"]))
    optimizer = adam(model)
    if job["checkpointing"]:
        model.model.encoder.gradient_checkpointing = True
        model.model.decoder.gradient_checkpointing = True

    def step():
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        optimizer.step()

    return step


def train_bound_work(job):
    products, attention, optimizer = floor_work(job), kernel_work(job), adam(new_model(job))

    def step():
        products()
        attention()
        optimizer.step()

    return step


def read_work(job):
    return lambda: len(Path(job["folder"], "model.safetensors").read_bytes())


def load_work(job):
    sys.path.insert(0, str(ROOT))
    from load_weights import load_model

    def load():  # the file is mapped into memory: touch each page to have it there
        model, _ = load_model(job["folder"], device=job["device"])
        return sum(float(weight.flatten()[::1024].sum()) for weight in model.parameters())

    return load


# ------------------------------------------------------------------------------------------------
# A race


def race(job, work, contenders, ratios, same=(), memory="above"):
    """Rows of a table for `ratios`, pairs of names in `contenders` {name: its settings}, and notes
    on contenders that are left out and on how the results of each pair in `same` compare."""
    jobs = {name: dict(job, work=work, result=f"{job['weights']}.{i}") | own
            for i, (name, own) in enumerate(contenders.items())}
    runs, left_out, processes = {name: [] for name in jobs}, {}, {}
    with contextlib.ExitStack() as stack:
        for name, own in jobs.items():
            python = job["peers"] if own["who"] in PEERS else sys.executable
            if python is None:
                left_out[name] = "--peers is not given"
                continue
            processes[name] = stack.enter_context(subprocess.Popen(
                [python, "-W", "ignore", __file__, "worker", json.dumps(own)], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        for turn in range(job["rounds"] + 2):  # the first loads, the second warms up
            for name in [name for name in processes if name not in left_out]:
                processes[name].stdin.write("\n")
                processes[name].stdin.flush()  # the others wait for theirs
                runs[name].append(json.loads(processes[name].stdout.readline() or "{}"))
                if "failed" in runs[name][-1] or turn and not runs[name][-1]:
                    left_out[name] = runs[name][-1].get("failed", "it died")

    def row(*pair):
        seconds = [[run["seconds"] for run in runs[name][2:]] for name in pair]
        a_bytes, b_bytes = (runs[name][1][memory] for name in pair)
        quotients = [a / b for a, b in zip(*seconds)]
        return table_row(" / ".join(pair), quotients,
                         " / ".join(f"{median(s):.3g}" for s in seconds),
                         f"{a_bytes / max(b_bytes, 1):.2f}",
                         f"{a_bytes / 1e9:.2f} / {b_bytes / 1e9:.2f}")

    ratios, same = ([pair for pair in pairs if not left_out.keys() & set(pair)]
                    for pairs in (ratios, same))
    return ([row(*pair) for pair in ratios],
            [f"- {name} is left out: {reason}." for name, reason in left_out.items()]
            + [compared(*pair, *(jobs[name]["result"] for name in pair)) for pair in same])


def table_row(name, times, *columns):
    spread = f"**{median(times):.2f}** ({min(times):.2f} – {max(times):.2f})"
    return " | ".join([f"| {name}", spread, *(columns or [""] * 3)]) + " |"


def compared(a_name, b_name, *results):
    import torch
    a, b = (torch.load(result).cpu() for result in results)
    if a.is_floating_point():
        return (f"- The states of {a_name} and {b_name} differ by "
                f"{(a.float() - b.float()).abs().max():.2g} at most.")
    return (f"- Of the {len(b)} tokens written by {a_name} and {b_name}, the first "
            f"{(a == b).long().cumprod(0).sum()} are the same.")


# ------------------------------------------------------------------------------------------------
# The tasks: each returns rows and notes.


def encoder(job):
    floor = {"floor": {"work": "floor_work"}}
    if job["every_selection"]:
        kinds = {kind: {"sparsity_type": kind} for kind in SELECTIONS}
        return race(job, "encoder_work", floor | kinds, [(kind, "floor") for kind in kinds])
    if job["growth"]:
        short, long = (f"ours at {job['length'] * times:,}" for times in (1, 4))
        return race(job, "encoder_work", {short: {}, long: {"length": 4 * job["length"]}},
                    [(long, short)])
    parts = floor | {"F.linear": {"work": "floor_work", "plain": True},
                     "kernel": {"work": "kernel_work"}}
    peers = {"ours": {}, "original": {"who": "original"}, "dense": {"lsg": False}}
    ratios = [("original", "ours"), ("dense", "ours"), ("ours", "floor"), ("ours", "F.linear")]
    return race(job, "encoder_work", parts | peers,
                ratios + [("kernel", "floor"), ("original", "floor")], same=ratios[:2])


def compile(job):
    contenders, ratio = {"eager": {}, "compiled": {"compiled": True}}, [("eager", "compiled")]
    return race(job, "encoder_work", contenders, ratio, same=ratio)


def generate(job):
    products, reading = (
        {"work": "decoding_work", "step": step} for step in ("products", "reading"))
    pairs = [("original", "ours"), ("ours", "products"), ("original", "products"),
             ("ours", "reading")]
    rows, notes = race(job, "generate_work", {
        "ours": {}, "original": {"who": "original"}, "products": products, "reading": reading},
        pairs, same=pairs[:1])
    dense = {"lsg": False, "length": job["length"] // 4}
    half, engine = dense | {"dtype": "bfloat16"}, dense | {"who": "ctranslate2",
                                                           "work": "ctranslate2_work"}
    rows.append(f"| **dense at {dense['length']:,}** | | | | |")
    pairs = [("transformers", "ours"), ("CTranslate2", "ours"), ("ours", "products"),
             ("CTranslate2", "products"), ("ours", "reading"),
             ("CTranslate2 int8", "ours, bfloat16"), ("ours, bfloat16", "products, bfloat16"),
             ("ours, bfloat16", "reading, bfloat16")]
    more = race(job, "generate_work", {
        "ours": dense, "transformers": dense | {"who": "transformers"}, "CTranslate2": engine,
        "products": dense | products, "reading": dense | reading, "ours, bfloat16": half,
        "CTranslate2 int8": engine | {"dtype": "int8"}, "products, bfloat16": half | products,
        "reading, bfloat16": half | reading}, pairs, same=[*pairs[:2], pairs[5]])
    return rows + more[0], notes + more[1]


def train(job):
    rows, notes = [], []
    for name, dropout in ("", 0.0), (", attention dropout", 0.1):
        ours, original, less, bound = (who + name for who in (
            "ours", "original", "ours checkpointing", "bound"))
        own = {"attention_dropout": dropout}
        more = race(job, "train_work", {
            ours: own, original: own | {"who": "original"}, less: own | {"checkpointing": True},
            bound: own | {"work": "train_bound_work", "backward": True}},
            [(original, ours), (less, ours), (ours, bound), (original, bound)], memory="peak")
        rows, notes = rows + more[0], notes + more[1]
    return rows, notes


def start(job):
    sys.path.insert(0, str(ROOT))
    from load_weights import BarthezTokenizer, save_model
    folder, model = Path(job["weights"] + ".checkpoint"), Path(job["model"])
    save_model(new_model(job), BarthezTokenizer(model / "sentencepiece.bpe.model"), folder)
    rows, notes = race(job | {"folder": str(folder)}, "load_work", {
        "load_model": {}, "reading the file": {"work": "read_work"}},
        [("load_model", "reading the file")])
    (folder / "text").write_text("Bonjour à tous.", "utf-8")

    def seconds(*command):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - begin

    program, turns = str(ROOT / "barthez.py"), range(job["rounds"] + 1)
    one_step = ["--summarize", folder / "text", "--min-length", "0", "--max-length", "2"]
    rows.append(table_row("--help, seconds", [seconds(program, "--help") for _ in turns][1:]))
    rows.append(table_row("one step, less importing torch, seconds", [
        seconds(program, "--model", model, *one_step) - seconds("-c", "import torch")
        for _ in turns][1:]))
    return rows, notes


def main():
    tasks = {task.__name__: task for task in (encoder, generate, train, start, compile)}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter of the peers' environment")
    parser.add_argument("--length", type=int, default=4096, help="of the document, in tokens")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--sparsity-type", choices=SELECTIONS, default="norm")
    parser.add_argument("--every-selection", action="store_true", help="encoder: all / the floor")
    parser.add_argument("--growth", action="store_true", help="encoder: four times the length / it")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--model", default=ROOT / "tiny", metavar="FOLDER", help="start: the model")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="default: as many as torch takes")
    parser.add_argument("--rounds", type=int, default=5, help="after a first one to warm up")
    job = vars(parser.parse_args())
    if job["peers"] and not shutil.which(job["peers"]):
        parser.error(f"--peers {job['peers']} is no interpreter; this file says how to make one")

    import torch
    job["threads"] = job["threads"] or torch.get_num_threads()
    job |= dict(model=str(job["model"]), who="ours", lsg=True, compiled=False, checkpointing=False,
                plain=False, backward=False, attention_dropout=0.0,
                positions=job["length"] * (4 if job["growth"] else 1))
    with tempfile.TemporaryDirectory() as folder:
        job["weights"] = os.path.join(folder, "weights")
        new_model(job | {"dtype": "float32"})
        rows, notes = tasks[job["task"]](job)
    place = "GPU" if job["device"] == "cuda" else f"{job['threads']} threads"
    print(f"| {job['task']}, {job['length']:,} tokens, {job['dtype']}, {place} | time | seconds "
          "| memory | GB |\n|---|---|---|---|---|", *rows, "", *notes, sep="\n")


if __name__ == "__main__":
    worker(json.loads(sys.argv[2])) if sys.argv[1:2] == ["worker"] else main()
