"""The peers: identity start, counts, what learns, given frames, the formulas, schedules, folders."""

import copy
import json
import shutil
from functools import cache, partial
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, I2VGenXLUNet, UNet3DConditionModel

import train
from lab import bench, bench_step
from lab.peers import (
    CHOICES,
    FPS,
    LAPTOP,
    FirstFrame,
    FrameConv3d,
    Peer,
    build_peer,
    load_base,
    make_base,
    matched_timesteps,
    positions,
)
from masks import LENGTHS, NUM_FRAMES
from model import SIZES, make_scheduler
from support import checkpoint
from support.common import UserError
from support.finished import read_unet
from support.machine import precision, prepare
from support.prior import GaussianPrior, Preconditioned, precondition
from tests.toys import first_frames, fit_to_noise, given_frames, toy_inputs, trainable

METHODS = CHOICES["name"][1:]
TINY = LAPTOP | dict(
    block_out_channels=(16, 32), attention_head_dim=8, cross_attention_dim=16, norm_num_groups=4
)
ALPHAS = make_scheduler().alphas_cumprod


def fill(module, std=0.1):
    """Random numbers in the place of zeros: without them much of a fresh network would not be tested."""
    for weight in module.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=std)
    return module


@cache
def one_base(channels):
    torch.manual_seed(0)
    return fill(make_base(*channels, **TINY))


def tiny_base(channels=(4, None)):
    return copy.deepcopy(one_base(channels))  # in a third of the time


def tiny_peer(name, channels=(4, None), filled=True, **settings):
    peer = build_peer(name, tiny_base(channels), **settings).eval()
    if filled:
        fill(peer.adapters)
    return peer


shared_peer = cache(tiny_peer)  # for tests that do not change it


def alike(x, y):
    """Equal but for rounding, which depends on where in memory weights lie."""
    return torch.allclose(x, y, atol=1e-5)


def noise_in(noisy, latents, timestep):
    a = ALPHAS[timestep][:, None, None, None, None]
    return (noisy - a.sqrt() * latents) / (1 - a).sqrt()


# ------------------------------------------------------------------------------------------------------------
# Step 0, and what learns


@torch.no_grad()
def test_the_base_computes_what_diffusers_computes():
    """Its convolutions over frames are computed otherwise, its keys are the same; in row G1 a Peer gives it
    what I2VGen-XL's pipeline does."""
    torch.manual_seed(0)
    theirs = fill(I2VGenXLUNet(in_channels=4, out_channels=4, **TINY)).eval()
    ours = make_base(**TINY)
    ours.load_state_dict(theirs.state_dict())
    assert sum(isinstance(module, FrameConv3d) for module in ours.modules()) == 32
    peer = build_peer("base", ours.eval())
    noisy, latents, _, timestep, text = toy_inputs(peer)
    first = given_frames(0)
    out = peer(noisy, latents, first, timestep, text)
    image = latents.clone()
    for slot in range(1, NUM_FRAMES):
        image[:, slot] = slot / (NUM_FRAMES - 1)
    words = torch.zeros(2, 24, 16)
    words[:, : text[0].shape[1]] = text[0]
    noisy, image = noisy.transpose(1, 2), image.transpose(1, 2)
    rest = torch.full((2,), FPS), image, torch.zeros(2, 16), words
    expected = theirs(noisy, timestep, *rest).sample.transpose(1, 2)
    assert alike(out[:, 1:], expected[:, 1:])


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("channels", [(4, None), (4, 8)], ids=["bare", "with an estimate"])
def test_at_step_0_a_peer_is_its_base(name, channels):
    """I2V-Adapter takes given frames in without noise: there it is the base that is shown the same."""
    base, peer = shared_peer("base", channels), tiny_peer(name, channels, filled=False)
    noisy, latents, given, *rest = toy_inputs(peer)
    none, mask = torch.zeros_like(given), given[:, :, None, None, None]
    assert alike(peer(noisy, latents, none, *rest), base(noisy, latents, none, *rest))
    clean = latents[:, :, :4]
    if channels[1]:  # as Preconditioned has it: equal halves where a frame is given
        latents = torch.where(mask, torch.cat([clean, clean], dim=2), latents)
    clean = torch.where(mask, clean, noisy) if name == "i2v" else noisy
    out, expected = peer(noisy, latents, given, *rest), base(clean, latents, given, *rest)
    assert alike(out[~given], expected[~given])
    fill(peer.adapters)
    changed = peer(noisy, latents, given, *rest)
    assert not torch.allclose(changed, base(noisy, latents, given, *rest), atol=1e-2)


