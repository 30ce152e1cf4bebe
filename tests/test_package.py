"""The package as a whole: what an import loads, and what is public."""

import subprocess
import sys

import tangents

FRAMEWORKS = ["tensorflow", "keras", "torch", "flax", "equinox", "haiku", "scipy", "matplotlib"]


def test_import_loads_no_framework_but_jax():
    """In a fresh interpreter: what `import tangents` brings beyond `import jax`."""
    code = (
        "import sys, jax, jax.numpy, jaxtyping; before = {m.split('.')[0] for m in sys.modules}\n"
        "import tangents, tangents.stax, tangents.predict\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules} - before))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = set(run.stdout.split())
    assert "tangents" in new
    assert not new & set(FRAMEWORKS), new
    assert new - set(sys.stdlib_module_names) == {"tangents"}, new


def test_public_names_are_there_and_documented():
    for name in tangents.__all__:
        value = getattr(tangents, name)
        if not name.startswith("__"):
            assert value.__doc__ and len(value.__doc__) > 40, name
    assert list(tangents.__all__) == sorted(tangents.__all__)
