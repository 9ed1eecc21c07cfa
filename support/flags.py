"""
Command lines: flags that several programs share, the numbers that flags take, errors as one sentence.
"""

import argparse
import os
import sys
from pathlib import Path

from support.common import UserError, printable

MOST = 10**9  # of anything: a larger number is a slip, and beyond what some library takes


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors, which `one_sentence` prints without the list of all
    flags, and whose usage names the program as it was called: FILE.py, or python -m MODULE."""

    def __init__(self, **settings):
        module = sys.modules["__main__"].__spec__  # None of a file
        super().__init__(prog=f"python -m {module.name}" if module else None, **settings)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags).")


def number(kind, least, most=MOST):
    """A `type=` of add_argument: an int or a float (`kind`) of least..most."""

    def read(text):
        value = kind(text)
        if not least <= value <= most:  # nan neither
            bounds = (
                f"be at least {least}" if most == MOST and not value > most else f"lie in {least}..{most}"
            )
            raise argparse.ArgumentTypeError(f"{printable(text, 50)} must {bounds}")
        return value

    read.__name__ = kind.__name__  # which argparse names where `kind` itself fails
    return read


SEED = number(int, 0, 2**63 - 1)  # torch takes no larger one


def filled(text):
    """A `type=` of add_argument: any text but the empty one that a shell leaves of a variable that is not
    set."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def part_flags(add, vae, text):
    """--vae, --clip, --t5: the pre-trained parts. add: parser.add_argument of the program; vae, text: what is
    used without them, in words."""
    clip, t5 = (f"{part}, tokenizer (default: {text})" for part in ("CLIP text model", "T5 encoder"))
    for name, about in dict(vae=f"AutoencoderKL (default: {vae})", clip=clip, t5=t5).items():
        add(f"--{name}", metavar="DIR_OR_ID", type=filled, help=about)


def work_flags(add, num_workers=min(8, os.cpu_count() or 1)):
    """--cache_dir, None where it is left out (common.default_cache), and --num_workers. add:
    parser.add_argument of the program; num_workers: the default."""
    workers = "processes that decode and draw, 0 = this one alone (default %(default)s)"
    place = "where drawn stickers, latents and the judge are kept (default: ~/.cache/rdtf)"
    add("--cache_dir", metavar="DIR", type=Path, help=place)
    add("--num_workers", type=number(int, 0, 1024), default=num_workers, help=workers)