FULL = {
    "base": ({}, 1_420_469_224),
    "cav": (dict(absorber="none"), 831_488),
    "cav with S-LoRA": ({}, 1_661_440),
    "i2v": ({}, 24_793_280),
    "simda": ({}, 24_855_680),
    "simda that learns its condition": (dict(learn_condition=True), 24_855_680 + 3_780),
}


@pytest.fixture(scope="module")
def full():
    with torch.device("meta"):
        return make_base()


@pytest.mark.parametrize("name", FULL)
def test_full_size_has_the_parameters_of_the_papers(full, name):
    """24M is what I2V-Adapter's and SimDA's papers say; the base is I2VGen-XL as diffusers builds it."""
    settings, count = FULL[name]
    with torch.device("meta"):
        peer = build_peer(name.split()[0], full, **settings)
    for module in full.modules():  # so that the next case can have it
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    assert sum(p.numel() for p in trainable(peer).values()) == count
    assert sum(p.numel() for p in peer.base.parameters()) == 1_420_469_224
    assert len(list(positions(peer.base))) == 16
    assert peer.config.clip_dim == 1024 and not list(peer.text_projection.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_adapters_learn_and_the_base_never_changes(name):
    peer = tiny_peer(name, filled=False, learn_condition=name == "simda").train()
    before = {key: weight.clone() for key, weight in peer.state_dict().items()}
    noisy, latents, given, *rest = toy_inputs(peer)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-2)
    for step in range(2):
        peer(noisy, latents, given, *rest).square().mean().backward()
        got = {key for key, weight in peer.named_parameters() if weight.grad is not None}
        assert got == set(trainable(peer))
        optimizer.step()
        optimizer.zero_grad()
    after = peer.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == set(trainable(peer))
    way_in = ("base.image_latents_proj_in.", "base.image_latents_temporal_encoder.")
    learns = ("adapters.", *(way_in if name == "simda" else ()))
    assert all(key.startswith(learns) for key in changed)


def test_nothing_is_drawn_at_random_in_training():
    peer = shared_peer("simda")
    inputs = toy_inputs(peer)
    with torch.no_grad():
        assert torch.equal(peer.train()(*inputs), peer.eval()(*inputs))


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_a_copy_does_not_lean_on_its_original(name):
    peer = shared_peer(name)
    noisy, latents, given, *rest = toy_inputs(peer, slots=3, batch=1)
    given[:] = False
    again, out = copy.deepcopy(peer), peer(noisy, latents, ~given, *rest)
    for weight in again.adapters.parameters():
        weight.zero_()
    assert alike(again(noisy, latents, given, *rest), shared_peer("base")(noisy, latents, given, *rest))
    assert torch.equal(peer(noisy, latents, ~given, *rest), out)


# ------------------------------------------------------------------------------------------------------------
# Formulas


@torch.no_grad()
def test_i2v_adapter_is_its_formula_in_row_g1():
    """Att(Q_i, K_i, V_i) W_O + Att(X_i W_Q', K_1, V_1) W_O', by hand, in every frame of every clip."""
    peer, seen = tiny_peer("i2v"), []
    _, space, _ = next(positions(peer.base))
    space.attn1.register_forward_hook(lambda attention, inputs, output: seen.append((inputs[0], output)))
    noisy, latents, _, *rest = toy_inputs(peer)
    peer(noisy, latents, given_frames(0), *rest)
    (x, out), attention = seen[0], space.attn1
    (adapter,) = [a for a in peer.adapters if attention.to_q.weight.equal(a.to_q.weight)]
    assert isinstance(adapter, FirstFrame)
    x = x.unflatten(0, (2, NUM_FRAMES))  # (B, F, HW, d)

    def attend(query, source, keys):
        projected = query(source), attention.to_k(keys), attention.to_v(keys)
        q, k, v = (y.unflatten(1, (attention.heads, -1)).transpose(0, 1) for y in projected)
        return ((q @ k.mT * q.shape[2] ** -0.5).softmax(dim=2) @ v).transpose(0, 1).flatten(1)

    for clip, result in zip(x, out.unflatten(0, (2, NUM_FRAMES))):
        for frame, y in zip(clip, result):
            own = attention.to_out[0](attend(attention.to_q, frame, frame))
            first = adapter.to_out(attend(adapter.to_q, frame, clip[0]))
            assert alike(y, own + first)


