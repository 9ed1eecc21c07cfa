"""
The command line of train.py, and what does not go together.
"""

import argparse
import os
from pathlib import Path

from diffusers.optimization import SchedulerType

from support.common import UserError, default_cache
from support.decode import MAX_SIDE
from support.finished import recorded_flags
from support.flags import SEED, Parser, filled, number, part_flags, work_flags
from support.hub import check_login
from support.machine import native_bf16
from support.optim import ALPHA_LR, MUON_LR

# A resumed run continues the saved one only if these are as they were.
SCHEDULE_FLAGS = (
    "preset resolution max_train_steps learning_rate lr_scheduler lr_warmup_steps use_ema use_8bit_adam "
    "low_memory mixed_precision curriculum temporal ddu prior max_train_samples seed"
).split()


def make_parser(presets, recorded):
    """presets: {name: {flag: default}}; recorded: {flag: default} that takes their place. The defaults that
    --help shows are those of the --preset given with it."""
    first = Parser(add_help=False)
    listed = ", ".join(name for name in presets if name != "toy")  # `toy` is for tests
    about = f"size, and the defaults that --help shows: {listed} (default: tiny)"
    first.add_argument("--preset", choices=presets, default="tiny", metavar="NAME", help=about)
    first.set_defaults(**recorded)
    parser = Parser(description="Train an animated-sticker generator from scratch.", parents=[first])
    add, default = parser.add_argument, "(default: %(default)s)"
    count, natural = number(int, 1), number(int, 0)
    add("--data", metavar="DIR", type=filled, help="folder of stickers (default: draws the built-in set)")
    samples = "train on so many of its clips, evenly chosen (default: all but the held-out ones)"
    add("--max_train_samples", type=count, metavar="N", help=samples)
    add("--output_dir", type=filled, help="where the run is written (default: runs/PRESET)")
    add("--resolution", type=number(int, 1, MAX_SIDE), help=f"side of the frames in pixels {default}")
    add("--max_train_steps", type=count, help=f"optimizer steps; the curriculum spans them {default}")
    add("--train_batch_size", type=count, help=f"clips per process and micro-step {default}")
    add("--gradient_accumulation_steps", type=count, default=1, help=f"micro-steps per step {default}")
    rate = f"peak learning rate; Muon takes {MUON_LR:g} times it, STI's alphas {ALPHA_LR:g} times {default}"
    add("--learning_rate", type=number(float, 1e-12), help=rate)
    add(
        "--lr_scheduler",
        choices=[s.value for s in SchedulerType if s.value != "piecewise_constant"],
        help=f"learning rate over steps {default}",
    )
    add("--lr_warmup_steps", type=natural, help=f"steps of linear warm-up {default}")
    add(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="autocast; the weights stay in fp32 (default: bf16 where the machine has it, else no)",
    )
    part_flags(add, "the sticker VAE that ships", "built-in word vectors")
    add(
        "--init_unet",
        metavar="DIR_OR_ID",
        type=filled,
        help="start the spatial part from a Stable Diffusion 2.x U-Net",
    )
    add(
        "--init_from",
        metavar="DIR_OR_ID",
        type=filled,
        help="start a new run from a finished model or a checkpoint-N folder: its weights (averaged ones), "
        "VAE, text encoders, preset, resolution and temporal layer, with a schedule of its own",
    )
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add("--use_8bit_adam", action="store_true", help="AdamW's moments in 8 bits (needs torchao)")
    add(
        "--low_memory",
        action="store_true",
        help="bf16 weights with stochastic rounding, 8-bit moments, averaged weights on the CPU, gradient "
        "checkpointing (needs torchao)",
    )
    add("--shard", action="store_true", help="split weights and optimizer over the ranks of torchrun (FSDP2)")
    add("--compile", action="store_true", help="torch.compile the layers: slow first steps, fast later ones")
    add(
        "--use_ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep averaged weights, and use them (default: yes)",
    )
    add("--ema_on_cpu", action="store_true", help="keep the averaged weights in the CPU's memory")
    add(
        "--curriculum",
        choices=["none", "linear", "dcl"],
        help="none: uniform; linear: Eq. 2 alone; dcl: half Eq. 2, half Eq. 3 and 4 (default: dcl, where "
        "both masks are on)",
    )
    add(
        "--temporal",
        choices=["sti", "conv3d", "conv1d"],
        default="sti",
        help="temporal layer; conv3d (3 x 3 x 3) and conv1d (along frames alone) are the ablation of Table 3 "
        f"{default}",
    )
    add(
        "--ddu",
        choices=["on", "condition", "loss", "off"],
        default="on",
        help="dual masks, one of them, or none, the ablation of Table 3: without condition masks first frame "
        f"and text are given, without loss mask clips have 8 equally spaced frames {default}",
    )
    add(
        "--prior",
        action=argparse.BooleanOptionalAction,
        help="precondition the network with a fitted Gaussian, which is not the paper's (default: yes, but "
        "for full)",
    )
    add("--seed", type=SEED, default=0, help=f"every random draw follows from it {default}")
    add("--checkpointing_steps", type=count, default=500, help=f"save every so many steps {default}")
    add("--checkpoints_total_limit", type=natural, default=2, help=f"keep so many, 0 = all {default}")
    add(
        "--resume_from_checkpoint",
        metavar="latest|PATH",
        type=filled,
        help="continue a run; latest without a checkpoint starts fresh",
    )
    add(
        "--validation_steps",
        type=natural,
        help=f"sample sheet and held-out loss every so many steps and at the end; 0 = at the end {default}",
    )
    add(
        "--validation_prompts",
        nargs="+",
        metavar="TEXT",
        help="prompts on the sheet (default: fixed ones for the built-in stickers, else held-out captions)",
    )
    add(
        "--report_to",
        choices=["none", "tensorboard", "wandb"],
        default="none",
        help=f"send the log there, too {default}",
    )
    add("--push_to_hub", action="store_true", help="upload the finished model to the Hugging Face hub")
    add("--hub_model_id", metavar="NAME/MODEL", type=filled, help="its name there (default: --output_dir's)")
    work_flags(add)
    parser.set_defaults(**presets[first.parse_known_args()[0].preset] | recorded)
    return parser


