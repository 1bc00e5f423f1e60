// Errors: one line that says what was wrong and what to do, raised as tvm_attn.errors.DeviceError or ArtifactError.
#pragma once

#include <tvm/ffi/error.h>

#include <string>

#include "vulkan_api.h"

namespace tvm_attn::vulkan {

/// The name of a result code as in the specification, e.g. "VK_ERROR_DEVICE_LOST".
std::string ResultName(VkResult result);

/// Throws a DeviceError that names `call` unless `result` is a success code.
void Check(VkResult result, const char* call);

}  // namespace tvm_attn::vulkan
