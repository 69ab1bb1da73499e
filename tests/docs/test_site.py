"""The site builds without a warning, and its API page has every public name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import krony

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    # Unresolved links and anchors, pages that no one reaches, and docstrings that say something
    # else than the signature are warnings, and --strict makes errors of them.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_public_name_has_an_entry(site):
    page = (site / "api.html").read_text(encoding="utf-8")
    missing = [name for name in krony.__all__ if f'id="krony.{name}"' not in page]
    assert not missing, f"no docstring, or not imported in krony/__init__.py: {missing}"


def test_pages_ask_nothing_of_the_network(site):
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]+)"',
            page.read_text(encoding="utf-8"),
        )
        assert not fetched, f"{page.name}: {fetched}"
