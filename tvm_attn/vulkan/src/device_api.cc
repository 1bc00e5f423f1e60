#include "device_api.h"

#include <cstdint>
#include <map>
#include <vector>

#include "device.h"
#include "error.h"
#include "kernel.h"

namespace tvm_attn::vulkan {
namespace {

using tvm::ffi::Any;
using tvm::ffi::String;
using tvm::runtime::DeviceAttrKind;

uint64_t Address(const void* pointer, size_t offset) { return reinterpret_cast<uint64_t>(pointer) + offset; }

std::string ApiVersion(uint32_t version) {
  return std::to_string(VK_API_VERSION_MAJOR(version)) + "." + std::to_string(VK_API_VERSION_MINOR(version)) + "." +
         std::to_string(VK_API_VERSION_PATCH(version));
}

/// The attributes of TVM's target kind "vulkan", as they are for this device.
std::map<std::string, Any> TargetProperties(const PhysicalDevice& device) {
  const VkPhysicalDeviceLimits& limits = device.properties.limits;
  auto has = [&](const char* feature) { return Any(device.kernel_features.at(feature)); };
  auto number = [](uint64_t value) { return Any(static_cast<int64_t>(value)); };
  return {
      {"supports_float16", has("float16")},
      {"supports_float32", Any(true)},
      {"supports_float64", has("float64")},
      {"supports_int8", has("int8")},
      {"supports_int16", has("int16")},
      {"supports_int32", Any(true)},
      {"supports_int64", has("int64")},
      {"supports_8bit_buffer", has("storage8")},
      {"supports_16bit_buffer", has("storage16")},
      {"supports_storage_buffer_storage_class", Any(true)},
      {"supports_push_descriptor", Any(false)},
      {"supports_dedicated_allocation", Any(true)},
      {"supports_integer_dot_product", Any(static_cast<bool>(device.features13.shaderIntegerDotProduct))},
      {"supports_cooperative_matrix", has("cooperative_matrix")},
      {"supported_subgroup_operations", number(device.properties11.subgroupSupportedOperations)},
      {"max_num_threads", number(limits.maxComputeWorkGroupInvocations)},
      {"max_threads_per_block", number(limits.maxComputeWorkGroupInvocations)},
      {"thread_warp_size", number(device.properties11.subgroupSize)},
      {"max_block_size_x", number(limits.maxComputeWorkGroupSize[0])},
      {"max_block_size_y", number(limits.maxComputeWorkGroupSize[1])},
      {"max_block_size_z", number(limits.maxComputeWorkGroupSize[2])},
      {"max_push_constants_size", number(limits.maxPushConstantsSize)},
      {"max_uniform_buffer_range", number(limits.maxUniformBufferRange)},
      {"max_storage_buffer_range", number(limits.maxStorageBufferRange)},
      {"max_per_stage_descriptor_storage_buffer", number(limits.maxPerStageDescriptorStorageBuffers)},
      {"max_shared_memory_per_block", number(limits.maxComputeSharedMemorySize)},
      {"device_name", Any(String(device.properties.deviceName))},
      {"driver_name", Any(String(device.properties12.driverName))},
      {"driver_version", number(device.properties.driverVersion)},
      {"vulkan_api_version", number(device.properties.apiVersion)},
      {"max_spirv_version", number(0x10600)},
  };
}

}  // namespace

VulkanDeviceApi* VulkanDeviceApi::Global() {
  static auto* api = new VulkanDeviceApi();
  return api;
}

void VulkanDeviceApi::SetDevice(tvm::Device dev) { SetCurrentDevice(dev.device_id); }

void VulkanDeviceApi::GetAttr(tvm::Device dev, DeviceAttrKind kind, Any* rv) {
  const auto index = static_cast<size_t>(dev.device_id);
  if (kind == tvm::runtime::kExist) {
    try {
      *rv = static_cast<int>(dev.device_id >= 0 && index < Device::Count());
    } catch (const tvm::ffi::Error&) {
      *rv = 0;  // no driver, no device: whoever then uses it gets the error
    }
    return;
  }
  const PhysicalDevice& device = Device::Get(dev.device_id).physical();
  const VkPhysicalDeviceLimits& limits = device.properties.limits;
  switch (kind) {
    case tvm::runtime::kMaxThreadsPerBlock:
      *rv = static_cast<int64_t>(limits.maxComputeWorkGroupInvocations);
      break;
    case tvm::runtime::kWarpSize:
      *rv = static_cast<int64_t>(device.properties11.subgroupSize);
      break;
    case tvm::runtime::kMaxSharedMemoryPerBlock:
      *rv = static_cast<int64_t>(limits.maxComputeSharedMemorySize);
      break;
    case tvm::runtime::kComputeVersion:
      *rv = String(ApiVersion(device.properties.apiVersion));
      break;
    case tvm::runtime::kDeviceName:
      *rv = String(device.properties.deviceName);
      break;
    case tvm::runtime::kMaxThreadDimensions: {
      const uint32_t* size = limits.maxComputeWorkGroupSize;
      *rv = String("[" + std::to_string(size[0]) + ", " + std::to_string(size[1]) + ", " + std::to_string(size[2]) + "]");
      break;
    }
    case tvm::runtime::kApiVersion:
      *rv = static_cast<int64_t>(device.properties.apiVersion);
      break;
    case tvm::runtime::kDriverVersion:
      *rv = String(device.properties12.driverInfo);
      break;
    case tvm::runtime::kTotalGlobalMemory:
      *rv = static_cast<int64_t>(device.HeapSize());
      break;
    case tvm::runtime::kAvailableGlobalMemory:
      *rv = static_cast<int64_t>(device.AvailableMemory());
      break;
    default:
      *rv = nullptr;  // Vulkan does not say: clock, registers, number of processors, cache, architecture
  }
}

void VulkanDeviceApi::GetTargetProperty(tvm::Device dev, const std::string& property, Any* rv) {
  const std::map<std::string, Any> properties = TargetProperties(Device::Get(dev.device_id).physical());
  const auto found = properties.find(property);
  if (found != properties.end()) *rv = found->second;
}

void* VulkanDeviceApi::AllocDataSpace(tvm::Device dev, size_t nbytes, size_t alignment, DLDataType) {
  constexpr size_t kGuaranteed = 256;
  if (alignment > kGuaranteed) {
    TVM_FFI_THROW(DeviceError) << "memory aligned to " << alignment << " bytes was asked of vulkan:" << dev.device_id
                               << ", which aligns to " << kGuaranteed;
  }
  return reinterpret_cast<void*>(Device::Get(dev.device_id).Allocate(nbytes));
}

void VulkanDeviceApi::FreeDataSpace(tvm::Device dev, void* ptr) {
  for (Device* device : Device::Opened()) {
    if (device->index() == dev.device_id) device->Free(Address(ptr, 0));
  }
}

void VulkanDeviceApi::StreamSync(tvm::Device dev, TVMStreamHandle) {
  Device& device = Device::Get(dev.device_id);
  if (!device.TakeNeedlessSync()) device.Synchronize();
}

void VulkanDeviceApi::CopyDataFromTo(DLTensor* from, DLTensor* to, TVMStreamHandle stream) {
  DeviceAPI::CopyDataFromTo(from, to, stream);
  // When TVM copies bytes from the host, it makes a tensor of the bytes that borrows its shape from `to`, and waits for
  // the device afterwards so that the bytes may be freed. That wait is not needed: see Device::CopyFromHost.
  if (from->device.device_type == kDLCPU && from->shape == to->shape) {
    Device::Get(to->device.device_id).ExpectNeedlessSync();
  }
}

void VulkanDeviceApi::CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset, size_t num_bytes,
                                     tvm::Device dev_from, tvm::Device dev_to, DLDataType, TVMStreamHandle) {
  const bool from_host = dev_from.device_type == kDLCPU;
  const bool to_host = dev_to.device_type == kDLCPU;
  if ((!from_host && dev_from.device_type != kDLVulkan) || (!to_host && dev_to.device_type != kDLVulkan)) {
    TVM_FFI_THROW(DeviceError) << "no copy between a Vulkan device and device type "
                               << (to_host || dev_to.device_type == kDLVulkan ? dev_from.device_type : dev_to.device_type)
                               << ": copy to the CPU first";
  }
  if (from_host) {
    Device::Get(dev_to.device_id)
        .CopyFromHost(static_cast<const uint8_t*>(from) + from_offset, Address(to, to_offset), num_bytes);
  } else if (to_host) {
    Device::Get(dev_from.device_id)
        .CopyToHost(Address(from, from_offset), static_cast<uint8_t*>(to) + to_offset, num_bytes);
  } else if (dev_from.device_id == dev_to.device_id) {
    Device::Get(dev_from.device_id).CopyInside(Address(from, from_offset), Address(to, to_offset), num_bytes);
  } else {
    std::vector<uint8_t> host(num_bytes);
    Device::Get(dev_from.device_id).CopyToHost(Address(from, from_offset), host.data(), num_bytes);
    Device::Get(dev_to.device_id).CopyFromHost(host.data(), Address(to, to_offset), num_bytes);
  }
}

}  // namespace tvm_attn::vulkan
