// A CUDA device made of the host's memory.
#include <sys/mman.h>
#include <tvm/ffi/function.h>
#include <tvm/runtime/device_api.h>

#include <cstring>
#include <map>
#include <mutex>

#include "capture.h"

extern "C" {
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* address, size_t size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}

namespace emulation {
namespace {

using tvm::ffi::Any;
using tvm::ffi::Function;
using tvm::ffi::String;

class Memory {
 public:
  /// Filled with 0xFF. Apart from alignment, it ends where an inaccessible region begins.
  void* Allocate(size_t bytes) {
    const size_t used = (bytes + kPage - 1) / kPage * kPage;
    void* region = mmap(nullptr, used + 2 * kGuard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char* pages = static_cast<char*>(region) + kGuard;
    if (region == MAP_FAILED || (used != 0 && mprotect(pages, used, PROT_READ | PROT_WRITE) != 0)) {
      TVM_FFI_THROW(RuntimeError) << "no memory for " << bytes << " bytes";
    }
    char* data = pages + (used - bytes) / kAlignment * kAlignment;
    memset(data, 0xFF, bytes);
    if (__asan_poison_memory_region) {
      __asan_poison_memory_region(pages, static_cast<size_t>(data - pages));
      __asan_poison_memory_region(data + bytes, static_cast<size_t>(pages + used - data) - bytes);
    }
    const std::lock_guard lock(mutex_);
    blocks_[data] = {region, used + 2 * kGuard, pages, used};
    return data;
  }

  void Free(void* data) {
    const std::lock_guard lock(mutex_);
    const auto found = blocks_.find(data);
    if (found == blocks_.end()) return;
    const Block& block = found->second;
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(block.pages, block.used);
    munmap(block.region, block.size);
    blocks_.erase(found);
  }

 private:
  static constexpr size_t kPage = 4096, kGuard = 16 << 20, kAlignment = 256;
  struct Block {
    void* region;
    size_t size;
    char* pages;
    size_t used;
  };
  std::mutex mutex_;
  std::map<void*, Block> blocks_;
};

class EmulatedDeviceApi final : public tvm::runtime::DeviceAPI {
 public:
  static EmulatedDeviceApi* Global() {
    static auto* api = new EmulatedDeviceApi();
    return api;
  }
  void SetDevice(tvm::Device) final {}
  void GetAttr(tvm::Device dev, tvm::runtime::DeviceAttrKind kind, Any* rv) final {
    switch (kind) {
      case tvm::runtime::kExist:
        *rv = static_cast<int>(dev.device_id == 0);
        break;
      case tvm::runtime::kMaxThreadsPerBlock:
        *rv = 1024;
        break;
      case tvm::runtime::kWarpSize:
        *rv = 32;
        break;
      case tvm::runtime::kMaxSharedMemoryPerBlock:
        *rv = 48 << 10;
        break;
      case tvm::runtime::kComputeVersion:
        *rv = String("8.0");
        break;
      case tvm::runtime::kDeviceName:
        *rv = String("emulation");
        break;
      case tvm::runtime::kMultiProcessorCount:
        *rv = 2;
        break;
      case tvm::runtime::kTotalGlobalMemory:
      case tvm::runtime::kAvailableGlobalMemory:
        *rv = int64_t{4} << 30;
        break;
      default:
        *rv = nullptr;
    }
  }
  void* AllocDataSpace(tvm::Device, size_t nbytes, size_t, DLDataType) final {
    RequireNoCapture("memory is allocated");
    return memory_.Allocate(nbytes);
  }
  void FreeDataSpace(tvm::Device, void* pointer) final {
    // Recorded work still uses it; the process ends soon after.
    if (!IsRecording()) memory_.Free(pointer);
  }
  void* AllocWorkspace(tvm::Device dev, size_t nbytes, DLDataType type) final {
    return AllocDataSpace(dev, nbytes, 0, type);
  }
  void FreeWorkspace(tvm::Device dev, void* pointer) final { FreeDataSpace(dev, pointer); }
  void StreamSync(tvm::Device, TVMStreamHandle) final { RequireNoCapture("a stream is waited for"); }

 protected:
  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset, size_t bytes,
                      tvm::Device dev_from, tvm::Device dev_to, DLDataType, TVMStreamHandle) final {
    if (dev_from.device_type == kDLCPU || dev_to.device_type == kDLCPU) RequireNoCapture("the host copies");
    Submit([target = static_cast<char*>(to) + to_offset, source = static_cast<const char*>(from) + from_offset, bytes] {
      memcpy(target, source, bytes);
    });
  }

 private:
  static void RequireNoCapture(const char* what) {
    if (IsCapturing()) TVM_FFI_THROW(EmulationError) << what << " while a graph is captured";
  }

  Memory memory_;
};

TVM_FFI_STATIC_INIT_BLOCK() {
  // A process that loads this library wants this device, even if TVM has one of its own.
  Function::SetGlobal("device_api.cuda", Function::FromPacked([](tvm::ffi::PackedArgs, Any* rv) {
                        *rv = static_cast<void*>(EmulatedDeviceApi::Global());
                      }),
                      true);
}

}  // namespace
}  // namespace emulation
