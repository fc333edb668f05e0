"""Faster attention and matrix products on CPUs, applied to a finished model from outside.

PyTorch has two libraries for float32 products on CPUs, MKL and oneDNN, and `F.linear` uses MKL. On
AMD processors, MKL does not use some vector instructions, and oneDNN is faster.

This file is optional: without it and its three calls in barthez.py, the model is slower, and its
results differ only by rounding and the random draws of dropout.
"""

import ctypes
import math
import os
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


def accelerate(model):
    """Replace the model's linear layers and attention by those of this file.

    Its parameters stay the same tensors under the same names.
    """
    convolution = prefers_onednn()
    for module in list(model.modules()):
        if hasattr(module, "attention"):
            module.attention = fast_attention
        for name, layer in module.named_children():
            if type(layer) is nn.Linear:
                setattr(module, name, FastLinear(layer, convolution))


class FastLinear(nn.Linear):
    """A linear layer with the parameters of another one.

    convolution: whether float32 products of many rows on a CPU are computed as convolutions.
    """

    packed_weight = None  # the weight in the order that oneDNN needs, inside `packed_weights`

    def __init__(self, layer, convolution):
        nn.Module.__init__(self)  # nn.Linear's would draw new parameters
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias, self.convolution = layer.weight, layer.bias, convolution

    def forward(self, x):
        weight = self.packed_weight  # read once: another thread may remove it
        if weight is not None:
            return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")
        many_rows = x.numel() >= 512 * self.in_features
        if self.convolution and many_rows and x.is_cpu and x.dtype == torch.float32:
            return linear_as_convolution(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def linear_as_convolution(x, weight, bias):
    """F.linear as a convolution of width 1, which oneDNN computes. The rows are pixels."""
    image = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, in_features, 1, rows)
    image = F.conv2d(image, weight[..., None, None], bias)  # (1, out_features, 1, rows)
    return image.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def prefers_onednn():
    """Whether this torch has oneDNN and the processor is AMD's."""
    maker = os.environ.get("PROCESSOR_IDENTIFIER", "")  # Windows
    with suppress(OSError):
        maker += Path("/proc/cpuinfo").read_text()  # Linux
    return "AuthenticAMD" in maker and torch.backends.mkldnn.is_available()


def fast_attention(query, key, value, visible=None, dropout_p=0.0):
    """lsg.full_attention, with the softmax written out where PyTorch's fused kernel is slow: for
    few queries, and in bfloat16 also for a block of queries and in training."""
    bf16 = query.dtype == torch.bfloat16
    few_queries = query.shape[-2] <= (256 if bf16 else 8)
    slow = query.is_cpu and (few_queries or (bf16 and torch.is_grad_enabled()))
    if visible is None or not slow:
        return F.scaled_dot_product_attention(query, key, value, visible, dropout_p)
    query = query / math.sqrt(query.shape[-1])
    # Except in bfloat16, a product is faster if its first factor has more rows.
    scores = query @ key.mT if bf16 else (key @ query.mT).mT  # (…, T, S)
    scores.masked_fill_(~visible, torch.finfo(scores.dtype).min)
    out = F.dropout(scores.softmax(-1), dropout_p) @ value
    return out.masked_fill(~visible.any(-1, keepdim=True), 0)


@contextmanager
def packed_weights(model):
    """Inside, the decoder keeps its weights in the order that oneDNN needs. Products of few rows
    then take a third of the time, since F.linear would reorder the weights each time."""
    modules = *model.model.decoder.modules(), model.lm_head
    layers = [module for module in modules if isinstance(module, FastLinear)]
    try:
        with suppress(AttributeError, RuntimeError):  # types or devices without such an order
            if not torch.is_autocast_enabled("cpu"):
                for layer in layers:
                    layer.packed_weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight)
        yield
    finally:
        for layer in layers:
            layer.packed_weight = None  # the weights may be trained before the next use


def keep_freed_memory():
    """Tell glibc to reuse freed memory rather than return it to the system: large tensors would
    otherwise cost a page fault for each 4 KB. For programs; a library should not decide this."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: allocate nothing by mmap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: keep all that was freed
