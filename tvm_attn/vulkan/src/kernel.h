// A kernel and its launch.
#pragma once

#include <tvm/ffi/function.h>

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "device.h"
#include "kernel_blob.h"

namespace tvm_attn::vulkan {

/// The device that this thread's launches go to, as set by the last SetDevice.
int CurrentDevice();
void SetCurrentDevice(int index);

class Kernel {
 public:
  explicit Kernel(KernelSpec spec) : spec_(std::move(spec)) {}
  ~Kernel();
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  const KernelSpec& spec() const { return spec_; }

  /// Records one dispatch into the stream of `device`. `args` are the parameters, then the launch parameters.
  /// Throws TypeError for arguments that do not fit, DeviceError for what the device cannot do.
  void Launch(Device* device, tvm::ffi::PackedArgs args);

 private:
  struct Extents {
    uint32_t grid[3] = {1, 1, 1};
    uint32_t dynamic_shared = 0;
  };
  using PipelineKey = std::pair<bool, uint32_t>;  // folded, bytes of dynamic shared memory

  Extents ReadExtents(tvm::ffi::PackedArgs args) const;
  size_t FillBlock(tvm::ffi::PackedArgs args, Memory* memory, uint8_t* block, Access* accesses) const;
  VkPipeline Pipeline(Device* device, Device::Session* session, bool folded, uint32_t dynamic_shared);

  const KernelSpec spec_;
  // By device index. Each entry is guarded by its device's lock; the vector has its final size from the start.
  std::vector<std::map<PipelineKey, VkPipeline>> pipelines_{kMaxDevices};
};

}  // namespace tvm_attn::vulkan
