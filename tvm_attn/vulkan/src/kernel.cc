#include "kernel.h"

#include <tvm/ffi/container/tensor.h>

#include <algorithm>
#include <cstring>

#include "error.h"

namespace tvm_attn::vulkan {
namespace {

using tvm::ffi::AnyView;
using tvm::ffi::PackedArgs;

thread_local int current_device = 0;

template <typename T>
void Put(uint8_t* block, uint32_t offset, T value) {
  std::memcpy(block + offset, &value, sizeof value);
}

/// The device address that an argument carries: an opaque pointer, as TVM's host code passes it, or a tensor.
uint64_t ToAddress(AnyView arg) {
  if (arg.type_index() == tvm::ffi::TypeIndex::kTVMFFINone) return 0;
  if (const auto pointer = arg.as<void*>()) return reinterpret_cast<uint64_t>(*pointer);
  const auto* tensor = arg.cast<DLTensor*>();
  return reinterpret_cast<uint64_t>(tensor->data) + tensor->byte_offset;
}

void PutScalar(uint8_t* block, const KernelSpec::Param& param, AnyView arg) {
  switch (param.type) {
    case ParamType::kHandle:
      break;
    case ParamType::kBool:
    case ParamType::kInt8:
    case ParamType::kInt16:
    case ParamType::kInt32:
    case ParamType::kUInt8:
    case ParamType::kUInt16:
    case ParamType::kUInt32:
      Put(block, param.offset, static_cast<uint32_t>(arg.cast<int64_t>()));
      break;
    case ParamType::kInt64:
    case ParamType::kUInt64:
      Put(block, param.offset, arg.cast<int64_t>());
      break;
    case ParamType::kFloat16:
    case ParamType::kBFloat16:
    case ParamType::kFloat32:
      Put(block, param.offset, static_cast<float>(arg.cast<double>()));
      break;
    case ParamType::kFloat64:
      Put(block, param.offset, arg.cast<double>());
      break;
  }
}

}  // namespace

int CurrentDevice() { return current_device; }
void SetCurrentDevice(int index) { current_device = index; }

Kernel::~Kernel() {
  for (Device* device : Device::Opened()) {
    Device::Session session(device);
    for (const auto& [key, pipeline] : pipelines_[device->index()]) {
      try {
        session.Retire([device, handle = pipeline] { device->vk().vkDestroyPipeline(device->handle(), handle, nullptr); });
      } catch (...) {
        // The device is lost, and so is the pipeline.
      }
    }
  }
}

Kernel::Extents Kernel::ReadExtents(PackedArgs args) const {
  Extents extents;
  uint64_t threads = 1;
  for (size_t i = 0; i < spec_.launch_params.size(); ++i) {
    const int64_t value = args[static_cast<int>(spec_.params.size() + i)].cast<int64_t>();
    const LaunchParam param = spec_.launch_params[i];
    if (value < 0 || value > UINT32_MAX) {
      TVM_FFI_THROW(ValueError) << "kernel " << spec_.name << ": launch parameter " << i << " is " << value
                                << ", outside 0 to 2^32 - 1";
    }
    const auto number = static_cast<uint32_t>(value);
    if (param == LaunchParam::kDynamicShared) {
      extents.dynamic_shared = number;
    } else if (param <= LaunchParam::kBlockZ) {
      extents.grid[static_cast<int>(param)] = number;
    } else {
      threads *= std::min<uint64_t>(number, UINT16_MAX);
    }
  }
  // The workgroup may hold the threads of all axes in one row.
  const uint32_t* size = spec_.workgroup_size;
  if (threads != uint64_t{size[0]} * size[1] * size[2]) {
    TVM_FFI_THROW(ValueError) << "kernel " << spec_.name << " was built for another workgroup size than " << threads;
  }
  return extents;
}

size_t Kernel::FillBlock(PackedArgs args, Memory* memory, uint8_t* block, Access* accesses) const {
  size_t count = 0;
  for (size_t i = 0; i < spec_.params.size(); ++i) {
    const KernelSpec::Param& param = spec_.params[i];
    const AnyView arg = args[static_cast<int>(i)];
    if (param.type != ParamType::kHandle) {
      PutScalar(block, param, arg);
      continue;
    }
    const uint64_t address = ToAddress(arg);
    Put(block, param.offset, address);
    if (address == 0 || !(param.read || param.write)) continue;
    Allocation* allocation = memory->Find(address);
    if (allocation == nullptr) {
      TVM_FFI_THROW(DeviceError) << "kernel " << spec_.name << ": argument " << i
                                 << " is no memory of the device it is launched on: copy the tensor there first";
    }
    accesses[count++] = {allocation, param.read, param.write};
  }
  for (const KernelSpec::Alias& alias : spec_.aliases) std::memcpy(block + alias.to, block + alias.from, sizeof(uint64_t));
  return count;
}

VkPipeline Kernel::Pipeline(Device* device, Device::Session* session, bool folded, uint32_t dynamic_shared) {
  auto& pipelines = pipelines_[device->index()];
  const PipelineKey key{folded, dynamic_shared};
  const auto found = pipelines.find(key);
  if (found != pipelines.end()) return found->second;
  const VkPipeline pipeline = session->pipelines().Create(spec_, folded, dynamic_shared);
  pipelines.emplace(key, pipeline);
  return pipeline;
}

void Kernel::Launch(Device* device, PackedArgs args) {
  const size_t expected = spec_.params.size() + spec_.launch_params.size();
  if (static_cast<size_t>(args.size()) != expected) {
    TVM_FFI_THROW(TypeError) << "kernel " << spec_.name << " takes " << expected << " arguments, not " << args.size();
  }
  Extents extents = ReadExtents(args);
  uint32_t* grid = extents.grid;
  const uint64_t total = uint64_t{grid[0]} * grid[1] * grid[2];
  if (total == 0) return;

  // Filled only as far as it is used.
  alignas(8) uint8_t block[kMaxBlock];
  std::memset(block, 0, spec_.block_size);
  std::memcpy(block + spec_.extents_offset, grid, 3 * sizeof(uint32_t));

  const uint32_t* limits = device->physical().properties.limits.maxComputeWorkGroupCount;
  const bool folded = grid[0] > limits[0] || grid[1] > limits[1] || grid[2] > limits[2];
  if (folded) {
    const uint64_t rows = (total + limits[0] - 1) / limits[0];
    if (rows > limits[1] || total > UINT32_MAX) {
      TVM_FFI_THROW(DeviceError) << "kernel " << spec_.name << " was launched with " << total << " workgroups, more than "
                                 << device->physical().properties.deviceName << " takes: split the work";
    }
    grid[0] = static_cast<uint32_t>(std::min<uint64_t>(total, limits[0]));
    grid[1] = static_cast<uint32_t>(rows);
    grid[2] = 1;
  }

  Device::Session session(device);
  Access accesses[kMaxBlock / sizeof(uint64_t)];
  const size_t count = FillBlock(args, &session.memory(), block, accesses);
  const VkPipeline pipeline = Pipeline(device, &session, folded, extents.dynamic_shared);
  uint32_t push_size = spec_.block_size;
  if (push_size > kMaxPushConstantBlock) {
    const Slice slice = session.upload().Reserve(spec_.block_size);
    std::memcpy(slice.data, block, spec_.block_size);
    Put(block, 0, slice.address);
    push_size = sizeof slice.address;
  }
  Stream& stream = session.stream();
  const DeviceFunctions& vk = device->vk();
  const VkCommandBuffer commands = stream.Record(accesses, count);
  stream.BindPipeline(commands, pipeline);
  vk.vkCmdPushConstants(commands, session.pipelines().layout(), VK_SHADER_STAGE_COMPUTE_BIT, 0, push_size, block);
  vk.vkCmdDispatch(commands, grid[0], grid[1], grid[2]);
  stream.Finish();
}

}  // namespace tvm_attn::vulkan
