"""Tiny VAE, CLIP, T5 and Stable-Diffusion-shaped U-Net, random weights, made by the libraries' own classes
and saved by their own save_pretrained: python tests/tiny_parts.py FOLDER"""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz#.,"


def make_vae(folder, channels=(8, 16, 16, 16), latent_channels=4, colours=3):
    AutoencoderKL(
        in_channels=colours,
        out_channels=colours,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        block_out_channels=channels,
        latent_channels=latent_channels,
        norm_num_groups=4,
        scaling_factor=0.7,
    ).save_pretrained(folder)


def make_clip(folder, width=32):
    tokens = [
        *LETTERS,
        *(letter + "</w>" for letter in LETTERS),
        "re",
        "red</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[("r", "e"), ("re", "d</w>")],
        model_max_length=77,
    ).save_pretrained(folder / "tokenizer")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=len(tokens) - 2,
            eos_token_id=len(tokens) - 1,
            pad_token_id=len(tokens) - 1,
        )
    ).save_pretrained(folder / "text_encoder")  # as a Stable Diffusion folder keeps them


def make_t5(folder, width=24):
    pieces = [
        "<pad>",
        "</s>",
        "<unk>",
        "\N{LOWER ONE EIGHTH BLOCK}",
        *LETTERS,
        "\N{LOWER ONE EIGHTH BLOCK}red",
    ]
    T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0).save_pretrained(
        folder
    )
    T5EncoderModel(
        T5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2)
    ).save_pretrained(folder)


def make_unet(folder, widths=(16, 32), in_channels=4, cross_attention_dim=32):
    """Shaped like Stable Diffusion 2.x, with heads of width 8."""
    blocks = len(widths)
    UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=in_channels,
        block_out_channels=widths,
        down_block_types=["CrossAttnDownBlock2D"] * blocks,
        up_block_types=["CrossAttnUpBlock2D"] * blocks,
        layers_per_block=1,
        attention_head_dim=[width // 8 for width in widths],  # diffusers' name for the number of heads
        cross_attention_dim=cross_attention_dim,
        norm_num_groups=4,
        use_linear_projection=True,
    ).save_pretrained(folder)


def make_parts(folder):
    """Returns (vae, clip, t5), three folders."""
    torch.manual_seed(0)
    folder = Path(folder)
    make_vae(folder / "vae")
    make_clip(folder / "clip")
    make_t5(folder / "t5")
    return folder / "vae", folder / "clip", folder / "t5"


if __name__ == "__main__":
    print(*make_parts(sys.argv[1]))
