"""
DFGN, the discrete frame generation network of RDTF: a Stable-Diffusion-shaped U-Net that sees each frame by
itself, with an STI (spatial temporal interaction) layer after each of its spatial transformers.

    Frames    which slots of a batch hold frames: spatial layers compute nothing for the others
    STI       "STI layer": semantic branch, detail branch, learned fusion
    Conv3D    what the paper's ablation puts in the place of STI (Table 3), and a cheaper one
    DFGN      the U-Net
    SIZES     toy (for tests), tiny (two CPU cores), small (one consumer GPU), full (the paper's 0.96B)

$ python model.py    # sizes, parameters per part, every layer of `full` (or of `python model.py tiny`)

Shapes: B clips, F frame slots per clip, N valid frames in the batch, C latent channels, d channels of a
layer (d_0: the first), H x W its height and width, L tokens per text encoder, D width of the text space.
"""

import argparse
from functools import partial
from itertools import zip_longest

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from support.layers import print_layers, print_sizes
from support.machine import to_device

NUM_TIMESTEPS = 1000  # diffusion steps (Table 6)


def make_scheduler():
    """Table 6's schedule, "linear" as in the latent diffusion code: linear in sqrt(beta). Latents are not
    clipped, the schedule ends at alpha_1, not at 1, and any number of sampling steps starts at t = 999."""
    linear = dict(beta_start=0.00085, beta_end=0.0120, beta_schedule="scaled_linear")
    latents = dict(clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    return DDIMScheduler(NUM_TIMESTEPS, **linear, **latents)


# ------------------------------------------------------------------------------------------------------------
# Frames: the loss mask inside the network


class Frames:
    """Where the valid frames of a batch stand; valid: bool (B, F), or None when every slot is valid.
    Spatial layers work on the N valid frames alone, packed into one batch; temporal layers need the clip's
    axis back and get zeros in the slots that hold no frame. A mask in the CPU's memory makes no GPU wait."""

    def __init__(self, valid, batch, slots, device):
        self.batch, self.slots = batch, slots
        valid = None if valid is None or bool(valid.all()) else valid
        index = torch.arange(batch * slots) if valid is None else valid.flatten().nonzero().squeeze(1)
        self.valid = None if valid is None else to_device(valid, device)
        self.index = to_device(index, device)  # (N,) places in B * F
        self.clip = self.index // slots  # (N,) which clip a packed frame belongs to

    def pack(self, x):
        """(B, F, ...) -> (N, ...)"""
        x = x.flatten(0, 1)
        return x if self.valid is None else x[self.index]

    def unpack(self, x):
        """(N, ...) -> (B, F, ...), zeros in the filler slots"""
        if self.valid is not None:
            x = x.new_zeros(self.batch * self.slots, *x.shape[1:]).index_copy(0, self.index, x)
        return x.unflatten(0, (self.batch, self.slots))


# ------------------------------------------------------------------------------------------------------------
# Temporal layers: STI, and the ablation's 3D convolution


class FrameConv(nn.Module):
    """GroupNorm, SiLU, then a convolution over (frames, height, width) with kernel (3, 1, 1), or (3, 3, 3).

    The norm pools over one frame, never over frames: otherwise a frame would feel the filler."""

    def __init__(self, width, groups, spatial=False):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        kind, kernel, padding = (nn.Conv3d, 3, 1) if spatial else (nn.Conv2d, (3, 1), (1, 0))
        self.conv = kind(width, width, kernel, padding=padding)

    def forward(self, h, frames):
        x, height = F.silu(self.norm(h)), h.shape[2]  # (N, d, H, W)
        if isinstance(self.conv, nn.Conv3d):
            x = self.conv(frames.unpack(x).transpose(1, 2))  # (B, d, F, H, W)
            return frames.pack(x.transpose(1, 2))  # (N, d, H, W)
        # The same as nn.Conv3d(d, d, (3, 1, 1), padding=(1, 0, 0)) over (B, d, F, H, W). The kernel touches
        # single locations, so it may be a (3, 1) convolution over (F, H*W), which is a good deal faster.
        x = frames.unpack(x.flatten(2).transpose(1, 2))  # (B, F, H*W, d)
        x = self.conv(x.permute(0, 3, 1, 2))  # (B, d, F, H*W)
        x = frames.pack(x.permute(0, 2, 3, 1))  # (N, H*W, d)
        return x.transpose(1, 2).unflatten(2, (height, -1))  # (N, d, H, W)


class STI(nn.Module):
    """Spatial Temporal Interaction layer ("STI layer"; constants from Table 6).

    out = h + alpha * (w_1 * norm(semantic) + w_2 * norm(detail)), with w a softmax at every location. alpha
    starts at zero, so that fresh layers change nothing, and learns faster (ALPHA_LR of support/optim.py)."""

    def __init__(self, width, heads=8, head_width=32, gamma=2, groups=32):
        super().__init__()
        if type(gamma) is not int or gamma < 1:
            raise ValueError(f"sti_gamma is {gamma!r}: it must be a whole number, at least 1.")
        self.heads, self.gamma = heads, gamma
        inner = heads * head_width
        # semantic branch
        self.norm_attention = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Linear(inner, width)
        # detail branch
        self.convs = nn.ModuleList([FrameConv(width, groups), FrameConv(width, groups)])
        # fusion
        self.norm_semantic = nn.GroupNorm(groups, width)
        self.norm_detail = nn.GroupNorm(groups, width)
        self.fusion = nn.Linear(2 * width, 2)
        self.alpha = nn.Parameter(torch.zeros(1))

    def semantic(self, h, frames):
        """Any region of any frame looks at any region of any other frame, at 1/gamma of the resolution."""
        H, W = h.shape[2:]
        gamma = min(self.gamma, H, W)  # the lowest level may be smaller
        s = F.avg_pool2d(h, gamma, ceil_mode=True, count_include_pad=False)  # (N, d, H/g, W/g)
        s = s.flatten(2).transpose(1, 2)  # (N, HW/gg, d)
        positions = torch.arange(frames.slots, device=h.device)
        order = get_timestep_embedding(positions, s.shape[2]).to(s.dtype)  # (F, d) fixed sinusoids
        s = frames.unpack(self.norm_attention(s)) + order[:, None]  # (B, F, HW/gg, d)
        tokens_per_frame = s.shape[2]
        s = s.flatten(1, 2)  # (B, F*HW/gg, d)
        # (B, heads, F*HW/gg, head width) each
        projections = self.to_q, self.to_k, self.to_v
        q, k, v = (w(s).unflatten(2, (self.heads, -1)).transpose(1, 2) for w in projections)
        keys = None
        if frames.valid is not None:  # filler slots are no keys: (B, 1, 1, F*HW/gg)
            keys = frames.valid.repeat_interleave(tokens_per_frame, dim=1)[:, None, None]
        s = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)  # (B, heads, F*HW/gg, head width)
        s = self.to_out(s.transpose(1, 2).flatten(2))  # (B, F*HW/gg, d)
        s = frames.pack(s.unflatten(1, (frames.slots, tokens_per_frame)))  # (N, HW/gg, d)
        s = s.transpose(1, 2).unflatten(2, (-(-H // gamma), -1))  # (N, d, H/g, W/g)
        s = self.norm_semantic(s)  # before upsampling: the same statistics from fewer pixels
        s = F.interpolate(s, scale_factor=float(gamma), mode="nearest").to(s.dtype)  # a GPU's autocast: fp32
        return s[:, :, :H, :W]  # (N, d, H, W)

    def detail(self, h, frames):
        """Full resolution, along frames only."""
        for conv in self.convs:
            h = conv(h, frames)
        return self.norm_detail(h)  # (N, d, H, W)

    def forward(self, h, frames):
        s, e = self.semantic(h, frames), self.detail(h, frames)
        w = self.fusion(torch.cat([s, e], dim=1).permute(0, 2, 3, 1)).softmax(dim=-1)  # (N, H, W, 2)
        w_1 = w[..., 0].unsqueeze(1).to(s.dtype)  # (N, 1, H, W); w_2 = 1 - w_1
        return h + self.alpha.to(h.dtype) * torch.lerp(e, s, w_1)  # w_1 s + w_2 e


class Conv3D(nn.Module):
    """The temporal layer of the ablation "DFGN (3D-Conv)" (Table 3), with the same residual start: two
    (3, 3, 3) convolutions, or, not `spatial`, four (3, 1, 1) ones, as in the video U-Nets that the paper's
    lineage starts from. The paper gives no size; `full` has 1.54B and 1.02B parameters with them."""

    def __init__(self, width, groups=32, spatial=True):
        super().__init__()
        self.convs = nn.ModuleList([FrameConv(width, groups, spatial) for _ in range(2 if spatial else 4)])
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, h, frames):
        x = h
        for conv in self.convs:
            x = conv(x, frames)  # (N, d, H, W)
        return h + self.alpha.to(h.dtype) * x


# ------------------------------------------------------------------------------------------------------------
# The U-Net


class Block(nn.Module):
    """The layers of one resolution, under the names that diffusers' 2D conditional U-Net gives them, so that
    a Stable Diffusion 2.x checkpoint fits. `temporal` is ours.

    config: of DFGN; in_widths: channels that each residual layer takes; width: channels that it gives;
    attention: a bool per layer, whether a transformer and a temporal layer follow"""

    def __init__(self, config, in_widths, width, attention):
        super().__init__()
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()
        self.temporal = nn.ModuleList()
        self.downsamplers = nn.ModuleList()  # none or one
        self.upsamplers = nn.ModuleList()  # none or one
        c, groups, head = config, config.norm_num_groups, config.head_width
        residual = dict(temb_channels=4 * c.block_out_channels[0], groups=groups, eps=1e-5)
        text = dict(cross_attention_dim=c.cross_attention_dim, use_linear_projection=True)
        for in_width, has_attention in zip(in_widths, attention):
            self.resnets.append(ResnetBlock2D(in_channels=in_width, out_channels=width, **residual))
            if not has_attention:
                continue
            transformer = Transformer2DModel(width // head, head, width, norm_num_groups=groups, **text)
            self.attentions.append(transformer)
            if c.temporal == "sti":
                self.temporal.append(STI(width, c.sti_heads, c.sti_head_width, c.sti_gamma, groups))
            elif c.temporal in ("conv3d", "conv1d"):
                self.temporal.append(Conv3D(width, groups, spatial=c.temporal == "conv3d"))
            else:
                raise ValueError(f"temporal is {c.temporal!r}: it must be 'sti', 'conv3d' or 'conv1d'.")

    def layers(self):
        """[(resnet, transformer, temporal layer)], None in the place of what a layer does not have."""
        return list(zip_longest(self.resnets, self.attentions, self.temporal))


class DFGN(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """Noise prediction network G_theta([x_t, y, z], t) (Table 6)."""

    _supports_gradient_checkpointing = True
    gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        latent_channels=4,  # C, of the codec
        condition_channels=None,  # of what is concatenated to the noisy latents; None: C, the given frames
        block_out_channels=(320, 640, 1280, 1280),  # widths, one per resolution
        attention_levels=(True, True, True, False),  # transformers and STI there, and in the middle
        layers_per_block=2,  # residual layers per resolution on the way down, one more on the way up
        head_width=64,  # channels per head of the spatial transformers
        cross_attention_dim=1024,  # width of the shared text space
        clip_dim=1024,  # widths of the two text encoders
        t5_dim=1024,
        norm_num_groups=32,
        temporal="sti",  # or "conv3d", "conv1d": the ablation of Table 3
        sti_heads=8,  # "STI layer", Table 6
        sti_head_width=32,
        sti_gamma=2,
    ):
        super().__init__()
        c, widths, emb_dim = self.config, block_out_channels, 4 * block_out_channels[0]
        condition_channels = condition_channels or latent_channels

        # text: one linear layer per encoder into a shared space ("Guidance")
        self.clip_projection = nn.Linear(clip_dim, cross_attention_dim)
        self.t5_projection = nn.Linear(t5_dim, cross_attention_dim)

        # diffusion step
        self.time_proj = Timesteps(widths[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(widths[0], emb_dim)

        # down
        self.conv_in = nn.Conv2d(latent_channels + condition_channels, widths[0], kernel_size=3, padding=1)
        width, skips = widths[0], [widths[0]]  # skips: widths of the skip connections, a stack
        count = layers_per_block
        self.down_blocks = nn.ModuleList()
        for level, (out, attention) in enumerate(zip(widths, attention_levels)):
            block, width = Block(c, [width] + (count - 1) * [out], out, count * [attention]), out
            skips += count * [width]
            if level < len(widths) - 1:
                block.downsamplers.append(Downsample2D(width, use_conv=True, name="op"))
                skips.append(width)
            self.down_blocks.append(block)

        # middle
        self.mid_block = Block(c, [width, width], width, [True, False])

        # up
        count = layers_per_block + 1
        self.up_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            in_widths = [below + skips.pop() for below in [width] + (count - 1) * [out]]
            block, width = Block(c, in_widths, out, count * [attention_levels[level]]), out
            if level > 0:
                block.upsamplers.append(Upsample2D(width, use_conv=True))
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, width, eps=1e-5)
        self.conv_out = nn.Conv2d(width, latent_channels, kernel_size=3, padding=1)
        self.initialize()

    def initialize(self):
        """Every residual branch, and the output, starts at zero, as in latent diffusion's own code."""
        last = [module.conv2 for module in self.modules() if isinstance(module, ResnetBlock2D)]
        last += [module.proj_out for module in self.modules() if isinstance(module, Transformer2DModel)]
        for layer in (*last, self.conv_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=None):
        """Of ModelMixin: no activations are kept inside a layer, which runs once more in the backward pass.
        ModelMixin's own way would have the transformers inside run a third time."""
        self.gradient_checkpointing = enable
        self._gradient_checkpointing_func = gradient_checkpointing_func

    def layers(self):
        """The layers of all blocks, as Block.layers gives them."""
        blocks = (*self.down_blocks, self.mid_block, *self.up_blocks)
        return [layer for block in blocks for layer in block.layers()]

    def run_layer(self, h, resnet, attention, temporal, emb, text, text_mask, frames):
        """(N, d, H, W) -> (N, d', H, W)"""
        h = resnet(h, emb)
        if attention is not None:
            h = attention(h, text, encoder_attention_mask=text_mask, return_dict=False)[0]
            h = temporal(h.contiguous(memory_format=torch.channels_last), frames)
        return h

    def forward(self, noisy, condition, given, timestep, text, valid=None):
        """Predicts the noise in `noisy`.

        noisy: (B, F, C, H, W) noisy latents
        condition: (B, F, C', H, W) what stands beside those of given frames: their clean latents. A
            preconditioned network gets C' = 2 C channels of another kind, for all frames (support/prior.py)
        given: bool (B, F), the condition mask; where it is False, zeros stand there
        timestep: integers (B,), one diffusion step for all frames of a clip
        text: (clip, clip_mask, t5, t5_mask), states (B, L, clip_dim | t5_dim) and bool (B, L), True = a token
        valid: bool (B, F), the loss mask; False = the slot holds no frame; None = all do. Both masks do best
            in the CPU's memory
        Returns (B, F, C, H, W), zeros in the slots that hold no frame.
        """
        frames = Frames(valid, *noisy.shape[:2], noisy.device)
        clip, clip_mask, t5, t5_mask = text
        text = torch.cat([self.clip_projection(clip), self.t5_projection(t5)], dim=1)  # (B, 2L, D)
        text = text[frames.clip]  # (N, 2L, D)
        text_mask = torch.cat([clip_mask, t5_mask], dim=1)[frames.clip]  # (N, 2L)
        emb = self.time_proj(timestep).to(noisy.dtype)  # (B, d_0)
        emb = self.time_embedding(emb)[frames.clip]  # (N, 4 d_0)

        run = partial(self.run_layer, emb=emb, text=text, text_mask=text_mask, frames=frames)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            run = partial(self._gradient_checkpointing_func, run)

        given = to_device(given, noisy.device)[:, :, None, None, None]
        condition = torch.where(given, condition, 0.0)  # (B, F, C', H, W)
        h = torch.cat([frames.pack(noisy), frames.pack(condition)], dim=1)  # (N, C + C', H, W)
        h = self.conv_in(h.contiguous(memory_format=torch.channels_last))  # (N, d_0, H, W)
        skips = [h]
        for block in self.down_blocks:
            for layer in block.layers():
                h = run(h, *layer)
                skips.append(h)
            for downsample in block.downsamplers:
                h = downsample(h)  # (N, d, H/2, W/2)
                skips.append(h)
        for layer in self.mid_block.layers():
            h = run(h, *layer)
        for block in self.up_blocks:
            for layer in block.layers():
                h = run(torch.cat([h, skips.pop()], dim=1), *layer)
            for upsample in block.upsamplers:
                h = upsample(h, output_size=skips[-1].shape[2:])  # (N, d, 2H, 2W), one less for odd sizes

        h = self.conv_out(F.silu(self.conv_norm_out(h)))  # (N, C, H, W)
        return frames.unpack(h)  # (B, F, C, H, W)


# ------------------------------------------------------------------------------------------------------------
# Named sizes. Latent channels and text widths come from the encoders; STI is that of Table 6 at every size.

SIZES = {
    name: dict(zip(("block_out_channels", "attention_levels", "layers_per_block", "head_width",
                    "cross_attention_dim", "norm_num_groups"), row))
    for name, row in {
        "toy":   ((16, 32),               (True, True),               1,  8,   16,  4),
        "tiny":  ((48, 96),               (True, True),               1, 24,  256,  8),
        "small": ((128, 256, 512, 512),   (True, True, True, False),  2, 64,  512, 32),
        "full":  ((320, 640, 1280, 1280), (True, True, True, False),  2, 64, 1024, 32),
    }.items()
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------------
# python model.py: on the meta device, where tensors have shapes and nothing is computed


def main():
    parser = argparse.ArgumentParser(description="Show sizes, and the layers of one: shapes and operations.")
    parser.add_argument("size", nargs="?", choices=SIZES, default="full", help="whose layers (default full)")
    size = parser.parse_args().size
    with torch.device("meta"):
        unets = {name: DFGN(**config) for name, config in SIZES.items()}
        latents, tokens = torch.zeros(1, 8, 4, 32, 32), torch.zeros(1, 77, 1024)
        given, text_mask = torch.zeros(1, 8, dtype=torch.bool), torch.ones(1, 77, dtype=torch.bool)
        inputs = (latents, latents, given, torch.zeros(1), (tokens, text_mask, tokens, text_mask))
    parts = dict(text="_projection", residual=".resnets.", transformers=".attentions.", STI=".temporal.")
    print_sizes(unets, parts)
    print(f"\n{size}: one clip of 8 frames, latents of 4 x 32 x 32, 77 + 77 tokens\n")
    print_layers(unets[size], inputs)


if __name__ == "__main__":
    main()
