#include "kernel_blob.h"

#include <tvm/ffi/extra/json.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <sstream>
#include <utility>

#include "error.h"

namespace tvm_attn::vulkan {
namespace {

namespace json = tvm::ffi::json;
using tvm::ffi::String;

constexpr char kMagic[] = {'T', 'V', 'M', 'A', 'T', 'T', 'N', 'V'};
constexpr uint32_t kVersion = 2;
constexpr size_t kHeader = sizeof kMagic + 2 * sizeof(uint32_t);
constexpr uint32_t kSpirvMagic = 0x07230203;
constexpr size_t kSpirvHeaderWords = 5;

const std::map<std::string, ParamType> kParamTypes = {
    {"handle", ParamType::kHandle},     {"bool", ParamType::kBool},         {"int8", ParamType::kInt8},
    {"int16", ParamType::kInt16},       {"int32", ParamType::kInt32},       {"int64", ParamType::kInt64},
    {"uint8", ParamType::kUInt8},       {"uint16", ParamType::kUInt16},     {"uint32", ParamType::kUInt32},
    {"uint64", ParamType::kUInt64},     {"float16", ParamType::kFloat16},   {"bfloat16", ParamType::kBFloat16},
    {"float32", ParamType::kFloat32},   {"float64", ParamType::kFloat64},
};

const std::map<std::string, LaunchParam> kLaunchParams = {
    {"blockIdx.x", LaunchParam::kBlockX},   {"blockIdx.y", LaunchParam::kBlockY},
    {"blockIdx.z", LaunchParam::kBlockZ},   {"threadIdx.x", LaunchParam::kThreadX},
    {"threadIdx.y", LaunchParam::kThreadY}, {"threadIdx.z", LaunchParam::kThreadZ},
    {"tirx.use_dyn_shared_memory", LaunchParam::kDynamicShared},
};

/// SPIR-V's capabilities and the features that they stand for; empty for what every usable device has.
const std::map<uint32_t, std::string> kCapabilities = {
    {1, ""},     // Shader
    {5347, ""},  // PhysicalStorageBufferAddresses
    {61, ""},    // GroupNonUniform
    {9, "float16"},
    {10, "float64"},
    {11, "int64"},
    {22, "int16"},
    {39, "int8"},
    {4433, "storage16"},
    {4448, "storage8"},
    {63, "subgroup_arithmetic"},
    {64, "subgroup_ballot"},
    {65, "subgroup_shuffle"},
    {6033, "buffer_float32_atomic_add"},
    {6022, "cooperative_matrix"},
    {5345, "vulkan_memory_model"},
};

bool IsFeature(const std::string& name) {
  return !name.empty() && std::any_of(kCapabilities.begin(), kCapabilities.end(),
                                      [&](const auto& entry) { return entry.second == name; });
}

uint32_t ParamBytes(ParamType type) {
  switch (type) {
    case ParamType::kHandle:
    case ParamType::kInt64:
    case ParamType::kUInt64:
    case ParamType::kFloat64:
      return 8;
    default:
      return 4;
  }
}

[[noreturn]] void Malformed(const std::string& what) {
  TVM_FFI_THROW(ArtifactError) << "malformed Vulkan module: " << what << "; build it again with this version";
  throw;  // not reached, but the compiler does not know that TVM_FFI_THROW never returns
}

/// One kernel's JSON object; errors name the kernel.
class Fields {
 public:
  Fields(json::Object object, std::string kernel) : object_(std::move(object)), kernel_(std::move(kernel)) {}

  [[noreturn]] void Fail(const std::string& what) const { Malformed("kernel \"" + kernel_ + "\": " + what); }

  json::Value Get(const char* key) const {
    auto found = object_.find(String(key));
    if (found == object_.end()) Fail(std::string("no \"") + key + "\"");
    return (*found).second;
  }

  uint32_t Number(const char* key) const { return ToNumber(key, Get(key)); }

  std::vector<uint32_t> Numbers(const char* key) const {
    std::vector<uint32_t> numbers;
    for (const json::Value& value : Array(key)) numbers.push_back(ToNumber(key, value));
    return numbers;
  }

  std::vector<bool> Flags(const char* key) const {
    std::vector<bool> flags;
    for (const json::Value& value : Array(key)) {
      const auto flag = value.as<bool>();
      if (!flag.has_value()) Fail(std::string("\"") + key + "\" is not a list of booleans");
      flags.push_back(*flag);
    }
    return flags;
  }

  std::vector<std::string> Strings(const char* key) const {
    std::vector<std::string> strings;
    for (const json::Value& value : Array(key)) {
      const auto text = value.as<String>();
      if (!text.has_value()) Fail(std::string("\"") + key + "\" is not a list of strings");
      strings.emplace_back(*text);
    }
    return strings;
  }

