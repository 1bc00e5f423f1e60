// Text made of bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace tvm_attn::vulkan {

inline std::string Hex(const uint8_t* bytes, size_t count) {
  static const char* digits = "0123456789abcdef";
  std::string text;
  for (size_t i = 0; i < count; ++i) {
    text += digits[bytes[i] >> 4];
    text += digits[bytes[i] & 15];
  }
  return text;
}

}  // namespace tvm_attn::vulkan
