// A CUDA device made of the host's memory, and CUDA modules whose kernels run under scheduler.h. Only for processes that
// have no other CUDA device: TVM's own is refused.
#include <dlfcn.h>
#include <sys/mman.h>
#include <tvm/ffi/cast.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>

#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "scheduler.h"

extern "C" {
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* address, size_t size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}

namespace emulation {
namespace {

using tvm::ffi::Any;
using tvm::ffi::Bytes;
using tvm::ffi::Function;
using tvm::ffi::Optional;
using tvm::ffi::String;

bool reverse = false;

class Memory {
 public:
  /// Filled with 0xFF. The end is where an inaccessible region begins, but for the alignment.
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
  void* AllocDataSpace(tvm::Device, size_t nbytes, size_t, DLDataType) final { return memory_.Allocate(nbytes); }
  void FreeDataSpace(tvm::Device, void* pointer) final { memory_.Free(pointer); }
  void* AllocWorkspace(tvm::Device, size_t nbytes, DLDataType) final { return memory_.Allocate(nbytes); }
  void FreeWorkspace(tvm::Device, void* pointer) final { memory_.Free(pointer); }
  void StreamSync(tvm::Device, TVMStreamHandle) final {}

 protected:
  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset, size_t bytes, tvm::Device,
                      tvm::Device, DLDataType, TVMStreamHandle) final {
    memcpy(static_cast<char*>(to) + to_offset, static_cast<const char*>(from) + from_offset, bytes);
  }

 private:
  Memory memory_;
};

/// What a serialized CUDA module consists of, in its order.
class Reader {
 public:
  explicit Reader(const Bytes& bytes) : at_(bytes.data()), end_(at_ + bytes.size()) {}
  template <typename T>
  T Number() {
    T value;
    memcpy(&value, Take(sizeof value), sizeof value);
    return value;
  }
  std::string Text() {
    const auto size = Number<uint64_t>();
    return std::string(Take(size), size);
  }

 private:
  const char* Take(size_t size) {
    if (size > static_cast<size_t>(end_ - at_)) TVM_FFI_THROW(RuntimeError) << "malformed CUDA module";
    const char* taken = at_;
    at_ += size;
    return taken;
  }
  const char* at_;
  const char* end_;
};

struct Kernel {
  std::string name;
  std::vector<DLDataType> types;
  std::vector<std::string> launch;
  void (*entry)(void* const*) = nullptr;
  char* static_begin = nullptr;
  char* static_end = nullptr;

