"""
Models from elsewhere: their folders are data only. Weights are read as safetensors, code is never run, and a
config.json that describes more than its files hold is refused before memory is taken.
"""

import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DConditionModel
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from support.common import UserError, one_line


class EncoderError(UserError):
    """A frozen part that cannot be loaded, in one sentence that names its flag and the way out."""


MAX_SIZE, MAX_LAYERS = 2**20, 256  # of any number in a config.json; of those that count layers, and of lists


def check_config(config, name):
    """Raises ValueError unless a model may be built from a part of a config.json, a dict or list called
    `name`: no absurd numbers, weights in the usual files, no code from elsewhere."""
    if len(config) > MAX_LAYERS:
        raise ValueError(f"its config.json lists {len(config)} {name}")
    for key, value in config.items() if isinstance(config, dict) else [(name, x) for x in config]:
        if key in ("quantization_config", "transformers_weights") and value is not None:
            raise ValueError(f"its config.json has a {key}: only plain weights in the usual files are read")
        # transformers would download and import an attention of the name "kernels-community/x"
        if key.endswith("_implementation") and value not in (None, "eager", "sdpa"):
            raise ValueError(f"its config.json says {key} = {value}: only eager and sdpa are built in")
        if isinstance(value, (dict, list)):
            check_config(value, key)
        elif isinstance(value, (int, float)):
            if not abs(value) <= (MAX_LAYERS if "layer" in key else MAX_SIZE):
                raise ValueError(f"its config.json says {key} = {value}")


def weight_files(folder, model):
    """The safetensors files that diffusers or transformers, whichever `model` is of, read its weights from:
    paths. Raises ValueError if one is missing, or an index names anything but safetensors files beside it."""
    diffusers = isinstance(model, ModelMixin)
    whole = folder / ("diffusion_pytorch_model.safetensors" if diffusers else "model.safetensors")
    index = folder / f"{whole.name}.index.json"
    names = {whole.name}
    if index.is_file() and (diffusers or not whole.is_file()):  # the libraries differ where both are there
        names = set(json.loads(index.read_text())["weight_map"].values())
    for name in sorted(names):
        # Of another name it might be a pickle, with a separator a file of somebody else.
        if not re.fullmatch(r"[^/\\]+\.safetensors", name):
            raise ValueError(f"its {index.name} names {name}, which is no safetensors file beside it")
        if not (folder / name).is_file():
            raise ValueError(f"it holds no {name}")
    return [folder / name for name in sorted(names)]


def check_size(folder, build):
    """Raises ValueError unless the files of `folder` hold the weights that its config.json describes, before
    memory is taken for them: both may come from elsewhere.
    build: function of the folder -> the module of its config.json"""
    check_config(dict(config=json.loads((folder / "config.json").read_text())), "config.json")
    with torch.device("meta"):
        model = build(folder)
    files, weights = weight_files(folder, model), model.state_dict()
    # a number takes a byte at least
    if sum(weight.numel() for weight in weights.values()) > sum(file.stat().st_size for file in files):
        raise ValueError("its config.json describes more weights than its safetensors files hold")
    if not isinstance(model, ModelMixin):
        return  # transformers fits other names too, as of a whole CLIP: `load_text` asks it what is missing
    shapes = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    # In a VAE of 2022 attention had other names; diffusers mends them unless there is an index.
    if not list(folder.glob("*.safetensors.index.json")):
        model._fix_state_dict_keys_on_load(shapes)
    for name, weight in weights.items():  # diffusers would leave what is missing at random
        if shapes.get(name) != weight.shape:
            found = f"{shapes[name]} in" if name in shapes else "missing from"
            raise ValueError(f"{name} is {found} its weights, {tuple(weight.shape)} in its config.json")


