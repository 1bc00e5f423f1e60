// The runtime behind TVM's device interface.
#pragma once

#include <tvm/runtime/device_api.h>

#include <string>

namespace tvm_attn::vulkan {

/// Streams: a device has only TVM's default stream, which runs the work of all threads in the order of the calls.
class VulkanDeviceApi final : public tvm::runtime::DeviceAPI {
 public:
  static VulkanDeviceApi* Global();

  void SetDevice(tvm::Device dev) final;
  void GetAttr(tvm::Device dev, tvm::runtime::DeviceAttrKind kind, tvm::ffi::Any* rv) final;
  void GetTargetProperty(tvm::Device dev, const std::string& property, tvm::ffi::Any* rv) final;
  void* AllocDataSpace(tvm::Device dev, size_t nbytes, size_t alignment, DLDataType type_hint) final;
  using DeviceAPI::AllocDataSpace;
  void FreeDataSpace(tvm::Device dev, void* ptr) final;
  void StreamSync(tvm::Device dev, TVMStreamHandle stream) final;
  void CopyDataFromTo(DLTensor* from, DLTensor* to, TVMStreamHandle stream) final;
  bool SupportsDevicePointerArithmeticsOnHost() final { return true; }

 protected:
  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset, size_t num_bytes,
                      tvm::Device dev_from, tvm::Device dev_to, DLDataType type_hint, TVMStreamHandle stream) final;
};

}  // namespace tvm_attn::vulkan
