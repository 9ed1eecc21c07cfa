"""What full size needs: pre-trained parts through the real commands, a Stable Diffusion start, weights spread over
ranks, less memory."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

import sample
import train as train_script
from masks import NUM_FRAMES
from model import DFGN
from support import media, stickers
from support.checkpoint import start_from_spatial
from support.encoders import MAX_TOKENS, EncoderError
from support.optim import Average, make_optimizer
from tests.test_train import assert_same_weights, command, flags_of, log, weights
from tests.tiny_parts import make_parts, make_unet

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
SMALL = dict(
    latent_channels=4,
    block_out_channels=(16, 32),
    attention_levels=(True, True),
    layers_per_block=1,
    head_width=8,
    cross_attention_dim=32,
    clip_dim=32,
    t5_dim=24,
    norm_num_groups=4,
    sti_heads=2,
    sti_head_width=8,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of stickers, a cache, and the flags that name tiny pre-trained parts."""
    root = tmp_path_factory.mktemp("full")
    vae, clip, t5 = make_parts(root / "parts")
    data = stickers.draw_stickers(root / "set", count=24)
    return root, data, dict(vae=vae, clip=clip, t5=t5)


def train(made, name, launcher=(sys.executable,), **more):
    root, data, parts = made
    flags = dict(
        parts,
        data=data,
        cache_dir=root / "cache",
        output_dir=root / name,
        max_train_steps=4,
        mixed_precision="no",
        num_workers=0,
        validation_steps=0,
        checkpointing_steps=2,
        checkpoints_total_limit=0,
        validation_prompts="a red heart",
        train_batch_size=4,
        learning_rate=1e-3,
    )
    switches = [f"--{name}" for name, value in more.items() if value is True]
    values = {name: value for name, value in more.items() if value is not True}
    said = command(*launcher, "tests/toy_train.py", *flags_of(dict(flags, **values)), *switches)
    return root / name, said


def assert_nearly_same_weights(a, b):
    """Adam turns a gradient that is all rounding into a step of full size, so a few weights may differ by a step:
    not compared one by one."""
    assert a.keys() == b.keys()
    a, b = (torch.cat([w[name].flatten() for name in sorted(w)]) for w in (a, b))
    assert (a - b).norm() < 2e-3 * a.norm()
    assert ((a - b).abs() > 1e-3).float().mean() < 0.002


