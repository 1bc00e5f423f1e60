"""Artifacts: written whole or not at all, read by TVM's own loaders, and refused when anything in them was altered."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm
import tvm_ffi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm.contrib import tvmjs

import tvm_attn
import tvm_attn.build
from tvm_attn.compiler import artifact as writing
from tvm_attn.compiler import build as building
from tvm_attn.compiler import verification
from tvm_attn.compiler.verification import Bounds
from tvm_attn.errors import ArtifactError, CompileError, TvmAttnError
from tvm_attn.model.checkpoint import cast_params, open_checkpoint
from tvm_attn.runtime import machine
from tvm_attn.runtime.artifact import Artifact

INDEX = "params/tensor-cache.json"
SHARD = "params/params_shard_0.bin"


@pytest.fixture
def altered(demo_artifact: Path, tmp_path: Path) -> Path:
    """A copy of the demo artifact; `put` is the way to change a file of it."""
    return linked_copy(demo_artifact, tmp_path / "altered")


def linked_copy(artifact: Path, folder: Path) -> Path:
    """The same files under another name: nothing is copied until `put` replaces one."""
    return Path(shutil.copytree(artifact, folder, copy_function=os.link))


@contextmanager
def temporary_copy(artifact: Path) -> Iterator[Path]:
    """For one example of a property test, where the fixture would be shared by all of them."""
    with tempfile.TemporaryDirectory(dir=artifact.parent) as folder:
        yield linked_copy(artifact, Path(folder) / "altered")


def put(folder: Path, name: str, content: bytes) -> None:
    (folder / name).unlink()
    (folder / name).write_bytes(content)


def library_of(folder: Path) -> str:
    (path,) = folder.glob("*.so")
    return path.name


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any], rehash: bool = True) -> None:
    """Changes the manifest, by default with a new SHA-256 of itself, as one who means to would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    if rehash:
        rest = {key: value for key, value in manifest.items() if key != "sha256"}
        canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
        manifest["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    put(folder, "manifest.json", json.dumps(manifest).encode())


def put_rehashed(folder: Path, name: str, content: bytes) -> None:
    """Replaces a file and its entry in the manifest."""
    put(folder, name, content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: entry}))


def edit_record(folder: Path, name: str, key: str, value: Any) -> None:
    index = json.loads((folder / INDEX).read_bytes())
    (record,) = (record for record in index["records"][0]["records"] if record["name"] == name)
    record[key] = value
    put_rehashed(folder, INDEX, json.dumps(index).encode())


# --- damage ---

