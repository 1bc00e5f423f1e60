// A Vulkan device in use: its queue, memory, copies and pipelines, behind one lock.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "memory.h"
#include "physical_device.h"
#include "pipeline.h"
#include "staging.h"
#include "stream.h"
#include "vulkan_api.h"

namespace tvm_attn::vulkan {

/// More devices than this are ignored.
constexpr size_t kMaxDevices = 64;

/// Thread-safe. Lives until the process ends, as tensors may be freed at any time before.
class Device {
 public:
  /// `vulkan:index`, opened at first use. Throws DeviceError if there is no such device.
  static Device& Get(int index);
  /// The number of devices. Throws DeviceError if there is none.
  static size_t Count();
  /// The devices opened so far.
  static std::vector<Device*> Opened();

  Device(const PhysicalDevice& physical, int index);
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  int index() const { return index_; }
  const PhysicalDevice& physical() const { return physical_; }

  /// The device address of `size` new bytes. Throws DeviceError with the figures if there is not enough memory.
  uint64_t Allocate(size_t size);
  /// Frees memory. Never throws: destructors of tensors call it, even after the device was lost.
  void Free(uint64_t address) noexcept;
  MemoryStats memory_stats();
  Stream::Counters stream_counters();

  /// Copies `size` bytes from the host, which may reuse its memory at once.
  void CopyFromHost(const void* source, uint64_t destination, size_t size);
  /// Copies `size` bytes to the host after all earlier work; they have arrived when this returns.
  void CopyToHost(uint64_t source, void* destination, size_t size);
  /// Copies `size` bytes within the device, in stream order.
  void CopyInside(uint64_t source, uint64_t destination, size_t size);

  /// This thread has just called CopyFromHost, and its next call will be an unneeded wait.
  void ExpectNeedlessSync();
  /// Whether this is that wait: this thread's first since then, with nothing asked of the device in between.
  bool TakeNeedlessSync();

  /// Blocks until all work so far is done.
  void Synchronize();
  /// The same; also writes the pipeline cache, before the process ends.
  void Flush();

  /// What a launch needs, with the device's lock held; see kernel.cc.
  class Session {
   public:
    explicit Session(Device* device) : lock_(device->mutex_), device_(device) {}
    Memory& memory() { return device_->memory_; }
    Stream& stream() { return device_->stream_; }
    UploadRing& upload() { return device_->upload_; }
    PipelineFactory& pipelines() { return device_->pipelines_; }
    /// Calls `destroy` once the device has finished everything that was recorded.
    void Retire(std::function<void()> destroy) { device_->Retire(std::move(destroy)); }

   private:
    std::unique_lock<std::mutex> lock_;
    Device* device_;
  };

  VkDevice handle() const { return handle_; }
  const DeviceFunctions& vk() const { return vk_; }

 private:
  static VkDevice CreateLogicalDevice(const PhysicalDevice& physical);
  static DeviceFunctions LoadFunctions(VkDevice device);

  // These require the lock to be held.
  Allocation* FindRange(uint64_t address, size_t size);
  void Retire(std::function<void()> destroy);
  void DestroyRetired();
  void RetireUnusedBlocks(bool all);

  const PhysicalDevice& physical_;
  const int index_;
  std::mutex mutex_;
  std::mutex readback_mutex_;  // taken before mutex_, held while the host waits for its data
  VkDevice handle_;
  DeviceFunctions vk_;
  BufferFactory buffers_;
  Memory memory_;
  Stream stream_;
  UploadRing upload_;
  ReadbackBuffers readback_;
  PipelineFactory pipelines_;
  std::vector<std::pair<TimelineValue, std::function<void()>>> retired_;
  // The thread whose next wait is not needed, and the operations until then.
  std::thread::id uploader_;
  uint64_t uploaded_ = 0;
};

}  // namespace tvm_attn::vulkan
