// Device memory: tensors are parts of large buffers, and are found by their device address.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "physical_device.h"
#include "vulkan_api.h"

namespace tvm_attn::vulkan {

/// A VkBuffer with memory of its own, its device address and, for host-visible memory, its mapping.
struct Buffer {
  VkBuffer handle = VK_NULL_HANDLE;
  VkDeviceMemory memory = VK_NULL_HANDLE;
  VkDeviceSize size = 0;
  uint64_t address = 0;
  uint8_t* mapped = nullptr;
};

/// Position of an operation in the device's stream; 0 is before all of them. See stream.h.
using Sequence = uint64_t;

struct Block;

/// One tensor's memory.
struct Allocation {
  uint64_t address = 0;
  VkDeviceSize size = 0;
  Block* block = nullptr;
  /// The last operations in the stream that wrote and that touched this memory.
  Sequence last_write = 0;
  Sequence last_use = 0;
};

/// Memory of a device's tensors; `reserved` was taken from the driver.
struct MemoryStats {
  uint64_t allocated_bytes = 0;
  uint64_t allocated_peak_bytes = 0;
  uint64_t allocations = 0;
  uint64_t reserved_bytes = 0;
  uint64_t blocks = 0;
};

/// What a buffer is for, which decides the memory it is in.
enum class Use {
  kTensors,   // the device's own memory
  kUpload,    // written by the host, read by the device; mapped
  kReadback,  // written by the device, read by the host; mapped
};

/// Makes and destroys buffers of one device.
class BufferFactory {
 public:
  BufferFactory(const PhysicalDevice& physical, VkDevice device, const DeviceFunctions& vk)
      : physical_(physical), device_(device), vk_(vk) {}

  /// A buffer for copies and kernels. On failure `*result` says why and the buffer is empty.
  Buffer TryCreate(VkDeviceSize size, Use use, VkResult* result) const;
  /// The same; throws DeviceError on failure.
  Buffer Create(VkDeviceSize size, Use use) const;
  void Destroy(const Buffer& buffer) const;

  const PhysicalDevice& physical() const { return physical_; }

 private:
  const PhysicalDevice& physical_;
  VkDevice device_;
  const DeviceFunctions& vk_;
};

/// The allocator of one device. Not thread-safe: the device's lock is held during every call.
///
/// The stream runs in order, so memory can be handed out again at once: a new allocation takes over the last use of its
/// block's previous content, and the stream puts a barrier between the two.
class Memory {
 public:
  explicit Memory(const BufferFactory& factory) : factory_(factory) {}

  /// `size` bytes, aligned to 256. Returns nullptr if the driver or the heap has no more: the caller may let the device
  /// finish, destroy `TakeUnusedBlocks(true)` and try again. Throws DeviceError if no buffer can be that large.
  Allocation* Allocate(VkDeviceSize size);
  /// Frees an allocation; false if `address` is not one.
  bool Free(uint64_t address);
  /// The allocation that contains `address` (including its end, so that an empty view there is found), or nullptr.
  Allocation* Find(uint64_t address);

  /// Buffers that hold nothing any more. They no longer belong to this allocator; the caller destroys them when the
  /// device has finished what was recorded. One empty block is kept unless `all`.
  std::vector<Buffer> TakeUnusedBlocks(bool all);
  /// A buffer taken earlier was destroyed: its bytes are available again.
  void Released(const Buffer& buffer) { stats_.reserved_bytes -= buffer.size; }

  const MemoryStats& stats() const { return stats_; }
  /// The message for an allocation of `size` that has finally failed.
  std::string OutOfMemoryMessage(VkDeviceSize size) const;

 private:
  Block* AddBlock(VkDeviceSize size);
  Allocation* AllocateFrom(Block* block, VkDeviceSize size);

  const BufferFactory& factory_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::map<uint64_t, Allocation> allocations_;  // by address
  MemoryStats stats_;
};

/// A large buffer and its free ranges.
struct Block {
  Buffer buffer;
  std::map<VkDeviceSize, VkDeviceSize> free;  // offset -> size, no two adjacent
  Sequence last_use = 0;                      // of all memory freed in this block
  bool unused() const { return free.size() == 1 && free.begin()->second == buffer.size; }
};

}  // namespace tvm_attn::vulkan
