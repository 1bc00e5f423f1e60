// PTX instructions, by the PTX ISA documentation. `a.b.c` is ptx_a_b_c; registers in the order of the assembler.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "floats.h"
#include "intrinsics.h"

namespace emulation {

inline void CheckAlignment(const void* pointer, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    Fail(std::string(what) + ": the address is not a multiple of " + std::to_string(bytes));
  }
}

/// Where an address operand points: shared addresses are 32 bits wide, generic and global ones are pointers.
inline char* Pointer(uint32_t shared_address) { return SharedPointer(shared_address); }
inline char* Pointer(uint64_t pointer) { return reinterpret_cast<char*>(pointer); }
inline char* Pointer(const void* pointer) { return static_cast<char*>(const_cast<void*>(pointer)); }
inline uint32_t Offset(uint32_t shared_address, int bytes) { return shared_address + static_cast<uint32_t>(bytes); }
inline const void* Offset(const void* pointer, int bytes) { return static_cast<const char*>(pointer) + bytes; }

/// ld and ld.vN: the type is the instruction's; registers may have another type of the same size, or be wider.
template <typename T, typename Address, typename... Registers>
void Load(Address address, Registers&... registers) {
  const char* pointer = Pointer(address);
  CheckAlignment(pointer, sizeof(T) * sizeof...(registers), "ld");
  const T* element = reinterpret_cast<const T*>(pointer);
  auto load = [&](auto& to) {
    using Register = std::remove_reference_t<decltype(to)>;
    const T value = *element++;
    if constexpr (sizeof(Register) == sizeof(T)) {
      memcpy(&to, &value, sizeof to);
    } else {
      to = static_cast<Register>(value);
    }
  };
  (load(registers), ...);
}

template <typename T, typename Address, typename... Registers>
void Store(Address address, Registers... registers) {
  char* pointer = Pointer(address);
  CheckAlignment(pointer, sizeof(T) * sizeof...(registers), "st");
  T* element = reinterpret_cast<T*>(pointer);
  auto store = [&](auto from) {
    if constexpr (sizeof from == sizeof(T)) {
      *element++ = Bits<T>(from);
    } else {
      *element++ = static_cast<T>(from);
    }
  };
  (store(registers), ...);
}

/// The source is read now, the destination is poison until a wait: reading too early or writing too late shows.
template <typename Address>
EMULATED_UNORDERED void CopyAsync(Address destination, const void* source, uint32_t size, uint32_t source_size) {
  if (source_size > size) Fail("cp.async: src-size is larger than cp-size");
  char* to = Pointer(destination);
  CheckAlignment(to, size, "cp.async");
  char bytes[16] = {};
  if (source_size > 0) CheckAlignment(source, size, "cp.async");
  const char* from = static_cast<const char*>(source);
  for (uint32_t i = 0; i < source_size; ++i) bytes[i] = from[i];
  for (uint32_t i = 0; i < size; ++i) reinterpret_cast<volatile char*>(to)[i];  // here the sanitizer looks
  CopyAsync(to, bytes, size);
}

template <typename Pair>
Pair FromRegister(uint32_t value) {
  return Bits<Pair>(value);
}

}  // namespace emulation

template <typename Address>
void ptx_cp_async_ca_shared_global(Address to, const void* from, uint32_t size, uint32_t source_size) {
  emulation::CopyAsync(to, from, size, source_size);
}
template <typename Address>
void ptx_cp_async_ca_shared_global(Address to, const void* from, uint32_t size) {
  emulation::CopyAsync(to, from, size, size);
}
template <typename Address>
void ptx_cp_async_cg_shared_global(Address to, const void* from, uint32_t size, uint32_t source_size) {
  if (size != 16) emulation::Fail("cp.async.cg copies 16 bytes");
  emulation::CopyAsync(to, from, size, source_size);
}
template <typename Address>
void ptx_cp_async_cg_shared_global(Address to, const void* from, uint32_t size) {
  ptx_cp_async_cg_shared_global(to, from, size, size);
}
inline void ptx_cp_async_commit_group() { emulation::CommitCopies(); }
inline void ptx_cp_async_wait_group(size_t pending) { emulation::WaitForCopies(pending); }
inline void ptx_cp_async_wait_all() {
  emulation::CommitCopies();
  emulation::WaitForCopies(0);
}

