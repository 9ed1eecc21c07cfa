"""
Turns a trained model into the one that ships: its weights in fp16, without what only a training needs.

    python -m lab.ship --checkpoint runs/ship   # unet/, prior/, scheduler/, model_index.json in pretrained/

The model works on the VAE that ships, which lies in pretrained/vae already, and on the built-in text
encoders. The model card, pretrained/README.md, is written by hand.
"""

import shutil
import tempfile
from pathlib import Path

from model import DFGN, make_scheduler
from support.checkpoint import write_parts, write_unet
from support.common import UserError, one_sentence, printable
from support.encoders import Encoders
from support.finished import SHIPPED_MODEL, read_model
from support.flags import Parser


def ship(checkpoint, folder):
    """Writes the model in `checkpoint`, a finished run or one of its checkpoint-N folders, to `folder`, with
    averaged weights where there are any. Returns the bytes of the whole folder. Raises UserError for a model
    that needs other encoders than those that ship."""
    unet, encoders, settings = read_model(checkpoint, DFGN)
    sources = encoders.sources()
    if sources != Encoders().sources():
        raise UserError(f"--checkpoint {printable(checkpoint)} needs other encoders than those that ship.")
    halves = {name: weight.half() for name, weight in unet.state_dict().items()}
    taken = {"unet", "scheduler", *sources}  # of model_index.json; the rest is what the training recorded
    kept = {name: value for name, value in settings.items() if name not in taken and name[0] != "_"}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".ship-") as writing:
        writing = Path(writing)
        write_unet(writing / "unet", unet, halves)
        write_parts(writing, unet, encoders, make_scheduler(), kept)
        for part in ("unet", "prior", "scheduler"):
            shutil.rmtree(folder / part, ignore_errors=True)
            if (writing / part).is_dir():
                (writing / part).rename(folder / part)
        (writing / "model_index.json").replace(folder / "model_index.json")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@one_sentence("lab.ship")
def main():
    parser = Parser(description="Make a trained model the one that ships.")
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a finished run, or a checkpoint-N folder in it")
    add("--output_dir", type=Path, default=SHIPPED_MODEL, help="(default: pretrained/)")
    args = parser.parse_args()
    size = ship(args.checkpoint, args.output_dir)
    print(f"wrote {printable(args.output_dir)}, {size / 2**20:.1f} MB in all")


if __name__ == "__main__":
    main()
