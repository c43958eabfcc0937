"""Products on units that this processor may not have: AMX through a library that does the same, and vectors of 256 bits."""
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")
HERE = Path(__file__).parent
WHAT = ["test_kernels.py::test_random_shapes", "test_kernels.py::test_a_cell_in_tiles_is_the_same_whoever_its_neighbours_are", "test_kernels.py::test_threads_and_batches",
        "test_methods.py::test_compiled_steps_have_the_losses_of_dense_ones", "test_methods.py::test_a_compiled_chain_draws_and_steps_as_the_plain_one",
        "test_methods.py::test_training_in_bfloat16_ends_near"]
WHICH = "not plain- and not compiled- and not False-"
VECTORS = "+sse4.2,+popcnt,+bmi,+bmi2,+avx,+avx2,+fma"


def run(tmp_path, more, *options):
    "Run the tests of tiles and chains in a process with another environment."
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])} | more
    p = subprocess.run([sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", *options, "-k", WHICH, *WHAT], env=env, cwd=HERE, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout[-3000:] + p.stderr[-1000:]
    told = p.stdout.strip().splitlines()[-1]
    assert int(told.split(" passed")[0]) >= 28, told  # vectors of 256 bits multiply no bfloat16, which leaves one out


@pytest.mark.skipif(platform.system() != "Linux" or not shutil.which("cc"), reason="needs a C compiler on Linux")
def test_matrix_units(tmp_path):
    library = tmp_path / "units.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", HERE / "units.c", "-o", library], check=True)
    run(tmp_path, {"UNITS": str(library)}, "-p", "emulated")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="of this kind of processor")
def test_narrow_vectors(tmp_path): run(tmp_path, {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": VECTORS})
