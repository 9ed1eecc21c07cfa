"""The preconditioning of tiny and small: the Gaussian against the textbook's conditioning, written densely;
its wrapper, called as DFGN is."""

import math
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

import sample
import train
from data import Batch
from masks import LENGTHS, NUM_FRAMES
from model import make_scheduler
from support.encoders import Encoders, load_prior
from support.machine import World
from support.prior import (
    LATENT_ERROR,
    MAX_LATENT_WEIGHT,
    SAMPLING_ERROR,
    WAVES,
    GaussianPrior,
    Preconditioned,
    balanced_weights,
    first_latents,
    for_sampling,
    loss_weights,
    nearest_given,
    precondition,
)
from tests.toys import (
    SMALLER,
    WIDTH,
    FakeCodec,
    as_text,
    first_frames,
    fit_to_noise,
    given_frames,
    toy_inputs,
    toy_unet,
)

C, SIDE, TEXT = 2, 3, 5
D, MODES = C * SIDE**2, 12
ALPHA = make_scheduler().alphas_cumprod


@pytest.fixture(autouse=True)
def few_modes(monkeypatch):
    monkeypatch.setattr("support.prior.MODES", MODES)


def random_prior(seed=0):
    g, modes = torch.Generator().manual_seed(seed), MODES
    prior = GaussianPrior(C, SIDE, TEXT)
    prior.mean.copy_(torch.randn(D, generator=g))
    prior.no_text.copy_(torch.randn(TEXT, generator=g))
    prior.shift.copy_(torch.randn(WAVES, TEXT, modes, generator=g))
    prior.modes.copy_(torch.linalg.qr(torch.randn(D, modes, generator=g))[0].T)
    prior.variance.copy_(torch.rand(2, modes + 1, generator=g) + 0.1)
    for i, k in enumerate(2 * LENGTHS):
        for band in range(prior.frames.shape[1]):
            a = torch.randn(k, 2 * k, generator=g)
            prior.frames[i, band, :k, :k] = a @ a.T * (k / (a @ a.T).trace())
    return prior


def dense_mean(prior, words, k):
    """Of the frames of clips whose captions have the features (B, TEXT): (B, k, D)"""
    shift = torch.zeros(len(words), k, MODES)
    for frame in range(k):
        for wave in range(WAVES):
            shift[:, frame] += math.cos(math.pi * wave * frame / (k - 1)) * words @ prior.shift[wave]
    return prior.mean + shift @ prior.modes


def dense_covariance(prior, k, has_text):
    """Of the k frames of a clip: (k, D, k, D)"""
    rest, variances = torch.eye(D) - prior.modes.T @ prior.modes, prior.variance[has_text]
    correlations = prior.frames[has_text * len(LENGTHS) + k - LENGTHS[0], :, :k, :k]
    total = torch.einsum("ij,ab->iajb", correlations[-1], variances[-1] * rest)
    for mode, variance, band in zip(prior.modes, variances, prior.band):
        frames = correlations[band]
        total += torch.einsum("ij,a,b->iajb", frames, mode, mode * variance)
    return total


# ------------------------------------------------------------------------------------------------------------
# The Gaussian


