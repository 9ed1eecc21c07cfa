"""The model that ships: how a run becomes it, and that a training can start from it. A test of sample.py
makes stickers with it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sample
from lab import ship
from support.finished import SHIPPED_MODEL
from tests.runs import run_here, same, state, weights

MOST = 25  # MB of everything that ships


@pytest.mark.parametrize("part", [".", pytest.param("checkpoint-3", marks=pytest.mark.slow)])
def test_a_run_ships_as_its_averaged_weights_in_halves(trained, tmp_path, capsys, part):
    run_here(ship.main, "--checkpoint", trained / part, "--output_dir", tmp_path / "new")
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path / 'new'}, ")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "model_index.json",
        "prior",
        "scheduler",
        "unet",
    ]
    shipped = load_file(tmp_path / "new" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, weight in weights(trained / part, "unet" if part == "." else "unet_ema").items():
        assert torch.equal(shipped[name], weight.half())
    (before, _, settings), (after, _, recorded) = sample.load(trained / part), sample.load(tmp_path / "new")
    assert settings == recorded
    for name, weight in before.state_dict().items():
        assert torch.allclose(after.state_dict()[name], weight, rtol=1e-3, atol=1e-6)


def test_a_model_with_another_vae_does_not_ship(trained, parts, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("support.encoders.SHIPPED_VAE", Path(parts["vae"]))
    words = f"lab.ship: --checkpoint {trained} needs other encoders than those that ship."
    refused(words, run_here, ship.main, "--checkpoint", trained, "--output_dir", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_ships_is_small_and_says_what_it_is():
    files = [path for path in SHIPPED_MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST * 2**20
    assert {path.suffix for path in files} <= {".json", ".md", ".safetensors"}
    assert "python -m lab.ship" in (SHIPPED_MODEL / "README.md").read_text()


def test_a_training_starts_from_what_ships(run):
    out = run("more", init_from=SHIPPED_MODEL, preset=None, resolution=None, max_train_steps=1)
    assert state(out, 1)["init_from"] == str(SHIPPED_MODEL)
    assert same(weights(out), weights(SHIPPED_MODEL))  # the learning rate of the first step is zero
