"""A builder that compiles nothing: a candidate's library holds its decisions. FAULTS names faults by decision."""

import json
import os
from pathlib import Path
from typing import Any

from tvm_attn.tuning import process
from tvm_attn.tuning.process import serve


def handle(request: dict[str, Any]) -> dict[str, Any]:
    if "calls" in request:
        Path(request["calls"], "calls.json").write_text("[]")
        return {}
    for rule in filter(lambda rule: ":" in rule, os.environ.get("FAULTS", "").split(",")):
        decision, fault = rule.split(":")
        name, value = decision.split("=")
        if request["decisions"].get(name) == int(value):
            if fault == "refuse":
                raise ValueError("several lines\nthat end with the reason")
            if fault == "full":
                raise OSError(28, "No space left on device")
            if fault == "spin-building":
                while True:
                    pass
    temporary = Path(f"{request['library']}.part")
    temporary.write_text(json.dumps(request["decisions"]))
    temporary.replace(request["library"])
    return {}


if __name__ == "__main__":
    process.PROCESSOR_SECONDS = 1
    serve(handle)
