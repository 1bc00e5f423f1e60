#include "pipeline.h"

#include <vector>

#include "error.h"
#include "pipeline_cache_file.h"

namespace tvm_attn::vulkan {

PipelineFactory::PipelineFactory(const PhysicalDevice& physical, VkDevice device, const DeviceFunctions& vk)
    : physical_(physical), device_(device), vk_(vk) {
  const VkPushConstantRange range{VK_SHADER_STAGE_COMPUTE_BIT, 0, kMaxPushConstantBlock};
  VkPipelineLayoutCreateInfo layout{VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO};
  layout.pushConstantRangeCount = 1;
  layout.pPushConstantRanges = &range;
  Check(vk_.vkCreatePipelineLayout(device_, &layout, nullptr, &layout_), "vkCreatePipelineLayout");

  const std::vector<char> data = ReadPipelineCache(physical_);
  VkPipelineCacheCreateInfo cache{VK_STRUCTURE_TYPE_PIPELINE_CACHE_CREATE_INFO};
  cache.initialDataSize = data.size();
  cache.pInitialData = data.data();
  VkResult result = vk_.vkCreatePipelineCache(device_, &cache, nullptr, &cache_);
  if (result != VK_SUCCESS && !data.empty()) {  // the driver rejects the saved data
    cache.initialDataSize = 0;
    result = vk_.vkCreatePipelineCache(device_, &cache, nullptr, &cache_);
  }
  Check(result, "vkCreatePipelineCache");
}

VkPipeline PipelineFactory::Create(const KernelSpec& kernel, bool folded, uint32_t dynamic_shared) {
  if (uint64_t{kernel.shared_bytes} + dynamic_shared > physical_.properties.limits.maxComputeSharedMemorySize) {
    TVM_FFI_THROW(DeviceError) << "kernel " << kernel.name << " was launched with "
                               << uint64_t{kernel.shared_bytes} + dynamic_shared << " bytes of shared memory, "
                               << physical_.properties.deviceName << " has "
                               << physical_.properties.limits.maxComputeSharedMemorySize << ": use smaller tiles";
  }
  VkShaderModuleCreateInfo module_info{VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO};
  module_info.codeSize = kernel.spirv.size() * sizeof(uint32_t);
  module_info.pCode = kernel.spirv.data();
  VkShaderModule module = VK_NULL_HANDLE;
  Check(vk_.vkCreateShaderModule(device_, &module_info, nullptr, &module), "vkCreateShaderModule");

  const struct {
    VkBool32 folded;
    uint32_t dynamic_shared;
  } constants{folded, dynamic_shared};
  const VkSpecializationMapEntry entries[] = {{0, 0, sizeof(VkBool32)}, {1, sizeof(VkBool32), sizeof(uint32_t)}};
  const VkSpecializationInfo specialization{2, entries, sizeof constants, &constants};
  VkPipelineShaderStageRequiredSubgroupSizeCreateInfo subgroup{
      VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_REQUIRED_SUBGROUP_SIZE_CREATE_INFO};
  subgroup.requiredSubgroupSize = kernel.subgroup_size;

  VkComputePipelineCreateInfo info{VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO};
  info.stage.sType = VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO;
  info.stage.stage = VK_SHADER_STAGE_COMPUTE_BIT;
  info.stage.module = module;
  info.stage.pName = "main";
  info.stage.pSpecializationInfo = &specialization;
  info.layout = layout_;
  if (kernel.subgroup_size != 0) {
    // From SPIR-V 1.6 on, a driver may choose any size unless one is required.
    if (physical_.SmallestSubgroup() != physical_.LargestSubgroup()) info.stage.pNext = &subgroup;
    if (physical_.features13.computeFullSubgroups && kernel.workgroup_size[0] % kernel.subgroup_size == 0) {
      info.stage.flags = VK_PIPELINE_SHADER_STAGE_CREATE_REQUIRE_FULL_SUBGROUPS_BIT;
    }
  }
  VkPipeline pipeline = VK_NULL_HANDLE;
  const VkResult result = vk_.vkCreateComputePipelines(device_, cache_, 1, &info, nullptr, &pipeline);
  vk_.vkDestroyShaderModule(device_, module, nullptr);
  if (result != VK_SUCCESS) {
    TVM_FFI_THROW(DeviceError) << "the driver of " << physical_.properties.deviceName << " refused kernel "
                               << kernel.name << " with " << ResultName(result)
                               << ": set TVM_ATTN_VULKAN_VALIDATE=1 for the validation layer's view";
  }
  unsaved_ = true;
  return pipeline;
}

void PipelineFactory::SaveCache(bool now) {
  constexpr std::chrono::seconds kPause{5};
  const auto time = std::chrono::steady_clock::now();
  if (!unsaved_ || (!now && time - saved_at_ < kPause)) return;
  unsaved_ = false;
  saved_at_ = time;
  size_t size = 0;
  if (vk_.vkGetPipelineCacheData(device_, cache_, &size, nullptr) != VK_SUCCESS) return;
  std::vector<char> data(size);
  if (vk_.vkGetPipelineCacheData(device_, cache_, &size, data.data()) != VK_SUCCESS) return;
  data.resize(size);
  WritePipelineCache(physical_, data);
}

}  // namespace tvm_attn::vulkan
