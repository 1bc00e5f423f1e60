"""The backend as TVM sees it: compile, export, load without the compiler, time, detect; processes without Vulkan."""

import json
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvm_attn import vulkan as backend

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def target(vulkan: Any) -> Any:
    import tvm

    return tvm.target.Target.from_device("vulkan").with_host("llvm")


def elementwise(inputs: int) -> Any:
    """A scheduled module: out[i] = the sum of inputs[k][i] * (k + 1), of symbolic length n."""
    import tvm
    from tvm import te
    from tvm.s_tir import Schedule

    n = te.var("n", "int32")
    arrays = [te.placeholder((n,), name=f"x{k}") for k in range(inputs)]

    def total(i: Any) -> Any:
        value = arrays[0][i]
        for k in range(1, inputs):
            value = value + arrays[k][i] * tvm.tirx.const(k + 1, "float32")
        return value

    schedule = Schedule(te.create_prim_func([*arrays, te.compute((n,), total, name="total")]))
    (i,) = schedule.get_loops(schedule.get_sblock("total"))
    outer, inner = schedule.split(i, [None, 64])
    schedule.bind(outer, "blockIdx.x")
    schedule.bind(inner, "threadIdx.x")
    return schedule.mod


def upload(array: np.ndarray, device: Any) -> Any:
    import tvm

    return tvm.runtime.tensor(array, device)


@pytest.mark.parametrize("inputs", [1, 2, 20])
def test_compile(vulkan: Any, target: Any, inputs: int) -> None:
    """20 inputs have an argument block of 184 bytes: more than the push constants, so through a buffer."""
    import tvm

    library = tvm.compile(elementwise(inputs), target=target)
    random = np.random.default_rng(inputs)
    for count in (1, 1000):
        arrays = random.standard_normal((inputs, count), dtype=np.float32)
        outputs = [upload(np.zeros(count, np.float32), vulkan) for _ in range(3)]
        tensors = [upload(array, vulkan) for array in arrays]
        for out in outputs:  # the blocks of several launches are in flight together
            library["main"](*tensors, out)
        expected = np.arange(1, inputs + 1) @ arrays.astype(np.float64)
        for out in outputs:
            np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5, atol=1e-4)


def test_exported_library_runs_without_the_compiler(vulkan: Any, target: Any, tmp_path: Path, run_python: Run) -> None:
    import tvm

    path = tmp_path / "lib.so"
    tvm.compile(elementwise(2), target=target).export_library(str(path))
    code = f"""
from tvm_attn import vulkan as backend
import tvm, numpy as np
backend.autoload()
device = tvm.vulkan(0)
x, y = (tvm.runtime.tensor(np.full(100, value, "float32"), device) for value in (1, 0))
tvm.runtime.load_module({str(path)!r})["main"](x, x, y)
print(tvm.base._RUNTIME_ONLY, "tvm_attn.vulkan.codegen" in sys.modules, y.numpy().sum())
"""
    done = run_python(code)
    assert done.stdout.split() == ["True", "False", "300.0"], done.stderr


def test_virtual_machine(vulkan: Any, target: Any) -> None:
    import tvm
    from tvm import relax, tirx
    from tvm.s_tir import dlight

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((tirx.Var("n", "int64"), 64), "float32"))
    w = relax.Var("w", relax.TensorType((64, 32), "float32"))
    with builder.function("main", [x, w]):
        with builder.dataflow():
            product = builder.emit(relax.op.matmul(x, w))
            result = builder.emit_output(relax.op.nn.relu(product))
        builder.emit_func_output(result)
    with target:
        module = relax.transform.LegalizeOps()(builder.get())
        module = dlight.ApplyDefaultSchedule(dlight.gpu.Matmul(), dlight.gpu.Fallback())(module)
    machine = relax.VirtualMachine(tvm.compile(module, target=target), vulkan)
    random = np.random.default_rng(0)
    for rows in (1, 33):
        a, b = random.standard_normal((rows, 64)).astype("float32"), random.standard_normal((64, 32)).astype("float32")
        out = machine["main"](upload(a, vulkan), upload(b, vulkan)).numpy()
        expected = np.maximum(a.astype(np.float64) @ b, 0)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_time_evaluator_uses_the_timestamps_of_the_device(vulkan: Any, target: Any) -> None:
    import tvm

    library = tvm.compile(elementwise(2), target=target)
    x, out = (upload(np.ones(1000, np.float32), vulkan) for _ in range(2))
    evaluate = library.mod.time_evaluator("main", vulkan, number=10, repeat=3)
    before = backend.statistics()["operations"]
    assert evaluate(x, x, out).mean > 0
    # A call to warm up, then for each repeat ten calls between two timestamps.
    assert backend.statistics()["operations"] - before == 1 + 3 * (10 + 2)


