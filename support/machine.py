"""
The machine and its processes: which kernels compute in which precision, what stops a run.
"""

import os
import signal
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by --mixed_precision


def same_attention():
    """Contexts for gradient checkpointing: the backward pass runs outside `precision`, and must recompute with the
    same attention kernel (autocast is carried over by torch itself)."""
    again = nullcontext() if torch.backends.cuda.flash_sdp_enabled() else sdpa_kernel(SDPBackend.MATH)
    return nullcontext(), again


@contextmanager
def precision(device_type, mixed_precision):
    """The context to run the network in. mixed_precision: "no", "fp16" or "bf16"."""
    with ExitStack() as stack:
        if mixed_precision != "no":
            stack.enter_context(torch.autocast(device_type, DTYPES[mixed_precision]))
        # For sequences as short as those of `tiny`, plain matrix products beat the CPU's flash attention backwards.
        if device_type == "cpu" and torch.is_grad_enabled():
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def as_weights(norm, inputs):
    """A hook: LayerNorm computes in the type of its weights, in single precision as a rule. So does autocast on a GPU, but
    on a CPU it would sum the gradients of weights and biases in bf16, which loses digits with every frame."""
    return (inputs[0].to(norm.weight.dtype),)


def native_bf16():
    """Whether this machine computes in bf16 natively."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compile_layers(unet, temporal=()):
    """Compiles layer by layer (torch.compile): the whole network would be compiled anew for each way of packing frames."""
    torch._dynamo.config.recompile_limit = (
        64  # of all layers of a class together: beyond it they would run as they are
    )
    for module in unet.modules():
        if isinstance(module, (ResnetBlock2D, Transformer2DModel, *temporal)):
            module.compile()


@contextmanager
def stop_requests():
    """Yields a list that collects SIGTERM and SIGINT (Ctrl-C) instead of dying of them. A second Ctrl-C exits at
    once, with status 130."""
    asked = []

    def note(number, _):
        if number == signal.SIGINT and signal.SIGINT in asked:
            os._exit(128 + number)
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
