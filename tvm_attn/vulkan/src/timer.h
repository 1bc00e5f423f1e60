// TVM's timer for this device: the device's own timestamps before and after the recorded work.
#pragma once

#include <tvm/ffi/object.h>

#include "device.h"

namespace tvm_attn::vulkan {

/// A timer for `runtime.timer.vulkan`, a mirror of TVM's `runtime.Timer`.
tvm::ffi::ObjectRef MakeTimer(Device* device);

}  // namespace tvm_attn::vulkan
