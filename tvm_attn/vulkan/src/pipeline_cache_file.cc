#include "pipeline_cache_file.h"

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

#include "text.h"

namespace tvm_attn::vulkan {
namespace {

namespace fs = std::filesystem;

constexpr char kMagic[8] = {'T', 'V', 'M', 'A', 'T', 'T', 'N', 'C'};
// A cache only grows: beyond this it starts anew.
constexpr uint64_t kMaxBytes = uint64_t{256} << 20;

struct FileHeader {
  char magic[8];
  uint64_t size;
  uint64_t hash;
};

/// FNV-1a: drivers trust what they are handed, so a damaged file must not reach them.
uint64_t Hash(const std::vector<char>& data) {
  uint64_t hash = 14695981039346656037ULL;
  for (const char byte : data) hash = (hash ^ static_cast<uint8_t>(byte)) * 1099511628211ULL;
  return hash;
}

/// Empty where the process has neither variable.
fs::path CacheFile(const PhysicalDevice& device) {
  fs::path folder;
  const char* xdg = std::getenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  if (xdg != nullptr && *xdg == '/') {
    folder = xdg;
  } else if (home != nullptr && *home == '/') {
    folder = fs::path(home) / ".cache";
  } else {
    return {};
  }
  const std::string name = Hex(device.properties11.driverUUID, VK_UUID_SIZE) + "-" +
                           Hex(device.properties11.deviceUUID, VK_UUID_SIZE) + "-" +
                           Hex(device.properties.pipelineCacheUUID, VK_UUID_SIZE) + ".bin";
  return folder / "tvm_attn" / "vulkan" / name;
}

/// Whether Vulkan's own header of the data names this device. Drivers should check; not all do.
bool BelongsTo(const PhysicalDevice& device, const std::vector<char>& data) {
  VkPipelineCacheHeaderVersionOne header;
  if (data.size() < sizeof header) return false;
  std::memcpy(&header, data.data(), sizeof header);
  return header.headerSize >= sizeof header && header.headerVersion == VK_PIPELINE_CACHE_HEADER_VERSION_ONE &&
         header.vendorID == device.properties.vendorID && header.deviceID == device.properties.deviceID &&
         std::memcmp(header.pipelineCacheUUID, device.properties.pipelineCacheUUID, VK_UUID_SIZE) == 0;
}

}  // namespace

std::vector<char> ReadPipelineCache(const PhysicalDevice& device) {
  std::ifstream file(CacheFile(device), std::ios::binary);
  FileHeader header;
  if (!file.read(reinterpret_cast<char*>(&header), sizeof header)) return {};
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0 || header.size > kMaxBytes) return {};
  std::vector<char> data(header.size);
  if (!file.read(data.data(), static_cast<std::streamsize>(data.size()))) return {};
  if (Hash(data) != header.hash || !BelongsTo(device, data)) return {};
  return data;
}

void WritePipelineCache(const PhysicalDevice& device, const std::vector<char>& data) {
  const fs::path path = CacheFile(device);
  if (path.empty() || data.size() > kMaxBytes) return;
  std::error_code error;
  fs::create_directories(path.parent_path(), error);
  const fs::path temporary = path.string() + "." + std::to_string(getpid());
  FileHeader header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.size = data.size();
  header.hash = Hash(data);
  std::ofstream file(temporary, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(&header), sizeof header);
  file.write(data.data(), static_cast<std::streamsize>(data.size()));
  file.close();
  if (!file.fail()) fs::rename(temporary, path, error);
  if (file.fail() || error) fs::remove(temporary, error);
}

}  // namespace tvm_attn::vulkan
