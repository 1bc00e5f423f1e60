#include "timer.h"

#include <tvm/ffi/memory.h>

#include <chrono>

#include "error.h"

namespace tvm_attn::vulkan {
namespace {

/// TVM's `tvm::runtime::TimerNode`, redeclared: <tvm/runtime/timer.h> does not compile against the wheel, which lacks
/// headers that it includes. TVM is pinned to one version; this has the same virtual functions in the same order.
class TimerNode : public tvm::ffi::Object {
 public:
  virtual void Start() = 0;
  virtual void Stop() = 0;
  virtual int64_t SyncAndGetElapsedNanos() = 0;
  virtual ~TimerNode() {}

  static constexpr const bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO("runtime.TimerNode", TimerNode, tvm::ffi::Object);
};

class VulkanTimerNode final : public TimerNode {
 public:
  explicit VulkanTimerNode(Device* device) : device_(device) {
    if (device_->physical().timestamp_bits == 0) return;
    VkQueryPoolCreateInfo info{VK_STRUCTURE_TYPE_QUERY_POOL_CREATE_INFO};
    info.queryType = VK_QUERY_TYPE_TIMESTAMP;
    info.queryCount = 2;
    Check(device_->vk().vkCreateQueryPool(device_->handle(), &info, nullptr, &queries_), "vkCreateQueryPool");
    device_->vk().vkResetQueryPool(device_->handle(), queries_, 0, 2);
  }

  ~VulkanTimerNode() final {
    if (queries_ == VK_NULL_HANDLE) return;
    try {
      Device::Session(device_).Retire(
          [device = device_, pool = queries_] { device->vk().vkDestroyQueryPool(device->handle(), pool, nullptr); });
    } catch (...) {
      // The device is lost, and so are the queries.
    }
  }

  void Start() final { Mark(0); }
  void Stop() final { Mark(1); }

  int64_t SyncAndGetElapsedNanos() final {
    if (queries_ == VK_NULL_HANDLE) return std::chrono::nanoseconds(host_[1] - host_[0]).count();
    device_->Synchronize();
    uint64_t ticks[2] = {0, 0};
    Check(device_->vk().vkGetQueryPoolResults(device_->handle(), queries_, 0, 2, sizeof ticks, ticks, sizeof ticks[0],
                                              VK_QUERY_RESULT_64_BIT | VK_QUERY_RESULT_WAIT_BIT),
          "vkGetQueryPoolResults");
    const uint32_t bits = device_->physical().timestamp_bits;
    const uint64_t mask = bits == 64 ? UINT64_MAX : (uint64_t{1} << bits) - 1;
    const double period = device_->physical().properties.limits.timestampPeriod;
    return static_cast<int64_t>(static_cast<double>((ticks[1] - ticks[0]) & mask) * period);
  }

  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("tvm_attn.vulkan.Timer", VulkanTimerNode, TimerNode);

 private:
  void Mark(uint32_t which) {
    if (queries_ == VK_NULL_HANDLE) {  // the queue has no timestamps: use the host's clock around finished work
      device_->Synchronize();
      host_[which] = std::chrono::steady_clock::now();
      return;
    }
    Device::Session session(device_);
    const VkCommandBuffer commands = session.stream().Record(nullptr, 0);
    device_->vk().vkCmdWriteTimestamp2(commands, VK_PIPELINE_STAGE_2_ALL_COMMANDS_BIT, queries_, which);
    session.stream().Finish();
  }

  Device* device_;
  VkQueryPool queries_ = VK_NULL_HANDLE;
  std::chrono::steady_clock::time_point host_[2];
};

}  // namespace

tvm::ffi::ObjectRef MakeTimer(Device* device) {
  return tvm::ffi::ObjectRef(tvm::ffi::ObjectPtr<tvm::ffi::Object>(tvm::ffi::make_object<VulkanTimerNode>(device)));
}

}  // namespace tvm_attn::vulkan
