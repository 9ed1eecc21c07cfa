"""
DFGN, the discrete frame generation network of RDTF (section 3 of the paper): a Stable-Diffusion-shaped U-Net
that sees each frame by itself, with an STI (spatial temporal interaction) layer after each of its spatial
transformers.

    Frames    which slots of a batch hold frames: spatial layers compute nothing for the others
    STI       section 3.1: semantic branch, detail branch, learned fusion
    Conv3D    what the paper's ablation puts in the place of STI (Table 3)
    DFGN      the U-Net
    SIZES     tiny, small, full (0.96B parameters)

Shapes: B clips, F frame slots per clip, N valid frames in the batch, C latent channels, d channels of a
layer, H x W the height and width of a layer, L text tokens.
"""

import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch.utils.checkpoint import checkpoint

from support.machine import as_weights, same_attention
from support.prior import GaussianPrior

# oneDNN, which computes on the CPU, keeps one kernel per operation and shape. The number of frames in a batch differs
# from step to step: of the 1024 kernels that it keeps by default most are gone before they are asked for again.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")

# ------------------------------------------------------------------------------------------------------------
# Diffusion


def make_scheduler():
    """Table 6's schedule: 1000 steps, "linear" in the sense of the latent diffusion code, that is linear in
    sqrt(beta). diffusers' other defaults are for pixels: latents are not clipped, and the schedule ends at
    alpha_1, not at 1."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.0120,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


LATENT_ERROR = 0.3  # assumed error of the network's estimate of clean latents, as a share of their variance
MAX_LATENT_WEIGHT = 5.0


def loss_weights(latent_std):
    """What the squared error of the noise counts at each timestep: float32 (1000,).

    One everywhere, as in Eq. 1, for a network whose last layer is the noise. If that is an estimate of the clean
    latents, of standard deviation `latent_std`, then it is the error of the estimate that counts, with min(snr + 1, 5):
    under Eq. 1 the large timesteps, at which subject, colour and place are decided, would weigh next to nothing."""
    alpha = make_scheduler().alphas_cumprod
    if latent_std is None:
        return torch.ones_like(alpha)
    snr = alpha * latent_std**2 / (1 - alpha)
    return (snr + 1).clamp(max=MAX_LATENT_WEIGHT) / snr


# ------------------------------------------------------------------------------------------------------------
# Frames: the loss mask inside the network


class Frames:
    """Where the valid frames of a batch stand. Spatial layers work on the N valid frames alone, packed into
    one batch; temporal layers need the clip's axis back and get zeros in the slots that hold no frame.

    valid: bool (B, F), or None when every slot is valid."""

    def __init__(self, valid, batch, slots, device):
        self.batch, self.slots = batch, slots
        self.valid = None if valid is None or bool(valid.all()) else valid
        everything = torch.arange(batch * slots, device=device)
        self.index = (
            everything if self.valid is None else everything[self.valid.flatten()]
        )  # (N,) places in B * F
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
    """GroupNorm, SiLU, then a convolution with kernel (3, 1, 1) over (frames, height, width).

    The norm pools over one frame, never over frames: otherwise a frame would feel the filler. The kernel
    touches single locations, so it is written as a (3, 1) convolution over (F, H * W), which is a good deal
    faster."""

    def __init__(self, width, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.conv = nn.Conv2d(width, width, kernel_size=(3, 1), padding=(1, 0))

    def forward(self, h, frames):
        height = h.shape[2]
        x = F.silu(self.norm(h))  # (N, d, H, W)
        x = frames.unpack(x.flatten(2).transpose(1, 2))  # (B, F, H*W, d)
        x = self.conv(x.permute(0, 3, 1, 2))  # (B, d, F, H*W)
        x = frames.pack(x.permute(0, 2, 3, 1))  # (N, H*W, d)
        return x.transpose(1, 2).unflatten(2, (height, -1))  # (N, d, H, W)


class STI(nn.Module):
    """Spatial Temporal Interaction layer (section 3.1; constants from Table 6).

    out = h + alpha * (w_1 * norm(semantic) + w_2 * norm(detail)), with w a softmax at every location. alpha
    starts at zero, so that a network with fresh STI layers is the spatial U-Net, frame by frame."""

    def __init__(self, width, heads=8, head_width=32, gamma=2, groups=32):
        super().__init__()
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
        height, width = h.shape[2:]
        gamma = min(self.gamma, height, width)
        s = F.avg_pool2d(h, gamma, ceil_mode=True, count_include_pad=False)  # (N, d, H/g, W/g)
        small_height = s.shape[2]
        s = s.flatten(2).transpose(1, 2)  # (N, HW/gg, d)
        positions = torch.arange(frames.slots, device=h.device)
        order = get_timestep_embedding(positions, s.shape[2]).to(s.dtype)  # (F, d) fixed sinusoids
        s = frames.unpack(self.norm_attention(s)) + order[:, None]  # (B, F, HW/gg, d)
        tokens_per_frame = s.shape[2]
        s = s.flatten(1, 2)  # (B, F*HW/gg, d)
        q, k, v = (
            to(s).unflatten(2, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v)
        )
        keys = None  # filler slots are no keys
        if frames.valid is not None:
            keys = frames.valid.repeat_interleave(tokens_per_frame, dim=1)[
                :, None, None
            ]  # (B, 1, 1, F*HW/gg)
        s = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)  # (B, heads, F*HW/gg, head width)
        s = self.to_out(s.transpose(1, 2).flatten(2))  # (B, F*HW/gg, d)
        s = frames.pack(s.unflatten(1, (frames.slots, tokens_per_frame)))  # (N, HW/gg, d)
        s = s.transpose(1, 2).unflatten(2, (small_height, -1))  # (N, d, H/g, W/g)
        s = self.norm_semantic(s)  # before upsampling: the same statistics from fewer pixels
        return F.interpolate(s, scale_factor=float(gamma), mode="nearest")[
            :, :, :height, :width
        ]  # (N, d, H, W)

    def detail(self, h, frames):
        """Full resolution, along frames only."""
        for conv in self.convs:
            h = conv(h, frames)
        return self.norm_detail(h)  # (N, d, H, W)

    def forward(self, h, frames):
        s, e = self.semantic(h, frames), self.detail(h, frames)
        w = self.fusion(torch.cat([s, e], dim=1).permute(0, 2, 3, 1)).softmax(dim=-1)  # (N, H, W, 2)
        w_1 = w[..., 0].unsqueeze(1)  # (N, 1, H, W); w_2 = 1 - w_1
        return h + self.alpha.to(h.dtype) * torch.lerp(e, s, w_1)  # w_1 s + w_2 e


class Conv3D(nn.Module):
    """The temporal layer of the paper's ablation "DFGN (3D-Conv)": four (3, 1, 1) convolutions, as in the
    video U-Nets that the paper's lineage starts from, with the same residual start. The paper gives no size;
    this one has 1.02B parameters."""

    def __init__(self, width, groups=32):
        super().__init__()
        self.convs = nn.ModuleList([FrameConv(width, groups) for _ in range(4)])
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, h, frames):
        x = h
        for conv in self.convs:
            x = conv(x, frames)
        return h + self.alpha.to(h.dtype) * x


# ------------------------------------------------------------------------------------------------------------
# The U-Net


class Block(nn.Module):
    """The layers of one resolution, under the names that diffusers' 2D conditional U-Net gives them, so that
    a Stable Diffusion 2.x checkpoint fits: resnets, attentions, downsamplers, upsamplers. `temporal` is
    ours."""

    def __init__(self):
        super().__init__()
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()  # empty at resolutions without attention
        self.temporal = nn.ModuleList()  # one after each attention
        self.downsamplers = nn.ModuleList()  # none or one
        self.upsamplers = nn.ModuleList()  # none or one


class DFGN(ModelMixin, ConfigMixin):
    """Noise prediction network G_theta([x_t, y, z], t) (section 3, Table 6).

    latent_channels: channels of the codec's latents; the input has twice as many (noisy and given frames,
        section 3.2)
    block_out_channels: widths, one per resolution
    attention_levels: one flag per resolution: transformers (and temporal layers) there; the middle always has
        one
    layers_per_block: residual layers per resolution on the way down (one more on the way up)
    head_width: channels per head of the spatial transformers
    cross_attention_dim: width of the shared text space; clip_dim, t5_dim: widths of the two text encoders
    temporal: "sti", or "conv3d" for the ablation of Table 3
    sti_heads, sti_head_width, sti_gamma: Table 6 and section 3.1
    prior_side: None: the last layer is the noise, as in the paper. Or the side of the latents: then the last layer
        estimates the clean latents, and the noise follows from x_t. Clean latents have few degrees of freedom, noise
        has all of them, and a narrow network cannot carry it from input to output (Li and He, "Back to Basics: Let
        Denoising Generative Models Denoise"). The estimate of a GaussianPrior is one more input, and mixed with
        that of the network by the errors of both. Ours, not the paper's; `full` goes without.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        attention_levels=(True, True, True, False),
        layers_per_block=2,
        head_width=64,
        cross_attention_dim=1024,
        clip_dim=1024,
        t5_dim=1024,
        norm_num_groups=32,
        temporal="sti",
        sti_heads=8,
        sti_head_width=32,
        sti_gamma=2,
        prior_side=None,
    ):
        super().__init__()
        if temporal not in ("sti", "conv3d"):
            raise ValueError(f"temporal is {temporal!r}: it must be 'sti' or 'conv3d'.")
        if type(sti_gamma) is not int or sti_gamma < 1:
            raise ValueError(f"sti_gamma is {sti_gamma!r}: it must be a whole number, at least 1.")
        widths, groups, emb_dim = block_out_channels, norm_num_groups, 4 * block_out_channels[0]

        def add_layer(block, in_width, width, attention):
            block.resnets.append(
                ResnetBlock2D(
                    in_channels=in_width, out_channels=width, temb_channels=emb_dim, groups=groups, eps=1e-5
                )
            )
            if attention:
                block.attentions.append(
                    Transformer2DModel(
                        num_attention_heads=width // head_width,
                        attention_head_dim=head_width,
                        in_channels=width,
                        cross_attention_dim=cross_attention_dim,
                        norm_num_groups=groups,
                        use_linear_projection=True,
                    )
                )
                block.temporal.append(
                    STI(width, sti_heads, sti_head_width, sti_gamma, groups)
                    if temporal == "sti"
                    else Conv3D(width, groups)
                )

        # text: one linear layer per encoder into a shared space (section 3.2)
        self.clip_projection = nn.Linear(clip_dim, cross_attention_dim)
        self.t5_projection = nn.Linear(t5_dim, cross_attention_dim)

        # diffusion step
        self.time_proj = Timesteps(widths[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(widths[0], emb_dim)

        # down
        inputs = 2 if prior_side is None else 3  # noisy, given, and what the prior makes of them
        self.conv_in = nn.Conv2d(inputs * latent_channels, widths[0], kernel_size=3, padding=1)
        skips = [widths[0]]  # widths of the skip connections, a stack
        self.down_blocks = nn.ModuleList()
        width = widths[0]
        for level, next_width in enumerate(widths):
            block = Block()
            for _ in range(layers_per_block):
                add_layer(block, width, next_width, attention_levels[level])
                width = next_width
                skips.append(width)
            if level < len(widths) - 1:
                block.downsamplers.append(Downsample2D(width, use_conv=True, name="op"))
                skips.append(width)
            self.down_blocks.append(block)

        # middle
        self.mid_block = Block()
        add_layer(self.mid_block, width, width, attention=True)
        add_layer(self.mid_block, width, width, attention=False)

        # up
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            block = Block()
            for _ in range(layers_per_block + 1):
                add_layer(block, width + skips.pop(), widths[level], attention_levels[level])
                width = widths[level]
            if level > 0:
                block.upsamplers.append(Upsample2D(width, use_conv=True))
            self.up_blocks.append(block)

        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_pre_hook(as_weights)

        self.conv_norm_out = nn.GroupNorm(groups, width, eps=1e-5)
        self.conv_out = nn.Conv2d(width, latent_channels, kernel_size=3, padding=1)

        if prior_side is not None:
            self.prior = GaussianPrior(latent_channels, prior_side, clip_dim)
            self.register_buffer(
                "alphas_cumprod", make_scheduler().alphas_cumprod, persistent=False
            )  # (1000,)

        self.gradient_checkpointing = False
        self.initialize()

    def initialize(self):
        """Every residual branch, and the output, starts at zero,
        as in the code that latent diffusion was trained with."""
        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                last = module.conv2
            elif isinstance(module, Transformer2DModel):
                last = module.proj_out
            else:
                continue
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def enable_gradient_checkpointing(self):
        """Recompute each layer in the backward pass instead of keeping its activations."""
        self.gradient_checkpointing = True

    def forward(self, noisy, given, timestep, text, valid=None):
        """Predicts the noise in `noisy`.

        noisy: (B, F, C, H, W) noisy latents
        given: (B, F, C, H, W) clean latents of the given frames, zeros elsewhere
        timestep: integers (B,), one diffusion step for all frames of a clip
        text: (clip, clip_mask, t5, t5_mask): token states (B, L, clip_dim | t5_dim) and bool (B, L),
            True = a real token
        valid: bool (B, F), False = the slot holds no frame; None = all do
        Returns (B, F, C, H, W), zeros in the slots that hold no frame.
        """
        batch, slots = noisy.shape[:2]
        frames = Frames(valid, batch, slots, noisy.device)

        inputs = [noisy, given]
        if self.config.prior_side is not None:
            alpha = self.alphas_cumprod[timestep]  # (B,)
            with torch.autocast(noisy.device.type, enabled=False):
                clean, error = self.prior(noisy, given, alpha, text, valid)
            alpha = alpha[:, None, None, None, None]
            std = self.prior.std
            inputs = [noisy * (alpha * std**2 + 1 - alpha).rsqrt(), given / std, clean / std]

        clip, clip_mask, t5, t5_mask = text
        text = torch.cat([self.clip_projection(clip), self.t5_projection(t5)], dim=1)[
            frames.clip
        ]  # (N, L, D)
        text_mask = torch.cat([clip_mask, t5_mask], dim=1)[frames.clip]  # (N, L)

        emb = self.time_proj(timestep).to(noisy.dtype)  # (B, d_0)
        emb = self.time_embedding(emb)[frames.clip]  # (N, 4 d_0)

        def run_layer(h, resnet, attention, temporal):
            h = resnet(h, emb)
            if attention is not None:
                h = attention(h, text, encoder_attention_mask=text_mask, return_dict=False)[0]
                h = temporal(h.contiguous(memory_format=torch.channels_last), frames)
            return h

        def layer(h, block, i):
            modules = (
                block.resnets[i],
                *((block.attentions[i], block.temporal[i]) if i < len(block.attentions) else (None, None)),
            )
            if self.gradient_checkpointing and torch.is_grad_enabled():
                return checkpoint(run_layer, h, *modules, use_reentrant=False, context_fn=same_attention)
            return run_layer(h, *modules)

        h = torch.cat([frames.pack(x) for x in inputs], dim=1)  # (N, 2C | 3C, H, W)
        h = self.conv_in(h.contiguous(memory_format=torch.channels_last))  # (N, d_0, H, W)

        skips = [h]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                h = layer(h, block, i)
                skips.append(h)
            for downsample in block.downsamplers:
                h = downsample(h)  # (N, d, H/2, W/2)
                skips.append(h)

        for i in range(len(self.mid_block.resnets)):
            h = layer(h, self.mid_block, i)

        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                h = layer(torch.cat([h, skips.pop()], dim=1), block, i)
            for upsample in block.upsamplers:
                h = upsample(
                    h, output_size=skips[-1].shape[2:]
                )  # (N, d, 2H, 2W), or one less where a size was odd

        h = self.conv_out(F.silu(self.conv_norm_out(h)))  # (N, C, H, W)
        h = frames.unpack(h)  # (B, F, C, H, W)
        if self.config.prior_side is not None:
            w = error.square() / (error.square() + LATENT_ERROR * std**2)  # (B, F), 0 in given frames
            clean = torch.lerp(clean, std * h.float(), w[:, :, None, None, None])
            h = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
            h = frames.unpack(frames.pack(h))  # zeros where there is no frame
        return h


# ------------------------------------------------------------------------------------------------------------
# Named sizes. Latent channels and text widths come from the encoders; STI is that of Table 6 at every size.
#   tiny   two CPU cores, minutes          small   one consumer GPU          full   the paper's 0.96B

SIZES = {
    name: dict(zip(("block_out_channels", "attention_levels", "layers_per_block", "head_width",
                    "cross_attention_dim", "norm_num_groups"), row))
    for name, row in {
        "toy":   ((16, 32),               (True, True),               1,  8,   16,  4),
        "tiny":  ((96, 192),              (False, True),              1, 32,  256,  8),
        "small": ((128, 256, 512, 512),   (True, True, True, False),  2, 64,  512, 32),
        "full":  ((320, 640, 1280, 1280), (True, True, True, False),  2, 64, 1024, 32),
    }.items()
}  # fmt: skip
