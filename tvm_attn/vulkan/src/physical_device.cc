#include "physical_device.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "error.h"
#include "instance.h"
#include "text.h"

namespace tvm_attn::vulkan {
namespace {

namespace json = tvm::ffi::json;
using tvm::ffi::String;

std::vector<std::string> DeviceExtensions(VkPhysicalDevice device) {
  const InstanceFunctions& vk = Instance::Get().vk;
  uint32_t count = 0;
  Check(vk.vkEnumerateDeviceExtensionProperties(device, nullptr, &count, nullptr),
        "vkEnumerateDeviceExtensionProperties");
  std::vector<VkExtensionProperties> properties(count);
  Check(vk.vkEnumerateDeviceExtensionProperties(device, nullptr, &count, properties.data()),
        "vkEnumerateDeviceExtensionProperties");
  std::vector<std::string> names;
  for (uint32_t i = 0; i < count; ++i) names.emplace_back(properties[i].extensionName);
  return names;
}

void QueryProperties(PhysicalDevice* device) {
  device->properties11.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_1_PROPERTIES;
  device->properties12.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_PROPERTIES;
  device->properties13.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_3_PROPERTIES;
  VkPhysicalDeviceProperties2 properties{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2};
  Instance::Get().vk.vkGetPhysicalDeviceProperties2(device->handle, &properties);
  device->properties = properties.properties;
  if (device->properties.apiVersion < VK_API_VERSION_1_3) return;  // it does not know the structures of 1.3
  properties.pNext = &device->properties11;
  device->properties11.pNext = &device->properties12;
  device->properties12.pNext = &device->properties13;
  Instance::Get().vk.vkGetPhysicalDeviceProperties2(device->handle, &properties);
  device->properties11.pNext = device->properties12.pNext = nullptr;
}

void QueryFeatures(PhysicalDevice* device) {
  const std::vector<std::string> extensions = DeviceExtensions(device->handle);
  auto has = [&](const char* name) { return std::find(extensions.begin(), extensions.end(), name) != extensions.end(); };
  device->has_memory_budget = has(VK_EXT_MEMORY_BUDGET_EXTENSION_NAME);

  device->features11.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_1_FEATURES;
  device->features12.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES;
  device->features13.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_3_FEATURES;
  device->atomic_float.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_ATOMIC_FLOAT_FEATURES_EXT;
  device->cooperative_matrix.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_COOPERATIVE_MATRIX_FEATURES_KHR;
  VkPhysicalDeviceFeatures2 features{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2};
  features.pNext = &device->features11;
  device->features11.pNext = &device->features12;
  device->features12.pNext = &device->features13;
  void** tail = &device->features13.pNext;
  if (has(VK_EXT_SHADER_ATOMIC_FLOAT_EXTENSION_NAME)) {
    *tail = &device->atomic_float;
    tail = &device->atomic_float.pNext;
  }
  if (has(VK_KHR_COOPERATIVE_MATRIX_EXTENSION_NAME)) *tail = &device->cooperative_matrix;
  Instance::Get().vk.vkGetPhysicalDeviceFeatures2(device->handle, &features);
  device->features = features.features;
  device->features11.pNext = device->features12.pNext = device->features13.pNext = nullptr;
  device->atomic_float.pNext = nullptr;
}

void QueryKernelFeatures(PhysicalDevice* device) {
  const VkSubgroupFeatureFlags operations = device->properties11.subgroupSupportedOperations;
  const bool subgroups = device->properties11.subgroupSupportedStages & VK_SHADER_STAGE_COMPUTE_BIT;
  const VkPhysicalDeviceVulkan12Features& f12 = device->features12;
  device->kernel_features = {
      {"float16", f12.shaderFloat16},
      {"float64", device->features.shaderFloat64},
      {"int64", device->features.shaderInt64},
      {"int16", device->features.shaderInt16},
      {"int8", f12.shaderInt8},
      {"storage16", device->features11.storageBuffer16BitAccess},
      {"storage8", f12.storageBuffer8BitAccess},
      {"subgroup_ballot", subgroups && (operations & VK_SUBGROUP_FEATURE_BALLOT_BIT)},
      {"subgroup_shuffle", subgroups && (operations & VK_SUBGROUP_FEATURE_SHUFFLE_BIT)},
      {"subgroup_arithmetic", subgroups && (operations & VK_SUBGROUP_FEATURE_ARITHMETIC_BIT)},
      {"buffer_float32_atomic_add", device->atomic_float.shaderBufferFloat32AtomicAdd},
      {"cooperative_matrix", device->cooperative_matrix.cooperativeMatrix},
      {"vulkan_memory_model", f12.vulkanMemoryModel},
  };
}

void QueryMatrices(PhysicalDevice* device) {
  if (!device->cooperative_matrix.cooperativeMatrix) return;
  const Instance& instance = Instance::Get();
  auto query = reinterpret_cast<PFN_vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR>(
      instance.global.vkGetInstanceProcAddr(instance.handle, "vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR"));
  uint32_t count = 0;
  if (query == nullptr || query(device->handle, &count, nullptr) != VK_SUCCESS) return;
  VkCooperativeMatrixPropertiesKHR empty{};
  empty.sType = VK_STRUCTURE_TYPE_COOPERATIVE_MATRIX_PROPERTIES_KHR;
  std::vector<VkCooperativeMatrixPropertiesKHR> found(count, empty);
  if (query(device->handle, &count, found.data()) != VK_SUCCESS) return;
  for (uint32_t i = 0; i < count; ++i) {
    if (found[i].scope == VK_SCOPE_SUBGROUP_KHR) device->matrices.push_back(found[i]);
  }
}

void QueryQueues(PhysicalDevice* device) {
  const InstanceFunctions& vk = Instance::Get().vk;
  uint32_t count = 0;
  vk.vkGetPhysicalDeviceQueueFamilyProperties2(device->handle, &count, nullptr);
  std::vector<VkQueueFamilyProperties2> families(count, {VK_STRUCTURE_TYPE_QUEUE_FAMILY_PROPERTIES_2, nullptr, {}});
  vk.vkGetPhysicalDeviceQueueFamilyProperties2(device->handle, &count, families.data());
  // A compute-only family, if there is one: it does not wait for the display's work.
  bool found = false;
  for (uint32_t i = 0; i < count; ++i) {
    const VkQueueFamilyProperties& family = families[i].queueFamilyProperties;
    if (!(family.queueFlags & VK_QUEUE_COMPUTE_BIT)) continue;
    const bool compute_only = !(family.queueFlags & VK_QUEUE_GRAPHICS_BIT);
    if (found && !compute_only) continue;
    found = true;
    device->queue_family = i;
    device->timestamp_bits = family.timestampValidBits;
    if (compute_only) break;
  }
  if (!found) device->missing.emplace_back("a compute queue");
}

void RequireFeatures(PhysicalDevice* device) {
  const VkPhysicalDeviceVulkan12Features& f12 = device->features12;
  const VkPhysicalDeviceVulkan13Features& f13 = device->features13;
  const std::pair<VkBool32, const char*> needs[] = {
      {f12.bufferDeviceAddress, "bufferDeviceAddress"}, {f12.timelineSemaphore, "timelineSemaphore"},
      {f12.hostQueryReset, "hostQueryReset"},           {f13.synchronization2, "synchronization2"},
      {f13.maintenance4, "maintenance4"},
  };
  for (const auto& [present, name] : needs) {
    if (!present) device->missing.emplace_back(name);
  }
}

PhysicalDevice Query(VkPhysicalDevice handle) {
  PhysicalDevice device;
  device.handle = handle;
  QueryProperties(&device);
  if (device.properties.apiVersion < VK_API_VERSION_1_3) {
    device.missing.emplace_back("Vulkan 1.3");
    return device;
  }
  QueryFeatures(&device);
  QueryKernelFeatures(&device);
  QueryMatrices(&device);
  VkPhysicalDeviceMemoryProperties2 memory{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2};
  Instance::Get().vk.vkGetPhysicalDeviceMemoryProperties2(handle, &memory);
  device.memory = memory.memoryProperties;
  QueryQueues(&device);
  RequireFeatures(&device);
  return device;
}

int Rank(const PhysicalDevice& device) {
  switch (device.properties.deviceType) {
    case VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU:
      return 0;
    case VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU:
      return 1;
    case VK_PHYSICAL_DEVICE_TYPE_VIRTUAL_GPU:
      return 2;
    case VK_PHYSICAL_DEVICE_TYPE_CPU:
      return 3;
    default:
      return 4;
  }
}

const char* TypeName(VkPhysicalDeviceType type) {
  switch (type) {
    case VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU:
      return "discrete";
    case VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU:
      return "integrated";
    case VK_PHYSICAL_DEVICE_TYPE_VIRTUAL_GPU:
      return "virtual";
    case VK_PHYSICAL_DEVICE_TYPE_CPU:
      return "cpu";
    default:
      return "other";
  }
}

std::string VersionName(uint32_t version) {
  std::ostringstream out;
  out << VK_API_VERSION_MAJOR(version) << "." << VK_API_VERSION_MINOR(version) << "." << VK_API_VERSION_PATCH(version);
  return out.str();
}

std::string Lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
  return text;
}

bool IsIndex(const std::string& text) {
  return !text.empty() && text.size() < 5 &&
         std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c); });
}