@torch.no_grad()
def test_i2v_adapter_looks_at_the_nearest_given_frame():
    peer = shared_peer("i2v")
    noisy, latents, _, *rest = toy_inputs(peer)
    given = torch.stack([given_frames(1, 5, batch=1)[0], given_frames(batch=1)[0]])
    peer(noisy, latents, given, *rest)
    assert peer.call.nearest[:NUM_FRAMES].tolist() == [1, 1, 1, 1, 5, 5, 5, 5]  # 3 is as near to both
    assert peer.call.some.flatten().tolist() == [True] * NUM_FRAMES + [False] * NUM_FRAMES
    assert torch.equal(peer.call.earliest[0], latents[0, 1]) and not peer.call.earliest[1].any()


@torch.no_grad()
@pytest.mark.parametrize("name", CHOICES["name"])
def test_given_frames_come_back_with_exactly_their_noise(name):
    peer = shared_peer(name)
    noisy, latents, given, timestep, text = toy_inputs(peer)
    hidden = torch.where(given[:, :, None, None, None], latents, float("nan"))  # is not looked at
    out = peer(noisy, hidden, given, timestep, text)
    assert torch.equal(out[given], noise_in(noisy, latents, timestep)[given])
    assert out.isfinite().all() and torch.equal(out, peer(noisy, latents, given, timestep, text))


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_under_a_prior_a_peer_knows_which_frames_are_given(name):
    """Preconditioned hands no condition mask on: the peer finds it in the condition."""
    torch.manual_seed(0)
    prior = GaussianPrior(4, 6, 16, LENGTHS)
    fit_to_noise(prior, 8)
    peer = shared_peer(name, (4, 8))
    denoiser = precondition(peer, prior, ALPHAS)
    assert isinstance(denoiser, Preconditioned)
    noisy, latents, *_, timestep, text = toy_inputs(shared_peer("base"))
    for slots in ((), (0, 3, 6), (1, 2)):
        given = given_frames(*slots)
        with patch.object(peer, "tell_hooks", wraps=peer.tell_hooks) as told:
            out = denoiser(noisy, latents, given, timestep, text)
        found = told.call_args.args[1]
        assert torch.equal(found, given)
        assert torch.allclose(out[given], noise_in(noisy, latents, timestep)[given], atol=1e-4)
        assert out.isfinite().all()


# ------------------------------------------------------------------------------------------------------------
# The other schedule


def test_timesteps_are_matched_by_signal_to_noise_ratio():
    theirs = DDIMScheduler(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True).alphas_cumprod
    steps = matched_timesteps()
    assert steps.shape == ALPHAS.shape and (steps.diff() > 0).all() and 0 < steps[0] and steps[-1] < 999
    below, above = theirs[steps.floor().long()], theirs[steps.ceil().long()]
    assert torch.allclose(torch.lerp(below, above, steps.frac()), ALPHAS, atol=1e-5)
    assert steps[[0, 250, 500, 750, 999]].round().tolist() == [11, 381, 644, 845, 955]


@torch.no_grad()
def test_velocity_becomes_noise():
    """What a perfect base of the other schedule says, as diffusers' scheduler computes it at equal
    signal-to-noise ratio, comes out as the noise that was added."""
    peer = tiny_peer("base", prediction="v")
    clean, noise, given, timestep, text = toy_inputs(peer)
    scheduler = make_scheduler()
    velocity = scheduler.get_velocity(clean, noise, timestep)
    noisy = scheduler.add_noise(clean, noise, timestep)
    with patch.object(peer.base, "forward", return_value=(velocity.transpose(1, 2),)) as called:
        out = peer(noisy, clean, given, timestep, text)
    assert torch.allclose(out, noise, atol=1e-4)
    assert torch.equal(called.call_args.args[1], matched_timesteps()[timestep])
    with pytest.raises(ValueError, match="without a prior"):
        tiny_peer("base", (4, 8), prediction="v")


