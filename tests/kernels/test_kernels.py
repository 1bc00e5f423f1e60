"""Every kernel on every backend that is present, over its own cases, against NumPy float64."""

import numpy as np
import pytest
import tvm

from tvm_attn import kernels, targets
from tvm_attn.schedule import schedule

CASES = [case for family in kernels.FAMILIES for case in family.cases()]
_compiled = {}


def _function(kernel, target):
    if (kernel, target.name) not in _compiled:
        module = tvm.IRModule({"main": schedule(kernel, target).with_attr("global_symbol", "main")})
        _compiled[kernel, target.name] = tvm.tirx.build(module, target=tvm.target.Target(target.tvm))["main"]
    return _compiled[kernel, target.name]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel}-{case.name}")
def test_kernel_matches_float64(case):
    run = _function(case.kernel, targets.detect_cpu())
    inputs = [tvm.runtime.tensor(array) for array in case.inputs]
    outputs = [tvm.runtime.tensor(array) for array in case.outputs]
    run(*inputs, *outputs)
    results = [inputs[index] for index in case.in_place] + outputs
    assert len(results) == len(case.expected)
    for result, expected in zip(results, case.expected, strict=True):
        difference = result.numpy().astype(np.float64) - expected
        assert not np.isnan(difference).any()
        assert (difference**2).sum() <= case.nmse * (expected**2).sum()