def test_target_from_device_knows_the_limits(vulkan: Any) -> None:
    import tvm

    (device,) = (device for device in backend.devices() if device["index"] == 0)
    detected = tvm.target.Target.from_device("vulkan")
    assert detected.kind.name == "vulkan"
    assert detected.attrs["max_num_threads"] == device["limits"]["max_workgroup_invocations"]
    assert detected.attrs["max_shared_memory_per_block"] == device["limits"]["max_shared_memory_bytes"]
    assert detected.attrs["thread_warp_size"] == 1
    assert bool(detected.attrs["supports_float16"]) == device["features"]["float16"]


def test_device_attributes(vulkan: Any) -> None:
    (device,) = (device for device in backend.devices() if device["index"] == 0)
    assert vulkan.device_name == device["name"]
    assert vulkan.compute_version == device["api_version"]
    assert vulkan.max_thread_dimensions == device["limits"]["max_workgroup_size"]
    assert vulkan.total_global_memory == device["limits"]["memory_bytes"]
    assert 0 < vulkan.available_global_memory <= vulkan.total_global_memory
    assert vulkan.max_clock_rate is None


def test_module_shows_its_spirv(vulkan: Any, target: Any) -> None:
    import tvm

    (kernels,) = tvm.compile(elementwise(1), target=target).mod.imports
    text = kernels.inspect_source()
    assert "OpEntryPoint GLCompute" in text
    assert text.startswith("; main_kernel\n")


def test_device_that_does_not_exist(vulkan: Any) -> None:
    import tvm

    count = sum(device["index"] is not None for device in backend.devices())
    assert not tvm.vulkan(count).exist
    with pytest.raises(Exception, match=f"no device vulkan:{count}: there are {count}"):
        tvm.runtime.empty((1,), "float32", tvm.vulkan(count))


USE_A_DEVICE = """
from tvm_attn import vulkan as backend
import tvm
backend.autoload()
print(tvm.vulkan(0).exist)
try:
    tvm.runtime.empty((1,), "float32", tvm.vulkan(0))
except Exception as error:
    print(type(error).__module__, type(error).__name__)
    print(error)
"""


def test_no_driver(vulkan: Any, tmp_path: Path, run_python: Run) -> None:
    """The import and `exist` work; the first use says what is missing, in one line."""
    nothing = str(tmp_path / "none.json")
    done = run_python(USE_A_DEVICE, VK_ICD_FILENAMES=nothing, VK_DRIVER_FILES=nothing)
    exists, error_type, message = done.stdout.splitlines()
    assert exists == "False", done.stderr
    assert error_type == "tvm_attn.errors DeviceError"
    assert "driver" in message


def test_no_loader(vulkan: Any, tmp_path: Path, run_python: Run) -> None:
    for name in ("libvulkan.so.1", "libvulkan.so"):
        (tmp_path / name).write_bytes(b"no library")
    done = run_python(USE_A_DEVICE, LD_LIBRARY_PATH=str(tmp_path))
    exists, error_type, message = done.stdout.splitlines()
    assert exists == "False", done.stderr
    assert error_type == "tvm_attn.errors DeviceError"
    assert message.startswith("no Vulkan loader: libvulkan.so.1 is not installed")


