"""Starts a command in this bundle, with the Python that runs this file.

    python3 run.py                                                      what is here
    python3 run.py -m tvm_attn generate artifacts/demo --prompt "Return"
    python3 run.py -m tvm_attn verify artifacts/gpt2 --device cuda:0
    python3 run.py -m pytest tests/gpu
    python3 run.py -m benchmarks.gpu

Arguments are the interpreter's; paths are relative to the bundle. Parameters that were not packed are made first.
Needs NumPy, and PyTorch for comparisons with it.
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent


def main() -> int:
    """Run the command; returns its exit status."""
    facts = json.loads((ROOT / "bundle.json").read_text(encoding="utf-8"))
    if problem := _problem(facts):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    os.environ.update(environment(facts, dict(os.environ)))
    os.chdir(ROOT)
    restored = [artifact["name"] for artifact in facts["artifacts"] if artifact["parameters"] == "restored"]
    if not restore([Path("artifacts") / name for name in restored]):
        return 2
    if len(sys.argv) == 1:
        names = ", ".join(artifact["name"] for artifact in facts["artifacts"]) or "none"
        print(f"{__doc__}\nartifacts: {names}; kernels: {'yes' if Path('kernels').is_dir() else 'no'}")
        return 0
    # Signals go to the command, and its exit status to the caller.
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


def _problem(facts: dict[str, Any]) -> str:
    """What this machine lacks to run this bundle, or an empty string."""
    version = ".".join(platform.python_version_tuple()[:2])
    here = f"{sys.platform}-{platform.machine()}"
    if here != facts["platform"]:
        return f"this bundle is for {facts['platform']}, this machine is {here}; pack it on such a machine"
    if platform.python_implementation() != "CPython" or version not in facts["pythons"]:
        packed = ", ".join(facts["pythons"])
        return f"this bundle serves CPython {packed}, this is {version}; pack it again with --python {version}"
    if not _has("numpy"):
        return f"{sys.executable} has no NumPy; run this with the Python that has NumPy and PyTorch"
    return ""


def environment(facts: dict[str, Any], given: dict[str, str]) -> dict[str, str]:
    """Variables that let the command find TVM's runtime, and packages that this Python lacks."""
    lacking = [name for name, module in facts["extra"].items() if not _has(module)]
    paths = [ROOT, ROOT / "site", *(ROOT / "extra" / name for name in lacking)]
    return {
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *filter(None, [given.get("PYTHONPATH")])]),
        "TVM_USE_RUNTIME_LIB": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Plugins of the machine's own pytest may not work with this one.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent package exists
        return False


_RESTORE = """
import sys
from benchmarks.restore import restore_params
print(*restore_params(sys.argv[1]).different, sep=", ")
"""


def restore(folders: list[Path]) -> bool:
    """Makes the parameters that these artifacts lack, all at once; returns whether all could be made."""
    lacking = [folder for folder in folders if not (folder / "params" / "tensor-cache.json").is_file()]
    if lacking:
        print(f"making the parameters of {', '.join(map(str, lacking))}", file=sys.stderr)
    command = [sys.executable, "-c", _RESTORE]
    makers = [subprocess.Popen([*command, str(folder)], stdout=subprocess.PIPE, text=True) for folder in lacking]
    made = True
    for folder, maker in zip(lacking, makers, strict=True):
        different = maker.communicate()[0].strip()
        if maker.returncode:
            print(f"error: the parameters of {folder} cannot be made", file=sys.stderr)
            made = False
        elif different:
            print(f"note: not bit for bit the builder's (another NumPy or C library): {different}", file=sys.stderr)
    return made


if __name__ == "__main__":
    sys.exit(main())
