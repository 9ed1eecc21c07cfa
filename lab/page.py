"""
A page to make stickers in the browser: a storyboard of eight frames, a prompt, a button.

    pip install gradio
    python -m lab.page          # then open http://127.0.0.1:7860 in the browser

What a row of Table 7 does with masks a visitor does with pictures: a picture in frame 0 and a prompt is image
and text to video, pictures in 0, 3 and 6 are interpolation, in 0 to 4 prediction. Requests are worked off one
after another; each has a folder of its own for its files. The page is for this machine alone, unless --host
opens it.
"""

import os
import tempfile
from functools import lru_cache
from pathlib import Path

import sample
from masks import NUM_FRAMES, is_trained
from support import machine, media, stickers
from support.common import UserError, one_sentence
from support.finished import SHIPPED_MODEL, find_model
from support.flags import Parser, number
from support.matte import cut_out
from support.workers import read_picture

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
SHOWN = 256  # pixels, width of a sticker on the page
MOST = 8  # stickers at a time


def models(runs="runs"):
    """The finished models at hand, the newest first: {name: folder}"""
    found = sorted(Path(runs).glob("*/model_index.json"), key=lambda path: -path.stat().st_mtime)
    named = {path.parent.name: path.parent for path in found}
    if (SHIPPED_MODEL / "model_index.json").is_file():
        named["pretrained"] = SHIPPED_MODEL
    return named or {"model": find_model(runs)[0]}  # which says what to do


@lru_cache(maxsize=1)
def load(folder):
    return sample.load(folder, machine.device())


def make(folder, pictures, prompt, settings, count):
    """`count` stickers, uint8 (count, T, R, R, 3), and whether a row of Table 7 gives the same frames.

    pictures: {frame: file}; settings: arguments of sample.generate. Raises UserError."""
    prompt = prompt.strip()
    if not prompt and not pictures:
        raise UserError("There is nothing to start from: write a prompt, or give a picture.")
    if len(pictures) == NUM_FRAMES and settings.get("interpolate", 1) == 1:
        raise UserError("All frames are given: leave one out to be drawn, or take more frames between them.")
    denoiser, encoders, recorded = load(folder)
    resolution = recorded["resolution"]
    read = {slot: read_picture(file, resolution) for slot, file in pictures.items()}
    inputs = sample.given_pictures(encoders, resolution, read, count)
    settings = settings | dict(mixed_precision=recorded["mixed_precision"], progress=True)
    clips = sample.generate(denoiser, encoders, [prompt] * count, *inputs, **settings)
    return clips, not read or is_trained(read, NUM_FRAMES)


def save(clips, fps, transparent, folder):
    """Writes stickers as GIF, WebP and sheet into a new folder below `folder`. Returns the paths, three a
    sticker."""
    folder, files = Path(tempfile.mkdtemp(dir=folder)), []
    for i, clip in enumerate(clips):
        clip = cut_out(clip) if transparent else clip
        for suffix in (".gif", ".webp", ".png"):
            files.append(folder / f"sticker-{i}{suffix}")
            media.write_clip(files[-1], clip, fps)
    return files


def show(files):
    """The stickers among the files, side by side and enlarged, as HTML."""
    look = f"width: {SHOWN}px; image-rendering: pixelated"
    pictures = [
        f'<img src="/gradio_api/file={path}" alt="{path.stem}" style="{look}">'
        for path in files
        if path.suffix == ".webp"
    ]
    return f'<div style="display: flex; flex-wrap: wrap; gap: 12px">{"".join(pictures)}</div>'


def build(gradio, folder):
    """The page, a gradio.Blocks, whose files go into `folder`."""
    found = models()
    first = next(iter(found))

    def as_it_came(picture):
        """The file that was uploaded: our own reader has limits, and says what is wrong with it."""
        return picture and picture.path

    def recorded(name):
        settings = load(found[name])[2]
        return [settings[key] for key in sample.SAMPLING]

    def press(values, progress=gradio.Progress(track_tqdm=True)):
        given = {slot: values[box] for slot, box in enumerate(slots) if values[box]}
        settings = dict(zip(sample.SAMPLING, (values[slider] for slider in sliders)))
        settings |= dict(interpolate=values[between], loop=values[loop], seed=int(values[seed] or 0))
        try:
            clips, trained = make(found[values[name]], given, values[prompt], settings, values[count])
            files = save(clips, sample.FPS * values[between], values[clear], folder)
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from error
        if not trained:
            gradio.Warning("No row of Table 7 shows just these frames: the model may do worse.")
        return show(files), [str(path) for path in files]

    with gradio.Blocks(title="RDTF stickers") as page:
        gradio.Markdown("# Stickers\nWrite what it shows, or drop pictures into some of its frames, or both.")
        with gradio.Row():
            prompt = gradio.Textbox(label="Prompt", placeholder=stickers.PROMPTS[0], scale=4)
            button = gradio.Button("Make", variant="primary", scale=1)
        boxes = dict(sources=["upload", "clipboard"], height=150, min_width=110)
        with gradio.Row():
            slots = [gradio.Image(label=f"Frame {slot}", **boxes) for slot in range(NUM_FRAMES)]
        for slot in slots:
            slot.preprocess = as_it_came
        room = f'<div style="height: {SHOWN}px"></div>'
        made = gradio.HTML(room, label="Stickers", show_label=True, container=True)
        files = gradio.Files(label="GIF, WebP and sheet of each", height=140)
        with gradio.Accordion("Settings", open=False):
            name = gradio.Dropdown(list(found), value=first, label="Model")
            values = recorded(first)
            scale = dict(minimum=-2, maximum=15, step=0.5)
            with gradio.Row():
                sliders = [
                    gradio.Slider(label="Text guidance", value=values[0], **scale),
                    gradio.Slider(label="Image guidance", value=values[1], **scale),
                    gradio.Slider(1, 100, value=values[2], step=1, label="Steps"),
                ]
            with gradio.Row():
                seed = gradio.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)
                count = gradio.Slider(1, MOST, value=1, step=1, label="Stickers")
                between = gradio.Radio([1, 2, 3], value=1, label="Times as many frames")
                loop = gradio.Checkbox(label="Loop")
                clear = gradio.Checkbox(label="Transparent")
        gradio.Examples([[text] for text in stickers.PROMPTS], [prompt], examples_per_page=12)
        name.change(recorded, name, sliders)
        inputs = {name, prompt, *sliders, seed, count, between, loop, clear, *slots}
        gradio.on([button.click, prompt.submit], press, inputs, [made, files])
    return page


def parse_args():
    parser = Parser(description="A page to make stickers in the browser.")
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="0.0.0.0 opens the page to the network (default: %(default)s)")
    add("--port", type=number(int, 1, 65535), default=7860, help="(default: %(default)s)")
    return parser.parse_args()


def main():
    with one_sentence("lab.page"):
        args = parse_args()
        try:
            import gradio
        except ImportError as error:
            raise UserError("the page needs a package: pip install gradio") from error
        with tempfile.TemporaryDirectory(prefix="stickers-") as folder:
            page = build(gradio, folder)
            try:
                page.queue().launch(server_name=args.host, server_port=args.port, allowed_paths=[folder])
            except OSError as error:
                raise UserError(f"--port {args.port} cannot be used ({error}): give another one.") from error


if __name__ == "__main__":
    main()