def load_pretrained(flag, source, subfolders, load, build=None, config="config.json", way_out=None):
    """Calls load(source, subfolder=...), first on the folder or hub id itself, then on those of its
    subfolders where a Stable Diffusion pipeline keeps the part. Weights are read as safetensors only, code is
    never run; with `build` a folder is held against `check_size` first.
    way_out: what helps where the source is a folder of ours, in words. Raises EncoderError."""
    local = way_out is not None or Path(source).is_dir()
    first_error = None
    for subfolder in ("", *subfolders):
        if local and not (Path(source) / subfolder / config).is_file():
            continue
        try:
            if local and build is not None:
                check_size(Path(source) / subfolder, build)
            return load(source, subfolder=subfolder)
        except Exception as error:  # what the libraries raise on the files of somebody else has no end
            first_error = first_error or error
    reason = one_line(first_error or f"it holds no {config}")
    way_out = way_out or (
        f"give a folder that save_pretrained wrote, with model.safetensors{'' if local else ', or a hub id'};"
        f" `hf download {'ID' if local else source}` fetches one, after `hf auth login` if it is gated"
    )
    raise EncoderError(f"{flag} {source} cannot be loaded: {way_out} ({reason}).") from first_error


def load_text(flag, source, subfolders, model_class, model_types, dtype=torch.float32):
    """A model of transformers that reads text, and its tokenizer: (model, tokenizer). Raises EncoderError.

    model_types: the types of config.json that `model_class` fits; of a whole CLIP it may be the text part."""

    def read_config(source, subfolder):
        config = AutoConfig.from_pretrained(source, subfolder=subfolder, trust_remote_code=False)
        if config.model_type not in model_types:
            raise ValueError(f"it is a {config.model_type} model")
        return config if isinstance(config, model_class.config_class) else config.text_config

    def load(source, subfolder):
        read_config(source, subfolder)
        model, report = model_class.from_pretrained(
            source, subfolder=subfolder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"weights are missing, such as {sorted(report['missing_keys'])[0]}")
        return model, subfolder

    def load_tokenizer(source, subfolder):
        return AutoTokenizer.from_pretrained(source, subfolder=subfolder, trust_remote_code=False)

    model, subfolder = load_pretrained(
        flag, source, subfolders, load, build=lambda folder: model_class(read_config(folder, ""))
    )
    beside = (subfolder.replace("text_encoder", "tokenizer"),)
    return model, load_pretrained(flag, source, beside, load_tokenizer, config="tokenizer_config.json")


def start_from_spatial(unet, source):
    """--init_unet: puts a Stable Diffusion 2.x U-Net (folder or hub id) into the spatial part of `unet`.

    The input channels of the given frames start at zero, temporal layers at identity (alpha = 0), and so does
    the projection of CLIP states where the widths agree: at step 0 the network is that U-Net, frame by frame,
    shown the same tokens (here those of T5 stand beside those of CLIP, and no padding).
    Raises EncoderError if it cannot be loaded or has other shapes."""

    def load(source, subfolder):
        return UNet2DConditionModel.from_pretrained(
            source, subfolder=subfolder, use_safetensors=True, low_cpu_mem_usage=False
        )

    def build(folder):
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))

    spatial = load_pretrained("--init_unet", source, ("unet",), load, build).state_dict()
    own = unet.state_dict()
    channels = spatial["conv_in.weight"].shape[1]
    extra = own["conv_in.weight"].shape[1] - channels
    if channels == unet.config.latent_channels:
        spatial["conv_in.weight"] = F.pad(spatial["conv_in.weight"], (0, 0, 0, 0, 0, extra))
    for name, weight in spatial.items():
        if name not in own or own[name].shape != weight.shape:
            theirs, ours = tuple(weight.shape), tuple(own[name].shape) if name in own else "absent"
            raise EncoderError(
                f"--init_unet {source} does not fit this --preset and --vae: its {name} is {theirs}, here it "
                f"is {ours}. `full` takes the U-Net of a Stable Diffusion 2.x model."
            )
    if unet.config.clip_dim == unet.config.cross_attention_dim:
        spatial["clip_projection.weight"] = torch.eye(unet.config.clip_dim)
        spatial["clip_projection.bias"] = torch.zeros(unet.config.clip_dim)
    unet.load_state_dict(spatial, strict=False)
