"""One contender of compare.py, in a process of its own: load, then do the task on request.

`job` is a dict: the options of compare.py, the contender's name, and the folder of the checkpoint.
"""

import ctypes
import json
import os
import re
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from barthez import load_model
from cpu import keep_freed_memory, packed_weights

PEERS = "original", "transformers", "CTranslate2 float32", "CTranslate2 int8"
VOCAB_SIZE, NUM_BEAMS, NEW_TOKENS = 50002, 4, 128


def main():
    """Do the task once for each line of standard input. Answers are lines of JSON."""
    job = json.loads(sys.argv[1])
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    torch.set_num_threads(job["threads"])
    if job["dtype"] == "float64":  # otherwise the original's lsh mixes it with float32, and fails
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double
    do_task = prepare(job)
    held = reset_peak()
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        torch.manual_seed(0)  # lsh draws
        begin = time.perf_counter()
        result = do_task()
        seconds = time.perf_counter() - begin
        answer = {"seconds": seconds, "memory": resident("VmHWM") - held}
        torch.save(result, result_file(job, job["name"]))
        print(json.dumps(answer), file=answers, flush=True)


def result_file(job, name):
    return Path(job["folder"], f"{name}.pt")


def prepare(job):
    """Load the contender. Returns a function that does the task once."""
    task, name, length = job["task"], job["name"], job["length"]
    if task == "start":
        return lambda: start(job)
    if name.startswith("CTranslate2"):
        return ctranslate2_task(job)
    model, ids = load(job), random_ids(length)
    read_weights(model)
    if task == "train":
        do_task = train_task(model, ids)
    elif task == "generate":
        def do_task():
            return model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=NUM_BEAMS,
                                  min_length=NEW_TOKENS + 1, max_length=NEW_TOKENS + 1)[0, 1:]
    else:
        @torch.inference_mode()
        def do_task():
            return model.model.encoder(ids)[0][:, -length:]  # without the global tokens
    return linear_layers_alone(model, do_task, job) if name == "bound" else do_task


def load(job):
    """The contender's model, by its own loader. The peers are in an environment of their own."""
    dtype = getattr(torch, job["dtype"])
    if job["name"] == "original":
        from lsg_converter.mbart.modeling_lsg_mbart import LSGMBartForConditionalGeneration
        model = LSGMBartForConditionalGeneration.from_pretrained(job["folder"], torch_dtype=dtype)
        return model.eval()
    if job["name"] in PEERS:
        from transformers import MBartForConditionalGeneration
        model = MBartForConditionalGeneration.from_pretrained(job["folder"], torch_dtype=dtype)
        return model.eval()
    keep_freed_memory()
    lsg = job["name"] != "full attention" and not job["dense"]
    return load_model(job["folder"], lsg=lsg, dtype=dtype)[0]


def read_weights(model):
    """Read a number of each page of memory. Until then, a mapped file is not in memory."""
    for weight in model.parameters():
        weight.detach().flatten()[::1024].sum()


def start(job):
    if job["name"] == "bound":
        Path(job["folder"], "model.safetensors").read_bytes()
    else:
        read_weights(load(job))


def random_ids(length):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(5, VOCAB_SIZE, (1, length), generator=generator)


def train_task(model, ids):
    model.train()
    labels, optimizer = random_ids(NEW_TOKENS), torch.optim.Adam(model.parameters())

    def step():
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        optimizer.step()
    return step


def linear_layers_alone(model, do_task, job):
    """The calls of linear layers that `do_task` makes, and nothing else."""
    calls = []
    hooks = [layer.register_forward_pre_hook(lambda layer, x: calls.append((layer, x[0].shape)))
             for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    do_task()
    for hook in hooks:
        hook.remove()
    inputs = {shape: torch.randn(shape, dtype=getattr(torch, job["dtype"])) for _, shape in calls}
    training, optimizer = job["task"] == "train", torch.optim.Adam(model.parameters())

    def call_layers(model):
        optimizer.zero_grad()
        with torch.set_grad_enabled(training):
            for layer, shape in calls:
                y = layer(inputs[shape].detach().requires_grad_(training))
                if training:
                    y.backward(y.detach())  # any gradient will do
        if training:
            optimizer.step()

    if job["task"] == "generate":
        call_layers = packed_weights(call_layers)
    return lambda: call_layers(model)


def ctranslate2_task(job):
    """Convert transformers' model, unless another contender has done so, and load it."""
    import ctranslate2
    from ctranslate2.converters.transformers import MBartLoader
    folder = job["folder"] + "/ctranslate2"
    words = ["<s>", "<pad>", "</s>", "<unk>"] + [str(i) for i in range(4, VOCAB_SIZE)]
    if not os.path.exists(folder):
        model = load(job | {"dtype": "float32"})
        model.config.normalize_before = True  # as in BARThez's config.json
        with torch.no_grad():
            spec = MBartLoader().get_model_spec(model)
        spec.register_source_vocabulary(words)
        spec.register_target_vocabulary(words)
        spec.validate()
        spec.optimize()
        os.mkdir(folder)
        spec.save(folder)
    engine = ctranslate2.Translator(folder, compute_type=job["name"].split()[1],
                                    intra_threads=job["threads"])
    text = [words[i] for i in random_ids(job["length"])[0]]
    numbers = {word: i for i, word in enumerate(words)}

    def generate():
        [result] = engine.translate_batch(
            [text], beam_size=NUM_BEAMS, min_decoding_length=NEW_TOKENS,
            max_decoding_length=NEW_TOKENS, max_input_length=0)
        return torch.tensor([numbers[word] for word in result.hypotheses[0]])
    return generate


def reset_peak():
    """Return freed memory to the system and forget the peak. Returns the bytes held now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field):
    """Bytes of this process in memory: VmRSS now, VmHWM at the peak."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    main()
