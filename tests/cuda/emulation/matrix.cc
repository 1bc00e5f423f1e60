#include "matrix.h"

#include "include/floats.h"
#include "scheduler.h"

namespace emulation {
namespace {

constexpr uint32_t kAllLanes = 0xFFFFFFFF;

float Float16(const uint32_t* registers, int i) {
  return HalfToFloat(static_cast<uint16_t>(registers[i / 2] >> 16 * (i % 2)));
}
float Bfloat16(const uint32_t* registers, int i) {
  return Bfloat16ToFloat(static_cast<uint16_t>(registers[i / 2] >> 16 * (i % 2)));
}
/// As uint32, whose sums and products wrap as those of int32 do on the device.
uint32_t Int8(const uint32_t* registers, int i) {
  return static_cast<uint32_t>(static_cast<int8_t>(registers[i / 4] >> 8 * (i % 4)));
}

/// A register holds kPacked numbers of neighbouring k. With group = lane / 4 and member = lane % 4: A's registers are
/// rows group and group + 8 by turns, of k from kPacked * member and then of 4 kPacked more; B's are column group, the
/// same k.
template <int kK, int kPacked, typename Exact, typename Sum, Exact (*kNumber)(const uint32_t*, int)>
void Execute(void* const* slots, uint32_t) {
  using Wide = std::conditional_t<std::is_same_v<Exact, float>, double, Exact>;
  Wide a[16][kK], b[8][kK];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* from = static_cast<const MatrixSlot<Sum>*>(slots[lane]);
    const int group = lane / 4, first = lane % 4 * kPacked;
    for (int i = 0; i < kK / 2; ++i) {
      const int place = i / kPacked;
      a[group + 8 * (place % 2)][first + place / 2 * 4 * kPacked + i % kPacked] = kNumber(from->a, i);
    }
    for (int i = 0; i < kK / 4; ++i) b[group][first + i / kPacked * 4 * kPacked + i % kPacked] = kNumber(from->b, i);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto* to = static_cast<const MatrixSlot<Sum>*>(slots[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      Wide sum = 0;
      for (int k = 0; k < kK; ++k) sum += a[row][k] * b[column][k];
      *to->d[i] = static_cast<Sum>(sum + to->c[i]);
    }
  }
}

}  // namespace

void Multiply(MatrixSlot<float> slot, int k, Numbers numbers) {
  if (numbers == Numbers::kFloat16) {
    Collective("mma.sync", kAllLanes, &slot,
               k == 16 ? Execute<16, 2, float, float, Float16> : Execute<8, 2, float, float, Float16>);
  } else {
    Collective("mma.sync", kAllLanes, &slot,
               k == 16 ? Execute<16, 2, float, float, Bfloat16> : Execute<8, 2, float, float, Bfloat16>);
  }
}

void Multiply(MatrixSlot<uint32_t> slot) {
  Collective("mma.sync", kAllLanes, &slot, Execute<32, 4, uint32_t, uint32_t, Int8>);
}

}  // namespace emulation
