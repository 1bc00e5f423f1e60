// The arithmetic of mma.sync: D = A B + C, (16, 8) = (16, k) (k, 8) + (16, 8).
#pragma once

#include <cstdint>

namespace emulation {

enum class Numbers { kFloat16, kBfloat16 };

/// A lane's registers.
template <typename Sum>
struct MatrixSlot {
  Sum* d[4];
  uint32_t a[4], b[2];
  Sum c[4];
};

/// Floats with k of 8 or 16. Products are exact and summed in float64: how the device rounds is not specified.
void Multiply(MatrixSlot<float> slot, int k, Numbers numbers);

/// int8 with k = 32; sums are int32 in registers.
void Multiply(MatrixSlot<uint32_t> slot);

}  // namespace emulation
