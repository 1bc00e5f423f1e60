"""Replicas of the server on one machine or many, by Ray Serve: the same ASGI application as a deployment.

`serve run tvm_attn.serving.ray:app artifact=/models/gpt2 replicas=4`, or a configuration file with that import path.
docs/ray.md has an example for a cluster, and says what happens to requests when a replica dies.

Needs the extra `ray`. What Ray documents: https://docs.ray.io/en/latest/serve/http-guide.html (ASGI applications) and
https://docs.ray.io/en/latest/serve/advanced-guides/app-builder-guide.html (arguments).
"""
# Without `from __future__ import annotations`: Ray reads the type of the argument of `app`.

from typing import Any

from pydantic import BaseModel, Field
from ray import serve


class Arguments(BaseModel, extra="forbid"):
    """What `app` takes. Ray checks and converts it, and answers with a line for each field that is wrong.

    Attributes:
        artifact: the folder of the artifact, at this path on every node.
        name: of the model in the API; None is the folder's name.
        replicas: number of processes, each with the whole model.
        device: as for `tvm_attn.load`.
        threads: CPU threads of a replica, and the CPUs that Ray sets aside for it.
        gpus: that Ray sets aside for a replica, and that alone it sees; 0 for the CPU.
        max_batch: sequences that a replica computes together.
        queue: most requests that wait in Ray for a replica; the next are refused with status 503.
        api_key: that clients must send; None is no key.
    """

    artifact: str
    name: str | None = None
    replicas: int = Field(1, ge=1)
    device: str = "auto"
    threads: int = Field(1, ge=1)
    gpus: float = Field(0, ge=0)
    max_batch: int = Field(8, ge=1)
    queue: int = Field(256, ge=1)
    api_key: str | None = None


def app(arguments: Arguments) -> serve.Application:
    """The application for `serve.run`, `serve run` and configuration files.

    A replica takes up to twice `max_batch` requests, so that the next is there when a sequence ends; the others wait in
    Ray, which gives them to whichever replica is free and alive.
    """

    def build() -> Any:  # in the replica's process
        import tvm_attn
        from tvm_attn.serving.app import create_app

        model = tvm_attn.load(
            arguments.artifact, arguments.device, threads=arguments.threads, max_batch=arguments.max_batch
        )
        name = arguments.name or arguments.artifact.rstrip("/").rpartition("/")[2]
        return create_app(model, name=name, api_key=arguments.api_key)

    deployment = serve.deployment(
        name="tvm_attn",
        num_replicas=arguments.replicas,
        ray_actor_options={"num_cpus": arguments.threads, "num_gpus": arguments.gpus},
        max_ongoing_requests=2 * arguments.max_batch,
        max_queued_requests=arguments.queue,
    )
    return deployment(serve.ingress(build)()).bind()