def parse_args(presets):
    """The flags of train.py as a namespace, every default filled in. presets: {name: {flag: default}}.
    Raises UserError."""
    args = make_parser(presets, {}).parse_args()
    if args.init_from:
        args = parse_again(presets, args.init_from)
    args.cache_dir = args.cache_dir or default_cache()
    args.output_dir = Path(args.output_dir or f"runs/{args.preset}")
    args.mixed_precision = args.mixed_precision or ("bf16" if native_bf16() or args.low_memory else "no")
    check_together(args)
    if args.push_to_hub:
        check_login()
    args.curriculum = args.curriculum or ("dcl" if args.ddu == "on" else "none")
    if args.low_memory:
        args.gradient_checkpointing = args.ema_on_cpu = True
    # Folders are remembered, so that they are found from anywhere.
    for name in ("vae", "clip", "t5", "init_unet", "init_from"):
        source = getattr(args, name)
        if source and Path(source).is_dir():
            setattr(args, name, str(Path(source).resolve()))
    return args


def parse_again(presets, init_from):
    """The flags of a run that starts from a model: what is left out of its size is the model's. Raises
    UserError for what contradicts it."""
    recorded, fixed = recorded_flags(init_from)
    if recorded["preset"] not in presets:
        raise UserError(
            f"--init_from {init_from} is of the unknown preset {recorded['preset']}: use another."
        )
    args = make_parser(presets, recorded).parse_args()
    for name in fixed:
        if getattr(args, name) != recorded[name]:
            raise UserError(
                f"--{name} is {getattr(args, name)}, but the model of --init_from {init_from} has "
                f"{recorded[name]}: leave --{name} out."
            )
    return args


def check_together(args):
    """Raises UserError for flags that cannot be combined."""
    if args.init_from and args.init_unet:
        raise UserError("--init_from brings a whole network, --init_unet its spatial part: choose one.")
    if args.low_memory and args.mixed_precision != "bf16":
        raise UserError(
            "--low_memory keeps the weights in bf16: it cannot be combined with --mixed_precision "
            f"{args.mixed_precision}."
        )
    if args.shard and (args.use_8bit_adam or args.low_memory):
        raise UserError(
            "--shard splits AdamW's state over the ranks, --use_8bit_adam and --low_memory shrink it: choose "
            "one."
        )
    if args.shard and args.mixed_precision == "fp16":
        raise UserError("--shard has no loss scaling for --mixed_precision fp16: use bf16.")
    if args.shard and "RANK" not in os.environ:
        raise UserError("--shard splits the weights over processes: start train.py with torchrun.")
    if args.ddu != "on" and args.curriculum not in (None, "none"):
        raise UserError(
            f"--ddu {args.ddu} leaves no task or no length to choose: --curriculum needs both masks."
        )


def check_resolution(resolution, factor, levels):
    """Raises UserError unless frames of that side have latents at each level of the U-Net. factor: pixels per
    latent"""
    smallest = factor * 2 ** (levels - 1)  # one latent is left at the lowest level
    if resolution % factor or resolution < smallest:
        raise UserError(f"--resolution {resolution}: must be a multiple of {factor} and at least {smallest}.")
