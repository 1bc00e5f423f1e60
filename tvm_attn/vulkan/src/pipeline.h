// Compute pipelines of one device, and the driver's cache of them on disk.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "kernel_blob.h"
#include "physical_device.h"
#include "vulkan_api.h"

namespace tvm_attn::vulkan {

/// Not thread-safe: the device's lock is held during every call.
class PipelineFactory {
 public:
  PipelineFactory(const PhysicalDevice& physical, VkDevice device, const DeviceFunctions& vk);

  /// The pipeline of `kernel`, for a grid that is `folded` into two dimensions or not, with `dynamic_shared` bytes of
  /// workgroup memory. The caller owns it.
  VkPipeline Create(const KernelSpec& kernel, bool folded, uint32_t dynamic_shared);

  /// The layout of every pipeline: push constants of kMaxPushConstantBlock bytes.
  VkPipelineLayout layout() const { return layout_; }

  /// Writes the driver's cache to disk if pipelines were made since the last time; unless `now`, at most every few
  /// seconds.
  void SaveCache(bool now);

 private:
  const PhysicalDevice& physical_;
  VkDevice device_;
  const DeviceFunctions& vk_;
  VkPipelineLayout layout_ = VK_NULL_HANDLE;
  VkPipelineCache cache_ = VK_NULL_HANDLE;
  bool unsaved_ = false;
  std::chrono::steady_clock::time_point saved_at_{};
};

}  // namespace tvm_attn::vulkan
