"""
What summary.py counted, as report.json, and as report.md with its pictures beside it.
"""

import json
from functools import partial

from lab import pictures
from support.common import printable, replacing, table
from support.pictures import save_png

TEXTS = {
    "sampler": """\
{task}: {num_inference_steps} DDIM steps, eta {eta:g}, text guidance {guidance_scale:g}, image guidance \
{image_guidance_scale:g}""",
    "judge": """
A judge, trained on drawn stickers of the training combinations, reads colour, subject and motion. First its
own accuracy, on {clips} real clips of held-out combinations.""",
    "text": """
The share of samples on which the judge reads what the prompt says ± a binomial standard error (with two more
of each kind counted). Held out: this combination of words was never trained on. {sampler}.""",
    "image": "Colour and subject can be read off the given frame; the motion only from the text. {sampler}.",
    "quality": """
The truth is the clip as the codec gives it back, so the codec's own loss does not count. Baselines see its
given frames. Unknown frames are the others; given ones are compared as the model returns them.""",
    "motion": """
Motion: mean absolute difference of consecutive frames; grain that flickers counts too, and hardly in the
means of 8 x 8 pixels (without grain). Distinct: differs by 1 of 255 or more from all before. Still: motion
without grain below a tenth of the real mean. Wrap: change from the last frame to the first one, divided by
the mean of the other changes, median; about 1 in a loop. {samplers}.""",
    "rivals": """
Samples of the network beside what needs no network. Gaussian: a sample of the fitted one that the network
starts from; its mean: its best guess. Real clips say what is right. All but "read" is of unknown frames
alone. Read: the judge reads colour, subject and motion of the prompt. Frechet: over features of a small
network of fixed random weights, of pairs of consecutive frames; comparable only between runs of this
program with the same stickers, resolution and number of clips; not FVD, not FID. Grain: roughness of the
calmest part of the figure; patches: how far its colour strays; specks: ink on the white ground; all three
of 255, beyond real clips. Edges: fall of light across the figure's border within two pixels, of 255. Leak:
share of the figure's colour that no closed dark outline separates from the ground. Pieces: of ink, in a
frame. Told: frames that a classifier, fitted to one half of the clips, tells from real ones in the other
half: chance is 50 %, 100 % means that none passes. PSNR in dB; a mean of samples wins it and looks like a
fog.""",
    "use": """
Held-out loss over unknown frames, k = 8, while the network is shown nothing, the text, the given frames, or
both, on the same clips, timesteps and noise. Beside text: both / text; alone: frames / nothing. 1: given
frames are worth nothing. The Gaussian's own is what they say without the network. ± is one standard
error.""",
    "kept": """
How far unknown frames stray from the given ones of their clip: colour of the figure, of 255; its size and
the dark share of it, in percent. Real clips stray as far as their motion asks for; closer is no better.""",
    "fvd": """
I3D wants more than 8 frames: every frame was shown twice. With so few clips and repeated frames this must not
be compared with the paper's number or any other.""",
    "loss": """
{draws} draws of held-out clips of 8 key frames; draw i has the same clip, timestep and noise for every task
and every k. "Eq. 1" is the squared error of the noise; "balanced" weighs it with min(SNR + 1, 5) / SNR, as
the error of the clean latents, since Eq. 1 itself tells mostly of small timesteps. ± is one standard error.
Given frames count in the loss, as in training, and are easy: the views of unknown frames leave them out.""",
    "order": """
Does the paper's order hold? H(task, k) is the loss; differences, right minus left, are taken draw by draw.
Refuted: by more than two standard errors.""",
    "sheet": "Given frames are outlined. {sampler}.",
}

# ------------------------------------------------------------------------------------------------------------
# Sections: the report, or a part of it, as a list of paragraphs