def test_encode_train_resume_and_sample_with_pre_trained_parts(made):
    root, data, parts = made
    said = command(
        sys.executable,
        "data.py",
        data,
        "--encode",
        "--vae",
        parts["vae"],
        "--resolution",
        32,
        "--cache_dir",
        root / "cache",
        "--num_workers",
        0,
    )
    assert "24 clips" in said
    before = {path: path.stat().st_mtime_ns for path in root.glob("cache/latents-*/*.np?")}
    one, _ = train(made, "one")
    assert {
        path: path.stat().st_mtime_ns for path in root.glob("cache/latents-*/*.np?")
    } == before  # nothing anew
    assert not (one / "codec").exists()
    index = json.loads((one / "model_index.json").read_text())
    assert index["vae"] == str(parts["vae"]) and index["codec_identity"].startswith("AutoencoderKL")
    card = (one / "README.md").read_text()
    assert str(parts["t5"]) in card and "progress.png" in card and "validation-4.png" in card
    assert DFGN.from_pretrained(one / "unet").config.t5_dim == 24

    resumed = one.with_name("resumed")  # the parts are remembered
    resumed.mkdir()
    shutil.copytree(one / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copy(one / "log.jsonl", resumed)
    train((root, data, {}), "resumed", resume_from_checkpoint="latest")
    assert_same_weights(weights(one), weights(resumed), rtol=0, atol=0)

    for output, more in {
        "a.gif": [],
        "b.gif": ["--vae", parts["vae"], "--image", f"0:{data / '00000.gif'}"],
    }.items():
        command(
            sys.executable,
            "sample.py",
            "--checkpoint",
            one,
            "--prompt",
            "a red heart",
            "--num_inference_steps",
            2,
            "--output",
            root / output,
            *more,
        )
        assert (root / output).stat().st_size > 200


def test_two_ranks_sharded_or_not_are_one_process(made):
    """Weights to the order of summation; a sharded checkpoint goes on in one process, and the other way round."""
    root, data, parts = made
    one, _ = train(made, "single")
    for name, flags in {"ddp": {}, "sharded": dict(shard=True)}.items():
        out, _ = train(made, name, TORCHRUN, train_batch_size=2, **flags)
        for a, b in zip(log(one), log(out), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
        assert_nearly_same_weights(weights(one), weights(out))
        for part in ("unet", "unet_ema"):
            shapes = [
                {n: w.shape for n, w in weights(run / "checkpoint-2", part).items()} for run in (one, out)
            ]
            assert shapes[0] == shapes[1]

    for name, source, launcher, flags in (
        ("from-shards", "sharded", (sys.executable,), {}),
        ("to-shards", "single", TORCHRUN, dict(shard=True, train_batch_size=2)),
    ):
        (root / name).mkdir()
        shutil.copytree(root / source / "checkpoint-2", root / name / "checkpoint-2")
        shutil.copy(root / source / "log.jsonl", root / name)
        out, _ = train(made, name, launcher, resume_from_checkpoint="latest", **flags)
        assert_nearly_same_weights(weights(root / source), weights(out))

    # what the sharded ranks sampled together, one process samples from the folder they left
    unet, encoders, settings = sample.load(root / "sharded")
    shape = (1, NUM_FRAMES, 4, 4, 4)
    clips = []
    for seed in (0, 1):
        frames = sample.generate(
            unet,
            encoders,
            ["a red heart"],
            torch.zeros(shape),
            torch.zeros(shape[:2], dtype=torch.bool),
            num_inference_steps=3,
            seed=seed,
            guidance_scale=settings["guidance_scale"],
        )[0]
        media.write_clip(root / "one.gif", frames, fps=8)
        clips.append(media.read_clip(root / "one.gif", 32)[0].astype(int))
    theirs = media.read_clip(root / "sharded" / "sample.gif", 32)[0].astype(int)
    same, other = (np.abs(clip - theirs).mean() for clip in clips)
    assert same < 2 and other > 5 * same  # rounding can move a pixel to the next colour of a GIF's palette


HALVES = """
import os, torch, torch.distributed as dist
from support import optim
from model import DFGN
from tests.test_full import SMALL
dist.init_process_group("gloo")
unet = DFGN(**SMALL)
whole = sum(p.numel() for p in unet.parameters())
optim.shard(unet, torch.device("cpu"))
optimizer, average = optim.make_optimizer(unet, 1e-3), optim.Average(unet)
text = torch.randn(1, 3, 32), torch.ones(1, 3, dtype=torch.bool), torch.randn(1, 3, 24), torch.ones(1, 3, dtype=torch.bool)
x = torch.randn(1, 4, 4, 8, 8)
unet(x, torch.zeros_like(x), torch.tensor([5]), text).square().mean().backward()
optimizer.step()
average.step(unet)
held = sum(p.to_local().numel() for p in unet.parameters())
moments = sum(v.to_local().numel() for state in optimizer.state.values() for v in state.values() if v.ndim)
averaged = sum(p.numel() for p in average.ema.shadow_params)
print("shares", held / whole, moments / (2 * whole), averaged / whole, flush=True)
"""


def test_each_rank_holds_half(tmp_path):
    script = tmp_path / "halves.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n" + HALVES)
    shares = [
        float(x)
        for line in command(*TORCHRUN, script).splitlines()
        if "shares" in line
        for x in line.split("shares")[1].split()
    ]
    assert len(shares) == 6 and all(0.47 < share < 0.53 for share in shares)


def test_ranks_with_different_losses_share_one_curriculum(made, tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_CURRICULUM", str(tmp_path))
    out, _ = train(made, "fifty", TORCHRUN, train_batch_size=1, max_train_steps=50, checkpointing_steps=50)
    a, b = ((tmp_path / f"rank-{rank}.json").read_text() for rank in (0, 1))
    assert a == b and json.loads(a)["losses"] == 50 and len(json.loads(a)["probabilities"]) == 50
    one, _ = train(made, "fifty-1", train_batch_size=1, max_train_steps=50, checkpointing_steps=50)
    assert (
        tmp_path / "rank-0.json"
    ).read_text() != a  # with the losses of one rank it would have been another


# ------------------------------------------------------------------------------------------------ start, memory


@pytest.mark.parametrize("slots", [3, 8])
def test_init_unet_is_that_unet_frame_by_frame(tmp_path, slots):
    torch.manual_seed(0)
    make_unet(tmp_path / "sd" / "unet")
    unet = DFGN(**SMALL)
    start_from_spatial(unet, tmp_path / "sd")
    spatial = UNet2DConditionModel.from_pretrained(tmp_path / "sd" / "unet", low_cpu_mem_usage=False)
    noisy, given = torch.randn(2, slots, 4, 8, 8), torch.randn(2, slots, 4, 8, 8)
    clip, t5 = torch.randn(2, 5, 32), torch.randn(2, 4, 24)
    clip_mask, t5_mask = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    timestep = torch.tensor([3, 700])
    with torch.no_grad():
        ours = unet(noisy, given, timestep, (clip, clip_mask, t5, t5_mask))
        states = torch.cat(
            [clip, unet.t5_projection(t5)], dim=1
        )  # the same text states: CLIP's pass unchanged
        theirs = torch.stack([spatial(noisy[:, i], timestep, states).sample for i in range(slots)], dim=1)
    assert ours.abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_init_unet_that_does_not_fit(tmp_path):
    make_unet(tmp_path / "wide", widths=(32, 32))
    with pytest.raises(EncoderError, match="--init_unet .*conv_in.weight"):
        start_from_spatial(DFGN(**SMALL), tmp_path / "wide")
    with pytest.raises(EncoderError, match="--init_unet"):
        start_from_spatial(DFGN(**SMALL), tmp_path)


def test_average_on_the_cpu_and_over_bf16_weights_is_the_plain_one():
    averages = []
    for on_cpu, dtype in ((False, torch.float32), (True, torch.float32), (True, torch.bfloat16)):
        torch.manual_seed(0)
        unet = DFGN(**SMALL).to(dtype)
        average = Average(unet, on_cpu)
        for _ in range(3):
            with torch.no_grad():
                for p in unet.parameters():
                    p.add_(0.25)
            average.step(unet)
        before = [p.clone() for p in unet.parameters()]
        seen = average.applied(unet, lambda: [p.detach().float().clone() for p in unet.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(before, unet.parameters()))
        assert all(shadow.dtype == torch.float32 for shadow in average.ema.shadow_params)
        averages.append(seen)
    for plain, on_cpu, bf16 in zip(*averages):
        assert torch.equal(plain, on_cpu)
        torch.testing.assert_close(plain, bf16, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("low_memory", [False, True], ids=["8bit", "low_memory"])
def test_8_bit_adam_learns_as_adam_does(low_memory):
    pytest.importorskip("torchao", reason="optional: pip install torchao")
    final = []
    for small in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(128, 128)
        if small and low_memory:
            layer.to(torch.bfloat16)
        optimizer = make_optimizer(layer, 1e-3, eight_bit=small, low_memory=small and low_memory)
        x = torch.randn(64, 128)
        for _ in range(60):
            loss = (layer(x.to(layer.weight.dtype)).float() - x.roll(1, 1)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        final.append(loss.item())
    assert final[1] == pytest.approx(final[0], rel=0.05)


def test_flags_that_do_not_go_together(made, monkeypatch, capsys):
    root, data, _ = made
    for flags, word in (
        (["--shard"], "torchrun"),
        (["--low_memory", "--mixed_precision", "fp16"], "--low_memory"),
        (["--vae", root], "--vae"),
        (["--init_unet", root], "--init_unet"),
    ):
        words = [
            "--data",
            data,
            "--output_dir",
            root / "never",
            "--cache_dir",
            root / "cache",
            "--num_workers",
            0,
        ]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*words, *flags])])
        with pytest.raises(SystemExit) as stop:
            train_script.main()
        assert stop.value.code == 2 and word in capsys.readouterr().err.splitlines()[-1]


def test_text_is_cut_at_77_tokens(made):
    from support.encoders import PretrainedCLIP

    states, mask = PretrainedCLIP(made[2]["clip"])(["a " * 1000])
    assert states.shape[1] == MAX_TOKENS and mask.all()
