"""cpu.py and other code for speed changes no result, but for rounding."""

import ctypes
import functools
import inspect
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpu
import lsg
from barthez import Attention, BarthezConfig, BarthezForConditionalGeneration, load_model
from conftest import GOLDENS, assert_close

ROOT = Path(__file__).parent.parent
FILES = "lsg.py", "barthez.py", "beam_search.py", "hub.py", "tokenizer.py", "load_weights.py"
EOS = 2
DOCUMENT = torch.tensor([[0, 5, 9, EOS]])
every_attention = pytest.mark.parametrize("kind", lsg.SPARSITY_TYPES[:-1] + ("dense",))
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(),
                                  reason="this torch is built without oneDNN")


def tiny_model(seed=3):
    """As `load_model` returns it: with accelerated products, in evaluation mode."""
    config = BarthezConfig(
        vocab_size=17, d_model=12, encoder_layers=1, decoder_layers=2, encoder_attention_heads=3,
        decoder_attention_heads=2, encoder_ffn_dim=10, decoder_ffn_dim=14, block_size=4,
        sparse_block_size=4, max_position_embeddings=4100, decoder_start_token_id=EOS, init_std=0.6)
    torch.manual_seed(seed)
    model = BarthezForConditionalGeneration(config).eval()
    cpu.accelerate(model)
    return model


@pytest.fixture
def convolution(monkeypatch):
    """The processor is AMD's. Holds the convolutions that are computed."""
    calls, conv2d = [], F.conv2d

    def counted(*inputs):
        calls.append("conv2d")
        return conv2d(*inputs)

    monkeypatch.setattr(cpu, "prefers_onednn", lambda: True)
    monkeypatch.setattr(F, "conv2d", counted)
    return calls


# ------------------------------------------------------------------------------------------------
# Attention in pieces


def attention_in_pieces(*inputs, dropout_p=0.0):
    """With three pieces of two heads: the table of 28 blocks and 321 keys has 8,988 entries."""
    torch.manual_seed(7)
    return lsg.lsg_attention(*inputs, block_size=64, sparse_block_size=64, sparsity_type="stride",
                             dropout_p=dropout_p)


def test_dropout_in_pieces_has_the_right_gradient():
    """The backward pass computes the pieces again. It must draw the same dropout."""
    inputs = torch.randn(3, 1, 6, 1 + 28 * 64, 2, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attention_in_pieces(*leaves, dropout_p=0.3)
    weights, direction = torch.randn_like(out), torch.randn_like(inputs)
    gradient = torch.stack(torch.autograd.grad((out * weights).sum(), leaves))
    above, below = (attention_in_pieces(*inputs + step * direction, dropout_p=0.3)
                    for step in (1e-6, -1e-6))
    expected = ((above - below) * weights).sum() / 2e-6
    whole, first_head = attention_in_pieces(*inputs), attention_in_pieces(*inputs[:, :, :1])
    assert_close(whole[:, :1], first_head)
    assert (out - whole).abs().max() > 1e-3, "nothing is dropped"
    assert_close((gradient * direction).sum() / expected, torch.ones_like(expected), 1e-6)


def test_training_does_not_keep_the_gathered_keys():
    inputs = torch.randn(3, 1, 6, 1 + 28 * 64, 16).unbind()
    leaves = [x.requires_grad_() for x in inputs]
    sizes = []

    def keep(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attention_in_pieces(*leaves)
    assert sum(sizes) < 2 * 6 * 28 * 321 * 16  # the numbers in the keys and values of all blocks


# ------------------------------------------------------------------------------------------------
# Products


def fast_linear(dtype=torch.float32, bias=True):
    """A layer with 7 inputs and 11 outputs."""
    return cpu.FastLinear(nn.Linear(7, 11, bias).to(dtype), cpu.prefers_onednn())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 300, 7), (511, 7), (512, 7)])
def test_fast_products_equal_f_linear(shape, dtype, bias, convolution):
    layer = fast_linear(dtype, bias)
    x = torch.randn(*shape[:-1], 14, dtype=dtype)[..., ::2].requires_grad_()  # not contiguous
    leaves = [x, *layer.parameters()]
    actual, expected = layer(x), F.linear(x, layer.weight, layer.bias)
    many_rows = x.numel() >= 512 * 7
    assert len(convolution) == (dtype == torch.float32 and many_rows)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert_close(actual, expected, tolerance)
    weights = torch.randn_like(expected) / (x.numel() / 7)
    actual_grads = torch.autograd.grad(actual, leaves, weights)
    expected_grads = torch.autograd.grad(expected, leaves, weights)
    for a, e in zip(actual_grads, expected_grads):
        assert_close(a, e, tolerance)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(1, 7), (3, 5, 7), (2, 300, 7)])
