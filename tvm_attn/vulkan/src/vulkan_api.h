// The Vulkan functions that the runtime calls, as tables of pointers filled at run time.
//
// The library is not linked against libvulkan: installing and importing the package must work without it.
#pragma once

#define VK_NO_PROTOTYPES
#include <vulkan/vulkan_core.h>

namespace tvm_attn::vulkan {

#define TVM_ATTN_VK_GLOBAL_FUNCTIONS(X) \
  X(vkCreateInstance)                   \
  X(vkEnumerateInstanceExtensionProperties) \
  X(vkEnumerateInstanceLayerProperties) \
  X(vkEnumerateInstanceVersion)

#define TVM_ATTN_VK_INSTANCE_FUNCTIONS(X)      \
  X(vkCreateDevice)                            \
  X(vkEnumerateDeviceExtensionProperties)      \
  X(vkEnumeratePhysicalDevices)                \
  X(vkGetDeviceProcAddr)                       \
  X(vkGetPhysicalDeviceFeatures2)              \
  X(vkGetPhysicalDeviceMemoryProperties2)      \
  X(vkGetPhysicalDeviceProperties2)            \
  X(vkGetPhysicalDeviceQueueFamilyProperties2)

#define TVM_ATTN_VK_DEVICE_FUNCTIONS(X) \
  X(vkAllocateCommandBuffers)           \
  X(vkAllocateMemory)                   \
  X(vkBeginCommandBuffer)               \
  X(vkBindBufferMemory)                 \
  X(vkCmdBindPipeline)                  \
  X(vkCmdCopyBuffer)                    \
  X(vkCmdDispatch)                      \
  X(vkCmdPipelineBarrier2)              \
  X(vkCmdPushConstants)                 \
  X(vkCmdWriteTimestamp2)               \
  X(vkCreateBuffer)                     \
  X(vkCreateCommandPool)                \
  X(vkCreateComputePipelines)           \
  X(vkCreatePipelineCache)              \
  X(vkCreatePipelineLayout)             \
  X(vkCreateQueryPool)                  \
  X(vkCreateSemaphore)                  \
  X(vkCreateShaderModule)               \
  X(vkDestroyBuffer)                    \
  X(vkDestroyPipeline)                  \
  X(vkDestroyQueryPool)                 \
  X(vkDestroyShaderModule)              \
  X(vkEndCommandBuffer)                 \
  X(vkFreeMemory)                       \
  X(vkGetBufferDeviceAddress)           \
  X(vkGetBufferMemoryRequirements2)     \
  X(vkGetDeviceQueue)                   \
  X(vkGetPipelineCacheData)             \
  X(vkGetQueryPoolResults)              \
  X(vkGetSemaphoreCounterValue)         \
  X(vkMapMemory)                        \
  X(vkQueueSubmit2)                     \
  X(vkResetCommandPool)                 \
  X(vkResetQueryPool)                   \
  X(vkWaitSemaphores)

#define TVM_ATTN_VK_MEMBER(name) PFN_##name name = nullptr;

struct GlobalFunctions {
  TVM_ATTN_VK_GLOBAL_FUNCTIONS(TVM_ATTN_VK_MEMBER)
  PFN_vkGetInstanceProcAddr vkGetInstanceProcAddr = nullptr;
};

struct InstanceFunctions {
  TVM_ATTN_VK_INSTANCE_FUNCTIONS(TVM_ATTN_VK_MEMBER)
};

struct DeviceFunctions {
  TVM_ATTN_VK_DEVICE_FUNCTIONS(TVM_ATTN_VK_MEMBER)
};

#undef TVM_ATTN_VK_MEMBER

}  // namespace tvm_attn::vulkan

// Some distributions' headers are older than VK_KHR_cooperative_matrix (1.3.255).
#ifndef VK_KHR_cooperative_matrix
#define VK_KHR_COOPERATIVE_MATRIX_EXTENSION_NAME "VK_KHR_cooperative_matrix"
inline constexpr VkStructureType VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_COOPERATIVE_MATRIX_FEATURES_KHR =
    static_cast<VkStructureType>(1000506000);
struct VkPhysicalDeviceCooperativeMatrixFeaturesKHR {
  VkStructureType sType;
  void* pNext;
  VkBool32 cooperativeMatrix;
  VkBool32 cooperativeMatrixRobustBufferAccess;
};
inline constexpr VkStructureType VK_STRUCTURE_TYPE_COOPERATIVE_MATRIX_PROPERTIES_KHR =
    static_cast<VkStructureType>(1000506001);
enum VkComponentTypeKHR {
  VK_COMPONENT_TYPE_FLOAT16_KHR = 0,
  VK_COMPONENT_TYPE_FLOAT32_KHR = 1,
  VK_COMPONENT_TYPE_FLOAT64_KHR = 2,
  VK_COMPONENT_TYPE_SINT8_KHR = 3,
  VK_COMPONENT_TYPE_SINT32_KHR = 5,
  VK_COMPONENT_TYPE_UINT8_KHR = 7,
  VK_COMPONENT_TYPE_UINT32_KHR = 9,
};
enum VkScopeKHR { VK_SCOPE_SUBGROUP_KHR = 3 };
struct VkCooperativeMatrixPropertiesKHR {
  VkStructureType sType;
  void* pNext;
  uint32_t MSize, NSize, KSize;
  VkComponentTypeKHR AType, BType, CType, ResultType;
  VkBool32 saturatingAccumulation;
  VkScopeKHR scope;
};
using PFN_vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR = VkResult(VKAPI_PTR*)(
    VkPhysicalDevice, uint32_t*, VkCooperativeMatrixPropertiesKHR*);
#endif
