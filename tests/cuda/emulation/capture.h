// Work that is recorded instead of run: that of a CUDA graph while it is captured, and that of calls that shall run at
// the same time.
#pragma once

#include <functional>

#include "scheduler.h"

namespace emulation {

/// Whether a CUDA graph is captured.
bool IsCapturing();

/// Whether work is recorded, and so uses its memory later.
bool IsRecording();

/// Runs the work, or records it.
void Submit(std::function<void()> work);

}  // namespace emulation