def test_packed_products_equal_f_linear(shape, dtype, tolerance, bias):
    layer, x = fast_linear(dtype, bias), torch.randn(shape, dtype=dtype)
    try:
        layer.packed_weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
    except RuntimeError:
        pytest.skip(f"oneDNN has no {dtype} here")
    with torch.no_grad():
        assert_close(layer(x), F.linear(x, layer.weight, layer.bias), tolerance)


def test_all_layers_and_attentions_of_a_loaded_model_are_fast():
    model, _ = load_model(GOLDENS / "plain")
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    assert len(layers) == 2 * 6 + 3 * 10 + 1 and all(type(x) is cpu.FastLinear for x in layers)
    assert len(attentions) == 2 + 2 * 3
    assert all(x.attention is cpu.fast_attention for x in attentions)


@needs_onednn
@pytest.mark.parametrize("cpuinfo, windows, expected", [
    ("vendor_id : AuthenticAMD", "", True), ("vendor_id : GenuineIntel", "", False),
    (None, "AMD64 Family 25 Model 33 Stepping 2, AuthenticAMD", True), (None, "", False)])
def test_the_maker_of_the_processor_chooses_the_library(cpuinfo, windows, expected, monkeypatch):
    def read_text(path):
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setenv("PROCESSOR_IDENTIFIER", windows)
    assert cpu.prefers_onednn() == expected
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not cpu.prefers_onednn()


# ------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize("training", [False, True])
def test_the_encoder_compiles_to_one_graph(training, convolution):
    torch.compiler.reset()
    encoder = tiny_model().model.encoder
    for module in encoder.modules():  # a compiled function draws other dropout
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids = torch.randint(4, 17, (1, 1200))  # long enough for convolutions
    expected = encoder.train(training)(ids)[0]
    assert convolution
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    assert_close(compiled(ids)[0], expected)


