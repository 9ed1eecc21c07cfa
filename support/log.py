"""
What a run tells: log.jsonl, other places for the same, and the model card of the finished folder.
"""

import json
from contextlib import suppress

from support.common import UserError


def read_log(path):
    """The entries of a log.jsonl. A line that a kill or a full disk cut short is none."""
    entries = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict) and "step" in entry]


def make_reporter(args):
    """A function that sends one entry of log.jsonl to TensorBoard or Weights & Biases too."""
    try:
        if args.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(args.output_dir / "tensorboard")
            return lambda entry: [
                writer.add_scalar(name, value, entry["step"]) for name, value in entry.items()
            ]
        if args.report_to == "wandb":
            import wandb

            run = wandb.init(
                project="rdtf", dir=args.output_dir, config={k: str(v) for k, v in vars(args).items()}
            )
            return lambda entry: run.log(entry, step=entry["step"])
    except ImportError as error:
        raise UserError(
            f"--report_to {args.report_to} needs a package: pip install {args.report_to}"
        ) from error
    return lambda entry: None


def model_card(unet, args, sources, summary, global_batch, step):
    """The README.md of a finished run: what the model is, what it was trained on, how to use it."""
    frozen = {name: source or "built in" for name, source in sources.items() if name in ("vae", "clip", "t5")}
    rows = dict(
        size=f"{args.preset}, {sum(p.numel() for p in unet.parameters()):,} parameters",
        data=f"{args.data or 'the built-in stickers'}: {summary}",
        frames=f"3 to 8 of {args.resolution} x {args.resolution} pixels",
        **frozen,
        steps=f"{step}, {global_batch} clips each",
        learning_rate=f"{args.learning_rate:g}, {args.lr_scheduler}, {args.lr_warmup_steps} steps of warm-up",
        precision=args.mixed_precision,
        averaged_weights="yes" if args.use_ema else "no",
        curriculum=args.curriculum,
        temporal_layer=args.temporal,
        dual_masks="on" if args.ddu else "off",
        seed=args.seed,
        guidance=f"text {args.guidance_scale:g}, image {args.image_guidance_scale:g}",
    )
    table = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in rows.items())
    prompt = "a red heart bouncing"
    return f"""---
library_name: diffusers
tags: [rdtf, animated-stickers, text-to-video]
---
# {args.output_dir.name}

An animated-sticker generator of the RDTF kind, trained with `train.py`.

```bash
python sample.py --checkpoint {args.output_dir} --prompt "{prompt}" --output sticker.gif
```

| setting | value |
|---|---|
{table}

![held-out stickers and what the model makes of them](validation-{step}.png)

![loss, task probabilities, mean k and feedback over the run](progress.png)
"""
