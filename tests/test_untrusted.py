"""Model folders and prompts from elsewhere: one sentence, no memory taken on their word, none of their code
run."""

import json
import os
import shutil
import struct

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import sample
from support.encoders import Encoders, PretrainedCLIP, PretrainedT5, PretrainedVAE
from support.finished import CheckpointError
from support.pretrained import EncoderError
from tests.checkpoints import toy_model, write_model
from tests.tiny_parts import make_clip, make_parts, make_t5, make_vae

HUGE = 10**9
WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET = f"unet/{WEIGHTS}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A finished run with all its parts, the prior included."""
    return write_model(tmp_path_factory.mktemp("run"), *toy_model(preconditioned=True))


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def write(*pieces):
    return lambda path: path.write_bytes(b"".join(pieces))


def halve(path):
    """Takes every second tensor out of a safetensors file, which stays as large."""
    tensors = load_file(path)
    junk = torch.zeros(sum(tensor.numel() for tensor in tensors.values()))
    save_file({name: tensors[name] for name in sorted(tensors)[::2]} | dict(junk=junk), path)


def bend(path):
    """Gives the tensors of a safetensors file one dimension more."""
    save_file({name: tensor[None] for name, tensor in load_file(path).items()}, path)


def header(**tensors):
    """The start of a safetensors file that says it holds these: name = (dtype, shape, offsets)"""
    entries = {n: dict(dtype=d, shape=s, data_offsets=o) for n, (d, s, o) in tensors.items()}
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


