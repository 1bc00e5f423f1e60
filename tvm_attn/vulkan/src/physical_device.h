// What a Vulkan device can do, which devices the runtime can use, and in which order TVM sees them.
#pragma once

#include <tvm/ffi/extra/json.h>

#include <map>
#include <string>
#include <vector>

#include "vulkan_api.h"

namespace tvm_attn::vulkan {

/// A device as the driver reports it.
struct PhysicalDevice {
  VkPhysicalDevice handle = VK_NULL_HANDLE;

  VkPhysicalDeviceProperties properties{};
  VkPhysicalDeviceVulkan11Properties properties11{};
  VkPhysicalDeviceVulkan12Properties properties12{};
  VkPhysicalDeviceVulkan13Properties properties13{};

  VkPhysicalDeviceFeatures features{};
  VkPhysicalDeviceVulkan11Features features11{};
  VkPhysicalDeviceVulkan12Features features12{};
  VkPhysicalDeviceVulkan13Features features13{};
  VkPhysicalDeviceShaderAtomicFloatFeaturesEXT atomic_float{};
  VkPhysicalDeviceCooperativeMatrixFeaturesKHR cooperative_matrix{};
  /// The matrices that a subgroup can multiply.
  std::vector<VkCooperativeMatrixPropertiesKHR> matrices;
  bool has_memory_budget = false;

  VkPhysicalDeviceMemoryProperties memory{};
  uint32_t queue_family = 0;
  uint32_t timestamp_bits = 0;

  /// What the device lacks that this runtime needs; empty for a usable device.
  std::vector<std::string> missing;
  /// The kernel features of the module format (kernel_blob.h) and whether the device has each.
  std::map<std::string, bool> kernel_features;

  /// The range of subgroup sizes that a kernel may ask for: powers of two from the smallest to the largest.
  uint32_t SmallestSubgroup() const;
  uint32_t LargestSubgroup() const;
  /// Bytes of the heap that device-local memory comes from.
  VkDeviceSize HeapSize() const;
  /// Bytes of that heap that this process may still allocate, as far as the driver knows.
  VkDeviceSize AvailableMemory() const;
  /// Index of the first memory type in the mask `allowed` that has all of `required` and, if possible, all of
  /// `preferred`.
  uint32_t MemoryType(uint32_t allowed, VkMemoryPropertyFlags required, VkMemoryPropertyFlags preferred) const;

  /// Name, features, limits and what is missing, for `tvm_attn.vulkan.devices()`.
  tvm::ffi::json::Object ToJson() const;

 private:
  bool HasSubgroupSizes() const;
  uint32_t DeviceHeap() const;
};

/// Every device of the system, usable or not. Throws DeviceError if there is no Vulkan.
std::vector<PhysicalDevice> EnumerateDevices();

/// The usable devices in TVM's order: discrete before integrated before virtual before CPU, or those that
/// TVM_ATTN_VULKAN_DEVICE lists: indices into that order or parts of names, separated by commas.
/// Computed once. Throws DeviceError if there is none.
const std::vector<PhysicalDevice>& UsableDevices();

}  // namespace tvm_attn::vulkan
