#include "races.h"

#include <algorithm>
#include <string>
#include <unordered_map>

#include "scheduler.h"

// The address sanitizer's function, if it is linked.
extern "C" __attribute__((weak)) void __sanitizer_symbolize_pc(void* code, const char* format, char* text, size_t size);

namespace emulation {
namespace {

/// A use of a byte, with the numbers of earlier meetings of its thread and of the block.
struct Access {
  uint32_t thread, meetings, barriers;
  const void* code;
};

struct Byte {
  bool is_written = false;
  Access write;
  std::vector<Access> reads;  // since the write
};

bool is_enabled = false;  // once a library that reports its accesses is loaded
std::unordered_map<const char*, Byte> bytes;
uint32_t barriers = 0;
std::vector<uint32_t> meetings;            // of each thread
std::vector<std::vector<int64_t>> clocks;  // clocks[u][t]: u knows what t did before its meeting of this number

bool IsOrdered(const Access& before, uint32_t thread) {
  return before.thread == thread || before.barriers < barriers || clocks[thread][before.thread] >= before.meetings;
}

std::string Place(const void* code) {
  char text[512] = "";
  if (__sanitizer_symbolize_pc) __sanitizer_symbolize_pc(const_cast<void*>(code), "%s:%l", text, sizeof text);
  return text;
}

[[noreturn]] void Report(const Access& before, const char* first, const char* second, const void* code) {
  Fail("a barrier is missing: thread " + std::to_string(before.thread) + " " + first + " shared memory at " +
       Place(before.code) + " and thread " + std::to_string(current->number) + " " + second + " it at " + Place(code));
}

std::unordered_map<const void*, std::vector<int64_t>> released;  // what acquires of an object get to know

}  // namespace

void EnableRaces() { is_enabled = true; }

void BeginBlockForRaces(size_t threads) {
  if (!is_enabled) return;
  bytes.clear();
  released.clear();
  barriers = 0;
  meetings.assign(threads, 0);
  clocks.assign(threads, std::vector<int64_t>(threads, -1));
}

void SynchronizeForRaces(const std::vector<uint32_t>& threads) {
  if (!is_enabled) return;
  if (threads.empty()) {
    ++barriers;
    return;
  }
  std::vector<int64_t> known(meetings.size(), -1);
  for (const uint32_t thread : threads) {
    for (size_t i = 0; i < known.size(); ++i) known[i] = std::max(known[i], clocks[thread][i]);
  }
  for (const uint32_t thread : threads) known[thread] = meetings[thread]++;
  for (const uint32_t thread : threads) clocks[thread] = known;
}

void ReleaseForRaces(const void* object) {
  if (!is_enabled) return;
  const uint32_t thread = current->number;
  std::vector<int64_t>& known = released[object];
  known.resize(meetings.size(), -1);
  for (size_t i = 0; i < known.size(); ++i) known[i] = std::max(known[i], clocks[thread][i]);
  known[thread] = meetings[thread]++;
}

void AcquireForRaces(const void* object) {
  if (!is_enabled) return;
  const std::vector<int64_t>& known = released[object];
  std::vector<int64_t>& own = clocks[current->number];
  for (size_t i = 0; i < known.size(); ++i) own[i] = std::max(own[i], known[i]);
}

void AccessForRaces(const void* address, size_t size, bool writes, const void* code) {
  if (!is_enabled || current == nullptr || !IsShared(address)) return;
  const Access access{current->number, meetings[current->number], barriers, code};
  for (size_t i = 0; i < size; ++i) {
    Byte& byte = bytes[static_cast<const char*>(address) + i];
    if (byte.is_written && !IsOrdered(byte.write, access.thread)) {
      Report(byte.write, "writes", writes ? "writes" : "reads", code);
    }
    if (writes) {
      for (const Access& read : byte.reads) {
        if (!IsOrdered(read, access.thread)) Report(read, "reads", "writes", code);
      }
      byte.reads.clear();
      byte.is_written = true;
      byte.write = access;
    } else {
      auto is_past = [&](const Access& read) { return IsOrdered(read, access.thread); };
      byte.reads.erase(std::remove_if(byte.reads.begin(), byte.reads.end(), is_past), byte.reads.end());
      byte.reads.push_back(access);
    }
  }
}

}  // namespace emulation

#define TSAN_ACCESS(NAME, SIZE)                                                   \
  void __tsan_read##NAME(void* address) {                                         \
    emulation::AccessForRaces(address, SIZE, false, __builtin_return_address(0)); \
  }                                                                               \
  void __tsan_write##NAME(void* address) {                                        \
    emulation::AccessForRaces(address, SIZE, true, __builtin_return_address(0));  \
  }                                                                               \
  void __tsan_unaligned_read##NAME(void* address) {                               \
    emulation::AccessForRaces(address, SIZE, false, __builtin_return_address(0)); \
  }                                                                               \
  void __tsan_unaligned_write##NAME(void* address) {                              \
    emulation::AccessForRaces(address, SIZE, true, __builtin_return_address(0));  \
  }

extern "C" {
TSAN_ACCESS(1, 1)
TSAN_ACCESS(2, 2)
TSAN_ACCESS(4, 4)
TSAN_ACCESS(8, 8)
TSAN_ACCESS(16, 16)
void __tsan_read_range(void* address, size_t size) {
  emulation::AccessForRaces(address, size, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t size) {
  emulation::AccessForRaces(address, size, true, __builtin_return_address(0));
}
void __tsan_init() { emulation::EnableRaces(); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
