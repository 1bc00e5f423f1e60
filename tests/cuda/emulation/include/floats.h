// __half and __nv_bfloat16: 16 bits, every operation rounded once, to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace emulation {

template <typename To, typename From>
To Bits(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}

/// The float that rounds to any shorter format as `value` does: to odd.
inline float RoundToOdd(double value) {
  auto result = static_cast<float>(value);
  const double back = result;
  if (back == value || value != value) return result;
  auto bits = Bits<uint32_t>(result);
  if (std::isinf(result) || std::fabs(back) > std::fabs(value)) --bits;  // towards zero
  return Bits<float>(bits | 1);
}

/// The exact a * b + c of short numbers, rounded to odd.
inline double FusedToOdd(double a, double b, double c) {
  const double product = a * b;  // exact
  const double sum = product + c;
  if (!std::isfinite(sum)) return sum;
  const double part = sum - product;
  const double error = (product - (sum - part)) + (c - part);
  if (error == 0) return sum;
  auto bits = Bits<uint64_t>(sum);
  if ((bits & 1) == 0) bits += (error > 0) == (sum > 0) ? 1 : -1;
  return Bits<double>(bits);
}

inline float HalfToFloat(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
  if (exponent == 31) return Bits<float>(sign | 0x7F800000u | fraction << 13);
  if (exponent == 0) return Bits<float>(sign | Bits<uint32_t>(static_cast<float>(fraction) * 0x1p-24f));
  return Bits<float>(sign | (exponent + 112) << 23 | fraction << 13);
}

inline uint16_t FloatToHalf(float value) {
  const auto bits = Bits<uint32_t>(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return sign | 0x7FFF;
  if (magnitude >= 0x477FF000) return sign | 0x7C00;      // 65520 and more
  if (magnitude < 0x38800000) {                           // below 2^-14: a multiple of 2^-24
    const float shifted = Bits<float>(magnitude) + 0.5f;  // whose last place is 2^-24
    return sign | static_cast<uint16_t>(Bits<uint32_t>(shifted) - 0x3F000000);
  }
  const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded >> 13) - (112 << 10));
}

inline float Bfloat16ToFloat(uint16_t value) { return Bits<float>(static_cast<uint32_t>(value) << 16); }

