"""
A finished model: found under runs/, on disk or on the hub, and read. What is in its folder may come from
anywhere.
"""

import json
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from support.common import UserError, one_line, printable
from support.decode import MAX_SIDE
from support.encoders import SHIPPED_VAE, Encoders
from support.machine import DTYPES, native_precision
from support.pretrained import EncoderError, check_size

SHIPPED_MODEL = SHIPPED_VAE.parent
MAX_SCALE = 1000  # of guidance: beyond it every picture is saturated
MAX_STEPS = 1000  # of DDIM: the timesteps of training
PARTS = ["model_index.json", "unet/*", "unet_ema/*", "vae/*", "prior/*"]  # of a model on the hub


# What files raise that are missing, damaged, of another size, or made to break whoever reads them
BROKEN = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError)
BROKEN += (SafetensorError,)


class CheckpointError(UserError):
    """A model that cannot be used."""


def find_model(runs="runs"):
    """The folder below `runs` that was finished last, else that of the model that ships, and which of them it
    is, in words. Raises CheckpointError if there is neither."""
    finished = sorted(Path(runs).glob("*/model_index.json"), key=lambda path: path.stat().st_mtime)
    if finished:
        return finished[-1].parent, "the newest run"
    if not (SHIPPED_MODEL / "model_index.json").is_file():
        raise CheckpointError(
            f"no finished model under {runs}/ and none in {printable(SHIPPED_MODEL)}: `python train.py` "
            "makes one, `git checkout pretrained` brings back the one that ships, --checkpoint names another."
        )
    return SHIPPED_MODEL, f"no finished run under {runs}/, so the model that ships"


def local_folder(checkpoint, flag="--checkpoint"):
    """The folder of a model that `flag` names by its path or its hub id. Raises CheckpointError."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(checkpoint), allow_patterns=PARTS))
        except (OSError, ValueError) as error:  # HTTP errors are OSErrors
            reason = one_line(error)
            raise CheckpointError(
                f"{flag} {checkpoint} is not a folder, nor a hub id that can be fetched: give the "
                f"output_dir of a training run ({reason})."
            ) from error
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"{flag} {checkpoint} holds no model_index.json: give the output_dir of a finished "
            "training run, or a checkpoint-N folder inside it."
        )
    return folder


def check_settings(settings):
    """Raises ValueError, KeyError or TypeError unless the content of model_index.json can be sampled with."""
    if not (type(settings["resolution"]) is int and 8 <= settings["resolution"] <= MAX_SIDE):
        raise ValueError(f"model_index.json says resolution = {settings['resolution']}")
    if settings["mixed_precision"] not in DTYPES:
        raise ValueError(f"model_index.json says mixed_precision = {settings['mixed_precision']}")
    for name in ("guidance_scale", "image_guidance_scale"):
        if not abs(settings[name]) <= MAX_SCALE:
            raise ValueError(f"model_index.json says {name} = {settings[name]}")
    steps = settings.setdefault("num_inference_steps", 50)  # a model of before it was recorded
    if not (type(steps) is int and 1 <= steps <= MAX_STEPS):
        raise ValueError(f"model_index.json says num_inference_steps = {steps}")


def check_fit(unet, encoders, resolution):
    """Raises ValueError unless the parts work on the same latents and texts, and frames have such latents."""
    side, rest = divmod(resolution, encoders.codec.factor)
    prior = encoders.prior
    if rest or side < 1 or (prior is not None and prior.config.side != side):
        raise ValueError(f"model_index.json says resolution = {resolution}, which its parts are not made for")
    channels, config = encoders.codec.latent_channels, unet.config
    found = dict(
        latent_channels=channels,
        condition_channels=channels if prior is None else 2 * channels,
        clip_dim=encoders.clip.width,
        t5_dim=encoders.t5.width,
    )
    wanted = dict(config, condition_channels=config.condition_channels or config.latent_channels)
    made_for = channels, encoders.clip.width
    if prior is not None and (prior.config.latent_channels, prior.config.text_dim) != made_for:
        raise ValueError("its prior is of another model")
    for name, value in found.items():
        if wanted[name] != value:
            raise ValueError(f"its U-Net has {name} = {wanted[name]}, its other parts {value}")


@contextmanager
def readable(checkpoint, flag="--checkpoint"):
    """Turns whatever reading a model may raise into CheckpointError."""
    try:
        yield
    except EncoderError as error:
        raise CheckpointError(str(error)) from error
    except BROKEN as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{flag} {checkpoint} cannot be read, use another one ({reason}).") from error


def read_settings(folder):
    """The content of model_index.json. Raises what BROKEN lists."""
    settings = json.loads((folder / "model_index.json").read_text())
    check_settings(settings)
    return settings


def read_unet(folder, network):
    """The U-Net of a model, of class `network`, with averaged weights where there are any. Raises what BROKEN
    lists."""
    part = folder / ("unet_ema" if (folder / "unet_ema").is_dir() else "unet")
    config = network.load_config(part)
    if config.get("_class_name") != network.__name__:
        raise ValueError(f"its U-Net is a {config.get('_class_name')}, not a {network.__name__}")
    check_size(part, lambda part: network.from_config(config))
    return network.from_pretrained(part, low_cpu_mem_usage=False, use_safetensors=True)


def read_model(checkpoint, network, device="cpu", vae=None, clip=None, t5=None):
    """Reads a finished run or one of its checkpoint-N folders, on disk or of the hub; EMA weights where there
    are any.

    network: class of its U-Net; vae, clip, t5: where the pre-trained parts are now, if not where the run
    recorded them. Returns (unet, encoders, settings) in the CPU's memory and on `device`, settings being the
    content of model_index.json. Raises CheckpointError.
    """
    folder = local_folder(checkpoint)
    with readable(checkpoint):
        settings = read_settings(folder)
        unet = read_unet(folder, network)
        named = dict(vae=vae, clip=clip, t5=t5)
        sources = settings | {name: source for name, source in named.items() if source}
        dtype = DTYPES[native_precision(settings["mixed_precision"])]  # of text encoders, as in training
        encoders = Encoders.load(folder, sources, device, dtype)
        check_fit(unet, encoders, settings["resolution"])
    return unet, encoders, settings


# ------------------------------------------------------------------------------------------------------------
# --init_from: a new run that starts from a model


def recorded_flags(checkpoint):
    """The flags of train.py that say how a model is built: {flag: value}, and the set of those that a run
    which starts from it cannot change. Raises CheckpointError."""
    folder = local_folder(checkpoint, "--init_from")
    with readable(checkpoint, "--init_from"):
        settings = read_settings(folder)
        flags = dict(preset=str(settings["preset"]), resolution=settings["resolution"])
        flags["temporal"] = json.loads((folder / "unet" / "config.json").read_text())["temporal"]
    flags["prior"] = (folder / "prior").is_dir()
    fixed = {"preset", "temporal", "prior"}
    return flags, fixed | {"resolution"} if flags["prior"] else fixed


def start_from_model(unet, checkpoint):
    """Puts the weights of a model into `unet`. Raises CheckpointError unless they are of such a network."""
    folder = local_folder(checkpoint, "--init_from")
    with readable(checkpoint, "--init_from"):
        model = read_unet(folder, type(unet))
        for name, value in unet.config.items():
            if not name.startswith("_") and json.dumps(model.config[name]) != json.dumps(value):
                raise ValueError(f"its {name} is {model.config[name]}, here it is {value}")
        unet.load_state_dict(model.state_dict())
