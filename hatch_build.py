"""The package's build: compiles the Vulkan runtime with CMake, if the machine has the tools.

| TVM_ATTN_BUILD_VULKAN | effect |
|---|---|
| unset | builds the runtime; if a tool or Vulkan's headers are missing, continues without it and says so |
| 0 | continues without it |
| 1 | fails if something is missing |
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "tvm_attn/vulkan/libtvm_attn_vulkan.so"


class VulkanRuntime(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the library to a wheel, or puts it into the source tree for an editable install."""

    def dependencies(self) -> list[str]:
        """TVM, whose headers the runtime includes, in the version that the package needs; nothing if not built."""
        if _switched_off() or _missing():
            return []
        return [line for line in self.metadata.core.dependencies if line.startswith("apache-tvm")]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Builds the library. `version` is "editable" or "standard"."""
        if _switched_off():
            return
        missing = ", ".join(_missing())
        if missing:
            if os.environ.get("TVM_ATTN_BUILD_VULKAN") == "1":
                raise RuntimeError(f"the Vulkan runtime cannot be built: missing {missing}")
            self.app.display_warning(f"built without the Vulkan runtime: missing {missing}")
            return
        if version == "editable":
            # Keeps object files for the next build. Renaming leaves the old library to processes that have loaded it.
            built = self._compile(Path(self.root, "build/vulkan"))
            target = Path(self.root, LIBRARY)
            with tempfile.TemporaryDirectory(dir=Path(self.root, "build")) as scratch:
                Path(shutil.copyfile(built, Path(scratch, target.name))).replace(target)
            return
        self._scratch = tempfile.TemporaryDirectory(prefix="tvm_attn-vulkan-")
        build_data["force_include"][str(self._compile(Path(self._scratch.name)))] = LIBRARY
        # One wheel for every Python: the library does not use Python.
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes the temporary files of a wheel's build."""
        if hasattr(self, "_scratch"):
            self._scratch.cleanup()

    def _compile(self, folder: Path) -> Path:
        options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DVULKAN_INCLUDE_DIR={_vulkan_headers()}"]
        commands = (
            ["cmake", "-S", self.root, "-B", str(folder), *options],
            ["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1)],
        )
        for command in commands:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode != 0:
                raise RuntimeError(
                    f"building the Vulkan runtime failed (TVM_ATTN_BUILD_VULKAN=0 leaves it out): "
                    f"{' '.join(command)}\n{done.stdout}"
                )
        return folder / Path(LIBRARY).name


def _switched_off() -> bool:
    return os.environ.get("TVM_ATTN_BUILD_VULKAN") == "0" or not sys.platform.startswith("linux")


def _missing() -> list[str]:
    """What this machine lacks to build the runtime, as names of Debian packages."""
    missing = []
    if shutil.which("cmake") is None:
        missing.append("cmake")
    if shutil.which("make") is None and shutil.which("ninja") is None:
        missing.append("make")
    compilers = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    if not any(name and shutil.which(name.split()[0]) for name in compilers):
        missing.append("g++")
    if _vulkan_headers() is None:
        missing.append("libvulkan-dev")
    return missing


def _vulkan_headers() -> Path | None:
    """The folder that holds vulkan/vulkan_core.h, or None."""
    sdk = os.environ.get("VULKAN_SDK")
    folders = [
        *os.environ.get("CPATH", "").split(":"),
        f"{sdk}/include" if sdk else "",
        "/usr/local/include",
        "/usr/include",
    ]
    for folder in folders:
        if folder and Path(folder, "vulkan/vulkan_core.h").is_file():
            return Path(folder)
    return None