def number(value, digits=3):
    """A number, a {"mean", "se"} or a {"share", "se"} as text; "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, dict) and "share" in value:
        return f"{value['share']:.0%} ± {value['se']:.0%}"
    if isinstance(value, dict):
        return f"{value['mean']:.{digits}f} ± {value['se']:.{digits}f}"
    return f"{value:.{digits}f}" if isinstance(value, float) else printable(value)


def sampler_text(about, *tasks):
    """How the samples of some tasks were made, of all by default: stated with every figure."""
    samplers = about["sampler"]
    return "; ".join(TEXTS["sampler"].format(task=task, **samplers[task]) for task in tasks or samplers)


def about_section(report):
    about = report["about"]
    rows = [(name.replace("_", " "), number(value, 4)) for name, value in about.items() if name != "sampler"]
    return ["# Evaluation", table(("setting", ""), rows), sampler_text(about) + "."]


def judge_section(report):
    exam = report["judge"]
    rows = [(name, *(f"{share:.1%}" for share in exam[name].values())) for name in ("raw", "round trip")]
    parts = ["## Text adherence", TEXTS["judge"].format(**exam)]
    parts.append(table(("the judge on real clips", *exam["raw"]), rows))
    for task, title in (("text", "samples from text"), ("image", "samples from text and first frame")):
        if task in report:
            groups, attributes = report[task], report[task]["all"]
            counted = {f"{name} ({entry['colour']['count']})": entry for name, entry in groups.items()}
            rows = [(name, *map(number, entry.values())) for name, entry in counted.items()]
            rows.append(("chance", *(f"{entry['chance']:.1%}" for entry in attributes.values())))
            note = TEXTS[task].format(sampler=sampler_text(report["about"], task))
            parts += [table((title, *attributes), rows), note]
    return parts


def quality_section(report):
    parts = ["## Frames against the ground truth", TEXTS["quality"]]
    for task, groups in report["quality"].items():
        rows = []
        for which, entries in groups.items():
            for name, e in entries.items():
                rows.append((f"{which} frames: {name}", number(e["psnr"], 2), number(e["ssim"])))
        note = sampler_text(report["about"], task) + "."
        parts += [f"### {task}", table(("", "PSNR, dB", "SSIM"), rows), note]
    return parts


def value_rows(section, digits):
    """A row of numbers for each entry of a section."""
    return [(name, *(number(value, digits) for value in entry.values())) for name, entry in section.items()]


def motion_section(report):
    header = ("", "motion, of 255", "without grain", "distinct frames of 8", "still clips", "wrap")
    note = TEXTS["motion"].format(samplers=sampler_text(report["about"]))
    return ["## Motion", table(header, value_rows(report["motion"], 2)), note]


COLUMNS = {  # of a table of rivals: title and digits
    "read": ("read", 0),
    "frechet": ("Frechet", 2),
    "grain": ("grain", 1),
    "patches": ("patches", 1),
    "specks": ("specks", 1),
    "edges": ("edges", 0),
    "leak": ("leak", 2),
    "pieces": ("pieces", 1),
    "told": ("told", 2),
    "psnr": ("PSNR", 2),
}


def rivals_section(report):
    parts = ["## Beside trivial rivals", TEXTS["rivals"]]
    for task, entries in report["rivals"].items():
        columns = list(next(iter(entries.values())))
        header = ("", *(COLUMNS[column][0] for column in columns))
        rows = [(name, *(number(row[c], COLUMNS[c][1]) for c in columns)) for name, row in entries.items()]
        parts += [f"### {task}", table(header, rows), sampler_text(report["about"], task) + "."]
    return parts


def given_section(report):
    section, parts = report["given frames"], ["## Use of given frames"]
    for whose in ("loss", "Gaussian's loss"):
        for view, entries in section.get(whose, {}).items():
            header = (f"{whose}, {view}", *next(iter(entries.values())))
            parts.append(table(header, value_rows(entries, 3)))
    if "loss" in section:
        parts.append(TEXTS["use"])
    if "kept" in section:
        parts.append(TEXTS["kept"])
        for task, entries in section["kept"].items():
            header = (task, "colour, of 255", "size, %", "outline, %")
            parts += [table(header, value_rows(entries, 1)), sampler_text(report["about"], task) + "."]
    return parts


def fvd_section(report):
    header = ("samples", "FVD", "clips", "real clips")
    return ["## FVD", table(header, value_rows(report["fvd"], 1)), TEXTS["fvd"]]


def score_section(report, name, title):
    return [f"## {title}", table(("samples", "model", "real clips"), value_rows(report[name], 4))]


def order_tables(loss):
    """Which of the paper's inequalities the measured loss obeys, a column per view."""

    def verdict(c):
        word = "holds" if c["holds"] else "**refuted**" if c["refuted"] else "no, within two standard errors"
        return f"{c['difference']:+.4f} ± {c['se']:.4f} {word}"

    parts = []
    for order in ("order of tasks", "order of lengths"):
        rows = []
        for views in zip(*(entry[order] for entry in loss.values())):
            (easy, j), (hard, k) = views[0]["easier"], views[0]["harder"]
            rows.append((f"H({easy}, {j}) <= H({hard}, {k})", *map(verdict, views)))
        count = [[sum(c[word] for c in e[order]) for e in loss.values()] for word in ("holds", "refuted")]
        rows.append(
            (f"of {len(rows)}", *(f"{held} hold, {refuted} refuted" for held, refuted in zip(*count)))
        )
        parts.append(table((order, *loss), rows))
    return parts


