#include "stream.h"

#include <algorithm>

#include "error.h"

namespace tvm_attn::vulkan {
namespace {

// After the host has waited, the device is idle. The first batch is short so that it starts early; each later one is
// twice as long, so that a long run of operations needs few submissions.
constexpr uint32_t kFirstBatchLength = 4;
constexpr uint32_t kLongestBatch = 64;
// Batches in flight. When all are, recording waits for the oldest.
constexpr size_t kBatches = 16;

constexpr VkPipelineStageFlags2 kStages = VK_PIPELINE_STAGE_2_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_2_COPY_BIT;
constexpr VkAccessFlags2 kWrites = VK_ACCESS_2_SHADER_WRITE_BIT | VK_ACCESS_2_TRANSFER_WRITE_BIT;
constexpr VkAccessFlags2 kReads = VK_ACCESS_2_SHADER_READ_BIT | VK_ACCESS_2_TRANSFER_READ_BIT;

void MemoryBarrier(const DeviceFunctions& vk, VkCommandBuffer commands, VkAccessFlags2 source,
                   VkPipelineStageFlags2 destination_stages, VkAccessFlags2 destination) {
  VkMemoryBarrier2 barrier{VK_STRUCTURE_TYPE_MEMORY_BARRIER_2};
  barrier.srcStageMask = kStages;
  barrier.srcAccessMask = source;
  barrier.dstStageMask = destination_stages;
  barrier.dstAccessMask = destination;
  VkDependencyInfo dependency{VK_STRUCTURE_TYPE_DEPENDENCY_INFO};
  dependency.memoryBarrierCount = 1;
  dependency.pMemoryBarriers = &barrier;
  vk.vkCmdPipelineBarrier2(commands, &dependency);
}

}  // namespace

Stream::Stream(VkDevice device, const DeviceFunctions& vk, uint32_t queue_family)
    : device_(device), vk_(vk), queue_family_(queue_family), batch_length_(kFirstBatchLength) {
  vk_.vkGetDeviceQueue(device_, queue_family_, 0, &queue_);
  VkSemaphoreTypeCreateInfo type{VK_STRUCTURE_TYPE_SEMAPHORE_TYPE_CREATE_INFO};
  type.semaphoreType = VK_SEMAPHORE_TYPE_TIMELINE;
  VkSemaphoreCreateInfo info{VK_STRUCTURE_TYPE_SEMAPHORE_CREATE_INFO};
  info.pNext = &type;
  Check(vk_.vkCreateSemaphore(device_, &info, nullptr, &timeline_), "vkCreateSemaphore");
}

void Stream::CheckAlive() const {
  if (lost_) {
    TVM_FFI_THROW(DeviceError) << "the Vulkan device failed earlier and takes no more work: restart the process";
  }
}

void Stream::CheckResult(VkResult result, const char* call) {
  // The recorded work will never be signalled: nobody may wait for it.
  if (result < VK_SUCCESS) lost_ = true;
  Check(result, call);
}

void Stream::BeginBatch() {
  CheckAlive();
  if (batches_.size() < kBatches && (batches_.empty() || !Passed(batches_[current_].value))) {
    Batch batch;
    VkCommandPoolCreateInfo pool{VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO};
    pool.flags = VK_COMMAND_POOL_CREATE_TRANSIENT_BIT;
    pool.queueFamilyIndex = queue_family_;
    Check(vk_.vkCreateCommandPool(device_, &pool, nullptr, &batch.pool), "vkCreateCommandPool");
    VkCommandBufferAllocateInfo allocate{VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO};
    allocate.commandPool = batch.pool;
    allocate.level = VK_COMMAND_BUFFER_LEVEL_PRIMARY;
    allocate.commandBufferCount = 1;
    Check(vk_.vkAllocateCommandBuffers(device_, &allocate, &batch.commands), "vkAllocateCommandBuffers");
    // Inserted before the oldest, which current_ points at: the ring stays in the order of submission.
    batches_.insert(batches_.begin() + static_cast<std::ptrdiff_t>(current_), batch);
  } else {
    Wait(batches_[current_].value);
    CheckResult(vk_.vkResetCommandPool(device_, batches_[current_].pool, 0), "vkResetCommandPool");
  }
  VkCommandBufferBeginInfo begin{VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO};
  begin.flags = VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT;
  CheckResult(vk_.vkBeginCommandBuffer(batches_[current_].commands, &begin), "vkBeginCommandBuffer");
  recording_ = true;
  recorded_ = 0;
  pipeline_ = VK_NULL_HANDLE;
}

VkCommandBuffer Stream::Record(const Access* accesses, size_t count) {
  if (!recording_) BeginBatch();
  const VkCommandBuffer commands = batches_[current_].commands;
  bool depends = false;
  for (size_t i = 0; i < count; ++i) {
    const Allocation& allocation = *accesses[i].allocation;
    depends |= accesses[i].write ? allocation.last_use > barrier_ : accesses[i].read && allocation.last_write > barrier_;
  }
  if (depends) {
    MemoryBarrier(vk_, commands, kWrites, kStages, kReads | kWrites);
    barrier_ = sequence_;
    ++counters_.barriers;
  }
  ++sequence_;
  for (size_t i = 0; i < count; ++i) {
    if (accesses[i].write) accesses[i].allocation->last_write = sequence_;
    accesses[i].allocation->last_use = sequence_;
  }
  return commands;
}

void Stream::Finish() {
  ++counters_.operations;
  if (++recorded_ >= batch_length_) {
    Submit();
    batch_length_ = std::min(2 * batch_length_, kLongestBatch);
  }
}

void Stream::BindPipeline(VkCommandBuffer commands, VkPipeline pipeline) {
  if (pipeline == pipeline_) return;
  vk_.vkCmdBindPipeline(commands, VK_PIPELINE_BIND_POINT_COMPUTE, pipeline);
  pipeline_ = pipeline;
}

void Stream::MakeVisibleToHost(VkCommandBuffer commands) {
  MemoryBarrier(vk_, commands, kWrites, VK_PIPELINE_STAGE_2_HOST_BIT, VK_ACCESS_2_HOST_READ_BIT);
}

void Stream::Submit() {
  if (!recording_) return;
  Batch& batch = batches_[current_];
  recording_ = false;
  batch.value = ++submitted_;
  current_ = (current_ + 1) % batches_.size();
  CheckResult(vk_.vkEndCommandBuffer(batch.commands), "vkEndCommandBuffer");
  VkCommandBufferSubmitInfo commands{VK_STRUCTURE_TYPE_COMMAND_BUFFER_SUBMIT_INFO};
  commands.commandBuffer = batch.commands;
  VkSemaphoreSubmitInfo signal{VK_STRUCTURE_TYPE_SEMAPHORE_SUBMIT_INFO};
  signal.semaphore = timeline_;
  signal.value = batch.value;
  signal.stageMask = VK_PIPELINE_STAGE_2_ALL_COMMANDS_BIT;
  VkSubmitInfo2 submit{VK_STRUCTURE_TYPE_SUBMIT_INFO_2};
  submit.commandBufferInfoCount = 1;
  submit.pCommandBufferInfos = &commands;
  submit.signalSemaphoreInfoCount = 1;
  submit.pSignalSemaphoreInfos = &signal;
  CheckResult(vk_.vkQueueSubmit2(queue_, 1, &submit, VK_NULL_HANDLE), "vkQueueSubmit2");
  ++counters_.submissions;
}

bool Stream::Passed(TimelineValue value) {
  if (value <= passed_) return true;
  TimelineValue reached = 0;
  CheckResult(vk_.vkGetSemaphoreCounterValue(device_, timeline_, &reached), "vkGetSemaphoreCounterValue");
  TimelineValue known = passed_;
  while (known < reached && !passed_.compare_exchange_weak(known, reached)) {
  }
  return value <= reached;
}

void Stream::Wait(TimelineValue value) {
  constexpr uint64_t kSecond = 1'000'000'000;
  VkSemaphoreWaitInfo info{VK_STRUCTURE_TYPE_SEMAPHORE_WAIT_INFO};
  info.semaphoreCount = 1;
  info.pSemaphores = &timeline_;
  info.pValues = &value;
  while (!Passed(value)) {
    CheckAlive();  // another thread may have seen the device fail
    CheckResult(vk_.vkWaitSemaphores(device_, &info, kSecond), "vkWaitSemaphores");
  }
}

void Stream::Drain() {
  Submit();
  Wait(submitted_);
  Rest();
}

void Stream::Rest() { batch_length_ = kFirstBatchLength; }

}  // namespace tvm_attn::vulkan