  void operator()(tvm::ffi::PackedArgs args) const {
    if (args.size() != static_cast<int>(types.size() + launch.size())) {
      TVM_FFI_THROW(RuntimeError) << name << ": " << args.size() << " arguments";
    }
    std::vector<uint64_t> values(types.size());
    std::vector<void*> pointers(types.size());
    for (size_t i = 0; i < types.size(); ++i) {
      pointers[i] = &values[i];
      const auto index = static_cast<int>(i);
      if (types[i].code == kDLOpaqueHandle) {
        void* pointer = args[index].cast<void*>();
        memcpy(&values[i], &pointer, sizeof pointer);
      } else if (types[i].code == kDLFloat) {
        const double value = args[index].cast<double>();
        const auto narrow = static_cast<float>(value);
        if (types[i].bits != 32 && types[i].bits != 64) TVM_FFI_THROW(RuntimeError) << name << ": a short float argument";
        memcpy(&values[i], types[i].bits == 64 ? static_cast<const void*>(&value) : &narrow, types[i].bits / 8);
      } else {
        const auto value = args[index].cast<int64_t>();
        memcpy(&values[i], &value, sizeof value);  // little endian: narrower types are its first bytes
      }
    }
    Launch what{entry, pointers.data(), {}, {}, 0, static_begin, static_end};
    for (size_t i = 0; i < launch.size(); ++i) {
      const auto value = args[static_cast<int>(types.size() + i)].cast<int64_t>();
      const auto extent = static_cast<uint32_t>(value);
      const std::string& tag = launch[i];
      if (tag == "tirx.use_dyn_shared_memory") {
        what.dynamic_shared = static_cast<size_t>(value);
      } else if (tag.rfind("blockIdx.", 0) == 0 || tag.rfind("threadIdx.", 0) == 0) {
        Index& index = tag[0] == 'b' ? what.grid : what.block;
        (tag.back() == 'x' ? index.x : tag.back() == 'y' ? index.y : index.z) = extent;
      }
    }
    try {
      Run(what, reverse);
    } catch (const std::exception& error) {
      TVM_FFI_THROW(EmulationError) << name << ": " << error.what();
    }
  }
};

class EmulatedModule final : public tvm::ffi::ModuleObj {
 public:
  explicit EmulatedModule(const Bytes& bytes) : bytes_(bytes) {
    Reader reader(bytes);
    reader.Text();  // the format
    const auto count = reader.Number<uint64_t>();
    for (uint64_t i = 0; i < count; ++i) {
      reader.Text();
      Kernel kernel;
      kernel.name = reader.Text();
      kernel.types.resize(reader.Number<uint64_t>());
      for (DLDataType& type : kernel.types) type = reader.Number<DLDataType>();
      kernel.launch.resize(reader.Number<uint64_t>());
      for (std::string& tag : kernel.launch) tag = reader.Text();
      const auto extra = reader.Number<uint64_t>();
      for (uint64_t j = 0; j < extra; ++j) reader.Number<int32_t>();
      kernels_.emplace(kernel.name, kernel);
    }
    source_ = reader.Text();
  }

  const char* kind() const final { return "cuda"; }
  int GetPropertyMask() const final { return tvm::ffi::Module::kBinarySerializable | tvm::ffi::Module::kRunnable; }
  Bytes SaveToBytes() const final { return bytes_; }
  String InspectSource(const String&) const final { return source_; }
  bool ImplementsFunction(const String& name) final { return kernels_.count(name) != 0; }

  Optional<Function> GetFunction(const String& name) final {
    const auto found = kernels_.find(name);
    if (found == kernels_.end()) return std::nullopt;
    Kernel& kernel = found->second;
    if (kernel.entry == nullptr) Load(&kernel);
    return Function::FromPacked([self = tvm::ffi::GetRef<tvm::ffi::Module>(this), &kernel](
                                    tvm::ffi::PackedArgs args, Any*) { kernel(args); });
  }

 private:
  void Load(Kernel* kernel) {
    if (library_ == nullptr) {
      const auto path = Function::GetGlobalRequired("tests.cuda.emulation.compile")(source_).cast<String>();
      library_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
      if (library_ == nullptr) TVM_FFI_THROW(EmulationError) << dlerror();
    }
    auto symbol = [&](const std::string& name) {
      void* address = dlsym(library_, name.c_str());
      if (address == nullptr) TVM_FFI_THROW(EmulationError) << dlerror();
      return address;
    };
    kernel->static_begin = reinterpret_cast<char* (*)()>(symbol("emulated_shared_begin"))();
    kernel->static_end = reinterpret_cast<char* (*)()>(symbol("emulated_shared_end"))();
    kernel->entry = reinterpret_cast<void (*)(void* const*)>(symbol("emulated_" + kernel->name));
  }

  const Bytes bytes_;
  std::map<std::string, Kernel> kernels_;
  std::string source_;
  void* library_ = nullptr;
};

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef()
      .def_packed("device_api.cuda",
                  [](tvm::ffi::PackedArgs, Any* rv) { *rv = static_cast<void*>(EmulatedDeviceApi::Global()); })
      .def("ffi.Module.load_from_bytes.cuda",
           [](const Bytes& bytes) { return tvm::ffi::Module(tvm::ffi::make_object<EmulatedModule>(bytes)); })
      .def("tests.cuda.emulation.set_reverse", [](bool value) { reverse = value; });
}

}  // namespace
}  // namespace emulation
