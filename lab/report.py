"""
report.json and report.html: tables, plots and sample sheets of what summary.py counted. The page is one file:
pictures are data URIs, there is no script and nothing is loaded from elsewhere.
"""

import base64
import html
import io
import json
import os

import matplotlib
import numpy as np

import masks
from lab import metrics
from masks import LENGTHS, NUM_FRAMES, TASKS
from support import media

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt  # noqa: E402

ROWS = {row.name: row for row in masks.TABLE7}
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .6rem 0 } td, th { padding: .2rem .7rem; text-align: right;
border-bottom: 1px solid #ddd } td:first-child, th:first-child { text-align: left } th { font-weight: 600 }
img { max-width: 100%; height: auto; margin: .4rem 0 } p.note { color: #555; max-width: 52rem }
h2 { margin-top: 2.2rem; border-bottom: 2px solid #eee }"""

# ------------------------------------------------------------------------------------------------------------
# Pictures


def heat_map(entry, title, axis):
    """The loss of every (task, k), its standard error below it; `entry`: a view of the section "loss"."""
    mean = np.array([[entry["cells"][task][str(k)]["mean"] for k in LENGTHS] for task in TASKS])
    image = axis.imshow(mean, cmap="viridis", aspect="auto")
    middle = (mean.min() + mean.max()) / 2
    for row, task in enumerate(TASKS):
        for column, k in enumerate(LENGTHS):
            text = f"{mean[row, column]:.3f}\n± {entry['cells'][task][str(k)]['se']:.3f}"
            color = "white" if mean[row, column] < middle else "black"
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    axis.set_xticks(range(len(LENGTHS)), [f"k = {k}" for k in LENGTHS], fontsize=9)
    axis.set_yticks(range(len(TASKS)), TASKS, fontsize=9)
    axis.set_title(title, fontsize=10)
    axis.figure.colorbar(image, ax=axis, shrink=0.85)


def plot_heat_maps(loss):
    """Four heat maps (matplotlib figure): both weightings, over all valid frames and over the unknown
    ones."""
    figure, axes = plt.subplots(2, 2, figsize=(13, 5.4), dpi=100, layout="constrained")
    for axis, view in zip(
        axes.T.flat, ("Eq. 1", "balanced", "Eq. 1, unknown frames", "balanced, unknown frames")
    ):
        heat_map(loss[view], f"held-out loss: {view}", axis)
    return figure


def plot_timesteps(loss):
    """The loss of the three tasks over the diffusion step (matplotlib figure)."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), dpi=100, layout="constrained")
    for axis, view in zip(axes, ("Eq. 1", "balanced")):
        for task, ranges in loss[view]["by timestep"].items():
            mean, se = ([r[name] for r in ranges.values()] for name in ("mean", "se"))
            axis.errorbar(list(ranges), mean, se, marker="o", capsize=3, linewidth=1, label=task)
        axis.set(title=f"held-out loss over the diffusion step: {view}", yscale="log")
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def sheets(items, made, real, readings, most=8):
    """{task: PIL.Image}: the ground truth, where there is one, above the sample, and below it the
    cross-fade."""
    pictures = {}
    for task in dict.fromkeys(item.task for item in items):
        mine = [i for i, item in enumerate(items) if item.task == task]
        rows, labels, marks = [], [], []
        for i in np.unique(np.linspace(0, len(mine) - 1, most).astype(int)):
            i = mine[i]
            item, given = items[i], masks.condition_mask(ROWS[items[i].row], NUM_FRAMES)
            new = " (held-out words)" if item.held_out and item.words else ""
            if item.clip:
                rows.append(real[item.clip])
                labels.append(f"real: {item.prompt or item.clip}")
                marks.append([False] * NUM_FRAMES)
            rows.append(made[i])
            read = "; read as " + ", ".join(readings[i]) if readings else ""
            labels.append(f"{task} ({item.row}): {item.prompt}{new}{read}")
            marks.append(given.tolist())
            if task in ("interpolation", "prediction"):
                rows.append(metrics.cross_fade(real[item.clip], given))
                labels.append("baseline: cross-fade")
                marks.append(given.tolist())
        pictures[task] = media.sheet(rows, labels, marks=marks)
    return pictures


def picture_bytes(picture):
    """PNG of a PIL.Image or a matplotlib figure, which is closed."""
    stream = io.BytesIO()
    if hasattr(picture, "savefig"):
        picture.savefig(stream, format="png")
        plt.close(picture)
    else:
        picture.save(stream, "PNG")
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------------------
# Tables

escape = html.escape


def number(value, digits=3):
    """A number, a {"mean", "se"} or a {"share", "se"} as text."""
    if isinstance(value, dict) and "share" in value:
        return f"{value['share']:.0%} ± {value['se']:.0%}"
    if isinstance(value, dict):
        return f"{value['mean']:.{digits}f} ± {value['se']:.{digits}f}"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def table(header, rows):
    """header: names; rows: lists of texts."""
    line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{escape(str(c))}</{tag}>" for c in cells) + "</tr>"
    return "<table>" + line(header, "th") + "".join(line(cells, "td") for cells in rows) + "</table>"


def note(text):
    return f'<p class="note">{escape(text)}</p>'


def sampler_text(about, task):
    """How the samples of a task were made: stated with every figure."""
    s = about["sampler"][task]
    scales = f"text guidance {s['guidance_scale']:g}, image guidance {s['image_guidance_scale']:g}"
    return f"{task}: {s['num_inference_steps']} DDIM steps, eta {s['eta']:g}, {scales}"


def order_table(entry, name):
    """Which of the paper's inequalities the measured loss obeys."""
    cell = lambda c: f"H({c[0]}, {c[1]})"
    rows = [
        [
            f"{cell(c['easier'])} <= {cell(c['harder'])}",
            f"{c['difference']:+.4f} ± {c['se']:.4f}",
            "holds" if c["holds"] else "refuted" if c["refuted"] else "no, within two standard errors",
        ]
        for c in entry[name]
    ]
    held = sum(c["holds"] for c in entry[name])
    refuted = sum(c["refuted"] for c in entry[name])
    summary = f"{name}: {held} of {len(rows)} hold, {refuted} are refuted by more than two standard errors"
    inside = table(["inequality", "difference", ""], rows)
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def loss_section(report):
    loss = report["loss"]
    parts = [
        "<h2>Held-out loss</h2>",
        note(
            f"{report['about']['loss_draws']} draws of held-out clips of 8 key frames; draw i has the same clip, "
            'timestep and noise for every task and every k. "Eq. 1" is the squared error of the noise; '
            '"balanced" '
            "weighs it with min(SNR + 1, 5) / SNR, as the error of the clean latents, since Eq. 1 itself tells "
            "mostly "
            "of small timesteps. ± is one standard error; the inequalities are tested draw by draw. Given "
            "frames count in the loss, as in training, and are easy: the views of unknown frames leave them "
            "out."
        ),
    ]
    rows = [
        [view, number(entry["text only, k = 8"], 4), number(entry["mean"], 4) if "mean" in entry else "-"]
        for view, entry in loss.items()
    ]
    parts.append(table(["loss", "text only, k = 8", "mean of all (task, k)"], rows))
    if "cells" in loss["Eq. 1"]:
        parts += [picture("heat map", plot_heat_maps(loss)), picture("timesteps", plot_timesteps(loss))]
        for view, entry in loss.items():
            parts += [
                f"<h3>{escape(view)}: does the paper's order hold?</h3>",
                order_table(entry, "order of tasks"),
                order_table(entry, "order of lengths"),
            ]
    return parts


def quality_section(report):
    parts = [
        "<h2>Frames against the ground truth</h2>",
        note(
            "The truth is the clip as the codec gives it back, so the codec's own loss does not count. Baselines "
            "see the given frames of that same clip. Unknown frames leave out those that were given; given "
            "frames are compared as the model returns them."
        ),
    ]
    for task, which in report["quality"].items():
        rows = [
            [f"{frames} frames: {who}", number(entry["psnr"], 2), number(entry["ssim"])]
            for frames, people in which.items()
            for who, entry in people.items()
        ]
        parts += [
            f"<h3>{task}</h3>",
            table(["", "PSNR, dB", "SSIM"], rows),
            note(sampler_text(report["about"], task) + "."),
        ]
    return parts


def text_table(section, title):
    names = list(next(iter(section.values())))
    rows = [
        [f"{group} ({entry[names[0]]['count']})", *(number(entry[n]) for n in names)]
        for group, entry in section.items()
    ]
    rows.append(["chance", *(f"{next(iter(section.values()))[n]['chance']:.1%}" for n in names)])
    return table([title, *names], rows)


def judge_section(report):
    exam, about = report["judge"], report["about"]
    parts = [
        "<h2>Text adherence</h2>",
        note(
            f"A judge, trained on drawn stickers of the training combinations, reads colour, subject and motion. "
            f"First its own accuracy, on {exam['clips']} real clips of held-out combinations."
        ),
    ]
    rows = [[name, *(f"{share:.1%}" for share in exam[name].values())] for name in ("raw", "round trip")]
    parts.append(table(["the judge on real clips", *exam["raw"]], rows))
    if "text" in report:
        parts += [
            text_table(report["text"], "samples from text"),
            note(
                "The share of samples on which the judge reads what the prompt says ± a binomial standard error "
                "(with "
                "two more of each kind counted). Held out: this "
                f"combination of words was never trained on. {sampler_text(about, 'text')}."
            ),
        ]
    if "image" in report:
        parts += [
            text_table(report["image"], "samples from text and first frame"),
            note(
                "Colour and subject can be read off the given frame; the motion only from the text. "
                f"{sampler_text(about, 'image')}."
            ),
        ]
    return parts


def motion_section(report):
    rows = [
        [
            who,
            number(e["motion"], 2),
            number(e["without_grain"], 2),
            number(e["distinct_frames"], 2),
            number(e["still"]),
        ]
        for who, e in report["motion"].items()
    ]
    header = ["", "motion, of 255", "without grain", "distinct frames of 8", "still clips"]
    samplers = "; ".join(sampler_text(report["about"], task) for task in report["about"]["sampler"])
    return [
        "<h2>Motion</h2>",
        table(header, rows),
        note(
            "Motion: mean absolute difference of consecutive frames; grain that flickers counts too, and hardly "
            "in "
            "the means of 8 x 8 pixels (without grain). Distinct: differs by 1 of 255 or more from all before. "
            f"Still: motion without grain below a tenth of the real mean. {samplers}."
        ),
    ]


def frechet_section(report):
    rows = [
        [task, f"{e['model']:.2f}", f"{e['real_held_out']:.2f}", e["clips"], e["reference_clips"]]
        for task, e in report["frechet"].items()
    ]
    samplers = "; ".join(sampler_text(report["about"], task) for task in report["frechet"])
    header = ["samples", "model", "as many real held-out clips", "clips", "training clips compared with"]
    return [
        "<h2>Frechet distance over our own features</h2>",
        table(header, rows),
        note(
            "Features of a small network of fixed random weights, of pairs of consecutive frames; pairs with a "
            "given "
            "frame are left out. Comparable only between runs of this script with the same stickers, resolution "
            "and "
            f"number of clips; not FVD, not FID. {samplers}."
        ),
    ]


def pretrained_sections(report):
    parts = []
    if "fvd" in report:
        rows = [[task, f"{e['fvd']:.1f}", e["clips"], e["real_clips"]] for task, e in report["fvd"].items()]
        parts += [
            "<h2>FVD</h2>",
            table(["samples", "FVD", "clips", "real clips"], rows),
            note(
                "I3D wants more than 8 frames: every frame was shown twice. With so few clips and repeated "
                "frames "
                "this must not be compared with the paper's number or any other."
            ),
        ]
    for key, title in (("clip_similarity", "CLIP similarity"), ("vqa", "Video quality (external program)")):
        if key in report:
            rows = [
                [task, number(e["model"], 4), number(e["real"], 4) if e["real"] else "-"]
                for task, e in report[key].items()
            ]
            parts += [f"<h2>{title}</h2>", table(["samples", "model", "real clips"], rows)]
    return parts


def picture(name, image):
    """An <img> with its picture inside."""
    data = base64.b64encode(picture_bytes(image)).decode()
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">'


# ------------------------------------------------------------------------------------------------------------


def write_whole(path, text):
    writing = path.with_suffix(f".{os.getpid()}.tmp")
    writing.write_text(text, encoding="utf-8")
    os.replace(writing, path)


def write_report(output_dir, report, items, made, real):
    """Writes report.json, report.html, and the heat map as heat_map.png. items, made, real: as
    summary.summarize."""
    about = report["about"]
    rows = [
        [name.replace("_", " "), value if not isinstance(value, float) else f"{value:.4f}"]
        for name, value in about.items()
        if name != "sampler"
    ]
    parts = ["<h1>Evaluation</h1>", table(["setting", ""], rows)]
    parts += [
        "<p class=note>"
        + "<br>".join(escape(sampler_text(about, task)) for task in about["sampler"])
        + "</p>"
    ]
    if "judge" in report:
        parts += judge_section(report)
    if report.get("quality"):
        parts += quality_section(report)
    if report.get("motion"):
        parts += motion_section(report)
    if report.get("frechet"):
        parts += frechet_section(report)
    parts += pretrained_sections(report)
    if report.get("loss"):
        parts += loss_section(report)
        if "cells" in report["loss"]["Eq. 1"]:
            (output_dir / "heat_map.png").write_bytes(picture_bytes(plot_heat_maps(report["loss"])))
    for task, sheet in sheets(items, made, real, report.get("readings")).items():
        parts += [
            f"<h2>Samples: {task}</h2>",
            note(f"Given frames are framed. {sampler_text(about, task)}."),
            picture(task, sheet),
        ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation of '
        f"{escape(about['checkpoint'])}</title><style>{STYLE}</style>{chr(10).join(parts)}</html>"
    )
    write_whole(output_dir / "report.html", page)
    write_whole(output_dir / "report.json", json.dumps(report, indent=1))
