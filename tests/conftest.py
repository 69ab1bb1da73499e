"""Shared fixtures. The Hub is switched off: a test must never depend on a network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers

from helpers import tiny

torch.set_num_threads(1)  # the models are so small that a second thread only waits
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # again: a test may leave more


@pytest.fixture
def gpt2():
    return tiny("gpt2")


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command line in this process: run("info", "demo") -> (exit code, out, err)."""
    from krony import cli

    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["krony", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
