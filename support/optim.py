"""
What a training step does to the weights, and where its state lives: AdamW in three sizes, Muon, averaged
weights, weights sharded over ranks.

                     weights  gradients  moments  bytes per parameter, without averaged weights
    make_optimizer      4         4        8     16
      muon              4         4        4     12      tiny
      eight_bit         4         4        2     10      8-bit moments (torchao)
      low_memory        2         2        2      6      and bf16 weights, rounded stochastically
    shard               all of it divided by the number of ranks
"""

import math
import warnings
from contextlib import contextmanager

import torch
import torch.nn as nn
from diffusers.training_utils import EMAModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from support.common import UserError
from support.machine import exact

ADAM = dict(betas=(0.9, 0.999), weight_decay=0.01)
# The gate of a temporal layer is one number that starts at zero: at the weights' own rate it would open too
# late.
ALPHA_LR = 30
MUON_LR = 2.5  # times AdamW's
MAX_GRAD_NORM = 1.0
EMA_DECAY, EMA_POWER = 0.9999, 0.75  # the decay warms up as 1 - (1 + step) ** -EMA_POWER


def make_optimizer(unet, learning_rate, eight_bit=False, low_memory=False, muon=False):
    """AdamW over the weights of `unet`; with `muon`, and moments of 32 bits, Muon over the matrices and
    convolutions inside of it. With `low_memory` the weights must be bf16: an update smaller than their last
    digit is then applied with the matching probability instead of being lost.

    Raises UserError if torchao is missing."""
    inside, weights, gates = [], [], []
    for name, weight in unet.named_parameters():
        ends = "conv_in.", "conv_out.", "clip_", "t5_", "text_projection."  # of lab/peers.py, too
        to_or_from = name.removeprefix("base.").startswith(ends) or ".fusion." in name
        matrix = muon and weight.ndim > 1 and not to_or_from
        (gates if name.endswith(".alpha") else inside if matrix else weights).append(weight)
    groups = [dict(params=weights), dict(params=gates, lr=ALPHA_LR * learning_rate, weight_decay=0.0)]
    if not (eight_bit or low_memory):
        groups += [dict(params=inside, lr=MUON_LR * learning_rate, muon=True)] * muon
        return Muon(groups, lr=learning_rate, fused=True, **ADAM)
    groups[0]["params"] = weights + inside
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError("--use_8bit_adam and --low_memory need a package: pip install torchao") from error
    return AdamW8bit(groups, lr=learning_rate, bf16_stochastic_round=low_memory, **ADAM)


class Muon(torch.optim.AdamW):
    """AdamW, but for groups that say muon=True: there (Jordan et al. 2024) the momentum of a weight is taken
    as a matrix, (outputs, inputs x kernel), and its singular values are made equal; steps have the size of
    AdamW's (Liu et al. 2025). torch's own takes no convolutions, and computes in bf16, which many CPUs are
    slow at."""

    MOMENTUM = 0.95

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if group.get("muon"):
                self.orthogonal_step(group)
        super().step()  # of the weights that still have gradients

    def orthogonal_step(self, group):
        shapes = {}  # matrices of equal shape are one batch
        for weight in group["params"]:
            gradient, weight.grad = weight.grad, None
            if gradient is None:
                continue
            state = self.state[weight]
            if not state:  # AdamW looks for a step in every state that is loaded
                state.update(step=torch.zeros((), device=weight.device), momentum=torch.zeros_like(weight))
            state["step"] += 1
            momentum = state["momentum"].lerp_(gradient, 1 - self.MOMENTUM)
            ahead = gradient.lerp(momentum, self.MOMENTUM)
            ahead = ahead.full_tensor() if isinstance(ahead, DTensor) else ahead
            shapes.setdefault(ahead.flatten(1).shape, []).append((weight, ahead.flatten(1)))
        for shape, pairs in shapes.items():
            weights, ahead = zip(*pairs)
            size = group["lr"] * 0.2 * max(shape) ** 0.5
            for weight, step in zip(weights, orthogonal(torch.stack(ahead))):
                step = step.view(weight.shape)
                if isinstance(weight, DTensor):
                    step = distribute_tensor(step, weight.device_mesh, weight.placements)
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step, alpha=size)


