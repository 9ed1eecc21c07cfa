"""
What a training step does to the weights, and where its state lives: AdamW in three sizes, averaged weights,
weights sharded over ranks.

                     weights  gradients  AdamW   bytes per parameter, without averaged weights
    make_optimizer      4         4        8     16
      eight_bit         4         4        2     10      8-bit moments (torchao)
      low_memory        2         2        2      6      and bf16 weights, rounded stochastically
    shard               all of it divided by the number of ranks
"""

import warnings
from contextlib import contextmanager

import torch
import torch.nn as nn
from diffusers.training_utils import EMAModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from support.common import UserError

ADAM = dict(betas=(0.9, 0.999), weight_decay=0.01)
# The gate of a temporal layer is one number that starts at zero: at the weights' own rate it would open too
# late.
ALPHA_LR = 30
MAX_GRAD_NORM = 1.0
EMA_DECAY, EMA_POWER = 0.9999, 0.75  # the decay warms up as 1 - (1 + step) ** -EMA_POWER


def make_optimizer(unet, learning_rate, eight_bit=False, low_memory=False):
    """AdamW over the weights of `unet`. With `low_memory` the weights must be bf16: an update smaller than
    their last digit is then applied with the matching probability instead of being lost.

    Raises UserError if torchao is missing."""
    gates = [p for name, p in unet.named_parameters() if name.endswith(".alpha")]
    weights = [p for name, p in unet.named_parameters() if not name.endswith(".alpha")]
    groups = [dict(params=weights), dict(params=gates, lr=ALPHA_LR * learning_rate, weight_decay=0.0)]
    if not (eight_bit or low_memory):
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True, **ADAM)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError("--use_8bit_adam and --low_memory need a package: pip install torchao") from error
    return AdamW8bit(groups, lr=learning_rate, bf16_stochastic_round=low_memory, **ADAM)


def align_moments(optimizer):
    """Gives moments that were loaded the memory layout of their weights: those of sharded ranks come
    contiguous. Fused AdamW on a CPU takes equal layouts for granted, and would mix up their numbers."""
    for weight, moments in optimizer.state.items():
        for name, moment in moments.items():
            if type(moment) is torch.Tensor and moment.shape == weight.shape:  # neither sharded nor 8-bit
                moments[name] = torch.empty_like(weight, dtype=moment.dtype).copy_(moment)


def clip_gradients(unet):
    """Clips the gradients to MAX_GRAD_NORM. Returns their norm before that, over all ranks: a float."""
    norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), MAX_GRAD_NORM)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


# ------------------------------------------------------------------------------------------------------------
# Averaged weights


def local_weights(unet):
    """The weights that this rank holds, as plain parameters that share their memory with those of `unet`."""
    with torch.no_grad():
        return [nn.Parameter(p.to_local()) if isinstance(p, DTensor) else p for p in unet.parameters()]


class Average:
    """The exponential moving average of the weights (diffusers' EMAModel with warm-up), always in fp32.

    on_cpu: it lives in the CPU's memory, and each step copies the weights there"""

    def __init__(self, unet, on_cpu=False):
        self.on_cpu = on_cpu
        warm_up = dict(use_ema_warmup=True, power=EMA_POWER)
        self.ema = EMAModel(local_weights(unet), decay=EMA_DECAY, foreach=True, **warm_up)
        self.ema.to(device="cpu" if on_cpu else None, dtype=torch.float32)

    def step(self, unet):
        weights = local_weights(unet)
        if self.on_cpu:
            weights = [nn.Parameter(w.detach().to("cpu", torch.float32)) for w in weights]
        self.ema.step(weights)

    def load(self, unet, step):
        """Goes on from averaged weights that stand in `unet` at the moment, as of optimizer step `step`."""
        for shadow, weight in zip(self.ema.shadow_params, local_weights(unet), strict=True):
            shadow.copy_(weight.detach())
        self.ema.optimization_step = step


@contextmanager
def averaged(unet, average):
    """While it lasts, `unet` holds the averaged weights; without them (None) it stays as it is."""
    if average is None:
        yield
        return
    weights = local_weights(unet)
    average.ema.store(weights)
    average.ema.copy_to(weights)
    try:
        yield
    finally:
        average.ema.restore(weights)


# ------------------------------------------------------------------------------------------------------------
# Sharding


def shard(unet, device):
    """Splits weights, gradients and AdamW's state over the ranks (FSDP2): a layer's weights are gathered when
    it
    runs and dropped after. Each residual layer goes with its transformer and temporal layer."""
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in unet.layers():
        fully_shard([module for module in layer if module is not None], mesh=mesh)
    # The network's output is a view; nothing changes it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    fully_shard(unet, mesh=mesh, reshard_after_forward=True)  # what is left: input and output layers
