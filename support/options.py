"""
The command line of train.py: presets, flags, and what does not go together.
"""

import argparse
import json
import os
from pathlib import Path

from diffusers.optimization import SchedulerType

from curriculum import STRATEGIES
from model import SIZES
from support.common import UserError, default_cache
from support.machine import native_bf16

# What each preset trains with unless a flag says otherwise, and the guidance scales that sample.py then uses
# for the finished model. `full` is Table 6.
PRESETS = {
    name: dict(zip(("resolution", "codec", "max_train_steps", "train_batch_size", "learning_rate", "lr_scheduler",
                    "lr_warmup_steps", "guidance_scale", "image_guidance_scale"), row))
    for name, row in {  # codec: pixels per latent and channels of the built-in one
        "toy":   (32,  (4, 16),     6,  4, 1.0e-2, "cosine",                  2, 3.0, 1.5),
        "tiny":  (48,  (4, 16),  1200,  8, 1.0e-3, "cosine",                 50, 3.0, 1.5),
        "small": (128, (8, 32), 50000, 16, 2.0e-4, "cosine",                500, 5.0, 2.0),
        "full":  (256, (8, 32), 50000,  1, 1.0e-5, "constant_with_warmup", 1000, 7.5, 7.5),
    }.items()
}  # fmt: skip

# A resumed run continues the saved one only if these are as they were.
SCHEDULE_FLAGS = (
    "preset",
    "resolution",
    "max_train_steps",
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "use_ema",
    "use_8bit_adam",
    "low_memory",
    "mixed_precision",
    "curriculum",
    "temporal",
    "ddu",
    "seed",
)


