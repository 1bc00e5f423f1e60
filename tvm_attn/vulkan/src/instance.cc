#include "instance.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "error.h"

namespace tvm_attn::vulkan {
namespace {

constexpr const char* kValidationLayer = "VK_LAYER_KHRONOS_validation";
constexpr size_t kKeptMessages = 100;

std::mutex report_mutex;
ValidationReport report;

VKAPI_ATTR VkBool32 VKAPI_CALL OnValidationMessage(VkDebugUtilsMessageSeverityFlagBitsEXT,
                                                   VkDebugUtilsMessageTypeFlagsEXT,
                                                   const VkDebugUtilsMessengerCallbackDataEXT* data, void*) {
  std::lock_guard<std::mutex> lock(report_mutex);
  ++report.count;
  if (report.messages.size() < kKeptMessages) {
    report.messages.emplace_back(data->pMessage);
    std::fprintf(stderr, "Vulkan validation: %s\n", data->pMessage);
  }
  return VK_FALSE;
}

bool ValidationRequested() {
  const char* value = std::getenv("TVM_ATTN_VULKAN_VALIDATE");
  return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
}

bool LayerAvailable(const GlobalFunctions& global, const char* name) {
  uint32_t count = 0;
  Check(global.vkEnumerateInstanceLayerProperties(&count, nullptr), "vkEnumerateInstanceLayerProperties");
  std::vector<VkLayerProperties> layers(count);
  Check(global.vkEnumerateInstanceLayerProperties(&count, layers.data()), "vkEnumerateInstanceLayerProperties");
  return std::any_of(layers.begin(), layers.begin() + count,
                     [&](const VkLayerProperties& layer) { return std::strcmp(layer.layerName, name) == 0; });
}

}  // namespace

ValidationReport GetValidationReport() {
  std::lock_guard<std::mutex> lock(report_mutex);
  return report;
}

const Instance& Instance::Get() {
  // Never destroyed: tensors may be freed while the process ends, after static destructors have begun.
  static const Instance* instance = new Instance();
  return *instance;
}

void Instance::LoadLibrary() {
  void* library = nullptr;
  for (const char* name : {"libvulkan.so.1", "libvulkan.so"}) {
    library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) break;
  }
  if (library == nullptr) {
    TVM_FFI_THROW(DeviceError) << "no Vulkan loader: libvulkan.so.1 is not installed (Debian: libvulkan1, and the "
                                  "driver of the GPU or mesa-vulkan-drivers)";
  }
  global.vkGetInstanceProcAddr =
      reinterpret_cast<PFN_vkGetInstanceProcAddr>(dlsym(library, "vkGetInstanceProcAddr"));
  if (global.vkGetInstanceProcAddr == nullptr) {
    TVM_FFI_THROW(DeviceError) << "libvulkan.so.1 has no vkGetInstanceProcAddr: reinstall the Vulkan loader";
  }
#define TVM_ATTN_VK_LOAD(name) \
  global.name = reinterpret_cast<PFN_##name>(global.vkGetInstanceProcAddr(VK_NULL_HANDLE, #name));
  TVM_ATTN_VK_GLOBAL_FUNCTIONS(TVM_ATTN_VK_LOAD)
#undef TVM_ATTN_VK_LOAD
  uint32_t version = VK_API_VERSION_1_0;
  if (global.vkEnumerateInstanceVersion != nullptr) global.vkEnumerateInstanceVersion(&version);
  if (version < VK_API_VERSION_1_3) {
    TVM_FFI_THROW(DeviceError) << "the Vulkan loader is version " << VK_API_VERSION_MAJOR(version) << "."
                               << VK_API_VERSION_MINOR(version) << ": 1.3 is needed, update libvulkan";
  }
}

Instance::Instance() {
  LoadLibrary();

  VkApplicationInfo application{VK_STRUCTURE_TYPE_APPLICATION_INFO};
  application.pApplicationName = "tvm_attn";
  application.apiVersion = VK_API_VERSION_1_3;
  VkInstanceCreateInfo info{VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO};
  info.pApplicationInfo = &application;

  // The messenger in pNext covers the creation of the instance; the one created below covers the rest.
  VkDebugUtilsMessengerCreateInfoEXT messenger_info{VK_STRUCTURE_TYPE_DEBUG_UTILS_MESSENGER_CREATE_INFO_EXT};
  messenger_info.messageSeverity =
      VK_DEBUG_UTILS_MESSAGE_SEVERITY_WARNING_BIT_EXT | VK_DEBUG_UTILS_MESSAGE_SEVERITY_ERROR_BIT_EXT;
  messenger_info.messageType = VK_DEBUG_UTILS_MESSAGE_TYPE_VALIDATION_BIT_EXT;
  messenger_info.pfnUserCallback = OnValidationMessage;
  const VkValidationFeatureEnableEXT enabled[] = {VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT};
  VkValidationFeaturesEXT features{VK_STRUCTURE_TYPE_VALIDATION_FEATURES_EXT};
  features.enabledValidationFeatureCount = 1;
  features.pEnabledValidationFeatures = enabled;
  features.pNext = &messenger_info;
  const char* extensions[] = {VK_EXT_DEBUG_UTILS_EXTENSION_NAME, VK_EXT_VALIDATION_FEATURES_EXTENSION_NAME};

  const bool validate = ValidationRequested();
  if (validate) {
    if (!LayerAvailable(global, kValidationLayer)) {
      TVM_FFI_THROW(DeviceError) << "TVM_ATTN_VULKAN_VALIDATE is set and " << kValidationLayer
                                 << " is not installed (Debian: vulkan-validationlayers): install it or unset";
    }
    info.pNext = &features;
    info.enabledLayerCount = 1;
    info.ppEnabledLayerNames = &kValidationLayer;
    info.enabledExtensionCount = 2;
    info.ppEnabledExtensionNames = extensions;
  }
  const VkResult result = global.vkCreateInstance(&info, nullptr, &handle);
  if (result == VK_ERROR_INCOMPATIBLE_DRIVER) {
    TVM_FFI_THROW(DeviceError) << "the Vulkan loader found no driver: install the GPU's Vulkan driver (its ICD file "
                                  "under /usr/share/vulkan/icd.d or /etc/vulkan/icd.d), or mesa-vulkan-drivers";
  }
  Check(result, "vkCreateInstance");

#define TVM_ATTN_VK_LOAD(name) vk.name = reinterpret_cast<PFN_##name>(global.vkGetInstanceProcAddr(handle, #name));
  TVM_ATTN_VK_INSTANCE_FUNCTIONS(TVM_ATTN_VK_LOAD)
#undef TVM_ATTN_VK_LOAD

  if (validate) {
    auto create = reinterpret_cast<PFN_vkCreateDebugUtilsMessengerEXT>(
        global.vkGetInstanceProcAddr(handle, "vkCreateDebugUtilsMessengerEXT"));
    VkDebugUtilsMessengerEXT messenger = VK_NULL_HANDLE;
    Check(create(handle, &messenger_info, nullptr, &messenger), "vkCreateDebugUtilsMessengerEXT");
    std::lock_guard<std::mutex> lock(report_mutex);
    report.enabled = true;
  }
}

}  // namespace tvm_attn::vulkan
