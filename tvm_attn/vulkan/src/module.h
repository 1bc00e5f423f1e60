// The TVM runtime module of kind "vulkan".
#pragma once

#include <tvm/ffi/extra/module.h>

namespace tvm_attn::vulkan {

/// A module from bytes in the module format (kernel_blob.h). Needs no device: kernels may be built anywhere.
/// Throws ArtifactError if the bytes are malformed.
tvm::ffi::Module CreateModule(const tvm::ffi::Bytes& blob);

/// Throws DeviceError if vulkan:`device_index` cannot run all of `module` and its imports: it names the device,
/// everything it lacks, and that `who` needs it.
void RequireDevice(const tvm::ffi::Module& module, int device_index, const tvm::ffi::String& who);

}  // namespace tvm_attn::vulkan