def test_texts_of_many_lengths_compile_to_two_graphs():
    """One for the first length, and one for all lengths. PyTorch compiles at most 8."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    attend = functools.partial(lsg.lsg_attention, block_size=4, sparse_block_size=4)
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    for length in 1200, 1300, 2500, 334, 4003:
        x = torch.randn(1, 2, length, 5)
        mask = torch.ones(1, length, dtype=torch.int64)  # as the tokenizer returns it
        mask[0, -2:] = 0
        assert_close(compiled(x, x, x, mask), attend(x, x, x, mask))
    assert len(graphs) == 2


# ------------------------------------------------------------------------------------------------
# Packed weights


def layers_of(model):
    return [*model.model.decoder.layers[1].modules(), model.lm_head]


@needs_onednn
def test_weights_are_packed_only_while_generating():
    model, packed = tiny_model(), []
    layers = [layer for layer in layers_of(model) if isinstance(layer, nn.Linear)]
    assert len(layers) == 11

    def note(*_):
        packed.append([layer.packed_weight is not None for layer in layers])

    model.lm_head.register_forward_hook(note)
    model.generate(DOCUMENT, max_length=5)
    note()
    assert all(all(states) for states in packed[:-1]) and not any(packed[-1])

    def stop(*_):
        raise KeyboardInterrupt

    model.lm_head.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model.generate(DOCUMENT)
    note()
    assert not any(packed[-1])


def test_two_threads_may_generate_with_one_model():
    model, texts = tiny_model(), []
    settings = {"num_beams": 2, "max_length": 40, "min_length": 39}
    expected = model.generate(DOCUMENT, **settings)
    threads = [threading.Thread(target=lambda: texts.append(model.generate(DOCUMENT, **settings)))
               for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 2 and all(text.equal(expected) for text in texts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_types_that_cannot_be_packed_give_the_same_text(dtype):
    settings = {"num_beams": 3, "max_length": 9}
    expected = tiny_model().generate(DOCUMENT, **settings)
    assert tiny_model().to(dtype).generate(DOCUMENT, **settings).equal(expected)


def test_nothing_is_packed_under_autocast():
    model, packed = tiny_model(), []
    model.lm_head.register_forward_hook(
        lambda layer, *_: packed.append(layer.packed_weight is not None))
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(DOCUMENT, max_length=9)
    assert packed and not any(packed)


# ------------------------------------------------------------------------------------------------
# Memory


def test_keep_freed_memory_sets_two_options_of_glibc_if_there_is_one(monkeypatch):
    class Library:
        calls = []

        def mallopt(self, option, value):
            self.calls.append((option, value))

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    for load in missing, lambda name: object(), lambda name: Library():
        monkeypatch.setattr(ctypes, "CDLL", load)
        cpu.keep_freed_memory()
    assert Library.calls == [(-4, 0), (-1, -1)]


# ------------------------------------------------------------------------------------------------
# The whole model, with and without the code


def compute(checkpoint):
    """States, logits, gradients and generated ids, {name: tensors}. Reads the modules of the
    project that it finds."""
    torch.manual_seed(0)
    ids = torch.randint(4, 180, (2, 300))  # long enough for convolutions
    ids[1, 200:] = 1
    labels = torch.randint(4, 180, (2, 40))
    sizes = {"max_position_embeddings": 300, "block_size": 32, "sparse_block_size": 32}
    no_dropout = dict.fromkeys(["dropout", "attention_dropout", "activation_dropout"], 0.0)
    results = {}
    for kind in lsg.SPARSITY_TYPES[:-1] + ("dense",):
        options = {"sparsity_type": kind, "num_global_tokens": 3}
        if kind == "dense":
            options = {"lsg": False}
        # In float64, rounding never decides to which direction a key is nearest.
        dtype = torch.float64 if kind == "lsh" else torch.float32
        model, _ = load_model(checkpoint, dtype=dtype, **sizes, **no_dropout, **options)
        torch.manual_seed(1)
        with torch.no_grad():
            states, visible = model.model.encoder(ids, ids != 1)
        if kind in ("norm", "dense"):
            for num_beams in 1, 4:
                results[f"ids {kind} num_beams={num_beams}"] = model.generate(
                    ids[:, :150], num_beams=num_beams, max_length=25, min_length=15)
        torch.manual_seed(1)
        out = model.train()(ids, ids != 1, labels=labels)
        out.loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results[kind] = [states, visible, out.logits.detach(), out.loss.detach(), *gradients]
    return results


def without_cpu(source):
    """The source of barthez.py without its import of cpu.py and its three calls."""
    for seam, replacement in (
            ("from cpu import accelerate, keep_freed_memory, packed_weights\n", ""),
            ("    accelerate(model)\n", ""), ("    keep_freed_memory()\n", ""),
            ("with packed_weights(self):", "if True:")):
        assert source.count(seam) == 1
        source = source.replace(seam, replacement)
    return source


@pytest.fixture(scope="module", autouse=True)
def without_cpu_py(tmp_path_factory):
    """A process that computes the results without cpu.py while other tests run, and its folder."""
    folder = tmp_path_factory.mktemp("plain")
    for name in FILES:
        source = (ROOT / name).read_text("utf-8")
        source = without_cpu(source) if name == "barthez.py" else source
        (folder / name).write_text(source, "utf-8")
    (folder / "main.py").write_text(
        "import sys, torch, lsg\nfrom barthez import load_model\ntorch.set_num_threads(1)\n"
        f"{inspect.getsource(compute)}torch.save(compute(sys.argv[1]), 'results')", "utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.Popen([sys.executable, "main.py", GOLDENS / "plain"], cwd=folder,
                               env=environment)
    yield process, folder
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def results(without_cpu_py):
    """The results of the whole project, and those without cpu.py."""
    process, folder = without_cpu_py
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "prefers_onednn", lambda: True)  # take this path on all processors
        full = compute(GOLDENS / "plain")
    assert process.wait() == 0
    return full, torch.load(folder / "results")


@every_attention
def test_states_logits_and_gradients_are_equal_without_cpu_py(results, kind):
    full, plain = (version[kind] for version in results)
    for a, b in zip(full, plain, strict=True):
        assert_close(a.double(), b.double())


def test_generated_ids_are_equal_without_cpu_py(results):
    names = [name for name in results[0] if name.startswith("ids ")]
    assert len(names) == 4
    for name in names:
        full, plain = (version[name].tolist() for version in results)
        assert full == plain
        assert len(full[0]) > 15, "the texts are too short to prove anything"
