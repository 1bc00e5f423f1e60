"""Loading a compiled library from content that was checked.

The dynamic linker returns the library it already has if it knows the path or the file, so a library rebuilt into the
same folder would never be loaded; and it reads the file some time after the content was compared with the manifest. So
the content goes into a file in memory, under a path that this process has not used before. Libraries stay loaded until
the process ends, as TVM requires; the same content is loaded once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading

import numpy as np
import numpy.typing as npt
import tvm
import tvm_ffi

# <linux/memfd.h>. The second pair is for systems that allow no other files in memory (vm.memfd_noexec=2); the flag
# forbids executing the file as a program, not mapping it as a library.
_CLOEXEC, _NOEXEC_SEAL = 1, 8

_lock = threading.Lock()
_modules: dict[bytes, tvm.runtime.Module] = {}
_attempts = 0


def load_library(content: npt.NDArray[np.uint8], name: str) -> tvm.runtime.Module:
    """Loads the TVM module from the content of a shared library.

    Args:
        content: uint8 values.
        name: the name that messages, debuggers and profilers show.

    Raises:
        OSError: the system does not provide a file in memory.
        RuntimeError: the content is not a library, or not one of TVM's.
    """
    global _attempts
    key = hashlib.sha256(content.data).digest()
    with _lock:
        if key not in _modules:
            _attempts += 1
            with open(_file_in_memory(name), "wb") as file:
                file.write(content.data)
                file.flush()
                # Descriptor numbers are reused, so the path is made unique: the linker compares paths as text.
                path = f"/proc/self/fd/{'./' * _attempts}{file.fileno()}"
                try:
                    _modules[key] = tvm_ffi.get_global_func("ffi.Module.load_from_file.so")(path, "so")
                except Exception as error:
                    raise RuntimeError(str(error).replace(path, name)) from None
        return _modules[key]


def _file_in_memory(name: str) -> int:
    # Not `os.memfd_create`: Python lacks it if it was compiled for an older C library than the installed one.
    create = ctypes.CDLL(None, use_errno=True).memfd_create
    for flags in (_CLOEXEC, _CLOEXEC | _NOEXEC_SEAL):
        descriptor: int = create(os.fsencode(name)[:200], flags)
        if descriptor >= 0:
            return descriptor
    error = ctypes.get_errno()
    raise OSError(error, os.strerror(error))
