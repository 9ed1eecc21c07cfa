"""The Gaussian that tiny and small start from: against the textbook's conditioning, written densely."""

import math

import pytest
import torch

from masks import LENGTHS, NUM_FRAMES
from model import DFGN, make_scheduler
from support.prior import WAVES, GaussianPrior
from tests.test_model import TINY, random_inputs

C, SIDE, TEXT = 2, 3, 5
D, MODES = C * SIDE**2, 12


@pytest.fixture(autouse=True)
def few_modes(monkeypatch):
    monkeypatch.setattr("prior.MODES", MODES)


def captions(states):
    """Features (B, TEXT) as the states of a token each"""
    return states[:, None], torch.ones(len(states), 1, dtype=torch.bool)


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


@pytest.mark.parametrize("given", [(), (0,), (0, 3), (1, 2, 4), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("t, has_text", [(5, 1), (400, 0), (400, 1)])
def test_it_is_the_mean_and_the_variance_under_the_gaussian(given, t, has_text):
    k, prior, alpha = 5, random_prior(), make_scheduler().alphas_cumprod[t]
    x, noise = torch.randn(1, NUM_FRAMES, C, SIDE, SIDE), torch.randn(1, NUM_FRAMES, C, SIDE, SIDE)
    is_given = torch.zeros(1, NUM_FRAMES, dtype=torch.bool)
    is_given[0, list(given)] = True
    valid = torch.arange(NUM_FRAMES)[None] < k
    noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
    words = has_text * torch.randn(1, TEXT)
    text = captions(prior.no_text + words)
    estimate, error = prior(noisy, x * is_given[..., None, None, None], alpha[None], text, valid)

    mean = dense_mean(prior, words, k)[0]
    sigma = dense_covariance(prior, k, has_text).reshape(k * D, k * D).double()
    seen = torch.where(is_given[..., None, None, None], x, noisy / alpha.sqrt())[0, :k].flatten(1)
    of_noise = torch.where(is_given[0, :k], 0.0, (1 - alpha) / alpha).repeat_interleave(D).double()
    gain = sigma @ torch.linalg.inv(sigma + torch.diag(of_noise))
    expected = mean + (gain @ (seen - mean).flatten().double()).unflatten(0, (k, D))
    variance = (sigma - gain @ sigma).diagonal().unflatten(0, (k, D)).mean(dim=1).clamp(min=0)
    torch.testing.assert_close(estimate[0, :k].flatten(1), expected.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(error[0, :k], variance.float().sqrt(), rtol=1e-3, atol=2e-3)
    assert torch.equal(estimate[is_given], x[is_given])


@pytest.mark.parametrize("given", [(), (0, 3)])
@pytest.mark.parametrize("has_text", [0, 1])
def test_what_it_draws_is_of_the_gaussian(given, has_text):
    """Mean and covariance of many draws, under a caption and given frames."""
    k, count, prior = 4, 5000, random_prior()
    is_given = torch.zeros(k, dtype=torch.bool)
    is_given[list(given)] = True
    x, words = torch.randn(k, D), has_text * torch.randn(1, TEXT)
    shown = (x * is_given[:, None]).unflatten(1, (C, SIDE, SIDE)).expand(count, -1, -1, -1, -1)
    text = captions((prior.no_text + words).expand(count, -1))
    drawn = prior.draw(torch.randn(shown.shape), shown, text)
    assert torch.equal(drawn[:, is_given], shown[:, is_given])

    mean = dense_mean(prior, words, k)[0].flatten()
    sigma = dense_covariance(prior, k, has_text).reshape(k * D, k * D)
    g = is_given.repeat_interleave(D)
    follow = sigma[~g][:, g] @ torch.linalg.inv(sigma[g][:, g])
    expected = mean[~g] + follow @ (x.flatten() - mean)[g]
    left = sigma[~g][:, ~g] - follow @ sigma[g][:, ~g]
    drawn = drawn.flatten(1)[:, ~g]
    torch.testing.assert_close(drawn.mean(dim=0), expected, rtol=0, atol=0.1)
    torch.testing.assert_close(drawn.T.cov(), left, rtol=0.1, atol=0.1)


def test_filler_does_not_matter():
    prior, alpha = random_prior(), make_scheduler().alphas_cumprod[[30, 900]]
    valid = torch.arange(NUM_FRAMES) < torch.tensor([3, 6])[:, None]
    noisy, given = torch.randn(2, 2, NUM_FRAMES, C, SIDE, SIDE)
    given[:, 1:] = 0
    text = captions(torch.randn(2, TEXT))
    outputs = []
    for filler in (7.0, float("nan")):
        x, z = (torch.where(valid[..., None, None, None], t, filler) for t in (noisy, given))
        estimate, error = prior(x, z, alpha, text, valid)
        outputs.append((estimate[valid], error[valid]))
    for a, b in zip(*outputs):
        assert torch.equal(a, b) and a.isfinite().all()
    alone = prior(noisy[:1, :3], given[:1, :3], alpha[:1], [x[:1] for x in text])
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
        return x.unflatten(2, (C, SIDE, SIDE)), captions(truth.no_text + words)

    fitted = GaussianPrior(C, SIDE, TEXT)
    drawn = {k: draw(2000, k) for k in LENGTHS}
    fitted.fit(*({k: both[i] for k, both in drawn.items()} for i in (0, 1)), captions(truth.no_text[None]))
    (x, text), alpha = draw(500, 6), make_scheduler().alphas_cumprod[300].expand(500)
    noisy = alpha[0].sqrt() * x + (1 - alpha[0]).sqrt() * torch.randn(x.shape, generator=g)
    given = x * (torch.arange(6) == 2)[:, None, None, None]
    errors = {}
    for name, prior in (("truth", truth), ("fitted", fitted)):
        estimate, said = prior(noisy, given, alpha, text)
        errors[name] = (estimate - x).square().flatten(2).mean(dim=(0, 2)).sqrt()
        torch.testing.assert_close(said.mean(dim=0), errors[name], rtol=0.1, atol=1e-3)
    # modes that are independent over all clips are not quite so within one caption
    torch.testing.assert_close(errors["fitted"], errors["truth"], rtol=0.2 if has_text else 0.1, atol=1e-3)


def fit_to_noise(prior, clips, shape, width, scale=1.0):
    latents = {k: scale * torch.randn(clips if k < 5 else clips // 2, k, *shape) for k in LENGTHS}
    texts = {k: captions(torch.randn(len(x), width)) for k, x in latents.items()}
    prior.fit(latents, texts, captions(torch.randn(1, width)))


@pytest.mark.parametrize("clips", [1, 2, 5])
def test_few_clips_are_enough_for_a_start(clips):
    prior = GaussianPrior(C, SIDE, TEXT)
    fit_to_noise(prior, clips, (C, SIDE, SIDE), TEXT)
    x = torch.randn(1, 8, C, SIDE, SIDE)
    for text in (prior.no_text[None], torch.randn(1, TEXT)):
        estimate, error = prior(x, torch.zeros_like(x), torch.tensor([0.5]), captions(text))
        assert estimate.isfinite().all() and error.isfinite().all() and (error > 0).all()


def test_the_network_mixes_it_with_its_own_estimate():
    """A fresh network's last layer gives zeros: what is left is the prior, the less the larger its error is."""
    unet = DFGN(**TINY, prior_side=6)
    fit_to_noise(unet.prior, 40, (4, 6, 6), 10, 0.5)
    noisy, clean, timestep, text = random_inputs()
    given = clean * (torch.arange(NUM_FRAMES) < 3)[:, None, None, None]
    valid = (torch.arange(NUM_FRAMES) < 5).expand(2, -1)
    alpha = make_scheduler().alphas_cumprod[timestep]
    with torch.no_grad():
        noise = unet(noisy, given, timestep, text, valid)
        estimate, error = unet.prior(noisy, given, alpha, text, valid)
    share = error**2 / (error**2 + 0.3 * unet.prior.std**2)  # of the network
    mixed = (1 - share)[..., None, None, None] * estimate
    alpha = alpha[:, None, None, None, None]
    expected = (noisy - alpha.sqrt() * mixed) / (1 - alpha).sqrt()
    torch.testing.assert_close(noise[:, :5], expected[:, :5], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mixed[:, :3], given[:, :3])  # exact where it is given
    assert (noise[:, 5:] == 0).all()


def test_it_is_saved_with_the_network(tmp_path):
    unet = DFGN(**TINY, prior_side=6)
    fit_to_noise(unet.prior, 9, (4, 6, 6), 10)
    unet.save_pretrained(tmp_path)
    again = DFGN.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    inputs = random_inputs(slots=3)
    with torch.no_grad():
        assert torch.equal(unet(*inputs), again(*inputs))
