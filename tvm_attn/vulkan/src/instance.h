// The process's Vulkan loader and instance, created at first use, and the validation layer on request.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "vulkan_api.h"

namespace tvm_attn::vulkan {

/// Vulkan's loader library, one instance, and its functions. Lives until the process ends.
class Instance {
 public:
  /// The process's instance. Throws DeviceError, at each call, if there is no Vulkan 1.3 loader.
  static const Instance& Get();

  VkInstance handle = VK_NULL_HANDLE;
  GlobalFunctions global;
  InstanceFunctions vk;

 private:
  Instance();
  void LoadLibrary();
};

/// The validation layer's messages so far (TVM_ATTN_VULKAN_VALIDATE=1): warnings and errors.
struct ValidationReport {
  bool enabled = false;
  int64_t count = 0;
  std::vector<std::string> messages;  // the first 100
};
ValidationReport GetValidationReport();

}  // namespace tvm_attn::vulkan
