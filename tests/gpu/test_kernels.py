"""Every kernel on the device over its own cases, against NumPy float64, and under compute-sanitizer."""

import math
from pathlib import Path

import pytest

from benchmarks.gpu import cases
from benchmarks.gpu.kernel_library import KernelLibrary

from .conftest import DEVICE

pytestmark = pytest.mark.gpu


def test_kernels_match_float64(kernels: Path) -> None:
    results = cases.run_cases(kernels, DEVICE, 600.0)
    assert len(results) == len(KernelLibrary(kernels).cases)
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
