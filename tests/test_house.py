"""
The order of the house: which way imports run, how long files and functions are, whether the commands of the
documents exist. Each rule is also tried on made-up texts that break it.
"""

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import sys
import tokenize
from pathlib import Path
from unittest import mock

import pytest
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parents[1]
# The six files of the method with their floors: imports run downwards.
SIX = dict(masks=0, curriculum=1, model=1, data=1, sample=2, train=3)
ROOMS = ("support", "lab", "tests")
PROGRAMS = ["train", "sample", "data", "support.stickers"]
PROGRAMS += [
    "lab.evaluate",
    "lab.ablate",
    "lab.arm",
    "lab.bench",
    "lab.simulate_curriculum",
    "lab.train_vae",
    "lab.ship",
    "lab.gallery",
    "lab.longer",
    "lab.matte",
    "lab.page",
    "lab.rank",
    "lab.rank_table",
    "lab.scenes",
    "lab.driving",
    "lab.compare",
]


def texts(*paths):
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


SOURCES = texts(*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py")))
DOCUMENTS = texts(ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("pretrained/**/*.md"))


# Imports


def imported(source):
    """The names of the modules that a source imports, anywhere in it; relative ones begin with a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def wrong_imports(path, source):
    """The imports of the file `path` that the rules do not allow, a list of module names."""
    room = path.split("/")[0].removesuffix(".py")
    below = {name for name in SIX if SIX[name] < SIX.get(room, -1)}
    allowed = {
        "support": {"support"},
        "lab": {"support", "lab", *SIX},
        "tests": {"tests", "support", "lab", *SIX},
    }.get(room, {"support"} | below)
    ours = {*ROOMS, *SIX}
    names = [(name, name.split(".")[0]) for name in imported(source)]
    return [name for name, first in names if not first or first in ours - allowed]


def test_imports_run_downwards():
    wrong = {path: names for path, source in SOURCES.items() if (names := wrong_imports(path, source))}
    assert not wrong, str(wrong)


@pytest.mark.parametrize(
    "path, source, wrong",
    [
        ("support/media.py", "import numpy\nfrom support.common import table\nfrom support import cache", []),
        ("support/media.py", "import masks", ["masks"]),
        ("support/media.py", "def f():\n    from lab.metrics import psnr", ["lab.metrics"]),
        ("support/media.py", "from .common import table", [".common"]),
        ("model.py", "import masks, support.machine", []),
        ("model.py", "import curriculum as c", ["curriculum"]),
        ("masks.py", "from support.common import table\nimport model", ["model"]),
        ("train.py", "import sample, data, model, curriculum, masks", []),
        ("sample.py", "import train, lab.judge, tests.toys", ["train", "lab.judge", "tests.toys"]),
        ("lab/bench.py", "import train, lab.judge, support.media", []),
        ("lab/bench.py", "from tests.toys import toy_unet", ["tests.toys"]),
        ("tests/test_model.py", "import train, lab.judge, tests.toys", []),
    ],
)
def test_imports_in_a_wrong_direction_are_found(path, source, wrong):
    assert wrong_imports(path, source) == wrong


# Sizes and formatting


def functions(source):
    """(name, number of lines) of every function and method, inner ones included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.end_lineno - node.lineno + 1


def test_only_the_six_files_stand_on_top():
    assert {path for path in SOURCES if "/" not in path} == {f"{name}.py" for name in SIX}


def test_the_six_files_are_short():
    lengths = {name: len(SOURCES[f"{name}.py"].splitlines()) for name in SIX}
    long = {name: length for name, length in lengths.items() if length > 400}
    assert not long, str(long)


def test_only_the_training_loop_is_a_long_function():
    lengths = [(f"{name}.{f}", lines) for name in SIX for f, lines in functions(SOURCES[f"{name}.py"])]
    long = [(name, lines) for name, lines in lengths if lines > 60 and name != "train.train"]
    assert not long, str(long)


def test_the_lines_of_functions_are_counted():
    source = "class A:\n  def b(self):\n    def c():\n      pass\n\n    return c\n\n\ndef d(): pass"
    assert dict(functions(source)) == dict(b=5, c=2, d=1)


def skips(source):
    """The lines of a source that a comment keeps from the formatter."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    return [token.line.strip() for token in comments if "fmt: skip" in token.string]


def closes_a_table(line):
    return re.fullmatch(r"[)\]}]+,?  # fmt: skip", line) is not None


def test_the_formatter_is_kept_off_tables_alone_and_at_most_eight():
    lines = [(path, line) for path, source in SOURCES.items() for line in skips(source)]
    assert all(closes_a_table(line) for _, line in lines) and len(lines) <= 8, str(lines)


def test_lines_kept_from_the_formatter_are_found():
    found = skips('TABLE = (\n    1,\n)  # fmt: skip\nx = f(1,2)  # fmt: skip\ny = "# fmt: skip"\n')
    assert [closes_a_table(line) for line in found] == [True, False]


# The paper's headings carry no numbers: they are named.
NUMBERED_HEADING = re.compile(r"(\b[Ss]ec(tions?|\.)|§)[\s#]*\d")


def test_headings_of_the_paper_are_named_not_numbered():
    matches = {path: NUMBERED_HEADING.search(text) for path, text in (SOURCES | DOCUMENTS).items()}
    found = {path: match.group() for path, match in matches.items() if match}
    assert not found, str(found)


def test_numbered_headings_are_found():
    for words in ("(section ", "Sections ", "Sec. ", "section\n    # "):
        assert NUMBERED_HEADING.search(f"{words}{3.1}")
    assert not NUMBERED_HEADING.search("a section of 3 lines, intersection 4, Table 7")


# Commands of the documents


def lines_of_code(document):
    """The lines of code in a Markdown text: those of its fenced blocks, with continued lines joined and the
    variables of a block filled in, then its inline code."""
    fence = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    for block in fence.findall(document):
        variables = dict(re.findall(r'^(\w+)="(.*)"$', block, re.MULTILINE))
        for line in block.replace("\\\n", " ").splitlines():
            yield re.sub(r"\$(\w+)", lambda match: variables.get(match[1], match[0]), line)
    for code in re.findall(r"`([^`]+)`", fence.sub("", document)):
        yield " ".join(code.split())


def calls(line):
    """The commands in a line of shell, a list of words each, without environment variables set for them."""
    call = []
    for word in [*shlex.split(line, comments=True), ";"]:
        if word in ("&&", "|", ";"):
            yield call
            call = []
        elif call or not re.match(r"\w+=", word):
            call.append(word)


def commands(document):
    """The calls of python and torchrun in a Markdown text; `torchrun --flag` alone is a mention, no call."""
    for line in lines_of_code(document):
        if not re.search(r"\b(python3?|torchrun)\s", line):
            continue
        for program, *words in filter(None, calls(line)):
            program, words = Path(program).name, [word for word in words if word not in ("...", "…")]
            named = "-m" in words or any(word.endswith(".py") for word in words)
            if (program == "torchrun" and named) or (program in ("python", "python3") and words):
                yield [program, *words]


class Parsed(Exception):
    """The command line was understood: the program would start now."""


def parse_and_stop(parser, *args, parse=argparse.ArgumentParser.parse_args, **more):
    parse(parser, *args, **more)
    raise Parsed


def complaint(run):
    """Calls `run` until a program has parsed its command line: what it said where it refused, else None."""
    said, stop = io.StringIO(), mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with contextlib.redirect_stderr(said), stop:
        try:
            run()
        except Parsed:
            return None
        except SystemExit as end:
            return said.getvalue() if end.code else None


def fault(words):
    """Why the command `words`, python or torchrun first, cannot be meant; None where it can."""
    launcher, *words = words
    if launcher == "torchrun":
        said = complaint(lambda: get_args_parser().parse_args(words))
        if said:
            return said
        torchrun, _ = get_args_parser().parse_known_args(words)
        words = ["-m"] * torchrun.module + [torchrun.training_script, *torchrun.training_script_args]
    if words[0] == "-m":
        module, flags = words[1], words[2:]
        if module.split(".")[0] not in {*ROOMS, *SIX}:
            return None if importlib.util.find_spec(module) else f"there is no module {module}"
    else:
        module, flags = words[0].removesuffix(".py").replace("/", "."), words[1:]
    source = SOURCES.get(module.replace(".", "/") + ".py")
    if source is None:
        return f"there is no program {module}"
    if module in PROGRAMS:
        with mock.patch.object(sys, "argv", [module, *flags]):
            return complaint(importlib.import_module(module).main)
    names = [flag.split("=")[0] for flag in flags if flag.startswith("--")]
    unknown = [name for name in names if f'"{name}"' not in source]
    return f"{module} has no {', '.join(unknown)}" if unknown else None


def test_the_commands_of_the_documents_can_be_typed():
    found = {shlex.join(words): words for text in DOCUMENTS.values() for words in commands(text)}
    faults = {command: reason for command, words in found.items() if (reason := fault(words))}
    assert found and not faults, str(faults)


def test_commands_are_found_in_blocks_and_in_sentences():
    document = """
Type `OMP_NUM_THREADS=1 python
train.py --seed 1`, or `train.py`, or `python`; `torchrun --max-restarts` too:
```bash
PARTS="--vae A"
python3 -m venv .venv && .venv/bin/python -m pytest
torchrun --nproc_per_node 8 \\
    train.py $PARTS   # eight
pip install python
```
"""
    assert [" ".join(words) for words in commands(document)] == [
        "python3 -m venv .venv",
        "python -m pytest",
        "torchrun --nproc_per_node 8 train.py --vae A",
        "python train.py --seed 1",
    ]


@pytest.mark.parametrize(
    "command, words",
    [
        ("python train.py --data stickers --preset tiny", None),
        ("python train.py --help", None),
        ("python train.py --no_such_flag", "--no_such_flag"),
        ("python train.py --preset huge", "huge"),
        ("python nowhere.py", "nowhere"),
        ("python -m lab.nowhere", "nowhere"),
        ("python -m no_such_module", "no_such_module"),
        ("python -m pytest --anything", None),
        ("python masks.py", None),
        ("python masks.py --k 3", "--k"),
        ("torchrun --nproc_per_node 8 train.py --preset full", None),
        ("torchrun --nproc_per_node 8 train.py --no_such_flag", "--no_such_flag"),
        ("torchrun --no_such_flag 8 train.py", "--no"),
        ("torchrun --nproc_per_node 8 nowhere.py", "nowhere"),
    ],
)
def test_commands_that_cannot_be_typed_are_found(command, words):
    said = fault(shlex.split(command))
    assert said is None if words is None else words in said


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_has_help(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(program).main()
    assert not end.value.code and capsys.readouterr().out.startswith("usage")
