// The names under which TVM and tvm_attn.vulkan find the runtime.
//
// Names that TVM registers when it was built with Vulkan are left alone if they exist: then TVM's own device interface
// and modules are used, and this library only provides tvm_attn.vulkan.*.
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>

#include <cstdint>
#include <string>

#include "device.h"
#include "device_api.h"
#include "error.h"
#include "instance.h"
#include "module.h"
#include "physical_device.h"
#include "timer.h"

namespace tvm_attn::vulkan {
namespace {

namespace json = tvm::ffi::json;
using tvm::ffi::Any;
using tvm::ffi::Bytes;
using tvm::ffi::Function;
using tvm::ffi::Module;
using tvm::ffi::String;

template <typename Callable>
void DefineUnlessPresent(const char* name, Callable callable) {
  if (!Function::GetGlobal(name).has_value()) tvm::ffi::reflection::GlobalDef().def(name, callable);
}

/// JSON: every device the driver reports, with TVM's index for it, or null.
String Devices() {
  json::Array list;
  std::vector<PhysicalDevice> all = EnumerateDevices();
  for (const PhysicalDevice& device : all) {
    json::Object info = device.ToJson();
    info.Set(String("index"), Any(nullptr));
    if (device.missing.empty()) {
      const std::vector<PhysicalDevice>& usable = UsableDevices();
      for (size_t i = 0; i < usable.size(); ++i) {
        if (usable[i].handle == device.handle) info.Set(String("index"), static_cast<int64_t>(i));
      }
    }
    list.push_back(info);
  }
  return json::Stringify(list);
}

/// JSON: bytes and counts; see MemoryStats and Stream::Counters. The number of validation messages is the process's.
String Statistics(int index) {
  Device& device = Device::Get(index);
  const MemoryStats memory = device.memory_stats();
  const Stream::Counters stream = device.stream_counters();
  json::Object stats;
  const std::pair<const char*, uint64_t> entries[] = {
      {"allocated_bytes", memory.allocated_bytes},
      {"allocated_peak_bytes", memory.allocated_peak_bytes},
      {"allocations", memory.allocations},
      {"reserved_bytes", memory.reserved_bytes},
      {"blocks", memory.blocks},
      {"operations", stream.operations},
      {"submissions", stream.submissions},
      {"barriers", stream.barriers},
      {"validation_messages", static_cast<uint64_t>(GetValidationReport().count)},
  };
  for (const auto& [name, value] : entries) stats.Set(String(name), static_cast<int64_t>(value));
  return json::Stringify(stats);
}

/// JSON: {"enabled", "count", "messages"} of the validation layer.
String Validation() {
  const ValidationReport report = GetValidationReport();
  json::Array messages;
  for (const std::string& message : report.messages) messages.push_back(String(message));
  json::Object object;
  object.Set(String("enabled"), report.enabled);
  object.Set(String("count"), report.count);
  object.Set(String("messages"), messages);
  return json::Stringify(object);
}

/// Finishes all work and saves the pipeline caches; the Python side calls this when the process ends.
void Flush() {
  for (Device* device : Device::Opened()) {
    try {
      device->Flush();
    } catch (const tvm::ffi::Error&) {
      // The device was lost, which was reported when it happened.
    }
  }
}

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef()
      .def("tvm_attn.vulkan.create_module", CreateModule)
      .def("tvm_attn.vulkan.require_device", RequireDevice)
      .def("tvm_attn.vulkan.devices", Devices)
      .def("tvm_attn.vulkan.statistics", Statistics)
      .def("tvm_attn.vulkan.validation", Validation)
      .def("tvm_attn.vulkan.flush", Flush);
  if (Function::GetGlobal("device_api.vulkan").has_value()) return;
  DefineUnlessPresent("device_api.vulkan", []() -> void* {
    return static_cast<tvm::runtime::DeviceAPI*>(VulkanDeviceApi::Global());
  });
  DefineUnlessPresent("device_api.vulkan.get_target_property", [](tvm::Device dev, const String& property) {
    Any value;
    VulkanDeviceApi::Global()->GetTargetProperty(dev, property, &value);
    return value;
  });
  DefineUnlessPresent("ffi.Module.load_from_bytes.vulkan", CreateModule);
  DefineUnlessPresent("runtime.timer.vulkan", [](tvm::Device dev) { return MakeTimer(&Device::Get(dev.device_id)); });
}

}  // namespace
}  // namespace tvm_attn::vulkan