def loss_section(report, output_dir):
    loss = report["loss"]
    header = ("loss", "text only, k = 8", "mean of all (task, k)")
    rows = [(v, number(e["text only, k = 8"], 4), number(e.get("mean"), 4)) for v, e in loss.items()]
    parts = [
        "## Held-out loss",
        TEXTS["loss"].format(draws=report["about"]["loss_draws"]),
        table(header, rows),
    ]
    if "cells" in loss["Eq. 1"]:
        save_png(pictures.plot_heat_maps(loss), output_dir / "heat_map.png")
        save_png(pictures.plot_timesteps(loss), output_dir / "timesteps.png")
        parts += ["![heat map](heat_map.png)", "![loss over timesteps](timesteps.png)"]
        parts += [TEXTS["order"], *order_tables(loss)]
    return parts


def sheet_sections(report, clips, output_dir):
    parts = []
    for task in report["about"]["sampler"]:
        sheet = pictures.sample_sheet(task, clips, report.get("readings"))
        save_png(sheet, output_dir / f"samples-{task}.png")
        note = TEXTS["sheet"].format(sampler=sampler_text(report["about"], task))
        parts += [f"## Samples: {task}", note, f"![{task}](samples-{task}.png)"]
    return parts


# ------------------------------------------------------------------------------------------------------------


def write_report(output_dir, report, clips):
    """Writes report.md, its pictures, and last report.json. report: of summary.summarize; clips:
    summary.Clips"""
    sections = {
        "judge": judge_section,
        "rivals": rivals_section,
        "given frames": given_section,
        "quality": quality_section,
        "motion": motion_section,
        "fvd": fvd_section,
        "clip_similarity": partial(score_section, name="clip_similarity", title="CLIP similarity"),
        "vqa": partial(score_section, name="vqa", title="Video quality (external program)"),
        "loss": partial(loss_section, output_dir=output_dir),
    }
    parts = about_section(report)
    for name, section in sections.items():
        parts += section(report) if report.get(name) else []
    parts += sheet_sections(report, clips, output_dir)
    page = "\n\n".join(part.strip() for part in parts) + "\n"
    for name, text in (("report.md", page), ("report.json", json.dumps(report, indent=1))):
        with replacing(output_dir / name) as writing:
            writing.write_text(text, encoding="utf-8")
