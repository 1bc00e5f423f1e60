// What kernels need of a device, and what a device lacks of it.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "kernel_blob.h"
#include "physical_device.h"

namespace tvm_attn::vulkan {

struct Needs {
  std::set<std::string> features;  // names of PhysicalDevice::kernel_features
  std::set<uint32_t> subgroup_sizes;
  // The largest of all kernels.
  uint32_t workgroup_size[3] = {1, 1, 1};
  uint64_t threads = 1;
  uint32_t shared_bytes = 0;

  void Add(const KernelSpec& kernel);

  /// What `device` lacks, as text; empty if it has everything.
  std::vector<std::string> Lacking(const PhysicalDevice& device) const;
};

/// Throws DeviceError if `vulkan:index` lacks any of `needs`: it names the device, what is missing, and `who` needs it.
void Require(const Needs& needs, const PhysicalDevice& device, int index, const std::string& who);

}  // namespace tvm_attn::vulkan
