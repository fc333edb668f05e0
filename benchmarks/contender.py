"""One contender of compare.py, in a process of its own: load, then do the task on request.

`job` is a dict: the options of compare.py, the contender's name and the checkpoint's folder.
"""

import ctypes
import json
import re
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from barthez import group_by_length, load_model
from cpu import keep_freed_memory, packed_weights

PEERS = "original", "transformers", "CTranslate2"
VOCAB_SIZE, NUM_BEAMS = 50002, 4


def main():
    """Do the task once for each line of standard input. Answers are lines of JSON."""
    job = json.loads(sys.argv[1])
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    torch.set_num_threads(job["threads"])
    if job["dtype"] == "float64":  # otherwise the original's lsh mixes it with float32, and fails
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double
    do_task = prepare(job)
    held = reset_peak(job["device"])
    if job["compile"]:
        do_task()  # compiles, which may need more memory than the task
        reset_peak(job["device"])
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        torch.manual_seed(0)  # lsh draws
        begin = time.perf_counter()
        result = do_task()
        if job["device"] == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        answer = {"seconds": seconds, "memory": peak(job["device"]) - held}
        torch.save(result, f"{job['folder']}/{job['name']}.pt")
        print(json.dumps(answer), file=answers, flush=True)


def prepare(job):
    """Load the contender. Returns a function that does the task once."""
    task, name = job["task"], job["name"]
    if task == "start":
        return partial(start, job)
    if name.startswith("CTranslate2"):
        return ctranslate2_task(job)
    model = load(job)
    if job["compile"] and name in ("ours", "full attention"):
        model.model.encoder.compile()
    ids = random_ids(job["documents"], job["length"]).to(job["device"])
    if task == "encoder":
        do_task = partial(encode, model, ids)
    elif task == "train":
        labels = random_ids(1, job["new_tokens"]).to(job["device"])
        optimizer = torch.optim.Adam(model.train().parameters())
        do_task = partial(train_step, model, optimizer, ids, labels)
    else:
        do_task = partial(generate, model, ids, job)
    return linear_layers_alone(model, do_task, job) if name == "bound" else do_task


def load(job):
    """The contender's model, by its own loader. The peers are in an environment of their own."""
    name, folder, dtype = job["name"], job["folder"], getattr(torch, job["dtype"])
    if name == "original":
        from lsg_converter.mbart.modeling_lsg_mbart import LSGMBartForConditionalGeneration
        model = LSGMBartForConditionalGeneration.from_pretrained(folder, torch_dtype=dtype)
    elif name.startswith(PEERS):
        from transformers import MBartForConditionalGeneration
        model = MBartForConditionalGeneration.from_pretrained(folder, torch_dtype=dtype)
    else:
        keep_freed_memory()
        lsg = name != "full attention" and not job["dense"]
        model, _ = load_model(folder, lsg=lsg, dtype=dtype)
    for weight in model.parameters():  # read each page: until then, a mapped file is not in memory
        weight.detach().flatten()[::1024].sum()
    return model.eval().to(job["device"])


def random_ids(documents, length):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(5, VOCAB_SIZE, (documents, length), generator=generator)


def start(job):
    if job["name"] == "bound":
        Path(job["folder"], "model.safetensors").read_bytes()
    else:
        load(job)


@torch.inference_mode()
def encode(model, ids):
    return model.model.encoder(ids)[0][:, -ids.shape[1]:]  # without the global tokens


def train_step(model, optimizer, ids, labels):
    optimizer.zero_grad()
    model(ids, labels=labels).loss.backward()
    optimizer.step()


def generate(model, ids, job):
    batch_tokens = 0 if job["name"].endswith("one by one") else 8192  # as in barthez.summarize
    length = job["new_tokens"] + 1  # with the start token
    texts = []
    for group in group_by_length([ids.shape[1]] * len(ids), batch_tokens):
        texts += model.generate(ids[group], num_beams=NUM_BEAMS,
                                min_length=length, max_length=length)
    return torch.stack(texts)[:, 1:].flatten()


def linear_layers_alone(model, do_task, job):
    """The calls of linear layers that `do_task` makes, and nothing else."""
    calls = []
    hooks = [layer.register_forward_pre_hook(lambda layer, x: calls.append((layer, x[0].shape)))
             for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    do_task()
    for hook in hooks:
        hook.remove()
    inputs = {shape: model.lm_head.weight.new_empty(shape).normal_() for _, shape in calls}
    training, optimizer = job["task"] == "train", torch.optim.Adam(model.parameters())
    packed = packed_weights if job["task"] == "generate" else nullcontext

    def call_layers():
        optimizer.zero_grad()
        with packed(model), torch.set_grad_enabled(training):
            for layer, shape in calls:
                y = layer(inputs[shape].detach().requires_grad_(training))
                if training:
                    y.backward(y.detach())  # any gradient will do
        if training:
            optimizer.step()
    return call_layers


def ctranslate2_task(job):
    """Convert transformers' model and load it."""
    import ctranslate2
    from ctranslate2.converters.transformers import MBartLoader
    folder = Path(job["folder"], job["name"])
    words = ["<s>", "<pad>", "</s>", "<unk>"] + [str(i) for i in range(4, VOCAB_SIZE)]
    model = load(job | {"dtype": "float32"})
    model.config.normalize_before = True  # as in BARThez's config.json
    with torch.no_grad():
        spec = MBartLoader().get_model_spec(model)
    spec.register_source_vocabulary(words)
    spec.register_target_vocabulary(words)
    spec.validate()
    spec.optimize()
    folder.mkdir()
    spec.save(str(folder))
    engine = ctranslate2.Translator(str(folder), compute_type=job["name"].split()[1],
                                    intra_threads=job["threads"])
    text = [words[i] for i in random_ids(1, job["length"])[0]]
    numbers = {word: i for i, word in enumerate(words)}

    def generate():
        [result] = engine.translate_batch(
            [text], beam_size=NUM_BEAMS, min_decoding_length=job["new_tokens"],
            max_decoding_length=job["new_tokens"], max_input_length=0)
        return torch.tensor([numbers[word] for word in result.hypotheses[0]])
    return generate


def reset_peak(device):
    """Forget the peak of memory. Returns the bytes held now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # otherwise the task could reuse freed memory uncounted
        Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device):
    """The most bytes held since reset_peak."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    main()
