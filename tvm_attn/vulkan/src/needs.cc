#include "needs.h"

#include <algorithm>

#include "error.h"

namespace tvm_attn::vulkan {
namespace {

/// "workgroups of 256 threads (has 128)"
std::string Beyond(const std::string& need, uint64_t has) { return need + " (has " + std::to_string(has) + ")"; }

std::string SubgroupSizes(const PhysicalDevice& device) {
  const uint32_t smallest = device.SmallestSubgroup();
  const uint32_t largest = device.LargestSubgroup();
  return std::to_string(smallest) + (smallest == largest ? "" : " to " + std::to_string(largest));
}

}  // namespace

void Needs::Add(const KernelSpec& kernel) {
  features.insert(kernel.features.begin(), kernel.features.end());
  if (kernel.subgroup_size != 0) subgroup_sizes.insert(kernel.subgroup_size);
  uint64_t count = 1;
  for (int i = 0; i < 3; ++i) {
    workgroup_size[i] = std::max(workgroup_size[i], kernel.workgroup_size[i]);
    count *= kernel.workgroup_size[i];
  }
  threads = std::max(threads, count);
  shared_bytes = std::max(shared_bytes, kernel.shared_bytes);
}

std::vector<std::string> Needs::Lacking(const PhysicalDevice& device) const {
  const VkPhysicalDeviceLimits& limits = device.properties.limits;
  std::vector<std::string> lacking;
  for (const std::string& feature : features) {
    if (!device.kernel_features.at(feature)) lacking.push_back(feature);
  }
  for (const uint32_t size : subgroup_sizes) {
    if (size < device.SmallestSubgroup() || size > device.LargestSubgroup()) {
      lacking.push_back("subgroups of " + std::to_string(size) + " (has " + SubgroupSizes(device) + ")");
    }
  }
  if (threads > limits.maxComputeWorkGroupInvocations) {
    lacking.push_back(
        Beyond("workgroups of " + std::to_string(threads) + " threads", limits.maxComputeWorkGroupInvocations));
  }
  for (int i = 0; i < 3; ++i) {
    if (workgroup_size[i] > limits.maxComputeWorkGroupSize[i]) {
      lacking.push_back(Beyond("workgroups of " + std::to_string(workgroup_size[i]) + " threads along " + "xyz"[i],
                               limits.maxComputeWorkGroupSize[i]));
    }
  }
  if (shared_bytes > limits.maxComputeSharedMemorySize) {
    lacking.push_back(
        Beyond(std::to_string(shared_bytes) + " bytes of shared memory", limits.maxComputeSharedMemorySize));
  }
  return lacking;
}

void Require(const Needs& needs, const PhysicalDevice& device, int index, const std::string& who) {
  std::string list;
  for (const std::string& item : needs.Lacking(device)) list += (list.empty() ? "" : ", ") + item;
  if (list.empty()) return;
  TVM_FFI_THROW(DeviceError) << "vulkan:" << index << " (" << device.properties.deviceName << ") lacks " << list
                             << ", which " << who
                             << " needs: choose another device, or build for a target and dtype that python -m "
                                "tvm_attn.devices lists for this one";
}

}  // namespace tvm_attn::vulkan
