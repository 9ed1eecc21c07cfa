"""train.py with a toy network in the place of `tiny`:
python tests/toy_train.py, or torchrun tests/toy_train.py."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import model  # noqa: E402
import pictures  # noqa: E402
import train  # noqa: E402

TOY = dict(block_out_channels=(16, 32), attention_levels=(True, True), layers_per_block=1, head_width=8,
           cross_attention_dim=16, norm_num_groups=4, sti_heads=2, sti_head_width=8)  # fmt: skip


def shrink(presets, sizes, generate):
    """The toy network at 32 x 32 pixels, and three sampling steps on the sheets."""
    sizes["tiny"] = TOY
    presets["tiny"] = dict(presets["tiny"], resolution=32, learning_rate=1e-2, lr_warmup_steps=2)
    return lambda *args, **kwargs: generate(*args, **{**kwargs, "num_inference_steps": 3})


if __name__ == "__main__":
    torch.set_num_threads(1)
    pictures.generate = shrink(train.PRESETS, model.SIZES, pictures.generate)
    train.main()
