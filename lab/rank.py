"""
A page to judge stickers by, as in the user study of the paper (Table 5): text alignment, interest, motion.

    python -m lab.rank runs/a runs/b pretrained --output rank.html     # the page, and rank.key.json beside it
    python -m lab.rank_table rank.key.json answers-*.json              # the table, from the raters' files

Every run samples the same prompts with the same seed and the settings that it records. The page is one file
that needs no network; raters order the stickers of a prompt by mouse or keyboard, one question at a time, and
get their answers as a JSON file. Which run a sticker is of stands nowhere in it: stickers are named and
ordered by a hash of what they show, and the page shuffles them anew for every rater. The key tells: keep it
from raters.
"""

import base64
import hashlib
import io
import json
from pathlib import Path

from tqdm import tqdm

import sample
from lab.rank_table import QUESTIONS
from support import media, stickers
from support.common import UserError, check_output, one_sentence, printable, replacing
from support.finished import local_folder
from support.flags import SEED, Parser
from support.machine import device

TEMPLATE = Path(__file__).with_name("rank.html")
MOST_RUNS = 9  # a key of the keyboard each
BATCH = 4  # prompts that are sampled at a time


def read_prompts(path):
    """The lines of a text file, without empty ones. Raises UserError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {printable(path)} cannot be read ({error}): give a text file.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts {printable(path)} holds no prompt: write one in each line.")
    return prompts


def sample_run(run, prompts, seed):
    """A sticker of eight frames for each prompt: a list of uint8 (8, R, R, 3). Raises CheckpointError."""
    denoiser, encoders, settings = sample.load(run, device())
    options = {name: settings[name] for name in (*sample.SAMPLING, "mixed_precision")}
    clips = []
    for start in tqdm(range(0, len(prompts), BATCH), f"sampling {printable(run, 40)}", unit="batch"):
        batch = prompts[start : start + BATCH]
        nothing = sample.nothing_given(encoders, settings["resolution"], len(batch))
        noise = 1000 * seed + start  # its own for every batch, the same for every run
        clips += list(sample.generate(denoiser, encoders, batch, *nothing, **options, seed=noise))
    return clips


def webp(clip):
    """uint8 (F, R, R, 3) -> the bytes of a lossless WebP."""
    file = io.BytesIO()
    media.save_webp(file, clip, sample.FPS)
    return file.getvalue()


def make_study(runs, prompts, clips):
    """What goes into the page, and the key that is kept from it.

    runs: names; prompts: texts; clips: for each run a list of uint8 (F, R, R, 3), one for each prompt.
    Returns (study, key): two dicts for JSON. An id is a hash of the file and the prompt's number, and ids are
    sorted: nothing of the study depends on the order of the runs."""
    shown, keys = [], []
    for i, prompt in enumerate(prompts):
        pictures, owners = {}, {}
        for r in range(len(runs)):
            data, copies = webp(clips[r][i]), 0
            while (name := digest(i, copies, data)) in pictures:  # two runs made the very same
                copies += 1
            uri = "data:image/webp;base64," + base64.b64encode(data).decode()
            pictures[name], owners[name] = uri, r
        shown.append(dict(text=prompt, stickers=sorted(pictures.items())))
        keys.append(dict(prompt=prompt, stickers=dict(sorted(owners.items()))))
    page = digest(QUESTIONS, shown)  # the same stickers, the same page: answers stay good
    study = dict(page=page, questions=list(QUESTIONS.items()), prompts=shown)
    return study, dict(page=page, runs=runs, prompts=keys)


def digest(*things):
    return hashlib.sha256(repr(things).encode()).hexdigest()[:16]


def fill_page(study):
    """The page's HTML."""
    data = json.dumps(study, indent=0).replace("<", "\\u003c")  # a prompt cannot end the script
    return TEMPLATE.read_text(encoding="utf-8").replace(">STUDY<", f">{data}<")


def key_path(output):
    return output.with_suffix(".key.json")


def parse_args():
    parser = Parser(description="Make a page on which people rank the stickers of several models, blind.")
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a finished run, a checkpoint-N folder in it, or a hub id; two or more",
    )
    add(
        "--output",
        type=Path,
        default="rank.html",
        metavar="FILE.html",
        help="the page; its key goes beside it, as FILE.key.json (default: %(default)s)",
    )
    add("--prompts", metavar="FILE", help="a text file, a prompt in each line (default: the built-in twelve)")
    add("--seed", type=SEED, default=0, help="another seed, other stickers (default: %(default)s)")
    args = parser.parse_args()
    if not 2 <= len(set(args.runs)) == len(args.runs) <= MOST_RUNS:
        raise UserError(
            f"two to {MOST_RUNS} different runs can be ranked, not {printable(' '.join(args.runs))}."
        )
    if args.output.suffix.lower() != ".html":
        raise UserError(f"--output {printable(args.output)}: let the page end in .html.")
    for path in (args.output, key_path(args.output)):
        check_output("--output", path)
    for run in args.runs:
        local_folder(run, "RUN")  # said before the first one is sampled
    return args


@one_sentence("lab.rank")
def main():
    args = parse_args()
    prompts = read_prompts(args.prompts) if args.prompts else list(stickers.PROMPTS)
    clips = [sample_run(run, prompts, args.seed) for run in args.runs]
    study, key = make_study(args.runs, prompts, clips)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for path, text in (
        (key_path(args.output), json.dumps(key, indent=1)),
        (args.output, fill_page(study)),
    ):
        with replacing(path) as writing:
            writing.write_text(text, encoding="utf-8")
    print(f"wrote {printable(args.output)}, {args.output.stat().st_size / 2**20:.1f} MB: for the raters")
    print(f"wrote {printable(key_path(args.output))}: tells which is which, keep it for lab.rank_table")


if __name__ == "__main__":
    main()