inline void ptx_bar_sync(uint32_t number) { emulation::Barrier(number); }
inline void ptx_bar_sync(uint32_t number, uint32_t count) { emulation::Barrier(number, count); }
inline void ptx_barrier_sync(uint32_t number) { emulation::Barrier(number); }
inline void ptx_barrier_sync(uint32_t number, uint32_t count) { emulation::Barrier(number, count); }
inline void ptx_barrier_cta_sync(uint32_t number) { emulation::Barrier(number); }
inline void ptx_bar_warp_sync(uint32_t mask) { __syncwarp(mask); }
inline void ptx_griddepcontrol_wait() {}
inline void ptx_griddepcontrol_launch_dependents() {}
inline void ptx_membar_gl() {}
inline void ptx_membar_cta() {}
inline void ptx_fence_acq_rel_gpu() {}
inline void ptx_fence_acq_rel_cta() {}
template <typename Address>
void ptx_atom_acq_rel_gpu_global_inc_u32(uint32_t& before, Address address, uint32_t most) {
  before = atomicInc(reinterpret_cast<uint32_t*>(emulation::Pointer(address)), most);
}

// mov, selp, setp.
template <typename To, typename From>
void ptx_mov_b32(To& d, From a) {
  d = emulation::Bits<To>(a);
}
inline void ptx_mov_u32(uint32_t& d, uint32_t a) { d = a; }
inline void ptx_mov_s32(uint32_t& d, uint32_t a) { d = a; }
inline void ptx_setp_ne_b32(bool& p, uint32_t a, uint32_t b) { p = a != b; }
inline void ptx_setp_eq_b32(bool& p, uint32_t a, uint32_t b) { p = a == b; }
inline void ptx_selp_b32(uint32_t& d, uint32_t a, uint32_t b, bool p) { d = p ? a : b; }

// Integers.
inline void ptx_prmt_b32(uint32_t& d, uint32_t a, uint32_t b, uint32_t selector) { d = __byte_perm(a, b, selector); }
inline void ptx_lop3_b32(uint32_t& d, uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  d = 0;
  for (int bit = 0; bit < 32; ++bit) {
    const uint32_t row = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1);
    d |= (table >> row & 1) << bit;
  }
}
inline void ptx_shf_l_wrap_b32(uint32_t& d, uint32_t a, uint32_t b, uint32_t c) {
  d = static_cast<uint32_t>((uint64_t{b} << 32 | a) << (c & 31) >> 32);
}
inline void ptx_shf_r_wrap_b32(uint32_t& d, uint32_t a, uint32_t b, uint32_t c) {
  d = static_cast<uint32_t>((uint64_t{b} << 32 | a) >> (c & 31));
}
inline void ptx_bfe_u32(uint32_t& d, uint32_t a, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  d = 0;
  for (uint32_t bit = 0; bit < 32 && bit < length; ++bit) {
    if (position + bit < 32) d |= (a >> (position + bit) & 1) << bit;
  }
}
inline void ptx_bfe_s32(uint32_t& d, uint32_t a, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  const uint32_t sign = length == 0 ? 0 : a >> std::min(position + length - 1, 31u) & 1;
  d = 0;
  for (uint32_t bit = 0; bit < 32; ++bit) {
    d |= (bit < length && position + bit < 32 ? a >> (position + bit) & 1 : sign) << bit;
  }
}
inline void ptx_dp4a_s32_s32(uint32_t& d, uint32_t a, uint32_t b, uint32_t c) {
  d = static_cast<uint32_t>(__dp4a(static_cast<int32_t>(a), static_cast<int32_t>(b), static_cast<int32_t>(c)));
}
inline void ptx_dp4a_u32_s32(uint32_t& d, uint32_t a, uint32_t b, uint32_t c) {
  d = static_cast<uint32_t>(__dp4a(a, static_cast<int32_t>(b), static_cast<int32_t>(c)));
}
inline void ptx_dp4a_s32_u32(uint32_t& d, uint32_t a, uint32_t b, uint32_t c) {
  d = static_cast<uint32_t>(__dp4a(static_cast<int32_t>(a), b, static_cast<int32_t>(c)));
}

