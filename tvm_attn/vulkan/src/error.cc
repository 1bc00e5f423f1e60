#include "error.h"

namespace tvm_attn::vulkan {

std::string ResultName(VkResult result) {
  switch (result) {
#define TVM_ATTN_VK_CASE(name) \
  case name:                   \
    return #name;
    TVM_ATTN_VK_CASE(VK_SUCCESS)
    TVM_ATTN_VK_CASE(VK_NOT_READY)
    TVM_ATTN_VK_CASE(VK_TIMEOUT)
    TVM_ATTN_VK_CASE(VK_INCOMPLETE)
    TVM_ATTN_VK_CASE(VK_ERROR_OUT_OF_HOST_MEMORY)
    TVM_ATTN_VK_CASE(VK_ERROR_OUT_OF_DEVICE_MEMORY)
    TVM_ATTN_VK_CASE(VK_ERROR_INITIALIZATION_FAILED)
    TVM_ATTN_VK_CASE(VK_ERROR_DEVICE_LOST)
    TVM_ATTN_VK_CASE(VK_ERROR_MEMORY_MAP_FAILED)
    TVM_ATTN_VK_CASE(VK_ERROR_LAYER_NOT_PRESENT)
    TVM_ATTN_VK_CASE(VK_ERROR_EXTENSION_NOT_PRESENT)
    TVM_ATTN_VK_CASE(VK_ERROR_FEATURE_NOT_PRESENT)
    TVM_ATTN_VK_CASE(VK_ERROR_INCOMPATIBLE_DRIVER)
    TVM_ATTN_VK_CASE(VK_ERROR_TOO_MANY_OBJECTS)
    TVM_ATTN_VK_CASE(VK_ERROR_INVALID_OPAQUE_CAPTURE_ADDRESS)
#undef TVM_ATTN_VK_CASE
    default:
      return "VkResult " + std::to_string(static_cast<int>(result));
  }
}

void Check(VkResult result, const char* call) {
  if (result >= VK_SUCCESS) return;
  if (result == VK_ERROR_DEVICE_LOST) {
    TVM_FFI_THROW(DeviceError) << "the Vulkan device was lost in " << call
                               << " (a kernel ran out of bounds or too long, or the driver was reset): restart the "
                                  "process";
  }
  TVM_FFI_THROW(DeviceError) << call << " failed with " << ResultName(result)
                             << ": set TVM_ATTN_VULKAN_VALIDATE=1 for the validation layer's view";
}

}  // namespace tvm_attn::vulkan
