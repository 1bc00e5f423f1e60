// The threads of a library for processors, linked into it in the place of TVM's pool.
//
// TVM's threads spin while they wait, and each gets an equal part of a loop: beside other programs everyone waits for the
// thread that the system does not run. Here a parallel loop is cut into more pieces than there are threads. Each thread
// begins with a share of them and then takes what others have left, and the loop is over when its pieces are done, not when
// all threads have arrived: a thread that does not run delays the others only if it holds a piece. The thread that calls
// takes pieces as well, so nothing depends on its helpers: they may come late, or not at all. Whoever waits spins for some
// microseconds at most and then sleeps.
//
// A loop's result does not depend on how many threads took part. Helpers never end: at the end of a process they sleep or
// spin, and the system removes them with it.
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <tvm/ffi/c_api.h>
#include <tvm/runtime/c_backend_api.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <memory>
#include <system_error>
#include <thread>

// One pool serves all libraries of a process that were built from the same text. The build names the namespace after it, so
// that others do not share these objects by accident.
#ifndef TVM_ATTN_POOL
#define TVM_ATTN_POOL tvm_attn_pool
#endif

namespace TVM_ATTN_POOL {

using std::chrono::nanoseconds;

constexpr nanoseconds kShortestSpin = std::chrono::microseconds(2);
constexpr nanoseconds kLongestSpin = std::chrono::microseconds(50);
// Of a loop, for each thread.
constexpr int kPieces = 8;
// Loops that run at the same time; further ones run on the threads that call them.
constexpr int kTeams = 64;

static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "the system reads it as an integer");

// Sleeps unless the word has another value; may return early.
inline void Sleep(std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

inline void Wake(std::atomic<uint32_t>& word, int threads) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, threads, nullptr, nullptr, 0);
}

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");
#endif
}

// How long one thread spins before it sleeps: as long as it pays where its waits are short, and hardly where they are long,
// as on a busy machine.
class Patience {
 public:
  // Returns when `ready()` is true; `sleep()` waits until it is.
  template <typename Ready, typename SleepUntilReady>
  void Wait(Ready ready, SleepUntilReady sleep) {
    if (ready()) return;
    const auto start = std::chrono::steady_clock::now();
    nanoseconds waited(0);
    do {
      for (int i = 0; i < 16 && !ready(); ++i) Pause();
      waited = std::chrono::steady_clock::now() - start;
    } while (waited < spin_ && !ready());
    if (!ready()) {
      sleep();
      waited = std::chrono::steady_clock::now() - start;
    }
    spin_ = waited < kLongestSpin ? std::min(2 * spin_, kLongestSpin) : std::max(spin_ / 2, kShortestSpin);
  }

 private:
  nanoseconds spin_ = kLongestSpin;
};

// The threads of one loop at a time: the one that calls, and helpers.
class Team {
 public:
  // A locked team without helpers.
  explicit Team(int threads)
      : threads_(threads), shares_(new Share[threads]), environment_{nullptr, kPieces * threads} {}

