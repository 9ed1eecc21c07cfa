"""
The files that sample.py leaves: their names, their form, and whether they can be.
"""

from pathlib import Path

from support import media
from support.common import UserError, check_output
from support.messenger import PLATFORMS, fit
from support.pictures import save_png, sheet


def default_name(messenger):
    """sticker.gif, or with the suffix that a messenger demands."""
    return Path("sticker").with_suffix(PLATFORMS[messenger].suffix if messenger else ".gif")


def names(args):
    """The files of args.num_samples stickers: numbered names, or one sheet."""
    output, count = args.output, args.num_samples
    if count == 1 or (output.suffix.lower() == ".png" and not args.messenger):
        return [output]
    return [output.with_stem(f"{output.stem}-{i}") for i in range(count)]


def check(args):
    """Raises UserError unless --output, --transparent and --for fit together and the files can be written."""
    media.check_suffix(args.output, alpha=args.transparent)
    if args.messenger:
        wanted, fewest = PLATFORMS[args.messenger].suffix, PLATFORMS[args.messenger].frames[0]
        if args.output.suffix.lower() != wanted:
            raise UserError(f"--for {args.messenger} makes a {wanted} file: let --output end so.")
        if (args.num_frames - 1) * args.interpolate + 1 < fewest:
            raise UserError(f"--for {args.messenger} wants {fewest} frames or more: give more --num_frames.")
    for name in names(args):
        check_output("--output", name)


def write(args, clips, given):
    """Writes stickers (B, T, R, R, 3), several to numbered names, or to the rows of a sheet. given: bool
    (T,), which frames a sheet marks."""
    files = names(args)
    if args.transparent or args.messenger:
        from support.matte import cut_out

        clips = [cut_out(clip) for clip in clips]  # (T, R, R, 4)
    if len(files) < len(clips):
        args.output.parent.mkdir(parents=True, exist_ok=True)
        save_png(sheet(list(clips), marks=[given.tolist()] * len(clips)), args.output)
    elif args.messenger:
        for name, clip in zip(files, clips):
            data, note = fit(clip, args.fps, args.messenger)
            with media.new_file(name) as file:
                file.write(data)
            print(f"{name}: {note}")
    else:
        for name, clip in zip(files, clips):
            media.write_clip(name, clip, args.fps)
    print("wrote " + ", ".join(map(str, files)))
