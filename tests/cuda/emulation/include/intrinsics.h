// Functions of the CUDA C++ Programming Guide and of the CUDA Math API.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "floats.h"
#include "vectors.h"

inline void __syncthreads() { emulation::Barrier(); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { emulation::Yield(); }
[[noreturn]] inline void __trap() { emulation::Fail("the kernel has trapped"); }
inline void __assert(bool condition) {
  if (!condition) emulation::Fail("an assertion of the kernel has failed");
}

inline void __syncwarp(uint32_t mask = 0xFFFFFFFF) { emulation::SynchronizeWarp(mask); }

inline uint32_t __activemask() { return 0xFFFFFFFF; }

namespace emulation {

template <typename T>
struct ShuffleSlot {
  T value;
  uint32_t source;  // the lane
  T result;
};

/// A lane of the mask gives its value to lanes that name it; the value of any other lane is undefined: poison.
template <typename T>
T Shuffle(const char* name, uint32_t mask, T value, uint32_t source) {
  ShuffleSlot<T> slot{value, source, {}};
  Collective(name, mask, &slot, [](void* const* slots, uint32_t lanes) {
    for (uint32_t lane = 0; lane < 32; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      auto* here = static_cast<ShuffleSlot<T>*>(slots[lane]);
      if (lanes >> here->source & 1) {
        here->result = static_cast<ShuffleSlot<T>*>(slots[here->source])->value;
      } else {
        memset(static_cast<void*>(&here->result), 0xFF, sizeof here->result);
      }
    }
  });
  return slot.result;
}

}  // namespace emulation

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  const uint32_t lane = emulation::current->lane, segment = lane & ~static_cast<uint32_t>(width - 1);
  return emulation::Shuffle("__shfl_sync", mask, value, segment | (source & (width - 1)));
}

template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const uint32_t lane = emulation::current->lane, segment = lane & ~static_cast<uint32_t>(width - 1);
  return emulation::Shuffle("__shfl_up_sync", mask, value, lane < segment + delta ? lane : lane - delta);
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const uint32_t lane = emulation::current->lane, last = lane | static_cast<uint32_t>(width - 1);
  return emulation::Shuffle("__shfl_down_sync", mask, value, lane + delta > last ? lane : lane + delta);
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32) {
  const uint32_t lane = emulation::current->lane, last = lane | static_cast<uint32_t>(width - 1);
  const uint32_t source = lane ^ static_cast<uint32_t>(lanes);
  return emulation::Shuffle("__shfl_xor_sync", mask, value, source > last ? lane : source);
}

