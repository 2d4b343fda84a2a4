"""The command line: usage, help, and how errors are shown."""
from concurrent.futures.process import BrokenProcessPool

import pytest
from conftest import HERE, call
from small_runs import fails, run

from harness import cli
from harness.errors import UserError


@pytest.mark.parametrize("flags, word", [
    (["--seed", "-1"], "--seed"), (["--seed", str(2 ** 63)], "--seed"), (["--device", "meta"], "meta"),
    (["--k", "0"], "--k"), (["--nonsense"], "--nonsense"), (["--warmup-steps", "1.5"], "--warmup-steps")])
def test_usage_errors_are_one_line(folder, flags, word):
    fails(run(folder, *flags), word)


@pytest.mark.parametrize("flag, meant", [
    ("--sim-weight", "--ssim-weight"), ("--output-foldr=some-long-name", "--output-folder"), ("--zzz", None),
    ("", None), ("--zzz --sim-weight", "--ssim-weight")])
def test_an_unknown_flag_gets_the_nearest_one(folder, flag, meant):
    code, _, err = run(folder, *flag.split(" "))
    line = f"unrecognized arguments: {flag}" + (f": did you mean {meant}? (" if meant else " (")
    assert code == 2 and line in err


@pytest.mark.parametrize("script", [path.name for path in HERE.glob("*.py") if "cli.run(main)" in path.read_text()])
def test_help_explains_every_flag_and_shows_its_default(tmp_path, script, monkeypatch):
    parsers = []
    monkeypatch.setattr(cli.Parser, "print_help", lambda self, *_: parsers.append(self))
    assert call(tmp_path, script, "--help")[0] == 0
    parser, = parsers
    show = parser._get_formatter()._get_help_string
    for action in parser._actions:
        assert action.help, action.option_strings
        assert action.required or action.default in (None, False, "==SUPPRESS==", []) or "default" in show(action)
        assert "`" not in action.help
    titles = [group.title for group in parser._action_groups if group._group_actions]
    assert len(titles) == len(set(titles)) and sum("data" in title.lower().split() for title in titles) <= 1


def test_errors_of_many_lines_are_shown_whole(capsys):
    def main():
        raise UserError("first\n  second: not to lose")
    with pytest.raises(SystemExit):
        cli.run(main)
    assert capsys.readouterr().err.endswith("error: first second: not to lose\n")


@pytest.mark.parametrize("error", [BrokenProcessPool("abruptly"), RuntimeError("DataLoader worker (pid 7) exited")])
def test_a_killed_helper_is_one_line(capsys, error):
    def main():
        raise error
    with pytest.raises(SystemExit):
        cli.run(main)
    err = capsys.readouterr().err
    assert "was killed" in err and err.count("\n") == 1
