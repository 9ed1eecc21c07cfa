"""--init_from: a new run that starts from a finished model or a checkpoint, and what it refuses."""

import shutil

import pytest

import train
from tests.runs import same, same_end, state, weights

AS_THE_MODEL = dict(preset=None, resolution=None)


@pytest.mark.parametrize("part", [".", "checkpoint-3"])
def test_it_starts_from_the_averaged_weights_and_parts_with_a_fresh_schedule(trained, run, monkeypatch, part):
    begun, real = {}, train.train

    def look(fixed, training, stop_signals):
        begun.update({name: weight.clone() for name, weight in training.unet.state_dict().items()})
        assert training.step == 0 and not training.optimizer.state and fixed.args.preset == "toy"
        real(fixed, training, stop_signals)

    monkeypatch.setattr(train, "train", look)
    model = trained / part
    out = run("my run", init_from=model, max_train_steps=1, **AS_THE_MODEL)
    assert same(begun, weights(model, "unet" if part == "." else "unet_ema"))
    assert same(weights(model, "vae"), weights(out, "vae"))
    assert same(weights(model, "prior"), weights(out, "prior"))
    assert state(out, 1)["init_from"] == str(model.resolve())
    card = (out / "README.md").read_text()
    assert f"--checkpoint '{out}'" in card and str(model.resolve()) in card


@pytest.mark.slow
def test_resumed_it_is_the_unbroken_run_and_remembers_its_start(trained, run, ask_to_stop, refused, tmp_path):
    flags = dict(init_from=trained, max_train_steps=3, seed=7)
    unbroken = run("b", **flags)
    ask_to_stop(1, lambda: run("a", **flags))
    again = dict(flags, init_from=None, resume_from_checkpoint="latest")
    other = trained / "checkpoint-3"
    refused(f"--init_from is {other}, but", run, **dict(again, init_from=other))
    assert same_end(unbroken, run("a", **again))
    assert state(tmp_path / "a", 3)["init_from"] == str(trained)


def test_a_model_without_prior_starts_a_run_without_one(run):
    bare = run("bare", prior=False, max_train_steps=1)
    out = run("more", init_from=bare, max_train_steps=1, **AS_THE_MODEL)
    assert not (out / "prior").exists()
    assert same(weights(bare), weights(out))  # the learning rate of the first step is zero


def test_more_steps_than_the_schedule_has_name_the_way_out(trained, run, refused):
    more = dict(max_train_steps=9, resume_from_checkpoint="latest")
    refused(f"--init_from {trained}/checkpoint-6", run, trained, **more)


@pytest.mark.parametrize(
    "words, flags",
    [
        ("--preset is tiny, but the model of --init_from", dict(preset="tiny")),
        ("--temporal is conv3d, but the model of --init_from", dict(temporal="conv3d")),
        ("--temporal is conv1d, but the model of --init_from", dict(temporal="conv1d")),
        ("--prior is False, but the model of --init_from", dict(prior=False)),
        ("--resolution is 32, but the model of --init_from", dict(resolution=32)),
        ("--init_unet its spatial part: choose one", dict(init_unet="anything")),
        ("another VAE than the model was trained with", dict(vae="{vae}")),
        ("its clip_dim is 256, here it is 32", dict(clip="{clip}")),
    ],
    ids=str,
)
def test_what_contradicts_the_model_is_refused(trained, run, refused, parts, words, flags):
    flags = {name: x.format(**parts) if isinstance(x, str) else x for name, x in flags.items()}
    refused(words, run, init_from=trained, **flags)


def test_what_is_no_model_is_refused(run, refused, trained, tmp_path):
    refused("--init_from", run, init_from=tmp_path / "absent")
    refused("holds no model_index.json", run, init_from=tmp_path)
    model = shutil.copytree(trained, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    refused(f"--init_from {model} cannot be read", run, init_from=model)
    (model / "model_index.json").write_text("{}")
    refused(f"--init_from {model} cannot be read", run, init_from=model)
