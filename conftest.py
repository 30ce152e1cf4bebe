"""Code blocks of README.md and docs/*.md run as tests: `pytest README.md docs`."""

from importlib.util import find_spec

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

# Pages about a framework run where that framework is installed.
NEEDS = {"tensorflow.md": "tensorflow"}

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
    excludes=[f"docs/{page}" for page, module in NEEDS.items() if find_spec(module) is None],
).pytest()
