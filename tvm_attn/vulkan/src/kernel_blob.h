// The module format: the code generator's output, and the content of an exported library.
//
//   "TVMATTNV", uint32 version, uint32 bytes of JSON, JSON, SPIR-V of all kernels one after the other (little endian)
//
// {"kernels": [{"name", "params", "reads", "writes", "launch_params", "workgroup_size", "block_size", "block_offsets",
//               "aliases", "shared_bytes", "subgroup_size", "features", "offset", "size"}]}
// | key | meaning |
// | key | is |
// |---|---|
// | params | type of each argument in call order: "handle"s first, then scalars |
// | reads, writes | for each handle, whether the kernel reads or writes it |
// | launch_params | what follows the arguments in a call: thread axes, "tirx.use_dyn_shared_memory" |
// | workgroup_size | [x, y, z], also literal in the SPIR-V: the threads of each axis, or all of them in one row |
// | block_size, block_offsets | bytes of the argument block, and the offset of each argument in it |
// | aliases | positions of handles whose addresses the block holds again, in this order |
// | shared_bytes | workgroup memory, without what launch_params adds |
// | subgroup_size | the size that the kernel needs, or null |
// | features | names of PhysicalDevice::kernel_features |
// | offset, size | position and size in the SPIR-V part, in bytes |
//
// In the argument block a handle is a 64-bit device address; integers and bool below 32 bits are widened to 32, 16-bit
// floats to float32. After the last argument come the aliases, 8-aligned, then the three grid extents as uint32. A
// block of up to 128 bytes is passed as push constants; for a larger one they are the address of a buffer.
// Specialization constant 0 (bool): the grid is folded into two dimensions; 1 (uint32): bytes of dynamic shared memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tvm_attn::vulkan {

enum class ParamType { kHandle, kBool, kInt8, kInt16, kInt32, kInt64, kUInt8, kUInt16, kUInt32, kUInt64, kFloat16, kBFloat16, kFloat32, kFloat64 };

enum class LaunchParam { kBlockX, kBlockY, kBlockZ, kThreadX, kThreadY, kThreadZ, kDynamicShared };

constexpr uint32_t kMaxPushConstantBlock = 128;
constexpr uint32_t kMaxBlock = 4096;

struct KernelSpec {
  struct Param {
    ParamType type;
    uint32_t offset;
    bool read;
    bool write;
  };
  std::string name;
  std::vector<Param> params;
  /// An address that the block holds at two offsets: kernels read memory as several types through several pointers.
  struct Alias {
    uint32_t from;
    uint32_t to;
  };
  std::vector<Alias> aliases;
  std::vector<LaunchParam> launch_params;
  uint32_t workgroup_size[3];
  uint32_t block_size;
  uint32_t extents_offset;
  uint32_t shared_bytes;
  uint32_t subgroup_size;  // 0: any
  std::vector<std::string> features;
  std::vector<uint32_t> spirv;
};

/// Parses and checks a module of `size` bytes. Throws ArtifactError that says what is wrong with it.
std::vector<KernelSpec> ParseModule(const char* data, size_t size);

}  // namespace tvm_attn::vulkan
