"""Help that a newcomer can read: headings, words instead of types, an example that parses."""

import re
import shlex

import pytest
import typer

from krony.cli import app
from krony.words import parse_count, parse_size

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def options(command):
    return [p for p in command.params if p.param_type_name == "option"]


def example(name):
    """The arguments of a command's example, without krony and the command."""
    line = COMMANDS[name].epilog.removeprefix("Example: ")
    program, called, *arguments = shlex.split(line)
    assert (program, called) == ("krony", name)
    return arguments


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_parses(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with COMMANDS[name].make_context(name, example(name)) as context:
        given = context.params
    # What a command reads as a number or a size itself is one.
    assert parse_size(given.get("params"), 1_000_000) != 0
    for count in ("tokens", "batch_tokens"):
        if isinstance(given.get(count), str):
            assert parse_count(given[count]) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_no_option_does_not_parse(name, tmp_path, monkeypatch):
    # So that the test above can fail.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match="--nothing"):
        COMMANDS[name].make_context(name, [*example(name), "--nothing"])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_headings_and_words_and_the_example(name, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = run(name, "--help")
    assert code == 0
    # An example wraps where a terminal ends.
    assert " ".join(COMMANDS[name].epilog.split()) in " ".join(out.split())
    assert not re.search(r"<(str|int|float|bool|path)>", out), out
    for option in options(COMMANDS[name]):
        assert option.rich_help_panel, f"{option.opts} has no heading"
        assert f"─ {option.rich_help_panel} ─" in out
        choice = getattr(option.type_descriptor, "is_choice", False)
        assert option.is_flag or choice or option.metavar, f"{option.opts} takes what?"
    # What is in brackets, extras to install say, is not taken for markup.
    for extra in re.findall(r"krony\\?\[(\w+)\]", str([o.help for o in options(COMMANDS[name])])):
        assert f"krony[{extra}]" in out


def test_compress_and_plan_have_their_headings():
    wanted = {"How small", "How it is found", "Text to calibrate on", "Machine", "Output"}
    for name in ("plan", "compress"):
        assert {option.rich_help_panel for option in options(COMMANDS[name])} == wanted


def test_every_command_stands_under_a_heading(run):
    code, out, _ = run("--help")
    assert code == 0
    headings = {command.rich_help_panel for command in COMMANDS.values()}
    assert len(headings) == 4
    for heading in headings:
        assert f"─ {heading} ─" in out
    assert "─ Commands ─" not in out
    assert "<bool>" not in out


def test_compress_ends_with_what_to_do_next(run, tmp_path):
    small = tmp_path / "my small"
    quick = ["--small", "2x2", "--init", "van-loan", "--layout", "small-outer"]
    code, out, err = run("compress", "demo", small, *quick)
    assert code == 0, err
    last = out.splitlines()[-1]
    assert last.startswith("Next: krony evaluate ")
    for name, wanted in {
        "evaluate": {"source": str(small), "against": "demo"},
        "heal": {
            "source": str(small),
            "destination": tmp_path / "my small-healed",
            "teacher": "demo",
        },
    }.items():
        line = re.search(rf"krony {name} (.*?) (measures|wins)", last)[1]
        with COMMANDS[name].make_context(name, shlex.split(line)) as context:
            assert wanted.items() <= context.params.items()
    assert "Predicted harm" not in out  # of a plan that no budget found nothing is predicted