inline uint16_t FloatToBfloat16(float value) {
  const auto bits = Bits<uint32_t>(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulation

#define EMULATED_FLOAT(TYPE, FROM_FLOAT, TO_FLOAT)                                                           \
  struct TYPE {                                                                                              \
    uint16_t __x;                                                                                            \
    TYPE() = default;                                                                                        \
    TYPE(float value) : __x(emulation::FROM_FLOAT(value)) {}                                                 \
    TYPE(double value) : __x(emulation::FROM_FLOAT(emulation::RoundToOdd(value))) {}                         \
    template <typename T, typename = std::enable_if_t<std::is_integral_v<T>>>                                \
    TYPE(T value) : TYPE(static_cast<double>(value)) {}                                                      \
    operator float() const { return emulation::TO_FLOAT(__x); }                                              \
    TYPE& operator+=(TYPE other);                                                                            \
    TYPE& operator-=(TYPE other);                                                                            \
    TYPE& operator*=(TYPE other);                                                                            \
    TYPE& operator/=(TYPE other);                                                                            \
    static TYPE FromBits(uint16_t bits) {                                                                    \
      TYPE result;                                                                                           \
      result.__x = bits;                                                                                     \
      return result;                                                                                         \
    }                                                                                                        \
  };                                                                                                         \
  /* float has more than twice the digits of either format: its rounding before ours changes nothing. */     \
  inline TYPE operator+(TYPE a, TYPE b) { return TYPE(static_cast<float>(a) + static_cast<float>(b)); }      \
  inline TYPE operator-(TYPE a, TYPE b) { return TYPE(static_cast<float>(a) - static_cast<float>(b)); }      \
  inline TYPE operator*(TYPE a, TYPE b) { return TYPE(static_cast<float>(a) * static_cast<float>(b)); }      \
  inline TYPE operator/(TYPE a, TYPE b) { return TYPE(static_cast<float>(a) / static_cast<float>(b)); }      \
  inline TYPE operator-(TYPE a) { return TYPE::FromBits(a.__x ^ 0x8000); }                                   \
  inline TYPE operator+(TYPE a) { return a; }                                                                \
  inline TYPE& TYPE::operator+=(TYPE other) { return *this = *this + other; }                                \
  inline TYPE& TYPE::operator-=(TYPE other) { return *this = *this - other; }                                \
  inline TYPE& TYPE::operator*=(TYPE other) { return *this = *this * other; }                                \
  inline TYPE& TYPE::operator/=(TYPE other) { return *this = *this / other; }                                \
  inline bool operator==(TYPE a, TYPE b) { return static_cast<float>(a) == static_cast<float>(b); }          \
  inline bool operator!=(TYPE a, TYPE b) { return static_cast<float>(a) != static_cast<float>(b); }          \
  inline bool operator<(TYPE a, TYPE b) { return static_cast<float>(a) < static_cast<float>(b); }            \
  inline bool operator>(TYPE a, TYPE b) { return static_cast<float>(a) > static_cast<float>(b); }            \
  inline bool operator<=(TYPE a, TYPE b) { return static_cast<float>(a) <= static_cast<float>(b); }          \
  inline bool operator>=(TYPE a, TYPE b) { return static_cast<float>(a) >= static_cast<float>(b); }          \
  inline bool __hgt(TYPE a, TYPE b) { return a > b; }                                                        \
  inline bool __hge(TYPE a, TYPE b) { return a >= b; }                                                       \
  inline bool __hlt(TYPE a, TYPE b) { return a < b; }                                                        \
  inline bool __hle(TYPE a, TYPE b) { return a <= b; }                                                       \
  inline bool __heq(TYPE a, TYPE b) { return a == b; }                                                       \
  inline bool __hisnan(TYPE a) { return a != a; }                                                            \
  inline TYPE __hadd(TYPE a, TYPE b) { return a + b; }                                                       \
  inline TYPE __hsub(TYPE a, TYPE b) { return a - b; }                                                       \
  inline TYPE __hmul(TYPE a, TYPE b) { return a * b; }                                                       \
  inline TYPE __hdiv(TYPE a, TYPE b) { return a / b; }                                                       \
  inline TYPE __hneg(TYPE a) { return -a; }                                                                  \
  inline TYPE __habs(TYPE a) { return TYPE::FromBits(a.__x & 0x7FFF); }                                      \
  inline TYPE __hmax(TYPE a, TYPE b) { return TYPE(fmaxf(a, b)); }                                           \
  inline TYPE __hmin(TYPE a, TYPE b) { return TYPE(fminf(a, b)); }                                           \
  inline TYPE __hfma(TYPE a, TYPE b, TYPE c) {                                                               \
    return TYPE(emulation::FusedToOdd(static_cast<float>(a), static_cast<float>(b), static_cast<float>(c))); \
  }                                                                                                          \
  inline TYPE hexp(TYPE a) { return TYPE(std::exp(static_cast<double>(static_cast<float>(a)))); }            \
  inline TYPE hexp2(TYPE a) { return TYPE(std::exp2(static_cast<double>(static_cast<float>(a)))); }          \
  inline TYPE hlog(TYPE a) { return TYPE(std::log(static_cast<double>(static_cast<float>(a)))); }            \
  inline TYPE hlog2(TYPE a) { return TYPE(std::log2(static_cast<double>(static_cast<float>(a)))); }          \
  inline TYPE hsqrt(TYPE a) { return TYPE(std::sqrt(static_cast<double>(static_cast<float>(a)))); }          \
  inline TYPE hrsqrt(TYPE a) { return TYPE(1 / std::sqrt(static_cast<double>(static_cast<float>(a)))); }     \
  inline TYPE hsin(TYPE a) { return TYPE(std::sin(static_cast<double>(static_cast<float>(a)))); }            \
  inline TYPE hcos(TYPE a) { return TYPE(std::cos(static_cast<double>(static_cast<float>(a)))); }            \
  inline TYPE htanh(TYPE a) { return TYPE(std::tanh(static_cast<double>(static_cast<float>(a)))); }          \
  inline TYPE hfloor(TYPE a) { return TYPE(floorf(a)); }                                                     \
  inline TYPE hceil(TYPE a) { return TYPE(ceilf(a)); }                                                       \
  inline TYPE hrint(TYPE a) { return TYPE(rintf(a)); }                                                       \
  inline TYPE htrunc(TYPE a) { return TYPE(truncf(a)); }

EMULATED_FLOAT(__half, FloatToHalf, HalfToFloat)
EMULATED_FLOAT(__nv_bfloat16, FloatToBfloat16, Bfloat16ToFloat)

using half = __half;
using nv_bfloat16 = __nv_bfloat16;

inline float __half2float(__half value) { return value; }
inline __half __float2half(float value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline __half __double2half(double value) { return value; }
inline __half __int2half_rn(int value) { return value; }
inline uint16_t __half_as_ushort(__half value) { return value.__x; }
inline int16_t __half_as_short(__half value) { return static_cast<int16_t>(value.__x); }
inline __half __ushort_as_half(uint16_t bits) { return __half::FromBits(bits); }
inline __half __short_as_half(int16_t bits) { return __half::FromBits(static_cast<uint16_t>(bits)); }
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __nv_bfloat16 __float2bfloat16(float value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
inline __nv_bfloat16 __double2bfloat16(double value) { return value; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.__x; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return __nv_bfloat16::FromBits(bits); }
