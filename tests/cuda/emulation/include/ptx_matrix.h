// ldmatrix and mma.sync (PTX ISA, "Warp-level matrix instructions"): all lanes of a warp take part.
#pragma once

#include <cstdint>

#include "../matrix.h"
#include "ptx.h"

namespace emulation {

constexpr uint32_t kAllLanes = 0xFFFFFFFF;

struct MatrixRow {
  const uint16_t* row;  // of the matrix whose rows this lane names
  uint32_t* registers[4];
};

/// Lanes 8 i to 8 i + 7 name the rows of matrix i, 8 numbers of 16 bits each. Lane t receives numbers 2 (t % 4) and
/// 2 (t % 4) + 1 of row t / 4; transposed, of column t / 4.
template <int kMatrices, bool kTranspose>
EMULATED_UNORDERED void LoadMatrices(void* const* slots, uint32_t) {
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    uint16_t numbers[8][8];
    for (int row = 0; row < 8; ++row) {
      const uint16_t* source = static_cast<MatrixRow*>(slots[8 * matrix + row])->row;
      for (int column = 0; column < 8; ++column) numbers[row][column] = source[column];
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint16_t low = kTranspose ? numbers[column][row] : numbers[row][column];
      const uint16_t high = kTranspose ? numbers[column + 1][row] : numbers[row][column + 1];
      *static_cast<MatrixRow*>(slots[lane])->registers[matrix] = static_cast<uint32_t>(high) << 16 | low;
    }
  }
}

template <int kMatrices, bool kTranspose, typename Address, typename... Registers>
void LoadMatrices(Address address, Registers&... registers) {
  MatrixRow slot{nullptr, {&registers...}};
  // The addresses of lanes that name no row are ignored.
  if (current->lane < 8 * kMatrices) {
    slot.row = reinterpret_cast<const uint16_t*>(Pointer(address));
    CheckAlignment(slot.row, 16, "ldmatrix");
    for (int i = 0; i < 8; ++i) const_cast<const volatile uint16_t*>(slot.row)[i];  // its lane reads a row
  }
  Collective("ldmatrix", kAllLanes, &slot, LoadMatrices<kMatrices, kTranspose>);
}

}  // namespace emulation

#define EMULATED_LDMATRIX(SUFFIX, TRANSPOSE)                                                                        \
  template <typename Address>                                                                                       \
  void ptx_ldmatrix_sync_aligned_m8n8_x1##SUFFIX(uint32_t& a, Address row) {                                        \
    emulation::LoadMatrices<1, TRANSPOSE>(row, a);                                                                  \
  }                                                                                                                 \
  template <typename Address>                                                                                       \
  void ptx_ldmatrix_sync_aligned_m8n8_x2##SUFFIX(uint32_t& a, uint32_t& b, Address row) {                           \
    emulation::LoadMatrices<2, TRANSPOSE>(row, a, b);                                                               \
  }                                                                                                                 \
  template <typename Address>                                                                                       \
  void ptx_ldmatrix_sync_aligned_m8n8_x4##SUFFIX(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, Address row) { \
    emulation::LoadMatrices<4, TRANSPOSE>(row, a, b, c, d);                                                         \
  }
EMULATED_LDMATRIX(_shared_b16, false)
EMULATED_LDMATRIX(_trans_shared_b16, true)
#undef EMULATED_LDMATRIX

#define EMULATED_MMA(SUFFIX, NUMBERS)                                                                                  \
  inline void ptx_mma_sync_aligned_m16n8k16_row_col_f32_##SUFFIX##_f32(                                                \
      float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,     \
      uint32_t b1, float c0, float c1, float c2, float c3) {                                                           \
    emulation::Multiply({{&d0, &d1, &d2, &d3}, {a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}}, 16,                      \
                        emulation::Numbers::NUMBERS);                                                                  \
  }                                                                                                                    \
  inline void ptx_mma_sync_aligned_m16n8k8_row_col_f32_##SUFFIX##_f32(float& d0, float& d1, float& d2, float& d3,      \
                                                                      uint32_t a0, uint32_t a1, uint32_t b0, float c0, \
                                                                      float c1, float c2, float c3) {                  \
    emulation::Multiply({{&d0, &d1, &d2, &d3}, {a0, a1}, {b0}, {c0, c1, c2, c3}}, 8, emulation::Numbers::NUMBERS);     \
  }
EMULATED_MMA(f16_f16, kFloat16)
EMULATED_MMA(bf16_bf16, kBfloat16)
#undef EMULATED_MMA

inline void ptx_mma_sync_aligned_m16n8k32_row_col_s32_s8_s8_s32(uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3,
                                                                uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                                uint32_t b0, uint32_t b1, uint32_t c0, uint32_t c1,
                                                                uint32_t c2, uint32_t c3) {
  emulation::Multiply({{&d0, &d1, &d2, &d3}, {a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}});
}
