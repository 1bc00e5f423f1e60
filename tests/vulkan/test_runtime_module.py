"""The module format: round trip, every check on malformed bytes, requirements against the device."""

import json
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tvm_attn import vulkan as backend
from tvm_attn.errors import ArtifactError, DeviceError

Pack = Callable[..., bytes]
Create = Callable[[bytes], Any]


def test_module_survives_its_bytes(vulkan: Any, create_module: Create, pack: Pack, axpy_record: dict[str, Any]) -> None:
    import tvm
    import tvm_ffi

    blob = pack(axpy_record)
    module = create_module(blob)
    assert module.kind == "vulkan"
    assert module.implements_function("axpy")
    assert not module.implements_function("other")
    again = tvm_ffi.get_global_func("ffi.Module.load_from_bytes.vulkan")(blob)
    x = tvm.runtime.tensor(np.ones(64, np.float32), vulkan)
    again["axpy"](x, x, x, 64, 2.0, 1, 64)
    np.testing.assert_array_equal(x.numpy(), np.full(64, 3.0))


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "0 bytes, less than a header"),
        (b"TVMATTNV\x01\0\0", "11 bytes, less than a header"),
        (b"TVMATTNX" + struct.pack("<II", 2, 0), "does not begin with"),
        (b"TVMATTNV" + struct.pack("<II", 1, 0), "version 1"),
        (b"TVMATTNV" + struct.pack("<II", 2, 1), "ends behind the module"),
        (b"TVMATTNV" + struct.pack("<II", 2, 0xFFFFFFFF) + b"{}", "ends behind the module"),
        (b"TVMATTNV" + struct.pack("<II", 2, 3) + b"{]}", "no JSON"),
        (b"TVMATTNV" + struct.pack("<II", 2, 2) + b"[]", "no JSON object"),
        (b"TVMATTNV" + struct.pack("<II", 2, 200_000) + b"[" * 200_000, "nested too deeply"),
        (b"TVMATTNV" + struct.pack("<II", 2, 500_004) + b'"\\""' + b'{"a":' * 100_000, "nested too deeply"),
        (b"TVMATTNV" + struct.pack("<II", 2, 28) + b'{"kernels":[],"\\"[[[[[[[[[[[[', "no JSON"),
        (b"TVMATTNV" + struct.pack("<II", 2, 2) + b"{}", 'no "kernels"'),
        (b"TVMATTNV" + struct.pack("<II", 2, 13) + b'{"kernels":1}', "not a list"),
        (b"TVMATTNV" + struct.pack("<II", 2, 15) + b'{"kernels":[1]}', "no JSON object"),
    ],
)
def test_malformed_header_is_refused(create_module: Create, blob: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=f"malformed Vulkan module: .*{message}.*build it again"):
        create_module(blob)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", 1, "name is no string"),
        ("name", "", "name is no string"),
        ("params", None, '"params" is not a list'),
        ("params", ["handle", 1, "handle", "int32", "float32"], "not a list of strings"),
        ("params", ["handle", "handle", "handle", "int32"], "differ in length"),
        ("params", ["handle", "handle", "handle", "int32", "int4"], '"int4" is unknown'),
        ("params", ["handle", "handle", "int32", "handle", "float32"], "behind a scalar"),
        ("reads", [True, True], "shorter than the handles"),
        ("reads", [True, True, False, True], "longer than the handles"),
        ("writes", [False, False], "shorter than the handles"),
        ("writes", [False, False, 1], "not a list of booleans"),
        ("launch_params", ["blockIdx.w"], '"blockIdx.w" is unknown'),
        ("launch_params", ["blockIdx.x", "blockIdx.x"], "occurs twice"),
        ("workgroup_size", [64, 1], "three numbers"),
        ("workgroup_size", [0, 1, 1], "three numbers"),
        ("workgroup_size", [64.0, 1, 1], "whole numbers"),
        ("block_size", 44, "not a multiple of 8"),
        ("block_size", 40, "holds 44 bytes"),
        ("block_size", 1 << 20, "at most 4096"),
        ("block_size", -8, "whole numbers"),
        ("block_offsets", [0, 8, 16, 24], "differ in length"),
        ("block_offsets", [0, 8, 12, 24, 28], "misplaced at offset 12"),
        ("block_offsets", [0, 8, 8, 24, 28], "misplaced at offset 8"),
        ("block_offsets", [0, 8, 16, 24, 4294967292], "misplaced at offset 4294967292"),
        ("shared_bytes", True, "whole numbers"),
        ("subgroup_size", 12, "power of two"),
        ("subgroup_size", 0, "power of two"),
        ("features", ["telepathy"], '"telepathy" is unknown'),
        ("offset", 2, "is not inside"),
        ("offset", 4294967292, "is not inside"),
        ("size", 4294967292, "is not inside"),
        ("size", 16, "shorter than a header"),
        ("size", None, "whole numbers"),
    ],
)
def test_malformed_kernel_is_refused(
    create_module: Create, pack: Pack, axpy_record: dict[str, Any], key: str, value: Any, message: str
) -> None:
    axpy_record[key] = value
    with pytest.raises(ArtifactError, match=message):
        create_module(pack(axpy_record))


def test_each_key_is_needed(create_module: Create, pack: Pack, axpy_record: dict[str, Any]) -> None:
    for key in axpy_record:
        lacking = {name: value for name, value in axpy_record.items() if name != key}
        with pytest.raises(ArtifactError, match=f'no "{key}"'):
            create_module(pack(lacking))


