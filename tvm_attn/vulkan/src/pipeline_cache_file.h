// The driver's pipeline cache on disk: $XDG_CACHE_HOME (else ~/.cache)/tvm_attn/vulkan/DRIVER-DEVICE-VERSION.bin.
//
// A cache is a convenience: whatever goes wrong with its file, kernels are compiled again and nothing is said. Only regular
// files of this user are read, in folders that are this user's; links are not followed.
#pragma once

#include <vector>

#include "physical_device.h"

namespace tvm_attn::vulkan {

/// What was saved for this driver and device, or nothing where the file is absent, damaged or another's.
std::vector<char> ReadPipelineCache(const PhysicalDevice& device);

/// Replaces the file as a whole: other processes see the old one or the new one.
void WritePipelineCache(const PhysicalDevice& device, const std::vector<char>& data);

}  // namespace tvm_attn::vulkan