NAMES = st.sampled_from(["manifest.json", "tokenizer.json", INDEX, SHARD, "library"])
once = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@once
@given(name=NAMES, place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_flipped_bits_are_found(demo_artifact: Path, name: str, place: float, change: int) -> None:
    with temporary_copy(demo_artifact) as folder:
        name = library_of(folder) if name == "library" else name
        original = (folder / name).read_bytes()
        content = bytearray(original)
        content[int(place * len(content))] ^= change
        put(folder, name, bytes(content))
        if name == "manifest.json" and _same_json(original, bytes(content)):
            return  # another kind of white space, or 1E-05 for 1e-05
        with pytest.raises(ArtifactError, match=r"altered|not what was built|cannot be read"):
            tvm_attn.load(folder)


def _same_json(a: bytes, b: bytes) -> bool:
    try:
        return bool(json.loads(a) == json.loads(b))
    except ValueError:
        return False


@once
@given(name=NAMES, place=st.floats(0, 1, exclude_max=True), extra=st.binary(max_size=3))
def test_another_length_is_found(demo_artifact: Path, name: str, place: float, extra: bytes) -> None:
    """Cut anywhere (and perhaps continued), or with bytes appended."""
    with temporary_copy(demo_artifact) as folder:
        name = library_of(folder) if name == "library" else name
        content = (folder / name).read_bytes()
        put(folder, name, content[: int(place * len(content))] + extra)
        with pytest.raises(ArtifactError):
            tvm_attn.load(folder)
        put(folder, name, content + b"\0" + extra)
        with pytest.raises(ArtifactError):
            tvm_attn.load(folder)


@once
@given(pair=st.lists(NAMES, min_size=2, max_size=2, unique=True))
def test_swapped_files_are_found(demo_artifact: Path, pair: list[str]) -> None:
    with temporary_copy(demo_artifact) as folder:
        a, b = (library_of(folder) if name == "library" else name for name in pair)
        (folder / a).rename(folder / "aside")
        (folder / b).rename(folder / a)
        (folder / "aside").rename(folder / b)
        with pytest.raises(ArtifactError):
            tvm_attn.load(folder)


def test_missing_files_are_named(demo_artifact: Path, tmp_path: Path) -> None:
    names = files_of(demo_artifact)
    assert len(names) == 5
    for number, name in enumerate(names):
        folder = linked_copy(demo_artifact, tmp_path / str(number))
        (folder / name).unlink()
        with pytest.raises(ArtifactError, match=f"{name} is missing"):
            tvm_attn.load(folder)
        (folder / name).mkdir()
        with pytest.raises(ArtifactError, match=name):
            tvm_attn.load(folder)
        (folder / name).rmdir()
        os.mkfifo(folder / name)  # opening it would wait for ever
        with pytest.raises(ArtifactError, match=name):
            tvm_attn.load(folder)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nothing", "no such folder: .*nothing; tvm-attn build writes"),
        ("a file", "a file is a file; name the folder"),
        ("an empty folder", r"is no artifact, manifest\.json is missing; name a folder"),
        ("a checkpoint", r"demo is a checkpoint: build it first: tvm-attn build --model .*demo --target cpu$"),
        ("a name\0with zero", "cannot be opened: embedded null"),
        ("n" * 300, "nnn cannot be opened: File name too long"),
        ("long/" * 50_000, "cannot be opened: File name too long"),
        ("a loop", "cannot be opened: Too many levels of symbolic links"),
    ],
    ids=lambda text: text[:20],
)
def test_no_artifact(place: str, message: str, tmp_path: Path, demo_model_dir: Path) -> None:
    folder = demo_model_dir if place == "a checkpoint" else tmp_path / place
    if place == "a file":
        folder.write_text("{}")
    elif place == "an empty folder":
        folder.mkdir()
    elif place == "a loop":
        folder.symlink_to(folder)
    with pytest.raises(ArtifactError, match=message) as caught:
        tvm_attn.load(folder)
    assert len(str(caught.value)) < 700
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("folder", [None, 3, "", 2.5, ["a"], {}, np.zeros(3), "x" * 100_000], ids=range(8))
def test_what_is_no_folder(folder: Any) -> None:
    for use in (tvm_attn.load, verification.verify_artifact, Artifact):
        with pytest.raises(ArtifactError) as caught:
            use(folder)
        assert len(str(caught.value)) < 600
        assert len(str(caught.value).splitlines()) == 1


def test_files_of_100_gib_are_not_read(altered: Path) -> None:
    """Sparse ones, that the manifest describes rightly."""
    for name in (SHARD, INDEX, library_of(altered), "tokenizer.json", "manifest.json"):
        put(altered, name, b"")
        os.truncate(altered / name, 100 << 30)
        if name != "manifest.json":
            entry = {"bytes": 100 << 30, "sha256": "0" * 64}
            edit_manifest(altered, lambda manifest, name=name, entry=entry: manifest["files"].update({name: entry}))
        with pytest.raises(ArtifactError, match=f"{name} has 107374182400 bytes, so it is not the file it should be"):
            tvm_attn.load(altered)


def test_folder_that_may_not_be_read(demo_artifact: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(demo_artifact, Path(place) / "artifact"))
        for forbidden in (folder / "tokenizer.json", folder):
            forbidden.chmod(0)
            with as_nobody(place), pytest.raises(ArtifactError, match=r"(opened: |\()Permission denied"):
                tvm_attn.load(folder)
            forbidden.chmod(0o755)


