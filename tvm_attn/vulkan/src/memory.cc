#include "memory.h"

#include <algorithm>
#include <cstdio>
#include <string>

#include "error.h"

namespace tvm_attn::vulkan {
namespace {

// Every tensor starts on this boundary: at least what any device requires of a buffer, and whole cache lines. Blocks
// start on pages.
constexpr VkDeviceSize kAlignment = 256;
// Tensors up to half of this share blocks; larger ones get a buffer of their own size.
constexpr VkDeviceSize kBlockSize = VkDeviceSize{64} << 20;

VkDeviceSize RoundUp(VkDeviceSize value, VkDeviceSize multiple) { return (value + multiple - 1) / multiple * multiple; }

uint32_t MemoryType(const PhysicalDevice& physical, uint32_t allowed, Use use) {
  constexpr VkMemoryPropertyFlags kHost = VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | VK_MEMORY_PROPERTY_HOST_COHERENT_BIT;
  switch (use) {
    case Use::kTensors:
      return physical.MemoryType(allowed, VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT, 0);
    case Use::kUpload:
      return physical.MemoryType(allowed, kHost, 0);
    case Use::kReadback:
      return physical.MemoryType(allowed, kHost, VK_MEMORY_PROPERTY_HOST_CACHED_BIT);
  }
  return 0;  // not reached
}

std::string Mebibytes(VkDeviceSize bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f MiB", static_cast<double>(bytes) / (1 << 20));
  return text;
}

}  // namespace

Buffer BufferFactory::TryCreate(VkDeviceSize size, Use use, VkResult* result) const {
  Buffer buffer;
  buffer.size = size;
  VkBufferCreateInfo info{VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO};
  info.size = size;
  info.usage = VK_BUFFER_USAGE_STORAGE_BUFFER_BIT | VK_BUFFER_USAGE_TRANSFER_SRC_BIT |
               VK_BUFFER_USAGE_TRANSFER_DST_BIT | VK_BUFFER_USAGE_SHADER_DEVICE_ADDRESS_BIT;
  info.sharingMode = VK_SHARING_MODE_EXCLUSIVE;
  *result = vk_.vkCreateBuffer(device_, &info, nullptr, &buffer.handle);
  if (*result != VK_SUCCESS) return {};

  VkBufferMemoryRequirementsInfo2 query{VK_STRUCTURE_TYPE_BUFFER_MEMORY_REQUIREMENTS_INFO_2};
  query.buffer = buffer.handle;
  VkMemoryRequirements2 requirements{VK_STRUCTURE_TYPE_MEMORY_REQUIREMENTS_2};
  vk_.vkGetBufferMemoryRequirements2(device_, &query, &requirements);
  VkMemoryAllocateFlagsInfo flags{VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_FLAGS_INFO};
  flags.flags = VK_MEMORY_ALLOCATE_DEVICE_ADDRESS_BIT;
  VkMemoryAllocateInfo allocate{VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO};
  allocate.pNext = &flags;
  allocate.allocationSize = requirements.memoryRequirements.size;
  allocate.memoryTypeIndex = MemoryType(physical_, requirements.memoryRequirements.memoryTypeBits, use);
  *result = vk_.vkAllocateMemory(device_, &allocate, nullptr, &buffer.memory);
  if (*result == VK_SUCCESS) *result = vk_.vkBindBufferMemory(device_, buffer.handle, buffer.memory, 0);
  if (*result == VK_SUCCESS && use != Use::kTensors) {
    void* mapped = nullptr;
    *result = vk_.vkMapMemory(device_, buffer.memory, 0, VK_WHOLE_SIZE, 0, &mapped);
    buffer.mapped = static_cast<uint8_t*>(mapped);
  }
  if (*result != VK_SUCCESS) {
    Destroy(buffer);
    return {};
  }
  VkBufferDeviceAddressInfo address{VK_STRUCTURE_TYPE_BUFFER_DEVICE_ADDRESS_INFO};
  address.buffer = buffer.handle;
  buffer.address = vk_.vkGetBufferDeviceAddress(device_, &address);
  return buffer;
}

Buffer BufferFactory::Create(VkDeviceSize size, Use use) const {
  VkResult result = VK_SUCCESS;
  Buffer buffer = TryCreate(size, use, &result);
  Check(result, "allocating a buffer");
  return buffer;
}

void BufferFactory::Destroy(const Buffer& buffer) const {
  vk_.vkDestroyBuffer(device_, buffer.handle, nullptr);
  vk_.vkFreeMemory(device_, buffer.memory, nullptr);  // also unmaps it
}

Allocation* Memory::Allocate(VkDeviceSize requested) {
  const VkDeviceSize size = RoundUp(std::max<VkDeviceSize>(requested, 1), kAlignment);
  const PhysicalDevice& physical = factory_.physical();
  const VkDeviceSize limit =
      std::min(physical.properties13.maxBufferSize, physical.properties11.maxMemoryAllocationSize);
  if (size > limit || size < requested) {
    TVM_FFI_THROW(DeviceError) << "a tensor of " << Mebibytes(requested) << " does not fit into one buffer of "
                               << physical.properties.deviceName << ", which ends at " << Mebibytes(limit);
  }
  Block* block = nullptr;
  if (size > kBlockSize / 2) {
    block = AddBlock(size);
  } else {
    for (const std::unique_ptr<Block>& candidate : blocks_) {
      if (Allocation* allocation = AllocateFrom(candidate.get(), size)) return allocation;
    }
    block = AddBlock(kBlockSize);
    if (block == nullptr) block = AddBlock(size);  // the heap has no room for a whole block
  }
  return block == nullptr ? nullptr : AllocateFrom(block, size);
}

Block* Memory::AddBlock(VkDeviceSize size) {
  const PhysicalDevice& physical = factory_.physical();
  // Some drivers hand out more memory than there is and fail when it is first used.
  if (stats_.reserved_bytes + size > physical.HeapSize()) return nullptr;
  VkResult result = VK_SUCCESS;
  const Buffer buffer = factory_.TryCreate(size, Use::kTensors, &result);
  if (result == VK_ERROR_OUT_OF_DEVICE_MEMORY || result == VK_ERROR_OUT_OF_HOST_MEMORY ||
      result == VK_ERROR_TOO_MANY_OBJECTS) {
    return nullptr;
  }
  Check(result, "allocating device memory");
  auto block = std::make_unique<Block>();
  block->buffer = buffer;
  block->free.emplace(0, size);
  stats_.reserved_bytes += size;
  ++stats_.blocks;
  blocks_.push_back(std::move(block));
  return blocks_.back().get();
}

Allocation* Memory::AllocateFrom(Block* block, VkDeviceSize size) {
  // Best fit: large holes stay whole.
  auto best = block->free.end();
  for (auto range = block->free.begin(); range != block->free.end(); ++range) {
    if (range->second >= size && (best == block->free.end() || range->second < best->second)) best = range;
  }
  if (best == block->free.end()) return nullptr;
  const VkDeviceSize offset = best->first;
  const VkDeviceSize rest = best->second - size;
  block->free.erase(best);
  if (rest > 0) block->free.emplace(offset + size, rest);

  Allocation allocation;
  allocation.address = block->buffer.address + offset;
  allocation.size = size;
  allocation.block = block;
  allocation.last_write = allocation.last_use = block->last_use;
  stats_.allocated_bytes += size;
  stats_.allocated_peak_bytes = std::max(stats_.allocated_peak_bytes, stats_.allocated_bytes);
  ++stats_.allocations;
  return &allocations_.emplace(allocation.address, allocation).first->second;
}

bool Memory::Free(uint64_t address) {
  auto found = allocations_.find(address);
  if (found == allocations_.end()) return false;
  const Allocation allocation = found->second;
  allocations_.erase(found);
  stats_.allocated_bytes -= allocation.size;
  --stats_.allocations;

  Block* block = allocation.block;
  block->last_use = std::max(block->last_use, allocation.last_use);
  auto range = block->free.emplace(allocation.address - block->buffer.address, allocation.size).first;
  auto next = std::next(range);
  if (next != block->free.end() && range->first + range->second == next->first) {
    range->second += next->second;
    block->free.erase(next);
  }
  if (range != block->free.begin()) {
    auto previous = std::prev(range);
    if (previous->first + previous->second == range->first) {
      previous->second += range->second;
      block->free.erase(range);
    }
  }
  return true;
}

Allocation* Memory::Find(uint64_t address) {
  auto after = allocations_.upper_bound(address);
  if (after == allocations_.begin()) return nullptr;
  Allocation* allocation = &std::prev(after)->second;
  return address - allocation->address <= allocation->size ? allocation : nullptr;
}

std::vector<Buffer> Memory::TakeUnusedBlocks(bool all) {
  std::vector<Buffer> taken;
  bool keep = !all;
  auto last = std::remove_if(blocks_.begin(), blocks_.end(), [&](const std::unique_ptr<Block>& block) {
    if (!block->unused()) return false;
    if (keep && block->buffer.size == kBlockSize) {
      keep = false;
      return false;
    }
    taken.push_back(block->buffer);
    return true;
  });
  blocks_.erase(last, blocks_.end());
  stats_.blocks -= taken.size();
  return taken;
}

std::string Memory::OutOfMemoryMessage(VkDeviceSize size) const {
  const PhysicalDevice& physical = factory_.physical();
  return std::string("out of memory on ") + physical.properties.deviceName + ": " + Mebibytes(size) + " asked, " +
         Mebibytes(stats_.allocated_bytes) + " in use by tensors of this process (" +
         Mebibytes(stats_.reserved_bytes) + " taken from the driver), " + Mebibytes(physical.HeapSize()) +
         " in all: free tensors, or use a smaller batch, context or dtype";
}

}  // namespace tvm_attn::vulkan
