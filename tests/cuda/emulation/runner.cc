// Runs a function of a library that was exported for CUDA: runner LIBRARY KERNELS REVERSED FUNCTION ARGUMENTS RESULTS
// TWICE.
//
// KERNELS is the library of the emulated kernels, REVERSED the one for the second run. ARGUMENTS holds a line
// "code bits dimensions..." for each tensor, an empty line and the data of all tensors; RESULTS gets the data. The
// function runs twice, the second time with blocks and threads in reverse order: results that differ depend on an order
// that the program does not guarantee. If TWICE is 1, two calls on tensors of their own then run at the same time.
#include <dlfcn.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>

#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace {

using tvm::ffi::Any;
using tvm::ffi::AnyView;
using tvm::ffi::Function;
using tvm::ffi::String;
using tvm::runtime::DeviceAPI;

constexpr int kError = 3;  // an EmulationError; its message is on stderr

struct Argument {
  std::vector<int64_t> shape, strides;
  DLDataType type;
  std::vector<char> data;
};

std::vector<Argument> Read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<Argument> arguments;
  for (std::string line; std::getline(file, line) && !line.empty();) {
    std::istringstream fields(line);
    int code, bits;
    fields >> code >> bits;
    Argument argument;
    argument.type = {static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
    size_t bytes = bits / 8;
    for (int64_t extent; fields >> extent; bytes *= extent) argument.shape.push_back(extent);
    argument.data.resize(bytes);
    argument.strides.assign(argument.shape.size(), 1);
    for (size_t i = argument.shape.size(); i-- > 1;) argument.strides[i - 1] = argument.strides[i] * argument.shape[i];
    arguments.push_back(argument);
  }
  for (Argument& argument : arguments)
    file.read(argument.data.data(), static_cast<std::streamsize>(argument.data.size()));
  if (!file) throw std::runtime_error("the arguments' file is too short");
  return arguments;
}

using Results = std::vector<std::vector<char>>;

/// Calls the function `calls` times; several calls have tensors of their own and run at the same time.
std::vector<Results> Call(const std::string& library, const std::string& name, const std::vector<Argument>& arguments,
                          size_t calls = 1) {
  const tvm::ffi::Module module = tvm::ffi::Module::LoadFromFile(library);
  const auto function = module->GetFunction(name, true);
  if (!function.has_value()) throw std::runtime_error("no function " + name);
  const DLDevice device{kDLCUDA, 0};
  DeviceAPI* const api = DeviceAPI::Get(device);
  std::vector<std::vector<DLTensor>> tensors(calls);
  for (auto& of_call : tensors) {
    for (const Argument& argument : arguments) {
      DLTensor tensor{};
      tensor.data = api->AllocDataSpace(device, argument.data.size(), 64, argument.type);
      tensor.device = device;
      tensor.ndim = static_cast<int32_t>(argument.shape.size());
      tensor.dtype = argument.type;
      tensor.shape = const_cast<int64_t*>(argument.shape.data());
      tensor.strides = const_cast<int64_t*>(argument.strides.data());
      memcpy(tensor.data, argument.data.data(), argument.data.size());
      of_call.push_back(tensor);
    }
  }
  for (auto& of_call : tensors) {
    if (calls > 1) Function::GetGlobalRequired("tests.cuda.emulation.record_call")();
    std::vector<AnyView> packed;
    for (DLTensor& tensor : of_call) packed.emplace_back(&tensor);
    Any result;
    (*function).CallPacked(packed.data(), static_cast<int32_t>(packed.size()), &result);
  }
  if (calls > 1) Function::GetGlobalRequired("tests.cuda.emulation.run_together")();
  std::vector<Results> results(calls);
  for (size_t call = 0; call < calls; ++call) {
    for (size_t i = 0; i < arguments.size(); ++i) {
      const char* data = static_cast<const char*>(tensors[call][i].data);
      results[call].emplace_back(data, data + arguments[i].data.size());
      api->FreeDataSpace(device, tensors[call][i].data);
    }
  }
  return results;
}

void RequireSame(const std::vector<Argument>& arguments, const Results& results, const Results& others,
                 const std::string& why) {
  for (size_t i = 0; i < results.size(); ++i) {
    if (results[i] == others[i]) continue;
    size_t byte = 0;
    while (results[i][byte] == others[i][byte]) ++byte;
    throw std::runtime_error("argument " + std::to_string(i) + ", element " +
                             std::to_string(byte / (arguments[i].type.bits / 8)) + ": another result " + why);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 8) return 2;
  const std::string library = argv[1], name = argv[4];
  std::string kernels = argv[2];
  try {
    tvm::ffi::reflection::GlobalDef().def("tests.cuda.emulation.compile",
                                          [&](const String&) { return String(kernels); });
    const std::vector<Argument> arguments = Read(argv[5]);
    const Results results = Call(library, name, arguments).front();
    if (std::string(argv[7]) == "1") {
      for (const Results& others : Call(library, name, arguments, 2))
        RequireSame(arguments, results, others, "when two calls run at the same time: they share memory");
    }
    Function::GetGlobalRequired("tests.cuda.emulation.set_reverse")(true);
    kernels = argv[3];
    RequireSame(arguments, results, Call(library, name, arguments).front(),
                "with threads and blocks in reverse order: a barrier is missing, or blocks race");
    std::ofstream file(argv[6], std::ios::binary);
    for (const auto& result : results) file.write(result.data(), static_cast<std::streamsize>(result.size()));
    file.close();
    if (!file) throw std::runtime_error("the results cannot be written");
  } catch (const tvm::ffi::Error& error) {
    std::cerr << error.message() << '\n';
    return kError;
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return kError;
  }
  return 0;
}
