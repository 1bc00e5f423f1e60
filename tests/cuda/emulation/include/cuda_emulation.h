// What TVM's CUDA source needs to compile with a C++17 compiler and run under scheduler.h.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "../scheduler.h"

#define __CUDA_ARCH__ 800
#define __CUDACC_VER_MAJOR__ 12
#define __CUDACC_VER_MINOR__ 8

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))  // alignas may not follow `static`
// All static shared memory lies in one section, so that it can be poisoned.
#define __shared__ static __attribute__((section("emulated_shared")))
#define __constant__ static const

// For accesses that are atomic or not made by the running thread: races.h does not see them.
#define EMULATED_UNORDERED __attribute__((no_sanitize("thread")))

#define threadIdx (emulation::current->index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)
constexpr int warpSize = 32;

#define CUDART_INF_F (std::numeric_limits<float>::infinity())
#define CUDART_NAN_F (std::numeric_limits<float>::quiet_NaN())
#define CUDART_INF (std::numeric_limits<double>::infinity())

#include "floats.h"
#include "vectors.h"
// These two need the types above.
#include "intrinsics.h"
#include "ptx.h"
#include "ptx_matrix.h"
#include "ptx_warpgroup.h"

namespace emulation {

template <typename... Parameters, size_t... I>
void Call(void (*kernel)(Parameters...), void* const* arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_const_t<Parameters>*>(arguments[I])...);
}

template <typename... Parameters>
void Call(void (*kernel)(Parameters...), void* const* arguments) {
  Call(kernel, arguments, std::index_sequence_for<Parameters...>());
}

}  // namespace emulation

/// Follows the source: lets the launcher, which knows no types, call a kernel with pointers to its arguments.
#define EMULATED_KERNEL(name) \
  extern "C" void emulated_##name(void* const* arguments) { emulation::Call(name, arguments); }

/// Once per library: the location of its static shared memory.
#define EMULATED_LIBRARY                                                             \
  extern "C" {                                                                       \
  extern char __start_emulated_shared[] __attribute__((weak, visibility("hidden"))); \
  extern char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));  \
  char* emulated_shared_begin() { return __start_emulated_shared; }                  \
  char* emulated_shared_end() { return __stop_emulated_shared; }                     \
  }
