"""How errors at the public edge are worded: function, argument, what it had, what it needs."""

from __future__ import annotations


def describe_axes(ndim: int) -> str:
    """'its axes are 0 and 1 (or -2, -1)': the valid axes of an array with `ndim` dimensions."""
    if ndim == 0:
        return "it has no axes: pass ()"
    positive = [str(i) for i in range(ndim)]
    negative = [str(i - ndim) for i in range(ndim)]
    listed = positive[0] if ndim == 1 else ", ".join(positive[:-1]) + " and " + positive[-1]
    noun = "axis is" if ndim == 1 else "axes are"
    return f"its {noun} {listed} (or {', '.join(negative)})"
