"""Makes the parameters of an artifact with random weights again, so that they need not be packed.

A seed replaces 250 MB. Needs NumPy, and neither TVM nor the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm_attn.compiler.artifact import packed_first, write_params
from tvm_attn.errors import ArtifactError
from tvm_attn.model.checkpoint import RANDOM_SOURCE, random_params
from tvm_attn.model.params import stored_params
from tvm_attn.runtime.artifact import MANIFEST, PARAMS_INDEX, Artifact, digest

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Restored:
    """The result of `restore_params`.

    Attributes:
        written: whether parameters were written; False if they were there already.
        different: files that differ from the builder's; the manifest has been changed to match them.
    """

    written: bool
    different: tuple[str, ...] = ()


def is_restorable(artifact: Artifact) -> bool:
    """Whether the artifact's weights are random ones that `restore_params` can make."""
    return artifact.manifest.get("weights") == RANDOM_SOURCE


def restore_params(folder: str | Path) -> Restored:
    """Writes the parameters of an artifact with random weights if they are missing.

    They are compared with the manifest. NumPy draws normal numbers with the C library's logarithm, which another
    version may round differently in the last place; then the manifest is changed, and the result says so.

    Args:
        folder: the artifact, with its manifest and libraries.

    Raises:
        ArtifactError: the folder holds no artifact, or its weights are not random.
    """
    artifact, folder = Artifact(folder), Path(folder)
    if (folder / PARAMS_INDEX).is_file():
        return Restored(written=False)
    if not is_restorable(artifact):
        raise ArtifactError(
            f"artifact {folder}: its parameters are missing, and are {artifact.manifest.get('weights')!r:.80}, which "
            "only their checkpoint can give; copy the whole artifact"
        )
    config, dtype, quant = artifact.config, artifact.dtype, artifact.quantization
    temporary = Path(tempfile.mkdtemp(prefix=".params-", dir=folder))
    try:
        write_params(temporary, packed_first(stored_params(random_params(config), dtype, quant)))
        written = dict(_described(temporary))
        listed = {name: entry for name, entry in artifact.manifest["files"].items() if name.startswith("params/")}
        different = tuple(sorted(name for name in {*written, *listed} if written.get(name) != listed.get(name)))
        (temporary / "params").rename(folder / "params")
        if different:
            _replace_entries(artifact, written)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Restored(True, different)


def _described(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name, size and SHA-256 of each file in `folder`/params, in the manifest's form."""
    paths = sorted((folder / "params").iterdir())
    with ThreadPoolExecutor() as pool:
        for path, digest_ in zip(paths, pool.map(_sha256, paths), strict=True):
            yield f"params/{path.name}", {"bytes": path.stat().st_size, "sha256": digest_}


def _sha256(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def _replace_entries(artifact: Artifact, written: dict[str, dict[str, Any]]) -> None:
    """Changes the manifest's entries for the parameters, and no others."""
    body = dict(artifact.manifest)
    kept = {name: entry for name, entry in body["files"].items() if not name.startswith("params/")}
    body["files"] = dict(sorted({**kept, **written}.items()))
    body["sha256"] = digest(body)
    temporary = artifact.folder / f".{MANIFEST}"
    temporary.write_text(json.dumps(body, indent=2), encoding="utf-8")
    temporary.replace(artifact.folder / MANIFEST)