def test_kernels_need_names_of_their_own(create_module: Create, pack: Pack, axpy_record: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match='kernel "axpy": its name occurs twice'):
        create_module(pack(axpy_record, axpy_record))


def test_bytes_that_are_no_spirv_are_refused(create_module: Create, pack: Pack, axpy_record: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="magic number"):
        create_module(pack(axpy_record, code=bytes(axpy_record["size"])))
    with pytest.raises(ArtifactError, match="is not inside the module's 20 bytes"):
        create_module(pack(axpy_record, code=bytes(20)))


def test_every_truncation_is_refused(create_module: Create, pack: Pack, axpy_record: dict[str, Any]) -> None:
    blob = pack(axpy_record)
    for length in (*range(0, len(blob) - 4, 97), len(blob) - 4):
        with pytest.raises(ArtifactError, match="malformed Vulkan module"):
            create_module(blob[:length])


@pytest.mark.parametrize(
    ("key", "value", "need"),
    [
        ("shared_bytes", 1 << 30, r"1073741824 bytes of shared memory \(has \d+\)"),
        (
            "workgroup_size",
            [65536, 1, 1],
            r"workgroups of 65536 threads \(has \d+\), .* along x",
        ),
        ("subgroup_size", 1, r"subgroups of 1 \(has \d+"),
    ],
)
def test_what_the_device_lacks_is_named(
    vulkan: Any, create_module: Create, pack: Pack, axpy_record: dict[str, Any], key: str, value: Any, need: str
) -> None:
    """At `require_device`, and at the first launch of any kernel of the module."""
    demanding = {**axpy_record, "name": "demanding", key: value}
    module = create_module(pack(axpy_record, demanding))
    name = rf"vulkan:0 \({re.escape(vulkan.device_name)}\)"
    with pytest.raises(DeviceError, match=f"^{name} lacks {need}.*, which lib.so needs: "):
        backend.require_device(module, name="lib.so")
    with pytest.raises(DeviceError, match=f"^{name} lacks {need}.*, which kernel demanding needs: "):
        module["axpy"](None, None, None, 0, 1.0, 1, 64)


def test_a_feature_that_is_missing_is_named(
    vulkan: Any, create_module: Create, pack: Pack, axpy_record: dict[str, Any]
) -> None:
    features = next(device["features"] for device in backend.devices() if device["index"] == 0)
    for feature, present in features.items():
        module = create_module(pack({**axpy_record, "features": [feature]}))
        if present:
            backend.require_device(module)
        else:
            with pytest.raises(DeviceError, match=f" lacks {feature}, which the module needs"):
                backend.require_device(module)


def test_all_that_is_missing_is_said_at_once(
    vulkan: Any, create_module: Create, pack: Pack, axpy_record: dict[str, Any]
) -> None:
    (listed,) = (device for device in backend.devices() if device["index"] == 0)
    missing = sorted(feature for feature, present in listed["features"].items() if not present)
    kernels = [{**axpy_record, "name": feature, "features": [feature]} for feature in listed["features"]]
    kernels[-1]["shared_bytes"] = 1 << 30
    expected = ", ".join([*missing, "1073741824 bytes of shared memory"])
    with pytest.raises(DeviceError, match=f" lacks {expected} "):
        backend.require_device(create_module(pack(*kernels)))


CAPABILITIES = {"float16": 9, "float64": 10, "int64": 11, "int16": 22, "int8": 39, "storage16": 4433, "storage8": 4448}


@pytest.mark.parametrize(("feature", "number"), [*CAPABILITIES.items(), ("geometry", 2), ("shuffles", 66)])
def test_code_that_needs_more_than_its_record_says_is_refused(
    create_module: Create, pack: Pack, axpy_code: bytes, axpy_record: dict[str, Any], feature: str, number: int
) -> None:
    """The features are checked against the device: a driver may crash over a capability that the device lacks."""
    code = axpy_code[:20] + struct.pack("<II", 2 << 16 | 17, number) + axpy_code[20:]
    record = {**axpy_record, "size": len(code)}
    if feature in CAPABILITIES:
        create_module(pack({**record, "features": [feature]}, code=code))
        with pytest.raises(ArtifactError, match=f'its SPIR-V declares {feature}, which is not among its "features"'):
            create_module(pack(record, code=code))
    else:
        with pytest.raises(ArtifactError, match=f"declares capability {number}, which no feature stands for"):
            create_module(pack(record, code=code))


@pytest.mark.parametrize("aliases", [[3], [5], [0] * 600])
def test_aliases_that_are_no_handles_or_too_many(
    create_module: Create, pack: Pack, axpy_record: dict[str, Any], aliases: list[int]
) -> None:
    with pytest.raises(ArtifactError, match=r"is no handle|do not fit into the block"):
        create_module(pack({**axpy_record, "aliases": aliases}))


def test_dynamic_shared_memory_beyond_the_device(
    vulkan: Any, create_module: Create, pack: Pack, axpy_record: dict[str, Any]
) -> None:
    axpy_record["launch_params"].append("tirx.use_dyn_shared_memory")
    kernel = create_module(pack(axpy_record))["axpy"]
    kernel(None, None, None, 0, 1.0, 1, 64, 16)
    with pytest.raises(DeviceError, match="launched with 1073741824 bytes of shared memory"):
        kernel(None, None, None, 0, 1.0, 1, 64, 1 << 30)


def test_devices_are_json(vulkan: Any) -> None:
    import tvm_ffi

    listed = json.loads(tvm_ffi.get_global_func("tvm_attn.vulkan.devices")())
    assert listed == backend.devices()
    assert [device["index"] for device in listed if not device["missing"]]
