#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <utility>

#include "races.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif

// The address sanitizer, if linked, must be told of every change of stacks.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* address, size_t size);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* address, size_t size);
}

namespace emulation {

Thread* current = nullptr;
Index block_index, block_size, grid_size;

namespace {

constexpr size_t kStackSize = 256 << 10;
constexpr uint32_t kWarp = 32;
constexpr uint32_t kStaticWindow = 0x00000400, kDynamicWindow = 0x01000000;
constexpr size_t kMaxShared = 227 << 10;

#ifdef __x86_64__
using Context = void*;
extern "C" void emulation_switch(Context* save, Context* load);
asm(R"(
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void MakeContext(Context* context, char* stack, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack + kStackSize);
  *--top = nullptr;  // the return address of `entry`, which never returns; aligns its stack as a call would
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  *context = top;
}
#else
using Context = ucontext_t;
void emulation_switch(Context* save, Context* load) { swapcontext(save, load); }

void MakeContext(Context* context, char* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStackSize;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
#endif

enum class State { kReady, kYielded, kBarrier, kCollective, kDone };

struct Fiber : Thread {
  State state = State::kReady;
  char* stack = nullptr;
  Context context{};
  void* fake_stack = nullptr;
  // What it waits for.
  const char* waits_for = "";
  uint32_t barrier = 0, mask = 0;
  void* slot = nullptr;
  void (*execute)(void* const*, uint32_t) = nullptr;
};

std::vector<Fiber> fibers;
std::vector<char*> stacks;
const Launch* launch = nullptr;
char* dynamic_shared = nullptr;
Context scheduler_context{};
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
void* scheduler_fake_stack = nullptr;
std::exception_ptr failure;
uint32_t idle_turns = 0;  // of yielding threads, since something happened that they may wait for
constexpr uint32_t kMostIdleTurns = 100000;

/// Not memset: the sanitizer's own would refuse the gaps between static arrays.
void Fill(char* begin, char* end) {
  for (volatile char* byte = begin; byte != end; ++byte) *byte = static_cast<char>(0xFF);
}

char* NewStack() {
  constexpr size_t kGuard = 4096;
  void* memory =
      mmap(nullptr, kGuard + kStackSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0)
    throw std::runtime_error("no memory for stacks");
  return static_cast<char*>(memory) + kGuard;
}

Fiber& Self() { return *static_cast<Fiber*>(current); }

void ToScheduler() {
  Fiber& self = Self();
  const bool done = self.state == State::kDone;
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(done ? nullptr : &self.fake_stack, scheduler_stack, scheduler_stack_size);
  }
  emulation_switch(&self.context, &scheduler_context);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(Self().fake_stack, &scheduler_stack, &scheduler_stack_size);
  }
}

void ToFiber(Fiber* fiber) {
  current = fiber;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber->stack, kStackSize);
  emulation_switch(&scheduler_context, &fiber->context);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
  current = nullptr;
}

void Entry() {
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
  }
  try {
    launch->entry(launch->arguments);
  } catch (...) {
    failure = std::current_exception();
  }
  Self().state = State::kDone;
  ToScheduler();
  abort();
}

std::string Text(const Index& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

/// All threads wait, or some have ended while others wait for them.
[[noreturn]] void Deadlock() {
  std::map<std::string, uint32_t> waiting;
  for (const Fiber& fiber : fibers)
    ++waiting[fiber.state == State::kDone ? "have ended" : std::string("wait at ") + fiber.waits_for];
  std::string message = "deadlock in block " + Text(block_index) + ":";
  for (const auto& [what, count] : waiting) message += " " + std::to_string(count) + " threads " + what + ",";
  message.back() = '.';
  throw std::runtime_error(message);
}

/// Runs each lane that is ready until it waits or ends. Returns how many there were.
size_t RunWarp(size_t first, bool reverse, size_t* done) {
  const size_t lanes = std::min<size_t>(kWarp, fibers.size() - first);
  size_t ran = 0;
  for (size_t i = 0; i < lanes; ++i) {
    Fiber& fiber = fibers[first + (reverse ? lanes - 1 - i : i)];
    if (fiber.state != State::kReady) continue;
    ++ran;
    ToFiber(&fiber);
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
    *done += fiber.state == State::kDone;
    if (fiber.state == State::kDone) Progress();
  }
  return ran;
}

void RunBlock(bool reverse) {
  const size_t count = fibers.size();
  Fill(launch->static_begin, launch->static_end);
  Fill(dynamic_shared, dynamic_shared + launch->dynamic_shared);
  BeginBlockForRaces(count);
  while (stacks.size() < count) stacks.push_back(NewStack());
  for (size_t i = 0; i < count; ++i) {
    const auto number = static_cast<uint32_t>(i);
    Fiber& fiber = fibers[i] = Fiber();
    fiber.number = number;
    fiber.lane = number % kWarp;
    fiber.index = {number % block_size.x, number / block_size.x % block_size.y, number / (block_size.x * block_size.y)};
    fiber.stack = stacks[i];
    MakeContext(&fiber.context, fiber.stack, Entry);
  }
  // A warp runs until it waits for another: the further apart warps are, the more a missing barrier shows.
  const size_t warps = (count + kWarp - 1) / kWarp;
  for (size_t done = 0; done < count;) {
    bool progress = false;
    for (size_t i = 0; i < warps; ++i) {
      const size_t first = (reverse ? warps - 1 - i : i) * kWarp;
      while (RunWarp(first, reverse, &done) != 0) progress = true;
    }
    for (Fiber& fiber : fibers) {
      if (fiber.state != State::kYielded) continue;
      fiber.state = State::kReady;
      fiber.waits_for = "a value in memory";
      progress = true;
    }
    if (!progress || ++idle_turns > kMostIdleTurns) Deadlock();
  }
}

}  // namespace