namespace emulation {

/// What every lane gets: fold(all values of the mask's lanes).
template <typename T, typename Fold>
T Reduce(const char* name, uint32_t mask, T value, Fold) {
  Collective(name, mask, &value, [](void* const* slots, uint32_t lanes) {
    T values[32], result{};
    uint32_t count = 0;
    for (uint32_t lane = 0; lane < 32; ++lane) {
      if (lanes >> lane & 1) values[count++] = *static_cast<T*>(slots[lane]);
    }
    result = values[0];
    for (uint32_t i = 1; i < count; ++i) result = Fold()(result, values[i]);
    for (uint32_t lane = 0; lane < 32; ++lane) {
      if (lanes >> lane & 1) *static_cast<T*>(slots[lane]) = result;
    }
  });
  return value;
}

struct Or {
  template <typename T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct And {
  template <typename T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Add {
  template <typename T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <typename T>
  T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Min {
  template <typename T>
  T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

}  // namespace emulation

inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  const uint32_t bit = predicate ? 1u << emulation::current->lane : 0;
  return emulation::Reduce("__ballot_sync", mask, bit, emulation::Or());
}
inline int __any_sync(uint32_t mask, int predicate) {
  return emulation::Reduce("__any_sync", mask, static_cast<int>(predicate != 0), emulation::Or());
}
inline int __all_sync(uint32_t mask, int predicate) {
  return emulation::Reduce("__all_sync", mask, static_cast<int>(predicate != 0), emulation::And());
}
template <typename T>
T __reduce_add_sync(uint32_t mask, T value) {
  return emulation::Reduce("__reduce_add_sync", mask, value, emulation::Add());
}
template <typename T>
T __reduce_max_sync(uint32_t mask, T value) {
  return emulation::Reduce("__reduce_max_sync", mask, value, emulation::Max());
}
template <typename T>
T __reduce_min_sync(uint32_t mask, T value) {
  return emulation::Reduce("__reduce_min_sync", mask, value, emulation::Min());
}
inline int __syncthreads_or(int predicate) {
  static int any;
  emulation::Barrier();
  any = 0;
  emulation::Barrier();
  any |= predicate != 0;
  emulation::Barrier();
  return any;
}

// Memory. Only one thread runs at a time, so every access is atomic.
inline uint32_t __cvta_generic_to_shared(const void* pointer) { return emulation::SharedAddress(pointer); }
inline void* __cvta_shared_to_generic(uint32_t address) { return emulation::SharedPointer(address); }

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <typename T>
T __ldcg(const T* pointer) {
  return *pointer;
}
template <typename T>
T __ldcs(const T* pointer) {
  return *pointer;
}

#define EMULATED_ATOMIC(NAME, EXPRESSION)                                  \
  template <typename T>                                                    \
  EMULATED_UNORDERED T NAME(T* address, std::enable_if_t<true, T> value) { \
    const T old = *address;                                                \
    *address = EXPRESSION;                                                 \
    return old;                                                            \
  }
EMULATED_ATOMIC(atomicAdd, static_cast<T>(old + value))
EMULATED_ATOMIC(atomicSub, static_cast<T>(old - value))
EMULATED_ATOMIC(atomicMax, old < value ? value : old)
EMULATED_ATOMIC(atomicMin, old > value ? value : old)
EMULATED_ATOMIC(atomicExch, value)
EMULATED_ATOMIC(atomicOr, old | value)
EMULATED_ATOMIC(atomicAnd, old& value)
EMULATED_ATOMIC(atomicXor, old ^ value)
EMULATED_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
EMULATED_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef EMULATED_ATOMIC

template <typename T>
EMULATED_UNORDERED T atomicCAS(T* address, std::enable_if_t<true, T> compare, std::enable_if_t<true, T> value) {
  const T old = *address;
  if (memcmp(&old, &compare, sizeof old) == 0) *address = value;
  return old;
}

// Bits.
inline int __float_as_int(float value) { return emulation::Bits<int>(value); }
inline uint32_t __float_as_uint(float value) { return emulation::Bits<uint32_t>(value); }
inline float __int_as_float(int value) { return emulation::Bits<float>(value); }
inline float __uint_as_float(uint32_t value) { return emulation::Bits<float>(value); }
inline int __popc(uint32_t value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(value)); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline uint32_t __brev(uint32_t value) {
  uint32_t result = 0;
  for (int bit = 0; bit < 32; ++bit) result |= (value >> bit & 1) << (31 - bit);
  return result;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(int64_t{a} * b >> 32); }
inline int __mul24(int a, int b) { return a * b; }

/// PTX prmt in its default mode: byte i of the result is the byte of {b, a} that nibble i of the selector names; with
/// the nibble's highest bit, that byte's sign eight times.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (nibble & 7) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}

template <typename A, typename B>
int __dp4a(A a, B b, int c) {
  using ByteA = std::conditional_t<std::is_signed_v<A>, int8_t, uint8_t>;
  using ByteB = std::conditional_t<std::is_signed_v<B>, int8_t, uint8_t>;
  for (int i = 0; i < 4; ++i) c += static_cast<ByteA>(a >> 8 * i) * static_cast<ByteB>(b >> 8 * i);
  return c;
}

// Arithmetic. The approximate functions are exact here, or nearly: their error depends on the device.
template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
using std::isfinite;
using std::isinf;
using std::isnan;
inline float rsqrtf(float x) { return static_cast<float>(1 / std::sqrt(static_cast<double>(x))); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return static_cast<float>(std::pow(10.0, x)); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanf(float x) { return tanf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __saturatef(float x) { return x != x ? 0 : std::clamp(x, 0.0f, 1.0f); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
