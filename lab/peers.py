"""
The three methods that the paper measures RDTF against, each on I2VGen-XL: a few new modules learn, all else
is frozen. Written from their papers; full size adds 1.7M, 24.8M and 24.9M parameters to 1.42B.

The base sees a clip as DFGN does not: it has no masks, a first frame and 8 frames. At one of its positions
    residual -> frames (convolutions) -> space (attention, text, feed-forward) -> frames (attention, twice)
there are added, with X of one frame, d wide, and 0 for what starts at zero, so that step 0 is the base:

Customize-A-Video (cav): LoRA on attention over frames, and over space     y = W x + B A x

    x ---- W -------- + -- y         W: q, k, v or output; A: d -> rank; B: rank -> d, 0
      \\-- A -- B --/

I2V-Adapter (i2v): all frames also look at the first one     y = Att(Q, K, V) W_O + Att(X W_Q', K_1, V_1) W_O'

    X_i -- Q, K, V of frame i ----------- Att -- W_O -- + -- y_i
       \\-- W_Q' -- with K, V of frame 1 -- Att -- W_O' --/       W_Q': a copy of W_Q; W_O': 0

SimDA (simda): bottlenecks     h + U D_3 D h     a + W_2 gelu(W_1 a)     h + ff(norm h) + W_2 gelu(W_1 h)

    residual -- frames -- + -- space:  attention -- + -- text -- norm -- feed-forward -- + --
                      \\-- D -- D_3 -- U --/      \\-- W_1, W_2 --/  \\------ W_1, W_2 ------/
    D: d -> d/2; D_3: each channel by itself, 3 frames; W_1: d -> d/4; U, W_2: 0

Given frames, tasks, noise schedule, guidance and loss are those of RDTF. Where a method knows one first frame
and here several are given, its branch takes the nearest given one. Shapes: as in model.py.
"""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, DDIMScheduler, I2VGenXLUNet, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from masks import NUM_FRAMES
from model import make_scheduler
from support.common import UserError
from support.machine import to_device
from support.pretrained import load_pretrained
from support.prior import nearest_given