@pytest.mark.parametrize("slots", [(), (0,), (0, 3), (1, 2, 4), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("t, has_text", [(5, 1), (400, 0), (400, 1)])
def test_it_is_the_mean_and_the_variance_under_the_gaussian(slots, t, has_text):
    k, prior, alpha = 5, random_prior(), ALPHA[t]
    x, noise = torch.randn(1, NUM_FRAMES, C, SIDE, SIDE), torch.randn(1, NUM_FRAMES, C, SIDE, SIDE)
    given = given_frames(*slots, batch=1)
    noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
    words = has_text * torch.randn(1, TEXT)
    text = as_text(prior.no_text + words)
    estimate, error = prior(noisy, x, given, alpha[None], text, first_frames(k, batch=1))

    mean = dense_mean(prior, words, k)[0]
    sigma = dense_covariance(prior, k, has_text).reshape(k * D, k * D).double()
    seen = torch.where(given[..., None, None, None], x, noisy / alpha.sqrt())[0, :k].flatten(1)
    of_noise = torch.where(given[0, :k], 0.0, (1 - alpha) / alpha).repeat_interleave(D).double()
    gain = sigma @ torch.linalg.inv(sigma + torch.diag(of_noise))
    expected = mean + (gain @ (seen - mean).flatten().double()).unflatten(0, (k, D))
    variance = (sigma - gain @ sigma).diagonal().unflatten(0, (k, D)).mean(dim=1).clamp(min=0)
    torch.testing.assert_close(estimate[0, :k].flatten(1), expected.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(error[0, :k], variance.float().sqrt(), rtol=1e-3, atol=2e-3)
    assert torch.equal(estimate[given], x[given])


@pytest.mark.parametrize("slots", [(), (0, 3)])
@pytest.mark.parametrize("has_text", [0, 1])
def test_what_it_draws_is_of_the_gaussian(slots, has_text):
    """Mean and covariance of many draws, under a caption and given frames."""
    k, count, prior = 4, 5000, random_prior()
    given = given_frames(*slots, count=k, batch=count)
    x, words = torch.randn(k, D), has_text * torch.randn(1, TEXT)
    latents = x.unflatten(1, (C, SIDE, SIDE)).expand(count, -1, -1, -1, -1)
    text = as_text((prior.no_text + words).expand(count, -1))
    drawn = prior.draw(torch.randn(latents.shape), latents, given, text)
    assert torch.equal(drawn[given], latents[given])

    mean = dense_mean(prior, words, k)[0].flatten()
    sigma = dense_covariance(prior, k, has_text).reshape(k * D, k * D)
    g = given[0].repeat_interleave(D)
    follow = sigma[~g][:, g] @ torch.linalg.inv(sigma[g][:, g])
    expected = mean[~g] + follow @ (x.flatten() - mean)[g]
    left = sigma[~g][:, ~g] - follow @ sigma[g][:, ~g]
    drawn = drawn.flatten(1)[:, ~g]
    torch.testing.assert_close(drawn.mean(dim=0), expected, rtol=0, atol=0.1)
    torch.testing.assert_close(drawn.T.cov(), left, rtol=0.1, atol=0.1)


def test_a_given_frame_of_zeros_is_known_as_given():
    """Zero is a latent like any other: what is given is what the mask says."""
    prior, given = random_prior(), given_frames(1, batch=1, count=4)
    latents, noisy = torch.zeros(1, 4, C, SIDE, SIDE), torch.randn(1, 4, C, SIDE, SIDE)
    text = as_text(prior.no_text[None])
    estimate, error = prior(noisy, latents, given, ALPHA[None, 800], text)
    assert (estimate[:, 1] == 0).all() and (error[:, 1] < 1e-3).all() and (error[:, [0, 2, 3]] > 0.1).all()
    assert (prior.draw(noisy, latents, given, text)[:, 1] == 0).all()
    unknown, _ = prior(noisy, latents, torch.zeros_like(given), ALPHA[None, 800], text)
    assert not torch.allclose(unknown, estimate, atol=0.1)


def test_latents_that_are_not_given_change_nothing():
    prior, given, alpha = random_prior(), given_frames(0, 2, count=4), ALPHA[[30, 900]]
    noisy, latents = torch.randn(2, 2, 4, C, SIDE, SIDE)
    text, none = as_text(torch.randn(2, TEXT)), torch.full_like(latents, float("nan"))
    masked = torch.where(given[..., None, None, None], latents, none)
    for a, b in zip(prior(noisy, latents, given, alpha, text), prior(noisy, masked, given, alpha, text)):
        assert torch.equal(a, b) and a.isfinite().all()
    assert torch.equal(prior.draw(noisy, latents, given, text), prior.draw(noisy, masked, given, text))


def test_filler_does_not_matter():
    prior, alpha = random_prior(), ALPHA[[30, 900]]
    valid = torch.arange(NUM_FRAMES) < torch.tensor([[3], [6]])
    noisy, latents = torch.randn(2, 2, NUM_FRAMES, C, SIDE, SIDE)
    given, text = given_frames(0, 7), as_text(torch.randn(2, TEXT))
    outputs = []
    for filler in (7.0, float("nan")):
        x, z = (torch.where(valid[..., None, None, None], t, filler) for t in (noisy, latents))
        estimate, error = prior(x, z, given, alpha, text, valid)
        outputs.append((estimate[valid], error[valid]))
    for a, b in zip(*outputs):
        assert torch.equal(a, b) and a.isfinite().all()
    one = slice(0, 1)
    alone = prior(noisy[one, :3], latents[one, :3], given[one, :3], alpha[one], [x[one] for x in text])
    torch.testing.assert_close(outputs[0][0][:3], alone[0][0])
    torch.testing.assert_close(outputs[0][1][:3], alone[1][0])


@pytest.mark.parametrize("has_text", [0, 1])
def test_it_recovers_the_gaussian_that_it_is_fitted_to(has_text):
    """And what it says of its own error holds for new clips."""
    truth, g = random_prior(), torch.Generator().manual_seed(1)
    truth.variance[0] = truth.variance[1]  # without text the clips below vary more than the truth says
    truth.frames[: len(LENGTHS)] = truth.frames[len(LENGTHS) :]

    def draw(n, k):
        root = torch.linalg.cholesky(dense_covariance(truth, k, 1).reshape(k * D, k * D))
        x = (torch.randn(n, k * D, generator=g) @ root.T).unflatten(1, (k, D))
        words = has_text * torch.randn(n, TEXT, generator=g)
        x = x + dense_mean(truth, words, k)
        return x.unflatten(2, (C, SIDE, SIDE)), as_text(truth.no_text + words)

    fitted = GaussianPrior(C, SIDE, TEXT)
    drawn = {k: draw(4000, k) for k in LENGTHS}
    fitted.fit(*({k: both[i] for k, both in drawn.items()} for i in (0, 1)), as_text(truth.no_text[None]))
    (x, text), alpha = draw(500, 6), ALPHA[300].expand(500)
    noisy = alpha[0].sqrt() * x + (1 - alpha[0]).sqrt() * torch.randn(x.shape, generator=g)
    given = given_frames(2, count=6, batch=500)
    errors = {}
    for name, prior in (("truth", truth), ("fitted", fitted)):
        estimate, said = prior(noisy, x, given, alpha, text)
        errors[name] = (estimate - x).square().flatten(2).mean(dim=(0, 2)).sqrt()
        torch.testing.assert_close(said.mean(dim=0), errors[name], rtol=0.1, atol=1e-3)
    # modes that are independent over all clips are not quite so within one caption
    torch.testing.assert_close(errors["fitted"], errors["truth"], rtol=0.2 if has_text else 0.1, atol=1e-3)


@pytest.mark.parametrize("clips", [1, 2, 5])
def test_few_clips_are_enough_for_a_start(clips):
    prior = fit_to_noise(GaussianPrior(C, SIDE, TEXT), clips)
    x, none = torch.randn(1, 8, C, SIDE, SIDE), given_frames(batch=1)
    for text in (prior.no_text[None], torch.randn(1, TEXT)):
        estimate, error = prior(x, torch.zeros_like(x), none, torch.tensor([0.5]), as_text(text))
        assert estimate.isfinite().all() and error.isfinite().all() and (error > 0).all()


def test_it_is_saved_and_loaded_bit_for_bit(tmp_path):
    prior = fit_to_noise(GaussianPrior(C, SIDE, TEXT), 9)
    Encoders(prior=prior).save(tmp_path)
    assert {folder.name for folder in tmp_path.iterdir()} == {"vae", "prior"}
    x, alpha, text = torch.randn(1, 5, C, SIDE, SIDE), ALPHA[None, 500], as_text(torch.randn(1, TEXT))
    given = given_frames(0, count=5, batch=1)
    for again in (load_prior(tmp_path / "prior"), Encoders.load(tmp_path, {}).prior):
        saved, loaded = dict(prior.named_buffers()), dict(again.named_buffers())
        assert saved.keys() == loaded.keys() and again.lengths == prior.lengths
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)
        for a, b in zip(prior(x, x, given, alpha, text), again(x, x, given, alpha, text)):
            assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------
# The wrapper


def preconditioned(side=6, fresh=False, **changes):
    """Around a toy network. fresh: its last layer gives zeros, as at step 0"""
    unet = toy_unet(condition_channels=8, **(SMALLER | changes))
    if fresh:
        unet.initialize()
    prior = GaussianPrior(4, side, unet.config.clip_dim)
    return Preconditioned(unet, fit_to_noise(prior, 40, 0.5), ALPHA)


def wrapper_inputs(denoiser):
    noisy, latents, *rest = toy_inputs(denoiser.unet)
    return noisy, latents[:, :, :4], *rest


@torch.no_grad()
@pytest.mark.parametrize("sampling", [False, True])
def test_the_network_mixes_it_with_its_own_estimate(sampling):
    """A fresh network's last layer gives zeros: what is left is the prior, less of it where its error is
    larger, and less while sampling."""
    denoiser = preconditioned(fresh=True)
    if sampling:
        denoiser = for_sampling(denoiser)
    noisy, latents, given, timestep, text = wrapper_inputs(denoiser)
    valid, alpha, prior = first_frames(5), ALPHA[timestep], denoiser.prior
    noise = denoiser(noisy, latents, given, timestep, text, valid)
    estimate, error = prior(noisy, latents, given, alpha, text, valid)
    latent_error = SAMPLING_ERROR if sampling else LATENT_ERROR
    share = error**2 / (error**2 + latent_error * prior.std**2)  # of the network
    mixed = (1 - share)[..., None, None, None] * estimate
    alpha = alpha[:, None, None, None, None]
    expected = (noisy - alpha.sqrt() * mixed) / (1 - alpha).sqrt()
    torch.testing.assert_close(noise[:, :5], expected[:, :5], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mixed[given], latents[given])  # exact where it is given
    assert (noise[:, 5:] == 0).all()


@torch.no_grad()
def test_the_wrapper_knows_given_frames_by_their_mask_alone():
    denoiser = preconditioned()
    noisy, latents, given, *rest = wrapper_inputs(denoiser)
    out = denoiser(noisy, latents, given, *rest)
    masked = torch.where(given[..., None, None, None], latents, float("nan"))
    assert torch.equal(denoiser(noisy, masked, given, *rest), out) and out.isfinite().all()
    zeros, none = torch.zeros_like(latents), torch.zeros_like(given)
    known, unknown = denoiser(noisy, zeros, given, *rest), denoiser(noisy, zeros, none, *rest)
    assert not torch.allclose(known, unknown, atol=1e-2)  # a latent of zeros is one to be given


@torch.no_grad()
def test_each_frame_is_shown_the_given_one_that_is_nearest():
    latents = torch.arange(5.0).expand(3, 5)[:, :, None, None, None].clone()
    given = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    latents[~given] = float("nan")
    shown = nearest_given(latents, given).flatten(1)
    assert shown.tolist() == [[1, 1, 1, 4, 4], [0, 0, 2, 2, 2], [0, 0, 0, 0, 0]]


@torch.no_grad()
def test_filler_does_not_matter_to_the_wrapper():
    denoiser, valid = preconditioned(), first_frames(5)
    noisy, latents, given, *rest = wrapper_inputs(denoiser)
    out = denoiser(noisy, latents, given, *rest, valid)
    noisy, latents = (torch.where(valid[..., None, None, None], x, 50.0) for x in (noisy, latents))
    assert torch.equal(denoiser(noisy, latents, given, *rest, valid), out)


def test_gradients_reach_the_network_through_the_wrapper():
    denoiser = preconditioned()
    denoiser(*wrapper_inputs(denoiser)).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in denoiser.parameters())
    assert any(weight.grad.any() for weight in denoiser.unet.parameters())
    assert not list(denoiser.prior.parameters())


def test_without_a_prior_there_is_no_wrapper():
    unet = toy_unet(**SMALLER)
    assert precondition(unet, None, ALPHA) is unet is for_sampling(unet)
    assert torch.equal(loss_weights(unet, ALPHA), torch.ones(1000))
    noise = torch.randn(1, 3, 4, 2, 2)
    assert first_latents(unet, make_scheduler(), noise, None, None, None, None) is noise


def test_loss_weights_are_those_of_the_clean_latents():
    sigma = 0.5
    error = torch.randn(1000)  # of the clean latents, and what it makes of the noise
    of_noise = error * ALPHA.sqrt() / (1 - ALPHA).sqrt()
    expected = (ALPHA * sigma**2 / (1 - ALPHA) + 1).clamp(max=MAX_LATENT_WEIGHT) * (error / sigma).square()
    torch.testing.assert_close(balanced_weights(sigma, ALPHA) * of_noise.square(), expected)
    denoiser = preconditioned()
    assert torch.equal(loss_weights(denoiser, ALPHA), balanced_weights(float(denoiser.prior.std), ALPHA))


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "preconditioned"])
def test_both_go_through_sampling_and_training_by_the_same_calls(bare):
    text = dict(clip_dim=WIDTH, t5_dim=WIDTH)
    denoiser = toy_unet(**(SMALLER | text)) if bare else preconditioned(side=2, **text)
    encoders = Encoders(codec=FakeCodec(4, 4), prior=None if bare else denoiser.prior)

    latents, noise = torch.randn(2, 2, NUM_FRAMES, 4, 2, 2)
    given, captions = given_frames(0), ["a red heart", ""]
    clips = sample.generate(denoiser, encoders, captions, latents, given, num_inference_steps=2)
    assert clips.shape == (2, NUM_FRAMES, 8, 8, 3)

    masks = dict(given=given, valid=first_frames(5), captions=captions)
    batch = Batch(latents, noise, torch.tensor([10, 900]), **masks, tasks=None, lengths=None)
    args, weights = SimpleNamespace(mixed_precision="no"), loss_weights(denoiser, ALPHA)
    run = SimpleNamespace(args=args, world=World(), scheduler=make_scheduler(), encoders=encoders)
    run.loss_weight = weights
    loss, unknown = train.noise_loss(run, denoiser, batch)
    assert loss.requires_grad and not unknown.requires_grad
    for of_frames in (loss, unknown):
        assert of_frames.shape == (2,) and of_frames.isfinite().all() and (of_frames > 0).all()

    noisy = make_scheduler().add_noise(latents, noise, batch.timesteps)
    out = denoiser(noisy, latents, given, batch.timesteps, encoders.text(captions), batch.valid)
    error = (out - noise)[:, :5].square().mean(dim=(2, 3, 4))  # (B, 5)
    torch.testing.assert_close(loss, weights[batch.timesteps] * error.mean(dim=1))
    torch.testing.assert_close(unknown, error[:, 1:].mean(dim=1))  # without the given frame, and unweighted