def test_devices_are_chosen_by_index_or_name(vulkan: Any, run_python: Run) -> None:
    name = vulkan.device_name
    code = "from tvm_attn import vulkan\nprint([d['name'] for d in vulkan.devices() if d['index'] == 0])"
    for choice in ("0", name[:4].upper()):
        done = run_python(code, TVM_ATTN_VULKAN_DEVICE=choice)
        assert done.stdout.strip() == str([name]), done.stderr
    for choice in ("99", "no such device"):
        done = run_python(USE_A_DEVICE, TVM_ATTN_VULKAN_DEVICE=choice)
        assert f'TVM_ATTN_VULKAN_DEVICE: no device "{choice}"; there are 0 ' in done.stdout, done.stderr


def test_forked_process_is_told(vulkan: Any, run_python: Run) -> None:
    code = """
import os
from tvm_attn import vulkan as backend
import tvm
backend.autoload()
tensor = tvm.runtime.empty((1,), "float32", tvm.vulkan(0))
pid = os.fork()
if pid == 0:
    try:
        tensor.numpy()
    except backend.DeviceError as error:
        print(error, flush=True)
    del tensor
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = run_python(code)
    message, status = done.stdout.splitlines()
    assert "spawn" in message, done.stderr
    assert status == "0"


def test_validation_layer_is_asked_for(vulkan: Any, run_python: Run) -> None:
    """Without the variable there are no messages to read; with it the tests run, if the layer is installed."""
    code = "from tvm_attn import vulkan\nvulkan.devices()\nprint(vulkan.validation_messages())"
    assert "the validation layer is not running" in run_python(code, TVM_ATTN_VULKAN_VALIDATE="0").stderr
    if os.environ.get("TVM_ATTN_VULKAN_VALIDATE") != "1":
        pytest.skip("no validation layer: install vulkan-validationlayers")
    assert run_python(code).stdout.strip() == "[]"


def test_what_the_validation_layer_says_is_counted(
    vulkan: Any,
    pack: Callable[..., bytes],
    axpy_code: bytes,
    axpy_record: dict[str, Any],
    tmp_path: Path,
    run_python: Run,
) -> None:
    """A kernel whose SPIR-V declares one type twice, which drivers accept."""
    if os.environ.get("TVM_ATTN_VULKAN_VALIDATE") != "1":
        pytest.skip("no validation layer: install vulkan-validationlayers")
    words = list(struct.unpack(f"<{len(axpy_code) // 4}I", axpy_code))
    position = 5
    while words[position] & 0xFFFF != 54:  # OpFunction, which follows the types
        position += words[position] >> 16
    words[position:position] = [2 << 16 | 19, words[3]]  # OpTypeVoid, with an id of its own
    words[3] += 1
    code = struct.pack(f"<{len(words)}I", *words)
    path = tmp_path / "axpy"
    path.write_bytes(pack({**axpy_record, "size": len(code)}, code=code))
    program = f"""
from tvm_attn import vulkan as backend
import tvm, numpy as np, tvm_ffi
backend.autoload()
x = tvm.runtime.tensor(np.ones(64, "float32"), tvm.vulkan(0))
before = backend.statistics()["validation_messages"]
module = tvm_ffi.get_global_func("tvm_attn.vulkan.create_module")(open({str(path)!r}, "rb").read())
module["axpy"](x, x, x, 64, 1.0, 1, 64)
x.numpy()
messages = backend.validation_messages()
print(before, backend.statistics()["validation_messages"] == len(messages) > 0, "Duplicate" in messages[0])
"""
    done = run_python(program, silent=False)
    assert done.stdout.split() == ["0", "True", "True"], done.stderr
    assert "Vulkan validation: " in done.stderr


def test_statistics_are_json(vulkan: Any) -> None:
    from tvm_ffi import get_global_func

    assert json.loads(get_global_func("tvm_attn.vulkan.statistics")(0)).keys() == backend.statistics().keys()