@contextmanager
def as_nobody(place: str) -> Iterator[None]:
    """For root, whom no permission stops: another user inside, who can reach the temporary folder `place`."""
    if os.geteuid() != 0:
        yield
        return
    os.chmod(place, 0o777)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_long_name_is_not_echoed(altered: Path) -> None:
    long, before = "x" * 100_000, json.loads((altered / "manifest.json").read_bytes())
    for change in ({"dtype": long}, {"quantization": long}, {"format": long}, {"libraries": [{"file": long}]}):
        edit_manifest(altered, lambda manifest, change=change: manifest.update(change))
        with pytest.raises(ArtifactError) as caught:
            tvm_attn.load(altered)
        assert len(str(caught.value)) < 800
        edit_manifest(altered, lambda manifest: manifest.update(before))


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"{}", b"NaN", bytes(range(256)), b"[" * 200_000, b'{"a":' * 200_000, b"9" * 100_000],
    ids=lambda content: f"{content[:5]!r} of {len(content)} bytes",
)
def test_manifest_that_is_no_manifest(altered: Path, content: bytes) -> None:
    put(altered, "manifest.json", content)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        tvm_attn.load(altered)


# --- manifests that were edited by hand ---


def test_edit_without_new_hash(altered: Path) -> None:
    edit_manifest(altered, lambda manifest: manifest.update(date="1970-01-01"), rehash=False)
    with pytest.raises(ArtifactError, match=r"manifest\.json was altered"):
        tvm_attn.load(altered)


def test_edit_with_new_hash_of_something_harmless(altered: Path) -> None:
    """The edits below are refused for what they say, not because `edit_manifest` computes another hash."""
    edit_manifest(altered, lambda manifest: manifest.update(date="1970-01-01"))
    assert Artifact(altered).manifest["date"] == "1970-01-01"


def test_no_library_is_compiled_for_the_meaning_of_tokens(altered: Path) -> None:
    """Two checkpoints that differ in their end tokens only have the same code."""
    tokens = {"eos_token_id": [5, 7], "bos_token_id": 3, "pad_token_id": 4}
    edit_manifest(altered, lambda manifest: manifest["model"].update(tokens))
    assert tvm_attn.load(altered, "cpu").config.eos_token_ids == (5, 7)


TOP_LEVEL: list[tuple[str, Any, str]] = [
    ("format", 2, "format 2 is not this version's format 7"),
    ("format", "3", "format '3'"),
    ("dtype", "float64", "dtype 'float64'"),
    ("dtype", [], r"dtype \[\]"),
    ("dtype", "float16", "compiled for dtype 'float32', not 'float16'"),
    ("quantization", "int3", "quantization 'int3'"),
    ("quantization", None, "quantization None"),
    ("kv", "int4", "a KV cache in 'int4' is not supported"),
    ("kv", [], r"a KV cache in \[\] is not supported"),
    ("kv", "int8", "compiled for kv 'float32', not 'int8'"),
    ("versions", {"tvm": "0.1"}, r"built with tvm 0\.1, here .* is installed"),
    ("versions", {}, "built with tvm None"),
    *(("versions", value, "versions") for value in (None, [], "x")),
    *(("generation", value, "lacks or garbles") for value in (None, [], "x", {"frobnicate": 1}, {"seed": 1, "": 2})),
    ("generation", {"temperature": -1}, "its generation options are invalid: temperature is -1"),
    ("libraries", [], "holds no library for 'cpu'"),
    *(("libraries", value, "lacks or garbles") for value in (None, {}, "x", [5], [None], [{}], [[]])),
    *(("files", value, "lacks or garbles|not listed") for value in (None, [], 5, "tokenizer.json", {}, {"a": 5})),
    *(("files", {name: {}}, "no file of an artifact") for name in ("../up", "/etc/passwd", "params/../x", "a\0b", "")),
    *(("model", value, "model configuration is invalid") for value in (None, [], 5, {"vocab_size": "x"})),
    ("model", {"model_type": "bert"}, "only gpt2 is supported"),
]


@pytest.mark.parametrize(("key", "value", "message"), TOP_LEVEL, ids=lambda item: repr(item)[:30])
def test_edited_manifest(altered: Path, key: str, value: Any, message: str) -> None:
    edit_manifest(altered, lambda manifest: manifest.update({key: value}))
    with pytest.raises(ArtifactError, match=message) as caught:
        tvm_attn.load(altered)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["format", "model", "generation", "dtype", "quantization", "kv", "versions", "libraries", "files"]
)
def test_manifest_without_an_entry(altered: Path, key: str) -> None:
    edit_manifest(altered, lambda manifest: manifest.pop(key))
    with pytest.raises(ArtifactError, match=key):
        tvm_attn.load(altered)


