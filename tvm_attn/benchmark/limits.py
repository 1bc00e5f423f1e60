"""The limits of a machine, and the least time that work can take within them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm_attn.benchmark.counts import Work


@dataclass(frozen=True)
class Limits:
    """Measured limits with `threads` threads, each the best of several runs.

    Attributes:
        threads: number of threads.
        float32_gflops: GFLOP/s of float32 multiply-adds.
        read_gbytes: GB/s of reading memory.
        bfloat16_gflops: GFLOP/s of dot products of bfloat16 pairs into float32 (AVX-512 BF16); None without them.
        int8_gops: GOP/s of dot products of four 8-bit numbers into int32 (AVX-512 VNNI); None without them.
        buffer_bytes: size of the buffer that was read.
    """

    threads: int
    float32_gflops: float
    read_gbytes: float
    bfloat16_gflops: float | None
    int8_gops: float | None
    buffer_bytes: int

    def best(self, other: Limits) -> Limits:
        """The higher of each limit of two measurements: disturbances only ever lower a limit."""
        bfloat16 = [value for value in (self.bfloat16_gflops, other.bfloat16_gflops) if value is not None]
        int8 = [value for value in (self.int8_gops, other.int8_gops) if value is not None]
        return replace(
            self,
            float32_gflops=max(self.float32_gflops, other.float32_gflops),
            read_gbytes=max(self.read_gbytes, other.read_gbytes),
            bfloat16_gflops=max(bfloat16, default=None),
            int8_gops=max(int8, default=None),
        )

    def compute(self, arithmetic: str) -> float:
        """GFLOP/s of "float32", "bfloat16" or "int8"; of float32 if the processor lacks such instructions."""
        limit = {"bfloat16": self.bfloat16_gflops, "int8": self.int8_gops}.get(arithmetic)
        return limit or self.float32_gflops

    def bound(self, work: Work, arithmetic: str = "float32") -> tuple[float, str]:
        """The least seconds that a call can take, and the binding limit: "compute" or "memory", whichever takes longer.

        The roofline model (Williams et al., 2009). Matrix products run in `arithmetic`; so does attention if that is
        bfloat16, otherwise it runs in float32.
        """
        attention = self.compute("bfloat16" if arithmetic == "bfloat16" else "float32")
        compute = (work.products / self.compute(arithmetic) + work.attention / attention) / 1e9
        return max((compute, "compute"), (work.bytes / self.read_gbytes / 1e9, "memory"))