void Meet(uint32_t number, uint32_t count, bool orders);

void Fail(const std::string& message) {
  // Not thrown from here: kernels that report their accesses are compiled as if those functions threw nothing.
  const std::string place = " (block " + Text(block_index) + ", thread " + Text(current->index) + ")";
  failure = std::make_exception_ptr(std::runtime_error(message + place));
  Self().state = State::kDone;
  ToScheduler();
  abort();
}

void Yield() {
  Self().state = State::kYielded;
  ToScheduler();
}

void Barrier(uint32_t number, uint32_t count) { Meet(number, count, true); }
void Meet(uint32_t number, uint32_t count) { Meet(number, count, false); }
Thread& ThreadOf(uint32_t number) { return fibers[number]; }
void Progress() { idle_turns = 0; }

void Meet(uint32_t number, uint32_t count, bool orders) {
  if (count == 0) count = static_cast<uint32_t>(fibers.size());
  Fiber& self = Self();
  self.state = State::kBarrier;
  self.barrier = number;
  self.waits_for = number == 0 ? "a barrier of the block" : "a named barrier";
  auto here = [&](const Fiber& fiber) { return fiber.state == State::kBarrier && fiber.barrier == number; };
  if (std::count_if(fibers.begin(), fibers.end(), here) >= count) {
    std::vector<uint32_t> met;
    for (Fiber& fiber : fibers) {
      if (!here(fiber)) continue;
      fiber.state = State::kReady;
      met.push_back(fiber.number);
    }
    Progress();
    if (orders) SynchronizeForRaces(met.size() == fibers.size() ? std::vector<uint32_t>() : met);
  }
  ToScheduler();
}

void Collective(const char* name, uint32_t mask, void* slot, void (*execute)(void* const*, uint32_t)) {
  Fiber& self = Self();
  if (!(mask >> self.lane & 1)) Fail(std::string(name) + ": the lane is not in its own mask");
  const size_t first = self.number - self.lane;
  self.state = State::kCollective;
  self.waits_for = name;
  self.mask = mask;
  self.slot = slot;
  self.execute = execute;
  void* slots[kWarp] = {};
  bool complete = true;
  for (uint32_t lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (first + lane >= fibers.size()) Fail(std::string(name) + ": the mask has lanes that the block lacks");
    const Fiber& other = fibers[first + lane];
    if (other.state == State::kDone) Fail(std::string(name) + ": a thread of the mask has ended");
    complete = complete && other.state == State::kCollective && other.execute == execute && other.mask == mask;
    slots[lane] = other.slot;
  }
  if (complete) {
    Progress();
    execute(slots, mask);
    for (uint32_t lane = 0; lane < kWarp; ++lane) {
      if (mask >> lane & 1) fibers[first + lane].state = State::kReady;
    }
  }
  ToScheduler();
}

void SynchronizeWarp(uint32_t mask) {
  Collective("__syncwarp", mask, nullptr, [](void* const*, uint32_t lanes) {
    std::vector<uint32_t> met;
    for (uint32_t lane = 0; lane < kWarp; ++lane) {
      if (lanes >> lane & 1) met.push_back(current->number - current->lane + lane);
    }
    SynchronizeForRaces(met);
  });
}

bool IsShared(const void* pointer) {
  const auto* address = static_cast<const char*>(pointer);
  return (address >= launch->static_begin && address < launch->static_end) ||
         (address >= dynamic_shared && address < dynamic_shared + launch->dynamic_shared);
}