# what is done to the file of that name; what the sentence says
BROKEN = {
    "layers": ("unet/config.json", dict(layers_per_block=HUGE), "layers_per_block"),
    "widths": ("unet/config.json", dict(block_out_channels=[HUGE, HUGE]), "block_out_channels"),
    "not so absurd widths": ("unet/config.json", dict(block_out_channels=[4096, 8192]), "more weights than"),
    "many levels": (
        "unet/config.json",
        dict(block_out_channels=[16] * 500, attention_levels=[True] * 500),
        "lists 500",
    ),
    "words for numbers": ("unet/config.json", dict(block_out_channels=["a", "b"]), "cannot be read"),
    "no groups": ("unet/config.json", dict(norm_num_groups=0), "cannot be read"),
    "negative": ("unet/config.json", dict(cross_attention_dim=-5), "cannot be read"),
    "condition": ("unet/config.json", dict(condition_channels=7), "conv_in.weight is"),
    "no pooling": ("unet/config.json", dict(sti_gamma=0), "sti_gamma is 0"),
    "pooling in words": ("unet/config.json", dict(sti_gamma="2"), "sti_gamma is '2'"),
    "half a U-Net": (UNET, halve, "is missing from its weights"),
    "half a VAE": (f"vae/{WEIGHTS}", halve, "is missing from its weights"),
    "half a prior": (f"prior/{WEIGHTS}", halve, "is missing from its weights"),
    "side": ("prior/config.json", dict(side=2**16), "more weights than"),
    "another side": ("prior/config.json", dict(side=-4), "resolution = 16, which its parts are not made for"),
    "lengths": ("prior/config.json", dict(lengths=[3, HUGE]), "lengths"),
    "no lengths": ("prior/config.json", dict(lengths=[]), "cannot be read"),
    "other lengths": ("prior/config.json", dict(lengths=[2, 3, 4, 5, 6, 8]), "other clip lengths"),
    "no prior": ("prior/config.json", write(b"{"), "cannot be read"),
    "another shape": (f"vae/{WEIGHTS}", bend, "in its weights"),
    "another class": ("unet/config.json", dict(_class_name="UNet2DConditionModel"), "not a DFGN"),
    "no JSON": ("unet/config.json", write(b"{"), "cannot be read"),
    "a list": ("unet/config.json", write(b"[1, 2]"), "cannot be read"),
    "deep": ("unet/config.json", write(b"[" * 100_000), "cannot be read"),
    "not a number": ("unet/config.json", write(b'{"_class_name": "DFGN", "head_width": NaN}'), "head_width"),
    "VAE": ("vae/config.json", dict(latent_channels=2**20), "more weights than"),
    "VAE without levels": ("vae/config.json", dict(block_out_channels=[]), "cannot be loaded"),
    "scale of latents": ("vae/config.json", dict(scaling_factor=float("nan")), "scaling_factor"),
    "another VAE": ("vae/config.json", dict(scaling_factor=0.5), "another VAE than the model was trained"),
    "no VAE": ("vae/config.json", lambda path: shutil.rmtree(path.parent), "another VAE than the model was"),
    "older version": ("model_index.json", dict(codec_identity="PatchPCA-0"), "is of an older version"),
    "resolution": ("model_index.json", dict(resolution=HUGE), "resolution"),
    "no resolution": ("model_index.json", dict(resolution=None), "resolution"),
    "precision": ("model_index.json", dict(mixed_precision="os.system"), "mixed_precision"),
    "scale": ("model_index.json", dict(guidance_scale=float("nan")), "guidance_scale"),
    "scale in words": ("model_index.json", dict(image_guidance_scale="1"), "cannot be read"),
    "steps": ("model_index.json", dict(num_inference_steps=0), "num_inference_steps"),
    "index": ("model_index.json", write(b"[]"), "cannot be read"),
    "not UTF-8": ("model_index.json", write(b"\xff\xfe\x00"), "cannot be read"),
    "long header": (UNET, write(struct.pack("<Q", 2**63), b"{}"), "cannot be"),
    "header without end": (UNET, write(struct.pack("<Q", 100), b"{"), "cannot be"),
    "no header": (UNET, write(b"\x80\x04cos\nsystem\n"), "more weights than"),
    "offsets": (UNET, write(header(x=("F32", [2**40], [0, 2**42])), bytes(4_000_000)), "cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_model_folder_from_elsewhere_gets_one_sentence(checkpoint, tmp_path, name):
    file, what, words = BROKEN[name]
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    change(folder / file, **what) if isinstance(what, dict) else what(folder / file)
    with pytest.raises(CheckpointError, match=words) as error:
        sample.load(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_pickle_in_the_place_of_weights_is_not_opened(checkpoint, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run by the pickle"),)

    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / "unet" / WEIGHTS).unlink()
    torch.save(Payload(), folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError):
        sample.load(folder)
    assert not (tmp_path / "run by the pickle").exists()


@pytest.mark.parametrize("shard", [None, "weights.bin", "../weights.safetensors"])
def test_weights_are_safetensors_of_the_same_folder(checkpoint, tmp_path, monkeypatch, shard):
    """Neither a pickle under its usual name (None) nor what an index names elsewhere is opened."""
    opened = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: opened.append(args))
    run, (vae, clip, t5) = shutil.copytree(checkpoint, tmp_path / "run"), make_parts(tmp_path)
    for folder, load in (
        (run / "prior", lambda: sample.load(run)),
        (run / "unet", lambda: sample.load(run)),
        (run / "vae", lambda: Encoders.load(run, {})),
        (vae, lambda: PretrainedVAE(vae)),
        (clip / "text_encoder", lambda: PretrainedCLIP(clip)),
        (t5, lambda: PretrainedT5(t5)),
    ):
        (weights,) = folder.glob("*.safetensors")
        elsewhere = folder / (shard or weights.with_suffix(".bin").name)
        tensors = load_file(weights)
        put = save_file if elsewhere.suffix == ".safetensors" else torch.save
        put(tensors, elsewhere)
        weights.rename(folder / "other.safetensors")
        if shard:
            index = dict(metadata={}, weight_map={name: shard for name in tensors})
            (folder / f"{weights.name}.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="no safetensors file beside it" if shard else "it holds no"):
            load()
        assert not opened


def test_a_spatial_unet_is_no_model(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    shutil.rmtree(folder / "unet")
    UNet2DConditionModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        attention_head_dim=4,
    ).save_pretrained(folder / "unet")
    with pytest.raises(CheckpointError, match="UNet2DConditionModel"):
        sample.load(folder)


@pytest.mark.parametrize(
    "entries, words",
    [
        (dict(hidden_size=HUGE), "hidden_size"),
        (dict(num_hidden_layers=HUGE), "num_hidden_layers"),
        (dict(hidden_size=65536, intermediate_size=65536), "more weights than"),
        (dict(vocab_size=-3), "cannot be"),
        (
            dict(model_type="remote", auto_map=dict(AutoConfig="evil.Config", AutoModel="evil.Model")),
            "cannot be",
        ),
    ],
)
def test_text_encoders_from_elsewhere(tmp_path, entries, words):
    make_clip(tmp_path)
    folder = tmp_path / "text_encoder"
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'run by the model')!r})\n")
    change(folder / "config.json", **entries)
    with pytest.raises(EncoderError, match=words) as error:
        PretrainedCLIP(tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "run by the model").exists()


