#include "module.h"

#include <tvm/ffi/cast.h>
#include <tvm/ffi/function.h>

#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "error.h"
#include "kernel.h"
#include "kernel_blob.h"
#include "needs.h"

namespace tvm_attn::vulkan {
namespace {

using tvm::ffi::Bytes;
using tvm::ffi::Function;
using tvm::ffi::Optional;
using tvm::ffi::String;

constexpr const char* kKind = "vulkan";

class VulkanModule final : public tvm::ffi::ModuleObj {
 public:
  explicit VulkanModule(const Bytes& blob) : blob_(blob) {
    for (KernelSpec& spec : ParseModule(blob.data(), blob.size())) {
      std::string name = spec.name;
      kernels_.emplace(std::move(name), std::make_unique<Kernel>(std::move(spec)));
    }
  }

  const char* kind() const final { return kKind; }
  int GetPropertyMask() const final {
    return tvm::ffi::Module::kBinarySerializable | tvm::ffi::Module::kRunnable;
  }
  Bytes SaveToBytes() const final { return blob_; }
  bool ImplementsFunction(const String& name) final { return kernels_.count(name) != 0; }

  Optional<Function> GetFunction(const String& name) final {
    const auto found = kernels_.find(name);
    if (found == kernels_.end()) return std::nullopt;
    return Function::FromPacked(
        [self = tvm::ffi::GetRef<tvm::ffi::Module>(this), this, kernel = found->second.get()](
            tvm::ffi::PackedArgs args, tvm::ffi::Any*) {
          Device& device = Device::Get(CurrentDevice());
          RequireDevice(device);
          kernel->Launch(&device, args);
        });
  }

  /// SPIR-V in the standard assembly syntax, from the disassembler that the Python side registers.
  String InspectSource(const String& format) const final {
    if (!format.empty() && format != "spvasm") return String();
    const auto disassemble = Function::GetGlobal("tvm_attn.vulkan.disassemble");
    if (!disassemble.has_value()) return String();
    std::string text;
    for (const auto& [name, kernel] : kernels_) {
      const std::vector<uint32_t>& words = kernel->spec().spirv;
      const Bytes code(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(uint32_t));
      text += "; " + name + "\n" + std::string((*disassemble)(code).cast<String>()) + "\n";
    }
    return text;
  }

  void AddNeeds(Needs* needs) const {
    for (const auto& [name, kernel] : kernels_) needs->Add(kernel->spec());
  }

  /// Checks all kernels at the module's first use on a device, so that a missing feature shows before any work.
  void RequireDevice(const Device& device) {
    std::atomic<bool>& checked = checked_.at(device.index());
    if (checked.load(std::memory_order_acquire)) return;
    for (const auto& [name, kernel] : kernels_) {
      Needs needs;
      needs.Add(kernel->spec());
      Require(needs, device.physical(), device.index(), "kernel " + name);
    }
    checked.store(true, std::memory_order_release);
  }

 private:
  const Bytes blob_;
  std::map<std::string, std::unique_ptr<Kernel>> kernels_;
  std::array<std::atomic<bool>, kMaxDevices> checked_{};
};

void AddNeeds(const tvm::ffi::Module& module, Needs* needs) {
  // Only this library makes modules of this kind: it registers nothing in a TVM that has its own.
  if (std::string(module->kind()) == kKind) static_cast<const VulkanModule*>(module.operator->())->AddNeeds(needs);
  for (const tvm::ffi::Any& imported : module->imports()) AddNeeds(imported.cast<tvm::ffi::Module>(), needs);
}

}  // namespace

tvm::ffi::Module CreateModule(const Bytes& blob) {
  return tvm::ffi::Module(tvm::ffi::make_object<VulkanModule>(blob));
}

void RequireDevice(const tvm::ffi::Module& module, int device_index, const String& who) {
  const Device& device = Device::Get(device_index);
  Needs needs;
  AddNeeds(module, &needs);
  Require(needs, device.physical(), device_index, who);
}

}  // namespace tvm_attn::vulkan
