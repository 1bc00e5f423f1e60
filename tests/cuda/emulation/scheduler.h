// The threads of a block as fibers, which switch at barriers and warp collectives only. One block runs after the other;
// of several launches at once, a block of one after a block of another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace emulation {

struct Index {
  uint32_t x = 1, y = 1, z = 1;
};

/// A copy of cp.async: it was issued, and lands when its group is waited for.
struct AsyncCopy {
  char* destination;
  char bytes[16];
  uint32_t size;
};

/// The results of wgmma: they were computed, and land in their registers when their group is waited for.
struct Products {
  std::unordered_map<float*, float> latest;
  std::vector<std::pair<float*, float>> uncommitted;
  std::vector<std::vector<std::pair<float*, float>>> groups;  // oldest first
};

struct Thread {
  Index index;
  uint32_t number;  // in the block, x fastest
  uint32_t lane;
  std::vector<AsyncCopy> uncommitted;
  std::vector<std::vector<AsyncCopy>> groups;  // oldest first
  Products products;
};

/// The thread, block and launch that run.
extern Thread* current;
extern Index block_index, block_size, grid_size;

/// Ends the launch with an error that names block and thread.
[[noreturn]] void Fail(const std::string& message);

/// Waits until `count` threads of the block have come to this barrier; 0 means all of them.
void Barrier(uint32_t number = 0, uint32_t count = 0);

/// The same for an instruction of several warps, which orders no accesses to memory.
void Meet(uint32_t number, uint32_t count);

/// A thread of the block.
Thread& ThreadOf(uint32_t number);

/// Lets the other threads go on: what a loop that waits for memory does.
void Yield();

/// Says that what others may wait for in such loops has changed: without it, many turns are a deadlock.
void Progress();

/// Waits until all lanes of `mask` are here; then `execute` runs once, with the slots of all 32 lanes.
void Collective(const char* name, uint32_t mask, void* slot, void (*execute)(void* const* slots, uint32_t mask));

/// __syncwarp: a collective that orders memory.
void SynchronizeWarp(uint32_t mask);

/// Shared memory's 32-bit addresses. The pointer of an address in no window is an error.
uint32_t SharedAddress(const void* pointer);
char* SharedPointer(uint32_t address);
char* DynamicShared();
bool IsShared(const void* pointer);
uint32_t DynamicSharedSize();

void CopyAsync(char* destination, const char* bytes, uint32_t size);
void CommitCopies();
void WaitForCopies(size_t pending);

struct Launch {
  void (*entry)(void* const* arguments);
  void* const* arguments;
  Index grid, block;
  size_t dynamic_shared = 0;
  char* static_begin = nullptr;  // all static shared memory of the kernel's library
  char* static_end = nullptr;
};

/// Runs every block of one or several launches; of several, a block of each in turn, as on devices that run them at the
/// same time. In reverse order, blocks and the threads of a block start with the last.
void Run(const std::vector<Launch>& launches, bool reverse);

}  // namespace emulation
