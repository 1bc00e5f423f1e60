// Host-visible memory that the stream's copies and argument blocks pass through.
#pragma once

#include <deque>

#include "memory.h"
#include "stream.h"

namespace tvm_attn::vulkan {

/// Part of a host-visible buffer.
struct Slice {
  VkBuffer buffer;
  VkDeviceSize offset;
  uint64_t address;
  uint8_t* data;
};

/// A ring of host-visible memory for uploads. Space is free again when the device has passed the batch that was being
/// recorded when it was handed out. Not thread-safe: the device's lock is held during every call.
class UploadRing {
 public:
  static constexpr VkDeviceSize kSize = VkDeviceSize{16} << 20;
  /// The largest slice: a copy in parts keeps several in flight.
  static constexpr VkDeviceSize kLargestSlice = kSize / 4;

  UploadRing(const BufferFactory& factory, Stream* stream);

  /// `size` <= kLargestSlice bytes for the next recorded operation. Waits for the device if the ring is full.
  Slice Reserve(VkDeviceSize size);

 private:
  struct Mark {
    uint64_t end;         // position in the ring's endless count of bytes
    TimelineValue value;  // when the space before it is free again
  };

  Stream* stream_;
  Buffer buffer_;
  uint64_t head_ = 0;  // bytes ever handed out, padding included
  uint64_t tail_ = 0;  // bytes that are free again
  std::deque<Mark> marks_;
};

/// Two host-visible buffers for results: the host reads one while the device fills the other.
class ReadbackBuffers {
 public:
  static constexpr VkDeviceSize kSize = VkDeviceSize{4} << 20;

  explicit ReadbackBuffers(const BufferFactory& factory);
  const Buffer& operator[](size_t index) const { return buffers_[index]; }

 private:
  Buffer buffers_[2];
};

}  // namespace tvm_attn::vulkan