/// The devices that `choice` lists, in its order.
std::vector<PhysicalDevice> Choose(const std::vector<PhysicalDevice>& devices, const std::string& choice) {
  std::vector<PhysicalDevice> chosen;
  std::istringstream entries(choice);
  for (std::string entry; std::getline(entries, entry, ',');) {
    const bool by_index = IsIndex(entry);
    bool found = false;
    for (size_t i = 0; i < devices.size(); ++i) {
      const bool named = !by_index && !entry.empty() &&
                         Lower(devices[i].properties.deviceName).find(Lower(entry)) != std::string::npos;
      if (!named && !(by_index && std::stoul(entry) == i)) continue;
      chosen.push_back(devices[i]);
      found = true;
    }
    if (found) continue;
    std::ostringstream names;
    for (size_t i = 0; i < devices.size(); ++i) names << (i ? ", " : "") << i << " " << devices[i].properties.deviceName;
    TVM_FFI_THROW(DeviceError) << "TVM_ATTN_VULKAN_DEVICE: no device \"" << entry << "\"; there are " << names.str();
  }
  return chosen;
}

std::vector<PhysicalDevice> SelectDevices() {
  std::vector<PhysicalDevice> usable;
  std::ostringstream refused;
  for (PhysicalDevice& device : EnumerateDevices()) {
    if (device.missing.empty()) {
      usable.push_back(std::move(device));
    } else {
      refused << "; " << device.properties.deviceName << " lacks " << device.missing.front();
    }
  }
  if (usable.empty()) {
    TVM_FFI_THROW(DeviceError) << "no usable Vulkan device: install the GPU's Vulkan driver or mesa-vulkan-drivers"
                               << refused.str();
  }
  std::stable_sort(usable.begin(), usable.end(),
                   [](const PhysicalDevice& a, const PhysicalDevice& b) { return Rank(a) < Rank(b); });
  const char* choice = std::getenv("TVM_ATTN_VULKAN_DEVICE");
  return choice == nullptr || *choice == '\0' ? usable : Choose(usable, choice);
}