 private:
  json::Array Array(const char* key) const {
    const auto array = Get(key).as<json::Array>();
    if (!array.has_value()) Fail(std::string("\"") + key + "\" is not a list");
    return *array;
  }

  uint32_t ToNumber(const char* key, const json::Value& value) const {
    const auto number = value.as<int64_t>();
    if (!number.has_value() || *number < 0 || *number > UINT32_MAX) {
      Fail(std::string("\"") + key + "\" holds something other than whole numbers from 0 to 2^32 - 1");
    }
    return static_cast<uint32_t>(*number);
  }

  json::Object object_;
  std::string kernel_;
};

void ReadParams(const Fields& fields, KernelSpec* spec) {
  const std::vector<std::string> types = fields.Strings("params");
  const std::vector<uint32_t> offsets = fields.Numbers("block_offsets");
  const std::vector<bool> reads = fields.Flags("reads");
  const std::vector<bool> writes = fields.Flags("writes");
  if (offsets.size() != types.size()) fields.Fail("\"block_offsets\" and \"params\" differ in length");
  uint32_t end = 0;
  size_t handles = 0;
  for (size_t i = 0; i < types.size(); ++i) {
    const auto type = kParamTypes.find(types[i]);
    if (type == kParamTypes.end()) fields.Fail("parameter type \"" + types[i] + "\" is unknown");
    KernelSpec::Param param{type->second, offsets[i], false, false};
    if (param.type == ParamType::kHandle) {
      if (handles != i) fields.Fail("a handle behind a scalar in \"params\"");
      if (i >= reads.size() || i >= writes.size()) fields.Fail("\"reads\" or \"writes\" is shorter than the handles");
      param.read = reads[i];
      param.write = writes[i];
      ++handles;
    }
    const uint32_t bytes = ParamBytes(param.type);
    if (param.offset % bytes != 0 || param.offset < end || param.offset > kMaxBlock) {
      fields.Fail("argument " + std::to_string(i) + " is misplaced at offset " + std::to_string(param.offset));
    }
    end = param.offset + bytes;
    spec->params.push_back(param);
  }
  if (reads.size() != handles || writes.size() != handles) {
    fields.Fail("\"reads\" or \"writes\" is longer than the handles");
  }
  for (const uint32_t alias : fields.Numbers("aliases")) {
    if (alias >= spec->params.size() || spec->params[alias].type != ParamType::kHandle) {
      fields.Fail("alias " + std::to_string(alias) + " is no handle");
    }
    const uint32_t offset = (end + 7) / 8 * 8;
    end = offset + sizeof(uint64_t);
    if (end > kMaxBlock) fields.Fail("its aliases do not fit into the block");
    spec->aliases.push_back({spec->params[alias].offset, offset});
  }
  spec->extents_offset = end;
  spec->block_size = fields.Number("block_size");
  if (spec->block_size % 8 != 0 || spec->block_size < end + 3 * sizeof(uint32_t) || spec->block_size > kMaxBlock) {
    fields.Fail("\"block_size\" of " + std::to_string(spec->block_size) + " is not a multiple of 8 that holds " +
                std::to_string(end + 12) + " bytes and is at most " + std::to_string(kMaxBlock));
  }
}

void ReadLaunch(const Fields& fields, KernelSpec* spec) {
  std::set<std::string> seen;
  for (const std::string& name : fields.Strings("launch_params")) {
    const auto param = kLaunchParams.find(name);
    if (param == kLaunchParams.end()) fields.Fail("launch parameter \"" + name + "\" is unknown");
    if (!seen.insert(name).second) fields.Fail("launch parameter \"" + name + "\" occurs twice");
    spec->launch_params.push_back(param->second);
  }
  const std::vector<uint32_t> size = fields.Numbers("workgroup_size");
  if (size.size() != 3 || std::any_of(size.begin(), size.end(), [](uint32_t n) { return n == 0 || n > 65536; })) {
    fields.Fail("\"workgroup_size\" is not three numbers from 1 to 65536");
  }
  std::copy(size.begin(), size.end(), spec->workgroup_size);
  spec->shared_bytes = fields.Number("shared_bytes");
  spec->subgroup_size = fields.Get("subgroup_size") == nullptr ? 0 : fields.Number("subgroup_size");
  if (fields.Get("subgroup_size") != nullptr &&
      (spec->subgroup_size == 0 || spec->subgroup_size > 128 || (spec->subgroup_size & (spec->subgroup_size - 1)))) {
    fields.Fail("\"subgroup_size\" is neither null nor a power of two up to 128");
  }
  spec->features = fields.Strings("features");
  for (const std::string& feature : spec->features) {
    if (!IsFeature(feature)) fields.Fail("feature \"" + feature + "\" is unknown");
  }
}

void ReadCode(const Fields& fields, const char* code, size_t code_size, KernelSpec* spec) {
  const uint32_t offset = fields.Number("offset");
  const uint32_t size = fields.Number("size");
  if (offset % 4 != 0 || size % 4 != 0 || offset > code_size || size > code_size - offset) {
    fields.Fail("its SPIR-V at " + std::to_string(offset) + ", " + std::to_string(size) +
                " bytes, is not inside the module's " + std::to_string(code_size) + " bytes of SPIR-V");
  }
  if (size < kSpirvHeaderWords * sizeof(uint32_t)) fields.Fail("its SPIR-V is shorter than a header");
  spec->spirv.resize(size / sizeof(uint32_t));
  std::memcpy(spec->spirv.data(), code + offset, size);
  if (spec->spirv[0] != kSpirvMagic) fields.Fail("its SPIR-V does not begin with SPIR-V's magic number");
}

/// A driver may do anything with a capability that its device lacks, so whatever the code declares must be among the
/// features, which are compared with the device.
void CheckCapabilities(const Fields& fields, const KernelSpec& spec) {
  constexpr uint32_t kOpCapability = 17;
  for (size_t at = kSpirvHeaderWords; at + 1 < spec.spirv.size(); at += 2) {
    if (spec.spirv[at] != (2 << 16 | kOpCapability)) return;  // capabilities come first
    const auto found = kCapabilities.find(spec.spirv[at + 1]);
    if (found == kCapabilities.end()) {
      fields.Fail("its SPIR-V declares capability " + std::to_string(spec.spirv[at + 1]) + ", which no feature stands for");
    }
    const std::string& feature = found->second;
    if (!feature.empty() && std::find(spec.features.begin(), spec.features.end(), feature) == spec.features.end()) {
      fields.Fail("its SPIR-V declares " + feature + ", which is not among its \"features\"");
    }
  }
}

/// Refuses text so deeply nested that the recursive parser would run out of stack. Four levels are in use.
void CheckNesting(const char* text, size_t size) {
  constexpr int kMostLevels = 16;
  int level = 0;
  bool quoted = false;
  for (size_t i = 0; i < size; ++i) {
    const char c = text[i];
    if (quoted && c == '\\') {
      ++i;
    } else if (c == '"') {
      quoted = !quoted;
    } else if (!quoted && (c == '[' || c == '{')) {
      if (++level > kMostLevels) Malformed("its description is nested too deeply");
    } else if (!quoted && (c == ']' || c == '}')) {
      --level;
    }
  }
}

json::Array ReadHeader(const char* data, size_t size, size_t* json_size) {
  if (size < kHeader) Malformed("it has " + std::to_string(size) + " bytes, less than a header");
  if (std::memcmp(data, kMagic, sizeof kMagic) != 0) Malformed("it does not begin with \"TVMATTNV\"");
  uint32_t words[2];
  std::memcpy(words, data + sizeof kMagic, sizeof words);
  if (words[0] != kVersion) {
    Malformed("it is in version " + std::to_string(words[0]) + " of the format, this is version " +
              std::to_string(kVersion));
  }
  if (words[1] > size - kHeader) {
    Malformed("its description of " + std::to_string(words[1]) + " bytes ends behind the module");
  }
  *json_size = words[1];
  CheckNesting(data + kHeader, words[1]);
  String error;
  const json::Value value = json::Parse(String(data + kHeader, words[1]), &error);
  if (!error.empty()) Malformed("its description is no JSON");
  const auto object = value.as<json::Object>();
  if (!object.has_value()) Malformed("its description is no JSON object");
  const auto found = object->find(String("kernels"));
  if (found == object->end()) Malformed("no \"kernels\"");
  const auto kernels = (*found).second.as<json::Array>();
  if (!kernels.has_value()) Malformed("\"kernels\" is not a list");
  return *kernels;
}

}  // namespace

std::vector<KernelSpec> ParseModule(const char* data, size_t size) {
  size_t json_size = 0;
  const json::Array kernels = ReadHeader(data, size, &json_size);
  const char* code = data + kHeader + json_size;
  const size_t code_size = size - kHeader - json_size;

  std::vector<KernelSpec> specs;
  std::set<std::string> names;
  for (const json::Value& kernel : kernels) {
    const auto object = kernel.as<json::Object>();
    if (!object.has_value()) Malformed("a kernel is no JSON object");
    const auto name = Fields(*object, "?").Get("name").as<String>();
    if (!name.has_value() || name->empty()) Malformed("a kernel's name is no string");
    const Fields fields(*object, *name);
    if (!names.insert(*name).second) fields.Fail("its name occurs twice");
    KernelSpec spec{};
    spec.name = *name;
    ReadParams(fields, &spec);
    ReadLaunch(fields, &spec);
    ReadCode(fields, code, code_size, &spec);
    CheckCapabilities(fields, spec);
    specs.push_back(std::move(spec));
  }
  return specs;
}

}  // namespace tvm_attn::vulkan
