// A device's only stream of work, in order: commands are recorded into batches, a batch is submitted while the host
// records the next, and a timeline semaphore counts the batches that the device has finished.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "memory.h"
#include "vulkan_api.h"

namespace tvm_attn::vulkan {

/// How an operation uses an allocation.
struct Access {
  Allocation* allocation;
  bool read;
  bool write;
};

/// A point in the stream: the value that the timeline semaphore reaches when the device has passed it.
using TimelineValue = uint64_t;

/// Not thread-safe, except where noted: the device's lock is held during every call.
class Stream {
 public:
  Stream(VkDevice device, const DeviceFunctions& vk, uint32_t queue_family);
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  /// The command buffer to record one operation into. If the operation depends on an earlier one through `accesses`
  /// (read after write, write after read, write after write), a barrier comes first. Call `Finish` afterwards.
  VkCommandBuffer Record(const Access* accesses, size_t count);
  /// The operation is recorded; submits the batch when it is long enough.
  void Finish();

  /// Binds `pipeline` unless it is already bound in this batch.
  void BindPipeline(VkCommandBuffer commands, VkPipeline pipeline);
  /// Makes earlier copies readable by the host once the batch is done.
  void MakeVisibleToHost(VkCommandBuffer commands);

  /// Submits what is recorded, if anything.
  void Submit();
  /// The value that will cover the operation recorded next.
  TimelineValue Next() const { return submitted_ + 1; }
  /// The value that covers everything recorded so far.
  TimelineValue Pending() const { return recording_ ? submitted_ + 1 : submitted_; }
  /// Whether the device has passed `value`. Thread-safe.
  bool Passed(TimelineValue value);
  /// Blocks until the device has passed `value`, which must have been submitted. Thread-safe; throws DeviceError when the
  /// device was lost.
  void Wait(TimelineValue value);
  /// Submits and blocks until nothing is left to do.
  void Drain();
  /// The host has waited, so the device is idle: the next batch should start early.
  void Rest();

  /// The numbers of submissions and of recorded barriers, for tests and tuning.
  struct Counters {
    uint64_t operations = 0;
    uint64_t submissions = 0;
    uint64_t barriers = 0;
  };
  const Counters& counters() const { return counters_; }

 private:
  struct Batch {
    VkCommandPool pool = VK_NULL_HANDLE;
    VkCommandBuffer commands = VK_NULL_HANDLE;
    TimelineValue value = 0;
  };

  void BeginBatch();
  void CheckAlive() const;
  void CheckResult(VkResult result, const char* call);

  VkDevice device_;
  const DeviceFunctions& vk_;
  uint32_t queue_family_;
  VkQueue queue_ = VK_NULL_HANDLE;
  VkSemaphore timeline_ = VK_NULL_HANDLE;

  std::vector<Batch> batches_;  // a ring; current_ is the one being recorded or to be recorded next
  size_t current_ = 0;
  bool recording_ = false;
  uint32_t recorded_ = 0;  // operations in the batch
  uint32_t batch_length_;  // operations after which the batch is submitted
  TimelineValue submitted_ = 0;
  std::atomic<TimelineValue> passed_{0};  // a lower bound
  std::atomic<bool> lost_{false};

  Sequence sequence_ = 0;  // of the last operation
  Sequence barrier_ = 0;   // operations up to this one are ordered before every later one
  VkPipeline pipeline_ = VK_NULL_HANDLE;
  Counters counters_;
};

}  // namespace tvm_attn::vulkan
