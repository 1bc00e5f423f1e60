// The driver's pipeline cache on disk: $XDG_CACHE_HOME (else ~/.cache)/tvm_attn/vulkan/DRIVER-DEVICE-VERSION.bin.
//
// A cache is a convenience: if anything is wrong with its file, kernels are compiled again, silently. Only regular
// files of this user are read, in folders that belong to this user; links are not followed.
#pragma once

#include <vector>

#include "physical_device.h"

namespace tvm_attn::vulkan {

/// What was saved for this driver and device; nothing if the file is absent, damaged or another user's.
std::vector<char> ReadPipelineCache(const PhysicalDevice& device);

/// Replaces the whole file: other processes see the old one or the new one.
void WritePipelineCache(const PhysicalDevice& device, const std::vector<char>& data);

}  // namespace tvm_attn::vulkan
