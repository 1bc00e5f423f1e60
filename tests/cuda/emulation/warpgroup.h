// wgmma.mma_async and mbarrier (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions", "mbarrier").
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

/// D (64, N) = A (64, 16) B (16, N), or D += A B, as one thread of the four warps gives it.
struct WarpgroupProduct {
  static constexpr int kMost = 128;
  float* d[kMost];  // N / 2 registers
  int columns;      // N
  bool is_bfloat16, is_in_registers;  // the numbers; where A is
  uint32_t a[4];
  uint64_t a_matrix, b_matrix;  // descriptors; the matrices' rows have 128 swizzled bytes
  bool accumulates, is_transposed;  // whether the numbers of a row of B lie side by side, not those of a column
};

/// Multiplies what is in shared memory now. The registers are NaN until the product's group is waited for.
void StartProduct(WarpgroupProduct product);
void CommitProducts();
void WaitForProducts(size_t pending);

void InitializeBarrier(char* barrier, uint32_t count);
void ArriveAtBarrier(char* barrier, uint32_t count);
void WaitForBarrier(char* barrier, uint32_t parity);

}  // namespace emulation
