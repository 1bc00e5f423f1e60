#include "warpgroup.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "include/floats.h"
#include "races.h"
#include "scheduler.h"

namespace emulation {
namespace {

constexpr uint32_t kThreads = 128;
constexpr uint32_t kNamedBarriers = 16;  // numbers from here on are no barriers of the program

WarpgroupProduct* slots[1024];

float Number(uint16_t bits, bool is_bfloat16) { return is_bfloat16 ? Bfloat16ToFloat(bits) : HalfToFloat(bits); }

/// A matrix with the 128-byte swizzle: bits 4 to 6 of an address are xored with bits 7 to 9.
class Matrix {
 public:
  Matrix(uint64_t descriptor, bool is_bfloat16) : is_bfloat16_(is_bfloat16) {
    start_ = static_cast<uint32_t>(descriptor & 0x3FFF) << 4;
    leading_ = static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) << 4;
    stride_ = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
    if (descriptor >> 62 != 1) Fail("wgmma: only the 128-byte swizzle is emulated");
    if (descriptor >> 49 & 7) Fail("wgmma: only a base offset of 0 is emulated");
  }

  /// Number k of line `line`, a row of A or a column of B; `is_transposed` if those of a k lie side by side.
  float At(uint32_t line, uint32_t k, bool is_transposed) const {
    const uint32_t offset = is_transposed ? line / 64 * leading_ + line % 64 * 2 + k / 8 * stride_ + k % 8 * 128
                                          : line / 8 * stride_ + line % 8 * 128 + k * 2;
    uint32_t address = start_ + offset;
    address ^= (address >> 7 & 7) << 4;
    const char* pointer = SharedPointer(SharedAddress(DynamicShared()) + address);
    AccessForRaces(pointer, 2, false, __builtin_return_address(0));
    uint16_t bits;
    memcpy(&bits, pointer, sizeof bits);
    return Number(bits, is_bfloat16_);
  }

 private:
  bool is_bfloat16_;
  uint32_t start_, leading_, stride_;
};

void Execute(WarpgroupProduct* const* threads) {
  const WarpgroupProduct& first = *threads[0];
  const int columns = first.columns;
  std::vector<float> a(64 * 16), b(16 * columns);
  const Matrix right(first.b_matrix, first.is_bfloat16);
  for (int k = 0; k < 16; ++k) {
    for (int column = 0; column < columns; ++column) b[k * columns + column] = right.At(column, k, first.is_transposed);
  }
  if (first.is_in_registers) {
    for (uint32_t thread = 0; thread < kThreads; ++thread) {
      const uint32_t lane = thread % 32;
      for (int i = 0; i < 8; ++i) {
        const uint32_t word = threads[thread]->a[i / 2];
        const uint32_t row = thread / 32 * 16 + lane / 4 + 8 * (i / 2 % 2), k = lane % 4 * 2 + i % 2 + 8 * (i / 4);
        a[row * 16 + k] = Number(static_cast<uint16_t>(word >> 16 * (i % 2)), first.is_bfloat16);
      }
    }
  } else {
    const Matrix left(first.a_matrix, first.is_bfloat16);
    for (int row = 0; row < 64; ++row) {
      for (int k = 0; k < 16; ++k) a[row * 16 + k] = left.At(row, k, false);
    }
  }
  for (uint32_t thread = 0; thread < kThreads; ++thread) {
    const WarpgroupProduct& product = *threads[thread];
    if (product.b_matrix != first.b_matrix || product.columns != columns || product.accumulates != first.accumulates ||
        (!first.is_in_registers && product.a_matrix != first.a_matrix)) {
      Fail("wgmma: the threads of a warpgroup give different operands");
    }
    Products& state = ThreadOf(current->number - current->number % kThreads + thread).products;
    for (int i = 0; i < columns / 2; ++i) {
      const uint32_t row = thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2);
      const int column = 8 * (i / 4) + 2 * (thread % 4) + i % 2;
      const auto known = state.latest.find(product.d[i]);
      const float before = known != state.latest.end() ? known->second : *product.d[i];
      double sum = product.accumulates ? before : 0.0;
      for (int k = 0; k < 16; ++k) sum += double{a[row * 16 + k]} * b[k * columns + column];
      state.latest[product.d[i]] = static_cast<float>(sum);
      state.uncommitted.emplace_back(product.d[i], static_cast<float>(sum));
      *product.d[i] = std::numeric_limits<float>::quiet_NaN();
    }
  }
}

/// An mbarrier's 64 bits; the order is ours.
struct Phases {
  uint32_t pending, expected, parity;
  static constexpr uint64_t kMark = 0x5C3A;

  static Phases Of(const char* barrier) {
    uint64_t bits;
    memcpy(&bits, barrier, sizeof bits);
    if (bits >> 41 != kMark) Fail("an mbarrier is used that was not initialized");
    return {static_cast<uint32_t>(bits & 0xFFFFF), static_cast<uint32_t>(bits >> 20 & 0xFFFFF),
            static_cast<uint32_t>(bits >> 40 & 1)};
  }
  void Write(char* barrier) const {
    const uint64_t bits = kMark << 41 | uint64_t{parity} << 40 | uint64_t{expected} << 20 | pending;
    memcpy(barrier, &bits, sizeof bits);
  }
};

}  // namespace

void StartProduct(WarpgroupProduct product) {
  const uint32_t number = current->number, first = number - number % kThreads;
  slots[number] = &product;
  Meet(kNamedBarriers + number / kThreads, kThreads);
  if (number == first) Execute(slots + first);
  Meet(kNamedBarriers + number / kThreads, kThreads);
}

void CommitProducts() {
  Products& products = current->products;
  products.groups.push_back(std::move(products.uncommitted));
  products.uncommitted.clear();
}

void WaitForProducts(size_t pending) {
  Products& products = current->products;
  if (!products.uncommitted.empty()) Fail("wgmma.wait_group: products were started and not committed");
  while (products.groups.size() > pending) {
    for (const auto& [to, value] : products.groups.front()) *to = value;
    products.groups.erase(products.groups.begin());
  }
  products.latest.clear();
  for (const auto& group : products.groups) {
    for (const auto& [to, value] : group) {
      *to = std::numeric_limits<float>::quiet_NaN();
      products.latest[to] = value;
    }
  }
}

void InitializeBarrier(char* barrier, uint32_t count) { Phases{count, count, 0}.Write(barrier); }

void ArriveAtBarrier(char* barrier, uint32_t count) {
  Phases phases = Phases::Of(barrier);
  if (count == 0 || count > phases.pending) Fail("mbarrier.arrive: more arrivals than the phase expects");
  ReleaseForRaces(barrier);
  phases.pending -= count;
  if (phases.pending == 0) phases = {phases.expected, phases.expected, phases.parity ^ 1};
  phases.Write(barrier);
  Progress();
}

void WaitForBarrier(char* barrier, uint32_t parity) {
  if (parity > 1) Fail("mbarrier.try_wait: a parity that is neither 0 nor 1");
  while (Phases::Of(barrier).parity == parity) Yield();
  AcquireForRaces(barrier);
}

}  // namespace emulation