json::Value Int(uint64_t value) { return static_cast<int64_t>(std::min<uint64_t>(value, INT64_MAX)); }

json::Array Ints(const uint32_t* values, size_t count) {
  json::Array array;
  for (size_t i = 0; i < count; ++i) array.push_back(Int(values[i]));
  return array;
}

const char* ComponentName(VkComponentTypeKHR type) {
  switch (static_cast<int>(type)) {
    case VK_COMPONENT_TYPE_FLOAT16_KHR:
      return "float16";
    case VK_COMPONENT_TYPE_FLOAT32_KHR:
      return "float32";
    case VK_COMPONENT_TYPE_FLOAT64_KHR:
      return "float64";
    case VK_COMPONENT_TYPE_SINT8_KHR:
      return "int8";
    case VK_COMPONENT_TYPE_SINT32_KHR:
      return "int32";
    case VK_COMPONENT_TYPE_UINT8_KHR:
      return "uint8";
    case VK_COMPONENT_TYPE_UINT32_KHR:
      return "uint32";
    default:
      return "other";
  }
}

json::Array Matrices(const std::vector<VkCooperativeMatrixPropertiesKHR>& matrices) {
  json::Array array;
  for (const VkCooperativeMatrixPropertiesKHR& matrix : matrices) {
    json::Object entry;
    entry.Set(String("m"), Int(matrix.MSize));
    entry.Set(String("n"), Int(matrix.NSize));
    entry.Set(String("k"), Int(matrix.KSize));
    entry.Set(String("a"), String(ComponentName(matrix.AType)));
    entry.Set(String("b"), String(ComponentName(matrix.BType)));
    entry.Set(String("c"), String(ComponentName(matrix.CType)));
    entry.Set(String("result"), String(ComponentName(matrix.ResultType)));
    array.push_back(entry);
  }
  return array;
}

}  // namespace

uint32_t PhysicalDevice::MemoryType(uint32_t allowed, VkMemoryPropertyFlags required,
                                    VkMemoryPropertyFlags preferred) const {
  for (VkMemoryPropertyFlags wanted : {required | preferred, required}) {
    for (uint32_t i = 0; i < memory.memoryTypeCount; ++i) {
      const bool has_all = (memory.memoryTypes[i].propertyFlags & wanted) == wanted;
      if (has_all && (allowed >> i & 1)) return i;
    }
  }
  // The specification guarantees a device-local type and a host-visible coherent one.
  TVM_FFI_THROW(DeviceError) << properties.deviceName << " has no memory type with flags " << required
                             << ": update the driver";
}