  // Starts as many helpers as the system allows.
  void Start() {
    // Signals are for the program's own threads. pthread_sigmask and pthread_create would do the same, and would bind the
    // library to systems with the C library of the machine that builds it, or a newer one.
    sigset_t all, before;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &before);
    try {
      for (int i = 1; i < threads_; ++i) std::thread(&Team::Help, this, i).detach();
    } catch (const std::system_error&) {
    }
    sigprocmask(SIG_SETMASK, &before, nullptr);
  }

  bool Lock(int threads) {
    return threads == threads_ && !locked_.load(std::memory_order_relaxed) &&
           !locked_.exchange(true, std::memory_order_acquire);
  }

  void Unlock() { locked_.store(false, std::memory_order_release); }

  // Runs a loop; the team must be locked.
  int Run(FTVMParallelLambda function, void* data) {
    function_ = function;
    data_ = data;
    failed_.store(false, std::memory_order_relaxed);
    pending_.store(environment_.num_task, std::memory_order_relaxed);
    // From here on helpers that are still awake take pieces.
    for (int i = 0; i < threads_; ++i) {
      const uint64_t begin = kPieces * uint64_t(i);
      shares_[i].range.store(begin << 32 | (begin + kPieces), std::memory_order_release);
    }
    loops_.fetch_add(1);
    if (sleepers_.load()) Wake(loops_, INT_MAX);
    pending_.fetch_sub(Work(0));
    patience_.Wait([this] { return pending_.load(std::memory_order_acquire) == 0; },
                   [this] {
                     caller_sleeps_.store(true);
                     while (const uint32_t pending = pending_.load()) Sleep(pending_, pending);
                     caller_sleeps_.store(false, std::memory_order_relaxed);
                   });
    if (!failed_.load(std::memory_order_relaxed)) return 0;
    // The helper that it happened to has the details, out of reach.
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", "a parallel loop of a kernel failed");
    return -1;
  }

 private:
  struct alignas(64) Share {
    // First piece and the one after the last, 32 bits each.
    std::atomic<uint64_t> range{0};
  };

  // Takes pieces of a share and returns how many: its owner the first one, others the second half of what is left.
  static uint32_t Take(Share& share, bool owned, uint32_t* first) {
    uint64_t range = share.range.load(std::memory_order_acquire);
    for (;;) {
      const uint64_t begin = range >> 32, end = range & UINT32_MAX;
      if (begin == end) return 0;
      const uint64_t count = owned ? 1 : (end - begin + 1) / 2;
      const uint64_t rest = owned ? (begin + 1) << 32 | end : begin << 32 | (end - count);
      *first = static_cast<uint32_t>(owned ? begin : end - count);
      if (share.range.compare_exchange_weak(range, rest, std::memory_order_acq_rel, std::memory_order_acquire)) {
        return static_cast<uint32_t>(count);
      }
    }
  }

  // Does pieces of the loop that is open, until all are taken, and returns how many. Nothing of the loop may be read before
  // a piece is taken: the loop is then open until that piece is done.
  uint32_t Work(int index) {
    uint32_t done = 0, first;
    for (int i = 0; i < threads_; ++i) {
      Share& share = shares_[(index + i) % threads_];
      while (const uint32_t count = Take(share, i == 0, &first)) {
        for (uint32_t piece = first; piece < first + count; ++piece) {
          if (function_(static_cast<int>(piece), &environment_, data_)) failed_.store(true, std::memory_order_relaxed);
        }
        done += count;
      }
    }
    return done;
  }

  // What a helper does for ever.
  void Help(int index) {
    Patience patience;
    for (;;) {
      const uint32_t seen = loops_.load();
      if (const uint32_t done = Work(index)) {
        if (pending_.fetch_sub(done) == done && caller_sleeps_.load()) Wake(pending_, 1);
      }
      patience.Wait([&] { return loops_.load(std::memory_order_acquire) != seen; },
                    [&] {
                      sleepers_.fetch_add(1);
                      while (loops_.load() == seen) Sleep(loops_, seen);
                      sleepers_.fetch_sub(1);
                    });
    }
  }

  const int threads_;
  const std::unique_ptr<Share[]> shares_;
  std::atomic<bool> locked_{true};
  Patience patience_;
  // Loops so far, which helpers wait for to change, and the last one. It is open while pieces are pending.
  alignas(64) std::atomic<uint32_t> loops_{0};
  std::atomic<uint32_t> sleepers_{0};
  FTVMParallelLambda function_ = nullptr;
  void* data_ = nullptr;
  TVMParallelGroupEnv environment_;
  // Pieces that are not done. The caller waits for 0.
  alignas(64) std::atomic<uint32_t> pending_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> failed_{false};
};

// GCC makes an inline variable one for all libraries of a process. Never freed: helpers use them until the process ends.
__attribute__((visibility("default"))) inline std::atomic<Team*> teams[kTeams] = {};

namespace {

thread_local Team* last_team = nullptr;
thread_local int threads_wanted = 1;

// The team of this thread's last loop, or another that is free; nullptr where there is none.
Team* FreeTeam(int threads) {
  if (last_team && last_team->Lock(threads)) return last_team;
  for (std::atomic<Team*>& slot : teams) {
    Team* team = slot.load(std::memory_order_acquire);
    if (!team) {
      auto created = std::make_unique<Team>(threads);
      if (slot.compare_exchange_strong(team, created.get(), std::memory_order_acq_rel)) {
        created->Start();
        return last_team = created.release();
      }
    }
    if (team->Lock(threads)) return last_team = team;
  }
  return nullptr;
}

int Launch(FTVMParallelLambda function, void* data, int) {
  Team* team = threads_wanted > 1 ? FreeTeam(threads_wanted) : nullptr;
  if (!team) {
    TVMParallelGroupEnv alone{nullptr, 1};
    return function(0, &alone, data);
  }
  const int result = team->Run(function, data);
  team->Unlock();
  return result;
}

// A child has no thread but the one that forked.
void ForgetTeams() {
  for (std::atomic<Team*>& slot : teams) slot.store(nullptr, std::memory_order_relaxed);
  last_team = nullptr;
}

__attribute__((constructor)) void WatchForks() { pthread_atfork(nullptr, nullptr, ForgetTeams); }

}  // namespace
}  // namespace TVM_ATTN_POOL

extern "C" {

// Kernels start loops through this pointer. TVM's code generator emits it as a weak symbol, which the runtime looks up and
// sets when it loads the library; this one is strong, so the linker takes it, and hidden, so the runtime does not find it.
__attribute__((visibility("hidden"))) decltype(&TVMBackendParallelLaunch) __TVMBackendParallelLaunch =
    TVM_ATTN_POOL::Launch;

// set_threads(number): the threads of the loops that the calling thread starts in this library; 1 where it says nothing.
__attribute__((visibility("default"))) int __tvm_ffi_set_threads(void*, const TVMFFIAny* arguments, int32_t, TVMFFIAny*) {
  TVM_ATTN_POOL::threads_wanted = static_cast<int>(arguments[0].v_int64);
  return 0;
}

}  // extern "C"