def parse_args():
    parser = argparse.ArgumentParser(description="Train an animated-sticker generator from scratch.")
    # fmt: off
    add = parser.add_argument
    per_preset = "(default: by preset)"
    add("--data", metavar="DIR", help="folder of stickers (default: draws the built-in set)")
    add("--preset", choices=SIZES, default="tiny", help="size, and defaults of the training (default tiny)")
    add("--output_dir", help="where the run is written (default: runs/PRESET)")
    add("--cache_dir", help=f"where drawn stickers and latents are kept (default: {default_cache()})")
    add("--resolution", type=int, help=f"side of the frames in pixels {per_preset}")
    add("--max_train_steps", type=int, help=f"optimizer steps; the curriculum spans them {per_preset}")
    add("--train_batch_size", type=int, help=f"clips per process and micro-step {per_preset}")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-steps per step (default 1)")
    add("--learning_rate", type=float, help=f"peak learning rate of AdamW {per_preset}")
    add("--lr_scheduler", choices=[s.value for s in SchedulerType if s.value != "piecewise_constant"],
        help=f"learning rate over steps {per_preset}")
    add("--lr_warmup_steps", type=int, help=f"steps of linear warm-up {per_preset}")
    add("--mixed_precision", choices=["no", "fp16", "bf16"],
        help="autocast; the weights stay in fp32 (default: bf16 where the machine has it, else no)")
    add("--vae", metavar="DIR_OR_ID", help="AutoencoderKL (default: the built-in codec, fitted to the stickers)")
    add("--clip", metavar="DIR_OR_ID", help="CLIP text model with its tokenizer (default: built-in word vectors)")
    add("--t5", metavar="DIR_OR_ID", help="T5 encoder with its tokenizer (default: built-in n-gram vectors)")
    add("--init_unet", metavar="DIR_OR_ID", help="start the spatial part from a Stable Diffusion 2.x U-Net")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add("--use_8bit_adam", action="store_true", help="AdamW's moments in 8 bits (needs torchao)")
    add("--low_memory", action="store_true",
        help="bf16 weights with stochastic rounding, 8-bit moments, averaged weights on the CPU, gradient "
        "checkpointing (needs torchao)")
    add("--shard", action="store_true", help="split weights and optimizer over the ranks of torchrun (FSDP2)")
    add("--compile", action="store_true", help="torch.compile the layers: slow first steps, faster ones after")
    add("--use_ema", action=argparse.BooleanOptionalAction, default=True,
        help="keep averaged weights, and use them (default: yes)")
    add("--ema_on_cpu", action="store_true", help="keep them in the CPU's memory")
    add("--curriculum", choices=STRATEGIES,
        help="none: uniform; linear: static part alone; dcl: with feedback (default dcl)")
    add("--temporal", choices=["sti", "conv3d"], default="sti",
        help="temporal layer; conv3d is the ablation of Table 3 (default sti)")
    add("--ddu", choices=["on", "off"], default="on",
        help="dual masks; off is the ablation of Table 3: text alone, always 8 frames (default on)")
    add("--seed", type=int, default=0, help="every random draw follows from it (default 0)")
    add("--checkpointing_steps", type=int, default=500, help="save every so many steps (default 500)")
    add("--checkpoints_total_limit", type=int, default=2, help="keep the last so many, 0 = all (default 2)")
    add("--resume_from_checkpoint", metavar="latest|PATH",
        help="continue a run; latest without a checkpoint starts fresh")
    add("--validation_steps", type=int, default=2000,
        help="sample sheet and held-out loss every so many steps, and at the end; 0 = at the end only (default 2000)")
    add("--validation_prompts", nargs="+", metavar="TEXT",
        help="prompts on the sheet (default: fixed ones for the built-in stickers, else held-out captions)")
    add("--report_to", choices=["none", "tensorboard", "wandb"], default="none", help="log there too")
    add("--num_workers", type=int, default=min(8, os.cpu_count() or 1),
        help="processes that decode before training, 0 = this one alone (default: CPU cores, at most 8)")
    # fmt: on
    args = parser.parse_args()

    for name, value in PRESETS[args.preset].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.output_dir = Path(args.output_dir or f"runs/{args.preset}")
    args.cache_dir = Path(args.cache_dir or default_cache())
    args.mixed_precision = args.mixed_precision or ("bf16" if native_bf16() or args.low_memory else "no")
    if args.low_memory:
        args.gradient_checkpointing = args.ema_on_cpu = True
        if args.mixed_precision != "bf16":
            raise UserError(
                f"--low_memory keeps the weights in bf16: --mixed_precision {args.mixed_precision} "
                "does not go with it."
            )
    if args.shard and (args.use_8bit_adam or args.low_memory):
        raise UserError(
            "--shard splits AdamW's state over the ranks, --use_8bit_adam and --low_memory shrink it: "
            "choose one."
        )
    if args.shard and args.mixed_precision == "fp16":
        raise UserError("--shard has no loss scaling for --mixed_precision fp16: use bf16.")
    if args.shard and "RANK" not in os.environ:
        raise UserError("--shard splits the weights over processes: start train.py with torchrun.")
    for name in ("vae", "clip", "t5"):  # folders are remembered, so that sample.py finds them from anywhere
        source = getattr(args, name)
        if source and Path(source).is_dir():
            setattr(args, name, str(Path(source).resolve()))
    args.ddu = args.ddu == "on"
    if not args.ddu and args.curriculum not in (None, "none"):
        raise UserError(
            "--ddu off trains one task at one length: there is nothing for --curriculum to choose from."
        )
    args.curriculum = args.curriculum or ("dcl" if args.ddu else "none")
    for name in (
        "resolution",
        "max_train_steps",
        "train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "checkpointing_steps",
    ):
        if not 0 < getattr(args, name) < float("inf"):
            raise UserError(f"--{name} {getattr(args, name)}: must be positive and finite.")
    for name in ("lr_warmup_steps", "checkpoints_total_limit", "validation_steps", "num_workers", "seed"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)}: must not be negative.")
    return args


def check_resolution(args, codec):
    levels = len(SIZES[args.preset]["block_out_channels"])
    smallest = codec.factor * 2 ** (levels - 1)  # one latent is left at the lowest level of the U-Net
    if args.resolution % codec.factor or args.resolution < smallest:
        raise UserError(
            f"--resolution {args.resolution}: must be a multiple of {codec.factor} and at least {smallest}."
        )


def check_schedule(checkpoint, schedule):
    """Refuses to resume with flags under which the run would not be the one that was interrupted."""
    saved = json.loads((checkpoint / "state.json").read_text())["schedule"]
    for name, value in schedule.items():
        if saved.get(name) != value:
            flag = (
                "--train_batch_size x --gradient_accumulation_steps x processes"
                if name == "global_batch"
                else f"--{name}"
            )
            raise UserError(
                f"{flag} is {value}, but {checkpoint} was trained with {saved.get(name)}: "
                "a resumed run keeps its schedule. Give the old value, "
                "or start anew in another --output_dir."
            )