// float32.
inline float FlushDenormal(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline void ptx_ex2_approx_f32(float& d, float a) { d = static_cast<float>(std::exp2(static_cast<double>(a))); }
inline void ptx_ex2_approx_ftz_f32(float& d, float a) {
  ptx_ex2_approx_f32(d, FlushDenormal(a));
  d = FlushDenormal(d);
}
inline void ptx_lg2_approx_f32(float& d, float a) { d = static_cast<float>(std::log2(static_cast<double>(a))); }
inline void ptx_lg2_approx_ftz_f32(float& d, float a) { ptx_lg2_approx_f32(d, FlushDenormal(a)); }
inline void ptx_rcp_approx_f32(float& d, float a) { d = 1 / a; }
inline void ptx_rcp_approx_ftz_f32(float& d, float a) { d = FlushDenormal(1 / FlushDenormal(a)); }
inline void ptx_rcp_rn_f32(float& d, float a) { d = 1 / a; }
inline void ptx_rsqrt_approx_f32(float& d, float a) { d = rsqrtf(a); }
inline void ptx_rsqrt_approx_ftz_f32(float& d, float a) { d = rsqrtf(FlushDenormal(a)); }
inline void ptx_sqrt_approx_f32(float& d, float a) { d = sqrtf(a); }
inline void ptx_sqrt_rn_f32(float& d, float a) { d = sqrtf(a); }
inline void ptx_tanh_approx_f32(float& d, float a) { d = tanhf(a); }
inline void ptx_div_full_f32(float& d, float a, float b) { d = a / b; }
inline void ptx_div_approx_f32(float& d, float a, float b) { d = a / b; }
inline void ptx_add_rn_f32(float& d, float a, float b) { d = a + b; }
inline void ptx_mul_rn_f32(float& d, float a, float b) { d = a * b; }
inline void ptx_fma_rn_f32(float& d, float a, float b, float c) { d = fmaf(a, b, c); }
inline void ptx_max_f32(float& d, float a, float b) { d = fmaxf(a, b); }
inline void ptx_min_f32(float& d, float a, float b) { d = fminf(a, b); }

// Two short floats in a register, and conversions. The first source of cvt goes to the upper half.
inline void ptx_cvt_rn_f16x2_f32(uint32_t& d, float high, float low) {
  d = emulation::Bits<uint32_t>(half2(low, high));
}
inline void ptx_cvt_rn_bf16x2_f32(uint32_t& d, float high, float low) {
  d = emulation::Bits<uint32_t>(nv_bfloat162(low, high));
}
inline void ptx_cvt_rn_relu_f16x2_f32(uint32_t& d, float high, float low) {
  ptx_cvt_rn_f16x2_f32(d, high < 0 ? 0 : high, low < 0 ? 0 : low);
}
inline void ptx_cvt_rn_f16_f32(uint16_t& d, float a) { d = emulation::FloatToHalf(a); }
inline void ptx_cvt_rn_bf16_f32(uint16_t& d, float a) { d = emulation::FloatToBfloat16(a); }
inline void ptx_cvt_f32_f16(float& d, uint16_t a) { d = emulation::HalfToFloat(a); }
inline void ptx_cvt_f32_bf16(float& d, uint16_t a) { d = emulation::Bfloat16ToFloat(a); }

#define EMULATED_PAIRS(TYPE, PAIR)                                                 \
  inline void ptx_fma_rn_##TYPE(uint32_t& d, uint32_t a, uint32_t b, uint32_t c) { \
    using emulation::Bits;                                                         \
    d = Bits<uint32_t>(__hfma2(Bits<PAIR>(a), Bits<PAIR>(b), Bits<PAIR>(c)));      \
  }                                                                                \
  inline void ptx_add_rn_##TYPE(uint32_t& d, uint32_t a, uint32_t b) {             \
    using emulation::Bits;                                                         \
    d = Bits<uint32_t>(__hadd2(Bits<PAIR>(a), Bits<PAIR>(b)));                     \
  }                                                                                \
  inline void ptx_sub_rn_##TYPE(uint32_t& d, uint32_t a, uint32_t b) {             \
    using emulation::Bits;                                                         \
    d = Bits<uint32_t>(__hsub2(Bits<PAIR>(a), Bits<PAIR>(b)));                     \
  }                                                                                \
  inline void ptx_mul_rn_##TYPE(uint32_t& d, uint32_t a, uint32_t b) {             \
    using emulation::Bits;                                                         \
    d = Bits<uint32_t>(__hmul2(Bits<PAIR>(a), Bits<PAIR>(b)));                     \
  }                                                                                \
  inline void ptx_max_##TYPE(uint32_t& d, uint32_t a, uint32_t b) {                \
    using emulation::Bits;                                                         \
    d = Bits<uint32_t>(__hmax2(Bits<PAIR>(a), Bits<PAIR>(b)));                     \
  }
EMULATED_PAIRS(f16x2, half2)
EMULATED_PAIRS(bf16x2, nv_bfloat162)
#undef EMULATED_PAIRS
inline void ptx_add_f16x2(uint32_t& d, uint32_t a, uint32_t b) { ptx_add_rn_f16x2(d, a, b); }
inline void ptx_sub_f16x2(uint32_t& d, uint32_t a, uint32_t b) { ptx_sub_rn_f16x2(d, a, b); }
inline void ptx_mul_f16x2(uint32_t& d, uint32_t a, uint32_t b) { ptx_mul_rn_f16x2(d, a, b); }
