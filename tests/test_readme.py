"""What the README and the pages under docs/ tell a reader to type works, and their links lead somewhere.

A fenced ``bash`` block after ``<!-- test -->`` is run; after ``<!-- test: slow -->`` its ``autocompress`` lines are
only parsed: commands, options, required values and choices must exist. Blocks of one page share a folder, in their
order, in which the repository's own files are found under their names; what is written stays out of the repository.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))) if p.exists()]
BLOCK = re.compile(r"^<!-- test(: slow)? -->\s*\n```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OPERATORS = {"&&", "||", ";", "|", "&"}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    slow: bool
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, text: str) -> list[Block]:
    return [
        Block(page, text[: m.start()].count("\n") + 1, m.group(1) is not None, m.group(2)) for m in BLOCK.finditer(text)
    ]


def commands(code: str) -> list[list[str]]:
    """Return the words after ``autocompress`` of every such command in shell code."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if word not in OPERATORS:
                command.append(word)
                continue
            while command and re.fullmatch(r"\w+=.*", command[0]):  # NAME=value before a command
                command = command[1:]
            if command and Path(command[0]).name == "autocompress":
                stop = next((i for i, w in enumerate(command) if w in {">", ">>", "<"}), len(command))
                found.append(command[1:stop])
            command = []
    return found


def check(command: click.Command, words: list[str], name: str, parent: click.Context | None = None) -> None:
    """Parse words as click would, but touch no file and call nothing.

    Raises:
        click.UsageError: An unknown command or option, a missing or superfluous value, or no such choice.
    """
    context = click.Context(command, info_name=name, parent=parent)
    values, rest, _ = command.make_parser(context).parse_args(list(words))
    for parameter in command.get_params(context):
        value = values.get(parameter.name or "")
        given = isinstance(value, str) or (isinstance(value, (list, tuple)) and any(v is not None for v in value))
        if "--help" in words:
            continue
        if parameter.required and not given:
            raise click.MissingParameter(ctx=context, param=parameter)
        if given and isinstance(parameter.type, click.Choice):
            for item in [value] if isinstance(value, str) else value:
                parameter.type.convert(item, parameter, context)
    if isinstance(command, click.Group):
        if not rest:
            return
        inner = command.get_command(context, rest[0])
        if inner is None:
            raise click.UsageError(f"No such command {rest[0]!r}.", context)
        check(inner, rest[1:], rest[0], context)
    elif rest:
        raise click.UsageError(f"Unexpected words {rest}.", context)


def program() -> click.Group:
    """Return the command line's outermost group, whatever the function around it."""
    from autocompress import cli

    groups = [v for v in vars(cli).values() if isinstance(v, click.Group)]
    inner = {c for g in groups for c in g.commands.values()}
    (outermost,) = [g for g in groups if g not in inner]
    return outermost


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """One folder a page, with links to the repository's own files."""
    made = {}
    for page in PAGES:
        made[page] = tmp_path_factory.mktemp(page.stem)
        for entry in ROOT.iterdir():
            if not entry.name.startswith(".") and entry.name not in {"runs", "build", "dist"}:
                (made[page] / entry.name).symlink_to(entry)
    return made


ALL = [b for page in PAGES for b in blocks(page, page.read_text())]


@pytest.mark.parametrize("block", [b for b in ALL if not b.slow], ids=str)
def test_a_block_runs(block: Block, folders: dict[Path, Path]) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    answer = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        cwd=folders[block.page],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, f"{block.code}\n{answer.stdout}\n{answer.stderr}"


@pytest.mark.parametrize("block", ALL, ids=str)
def test_a_block_uses_commands_and_options_that_exist(block: Block) -> None:
    for words in commands(block.code):
        try:
            check(program(), words, "autocompress")
        except click.UsageError as error:
            pytest.fail(f"autocompress {shlex.join(words)}: {error.format_message()}")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    targets = [t.partition("#")[0] for t in LINK.findall(FENCE.sub("", page.read_text()))]
    missing = [t for t in targets if t and "://" not in t and not (page.parent / t).exists()]
    assert not missing


# -- the reader of blocks itself ------------------------------------------------------------------------------------


def test_blocks_are_found_with_their_kind() -> None:
    text = "# x\n<!-- test -->\n```bash\na\n```\n```bash\nno\n```\n<!-- test: slow -->\n\n```bash\nb \\\n  c\n```\n"
    found = blocks(ROOT / "README.md", text)
    assert [(b.line, b.slow, b.code) for b in found] == [(2, False, "a\n"), (9, True, "b \\\n  c\n")]


def test_commands_are_found_in_shell_code() -> None:
    code = "cd x && A=1 autocompress search --out 'a b' \\\n  --resume  # why\npip install autocompress\n"
    code += ".venv/bin/autocompress env > env.json; autocompress pareto runs/x | head\n"
    assert commands(code) == [["search", "--out", "a b", "--resume"], ["env"], ["pareto", "runs/x"]]


@click.group()
@click.option("--debug", is_flag=True)
def example() -> None: ...


@example.command()
@click.argument("run", type=click.Path(exists=True))
@click.option("--to", required=True)
@click.option("--engine", type=click.Choice(["openvino", "onnxruntime"]))
@click.option("--set", "sets", multiple=True)
def deploy(**_: object) -> None: ...


@pytest.mark.parametrize(
    "line", ["--help", "--debug deploy runs/x --to y", "deploy --help", "deploy x --to y --set a=1 --engine openvino"]
)
def test_valid_lines_are_accepted(line: str) -> None:
    check(example, line.split(), "autocompress")


@pytest.mark.parametrize(
    "line",
    ["deplyo x", "deploy x", "deploy --to y", "deploy x --too y", "deploy x z --to y", "deploy x --to y --engine trt"],
)
def test_invalid_lines_are_refused(line: str) -> None:
    with pytest.raises(click.UsageError):
        check(example, line.split(), "autocompress")