uint32_t SharedAddress(const void* pointer) {
  const auto* address = static_cast<const char*>(pointer);
  // One past the end is a valid address too: whether it may be read is checked when it is read.
  if (address >= launch->static_begin && address < launch->static_end) {
    return kStaticWindow + static_cast<uint32_t>(address - launch->static_begin);
  }
  const ptrdiff_t offset = address - dynamic_shared;
  if (offset < -0x10000 || offset > static_cast<ptrdiff_t>(kMaxShared))
    Fail("a pointer outside of shared memory is made an address of it");
  return static_cast<uint32_t>(kDynamicWindow + offset);
}

char* SharedPointer(uint32_t address) {
  if (address >= kDynamicWindow - 0x10000) {
    const ptrdiff_t offset = static_cast<ptrdiff_t>(address) - kDynamicWindow;
    if (offset < 0 || offset >= static_cast<ptrdiff_t>(launch->dynamic_shared)) {
      Fail("out of bounds: byte " + std::to_string(offset) + " of " + std::to_string(launch->dynamic_shared) +
           " bytes of dynamic shared memory");
    }
    return dynamic_shared + offset;
  }
  const auto size = static_cast<size_t>(launch->static_end - launch->static_begin);
  if (address < kStaticWindow || address - kStaticWindow >= size)
    Fail("out of bounds: no shared memory has this address");
  return launch->static_begin + (address - kStaticWindow);
}

char* DynamicShared() { return dynamic_shared; }
uint32_t DynamicSharedSize() { return static_cast<uint32_t>(launch->dynamic_shared); }

void CopyAsync(char* destination, const char* bytes, uint32_t size) {
  AsyncCopy copy{destination, {}, size};
  memcpy(copy.bytes, bytes, size);
  AccessForRaces(destination, size, true, __builtin_return_address(0));
  memset(destination, 0xFF, size);
  current->uncommitted.push_back(copy);
}

void CommitCopies() {
  current->groups.push_back(std::move(current->uncommitted));
  current->uncommitted.clear();
}

void WaitForCopies(size_t pending) {
  auto& groups = current->groups;
  while (groups.size() > pending) {
    for (const AsyncCopy& copy : groups.front()) {
      // The copy writes at any time until now.
      AccessForRaces(copy.destination, copy.size, true, __builtin_return_address(0));
      memcpy(copy.destination, copy.bytes, copy.size);
    }
    groups.erase(groups.begin());
  }
}

size_t Blocks(const Launch& what) { return size_t{what.grid.x} * what.grid.y * what.grid.z; }

void RunBlockOf(const Launch& what, size_t block, bool reverse) {
  launch = &what;
  grid_size = what.grid;
  block_size = what.block;
  constexpr size_t kAlignment = 1024;
  const size_t rounded = (what.dynamic_shared + kAlignment - 1) / kAlignment * kAlignment + kAlignment;
  const std::unique_ptr<char, void (*)(void*)> memory(static_cast<char*>(aligned_alloc(kAlignment, rounded)), free);
  dynamic_shared = memory.get();
  if (__asan_poison_memory_region) {
    __asan_poison_memory_region(dynamic_shared + what.dynamic_shared, rounded - what.dynamic_shared);
  }
  fibers.resize(size_t{what.block.x} * what.block.y * what.block.z);
  block_index = {static_cast<uint32_t>(block % what.grid.x), static_cast<uint32_t>(block / what.grid.x % what.grid.y),
                 static_cast<uint32_t>(block / what.grid.x / what.grid.y)};
  RunBlock(reverse);
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(dynamic_shared, rounded);
  launch = nullptr;
}

void Run(const std::vector<Launch>& launches, bool reverse) {
  size_t most = 0;
  for (const Launch& what : launches) {
    const size_t threads = size_t{what.block.x} * what.block.y * what.block.z;
    if (threads == 0 || threads > 1024)
      throw std::runtime_error("a block of " + std::to_string(threads) + " threads");
    if (Blocks(what) == 0 || what.grid.y > 65535 || what.grid.z > 65535)
      throw std::runtime_error("a grid of " + Text(what.grid) + " blocks");
    if (what.dynamic_shared > kMaxShared)
      throw std::runtime_error(std::to_string(what.dynamic_shared) + " bytes of shared memory");
    most = std::max(most, Blocks(what));
  }
  for (size_t i = 0; i < most; ++i) {
    for (const Launch& what : launches) {
      if (i < Blocks(what)) RunBlockOf(what, reverse ? Blocks(what) - 1 - i : i, reverse);
    }
  }
}

}  // namespace emulation
