// CUDA modules whose kernels run under scheduler.h, and graphs of their launches.
#include <dlfcn.h>
#include <tvm/ffi/cast.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "capture.h"
#include "scheduler.h"

namespace emulation {
namespace {

using tvm::ffi::Any;
using tvm::ffi::Bytes;
using tvm::ffi::Function;
using tvm::ffi::Optional;
using tvm::ffi::String;

using Graph = std::vector<std::function<void()>>;

bool reverse = false;
bool is_capturing = false;
std::map<int64_t, Graph> graphs;
std::vector<Graph> calls;              // recorded calls, which run at the same time
std::vector<Launch>* waits = nullptr;  // launches of theirs that shall run at the same time

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
    for (size_t i = 0; i < types.size(); ++i) values[i] = Value(types[i], args[static_cast<int>(i)]);
    Launch what{entry, nullptr, {}, {}, 0, static_begin, static_end};
    for (size_t i = 0; i < launch.size(); ++i) {
      const auto extent = args[static_cast<int>(types.size() + i)].cast<int64_t>();
      const std::string& tag = launch[i];
      if (tag == "tirx.use_dyn_shared_memory") {
        what.dynamic_shared = static_cast<size_t>(extent);
      } else if (tag.rfind("blockIdx.", 0) == 0 || tag.rfind("threadIdx.", 0) == 0) {
        Index& index = tag[0] == 'b' ? what.grid : what.block;
        (tag.back() == 'x' ? index.x : tag.back() == 'y' ? index.y : index.z) = static_cast<uint32_t>(extent);
      }
    }
    Submit([this, values, what, pointers = std::vector<void*>()]() mutable {
      pointers.clear();
      for (uint64_t& value : values) pointers.push_back(&value);
      what.arguments = pointers.data();
      if (waits != nullptr) {
        waits->push_back(what);
        return;
      }
      try {
        Run({what}, reverse);
      } catch (const std::exception& error) {
        TVM_FFI_THROW(EmulationError) << name << ": " << error.what();
      }
    });
  }

 private:
  /// The bytes of an argument, as the kernel reads them.
  static uint64_t Value(DLDataType type, tvm::ffi::AnyView argument) {
    uint64_t bytes = 0;
    auto store = [&](auto value) { memcpy(&bytes, &value, sizeof value); };
    if (type.code == kDLOpaqueHandle) {
      store(argument.cast<void*>());
    } else if (type.code != kDLFloat) {
      store(argument.cast<int64_t>());  // little-endian: a shorter type is its first bytes
    } else if (type.bits == 64) {
      store(argument.cast<double>());
    } else if (type.bits == 32) {
      store(static_cast<float>(argument.cast<double>()));
    } else {
      TVM_FFI_THROW(EmulationError) << "a float argument of " << static_cast<int>(type.bits) << " bits";
    }
    return bytes;
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
    return Function::FromPacked(
        [self = tvm::ffi::GetRef<tvm::ffi::Module>(this), &kernel](tvm::ffi::PackedArgs args, Any*) { kernel(args); });
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

int64_t BeginCapture() {
  if (is_capturing) TVM_FFI_THROW(EmulationError) << "a graph is captured already";
  is_capturing = true;
  const auto graph = static_cast<int64_t>(graphs.size());
  graphs[graph] = {};
  return graph;
}

void LaunchGraph(int64_t graph) {
  for (const auto& work : graphs.at(graph)) work();
}

/// Runs the recorded calls: the first piece of work of each, then the second of each, and so on.
void RunTogether() {
  const std::vector<Graph> recorded = std::exchange(calls, {});
  for (size_t i = 0; i < recorded.front().size(); ++i) {
    std::vector<Launch> launches;
    waits = &launches;
    for (const Graph& call : recorded) call.at(i)();
    waits = nullptr;
    try {
      Run(launches, reverse);
    } catch (const std::exception& error) {
      TVM_FFI_THROW(EmulationError) << "two calls at once: " << error.what();
    }
  }
}

TVM_FFI_STATIC_INIT_BLOCK() {
  auto define = [](const std::string& name, auto function) {
    Function::SetGlobal(name, Function::FromTyped(std::move(function)), true);
  };
  define("ffi.Module.load_from_bytes.cuda",
         [](const Bytes& bytes) { return tvm::ffi::Module(tvm::ffi::make_object<EmulatedModule>(bytes)); });
  define("tests.cuda.emulation.set_reverse", [](bool value) { reverse = value; });
  define("tests.cuda.emulation.record_call", [] { calls.emplace_back(); });
  define("tests.cuda.emulation.run_together", RunTogether);
  define("tests.cuda.emulation.begin_capture", BeginCapture);
  define("tests.cuda.emulation.end_capture", [] { is_capturing = false; });
  define("tests.cuda.emulation.launch_graph", LaunchGraph);
}

}  // namespace

bool IsCapturing() { return is_capturing; }
bool IsRecording() { return !calls.empty(); }

void Submit(std::function<void()> work) {
  if (is_capturing) {
    graphs.rbegin()->second.push_back(std::move(work));
  } else if (!calls.empty()) {
    calls.back().push_back(std::move(work));
  } else {
    work();
  }
}

}  // namespace emulation
