// wgmma, mbarrier, setmaxnreg and fence.proxy.async: warpgroup.h says what they do here.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../warpgroup.h"
#include "ptx.h"

namespace emulation {

/// The operands: N / 2 registers of D, A (four registers or a descriptor), B's descriptor, scale-d, the signs of A and B,
/// and whether they are transposed, A only if it has a descriptor.
template <int kColumns, bool kBfloat16, typename... Operands>
void StartProduct(Operands&&... operands) {
  constexpr int kRest = static_cast<int>(sizeof...(operands)) - kColumns / 2;
  static_assert(kRest == 9 || kRest == 7, "operands of wgmma");
  constexpr bool kInRegisters = kRest == 9;
  WarpgroupProduct product{};
  uint64_t rest[kRest] = {};
  int number = 0;
  auto take = [&](auto&& operand) {
    if constexpr (std::is_same_v<std::decay_t<decltype(operand)>, float>) {
      product.d[number] = &operand;
    } else {
      rest[number - kColumns / 2] = static_cast<uint64_t>(operand);
    }
    ++number;
  };
  (take(operands), ...);
  product.columns = kColumns;
  product.is_bfloat16 = kBfloat16;
  product.is_in_registers = kInRegisters;
  for (int i = 0; kInRegisters && i < 4; ++i) product.a[i] = static_cast<uint32_t>(rest[i]);
  product.a_matrix = rest[0];
  product.b_matrix = rest[kInRegisters ? 4 : 1];
  product.accumulates = rest[kRest - (kInRegisters ? 4 : 5)] != 0;
  product.is_transposed = rest[kRest - 1] != 0;
  if (rest[kRest - (kInRegisters ? 3 : 4)] != 1 || rest[kRest - (kInRegisters ? 2 : 3)] != 1) {
    Fail("wgmma: only positive operands are emulated");
  }
  if (!kInRegisters && rest[kRest - 2] != 0) Fail("wgmma: a transposed A is not emulated");
  StartProduct(product);
}

}  // namespace emulation

#define EMULATED_WGMMA(N)                                                                       \
  template <typename... Operands>                                                               \
  void ptx_wgmma_mma_async_sync_aligned_m64n##N##k16_f32_f16_f16(Operands&&... operands) {      \
    emulation::StartProduct<N, false>(std::forward<Operands>(operands)...);                     \
  }                                                                                             \
  template <typename... Operands>                                                               \
  void ptx_wgmma_mma_async_sync_aligned_m64n##N##k16_f32_bf16_bf16(Operands&&... operands) {    \
    emulation::StartProduct<N, true>(std::forward<Operands>(operands)...);                      \
  }
EMULATED_WGMMA(8)
EMULATED_WGMMA(16)
EMULATED_WGMMA(24)
EMULATED_WGMMA(32)
EMULATED_WGMMA(40)
EMULATED_WGMMA(48)
EMULATED_WGMMA(56)
EMULATED_WGMMA(64)
EMULATED_WGMMA(72)
EMULATED_WGMMA(80)
EMULATED_WGMMA(88)
EMULATED_WGMMA(96)
EMULATED_WGMMA(104)
EMULATED_WGMMA(112)
EMULATED_WGMMA(120)
EMULATED_WGMMA(128)
EMULATED_WGMMA(136)
EMULATED_WGMMA(144)
EMULATED_WGMMA(152)
EMULATED_WGMMA(160)
EMULATED_WGMMA(168)
EMULATED_WGMMA(176)
EMULATED_WGMMA(184)
EMULATED_WGMMA(192)
EMULATED_WGMMA(200)
EMULATED_WGMMA(208)
EMULATED_WGMMA(216)
EMULATED_WGMMA(224)
EMULATED_WGMMA(232)
EMULATED_WGMMA(240)
EMULATED_WGMMA(248)
EMULATED_WGMMA(256)
#undef EMULATED_WGMMA

inline void ptx_wgmma_fence_sync_aligned() {}
inline void ptx_wgmma_commit_group_sync_aligned() { emulation::CommitProducts(); }
inline void ptx_wgmma_wait_group_sync_aligned(size_t pending) { emulation::WaitForProducts(pending); }
inline void ptx_setmaxnreg_inc_sync_aligned_u32(uint32_t) {}
inline void ptx_setmaxnreg_dec_sync_aligned_u32(uint32_t) {}
inline void ptx_fence_proxy_async_shared_cta() {}

inline void ptx_mbarrier_init_shared_b64(uint32_t barrier, uint32_t count) {
  emulation::InitializeBarrier(emulation::Pointer(barrier), count);
}
inline void ptx_mbarrier_arrive_shared_b64(uint32_t barrier, uint32_t count) {
  emulation::ArriveAtBarrier(emulation::Pointer(barrier), count);
}
/// A loop of mbarrier.try_wait.parity: see translate.py.
inline void ptx_mbarrier_wait_parity(uint32_t barrier, uint32_t parity) {
  emulation::WaitForBarrier(emulation::Pointer(barrier), parity);
}
