"""Machine code for NVIDIA GPUs, made and embedded without one."""

import ctypes
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import tvm
from safetensors.numpy import save_file
from tvm import relax, s_tir, tirx
from tvm.script import tirx as T

from tvm_attn import targets
from tvm_attn._resources import resource_dir
from tvm_attn.compiler import cuda, cuda_module
from tvm_attn.compiler.build import build
from tvm_attn.compiler.devices import backend_for
from tvm_attn.config import GPT2Config
from tvm_attn.errors import CompileError, TargetError
from tvm_attn.model.checkpoint import random_params
from tvm_attn.runtime.artifact import Artifact

EVERY = targets.read("cuda")
assert isinstance(EVERY, targets.CudaTarget)
IMAGES = EVERY.images
TINY = 'extern "C" __global__ void twice(float* x, int n) { if (threadIdx.x < n) x[threadIdx.x] *= 2.0f; }\n'

try:
    COMPILERS: list[cuda.CudaCompiler] = [cuda.find_compiler(IMAGES)]
except CompileError:
    COMPILERS = []
if (packaged := cuda._find_nvrtc()) is not None and packaged not in COMPILERS:
    COMPILERS.append(packaged)

needs_compiler = pytest.mark.skipif(not COMPILERS, reason="no CUDA compiler: pip install 'tvm-attn[cuda]'")


def test_targets() -> None:
    assert targets.resolve("cuda") == EVERY and EVERY.dtypes == ("float32", "float16", "bfloat16")
    assert IMAGES == ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_80")
    single = [targets.read(name) for name in targets.names() if name.startswith("cuda-")]
    assert all(isinstance(target, targets.CudaTarget) and target.ptx is None for target in single)
    found = {target.name: target.images for target in single if isinstance(target, targets.CudaTarget)}
    assert found == {f"cuda-{name.replace('_', '').rstrip('a')}": (name,) for name in EVERY.architectures}
    for target in (EVERY, *single):
        assert backend_for(target).tvm_target(target).attrs["arch"] == target.tvm["arch"] == target.images[0]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('["sm_80"]', "[]", r"cuda.architectures is \[\]; give a list such as"),
        ('["sm_80"]', '["8.0"]', r"cuda.architectures is \['8.0'\]; give a list such as"),
        ('["sm_80"]', '["sm_80"]\nptx = "sm_80"', "cuda.ptx is 'sm_80'; give a virtual architecture"),
        ("[cuda]", "[nvidia]", "lacks the key 'cuda'"),
    ],
)
def test_malformed_targets(
    before: str, after: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (resource_dir("targets") / "cuda-sm80.toml").read_text()
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "mine.toml").write_text(text.replace(before, after))
    monkeypatch.setattr("tvm_attn._resources.resource_dir", lambda name: tmp_path / name)
    with pytest.raises(TargetError, match=message):
        targets.read("mine")


def images(fatbin: bytes) -> list[str]:
    """The architectures in a fatbin, by the headers that precede each image."""
    magic, _, header, size = struct.unpack_from("<IHHQ", fatbin)
    assert magic == 0xBA55ED50 and header + size == len(fatbin)
    found, at = [], header
    while at < len(fatbin):
        kind, _, header, size = struct.unpack_from("<HHIQ", fatbin, at)
        (architecture,) = struct.unpack_from("<I", fatbin, at + 28)
        (flags,) = struct.unpack_from("<Q", fatbin, at + 40)
        found.append(f"{ {1: 'compute', 2: 'sm'}[kind] }_{architecture}{'a' if flags & 1 << 20 else ''}")
        at += header + size
    return found


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine without any; the folder is its PATH."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cuda, "_find_nvrtc", lambda: None)
    yield tmp_path


