// Finds data races in shared memory: two threads use the same byte, one of them writes, and no barrier orders the two.
//
// Kernels that are compiled with -fsanitize=thread report every access to functions of this file, which take the place
// of that sanitizer's library. Two accesses are ordered by a barrier of the block, a named barrier or __syncwarp that both
// threads reached after the first and before the second, or by an mbarrier. Shuffles, votes and matrix instructions order nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulation {

/// Until this is called, the other functions do nothing.
void EnableRaces();

/// Forgets everything: a block of this many threads begins.
void BeginBlockForRaces(size_t threads);

/// These threads have met; if none are given, all threads of the block.
void SynchronizeForRaces(const std::vector<uint32_t>& threads);

/// What the current thread did before a release is ordered before what a thread does after an acquire of the same object.
void ReleaseForRaces(const void* object);
void AcquireForRaces(const void* object);

/// The current thread uses bytes at an address; only shared memory is checked.
void AccessForRaces(const void* address, size_t size, bool writes, const void* code);

}  // namespace emulation
