"""`tvm-attn serve`: answer completions over HTTP, as OpenAI's API does."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from tvm_attn.cli import Parser, existing_folder, integer, open_artifact, progress, real, run
from tvm_attn.errors import ServerError, UsageError

KEY_VARIABLE = "TVM_ATTN_API_KEY"


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return run(lambda: _serve(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tvm-attn serve",
        description="Answer completions over HTTP, as OpenAI's API does. Ctrl-C or SIGTERM lets running requests "
        "finish and ends; a second one ends at once.",
        epilog=f"Keys may also be in the environment variable {KEY_VARIABLE}, separated by commas: arguments can be "
        "read by every user of the machine.",
    )
    parser.add_argument("artifact", metavar="ARTIFACT", type=existing_folder, help="folder that tvm-attn build wrote")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: %(default)s, this machine only"
    )
    parser.add_argument("--port", type=integer(0, 65535), default=8000, help="default: %(default)s; 0 takes a free one")
    parser.add_argument("--name", help="what clients call the model; default: the name of the artifact's folder")
    parser.add_argument(
        "--max-batch", type=integer(1, 4096), default=16, metavar="N", help="sequences computed together; default: 16"
    )
    parser.add_argument(
        "--queue",
        type=integer(0, 1 << 20),
        default=128,
        metavar="N",
        help="sequences that may wait for a place in the batch; default: 128",
    )
    parser.add_argument(
        "--api-key", action="append", metavar="KEY", help="a key that requests need; several may be given"
    )
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name of this server in the Host header"
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="a site whose pages may use the server, e.g. https://example.com; '*' is all; default: none but its own",
    )
    parser.add_argument(
        "--shutdown-seconds", type=real, default=30.0, metavar="S", help="for running requests to finish; default: 30"
    )
    parser.add_argument("--access-log", action="store_true", help="log each request on stdout")
    parser.add_argument(
        "--speculate",
        choices=("auto", "draft", "prompt", "off"),
        default="auto",
        help="how tokens are guessed, as in tvm-attn generate; default: auto",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:0 or vulkan:0; default: %(default)s")
    parser.add_argument(
        "--threads", type=integer(1, 4096), metavar="N", help="CPU threads; default: all cores that the process may use"
    )
    return parser


def _serve(args: argparse.Namespace) -> int:
    try:
        from tvm_attn.serving.app import LOOPBACK, create_app
        from tvm_attn.serving.server import Server, open_socket
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tvm_attn"):
            raise
        raise ServerError(f"{error.name} is not installed; pip install 'tvm-attn[serve]'") from None
    keys = args.api_key or [key.strip() for key in os.environ.get(KEY_VARIABLE, "").split(",") if key.strip()]
    if not all(key.strip() and key.isascii() and key.isprintable() for key in keys):
        raise UsageError("a key must be of printable ASCII characters, at least one")
    if not 0 <= args.shutdown_seconds <= 86400:
        raise UsageError("--shutdown-seconds must be from 0 to 86400")
    open_artifact(args.artifact, args.device)
    with open_socket(args.host, args.port) as listener:
        import tvm_attn
        from tvm_attn.runtime.tvm_import import runtime_only

        with runtime_only(), progress(quiet=True) as show:
            show(f"loading {args.artifact}")
            model = tvm_attn.load(
                args.artifact,
                device=args.device,
                threads=args.threads,
                max_batch=args.max_batch,
                draft=args.speculate in ("auto", "draft"),
            )
            model.scheduler.speculate = args.speculate
            model.generate([0], max_new_tokens=2)  # whatever is prepared at the first call
        name = args.name or args.artifact.resolve().name
        is_local = listener.getsockname()[0] in ("127.0.0.1", "::1")
        hosts = [*(LOOPBACK if is_local else ()), *(host.lower() for host in args.allow_host)]
        app = create_app(
            model, name=name, api_key=keys, queue=args.queue, hosts=hosts or None, origins=args.allow_origin
        )
        host = f"[{args.host}]" if ":" in args.host else args.host
        line = f"serving {name} at http://{host}:{listener.getsockname()[1]} on {model.device}"
        server = Server(
            app,
            shutdown_seconds=args.shutdown_seconds,
            started=lambda: print(line, flush=True),
            access_log=args.access_log,
        )
        server.run(sockets=[listener])
        model.scheduler.close(cancel=True)
    return 130 if server.signal == signal.SIGINT else 0


if __name__ == "__main__":
    sys.exit(main())