@pytest.mark.parametrize(
    "make, load, entries, words",
    [
        (make_vae, PretrainedVAE, dict(norm_num_groups=0), "cannot be loaded"),
        (make_vae, PretrainedVAE, dict(block_out_channels=[]), "cannot be loaded"),
        (make_vae, PretrainedVAE, dict(scaling_factor=None), "scaling_factor = None"),
        (make_vae, PretrainedVAE, dict(scaling_factor=0), "scaling_factor = 0"),
        (make_vae, PretrainedVAE, dict(shift_factor=float("inf")), "shift_factor = inf"),
        (
            make_vae,
            PretrainedVAE,
            dict(quantization_config=dict(quant_method="torchao")),
            "quantization_config",
        ),
        (make_t5, PretrainedT5, dict(quantization_config=dict(quant_method="awq")), "quantization_config"),
        (make_t5, PretrainedT5, dict(transformers_weights="adapter_model.bin"), "transformers_weights"),
        (make_clip, PretrainedCLIP, dict(attn_implementation="flash_attention_2"), "attn_implementation"),
        (make_clip, PretrainedCLIP, dict(_attn_implementation="kernels-community/x"), "attn_implementation"),
        (make_clip, PretrainedCLIP, dict(text_config=dict(attn_implementation="a/b")), "attn_implementation"),
        (make_clip, PretrainedCLIP, dict(num_attention_heads=0), "cannot be loaded"),
        (make_clip, PretrainedCLIP, dict(eos_token_id="x"), "cannot be loaded"),
    ],
)
def test_configs_that_upset_the_libraries(tmp_path, make, load, entries, words):
    make(tmp_path)
    change(next(tmp_path.rglob("config.json")), **entries)
    with pytest.raises(EncoderError, match=words) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_a_missing_package(tmp_path):
    make_clip(tmp_path)
    change(tmp_path / "tokenizer" / "tokenizer_config.json", tokenizer_class="MarianTokenizer")
    with pytest.raises(EncoderError, match="--clip"):
        PretrainedCLIP(tmp_path)


@pytest.mark.parametrize("harm, words", [(halve, "is missing from its weights"), (bend, "in its weights")])
def test_a_vae_without_its_weights(tmp_path, harm, words):
    make_vae(tmp_path)
    harm(tmp_path / WEIGHTS)
    with pytest.raises(EncoderError, match=words):
        PretrainedVAE(tmp_path)


def test_a_vae_of_other_pictures(tmp_path):
    make_vae(tmp_path, colours=4)
    with pytest.raises(EncoderError, match="three colours"):
        PretrainedVAE(tmp_path)


def test_a_tokenizer_runs_no_code(tmp_path):
    make_clip(tmp_path)
    (tmp_path / "tokenizer" / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'run by it')!r})\n")
    change(
        tmp_path / "tokenizer" / "tokenizer_config.json",
        auto_map=dict(AutoTokenizer=["evil.Tokenizer", None]),
        tokenizer_class="Tokenizer",
    )
    try:
        PretrainedCLIP(tmp_path)
    except EncoderError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "run by it").exists()


def test_other_parts_from_elsewhere(tmp_path):
    make_t5(tmp_path / "t5")
    change(tmp_path / "t5" / "config.json", num_layers=HUGE)
    with pytest.raises(EncoderError, match="num_layers"):
        PretrainedT5(tmp_path / "t5")
    make_vae(tmp_path / "vae")
    change(tmp_path / "vae" / "config.json", block_out_channels=[2**14] * 4)
    with pytest.raises(EncoderError, match="more weights than"):
        PretrainedVAE(tmp_path / "vae")
    save_file(dict(x=torch.zeros(3)), tmp_path / "vae" / WEIGHTS)
    change(tmp_path / "vae" / "config.json", block_out_channels=[8, 16, 16, 16])
    with pytest.raises(EncoderError):
        PretrainedVAE(tmp_path / "vae")


PROMPTS = [
    "\0",
    "\n" * 50,
    "\u202e\u0645\u0631\u062d\u0628\u0627",
    "a" * 100_000,
    "a " * 50_000,
    "\ud800 heart",
    "\U0001f431" * 1000,
    "#" * 500,
    "<start>",
    "-1e999",
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_any_prompt_has_states(prompt):
    states, mask, *_ = toy_model()[1].text([prompt, ""])
    assert states.isfinite().all() and mask.any(dim=1).all() and states.shape[1] <= 77


def test_any_prompt_reaches_real_tokenizers(tmp_path):
    make_clip(tmp_path / "clip")
    make_t5(tmp_path / "t5")
    encoders = Encoders(codec=torch.nn.Identity(), clip=tmp_path / "clip", t5=tmp_path / "t5")
    for states in encoders.text(PROMPTS):
        assert states.isfinite().all() and states.shape[1] == 77
