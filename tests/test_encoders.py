"""The VAE and the text encoders, built-in and pre-trained."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, T5ForConditionalGeneration

from support.encoders import (
    MAX_TOKENS,
    SHIPPED_VAE,
    Encoders,
    NgramVectors,
    PretrainedCLIP,
    PretrainedT5,
    PretrainedVAE,
    WordVectors,
)
from support.pretrained import EncoderError
from tests.tiny_parts import make_parts, make_vae


def smooth_frames(count=40, size=32, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    waves = [
        np.sin(6.3 * (rng.uniform(-2, 2) * x + rng.uniform(-2, 2) * y + rng.random()))
        for _ in range(3 * count)
    ]
    return torch.from_numpy(
        np.uint8(127 + 100 * np.stack(waves)).reshape(count, 3, size, size).transpose(0, 2, 3, 1).copy()
    )


@pytest.mark.parametrize("encoder", [WordVectors(), NgramVectors()], ids=["words", "ngrams"])
def test_text_states_do_not_depend_on_the_batch(encoder):
    states, mask = encoder(["a red heart", "", "one two three four five six"])
    assert states.shape == (3, 7, encoder.width) and mask.sum(dim=1).tolist() == [4, 1, 7]
    alone, alone_mask = encoder(["a red heart"])
    assert torch.equal(states[:1, :4], alone) and alone_mask.all()
    assert (states[~mask] == 0).all()
    assert encoder(["word " * 500])[0].shape[1] == MAX_TOKENS
    assert encoder(["# red"])[1].sum() == 3  # "#" is a token like any word
    assert encoder(["ein grünes Herz, красное сердце 红心"])[1].sum() == 7


def test_unrelated_words_are_orthogonal_and_stems_are_shared():
    def cosine(encoder, a, b):
        u, v = (torch.from_numpy(np.asarray(encoder.vector(word))) for word in (a, b))
        return torch.cosine_similarity(u, v, dim=0).item()

    assert abs(cosine(WordVectors(), "red", "blue")) < 0.3
    assert cosine(NgramVectors(), "bouncing", "bounces") > 0.3 > cosine(NgramVectors(), "bouncing", "green")


# ------------------------------------------------------------------------------------------------------------
# Pre-trained encoders


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    vae, clip, t5 = make_parts(tmp_path_factory.mktemp("parts"))
    return Encoders(vae=vae, clip=clip, t5=t5), (vae, clip, t5)


def test_vae_latents_are_scaled_posterior_means(pretrained):
    codec = pretrained[0].codec
    assert (codec.latent_channels, codec.factor) == (4, 8)
    frames = smooth_frames(11)  # more than go through at a time
    latents = codec.encode(frames)
    x = frames.permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = codec.vae.encode(x).latent_dist.mean * 0.7  # the scaling factor in the config
        pixels = codec.vae.decode(latents / 0.7).sample
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    decoded = codec.decode(latents)
    assert decoded.shape == frames.shape and decoded.dtype == torch.uint8
    expected = ((pixels.permute(0, 2, 3, 1) + 1) * 127.5).clamp(0, 255)
    assert (decoded.float() - expected).abs().max() < 0.6


def test_vae_identity_is_that_of_its_weights(pretrained, tmp_path):
    codec, vae = pretrained[0].codec, pretrained[1][0]
    assert PretrainedVAE(shutil.copytree(vae, tmp_path / "a")).identity == codec.identity
    make_vae(tmp_path / "other")
    assert PretrainedVAE(tmp_path / "other").identity != codec.identity
    for name, value in (("scaling_factor", 0.5), ("shift_factor", 0.1)):  # latents change with these too
        scaled = shutil.copytree(vae, tmp_path / name)
        config = json.loads((scaled / "config.json").read_text())
        (scaled / "config.json").write_text(json.dumps(config | {name: value}))
        assert PretrainedVAE(scaled).identity != codec.identity


def test_latents_of_a_frame_do_not_depend_on_what_goes_with_it(pretrained, monkeypatch):
    codec, frames = pretrained[0].codec, smooth_frames(5)
    latents, decoded = codec.encode(frames), codec.decode(codec.encode(frames))
    for pixels in (1, 2 * 32**2, 100 * 32**2):
        monkeypatch.setattr(PretrainedVAE, "PIXELS", pixels)
        torch.testing.assert_close(codec.encode(frames), latents, rtol=1e-4, atol=1e-5)
        assert (codec.decode(latents).int() - decoded.int()).abs().max() <= 1


def test_a_vae_with_the_names_of_2022(pretrained, tmp_path):
    codec, vae = pretrained[0].codec, pretrained[1][0]
    old = shutil.copytree(vae, tmp_path / "old")
    tensors = load_file(old / "diffusion_pytorch_model.safetensors")
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    for new, name in names.items():
        tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
    assert any(".proj_attn." in key for key in tensors)
    save_file(tensors, old / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    assert PretrainedVAE(old).identity == codec.identity


def test_weights_in_several_files(pretrained, tmp_path):
    encoders, (vae, clip, t5) = pretrained
    for part, folder, size in ((encoders.codec.vae, "vae", "20KB"), (encoders.t5.model, "t5", "10KB")):
        shutil.copytree(dict(vae=vae, t5=t5)[folder], tmp_path / folder)
        next((tmp_path / folder).glob("*.safetensors")).unlink()
        part.save_pretrained(tmp_path / folder, max_shard_size=size)
        assert len(list((tmp_path / folder).glob("*.safetensors"))) > 1
    assert PretrainedVAE(tmp_path / "vae").identity == encoders.codec.identity
    assert torch.equal(PretrainedT5(tmp_path / "t5")(["a red cat"])[0], encoders.t5(["a red cat"])[0])


def test_text_encoders_in_the_files_of_whole_models(pretrained, tmp_path):
    """A CLIP with its vision part, a T5 with its decoder."""
    encoders, (_, clip, t5) = pretrained
    text = encoders.clip.model.config
    whole = CLIPModel(
        CLIPConfig(
            text_config=text.to_dict(),
            projection_dim=8,
            vision_config=dict(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=32,
                patch_size=16,
            ),
        )
    )
    # a CLIPTextModel holds its parts as `text_model`, or itself
    part = {key.removeprefix("text_model."): x for key, x in encoders.clip.model.state_dict().items()}
    own = whole.text_model.state_dict()
    whole.text_model.load_state_dict({key: part[key.removeprefix("text_model.")] for key in own})
    shutil.copytree(clip / "tokenizer", tmp_path / "clip")
    whole.save_pretrained(tmp_path / "clip")
    assert torch.equal(PretrainedCLIP(tmp_path / "clip")(["a cat"])[0], encoders.clip(["a cat"])[0])

    whole = T5ForConditionalGeneration(encoders.t5.model.config)
    whole.load_state_dict(encoders.t5.model.state_dict(), strict=False)
    shutil.copytree(t5, tmp_path / "t5")
    whole.save_pretrained(tmp_path / "t5")
    assert torch.equal(PretrainedT5(tmp_path / "t5")(["a cat"])[0], encoders.t5(["a cat"])[0])


@pytest.mark.parametrize("name, width, model", [("clip", 32, "CLIPTextModel"), ("t5", 24, "T5EncoderModel")])
def test_text_states_are_those_of_the_library(pretrained, name, width, model):
    encoder = getattr(pretrained[0], name)
    assert encoder.width == width and type(encoder.model).__name__ == model
    states, mask = encoder(["a red cat", "", "red " * 500])
    assert states.shape == (3, MAX_TOKENS, width) and mask.shape == (3, MAX_TOKENS)
    assert 1 <= mask[1].sum() <= 2 and mask[0].sum() < 12 and mask[2].all()
    assert (states[~mask] == 0).all() and states.dtype == torch.float32
    tokens = encoder.tokenizer("a red cat", return_tensors="pt")  # alone, without padding
    with torch.no_grad():
        alone = encoder.model(**tokens).last_hidden_state[0]
    torch.testing.assert_close(states[0][mask[0]], alone, rtol=1e-4, atol=1e-5)
    with_hash, _ = encoder(["a # cat"])
    assert not torch.allclose(with_hash[0], states[0])


def test_half_precision_text(pretrained):
    _, (vae, clip, t5) = pretrained
    half = Encoders(vae=vae, clip=clip, t5=t5, dtype=torch.bfloat16)
    for a, b in zip(half.text(["a red cat"]), pretrained[0].text(["a red cat"])):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)
    assert half.t5.model.dtype == torch.bfloat16 and half.codec.vae.dtype == torch.float32


def test_text_encoders_never_run_under_autocast(pretrained):
    encoders, _ = pretrained
    with torch.autocast("cpu", torch.bfloat16):
        inside = encoders.text(["a red cat"])
    assert all(a.equal(b) for a, b in zip(inside, encoders.text(["a red cat"])))


def test_what_cannot_be_loaded_gets_one_sentence(pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _, (vae, clip, t5) = pretrained
    broken = shutil.copytree(vae, tmp_path / "broken")
    weights = broken / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (tmp_path / "empty").mkdir()
    partial = shutil.copytree(t5, tmp_path / "partial")
    tensors = load_file(partial / "model.safetensors")
    tensors.pop("encoder.final_layer_norm.weight")
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    for part, source, word in (
        (PretrainedVAE, broken, "--vae"),
        (PretrainedVAE, t5, "--vae"),
        (PretrainedVAE, tmp_path / "empty", "config.json"),
        (PretrainedCLIP, t5, "it is a t5 model"),
        (PretrainedT5, partial, "final_layer_norm"),
        (PretrainedT5, "nobody/has-this", "hf download nobody/has-this"),
    ):
        with pytest.raises(EncoderError, match=word) as error:
            part(source)
        assert str(source) in str(error.value) and "\n" not in str(error.value)


def test_another_vae_is_refused(pretrained, tmp_path):
    encoders, (_, clip, _) = pretrained
    sources = encoders.sources()
    assert sources["vae"] and sources["clip"] == str(clip)
    again = Encoders.load(tmp_path, sources)
    assert again.codec.identity == encoders.codec.identity
    make_vae(tmp_path / "other")
    with pytest.raises(EncoderError, match="another VAE"):
        Encoders.load(tmp_path, dict(sources, vae=str(tmp_path / "other")))


def test_without_a_source_a_model_carries_the_vae_that_ships(tmp_path, monkeypatch):
    encoders = Encoders()
    sources = encoders.sources()
    assert sources["vae"] is None and (encoders.codec.latent_channels, encoders.codec.factor) == (16, 8)
    encoders.save(tmp_path / "run")
    assert str(SHIPPED_VAE.parent) not in (tmp_path / "run" / "vae" / "config.json").read_text()
    copy, shipped = (
        folder / "diffusion_pytorch_model.safetensors" for folder in (tmp_path / "run" / "vae", SHIPPED_VAE)
    )
    assert copy.stat().st_size == shipped.stat().st_size
    assert (
        AutoencoderKL.from_pretrained(tmp_path / "run" / "vae").config.scaling_factor == encoders.codec.scale
    )

    make_vae(tmp_path / "newer")  # a later version of the project ships another
    monkeypatch.setattr("support.encoders.SHIPPED_VAE", tmp_path / "newer")
    again = Encoders.load(tmp_path / "run", sources)
    assert again.sources() == sources
    shutil.rmtree(tmp_path / "run")  # as a checkpoint goes that a run was resumed from
    again.save(tmp_path / "saved again")
    assert Encoders.load(tmp_path / "saved again", sources).sources() == sources
    with pytest.raises(EncoderError, match="newer is another VAE than the model was trained with"):
        Encoders.load(tmp_path, sources)


def test_a_named_vae_comes_first_and_is_not_copied(pretrained, tmp_path):
    vae = str(pretrained[1][0])
    Encoders().save(tmp_path / "run")
    named = Encoders.load(tmp_path / "run", dict(vae=vae))
    assert named.sources()["vae"] == vae and named.codec.identity == pretrained[0].codec.identity
    named.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_copy_loses_nothing(pretrained, tmp_path):
    codec = PretrainedVAE(copy=pretrained[1][0])  # its weights are no halves
    codec.save(tmp_path)
    assert codec.source is None and PretrainedVAE(copy=tmp_path).identity == codec.identity


def test_a_model_of_the_version_without_a_vae_is_refused(tmp_path):
    with pytest.raises(EncoderError, match="older version.*train anew"):
        Encoders.load(tmp_path, dict(vae=None, codec_identity="PatchPCA-0123456789abcdef"))