LIBRARY: list[tuple[str, Any, str]] = [
    ("platform", "linux-s390x", "built for linux-s390x, this is"),
    ("platform", "win32-AMD64", "built for win32-AMD64, this is"),
    ("platform", None, "platform"),
    ("features", ["avx1024", "quantum"], "this processor lacks avx1024, quantum"),
    *(("features", value, "garbles") for value in (None, 5, "avx", {}, [[]], [5, "x"])),
    ("device", "cuda", "no library for 'cpu'"),
    ("device", 5, "device"),
    *(("architectures", value, "garbles") for value in (None, 5, "sm_80", {}, [5], ["gfx90a"], ["sm_80x"], [""])),
    ("architectures", ["sm_80"], r"architectures \[\], not \['sm_80'\]"),
    *(("ptx", value, "garbles") for value in (80, [], "", "ptx")),
    ("ptx", "compute_80", "ptx None, not 'compute_80'"),
    *(("rows", value, "rows") for value in (0, -1, "8", 8.5, None, True)),
    *((key, value, key) for key in ("vocabulary", "max_prefill_rows", "max_batch") for value in (0, "64", None)),
    *(("file", value, "not listed") for value in ("lib.so", "../lib.so", "/lib.so", "params", "a\0b", "")),
    ("file", None, "file"),
    ("file", "tokenizer.json", "cannot be run"),
]


@pytest.mark.parametrize(("key", "value", "message"), LIBRARY, ids=lambda item: repr(item)[:30])
def test_edited_library(altered: Path, key: str, value: Any, message: str) -> None:
    edit_manifest(altered, lambda manifest: manifest["libraries"][0].update({key: value}))
    with pytest.raises(ArtifactError, match=message) as caught:
        tvm_attn.load(altered)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-1, "x", None, 1.5, True, 10**18, 10**400, float("inf"), []])
@pytest.mark.parametrize("name", [SHARD, "tokenizer.json"])
def test_edited_size(altered: Path, name: str, value: Any) -> None:
    edit_manifest(altered, lambda manifest: manifest["files"][name].update(bytes=value))
    with pytest.raises(ArtifactError):
        tvm_attn.load(altered)


@pytest.mark.parametrize("value", [None, 5, "", "0" * 64])
def test_edited_hash(altered: Path, value: Any) -> None:
    edit_manifest(altered, lambda manifest: manifest["files"][SHARD].update(sha256=value))
    with pytest.raises(ArtifactError):
        tvm_attn.load(altered)


CONFIG: dict[str, Any] = {"vocab_size": 5, "n_positions": 512, "n_embd": 64, "n_inner": 100, "n_layer": 7}
# These leave every parameter's shape as it was: only the library knows.
COMPILED_IN: dict[str, Any] = {
    "n_head": 1,
    "activation_function": "gelu",
    "layer_norm_epsilon": 1e-6,
    "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True,
}


@pytest.mark.parametrize(("key", "value"), (CONFIG | COMPILED_IN).items())
def test_configuration_of_another_model(altered: Path, key: str, value: Any) -> None:
    edit_manifest(altered, lambda manifest: manifest["model"].update({key: value}))
    with pytest.raises(ArtifactError, match=f"compiled for {key} .*, not {value!r} as" if key in COMPILED_IN else None):
        tvm_attn.load(altered)


def _swapped(parameters: list[str]) -> list[str]:
    """The weights of two LayerNorms, which have one shape, in each other's place."""
    exchange = {"h.0.ln_1.weight": "h.1.ln_1.weight", "h.1.ln_1.weight": "h.0.ln_1.weight"}
    return [exchange.get(name, name) for name in parameters]


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("target", lambda target: "another"),
        ("features", lambda features: features[1:]),
        ("rows", lambda rows: rows // 2),
        ("vocabulary", lambda columns: columns + 16),
        ("max_prefill_rows", lambda rows: rows * 2),
        ("max_batch", lambda batch: batch + 1),
        ("parameters", _swapped),
    ],
)
def test_library_that_is_another_than_the_manifest_says(altered: Path, key: str, change: Callable[[Any], Any]) -> None:
    """Each of these alone would load, and then fail inside TVM, exceed what was planned, or compute something else."""

    def edit(manifest: dict[str, Any]) -> None:
        (library,) = manifest["libraries"]
        library[key] = change(library[key])

    edit_manifest(altered, edit)
    with pytest.raises(ArtifactError, match=rf"lib-.*\.so was compiled for {key} .* as manifest\.json says") as caught:
        tvm_attn.load(altered)
    assert "\n" not in str(caught.value)


GARBAGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.none(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.none(), max_size=2),
)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value inside a JSON value is, `value` itself excluded."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from _paths(value[key], (*path, key))


@settings(once, max_examples=50)
@given(data=st.data())
@pytest.mark.parametrize("name", ["manifest.json", INDEX])
def test_garbage_anywhere(demo_artifact: Path, name: str, data: st.DataObject) -> None:
    """One value of the JSON is replaced: the artifact is refused, or the value was one that nothing depends on."""
    with temporary_copy(demo_artifact) as folder:
        body = json.loads((folder / name).read_bytes())
        *path, last = data.draw(st.sampled_from(list(_paths(body))))
        garbage = data.draw(GARBAGE)
        place = body
        for key in path:
            place = place[key]
        place[last] = garbage
        if name == INDEX:
            put_rehashed(folder, INDEX, json.dumps(body).encode())
        else:
            edit_manifest(folder, lambda manifest: manifest.update(body))
        try:
            tvm_attn.load(folder)
        except TvmAttnError as error:
            assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("text", ["", "null", "5", "[]", "{}", '{"n_head": 2}', "\n", "[" * 100_000])
def test_library_that_says_something_else(demo_artifact: Path, text: str) -> None:
    artifact = Artifact(demo_artifact)
    with pytest.raises(ArtifactError, match="was compiled for something else") as caught:
        artifact.check_identity(artifact.libraries[0], text)
    assert "\n" not in str(caught.value)


