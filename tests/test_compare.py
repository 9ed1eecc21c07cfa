"""The comparison with adapters: its rules by hand, its runs with a stand-in, one peer trained for real."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import I2VGenXLUNet
from PIL import Image
from safetensors.torch import load_file

from lab import arm, compare, driving, peers
from lab.items import CONDITIONED, Item
from lab.pictures import read_samples, show_samples
from support.common import UserError
from support.machine import precision
from support.pictures import GAP, LINE
from tests.tiny_parts import make_parts
from tests.toys import toy_inputs, trainable

TINY = dict(block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=8, norm_num_groups=4)
TINY |= {name: peers.LAPTOP[name] for name in ("down_block_types", "up_block_types", "cross_attention_dim")}


def rows_of(losses):
    """{(arm, task, clips): losses of seeds} as compare.numbers has them"""
    return {key: dict(loss=dict(enumerate(values))) for key, values in losses.items()}


def with_lead(*leads):
    """A against two B, at as many numbers of clips as there are leads, the same in every task."""
    losses = {}
    for clips, lead in zip((300, 1200), leads):
        for task in CONDITIONED:
            losses["A", task, clips] = [0.30, 0.31, 0.32]
            losses["B-cav", task, clips] = [0.9, 0.9, 0.9]
            losses["B-simda", task, clips] = [0.8, 0.9, 0.9]
            losses["B-i2v", task, clips] = [0.30 + lead, 0.31 + lead, 0.321 + lead]
    return rows_of(losses)


# The verdict


def test_leads_are_over_the_best_peer_seed_by_seed():
    lead = compare.leads(with_lead(0.02), 300)["image"]
    assert lead["mean"] == pytest.approx(0.02 + 0.001 / 3) and lead["seeds"] == 3
    assert lead["se"] == pytest.approx(0.001 / 3)


@pytest.mark.parametrize(
    "leads, words",
    [
        (
            (0.01, 0.02),
            "A is better than the best B at 1200 clips in image and inter",
        ),
        ((0.02, 0.01), "Undecided: A is better"),  # a lead that shrinks
        ((0.02,), "Undecided: A is better"),  # one number of clips shows no growth
        ((0.02, -0.02), "the best B is better than A at 1200 clips"),
        ((-0.03, -0.02), "Undecided: the best B is better"),
        ((0.02, 0.0), "Undecided: at 1200 clips neither"),
    ],
)
def test_the_verdict_follows_the_rules(leads, words):
    assert compare.verdict(with_lead(*leads), (300, 1200)[: len(leads)]).startswith(words)


def test_without_all_runs_there_is_no_verdict():
    rows = with_lead(0.02)
    without = {key: losses for key, losses in rows.items() if key[1] != "image"}
    assert compare.verdict(without, [300]).startswith("No verdict")
    one_seed = rows_of({key: [values["loss"][0]] for key, values in rows.items()})
    assert compare.verdict(one_seed, [300]).startswith("No verdict")


# The sets that are drawn


def test_source_and_target_share_no_word_or_are_other_domains(tmp_path, monkeypatch):
    monkeypatch.setattr("lab.eight_frames.COUNT", 3)

    def draw(source, target):
        words = dict(source=source, base_clips=3, target=target, target_clips=3)
        args = SimpleNamespace(output_dir=tmp_path, **words)
        compare.draw_sets(args)
        return compare.find_sets(args)

    near, target = draw("near", "stickers")
    (held_out,) = target.glob("test-stickers-*")
    said = [dict.fromkeys("colour subject motion".split(), ()) for _ in range(3)]
    tested = said[2]
    for folder, words in zip((near, target / "train", held_out), said):
        for line in (folder / "metadata.jsonl").read_text().splitlines():
            words.update({part: (*words[part], json.loads(line)[part]) for part in words})
    assert all(said[0][part] and not set(said[0][part]) & set(said[1][part]) for part in said[0])
    assert not set(zip(*said[1].values())) & set(zip(*tested.values()))
    assert {path.suffix for path in draw("far", "roads")[0].iterdir()} >= {".webp"}
    assert {path.suffix for path in draw("far", "roads")[1].iterdir()} == {".mp4", ".json"}


# Runs, with a stand-in for lab.arm


@pytest.fixture
def called(monkeypatch, tmp_path):
    """The words of all calls of lab.arm; the second rate is the best."""
    calls = []

    def run(words, log, quiet, threads):
        calls.append(words)
        folder, rate = Path(words[words.index("--output_dir") + 1]), words[words.index("--learning_rate") + 1]
        folder.mkdir(parents=True)
        loss = abs(float(rate) - compare.RATES[1]) + 0.1
        losses = {task: dict(mean=2 * loss, se=0.0, balanced=loss) for task in CONDITIONED}
        scores = {task: dict(network=dict(frechet=1.0, psnr=2.0, away=3.0)) for task in CONDITIONED}
        log = [dict(step=step, G1=0.5 / step) for step in (1, 2)]
        clips = {"a": np.full((8, 4, 4, 3), 9, np.uint8)}
        items = [Item(task, CONDITIONED[task][0], "", "a", (), True) for task in CONDITIONED]
        shown = show_samples(items, list(clips.values()) * 3, clips, folder / "samples.png")
        (folder / "arm.json").write_text(
            json.dumps(dict(losses=losses, fit=losses, scores=scores, log=log, samples=shown))
        )

    monkeypatch.setattr(compare, "run", run)
    monkeypatch.setattr(compare, "draw_sets", lambda args: calls.append(["drawn"]))
    return calls


def call(*words):
    compare.compare(compare.parse_args(list(map(str, words))))


def test_every_arm_is_run_once_at_its_best_rate(called, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = ["--output_dir", out, "--clips", 300, "--seeds", 0, 1, "--cache_dir", tmp_path]
    write = compare.write_report  # only of all runs, for the sake of time
    monkeypatch.setattr(compare, "write_report", lambda *a: write(*a) if len(a[1]) == 42 else None)
    for _ in range(2):
        call(*words)
    each, every = ("D", "B-cav", "B-i2v", "B-simda", "C2", "C4"), ("A", "C1", "C3")
    runs = 2 * (3 * len(each) + len(every))
    trials = len(compare.RATES) * (len(compare.ARMS) - 1)  # C3 learns nothing
    assert called[0] == ["drawn"] and called.count(["drawn"]) == 1  # not where all is finished
    assert len(called) == 1 + 1 + trials + runs
    last = [words for words in called if "300" in words and "simda" in words and "1200" in words]
    assert {words[words.index("--learning_rate") + 1] for words in last} == {str(compare.RATES[1])}
    with_base = [words for words in called if "--base" in words]
    # runs of B and C2, and of C3; trials of rates
    assert len(with_base) == (4 * 3 + 1) * 2 + 4 * len(compare.RATES)
    assert all(
        words[words.index("--base") + 1] == str(out / "base-far" / "checkpoint-3000") for words in with_base
    )
    page = (out / "peers.md").read_text()
    assert "| 300 | prediction | B-simda | base + SimDA | 0.001 | 2 | 0.1000 ± 0.0000 |" in page
    assert "neither A nor the best B" in page
    assert Image.open(out / "peers.png").format == "PNG"
    width, height = Image.open(out / "samples.png").size
    rows = len(CONDITIONED) * (1 + len(compare.ARMS))
    assert width == 16 * (4 + GAP) + GAP and height >= rows * (4 + GAP + LINE) + GAP
    with pytest.raises(UserError, match="--max_train_steps is 7"):
        call(*words, "--max_train_steps", 7)
    with pytest.raises(UserError, match="--prior is False"):
        call(*words, "--no-prior")


def test_without_the_gaussian_all_learn_plain_eq_1_and_are_judged_by_it(called, tmp_path):
    words = ["--output_dir", tmp_path / "out", "--clips", 300, "--seeds", 0, "--arms", "A", "C3"]
    call(*words, "--no-prior")
    assert all("--no-prior" in words for words in called if words != ["drawn"])
    page = (tmp_path / "out" / "peers.md").read_text()
    assert "1200 steps, without the Gaussian; base" in page
    assert "| 300 | image | A | DFGN, dual masks, DCL | 0.001 | 1 | 0.2000 |" in page  # not by other weights


def test_a_rate_that_fails_is_out(called, tmp_path, monkeypatch):
    stand_in, rates = compare.run, compare.RATES

    def run(words, log, quiet, threads):
        if words[words.index("--learning_rate") + 1] == str(rates[1]):  # the best one
            raise RuntimeError("20 steps in a row were not finite")
        stand_in(words, log, quiet, threads)

    words = ["--output_dir", tmp_path / "out", "--clips", 300, "--seeds", 0, "--arms", "A"]
    monkeypatch.setattr(compare, "run", run)
    call(*words)
    assert called[-1][called[-1].index("--learning_rate") + 1] == str(rates[0])
    for rate in rates:
        shutil.rmtree(tmp_path / "out" / "rates" / f"A-{rate:g}-300", ignore_errors=True)
    shutil.rmtree(tmp_path / "out" / "A-all-300-0")
    monkeypatch.setattr(compare, "RATES", rates[1:2])
    with pytest.raises(UserError, match="A-all-300-0 has no rate: see the logs"):
        call(*words)


# A peer, for real


@pytest.fixture
def run_arm(tmp_path, folder, cache, monkeypatch):
    """Calls lab.arm at toy size. Returns its folder and its arm.json."""
    monkeypatch.setattr("support.stickers.default_folder", lambda **_: folder)
    monkeypatch.setattr("support.stickers.draw_stickers", lambda _: folder)
    monkeypatch.setattr("lab.eight_frames.COUNT", 4)
    for name, value in dict(G1_DRAWS=4, PROBE_DRAWS=18, NUM_CLIPS=2, SAMPLING_STEPS=2, REAL_CLIPS=4).items():
        monkeypatch.setattr(arm, name, value)
    monkeypatch.setattr(peers, "LAPTOP", TINY)
    monkeypatch.setattr("train.plot_progress", None)  # which it replaces: put back after this test

    def run(name, *words):
        out = tmp_path / name
        words = [*words, "--preset", "toy", "--resolution", 16, "--output_dir", out, "--cache_dir", cache]
        words += ["--max_train_steps", 2, "--validation_steps", 2, "--num_workers", 0]
        words += ["--mixed_precision", "no"]
        monkeypatch.setattr(sys, "argv", ["lab.arm", *map(str, words)])
        arm.main()
        return out, json.loads((out / "arm.json").read_text())

    return run


def weights(out, part):
    found = load_file(out / "checkpoint-2" / part / "diffusion_pytorch_model.safetensors")
    return {name.removeprefix("base."): w for name, w in found.items() if name.startswith("base.")}


def test_a_base_is_trained_and_then_its_adapters_alone(run_arm, folder):
    base, _ = run_arm("base", "--network", "base", "--ddu", "condition", "--course", "linear", "--average")
    peer, result = run_arm(
        "peer", "--network", "simda", "--base", base / "checkpoint-2", "--ddu", "off", "--away", folder
    )
    index = json.loads((peer / "checkpoint-2" / "model_index.json").read_text())
    assert index["unet"] == ["lab.peers", "Peer"]
    before = weights(base, "unet_ema")
    for part in ("unet", "unet_ema"):
        after = weights(peer, part)
        assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)
    assert set(result["losses"]) == set(result["fit"]) == set(CONDITIONED)
    assert np.isfinite([x["mean"] for x in result["losses"].values()]).all()
    assert result["scores"]["image"]["network"].keys() == {"frechet", "psnr", "away"}
    assert set(result["gaussian"]) == set(CONDITIONED)
    for task, loss in result["losses"].items():
        assert 0 < loss["balanced"] != loss["mean"] and loss["mean"] != result["gaussian"][task]["mean"]
    real, made = read_samples(peer / "samples.png")
    assert real.shape == made.shape == (len(result["samples"]), 8, 16, 16, 3)
    error = np.abs(real.astype(float) - made).mean(axis=(2, 3, 4))
    assert (error[:, 0] < error.max(axis=1) / 2).all()  # the first frame is given


@pytest.mark.parametrize("words", [["--curriculum", "dcl"], ["--network", "i2v", "--ddu", "off"]])
def test_films_without_captions_are_learned_too(run_arm, tmp_path_factory, words):
    """Tables 9 and 10: DFGN and peers in another domain."""
    roads = tmp_path_factory.getbasetemp() / "roads"  # drawn once
    for seed, (split, count) in enumerate((("train", 4), ("validation", 2))):
        driving.draw_driving(roads / split, count, seed)
    out, result = run_arm("roads", "--data", roads, *words)
    assert result["about"]["test_clips"] == 2 and not list(roads.rglob("metadata*"))
    assert set(result["losses"]) == set(CONDITIONED)
    assert np.isfinite([x["mean"] for x in result["losses"].values()]).all()
    assert set(result["scores"]) == (set(CONDITIONED) if "dcl" in words else {"image"})
    assert read_samples(out / "samples.png")[1].shape == (len(result["samples"]), 8, 16, 16, 3)


def test_adapters_are_trained_on_the_weights_of_i2vgen_xl(run_arm, tmp_path):
    """A folder as diffusers saves it, with pre-trained parts: velocities under their own schedule."""
    vae, clip, t5 = make_parts(tmp_path / "parts")
    shape = {name: value for name, value in TINY.items() if name != "cross_attention_dim"}
    unet = I2VGenXLUNet(in_channels=4, out_channels=4, **shape, cross_attention_dim=32)
    unet.save_pretrained(tmp_path / "i2vgen-xl" / "unet")
    words = ["--network", "cav", "--base", tmp_path / "i2vgen-xl", "--vae", vae, "--clip", clip, "--t5", t5]
    with pytest.raises(SystemExit):
        run_arm("refused", *words, "--ddu", "off")
    peer, result = run_arm("peer", *words, "--ddu", "condition", "--course", "prediction", "--no-prior")
    config = json.loads((peer / "checkpoint-2" / "unet" / "config.json").read_text())
    wanted = dict(prediction="v", text_tokens=77, learn_condition=True, condition_channels=4)
    assert wanted.items() <= config.items()
    after, learn = weights(peer, "unet"), ("image_latents_proj_in", "image_latents_temporal_encoder")
    for name, before in unet.state_dict().items():
        assert (before == after[name]).all() != name.startswith(learn), name
    assert np.isfinite([x["mean"] for x in result["losses"].values()]).all()


def test_a_frozen_base_is_held_in_half_precision(monkeypatch):
    monkeypatch.setattr(peers, "LAPTOP", TINY)
    text, codec = SimpleNamespace(width=256), SimpleNamespace(latent_channels=4)
    encoders = SimpleNamespace(codec=codec, prior=None, clip=text, t5=text)
    args = SimpleNamespace(seed=0, clip=None, ddu="off", mixed_precision="bf16")
    arm_ = SimpleNamespace(network="i2v", base=None)
    peer = arm.make_network(arm_)(args, SimpleNamespace(device=torch.device("cpu")), encoders, True)
    kinds = {weight.requires_grad: weight.dtype for weight in peer.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert all(weight.dtype == kinds[weight.requires_grad] for weight in peer.parameters())
    with precision("cpu", "bf16"):
        peer(*toy_inputs(peer)).square().mean().backward()
    assert all(weight.grad is not None for weight in trainable(peer).values())


@pytest.mark.parametrize(
    "words, message",
    [
        (["--base", "x"], "--base is for a --network"),
        (["--network", "cav"], "sees 8 frames, always"),
        (
            ["--network", "i2v", "--ddu", "off", "--gradient_checkpointing"],
            "--gradient_checkpointing is for DFGN",
        ),
    ],
)
def test_what_a_peer_cannot_do_is_said(run_arm, capsys, words, message):
    with pytest.raises(SystemExit) as end:
        run_arm("bad", *words)
    assert end.value.code == 2 and message in capsys.readouterr().err
