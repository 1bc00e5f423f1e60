// CUDA's vector types, aligned as on the device, where a load from an unaligned address is an error.
#pragma once

#include <cstdint>

#include "floats.h"

#define EMULATED_VECTORS(NAME, TYPE)                                                     \
  struct alignas(sizeof(TYPE)) NAME##1 { TYPE x; };                                      \
  struct alignas(2 * sizeof(TYPE)) NAME##2 { TYPE x, y; };                               \
  struct NAME##3 { TYPE x, y, z; };                                                      \
  struct alignas(sizeof(TYPE) < 4 ? 4 * sizeof(TYPE) : 16) NAME##4 { TYPE x, y, z, w; }; \
  inline NAME##1 make_##NAME##1(TYPE x) { return {x}; }                                  \
  inline NAME##2 make_##NAME##2(TYPE x, TYPE y) { return {x, y}; }                       \
  inline NAME##3 make_##NAME##3(TYPE x, TYPE y, TYPE z) { return {x, y, z}; }            \
  inline NAME##4 make_##NAME##4(TYPE x, TYPE y, TYPE z, TYPE w) { return {x, y, z, w}; }

EMULATED_VECTORS(char, signed char)
EMULATED_VECTORS(uchar, unsigned char)
EMULATED_VECTORS(short, short)
EMULATED_VECTORS(ushort, unsigned short)
EMULATED_VECTORS(int, int)
EMULATED_VECTORS(uint, unsigned int)
EMULATED_VECTORS(long, long)
EMULATED_VECTORS(ulong, unsigned long)
EMULATED_VECTORS(longlong, long long)
EMULATED_VECTORS(ulonglong, unsigned long long)
EMULATED_VECTORS(float, float)
EMULATED_VECTORS(double, double)

using dim3 = emulation::Index;

#define EMULATED_PAIR(PAIR, TYPE)                                                                        \
  struct alignas(4) PAIR {                                                                               \
    TYPE x, y;                                                                                           \
    PAIR() = default;                                                                                    \
    PAIR(TYPE x, TYPE y) : x(x), y(y) {}                                                                 \
  };                                                                                                     \
  inline PAIR __hadd2(PAIR a, PAIR b) { return {a.x + b.x, a.y + b.y}; }                                 \
  inline PAIR __hsub2(PAIR a, PAIR b) { return {a.x - b.x, a.y - b.y}; }                                 \
  inline PAIR __hmul2(PAIR a, PAIR b) { return {a.x * b.x, a.y * b.y}; }                                 \
  inline PAIR __hfma2(PAIR a, PAIR b, PAIR c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; } \
  inline PAIR __hmax2(PAIR a, PAIR b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }                   \
  inline PAIR __hmin2(PAIR a, PAIR b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }                   \
  inline PAIR operator+(PAIR a, PAIR b) { return __hadd2(a, b); }                                        \
  inline PAIR operator-(PAIR a, PAIR b) { return __hsub2(a, b); }                                        \
  inline PAIR operator*(PAIR a, PAIR b) { return __hmul2(a, b); }                                        \
  inline TYPE __low2##TYPE(PAIR a) { return a.x; }                                                       \
  inline TYPE __high2##TYPE(PAIR a) { return a.y; }

using bfloat16 = __nv_bfloat16;  // for the names __low2bfloat16 and __high2bfloat16
EMULATED_PAIR(__half2, half)
EMULATED_PAIR(__nv_bfloat162, bfloat16)

using half2 = __half2;
using nv_bfloat162 = __nv_bfloat162;

inline half2 make_half2(half x, half y) { return {x, y}; }
inline half2 __halves2half2(half x, half y) { return {x, y}; }
inline half2 __half2half2(half x) { return {x, x}; }
inline half2 __floats2half2_rn(float x, float y) { return {half(x), half(y)}; }
inline half2 __float2half2_rn(float x) { return {half(x), half(x)}; }
inline half2 __float22half2_rn(float2 v) { return {half(v.x), half(v.y)}; }
inline float2 __half22float2(half2 v) { return {v.x, v.y}; }
inline float __low2float(half2 v) { return v.x; }
inline float __high2float(half2 v) { return v.y; }
inline nv_bfloat162 __halves2bfloat162(nv_bfloat16 x, nv_bfloat16 y) { return {x, y}; }
inline nv_bfloat162 __bfloat162bfloat162(nv_bfloat16 x) { return {x, x}; }
inline nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {nv_bfloat16(x), nv_bfloat16(y)}; }
inline nv_bfloat162 __float22bfloat162_rn(float2 v) { return {nv_bfloat16(v.x), nv_bfloat16(v.y)}; }
inline float2 __bfloat1622float2(nv_bfloat162 v) { return {v.x, v.y}; }
