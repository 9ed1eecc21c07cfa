"""
What a run tells: log.jsonl, the same in other places, what it could not write, and the model card.
"""

import json
import os
import shlex
from contextlib import contextmanager, suppress

from support.common import UserError, printable, replacing, table


def read_log(path):
    """The entries of a log.jsonl; lines that a kill or a full disk cut short are skipped."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict) and "step" in entry]


def begin_log(path, last_step):
    """Keeps the entries up to `last_step`: what was logged after a checkpoint will be logged again."""
    entries = [entry for entry in read_log(path) if entry["step"] <= last_step]
    with replacing(path) as writing:
        writing.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def append_log(path, entry):
    with open(path, "ab+") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        cut = file.read() not in (b"", b"\n")  # by a full disk: that costs the one line
        file.write(("\n" * cut + json.dumps(entry) + "\n").encode())


def make_reporter(args):
    """A function that sends one entry of log.jsonl to TensorBoard or Weights & Biases too. Raises
    UserError."""
    try:
        if args.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(args.output_dir / "tensorboard")
            return lambda entry: [writer.add_scalar(name, x, entry["step"]) for name, x in entry.items()]
        if args.report_to == "wandb":
            import wandb

            settings = {name: str(value) for name, value in vars(args).items()}
            run = wandb.init(project="rdtf", dir=args.output_dir, config=settings)
            return lambda entry: run.log(entry, step=entry["step"])
    except ImportError as error:
        message = f"--report_to {args.report_to} needs a package: pip install {args.report_to}"
        raise UserError(message) from error
    return lambda entry: None


@contextmanager
def report_write_errors(print0):
    """Reports a failed write and continues: a run is worth more than one checkpoint or one picture."""
    try:
        yield
    except (OSError, UserError) as error:
        print0(f"warning: {error}")


def report_folder(print0, folder, summary, notes, dropped, has_captions):
    """Says what of a folder of stickers is trained on. notes: sentences on what else is in it; dropped:
    [(name, reason)] of the files that cannot be used"""
    print0(f"{folder}: {summary}")
    lines = [f"note: {note}" for note in notes]
    lines += [f"dropped {printable(name)}: {reason}" for name, reason in dropped]
    for line in lines[:20]:
        print0(f"  {line}")
    if len(lines) > 20:
        print0(f"  and {len(lines) - 20} more: `python data.py {folder}` lists them")
    if not has_captions:
        print0(
            f"{folder} has no captions: training without text. (metadata.jsonl or NAME.txt files would "
            "give it some.)"
        )


def model_card(unet, args, sources, summary, global_batch, step):
    """The README.md of a finished run: what the model is, what it was trained on, how to use it."""
    built_in = dict(vae="the one in vae/", clip="built in", t5="built in")
    frozen = {name: sources[name] or default for name, default in built_in.items()}
    rows = dict(
        size=f"{args.preset}, {sum(p.numel() for p in unet.parameters()):,} parameters",
        data=f"{args.data or 'the built-in stickers'}: {summary}",
        started_from=args.init_from or args.init_unet or "random weights",
        frames=f"3 to 8 of {args.resolution} x {args.resolution} pixels",
        **frozen,
        steps=f"{step}, {global_batch} clips each",
        learning_rate=f"{args.learning_rate:g}, {args.lr_scheduler}, {args.lr_warmup_steps} steps of warm-up",
        precision=args.mixed_precision,
        averaged_weights="yes" if args.use_ema else "no",
        curriculum=args.curriculum,
        temporal_layer=args.temporal,
        dual_masks=args.ddu,
        seed=args.seed,
        guidance=f"text {args.guidance_scale:g}, image {args.image_guidance_scale:g}",
    )
    settings = table(["setting", "value"], [(name.replace("_", " "), value) for name, value in rows.items()])
    prompt, where = "a red heart bouncing", args.hub_model_id or str(args.output_dir)
    return f"""---
library_name: diffusers
tags: [rdtf, animated-stickers, text-to-video]
---
# {args.output_dir.name}

An animated-sticker generator of the RDTF kind, trained with `train.py`.

```bash
python sample.py --checkpoint {shlex.quote(where)} --prompt "{prompt}" --output sticker.gif
```

{settings}
![held-out stickers and what the model makes of them](validation-{step}.png)

![loss, task probabilities, mean k and feedback over the run](progress.png)
"""
