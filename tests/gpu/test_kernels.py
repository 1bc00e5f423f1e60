"""Kernels that were packed with their cases, on the device against NumPy float64, and under compute-sanitizer.

In a checkout `tests/kernels/test_cases.py` compiles the kernels and runs their cases.
"""

import math
from pathlib import Path

import pytest

from benchmarks.gpu import cases
from benchmarks.gpu.kernel_library import KernelLibrary

from .conftest import DEVICE, KERNELS

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(not (KERNELS / "kernels.json").is_file(), reason=f"no packed kernels in {KERNELS}")
def test_kernels_match_float64() -> None:
    results = cases.run_cases(KERNELS, DEVICE, 600.0)
    assert len(results) == len(KernelLibrary(KERNELS).cases)
    failed = [result for result in results if not result.passed]
    crashed = [result for result in failed if math.isnan(result.nmse)]
    text = "\n".join(f"NMSE {result.nmse:.1e}, bound {result.bound:.1e}: {result.name}" for result in failed)
    assert not failed, f"{len(failed)} of {len(results)} cases, {len(crashed)} without a result:\n{text}"


@pytest.mark.slow
def test_sanitizer_finds_nothing(kernels: Path) -> None:
    verdicts = cases.sanitize(kernels, DEVICE, 1800.0)
    if missing := [verdict for verdict in verdicts.values() if "not installed" in verdict]:
        pytest.skip(missing[0])
    assert all(verdict.startswith("0 errors") for verdict in verdicts.values()), verdicts
