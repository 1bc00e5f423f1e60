"""`tvm-attn devices`: the devices of this machine, their features and limits, and the targets that fit."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tvm_attn.cli import Parser, new_table, print_tables, progress, run

if TYPE_CHECKING:
    from tvm_attn.inventory import Fit, Inventory


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return run(lambda: _devices(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tvm-attn devices",
        description="List the devices of this machine, and what is missing for each target.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def _devices(args: argparse.Namespace) -> int:
    with progress(quiet=True) as show:
        show("looking at the devices")
        from tvm_attn.inventory import take_inventory

        inventory = take_inventory()
    if args.json:
        print(json.dumps(inventory.to_dict()))
    else:
        _print(inventory)
    return 0


def _print(inventory: Inventory) -> None:
    from rich.table import Table

    for device in inventory.devices:
        table = Table(title=f"{device.device}: {device.name}", title_justify="left", show_header=False, box=None)
        table.add_column(no_wrap=True)
        table.add_column()
        if device.missing:
            table.add_row("cannot be used", f"needs {', '.join(device.missing)}")
        if device.driver:
            table.add_row("driver", device.driver)
        table.add_row("features", " ".join(device.features) or "-")
        for name, value in device.limits.items():
            table.add_row(name.replace("_", " "), _limit(name, value))
        print_tables([table])
        print()
    for kind, reason in inventory.absent.items():
        print(f"{kind}: {reason}")
    table = new_table("targets", ("target", "device", "runs", "missing", "file"))
    for (target, device, file), fits in groupby(inventory.fits, lambda fit: (fit.target, fit.device, fit.file)):
        table.add_row(target, device, *_dtypes(list(fits)), file)
    print_tables([table])


def _dtypes(fits: list[Fit]) -> tuple[str, str]:
    """The dtypes that run, and what is missing for the others."""
    runs = [fit.dtype for fit in fits if not fit.missing]
    missing: dict[tuple[str, ...], list[str]] = {}
    for fit in fits:
        if fit.missing:
            missing.setdefault(fit.missing, []).append(fit.dtype)
    if len(missing) == 1 and not runs:
        return "no", ", ".join(*missing)
    reasons = (f"{', '.join(dtypes)}: {', '.join(names)}" for names, dtypes in missing.items())
    return ", ".join(runs) or "no", "; ".join(reasons)


def _limit(name: str, value: Any) -> str:
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        shapes = ("{m} x {n} x {k} {a} with {result} sums".format(**entry) for entry in value)
        return ", ".join(dict.fromkeys(shapes)) or "-"
    if isinstance(value, list):
        return " x ".join(map(str, value))
    if name.endswith("bytes") and isinstance(value, int) and value >= 1 << 30:
        return f"{value / (1 << 30):.1f} GiB"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
