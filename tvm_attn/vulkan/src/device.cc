#include "device.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "error.h"
#include "instance.h"

namespace tvm_attn::vulkan {
namespace {

std::atomic<bool> forked{false};

// Entries are null until their device is opened, and never change after. Never destroyed: see Instance::Get.
std::atomic<Device*> opened[kMaxDevices];

Device* Open(int index) {
  static auto* mutex = new std::mutex();
  std::lock_guard<std::mutex> lock(*mutex);
  if (Device* device = opened[index]) return device;
  static const int at_fork [[maybe_unused]] = pthread_atfork(nullptr, nullptr, [] { forked = true; });
  opened[index] = new Device(UsableDevices()[index], index);
  return opened[index];
}

}  // namespace

Device& Device::Get(int index) {
  if (forked) {
    TVM_FFI_THROW(DeviceError) << "Vulkan was in use when this process was forked, and drivers do not survive that: "
                                  "start processes with the spawn method";
  }
  if (index >= 0 && static_cast<size_t>(index) < kMaxDevices) {
    if (Device* device = opened[index].load(std::memory_order_acquire)) return *device;
  }
  const size_t count = Count();
  if (index < 0 || static_cast<size_t>(index) >= count) {
    TVM_FFI_THROW(DeviceError) << "no device vulkan:" << index << ": there are " << count
                               << ", listed by tvm-attn devices";
  }
  return *Open(index);
}

size_t Device::Count() { return std::min(UsableDevices().size(), kMaxDevices); }

std::vector<Device*> Device::Opened() {
  std::vector<Device*> devices;
  for (const std::atomic<Device*>& entry : opened) {
    Device* device = entry;
    if (device != nullptr && !forked) devices.push_back(device);
  }
  return devices;
}

Device::Device(const PhysicalDevice& physical, int index)
    : physical_(physical),
      index_(index),
      handle_(CreateLogicalDevice(physical)),
      vk_(LoadFunctions(handle_)),
      buffers_(physical_, handle_, vk_),
      memory_(buffers_),
      stream_(handle_, vk_, physical.queue_family),
      upload_(buffers_, &stream_),
      readback_(buffers_),
      pipelines_(physical_, handle_, vk_) {}

VkDevice Device::CreateLogicalDevice(const PhysicalDevice& physical) {
  const float priority = 1.0F;
  VkDeviceQueueCreateInfo queue{VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO};
  queue.queueFamilyIndex = physical.queue_family;
  queue.queueCount = 1;
  queue.pQueuePriorities = &priority;

  // Enable whatever kernels may ask for and the device has; nothing else, as robustness checks cost time.
  VkPhysicalDeviceFeatures2 features{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2};
  features.features.shaderFloat64 = physical.features.shaderFloat64;
  features.features.shaderInt64 = physical.features.shaderInt64;
  features.features.shaderInt16 = physical.features.shaderInt16;
  VkPhysicalDeviceVulkan11Features features11{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_1_FEATURES};
  features11.storageBuffer16BitAccess = physical.features11.storageBuffer16BitAccess;
  VkPhysicalDeviceVulkan12Features features12{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES};
  features12.bufferDeviceAddress = VK_TRUE;
  features12.timelineSemaphore = VK_TRUE;
  features12.hostQueryReset = VK_TRUE;
  features12.shaderFloat16 = physical.features12.shaderFloat16;
  features12.shaderInt8 = physical.features12.shaderInt8;
  features12.storageBuffer8BitAccess = physical.features12.storageBuffer8BitAccess;
  features12.scalarBlockLayout = physical.features12.scalarBlockLayout;
  features12.shaderSubgroupExtendedTypes = physical.features12.shaderSubgroupExtendedTypes;
  features12.vulkanMemoryModel = physical.features12.vulkanMemoryModel;
  features12.vulkanMemoryModelDeviceScope = physical.features12.vulkanMemoryModelDeviceScope;
  VkPhysicalDeviceVulkan13Features features13{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_3_FEATURES};
  features13.synchronization2 = VK_TRUE;
  features13.maintenance4 = VK_TRUE;
  features13.subgroupSizeControl = physical.features13.subgroupSizeControl;
  features13.computeFullSubgroups = physical.features13.computeFullSubgroups;
  features13.shaderIntegerDotProduct = physical.features13.shaderIntegerDotProduct;
  VkPhysicalDeviceShaderAtomicFloatFeaturesEXT atomic_float{
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_ATOMIC_FLOAT_FEATURES_EXT};
  atomic_float.shaderBufferFloat32Atomics = physical.atomic_float.shaderBufferFloat32Atomics;
  atomic_float.shaderBufferFloat32AtomicAdd = physical.atomic_float.shaderBufferFloat32AtomicAdd;
  VkPhysicalDeviceCooperativeMatrixFeaturesKHR cooperative_matrix{};
  cooperative_matrix.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_COOPERATIVE_MATRIX_FEATURES_KHR;
  cooperative_matrix.cooperativeMatrix = VK_TRUE;

  std::vector<const char*> extensions;
  features.pNext = &features11;
  features11.pNext = &features12;
  features12.pNext = &features13;
  void** tail = &features13.pNext;
  if (atomic_float.shaderBufferFloat32Atomics) {
    extensions.push_back(VK_EXT_SHADER_ATOMIC_FLOAT_EXTENSION_NAME);
    *tail = &atomic_float;
    tail = &atomic_float.pNext;
  }
  if (physical.cooperative_matrix.cooperativeMatrix) {
    extensions.push_back(VK_KHR_COOPERATIVE_MATRIX_EXTENSION_NAME);
    *tail = &cooperative_matrix;
  }

  VkDeviceCreateInfo info{VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO};
  info.pNext = &features;
  info.queueCreateInfoCount = 1;
  info.pQueueCreateInfos = &queue;
  info.enabledExtensionCount = static_cast<uint32_t>(extensions.size());
  info.ppEnabledExtensionNames = extensions.data();
  VkDevice device = VK_NULL_HANDLE;
  Check(Instance::Get().vk.vkCreateDevice(physical.handle, &info, nullptr, &device), "vkCreateDevice");
  return device;
}

DeviceFunctions Device::LoadFunctions(VkDevice device) {
  DeviceFunctions vk;
  const InstanceFunctions& instance = Instance::Get().vk;
#define TVM_ATTN_VK_LOAD(name) vk.name = reinterpret_cast<PFN_##name>(instance.vkGetDeviceProcAddr(device, #name));
  TVM_ATTN_VK_DEVICE_FUNCTIONS(TVM_ATTN_VK_LOAD)
#undef TVM_ATTN_VK_LOAD
  return vk;
}

uint64_t Device::Allocate(size_t size) {
  std::lock_guard<std::mutex> lock(mutex_);
  Allocation* allocation = memory_.Allocate(size);
  if (allocation == nullptr) {
    // The device may still be using memory that was freed.
    RetireUnusedBlocks(/*all=*/true);
    stream_.Drain();
    DestroyRetired();
    allocation = memory_.Allocate(size);
  }
  if (allocation == nullptr) TVM_FFI_THROW(DeviceError) << memory_.OutOfMemoryMessage(size);
  return allocation->address;
}

void Device::Free(uint64_t address) noexcept {
  if (forked) return;
  std::lock_guard<std::mutex> lock(mutex_);
  try {
    if (memory_.Free(address)) RetireUnusedBlocks(/*all=*/false);
  } catch (...) {
    // The device is lost: nobody can be told here, but the next real operation says so.
  }
}

MemoryStats Device::memory_stats() {
  std::lock_guard<std::mutex> lock(mutex_);
  return memory_.stats();
}

Stream::Counters Device::stream_counters() {
  std::lock_guard<std::mutex> lock(mutex_);
  return stream_.counters();
}

Allocation* Device::FindRange(uint64_t address, size_t size) {
  Allocation* allocation = memory_.Find(address);
  if (allocation == nullptr || size > allocation->size - (address - allocation->address)) {
    TVM_FFI_THROW(DeviceError) << "copy of " << size << " bytes at address " << address
                               << " which is not inside a tensor on vulkan:" << index_;
  }
  return allocation;
}

void Device::CopyFromHost(const void* source, uint64_t destination, size_t size) {
  const auto* bytes = static_cast<const uint8_t*>(source);
  for (size_t done = 0; done < size;) {
    // The lock is taken again for each part, so that other threads can get in between.
    std::lock_guard<std::mutex> lock(mutex_);
    Allocation* allocation = FindRange(destination, size);
    const size_t part = std::min<size_t>(size - done, UploadRing::kLargestSlice);
    const Slice slice = upload_.Reserve(part);
    std::memcpy(slice.data, bytes + done, part);
    const Access access{allocation, false, true};
    const VkCommandBuffer commands = stream_.Record(&access, 1);
    const VkDeviceSize begin = destination + done - allocation->block->buffer.address;
    const VkBufferCopy region{slice.offset, begin, part};
    vk_.vkCmdCopyBuffer(commands, slice.buffer, allocation->block->buffer.handle, 1, &region);
    stream_.Finish();
    done += part;
    if (part == UploadRing::kLargestSlice) stream_.Submit();  // large enough to start now
    DestroyRetired();
  }
}

void Device::CopyToHost(uint64_t source, void* destination, size_t size) {
  std::lock_guard<std::mutex> readback_lock(readback_mutex_);
  auto* bytes = static_cast<uint8_t*>(destination);
  TimelineValue values[2] = {0, 0};
  const size_t parts = (size + ReadbackBuffers::kSize - 1) / ReadbackBuffers::kSize;
  // The device copies part i while the host reads part i - 1.
  for (size_t i = 0; i <= parts && size > 0; ++i) {
    if (i < parts) {
      const size_t begin = i * ReadbackBuffers::kSize;
      std::lock_guard<std::mutex> lock(mutex_);
      Allocation* allocation = FindRange(source, size);
      const Access access{allocation, true, false};
      const VkCommandBuffer commands = stream_.Record(&access, 1);
      const VkBufferCopy region{source + begin - allocation->block->buffer.address, 0,
                                std::min<size_t>(size - begin, ReadbackBuffers::kSize)};
      vk_.vkCmdCopyBuffer(commands, allocation->block->buffer.handle, readback_[i % 2].handle, 1, &region);
      stream_.MakeVisibleToHost(commands);
      stream_.Finish();
      stream_.Submit();
      values[i % 2] = stream_.Pending();
    }
    if (i > 0) {
      const size_t begin = (i - 1) * ReadbackBuffers::kSize;
      stream_.Wait(values[(i - 1) % 2]);
      std::memcpy(bytes + begin, readback_[(i - 1) % 2].mapped, std::min<size_t>(size - begin, ReadbackBuffers::kSize));
    }
  }
}

void Device::CopyInside(uint64_t source, uint64_t destination, size_t size) {
  if (size == 0 || source == destination) return;
  std::lock_guard<std::mutex> lock(mutex_);
  Allocation* from = FindRange(source, size);
  Allocation* to = FindRange(destination, size);
  if (source < destination + size && destination < source + size) {
    TVM_FFI_THROW(DeviceError) << "copy of " << size << " bytes between overlapping parts of one tensor on vulkan:"
                               << index_ << ": copy to a third tensor first";
  }
  const Access accesses[] = {{from, true, false}, {to, false, true}};
  const VkCommandBuffer commands = stream_.Record(accesses, 2);
  const VkBufferCopy region{source - from->block->buffer.address, destination - to->block->buffer.address, size};
  vk_.vkCmdCopyBuffer(commands, from->block->buffer.handle, to->block->buffer.handle, 1, &region);
  stream_.Finish();
}

void Device::ExpectNeedlessSync() {
  std::lock_guard<std::mutex> lock(mutex_);
  uploader_ = std::this_thread::get_id();
  uploaded_ = stream_.counters().operations;
}

bool Device::TakeNeedlessSync() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (uploader_ != std::this_thread::get_id()) return false;
  uploader_ = {};
  return uploaded_ == stream_.counters().operations;
}

void Device::Synchronize() {
  TimelineValue value = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stream_.Submit();
    value = stream_.Pending();
  }
  stream_.Wait(value);
  std::lock_guard<std::mutex> lock(mutex_);
  stream_.Rest();
  DestroyRetired();
  pipelines_.SaveCache(/*now=*/false);
}

void Device::Flush() {
  Synchronize();
  std::lock_guard<std::mutex> lock(mutex_);
  pipelines_.SaveCache(/*now=*/true);
}

void Device::Retire(std::function<void()> destroy) {
  retired_.emplace_back(stream_.Pending(), std::move(destroy));
  DestroyRetired();
}

void Device::DestroyRetired() {
  // Ordered by value: if one must wait, so must all later ones.
  auto first = retired_.begin();
  while (first != retired_.end() && stream_.Passed(first->first)) {
    first->second();
    ++first;
  }
  retired_.erase(retired_.begin(), first);
}

void Device::RetireUnusedBlocks(bool all) {
  for (const Buffer& buffer : memory_.TakeUnusedBlocks(all)) {
    Retire([this, buffer] {
      buffers_.Destroy(buffer);
      memory_.Released(buffer);
    });
  }
}

}  // namespace tvm_attn::vulkan
