"""The ablation's tables by hand, and its runs with stand-ins for the programs."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lab import ablate
from support.common import UserError


def fake_report(value, dual=True):
    report = dict(about=dict(dual_masks=dual, loss_draws=6, sampler={}))
    report["loss"] = {"balanced": {"text only, k = 8": dict(mean=value)}}
    if dual:
        report["quality"] = {"prediction": {"unknown": {"model": {"psnr": dict(mean=10 * value)}}}}
    return report


def test_ablation_table_by_hand():
    reports = {
        ("none", 0): fake_report(1.0),
        ("none", 1): fake_report(3.0),
        ("dcl", 0): fake_report(2.0),
        ("dcl", 1): fake_report(5.0),
        ("sti", 0): fake_report(9.0, dual=False),
    }
    result = ablate.summarize(reports, {key: [] for key in reports})
    none = result["rows"]["none"]["metrics"]
    assert none["loss, text only"] == dict(mean=2.0, std=pytest.approx(2**0.5), count=2)
    assert result["rows"]["sti"]["metrics"]["prediction, dB"] is None
    pair = result["differences"]["dcl - none"]["loss, text only"]  # 1 and 2, seed by seed
    assert pair == dict(mean=1.5, se=pytest.approx(0.5), seeds=2)
    text = ablate.markdown(result, "about", ["end"])
    assert "| DFGN w/ DDU, no curriculum | 2 | 2.0000 ± 1.4142 |" in text and "20.00" in text
    assert "| DFGN | 1 | 9.0000 | - |" in text  # one seed, no given frames
    assert "+1.5000 ± 0.5000" in text


def fake_log(steps):
    terms = dict(p_term=0.1, i_term=0.0, d_term=-0.1)
    tasks = dict(p_interpolation=0.3, p_prediction=0.3, p_generation=0.4)
    return [dict(step=step, loss=1 / step, **terms, **tasks) for step in range(1, steps + 1)]


@pytest.fixture
def programs(monkeypatch):
    """Stand-ins for train.py and lab.evaluate: [(program, flags)] of the calls, and what they leave
    behind."""
    called = []

    def run(words, log, quiet):
        training = words[0].endswith("train.py")
        called.append(("train.py" if training else words[1], words))
        folder = Path(words[words.index("--output_dir" if training else "--checkpoint") + 1])
        if training:
            folder.mkdir()
            (folder / "model_index.json").write_text("{}")
            (folder / "log.jsonl").write_text("\n".join(map(json.dumps, fake_log(40))))
        else:
            (folder / "evaluation").mkdir()
            dual = words[words.index("--ddu") + 1] == "on"
            (folder / "evaluation" / "report.json").write_text(json.dumps(fake_report(1.0, dual)))

    monkeypatch.setattr(ablate, "run", run)
    return called


def test_finished_runs_of_an_ablation_are_not_repeated(tmp_path, programs, monkeypatch):
    """train.py and lab.evaluate are called once per run, with the flags of its row, and never again."""
    monkeypatch.setattr(ablate, "plot_ablation", lambda logs: None)
    words = ["--output_dir", str(tmp_path / "a"), "--rows", "conv3d", "dcl", "--seeds", "0", "1"]
    for _ in range(2):
        ablate.ablate(ablate.parse_args(words))
        assert [name for name, _ in programs] == 4 * ["train.py", "lab.evaluate"]
    assert "conv3d" in programs[0][1] and "dcl" in programs[2][1] and "conv3d" not in programs[2][1]
    assert all("latest" in flags for name, flags in programs if name == "train.py")
    with pytest.raises(UserError, match="--max_train_steps is 7"):
        ablate.ablate(ablate.parse_args([*words, "--max_train_steps", "7"]))


def test_what_an_ablation_leaves(tmp_path, programs):
    ablate.ablate(ablate.parse_args(["--output_dir", str(tmp_path), "--rows", "none", "dcl", "--seeds", "0"]))
    assert "| DFGN w/ DDU & DCL | 1 | 1.0000 |" in (tmp_path / "ablation.md").read_text()
    assert set(json.loads((tmp_path / "ablation.json").read_text())["rows"]) == {"none", "dcl"}
    assert Image.open(tmp_path / "ablation.png").format == "PNG"
    assert not list(tmp_path.glob(".*"))


def test_a_failed_run_is_named_and_the_others_are_made(tmp_path, programs, monkeypatch):
    run = ablate.run

    def fails(words, log, quiet):
        if "conv3d" in words:
            raise RuntimeError("train.py for conv3d-0 ended with status 1")
        run(words, log, quiet)

    monkeypatch.setattr(ablate, "run", fails)
    words = ["--output_dir", str(tmp_path), "--rows", "conv3d", "dcl", "--seeds", "0"]
    with pytest.raises(UserError, match="1 of 2 runs failed, the first: train.py for conv3d-0"):
        ablate.ablate(ablate.parse_args(words))
    assert (tmp_path / "dcl-0" / "evaluation" / "report.json").is_file()