# On a GPU


def test_no_number_on_the_device_is_waited_for():
    """On the meta device nothing has a value: whatever asked for one, and on a GPU would wait for it, fails.
    Masks lie in the CPU's memory."""
    unet, prior = toy_unet(condition_channels=8, **SMALLER), GaussianPrior(4, 6, text_dim=10)
    noisy, latents, given, timestep, text = (
        tuple(x.to("meta") for x in part) if isinstance(part, tuple) else part.to("meta")
        for part in toy_inputs(unet)
    )
    valid, given = first_frames(5), given_frames(0, 2)
    denoiser = Preconditioned(unet.to("meta"), prior.to("meta"), ALPHA.to("meta"))
    denoiser.alphas_cumprod = ALPHA.to("meta")
    out = denoiser(noisy, latents[:, :, :4], given, timestep, text, valid)
    assert out.shape == noisy.shape and out.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        unet(noisy, latents.repeat(1, 1, 2, 1, 1), given, timestep, text, valid.to("meta"))


def test_what_depends_on_masks_alone_is_computed_once():
    torch.manual_seed(0)
    prior = fit_to_noise(GaussianPrior(4, 3, text_dim=10), 16)
    x, given, text = torch.randn(2, 8, 4, 3, 3), given_frames(0, 2), as_text(torch.randn(2, 10))
    with patch("torch.linalg.eigh", side_effect=torch.linalg.eigh) as eigh:
        first, _ = prior(x, x, given, torch.tensor([0.5, 0.5]), text)
        for alpha in (0.4, 0.3):
            prior(x, x, given, torch.tensor([alpha, alpha]), text)
        assert eigh.call_count == 1
        fit_to_noise(prior, 16)
        assert not first.equal(prior(x, x, given, torch.tensor([0.5, 0.5]), text)[0])
        assert eigh.call_count == 2