def fake_nvcc(folder: Path, architectures: Sequence[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nvcc"
    path.write_text("#!/bin/sh\n" + "".join(f"echo compute_{number}\n" for number in architectures))
    path.chmod(0o755)
    return path


def test_nvcc_comes_first(no_compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = cuda.Nvrtc(no_compiler)
    monkeypatch.setattr(cuda, "_find_nvrtc", lambda: packaged)
    assert cuda.find_compiler(["sm_80"]) == packaged
    on_path = fake_nvcc(no_compiler, ["80", "90"])
    assert cuda.find_compiler(["sm_80", "sm_90a", "compute_80"]) == cuda.Nvcc(on_path)
    monkeypatch.setenv("CUDA_PATH", str(no_compiler / "toolkit"))
    assert cuda.find_compiler(["sm_80"]) == cuda.Nvcc(on_path), "the toolkit has no nvcc yet"
    in_toolkit = fake_nvcc(no_compiler / "toolkit" / "bin", ["80"])
    assert cuda.find_compiler(["sm_80"]) == cuda.Nvcc(in_toolkit)
    assert cuda.find_compiler(["sm_120"]) == packaged, "the toolkit is older than the architecture"


def test_no_compiler(no_compiler: Path) -> None:
    with pytest.raises(CompileError, match=r"no CUDA compiler: install NVRTC .*\[cuda\].* nvcc on PATH") as error:
        cuda.find_compiler(["sm_80"])
    assert "\n" not in str(error.value)


def test_old_compiler(no_compiler: Path) -> None:
    path = fake_nvcc(no_compiler, ["80", "90"])
    with pytest.raises(
        CompileError, match=f"{path} does not know sm_100, sm_120: install a newer CUDA toolkit or NVRTC"
    ):
        cuda.find_compiler(["sm_80", "sm_90a", "sm_100", "sm_120"])


def test_build_without_a_compiler_says_so_first(no_compiler: Path, tmp_path: Path) -> None:
    compiler = no_compiler / "g++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(CompileError, match="no CUDA compiler"):
        build("demo", "cuda", out=tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


@pytest.mark.parametrize("compiler", COMPILERS, ids=lambda compiler: type(compiler).__name__)
def test_fatbin_holds_every_architecture(compiler: cuda.CudaCompiler) -> None:
    assert compiler.lacks(IMAGES) == []
    wanted = IMAGES if isinstance(compiler, cuda.Nvcc) else ("sm_80", "sm_90a", "sm_120", "compute_80")
    fatbin = compiler.fatbin(TINY, wanted)
    assert sorted(images(fatbin)) == sorted(wanted)
    assert fatbin.count(b"\x7fELF") == len(wanted) - 1


def test_generations_share_ptx() -> None:
    assert cuda._families(IMAGES) == [
        ("compute_80", ["sm_80", "compute_80", "sm_86", "sm_89"]),
        ("compute_90a", ["sm_90a"]),
        ("compute_100", ["sm_100"]),
        ("compute_120", ["sm_120"]),
    ]
    assert cuda._families(["sm_89"]) == [("compute_89", ["sm_89"])]
    assert cuda._families(["sm_90a", "sm_90"]) == [("compute_90a", ["sm_90a"]), ("compute_90", ["sm_90"])]


@pytest.mark.parametrize("compiler", COMPILERS, ids=lambda compiler: type(compiler).__name__)
def test_errors_in_the_source(compiler: cuda.CudaCompiler) -> None:
    with pytest.raises(CompileError, match=r"failed: .*kernels.cu\(\d+\): error: .*nonsense") as error:
        compiler.image(TINY + "nonsense x;\n", "sm_80")
    assert "\n" not in str(error.value)


@T.prim_func(s_tir=True)
def _add_one(a: T.handle, b: T.handle):
    T.func_attr({"global_symbol": "add_one", "tirx.noalias": True})
    n = T.int32()
    A = T.match_buffer(a, (n,), "float32")
    B = T.match_buffer(b, (n,), "float32")
    for i in range(n):
        with T.sblock("add"):
            v = T.axis.spatial(n, i)
            B[v] = A[v] + T.float32(1)


@T.prim_func()
def _twice(a: T.handle, b: T.handle):
    T.func_attr({"global_symbol": "twice", "tirx.noalias": True, "tirx.is_scheduled": True})
    n = T.int32()
    A = T.match_buffer(a, (n,), "float32")
    B = T.match_buffer(b, (n,), "float32")
    T.device_entry()
    block = T.cta_id([T.ceildiv(n, 128)])
    thread = T.thread_id([128])
    if block * 128 + thread < n:
        B[block * 128 + thread] = A[block * 128 + thread] * T.float32(2)


@T.prim_func(s_tir=True)
def _saturate(A: T.Buffer((32,), "float16"), B: T.Buffer((32,), "bfloat16")):
    T.func_attr({"global_symbol": "saturate", "tirx.noalias": True})
    for i in range(32):
        with T.sblock("saturate"):
            v = T.axis.spatial(32, i)
            B[v] = T.Cast("bfloat16", T.if_then_else(v > 0, T.tanh(T.Cast("float32", A[v])), T.infinity("float32")))


def scheduled_add_one() -> tirx.PrimFunc:
    schedule = s_tir.Schedule(_add_one)
    (loop,) = schedule.get_loops(schedule.get_sblock("add"))
    block, thread = schedule.split(loop, [None, 128])
    schedule.bind(block, "blockIdx.x")
    schedule.bind(thread, "threadIdx.x")
    return schedule.mod["main"]


def test_both_kinds_of_kernels_in_one_module() -> None:
    """TIRx and S-TIR functions, lowered by different passes."""
    module = tvm.IRModule({"add_one": scheduled_add_one(), "twice": _twice})
    for name in ("cuda", "cuda-sm90"):
        source = cuda_module.cuda_source(module, backend_for(targets.read(name)).tvm_target(targets.read(name)))
        for kernel in ("add_one_kernel", "twice_kernel"):
            assert f"__launch_bounds__(128) {kernel}(float* __restrict__" in source
    assert cuda_module._FALLBACK not in os.environ


@pytest.mark.parametrize("compiler", COMPILERS, ids=lambda compiler: type(compiler).__name__)
def test_what_tvm_generates_compiles(compiler: cuda.CudaCompiler) -> None:
    """With what its headers need of the toolkit's, for small floats and infinity."""
    schedule = s_tir.Schedule(_saturate)
    (loop,) = schedule.get_loops(schedule.get_sblock("saturate"))
    schedule.bind(loop, "threadIdx.x")
    source = cuda_module.cuda_source(
        schedule.mod["main"], backend_for(targets.read("cuda")).tvm_target(targets.read("cuda"))
    )
    assert "cuda_bf16.h" in source and "cuda_fp16.h" in source
    image = compiler.image(source, "sm_90a")
    assert image.code.startswith(b"\x7fELF") and b"saturate_kernel" in image.code
    assert "Compiling entry function 'saturate_kernel' for 'sm_90a'" in image.log


def test_kernels_of_one_name() -> None:
    one = scheduled_add_one().with_attr("global_symbol", "same")
    module = tvm.IRModule({"a": one, "b": _twice.with_attr("global_symbol", "same")})
    with pytest.raises(CompileError, match=r"two kernels lower to functions of one name: .*same_kernel"):
        cuda_module.cuda_source(module, backend_for(targets.read("cuda")).tvm_target(targets.read("cuda")))


def exported(path: Path) -> bytes:
    """A library with one Relax function over one kernel; returns its fatbin."""
    builder = relax.BlockBuilder()
    variable = builder.add_func(scheduled_add_one(), "add_one")
    x = relax.Var("x", relax.TensorType([tirx.Var("n", "int64")], "float32"))
    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit(relax.call_tir(variable, [x], x.ty)))
    cuda_module.register_pipeline()
    target = backend_for(targets.read("cuda-sm80")).tvm_target(targets.read("cuda-sm80"))
    with cuda_module.without_runtime():
        executable = relax.build(builder.get(), target, tir_pipeline=cuda_module.PIPELINE)
        fatbin = cuda.compile_fatbin(cuda_module.device_source(executable.mod), ("sm_80",))
        cuda_module.export_library(executable, path, fatbin)
    return fatbin


_LOAD = """
import ctypes, sys
library, *needed = sys.argv[1:]
for name in needed:
    ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
import tvm
from tvm.base import _RUNTIME_ONLY
assert _RUNTIME_ONLY
ctypes.CDLL(tvm.__path__[0] + "/lib/libtvm_runtime_cuda.so", ctypes.RTLD_GLOBAL)
import tvm_ffi

def compile(code):
    raise AssertionError("asked for a compiler")

tvm_ffi.register_global_func("tvm_callback_cuda_compile", compile, override=True)
module = tvm.runtime.load_module(library)

def modules(parent):
    for module in parent.imports:
        yield module
        yield from modules(module)

(kernels,) = [entry for entry in modules(module) if entry.kind == "cuda"]
assert kernels.get_function("add_one_kernel") is not None
print("loaded")
"""


@needs_compiler
def test_library_loads_where_no_compiler_is(tmp_path: Path) -> None:
    """In a process with TVM's runtime alone and an empty PATH; a stub stands in for the driver where there is none."""
    library = tmp_path / "lib.so"
    fatbin = exported(library)
    content = library.read_bytes()
    assert fatbin in content and b"__global__" not in content
    runtime = Path(tvm.__path__[0], "lib", "libtvm_runtime_cuda.so")
    packages = find_spec("nvidia")
    folders = (packages.submodule_search_locations or []) if packages else []
    runtimes = [str(path) for folder in folders for path in Path(folder).glob("*/lib/libcudart.so.13")]
    if not runtime.is_file() or not runtimes:
        pytest.skip("no libtvm_runtime_cuda.so or libcudart.so.13")
    environment = {"PATH": "", "TVM_USE_RUNTIME_LIB": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _LOAD, str(library), *driver(runtime, tmp_path), runtimes[-1]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "loaded\n", done.stderr


def driver(runtime: Path, folder: Path) -> list[str]:
    """What stands in for libcuda.so.1 where it is missing: each function that the runtime needs fails."""
    try:
        ctypes.CDLL("libcuda.so.1")
        return []
    except OSError:
        pass
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    listed = subprocess.run(["nm", "-D", "--undefined-only", runtime], capture_output=True, text=True, check=True)
    symbols = {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()}
    functions = sorted(name for name in symbols if name.startswith("cu") and name[2].isupper())
    source, stub = folder / "stub.cc", folder / "libcuda.so.1"
    source.write_text("".join(f'extern "C" int {name}() {{ return 34; }}\n' for name in functions))
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(stub), str(source)]
    subprocess.run(command, check=True)
    return [str(stub)]


@needs_compiler
def test_artifact(tmp_path: Path) -> None:
    """The portable kernels in float32, for one architecture; nothing here can run them."""
    config = GPT2Config(vocab_size=100, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    save_file(dict(random_params(config)), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    messages: list[str] = []
    built = build(tmp_path, "cuda-sm90", out=tmp_path / "artifact", progress=messages.append)
    content = (built.folder / "lib-cuda-sm90.so").read_bytes()
    start = content.index(struct.pack("<IHH", 0xBA55ED50, 1, 16))
    (size,) = struct.unpack_from("<Q", content, start + 8)
    assert images(content[start : start + 16 + size]) == ["sm_90a"]
    assert b"__global__" not in content
    if built.reports["cuda-sm90"] is None:
        assert any(note.startswith("lib-cuda-sm90.so was compiled but not checked: ") for note in built.notes)
    (library,) = Artifact(built.folder).libraries
    assert (library.device, library.target) == ("cuda", "cuda-sm90")