def test_missing_cpu_feature_of_this_machine(demo_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (library,) = Artifact(demo_artifact).libraries
    assert library.obstacle() is None
    lacking = machine.cpu_features() - set(library.features[:1])
    monkeypatch.setattr("tvm_attn.runtime.artifact.cpu_features", lambda: lacking)
    with pytest.raises(ArtifactError, match=f"this processor lacks {library.features[0]};"):
        tvm_attn.load(demo_artifact)


def test_other_tvm_version(demo_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_ffi, "__version__", "9.9")
    with pytest.raises(ArtifactError, match=r"built with tvm_ffi .*, here 9\.9 is installed"):
        tvm_attn.load(demo_artifact)


def test_library_with_most_features_is_taken(altered: Path) -> None:
    """Of those that this machine can run, whatever their order."""

    def add(manifest: dict[str, Any]) -> None:
        (library,) = manifest["libraries"]
        plain, beyond = dict(library, features=[], target="plain"), dict(library, features=["avx1024"], target="beyond")
        manifest["libraries"] = [plain, library, beyond]

    edit_manifest(altered, add)
    (best,) = {library.target for library in Artifact(altered).libraries} - {"plain", "beyond"}
    assert Artifact(altered).library("cpu").target == best


# --- parameters that were edited by hand ---

MATRIX = "h.0.attn.c_attn.weight"
RECORDS: list[tuple[str, Any]] = [
    *(("shape", value) for value in ([384, 128], [128 * 384], [-128, -384], [128, 384, 1], [], None, [0], "x")),
    *(("dtype", value) for value in ("float16", "float64", "int32", "object", "V4", "datetime64[s]", "", None, 5)),
    *(("byteOffset", value) for value in (-1, 10**30, 5.0, "0", None, True, 10**9)),
    *(("nbytes", value) for value in (-1, 0, 10**30, "0", None)),
    *(("name", value) for value in ("x", None, 5, [], "wte.weight")),
]


@pytest.mark.parametrize(("key", "value"), RECORDS, ids=lambda item: repr(item)[:30])
def test_edited_record(altered: Path, key: str, value: Any) -> None:
    edit_record(altered, MATRIX, key, value)
    with pytest.raises(ArtifactError, match=r"h\.0\.attn|malformed|wte"):
        tvm_attn.load(altered)


@pytest.mark.parametrize(
    "index", [[], None, 5, "x", {}, {"records": 5}, {"records": [{}]}, {"records": [{"records": [5]}]}, {"records": []}]
)
def test_edited_index(altered: Path, index: Any) -> None:
    put_rehashed(altered, INDEX, json.dumps(index).encode())
    with pytest.raises(ArtifactError):
        tvm_attn.load(altered)


@pytest.mark.parametrize("path", ["../manifest.json", "x", None, 5, [], "", "a\0b", "/etc/passwd"])
def test_index_that_names_another_file(altered: Path, path: Any) -> None:
    index = json.loads((altered / INDEX).read_bytes())
    index["records"][0]["dataPath"] = path
    put_rehashed(altered, INDEX, json.dumps(index).encode())
    with pytest.raises(ArtifactError, match="not listed"):
        tvm_attn.load(altered)


@pytest.mark.parametrize("content", [b"", b"\xff" * 9, b"[" * 200_000], ids=repr)
def test_text_files_that_are_no_text(altered: Path, content: bytes) -> None:
    for name in (INDEX, "tokenizer.json"):
        put_rehashed(altered, name, content[:100] if name == "tokenizer.json" else content)
        with pytest.raises(TvmAttnError):
            tvm_attn.load(altered)


def test_nothing_crashes_the_process(demo_artifact: Path, tmp_path: Path) -> None:
    """What reaches TVM's and the dynamic linker's code, in a process of its own: a crash there would end this one."""
    matrix = json.loads((demo_artifact / INDEX).read_bytes())
    name = library_of(demo_artifact)
    library = (demo_artifact / name).read_bytes()
    folders = [linked_copy(demo_artifact, tmp_path / str(number)) for number in range(9)]
    put(folders[0], name, library[: len(library) // 2])
    put(folders[1], name, library[: len(library) // 2] + bytes(len(library) - len(library) // 2))
    put_rehashed(folders[2], name, b"no library at all")
    put_rehashed(folders[3], name, b"")
    # A library, but not one of TVM's.
    put_rehashed(folders[4], name, Path(np.linalg._umath_linalg.__file__).read_bytes())
    edit_record(folders[5], MATRIX, "dtype", "uint32")
    edit_record(folders[6], MATRIX, "shape", [384, 128])
    put_rehashed(folders[7], "tokenizer.json", b"[" * 200_000)
    matrix["records"][0]["records"].pop(0)
    put_rehashed(folders[8], INDEX, json.dumps(matrix).encode())
    code = """
import sys, tvm_attn
for folder in sys.argv[1:]:
    try:
        tvm_attn.load(folder)
        print("loaded")
    except tvm_attn.TvmAttnError as error:
        print(type(error).__name__, len(str(error).splitlines()))
"""
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*["ArtifactError 1"] * 7, "TokenizerError 1", "ArtifactError 1"]


# --- TVM's own readers ---

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def bits(array: Any) -> np.ndarray:
    """The content as integers, of a tensor or an array: a comparison that NaN and bfloat16 cannot disturb."""
    if isinstance(array, tvm.runtime.Tensor):
        unsigned = f"uint{8 * np.dtype(array.dtype).itemsize}"
        return array._create_view(array.shape, unsigned).numpy()
    return array.view(f"uint{8 * array.dtype.itemsize}")


def assert_tvm_reads(folder: Path, expected: dict[str, np.ndarray]) -> None:
    tensors, metadata = tvmjs.load_tensor_cache(str(folder / "params"), tvm.cpu())
    assert metadata == {"ParamSize": len(expected)}
    assert tensors.keys() == expected.keys()
    tvm_ffi.get_global_func("vm.builtin.tensor_cache.load")(str(folder / "params"), tvm.cpu().dlpack_device_type(), 0)
    try:
        natively = tvm_ffi.get_global_func("vm.builtin.param_array_from_cache_by_name")(list(expected))
        for (name, array), other in zip(expected.items(), natively, strict=True):
            for tensor in (tensors[name], other):
                assert str(tensor.dtype) == str(array.dtype)
                np.testing.assert_array_equal(bits(tensor), bits(array), strict=True)
    finally:
        tvm_ffi.get_global_func("vm.builtin.tensor_cache.clear")()


def test_tvm_reads_the_parameters(demo_artifact: Path, demo_model_dir: Path) -> None:
    expected = dict(cast_params(open_checkpoint(demo_model_dir).params(), "float32"))
    assert_tvm_reads(demo_artifact, expected)
    ours = Artifact(demo_artifact).parameters
    for name, array in expected.items():
        np.testing.assert_array_equal(ours.read(name), array, strict=True)


@once
@given(data=st.data())
def test_tvm_reads_any_parameters(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any number of shards, shapes and dtypes; every parameter starts at a multiple of 64 bytes."""
    shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3)
    kinds = data.draw(st.lists(st.tuples(shapes, st.sampled_from(list(DTYPES))), min_size=1, max_size=12))
    monkeypatch.setattr(writing, "_SHARD_BYTES", data.draw(st.sampled_from([1, 64, 300, 10**6])))
    rng = np.random.default_rng(0)
    params = {f"p{i}": rng.standard_normal(shape).astype(DTYPES[dtype]) for i, (shape, dtype) in enumerate(kinds)}
    folder = tmp_path_factory.mktemp("params")
    writing.write_params(folder, params.items())
    assert_tvm_reads(folder, params)
    for shard in json.loads((folder / INDEX).read_bytes())["records"]:
        assert shard["nbytes"] <= writing._SHARD_BYTES or len(shard["records"]) == 1
        assert all(record["byteOffset"] % 64 == 0 for record in shard["records"])
        content = (folder / "params" / shard["dataPath"]).read_bytes()
        assert shard["md5sum"] == hashlib.md5(content).hexdigest()


# --- writing ---


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_of(folder)}


def test_manifest_lists_every_file(demo_artifact: Path) -> None:
    manifest = json.loads((demo_artifact / "manifest.json").read_bytes())
    assert sorted(manifest["files"]) == [name for name in files_of(demo_artifact) if name != "manifest.json"]
    for name, entry in manifest["files"].items():
        content = (demo_artifact / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.fixture
def ready_library(demo_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler hands out the library that the demo artifact has, which saves seconds."""
    original = demo_artifact / library_of(demo_artifact)
    monkeypatch.setattr(
        building, "compile_program", lambda program, target, path, *_: shutil.copy(original, path) and {}
    )


def build_demo(out: Path) -> int:
    status: int = tvm_attn.build.main(["--model", "demo", "--target", "cpu", "--out", str(out)])
    return status


@pytest.mark.parametrize("old", [False, True], ids=["nothing there", "an artifact there"])
def test_failed_verification(
    old: bool,
    tmp_path: Path,
    demo_artifact: Path,
    ready_library: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    if old:
        linked_copy(demo_artifact, out)
    before = contents(tmp_path)
    monkeypatch.setitem(verification.BOUNDS, "float32", Bounds(nmse=0.0, max_abs=0.0))
    assert build_demo(out) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    *steps, line = printed.err.splitlines()
    assert "compiling for" in " ".join(steps) and not any("error" in step for step in steps)
    assert line.startswith("error: lib-") and "disagrees with PyTorch in 18 of 18 checks" in line
    assert contents(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([out] if old else [])


@pytest.mark.parametrize("failure", [CompileError("no compiler"), KeyboardInterrupt(), OSError(28, "disk full")])
def test_failed_compilation(
    failure: BaseException, tmp_path: Path, demo_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Any) -> None:
        raise failure

    out = linked_copy(demo_artifact, tmp_path / "out")
    before = contents(tmp_path)
    monkeypatch.setattr(building, "compile_program", fail)
    assert build_demo(out) == (130 if isinstance(failure, KeyboardInterrupt) else 2)
    assert contents(tmp_path) == before
    assert list(tmp_path.iterdir()) == [out]


def test_successful_build_replaces_an_artifact(
    tmp_path: Path, demo_artifact: Path, ready_library: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = linked_copy(demo_artifact, tmp_path / "out")
    edit_manifest(out, lambda manifest: manifest.update(date="1970-01-01"))
    assert build_demo(out) == 0
    assert files_of(out) == files_of(demo_artifact)
    artifact = Artifact(out)
    assert artifact.manifest["date"] != "1970-01-01"
    (library,) = artifact.manifest["libraries"]
    assert len(library["verification"]["checks"]) == 18
    assert all(check["passed"] for check in library["verification"]["checks"])
    assert f"built {out}" in capsys.readouterr().out
    tvm_attn.load(out)
