#include "pipeline_cache_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <string>

#include "text.h"

namespace tvm_attn::vulkan {
namespace {

constexpr char kMagic[8] = {'T', 'V', 'M', 'A', 'T', 'T', 'N', 'C'};
// A cache only grows: beyond this size it starts afresh.
constexpr uint64_t kMaxBytes = uint64_t{256} << 20;

struct FileHeader {
  char magic[8];
  uint64_t size;
  uint64_t hash;
};

/// FNV-1a: drivers trust the data they are given, so a damaged file must not reach them.
uint64_t Hash(const std::vector<char>& data) {
  uint64_t hash = 14695981039346656037ULL;
  for (const char byte : data) hash = (hash ^ static_cast<uint8_t>(byte)) * 1099511628211ULL;
  return hash;
}

class File {
 public:
  explicit File(int descriptor) : descriptor_(descriptor) {}
  ~File() {
    if (descriptor_ >= 0) close(descriptor_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  bool is_open() const { return descriptor_ >= 0; }
  bool Stat(struct stat* info) const { return is_open() && fstat(descriptor_, info) == 0; }

  bool Read(void* target, size_t size) const {
    auto* bytes = static_cast<char*>(target);
    while (size > 0) {
      const ssize_t count = read(descriptor_, bytes, size);
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) return false;
      bytes += count;
      size -= static_cast<size_t>(count);
    }
    return true;
  }

  bool Write(const void* source, size_t size) const {
    const auto* bytes = static_cast<const char*>(source);
    while (size > 0) {
      const ssize_t count = write(descriptor_, bytes, size);
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) return false;
      bytes += count;
      size -= static_cast<size_t>(count);
    }
    return true;
  }

 private:
  const int descriptor_;
};

/// Whether only this user can have made or changed it: a driver trusts the data it is given.
bool IsOwn(const struct stat& info) { return info.st_uid == geteuid() && (info.st_mode & S_IWOTH) == 0; }

/// The cache's folder, created if `make`; empty if there is none that belongs to this user.
std::string CacheFolder(bool make) {
  const char* xdg = std::getenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  std::string folder;
  if (xdg != nullptr && *xdg == '/') {
    folder = xdg;
  } else if (home != nullptr && *home == '/') {
    folder = std::string(home) + "/.cache";
  } else {
    return {};
  }
  if (make) mkdir(folder.c_str(), 0700);
  for (const char* name : {"/tvm_attn", "/vulkan"}) {
    folder += name;
    if (make) mkdir(folder.c_str(), 0700);
    struct stat info {};
    if (stat(folder.c_str(), &info) != 0 || !S_ISDIR(info.st_mode) || !IsOwn(info)) return {};
  }
  return folder;
}

std::string FileName(const PhysicalDevice& device) {
  return Hex(device.properties11.driverUUID, VK_UUID_SIZE) + "-" + Hex(device.properties11.deviceUUID, VK_UUID_SIZE) +
         "-" + Hex(device.properties.pipelineCacheUUID, VK_UUID_SIZE) + ".bin";
}

/// Removes the temporary files of processes that ended while they were writing.
void RemoveLeftovers(const std::string& folder, const std::string& prefix) {
  constexpr time_t kHour = 3600;
  const std::unique_ptr<DIR, int (*)(DIR*)> entries(opendir(folder.c_str()), closedir);
  if (entries == nullptr) return;
  while (const dirent* entry = readdir(entries.get())) {
    const std::string path = folder + "/" + entry->d_name;
    struct stat info {};
    if (std::strncmp(entry->d_name, prefix.c_str(), prefix.size()) == 0 && lstat(path.c_str(), &info) == 0 &&
        S_ISREG(info.st_mode) && info.st_mtime < time(nullptr) - kHour) {
      unlink(path.c_str());
    }
  }
}

/// Whether Vulkan's own header of the data names this device. Drivers should check this; not all do.
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
  const std::string folder = CacheFolder(/*make=*/false);
  if (folder.empty()) return {};
  // Without O_NONBLOCK, opening a FIFO would wait for a writer.
  const File file(open((folder + "/" + FileName(device)).c_str(), O_RDONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC));
  struct stat info {};
  FileHeader header;
  if (!file.Stat(&info) || !S_ISREG(info.st_mode) || !IsOwn(info) || !file.Read(&header, sizeof header)) return {};
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0 || header.size > kMaxBytes ||
      static_cast<uint64_t>(info.st_size) != sizeof header + header.size) {
    return {};
  }
  std::vector<char> data(header.size);
  if (!file.Read(data.data(), data.size())) return {};
  if (Hash(data) != header.hash || !BelongsTo(device, data)) return {};
  return data;
}

void WritePipelineCache(const PhysicalDevice& device, const std::vector<char>& data) {
  if (data.size() > kMaxBytes) return;
  const std::string folder = CacheFolder(/*make=*/true);
  if (folder.empty()) return;
  const std::string path = folder + "/" + FileName(device);
  RemoveLeftovers(folder, FileName(device) + ".");
  FileHeader header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.size = data.size();
  header.hash = Hash(data);
  // An unpredictable name, for a file that did not exist: other processes may be writing too.
  std::string temporary = path + ".XXXXXX";
  const File file(mkostemp(temporary.data(), O_CLOEXEC));
  if (!file.is_open()) return;
  const bool written = file.Write(&header, sizeof header) && file.Write(data.data(), data.size());
  if (!written || rename(temporary.c_str(), path.c_str()) != 0) unlink(temporary.c_str());
}

}  // namespace tvm_attn::vulkan