@exact()
def orthogonal(matrices):
    """Matrices (N, rows, columns) -> the same singular vectors with singular values of about 1, by five steps
    of Newton and Schulz. Of long rows they are taken on the products of rows: in a third of the time, but it
    is wrong in TF32, whose errors grow from step to step."""
    x = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    is_long, one = x.shape[2] >= 2 * x.shape[1], torch.eye(x.shape[1], device=x.device, dtype=x.dtype)
    products, factor = x @ x.mT, one
    for _ in range(5):
        change = 3.4445 * one - 4.7750 * products + 2.0315 * products @ products
        if is_long:
            factor, products = change @ factor, change @ products @ change
        else:
            x = change @ x
            products = x @ x.mT
    x = factor @ x if is_long else x
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT


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


class RareEMA(EMAModel):
    """An EMAModel that is fed every RARELY-th step, with the decay of all steps since the last one. The
    first ones, in which much changes, count one by one."""

    RARELY, FIRST = 10, 100

    def is_due(self, step):
        return step <= self.FIRST or step % self.RARELY == 0

    def get_decay(self, step):
        steps = [step] if step <= self.FIRST else range(step - self.RARELY + 1, step + 1)
        return math.prod(super(RareEMA, self).get_decay(one) for one in steps)


class Average:
    """The exponential moving average of the weights (diffusers' EMAModel with warm-up), always in fp32.

    on_cpu: it lives in the CPU's memory; weights are copied there, and averaged, every tenth step"""

    def __init__(self, unet, on_cpu=False):
        self.on_cpu, ema = on_cpu, RareEMA if on_cpu else EMAModel
        warm_up = dict(use_ema_warmup=True, power=EMA_POWER)
        self.ema = ema(local_weights(unet), decay=EMA_DECAY, foreach=True, **warm_up)
        self.ema.to(device="cpu" if on_cpu else None, dtype=torch.float32)

    def step(self, unet):
        """Takes the weights after one more step of the optimizer."""
        weights = local_weights(unet)
        if self.on_cpu:
            if not self.ema.is_due(self.ema.optimization_step + 1):
                self.ema.optimization_step += 1
                return
            pinned = [torch.empty_like(w, device="cpu", pin_memory=w.is_cuda) for w in weights]
            weights = [nn.Parameter(x.copy_(w.detach(), non_blocking=True)) for x, w in zip(pinned, weights)]
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        self.ema.step(weights)

    def weights(self, unet):
        """{name of a weight of `unet`: its average}, fp32 in the CPU's memory, whole; every rank has to call
        it. Copies, which the next step does not change."""
        shadows = zip(unet.named_parameters(), self.ema.shadow_params, strict=True)
        return {name: whole(shadow, weight).cpu().clone() for (name, weight), shadow in shadows}

    def load(self, unet, weights, step):
        """Goes on from `weights`, as `self.weights` gave them after `step` steps of the optimizer."""
        for (name, weight), shadow in zip(unet.named_parameters(), self.ema.shadow_params, strict=True):
            average = weights[name]
            if isinstance(weight, DTensor):
                where = weight.device_mesh, weight.placements
                average = distribute_tensor(average.to(weight.device), *where).to_local()
            shadow.copy_(average)
        self.ema.optimization_step = step


def whole(part, weight):
    """The tensor of which each rank holds a `part`, split as `weight` is; `part` itself where nothing is."""
    if not isinstance(weight, DTensor):
        return part
    part, mesh, placements = part.to(weight.device), weight.device_mesh, weight.placements
    shape = dict(shape=weight.shape, stride=weight.stride())
    return DTensor.from_local(part, mesh, placements, run_check=False, **shape).full_tensor()


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


def shard(unet, device, dtype):
    """Splits weights, gradients and AdamW's state over the ranks (FSDP2): a layer's weights are gathered when
    it runs and dropped after. Each residual layer goes with its transformer and temporal layer.

    dtype: in which weights travel and compute. They are kept, and their gradients summed, in fp32."""
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in unet.layers():
        fully_shard([module for module in layer if module is not None], mesh=mesh, mp_policy=policy)
    # The network's output is a view; nothing changes it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # What is left: input and output layers
    fully_shard(unet, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