# base: the network itself, of which everything learns
CHOICES = dict(name=("base", "cav", "i2v", "simda"), absorber=("space", "none"), prediction=("eps", "v"))
FPS = 16  # what I2VGen-XL's own pipeline says unless told otherwise: key frames have no rate
I2VGEN_XL = dict(prediction="v", text_tokens=77)  # how its weights were trained
# A base that two CPU cores train. For latents of 16 channels beside a prior's estimate it has 7.5M weights;
# 1.6M of them embed an image that is never given, the others are 1.7 times `tiny`'s (1.5 in the paper).
LAPTOP = dict(block_out_channels=(48, 80), layers_per_block=1, attention_head_dim=16, norm_num_groups=8)
LAPTOP |= dict(down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"), cross_attention_dim=256)
LAPTOP |= dict(up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"))

# ------------------------------------------------------------------------------------------------------------
# Adapters. Each hooks itself to layers of the base, whose keys stay those of diffusers


def start_at_zero(layer):
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    return layer


class LowRank(nn.Module):
    """LoRA on a linear layer: A is drawn from N(0, 1 / rank^2), B is zero, the scale is one."""

    def __init__(self, linear, rank):
        super().__init__()
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = start_at_zero(nn.Linear(rank, linear.out_features, bias=False))
        nn.init.normal_(self.down.weight, std=1 / rank)
        linear.register_forward_hook(self.add)

    def add(self, linear, inputs, output):
        return output + self.up(self.down(inputs[0]))


class FirstFrame(nn.Module):
    """I2V-Adapter's branch beside a self-attention over space; without any given frame it is switched off."""

    def __init__(self, attention, call):
        super().__init__()
        self.call, width = call, attention.to_q.in_features
        self.to_q = nn.Linear(width, attention.inner_dim, bias=False)
        self.to_out = start_at_zero(nn.Linear(attention.inner_dim, width))
        with torch.no_grad():
            self.to_q.weight.copy_(attention.to_q.weight)
        attention.register_forward_hook(self.add)

    def add(self, attention, inputs, output):
        x = inputs[0]  # (N, HW, d)
        first = x[self.call.nearest]  # (N, HW, d) of the given frame that is nearest, without noise
        branch = self.to_q(x), attention.to_k(first), attention.to_v(first)
        q, k, v = (y.unflatten(2, (attention.heads, -1)).transpose(1, 2) for y in branch)
        y = F.scaled_dot_product_attention(q, k, v)  # (N, heads, HW, head width)
        y = self.to_out(y.transpose(1, 2).flatten(2))  # (N, HW, d)
        return output + torch.where(self.call.some, y, 0.0)


class Bottleneck(nn.Module):
    """SimDA's adapter in a spatial transformer: on the output of a layer, or, with the norm before it, beside
    the two of them."""

    def __init__(self, width, layer, norm=None):
        super().__init__()
        self.down = nn.Linear(width, width // 4)
        self.up = start_at_zero(nn.Linear(width // 4, width))
        layer.register_forward_hook(self.add)
        if norm is not None:
            norm.register_forward_hook(self.remember)

    def remember(self, norm, inputs, output):
        self.seen = inputs[0]  # (N, HW, d), not normed, as in its code

    def add(self, layer, inputs, output):
        h = self.__dict__.pop("seen", output)
        return output + self.up(F.gelu(self.down(h)))


class FrameBottleneck(nn.Module):
    """SimDA's adapter over frames, after the convolutions over frames; linear, as in its code."""

    def __init__(self, temp_conv, call):
        super().__init__()
        self.call, width = call, temp_conv.in_dim
        inner = width // 2
        self.down = nn.Conv2d(width, inner, 1)
        self.frames = nn.Conv2d(inner, inner, (3, 1), padding=(1, 0), groups=inner)
        self.up = start_at_zero(nn.Conv2d(inner, width, 1))
        for layer in (self.down, self.frames):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        temp_conv.register_forward_hook(self.add)

    def add(self, temp_conv, inputs, output):
        x, height = self.down(output), output.shape[2]  # (N, d/2, H, W)
        x = x.flatten(2).unflatten(0, (-1, self.call.frames))  # (B, F, d/2, HW)
        x = self.frames(x.transpose(1, 2))  # (B, d/2, F, HW)
        x = x.transpose(1, 2).flatten(0, 1).unflatten(2, (height, -1))  # (N, d/2, H, W)
        return output + self.up(x)


def positions(base):
    """(convolutions over frames, spatial transformer block, temporal transformer block) of each place where
    the base has all three: 16 at full size."""
    for block in (*base.down_blocks, base.mid_block, *base.up_blocks):
        transformers = getattr(block, "attentions", ()), getattr(block, "temp_attentions", ())
        for conv, space, time in zip(block.temp_convs, *transformers):
            yield conv, space.transformer_blocks[0], time.transformer_blocks[0]


def attach(name, base, call, rank, absorber):
    """Hooks the adapters of a method to `base`; returns them, an nn.ModuleList. call: what a forward pass
    tells its hooks. absorber: of cav, "space" or "none" """
    convs, spaces, times = zip(*positions(base))
    adapters = []
    if name == "cav":  # T-LoRA, where both attentions are over frames, and S-LoRA
        blocks = (base.transformer_in.transformer_blocks[0], *times, *(spaces if absorber == "space" else ()))
        attentions = [attention for block in blocks for attention in (block.attn1, block.attn2)]
        linears = [linear for a in attentions for linear in (a.to_q, a.to_k, a.to_v, a.to_out[0])]
        adapters = [LowRank(linear, rank) for linear in linears]
    elif name == "i2v":
        adapters = [FirstFrame(space.attn1, call) for space in spaces]
    elif name == "simda":
        for conv, space in zip(convs, spaces):
            adapters += [FrameBottleneck(conv, call), Bottleneck(conv.in_dim, space.attn1)]
            adapters.append(Bottleneck(conv.in_dim, space.ff, space.norm3))
    return nn.ModuleList(adapters)


# ------------------------------------------------------------------------------------------------------------
# The base


class FrameConv3d(nn.Conv3d):
    """A (3, 1, 1) convolution, computed as the (3, 1) one over (frames, HW) that it is: faster on a CPU."""

    def forward(self, x):
        height = x.shape[3]
        x = F.conv2d(x.flatten(3), self.weight.squeeze(4), self.bias, padding=(1, 0))  # (B, d, F, HW)
        return x.unflatten(3, (height, -1))


def mend(base):
    """An I2VGenXLUNet, changed in place: faster convolutions, and no dropout, with which a resumed run would
    differ: torch's random state is not saved. Its keys, and what it computes in eval mode, stay."""
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if type(module) is nn.Conv3d and module.kernel_size == (3, 1, 1):
            module.__class__ = FrameConv3d  # the same weights, computed otherwise
    return base


def make_base(latent_channels=4, condition_channels=None, **shape):
    """An I2VGenXLUNet with random weights. shape: its other arguments, by default those of I2VGen-XL.

    condition_channels: 2 C where a prior's estimate stands beside the noisy latents, else None"""
    channels = dict(in_channels=condition_channels or latent_channels, out_channels=latent_channels)
    base = I2VGenXLUNet(**channels, **shape)
    # Given latents enter through two convolutions, which diffusers makes for four channels.
    for layers in (base.image_latents_proj_in, base.image_latents_context_embedding):
        if latent_channels != layers[0].in_channels:
            layers[0] = nn.Conv2d(latent_channels, layers[0].out_channels, 3, padding=1)
    return mend(base)


def load_base(source):
    """The base in a folder or hub id: I2VGen-XL's, whole or its unet/ alone, or a model of ours that was
    trained as `base`, averaged weights first. Returns it and the settings of Peer that it was trained under.
    Raises UserError (EncoderError) if it is of another class, its weights are missing or do not fit its
    config.json, or are not safetensors."""

    def network_of(config):
        for network in (I2VGenXLUNet, Peer):
            if network.__name__ == config["_class_name"] and config.get("name", "base") == "base":
                return network
        raise ValueError(f"it is a {config.get('name', config['_class_name'])}, not an I2VGenXLUNet")

    def build(folder):
        config = I2VGenXLUNet.load_config(folder)
        return network_of(config).from_config(config)

    def load(source, subfolder):
        network = network_of(I2VGenXLUNet.load_config(source, subfolder=subfolder))
        how = dict(use_safetensors=True, low_cpu_mem_usage=False)
        return network.from_pretrained(source, subfolder=subfolder, **how)

    found = load_pretrained("--base", source, ("unet_ema", "unet"), load, build)
    if isinstance(found, I2VGenXLUNet):
        return mend(found), dict(I2VGEN_XL)
    with torch.device("meta"):  # another one, without the hook of that Peer
        base = make_base(found.config.latent_channels, found.config.condition_channels, **found.config.shape)
    base.load_state_dict(found.base.state_dict(), assign=True)
    return base, {name: found.config[name] for name in I2VGEN_XL}


def matched_timesteps():
    """For each timestep of ours the one at which I2VGen-XL's schedule (cosine, no signal at its end) has the
    same signal-to-noise ratio, a fraction: float32 (1000,). Both keep the variance, so equal alphas do."""
    cosine = DDIMScheduler(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True)
    ours, theirs = (s.alphas_cumprod.double().numpy() for s in (make_scheduler(), cosine))
    steps = np.interp(ours, theirs[::-1], np.arange(len(theirs))[::-1])
    return torch.from_numpy(steps).float()


# ------------------------------------------------------------------------------------------------------------
# The network, as it is called here


class Peer(ModelMixin, ConfigMixin):
    """A base with the adapters of one method, called as DFGN is; like it, it predicts noise, or is what
    `precondition` wraps. It knows no filler: F slots are F frames, in training NUM_FRAMES.

    unet: a base that is there already, which becomes part of it; None: one with random weights"""

    ignore_for_config = ["unet"]

    @register_to_config
    def __init__(
        self,
        name,  # the method, or base
        latent_channels=4,  # C, of the codec
        condition_channels=None,  # None: C, the given frames; 2 C: the prior's estimate, too
        clip_dim=1024,  # width of the text states; those of T5 are not looked at
        t5_dim=1024,
        text_tokens=24,  # all captions have as many, since the base has no mask for text; more are cut
        rank=4,  # cav: of LoRA
        absorber="space",  # cav: S-LoRA learns with T-LoRA and stays; "none": T-LoRA alone
        learn_condition=False,  # let the way in of given latents learn, made for a first frame alone
        prediction="eps",  # "v": the base predicts velocity under its own schedule, as I2VGen-XL does
        shape=None,  # of the base, as make_base takes it
        unet=None,
    ):
        super().__init__()
        for field, allowed in CHOICES.items():
            if self.config[field] not in allowed:
                raise ValueError(f"{field} is {self.config[field]!r}: it must be in {', '.join(allowed)}.")
        if condition_channels not in (None, latent_channels) and prediction == "v":
            raise ValueError("a base that predicts v goes without a prior's estimate.")
        self.call = SimpleNamespace()  # what a forward pass tells the hooks about its clips
        self.base = unet or make_base(latent_channels, condition_channels, **(shape or {}))
        if self.base.image_latents_context_embedding._forward_pre_hooks:
            raise ValueError("this base is part of another Peer already: make or load a new one.")
        width = self.base.config.cross_attention_dim
        self.text_projection = nn.Identity() if clip_dim == width else nn.Linear(clip_dim, width)
        self.base.requires_grad_(name == "base")
        if learn_condition:
            self.base.image_latents_proj_in.requires_grad_(True)
            self.base.image_latents_temporal_encoder.requires_grad_(True)
        self.adapters = attach(name, self.base, self.call, rank, absorber)
        self.base.image_latents_context_embedding.register_forward_pre_hook(self.show_earliest)
        with torch.device("cpu"):  # not on the meta device, and no buffers, whose type may be changed
            alphas = make_scheduler().alphas_cumprod
            steps = matched_timesteps() if prediction == "v" else torch.arange(len(alphas)).float()
        self.schedule = alphas, steps  # (1000,) each

    def show_earliest(self, embedding, inputs):
        """A hook: the base makes tokens of slot 0, here of the earliest given frame."""
        return (self.call.earliest,)

    def split_condition(self, latents, given):
        """Clean latents of given frames (B, F, C, h, w), the prior's estimate (B, F, 0 | C, h, w), and which
        frames are given, bool (B, F)."""
        if latents.shape[2] == self.config.latent_channels:
            return latents, latents[:, :, :0], to_device(given, latents.device)
        # Preconditioned gives each frame the nearest given latents and the estimate, and its mask hides none.
        # Both are exact in given frames, and so equal, to the last bit, there alone.
        shown, estimate = latents.chunk(2, dim=2)
        return shown, estimate, (shown == estimate).flatten(2).all(dim=2)

    def tell_hooks(self, image, given):
        """image: (B, F, C, h, w), what stands beside the noisy latents; given: bool (B, F)"""
        batch, frames = given.shape
        rows, slots = (torch.arange(n, device=given.device) for n in (batch, frames))
        nearest = nearest_given(slots.expand(batch, -1)[:, :, None, None, None], given).long().flatten(1)
        self.call.frames = frames
        self.call.nearest = (frames * rows[:, None] + nearest).flatten()  # (N,) places in B * F
        self.call.some = given.any(dim=1).repeat_interleave(frames)[:, None, None]  # (N, 1, 1)
        # Where none is given that is slot 0, and its place in time zeros
        self.call.earliest = image[rows, given.int().argmax(dim=1)]  # (B, C, h, w)

    def forward(self, noisy, latents, given, timestep, text, valid=None):
        """As DFGN.forward; given frames come back with exactly the noise that is in them, unless a prior's
        estimate is there and the wrapper sees to it. Weights in bf16 beside adapters in fp32 need autocast.
        Raises UserError for slots without a frame, and in training for clips of fewer than NUM_FRAMES."""
        batch, frames = noisy.shape[:2]
        if (valid is not None and not valid.all()) or (self.training and frames != NUM_FRAMES):
            raise UserError(
                f"a peer cannot tell filler from frames: train it on clips of {NUM_FRAMES} key frames alone."
            )
        shown, estimate, given = self.split_condition(latents, given)
        mask, dtype = given[:, :, None, None, None], self.base.conv_in.weight.dtype

        # Where no frame is given stands its place in time, as in I2VGen-XL behind the first frame.
        place = torch.linspace(0, 1, frames, device=noisy.device, dtype=noisy.dtype)[:, None, None, None]
        image = torch.where(mask, shown, place).to(dtype)  # (B, F, C, h, w)
        self.tell_hooks(image, given)
        # I2V-Adapter takes given frames in without noise, the others as noisy as the rest.
        x = torch.where(mask, shown, noisy) if self.config.name == "i2v" else noisy
        x = torch.cat([x, estimate], dim=2).to(dtype)  # (B, F, C | 2C, h, w)
        clip, clip_mask = text[:2]
        words = F.pad(clip * clip_mask[:, :, None], (0, 0, 0, self.config.text_tokens - clip.shape[1]))
        words = self.text_projection(words).to(dtype)  # (B, text_tokens, D)
        picture = words.new_zeros(batch, words.shape[2])  # no CLIP of the image: as its guidance has it
        alpha, step = (to_device(x, noisy.device)[timestep] for x in self.schedule)  # (B,) each
        rate = torch.full((batch,), FPS, device=noisy.device)
        x, image = x.transpose(1, 2), image.transpose(1, 2)  # (B, C, F, h, w)
        out = self.base(x, step, rate, image, picture, words, return_dict=False)[0].transpose(1, 2)
        if estimate.shape[2]:
            return out  # (B, F, C, h, w)

        alpha = alpha[:, None, None, None, None]
        if self.config.prediction == "v":  # v = sqrt(alpha) noise - sqrt(1 - alpha) clean
            out = alpha.sqrt() * out + (1 - alpha).sqrt() * noisy
        return torch.where(mask, (noisy - alpha.sqrt() * latents) / (1 - alpha).sqrt(), out)


def build_peer(name, base, **settings):
    """The Peer of a method on `base`, an I2VGenXLUNet of make_base or load_base, which becomes part of it.
    settings: other arguments of Peer; clip_dim is by default the width of the base's text."""
    # sorted, as config.json has it: a resumed run compares the two
    shape = {key: value for key, value in sorted(base.config.items()) if not key.startswith("_")}
    channels = dict(latent_channels=shape.pop("out_channels"), condition_channels=shape.pop("in_channels"))
    settings = dict(clip_dim=base.config.cross_attention_dim) | settings
    return Peer(name, **channels, **settings, shape=shape, unet=base)
