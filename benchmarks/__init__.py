"""This package against its peers, in turn, in one run: `python -m benchmarks`. See README.md."""
