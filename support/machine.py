"""
The machine and its processes: which kernels compute, in which precision, on which ranks, and what stops a
run.
"""

import os
import signal
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.rendezvous import rendezvous
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from support.common import UserError

# oneDNN, which computes on the CPU, keeps one kernel per operation and shape. The number of frames in a batch
# differs from step to step: of the 1024 kernels that it keeps by default most are gone before they are asked
# for again. It reads this before its first operation.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
if torch.cuda.is_available():
    torch.set_float32_matmul_precision("high")  # TF32 for what is computed in fp32, but for `exact`

# ------------------------------------------------------------------------------------------------------------
# Precision and kernels

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by --mixed_precision


def device():
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def native_bf16():
    """Whether this machine computes in bf16 natively."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def native_precision(mixed_precision):
    """The precision to run a model in that was trained in `mixed_precision`: the same where this machine
    computes in it natively, else single precision. Emulation is slow, and fp16 and bf16 are not each other's
    stand-ins: fp16 overflows at what bf16 holds."""
    native = dict(no=True, fp16=torch.cuda.is_available(), bf16=native_bf16())
    return mixed_precision if native[mixed_precision] else "no"


@contextmanager
def exact():
    """Single precision whatever is going on around it: no autocast, no TF32. For what is not learned, and
    needs no gradient."""
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = cudnn


def to_device(tensor, device):
    """`tensor` on `device`; a GPU gets it from pinned memory, so that the copy waits for no kernel."""
    cpu_to_gpu = tensor.device.type == "cpu" and torch.device(device).type == "cuda"
    if cpu_to_gpu and not torch.compiler.is_compiling():  # a compiler cannot trace the next line
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@contextmanager
def precision(device_type, mixed_precision):
    """The context to run the network in. mixed_precision: "no", "fp16" or "bf16"."""
    with ExitStack() as stack:
        if mixed_precision != "no":
            stack.enter_context(torch.autocast(device_type, DTYPES[mixed_precision]))
        # For sequences as short as those of `tiny`, plain matrix products beat the CPU's flash attention
        # backwards.
        if device_type == "cpu" and torch.is_grad_enabled():
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def recompute_contexts():
    """Contexts for gradient checkpointing: the backward pass runs outside `precision`, and must recompute
    with the same attention kernel (torch itself carries autocast over)."""
    again = nullcontext() if torch.backends.cuda.flash_sdp_enabled() else sdpa_kernel(SDPBackend.MATH)
    return nullcontext(), again


# What DFGN.enable_gradient_checkpointing takes.
recompute = partial(checkpoint, use_reentrant=False, context_fn=recompute_contexts)


def cast_to_weight_dtype(norm, inputs):
    """A hook: LayerNorm computes in the type of its weights, in single precision as a rule. So does autocast
    on a GPU, but on a CPU it would sum the gradients of weights and biases in bf16, which loses digits."""
    return (inputs[0].to(norm.weight.dtype),)


def cast_to_autocast_dtype(norm, inputs, output):
    """A hook: under autocast, norms return half precision. A GPU's autocast returns single precision, and all
    that is added or kept for the backward pass after it would have twice the size."""
    kind = output.device.type
    return output.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else output


def hook_norms(unet):
    """Lets norms compute in single precision, and return what the layers around them work in. Returns the
    network."""
    for module in unet.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_pre_hook(cast_to_weight_dtype)
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm)):
            module.register_forward_hook(cast_to_autocast_dtype)
    return unet


def prepare(unet, device, channels_last=True):
    """Moves a network to where it computes, in the layout that convolutions want, with norms as `hook_norms`
    has them. channels_last: False for weights that have to stay contiguous. Returns it."""
    hook_norms(unet).to(device)
    for module in unet.modules() if channels_last else ():
        if isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return unet


def compile_layers(unet, **options):
    """Compiles layer by layer: the whole network would be compiled anew for each way of packing frames. With
    dynamic shapes a layer has one graph for all numbers of clips, slots and frames above one, with or without
    gradients. options: of torch.compile"""
    # Graphs of all layers of a class together; beyond it they would run as they are.
    torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = 256, 1024
    for layer in unet.layers():
        for module in layer:
            if module is not None:
                module.compile(dynamic=True, **options)


# ------------------------------------------------------------------------------------------------------------
# Processes


class World:
    """The processes of a run: this one alone, or all that torchrun started. One alone never waits here.

    rank, size: of all processes; local_rank, local_size: of those on this machine
    main: whether this is rank 0; device: where this process computes"""

    def __init__(self):
        names = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1)
        numbers = (int(os.environ.get(name, default)) for name, default in names.items())
        self.rank, self.size, self.local_rank, self.local_size = numbers
        self.main = self.rank == 0
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            if self.local_size > (count := torch.cuda.device_count()):
                raise UserError(
                    f"--nproc_per_node {self.local_size} is more than the GPUs of this machine, which are "
                    f"{count}: start as many processes, or set CUDA_VISIBLE_DEVICES= to train on the CPU."
                )
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
        if self.size > 1:
            self.connect()

    def connect(self):
        # Rank 0 decodes, validates and saves while the others wait: longer than the default timeout allows.
        patience = timedelta(hours=12)
        store, _, _ = next(rendezvous("env://", timeout=patience))
        # torchrun's store outlives a restart, with the addresses of the processes that are gone (pytorch
        # issue 135712). On several machines the count differs, and an environment variable helps
        # (docs/reliability.md).
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if self.local_size == self.size else "0"
        store = dist.PrefixStore(f"restart-{restart}", store)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        group = dict(rank=self.rank, world_size=self.size, store=store, timeout=patience)
        dist.init_process_group(backend, **group)

    def close(self):
        if self.size > 1:
            dist.destroy_process_group()

    def print0(self, text):
        """Prints on rank 0, above a progress bar."""
        if self.main:
            tqdm.write(text)

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def sum(self, tensor):
        """The sum of a tensor over the ranks, on all of them."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def first(self, value):
        """What rank 0 has as `value`, on all ranks: anything that can be pickled."""
        if self.size > 1:
            dist.broadcast_object_list(values := [value])
            value = values[0]
        return value

    def distribute(self, unet):
        """`unet` for training on all ranks (DDP); the same if there is one, or if its weights are sharded."""
        if self.size == 1 or isinstance(unet, FSDPModule):
            return unet
        ids = [self.local_rank] if self.device.type == "cuda" else None
        return DistributedDataParallel(unet, device_ids=ids, gradient_as_bucket_view=True)


def gradient_sync(network, last):
    """The context of one forward and backward pass of a step; in the last the ranks sum their gradients."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
    return nullcontext() if last or not isinstance(network, DistributedDataParallel) else network.no_sync()


# ------------------------------------------------------------------------------------------------------------
# Stopping


@contextmanager
def stop_requests():
    """Yields a list that collects SIGTERM, SIGINT (Ctrl-C) and SIGHUP (the terminal was closed) instead of
    exiting. A second Ctrl-C exits at once, with status 130. Under nohup SIGHUP is ignored, and stays so."""
    signals = []
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)

    def note(number, _):
        if number == signal.SIGINT and signal.SIGINT in signals:
            os._exit(128 + number)
        signals.append(number)

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
