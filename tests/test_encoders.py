"""The built-in codec and text encoders."""

import numpy as np
import pytest
import torch

from encoders import MAX_TOKENS, Encoders, NgramVectors, PatchPCA, WordVectors


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


def psnr(a, b):
    return 10 * np.log10(255**2 / (a.float() - b.float()).square().mean().item())


def test_codec_round_trip_and_scale():
    frames, unseen = smooth_frames(100), smooth_frames(seed=1)
    quality = []
    for channels in (3, 6, 12, 24):
        codec = PatchPCA(patch_size=4, latent_channels=channels)
        codec.fit(frames)
        latents = codec.encode(unseen)
        assert latents.shape == (40, channels, 8, 8)
        assert codec.encode(frames).std() == pytest.approx(PatchPCA.STD, rel=0.1)
        decoded = codec.decode(latents)
        assert decoded.shape == unseen.shape and decoded.dtype == torch.uint8
        quality.append(psnr(decoded, unseen))
    assert quality == sorted(quality) and quality[-1] > 32


def test_codec_encodes_frame_by_frame_and_on_any_size():
    codec = PatchPCA(patch_size=4, latent_channels=8)
    codec.fit(smooth_frames())
    frames = smooth_frames(6, size=20)
    torch.testing.assert_close(codec.encode(frames)[3:4], codec.encode(frames[3:4]))


def test_codec_survives_a_constant_data_set():
    codec = PatchPCA(patch_size=4, latent_channels=8)
    white = torch.full((4, 16, 16, 3), 255, dtype=torch.uint8)
    codec.fit(white)
    assert codec.encode(white).isfinite().all() and torch.equal(codec.decode(codec.encode(white)), white)


def test_codec_saves_and_loads(tmp_path):
    codec = PatchPCA(patch_size=4, latent_channels=8)
    codec.fit(smooth_frames())
    Encoders(codec).save(tmp_path)
    again = Encoders.load(tmp_path, {}).codec
    assert again.identity == codec.identity and again.factor == 4
    frames = smooth_frames(3)
    assert torch.equal(again.encode(frames), codec.encode(frames))
    other = PatchPCA(patch_size=4, latent_channels=8)
    other.fit(smooth_frames(seed=5))
    assert other.identity != codec.identity


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
