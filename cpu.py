"""Faster matrix products on CPUs, applied to a finished model from outside.

PyTorch has two libraries for float32 products on CPUs, MKL and oneDNN, and `F.linear` uses MKL.
Delete this file and its calls, and everything gives the same results (but for the random draws of
dropout), slower.
"""

import ctypes
from contextlib import suppress
from functools import cache, wraps
from timeit import timeit

import torch
import torch.nn.functional as F
from torch import nn


def accelerate(model):
    """Let the linear layers of the model use the faster library. Returns the model."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear
            module.use_convolution = convolution_is_faster()
    return model


class FastLinear(nn.Linear):
    packed_weight = None  # the weight in the order that oneDNN needs, during `generate`

    def forward(self, x):
        weight = self.packed_weight  # read once: another thread may remove it
        if weight is not None:
            return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")
        many_rows = x.numel() >= 512 * self.in_features
        if self.use_convolution and many_rows and x.is_cpu and x.dtype == torch.float32:
            return linear_as_convolution(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def linear_as_convolution(x, weight, bias):
    """F.linear as a convolution of width 1, which is computed by oneDNN. The rows are pixels."""
    image = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, in_features, 1, rows)
    image = F.conv2d(image, weight[..., None, None], bias)  # (1, out_features, 1, rows)
    return image.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


@cache
def convolution_is_faster():
    """Whether oneDNN is at least a tenth faster than F.linear on this processor, as on many of
    AMD's. Tried once, for 30 ms."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight = torch.ones(512, 768), torch.ones(768, 768)
    seconds = {F.linear: [], linear_as_convolution: []}
    for _ in range(5):
        for product, times in seconds.items():
            times.append(timeit(lambda: product(x, weight, None), number=1))
    return min(seconds[F.linear]) > 1.1 * min(seconds[linear_as_convolution])


def tokens_in_pieces(feed_forward):
    """Decorator: compute a feed-forward layer for 1,024 tokens at a time. Its hidden states, four
    times as wide as its input, then need a quarter of the memory at 4,096 tokens."""
    @wraps(feed_forward)
    def feed_forward_in_pieces(layer, x):
        if not x.is_cpu:
            return feed_forward(layer, x)
        return torch.cat([feed_forward(layer, piece) for piece in x.split(1024, dim=1)], dim=1)
    return feed_forward_in_pieces


def packed_weights(generate):
    """Decorator: during `generate`, keep the weights in the order that oneDNN needs. Products of
    few rows then take a third of the time, since F.linear reorders the weights for each."""
    @wraps(generate)
    def generate_with_packed_weights(model, *args, **settings):
        modules = *model.model.decoder.modules(), model.lm_head
        layers = [module for module in modules if isinstance(module, FastLinear)]
        try:
            with suppress(AttributeError, RuntimeError):  # types or devices without such an order
                if not torch.is_autocast_enabled("cpu"):
                    for layer in layers:
                        layer.packed_weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight)
            return generate(model, *args, **settings)
        finally:
            for layer in layers:
                layer.packed_weight = None
    return generate_with_packed_weights


def keep_freed_memory():
    """Tell glibc to reuse freed memory rather than return it to the system: large tensors would
    otherwise cost a page fault for each 4 KB. For programs; a library should not decide this."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: allocate nothing by mmap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: keep all that was freed
