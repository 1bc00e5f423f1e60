"""Loading a compiled library from content that was checked.

The dynamic linker gives the library that it already has where it knows the path or the file, so one that was built
again into the same folder would never be loaded; and it reads the file some time after the content was compared with
the manifest. Therefore the content goes into a file in memory, under a path that this process has not used before.
Libraries stay loaded until the process ends, as TVM wants it; the same content is loaded once.
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
# forbids to execute the file as a program, not to map it as a library.
_CLOEXEC, _NOEXEC_SEAL = 1, 8

_lock = threading.Lock()
_modules: dict[bytes, tvm.runtime.Module] = {}
_attempts = 0


def load_library(content: npt.NDArray[np.uint8], name: str) -> tvm.runtime.Module:
    """The TVM module in a shared library's content.

    Args:
        content: uint8 values.
        name: what messages, debuggers and profilers call it.

    Raises:
        OSError: the system gives no file in memory.
        RuntimeError: it is no library, or not one of TVM's.
    """
    global _attempts
    key = hashlib.sha256(content.data).digest()
    with _lock:
        if key not in _modules:
            _attempts += 1
            with open(_file_in_memory(name), "wb") as file:
                file.write(content.data)
                file.flush()
                # Descriptors have been used before. The linker compares paths as text.
                path = f"/proc/self/fd/{'./' * _attempts}{file.fileno()}"
                try:
                    _modules[key] = tvm_ffi.get_global_func("ffi.Module.load_from_file.so")(path, "so")
                except Exception as error:
                    raise RuntimeError(str(error).replace(path, name)) from None
        return _modules[key]


def _file_in_memory(name: str) -> int:
    # Not `os.memfd_create`: Python lacks it where it was compiled for an older C library than the one that is there.
    create = ctypes.CDLL(None, use_errno=True).memfd_create
    for flags in (_CLOEXEC, _CLOEXEC | _NOEXEC_SEAL):
        descriptor: int = create(os.fsencode(name)[:200], flags)
        if descriptor >= 0:
            return descriptor
    error = ctypes.get_errno()
    raise OSError(error, os.strerror(error))
