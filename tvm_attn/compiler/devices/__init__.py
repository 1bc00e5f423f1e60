"""How libraries are built for each device class: one module per class, named as in `tvm_attn.backends`."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

from tvm_attn.compiler.devices.base import Backend
from tvm_attn.config import GPT2Config
from tvm_attn.model.layout import Layout, check_cache
from tvm_attn.targets import Target

__all__ = ["Backend", "backend_for", "layout_for"]


def backend_for(target: Target) -> Backend:
    """The backend of a target's device class."""
    found: Backend = import_module(f"{__name__}.{target.device}").BACKEND
    return found


def layout_for(config: GPT2Config, target: Target, dtype: str, quant: str, kv: str | None = None) -> Layout:
    """The layout of a model's library for a target; `kv` is "int8" or None, the storage dtype.

    Raises:
        ConfigError: the model cannot have such a KV cache.
    """
    check_cache(config, kv)
    return replace(backend_for(target).layout(config, target, dtype, quant), kv=kv)