# ------------------------------------------------------------------------------------------------------------
# Batches, clips, precision


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_a_sample_does_not_depend_on_its_batch(name):
    """The longest caption of a batch pads all others, and what is padded counts for nothing."""
    peer = shared_peer(name)
    noisy, latents, given, timestep, (clip, mask, *t5) = toy_inputs(peer)
    mask[0, 3:] = False
    out = peer(noisy, latents, given, timestep, (clip, mask, *t5))
    alone = (clip[:1, :3], mask[:1, :3], *(x[:1] for x in t5))
    again = peer(noisy[:1], latents[:1], given[:1], timestep[:1], alone)
    assert alike(out[:1], again)
    long = torch.randn(1, 30, 16), torch.ones(1, 30, dtype=torch.bool), *(x[:1] for x in t5)
    assert peer(noisy[:1], latents[:1], given[:1], timestep[:1], long).isfinite().all()


def test_filler_is_refused():
    peer = shared_peer("cav")
    inputs = toy_inputs(peer)
    peer(*inputs, valid=first_frames(NUM_FRAMES))
    for k in LENGTHS[:-1]:
        with pytest.raises(UserError, match="clips of 8 key frames alone"):
            peer(*inputs, valid=first_frames(k))
    short = toy_inputs(peer, slots=5)
    with pytest.raises(UserError, match="8 key frames"):
        peer.train()(*short)
    with torch.no_grad():  # sampled it may be
        assert peer.eval()(*short).shape == short[0].shape


def test_gradient_checkpointing_is_refused():
    with pytest.raises(ValueError, match="gradient checkpointing"):
        shared_peer("cav").enable_gradient_checkpointing()


@pytest.mark.parametrize("name", METHODS)
def test_a_base_in_bf16_stays_so_and_its_adapters_learn(name):
    """As with a base of full size, under autocast, in the layout that train.py gives a network."""
    peer = build_peer(name, tiny_base().to(torch.bfloat16))
    peer = prepare(peer, "cpu").train()
    with precision("cpu", "bf16"):
        peer(*toy_inputs(peer)).float().square().mean().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in trainable(peer).values())
    assert {weight.dtype for weight in peer.base.parameters()} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------------------
# Folders


@torch.no_grad()
@pytest.mark.parametrize("name", CHOICES["name"])
def test_save_and_load(tmp_path, name):
    settings = dict(prediction="v", clip_dim=10, text_tokens=9, rank=2, absorber="none")
    peer = tiny_peer(name, (6, None), **settings)
    peer.save_pretrained(tmp_path / "unet")
    again = read_unet(tmp_path, Peer)
    inputs = toy_inputs(peer)
    assert alike(peer(*inputs), again(*inputs))
    assert set(trainable(peer)) == set(trainable(again))
    for field in peer.config:  # as a resumed run compares them
        assert field.startswith("_") or json.dumps(peer.config[field]) == json.dumps(again.config[field])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base as diffusers saves it."""
    folder = tmp_path_factory.mktemp("i2vgen-xl") / "unet"
    tiny_base().save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True])
def test_a_base_of_diffusers_is_loaded(folder, whole):
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "I2VGenXLUNet"
    base, settings = load_base(folder.parent if whole else folder)
    assert settings == dict(prediction="v", text_tokens=77)
    peer = build_peer("base", base).eval()
    inputs = toy_inputs(peer)
    assert alike(peer(*inputs), shared_peer("base")(*inputs))


@torch.no_grad()
def test_a_base_that_was_trained_here_is_loaded(tmp_path):
    """Latents of six channels, and the prior's estimate, for which diffusers' own class has no field."""
    trained = tiny_peer("base", (6, 12))
    trained.save_pretrained(tmp_path / "unet")
    base, settings = load_base(tmp_path)
    assert settings == dict(prediction="eps", text_tokens=24)
    peer, inputs = build_peer("cav", base, **settings).eval(), toy_inputs(trained)
    assert alike(peer(*inputs), trained(*inputs))
    with pytest.raises(ValueError, match="part of another Peer"):
        build_peer("simda", peer.base)


def training_state(total=4):
    """What train.py's loop changes, for a method on a frozen base; its step is of the loop, too."""
    flags = dict(learning_rate=1e-2, lr_scheduler="cosine", lr_warmup_steps=1, max_train_steps=total)
    flags |= dict(use_8bit_adam=False, low_memory=False, muon=True, use_ema=True, ema_on_cpu=False)
    args = SimpleNamespace(**flags, mixed_precision="no", curriculum="none")
    peer = prepare(tiny_peer("cav", filled=False), "cpu").train()
    return train.begin_training(args, SimpleNamespace(device=torch.device("cpu")), peer)