uint32_t PhysicalDevice::DeviceHeap() const {
  return memory.memoryTypes[MemoryType(UINT32_MAX, VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT, 0)].heapIndex;
}

bool PhysicalDevice::HasSubgroupSizes() const {
  return features13.subgroupSizeControl && (properties13.requiredSubgroupSizeStages & VK_SHADER_STAGE_COMPUTE_BIT);
}

uint32_t PhysicalDevice::SmallestSubgroup() const {
  return HasSubgroupSizes() ? properties13.minSubgroupSize : properties11.subgroupSize;
}

uint32_t PhysicalDevice::LargestSubgroup() const {
  return HasSubgroupSizes() ? properties13.maxSubgroupSize : properties11.subgroupSize;
}

VkDeviceSize PhysicalDevice::HeapSize() const { return memory.memoryHeaps[DeviceHeap()].size; }

VkDeviceSize PhysicalDevice::AvailableMemory() const {
  if (!has_memory_budget) return HeapSize();
  VkPhysicalDeviceMemoryBudgetPropertiesEXT budget{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT};
  VkPhysicalDeviceMemoryProperties2 query{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2};
  query.pNext = &budget;
  Instance::Get().vk.vkGetPhysicalDeviceMemoryProperties2(handle, &query);
  const uint32_t heap = DeviceHeap();
  return budget.heapBudget[heap] - std::min(budget.heapBudget[heap], budget.heapUsage[heap]);
}

json::Object PhysicalDevice::ToJson() const {
  json::Object info;
  info.Set(String("name"), String(properties.deviceName));
  info.Set(String("type"), String(TypeName(properties.deviceType)));
  info.Set(String("api_version"), String(VersionName(properties.apiVersion)));
  json::Array lacking;
  for (const std::string& name : missing) lacking.push_back(String(name));
  info.Set(String("missing"), lacking);
  if (properties.apiVersion < VK_API_VERSION_1_3) return info;  // nothing else was queried

  info.Set(String("driver"), String(properties12.driverName));
  info.Set(String("driver_info"), String(properties12.driverInfo));
  info.Set(String("device_uuid"), String(Hex(properties11.deviceUUID, VK_UUID_SIZE)));
  json::Object flags;
  for (const auto& [name, present] : kernel_features) flags.Set(String(name), present);
  info.Set(String("features"), flags);

  const VkPhysicalDeviceLimits& l = properties.limits;
  json::Object limits;
  limits.Set(String("max_workgroup_count"), Ints(l.maxComputeWorkGroupCount, 3));
  limits.Set(String("max_workgroup_size"), Ints(l.maxComputeWorkGroupSize, 3));
  limits.Set(String("max_workgroup_invocations"), Int(l.maxComputeWorkGroupInvocations));
  limits.Set(String("max_shared_memory_bytes"), Int(l.maxComputeSharedMemorySize));
  limits.Set(String("max_push_constant_bytes"), Int(l.maxPushConstantsSize));
  limits.Set(String("max_allocation_bytes"), Int(properties11.maxMemoryAllocationSize));
  limits.Set(String("max_buffer_bytes"), Int(properties13.maxBufferSize));
  limits.Set(String("subgroup_size"), Int(properties11.subgroupSize));
  limits.Set(String("min_subgroup_size"), Int(SmallestSubgroup()));
  limits.Set(String("max_subgroup_size"), Int(LargestSubgroup()));
  limits.Set(String("cooperative_matrices"), Matrices(matrices));
  limits.Set(String("timestamp_period_ns"), static_cast<double>(l.timestampPeriod));
  limits.Set(String("memory_bytes"), Int(HeapSize()));
  info.Set(String("limits"), limits);
  return info;
}

std::vector<PhysicalDevice> EnumerateDevices() {
  const Instance& instance = Instance::Get();
  uint32_t count = 0;
  Check(instance.vk.vkEnumeratePhysicalDevices(instance.handle, &count, nullptr), "vkEnumeratePhysicalDevices");
  std::vector<VkPhysicalDevice> handles(count);
  Check(instance.vk.vkEnumeratePhysicalDevices(instance.handle, &count, handles.data()),
        "vkEnumeratePhysicalDevices");
  std::vector<PhysicalDevice> devices;
  for (uint32_t i = 0; i < count; ++i) devices.push_back(Query(handles[i]));
  return devices;
}

const std::vector<PhysicalDevice>& UsableDevices() {
  static const auto* devices = new std::vector<PhysicalDevice>(SelectDevices());
  return *devices;
}

}  // namespace tvm_attn::vulkan
