"""Several processes under torchrun: two ranks train as one, sharded or not, and none waits for another."""

import json
import shutil
import signal
import time
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

import sample
import train
from support import checkpoint, media
from support.optim import shard
from tests.runs import (
    FEW_STEPS,
    NO_PICTURES,
    QUICK,
    TORCHRUN,
    log,
    said,
    same_end,
    start,
    state,
    train_elsewhere,
    train_here,
    weights,
)
from tests.stress.toy_train import at_each_loss
from tests.toys import SMALLER, toy_inputs, toy_unet

HALF = dict(train_batch_size=2)  # on each of two ranks, and the global batch is that of one


def assert_nearly_same_end(one, two):
    """Equal but for the order of summation. Adam turns a gradient that is all rounding into a step of full
    size, so a few weights may differ by a step: not compared one by one."""
    for a, b in zip(log(one), log(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["p_generation"] == pytest.approx(b["p_generation"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
    assert weights(one).keys() == weights(two).keys()
    a, b = (torch.cat([w.flatten() for _, w in sorted(weights(out).items())]) for out in (one, two))
    assert (a - b).norm() < 2e-3 * a.norm()
    assert ((a - b).abs() > 1e-3).float().mean() < 0.002


def endings(out):
    """What the two ranks recorded."""
    return [json.loads((out.parent / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


# The same samples, whichever process draws them. The third loss of rank 1 is no number.


@pytest.fixture(scope="module")
def flags(folder, cache):
    return dict(data=folder, cache_dir=cache, checkpointing_steps=1, resume_from_checkpoint="latest")


@pytest.fixture(scope="module")
def two_ranks(flags, tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    faults = dict(TOY_NAN="1:3", TOY_RECORD=str(root))
    return train_elsewhere(root / "run", TORCHRUN, faults, **flags, **HALF)


@pytest.fixture(scope="module")
def one_rank(flags, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, mock.patch.multiple(train, **QUICK, **NO_PICTURES):
        at_each_loss(patch.setattr, lambda call: float("nan") if call == 3 else 1.0)
        return train_here(tmp_path_factory.mktemp("one") / "run", **flags)


def test_two_ranks_train_as_one(one_rank, two_ranks):
    assert_nearly_same_end(one_rank, two_ranks)


def test_one_rank_without_a_number_stops_no_other(two_ranks):
    assert state(two_ranks, 6)["skipped"] == 1
    assert not (two_ranks / "checkpoint-3").exists()  # the next good step saves
    assert state(two_ranks, 4)["curriculum"]["count"] == state(two_ranks, 4)["ema_step"] == 3


def test_ranks_with_different_losses_share_one_curriculum(two_ranks):
    """test_two_ranks_train_as_one shows that it is the one of the mean loss."""
    a, b = endings(two_ranks)
    assert a["curriculum"] == b["curriculum"] == state(two_ranks, 6)["curriculum"]
    assert a["curriculum"]["count"] == 5


@pytest.mark.slow
def test_torchrun_starts_again_after_one_rank_was_killed(two_ranks, flags, tmp_path):
    """All ranks go on from the newest checkpoint, with one curriculum, to the weights of a run without the
    kill."""
    faults = dict(TOY_NAN="1:3", TOY_DIE="1:4", TOY_RECORD=str(tmp_path))
    restarting = (*TORCHRUN, "--max-restarts", 1)
    out = train_elsewhere(tmp_path / "run", restarting, faults, **flags, **HALF)
    assert "resuming" in said(out) and "at step 4" in said(out)
    assert same_end(two_ranks, out) and state(out, 6)["skipped"] == 1
    assert endings(out) == endings(two_ranks)


# Sharded


@pytest.fixture(scope="module")
def plain_flags(folder, cache):
    return dict(data=folder, cache_dir=cache)


@pytest.fixture(scope="module")
def sharded(plain_flags, tmp_path_factory):
    root = tmp_path_factory.mktemp("sharded")
    faults = dict(TOY_RECORD=str(root), TOY_PICTURES="1")
    more = dict(HALF, shard=True, validation_steps=0)  # one sheet, at the end
    return train_elsewhere(root / "run", TORCHRUN, faults, **plain_flags, **more)


@pytest.mark.slow
def test_sharded_ranks_train_as_one(trained, sharded):
    assert_nearly_same_end(trained, sharded)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["unet", "unet_ema"])
def test_a_sharded_checkpoint_has_whole_weights(trained, sharded, part):
    one, two = (weights(out / "checkpoint-3", part) for out in (trained, sharded))
    assert {name: x.shape for name, x in one.items()} == {name: x.shape for name, x in two.items()}


@pytest.mark.slow
def test_each_rank_holds_half(sharded):
    shares = [share for ending in endings(sharded) for share in ending["shares"].values()]
    assert len(shares) == 6 and all(0.47 < share < 0.53 for share in shares)


def test_weights_travel_in_half_precision_and_stay_in_single():
    """One rank's share is the whole, and behaves as any other."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        unet, seen = toy_unet(**SMALLER), []
        shard(unet, torch.device("cpu"), torch.bfloat16)
        for name, module in unet.named_modules():
            if name.endswith(("conv_in", "conv1", "to_q")):
                module.register_forward_pre_hook(lambda module, _: seen.append(module.weight.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            unet(*toy_inputs(unet)).float().square().mean().backward()
        assert len(seen) > 10 and set(seen) == {torch.bfloat16}
        kept = [p for p in unet.parameters()]
        assert {x.dtype for p in kept for x in (p, p.grad) if x is not None} == {torch.float32}
    finally:
        dist.destroy_process_group()


def halfway(out, to):
    """A run that stands at step 3, where `out` did."""
    shutil.copytree(out / "checkpoint-3", to / "checkpoint-3")
    shutil.copy(out / "log.jsonl", to)
    return to


@pytest.mark.slow
def test_one_process_goes_on_from_shards(sharded, run, tmp_path):
    out = run(halfway(sharded, tmp_path / "run"), resume_from_checkpoint="latest")
    assert_nearly_same_end(sharded, out)


@pytest.mark.slow
def test_shards_go_on_from_one_process(trained, plain_flags, tmp_path):
    again = dict(plain_flags, resume_from_checkpoint="latest", shard=True)
    out = train_elsewhere(halfway(trained, tmp_path / "run"), TORCHRUN, **again, **HALF)
    assert_nearly_same_end(trained, out)


@pytest.mark.slow
def test_sharded_ranks_sample_together_what_one_process_samples(sharded, tmp_path):
    denoiser, encoders, settings = sample.load(sharded)
    nothing = sample.nothing_given(encoders, settings["resolution"], 1)
    settings = dict(num_inference_steps=FEW_STEPS, guidance_scale=settings["guidance_scale"])
    theirs = media.read_clip(sharded / "sample.gif", 32)[0].astype(int)
    distance = []
    for seed in (0, 1):
        frames = sample.generate(denoiser, encoders, ["a red heart"], *nothing, seed=seed, **settings)
        media.write_clip(tmp_path / "one.gif", frames[0], fps=8)
        ours = media.read_clip(tmp_path / "one.gif", 32)[0].astype(int)
        distance.append(np.abs(ours - theirs).mean())
    same_seed, other_seed = distance
    assert (
        same_seed < 2 and other_seed > 5 * same_seed
    )  # rounding can move a pixel to the palette's next colour


@pytest.mark.slow
def test_a_full_disk_and_a_request_to_stop_leave_no_rank_waiting(plain_flags, tmp_path):
    """The other rank holds a part of the weights, and must not wait for one that gave up. torchrun passes the
    signal on, and leaves its ranks time to save."""
    out = tmp_path / "run"
    long = dict(max_train_steps=10_000, checkpointing_steps=2, checkpoints_total_limit=1, shard=True)
    process = start(out, TORCHRUN, dict(TOY_FULL="checkpoint-2"), **plain_flags, **HALF, **long)
    while process.poll() is None and not [entry for entry in log(out) if entry["step"] > 2]:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=100) == 1, said(out)[-2000:]  # that of torchrun; its ranks ended with 143
    ((step, newest),) = checkpoint.list_checkpoints(out)
    assert "checkpoint-2 could not be written" in said(out)
    assert f"stopped after step {step}, as asked" in said(out) and "forcefully" not in said(out)
    assert checkpoint.find_damage(newest) is None and not list(out.glob("*.tmp"))