def train_to(training, last):
    while training.step < last:
        out = training.unet(*toy_inputs(training.unet, seed=training.step))
        out.square().mean().backward()
        train.update(training, 1.0, np.ones((2, train.NUM_RANGES)))
    return training


def test_a_resumed_run_with_a_frozen_base_is_the_unbroken_one(tmp_path):
    unbroken = train_to(training_state(), 2)
    nothing = SimpleNamespace(save=lambda folder: None, sources=dict)
    checkpoint.save_checkpoint(tmp_path, unbroken, (nothing, make_scheduler(), {}), {}, None)
    resumed = training_state()
    checkpoint.load_checkpoint(tmp_path / "checkpoint-2", resumed)
    weights = [train_to(training, 4).unet.state_dict() for training in (unbroken, resumed)]
    assert all(torch.equal(weight, weights[1][key]) for key, weight in weights[0].items())
    assert len(unbroken.optimizer.state) == len(trainable(unbroken.unet))


def change(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def pickled(folder):
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


REFUSED = {
    "another class": (lambda f: change(f, _class_name="UNetMotionModel"), "it is a UNetMotionModel, not an"),
    "no class": (lambda f: change(f, _class_name=None), "cannot be loaded"),
    "other widths": (lambda f: change(f, block_out_channels=[16, 24]), "in its weights"),
    "other channels": (lambda f: change(f, in_channels=8), "in its weights"),
    "wide text": (lambda f: change(f, cross_attention_dim=2**19), "more weights than"),
    "absurd layers": (lambda f: change(f, layers_per_block=10**9), "layers_per_block"),
    "a pickle": (pickled, "holds no diffusion_pytorch_model.safetensors"),
    "nothing": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_base_that_does_not_fit_is_refused_in_one_sentence(folder, tmp_path, name):
    spoil, words = REFUSED[name]
    spoil(shutil.copytree(folder, tmp_path / "copy"))
    with pytest.raises(UserError, match=words) as error:
        load_base(tmp_path / "copy")
    assert str(error.value).startswith(f"--base {tmp_path}") and "\n" not in str(error.value)


def test_other_networks_are_refused(tmp_path):
    tiny_peer("cav").save_pretrained(tmp_path / "a")
    widths = dict(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, attention_head_dim=8)
    blocks = {key: TINY[key] for key in ("down_block_types", "up_block_types")}
    UNet3DConditionModel(**widths, **blocks, cross_attention_dim=8).save_pretrained(tmp_path / "b")
    for folder, words in (("a", "it is a cav"), ("b", "it is a UNet3DConditionModel")):
        with pytest.raises(UserError, match=words):
            load_base(tmp_path / folder)


def test_settings_are_checked():
    for change_, words in ((dict(name="lora"), "'lora'"), (dict(absorber="all"), "'all'")):
        with pytest.raises(ValueError, match=words):
            Peer(**(dict(name="cav", shape=TINY) | change_))


# ------------------------------------------------------------------------------------------------------------
# lab.bench


@pytest.mark.slow
def test_table_8_is_measured(capsys):
    """On networks that are small but for the width of their text; each runs once."""
    small = dict(SIZES["toy"], clip_dim=1024, t5_dim=1024)
    base = partial(make_base, **(TINY | dict(cross_attention_dim=1024)))

    def timed(functions, repeats):
        return {name: np.full(repeats, function() is None) for name, function in functions.items()}

    changed = patch.multiple(bench, make_base=base, timed=timed, CHOICES=dict(name=("base", "simda")))
    with changed, patch.dict(SIZES, full=small):
        dfgn, whole, simda = bench.bench_peers(quick=True)
    assert [line["what"].split(", ")[1] for line in (dfgn, whole, simda)] == ["full", "base", "simda"]
    assert dfgn["learn_percent"] == whole["learn_percent"] == 100
    assert simda["parameters"] == whole["parameters"] + simda["learn"]
    assert simda["TFLOP"] > whole["TFLOP"]
    assert "2^30" in capsys.readouterr().out


def test_a_step_of_adapters_on_a_frozen_base():
    base = tiny_base()
    before = {key: weight.clone() for key, weight in base.state_dict().items()}
    bench_step.adapter_step(base)()
    assert all(torch.equal(weight, before[key]) for key, weight in base.state_dict().items())
