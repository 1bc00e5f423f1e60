"""A runner that measures nothing: times follow from the decisions, and FAULTS names faults by decision.

Every measured candidate is a line of the file MEASURED.
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from tvm_attn.tuning import process
from tvm_attn.tuning.process import serve


def handle(request: dict[str, Any]) -> dict[str, Any]:
    if "calls" in request:
        if os.environ.get("FAULTS") == "unreachable":
            raise OSError("no route to the device")
        return {}
    decisions = json.loads(Path(request["library"]).read_text())
    with Path(os.environ["MEASURED"]).open("a") as file:
        file.write(json.dumps(decisions) + "\n")
    time.sleep(float(os.environ.get("SLEEP", "0")))
    for rule in filter(lambda rule: ":" in rule, os.environ.get("FAULTS", "").split(",")):
        decision, fault = rule.split(":")
        name, value = decision.split("=")
        if decisions.get(name) == int(value):
            if fault == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            if fault == "spin":
                while True:
                    pass
            if fault == "sleep":
                time.sleep(600)
            if fault == "memory":
                bytearray(1 << 40)
            if fault == "wrong":
                raise ValueError("the result disagrees with the float64 reference")
    seconds = 1e-3 * (1 + decisions.get("k_unroll", 1) / 16 + decisions.get("prefetch_bytes", 0) / 2**16)
    return {"seconds": [seconds], "load": float(os.environ.get("LOAD", "0"))}


if __name__ == "__main__":
    process.PROCESSOR_SECONDS = 1
    serve(handle)
