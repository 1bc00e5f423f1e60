// CUDA graphs: while one is captured, kernels and copies on the device are recorded instead of run.
#pragma once

#include <functional>

namespace emulation {

bool IsCapturing();

/// Runs the work, or records it for the graph.
void Submit(std::function<void()> work);

}  // namespace emulation
