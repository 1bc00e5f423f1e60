// Loops of several threads at once through the pool of tvm_attn/compiler/thread_pool.cc: every iteration runs exactly once,
// and what it wrote is seen by the thread that started the loop. Prints nothing where all is well.
//
//   thread_pool_stress LOOPS [fork]
#include <sys/wait.h>
#include <tvm/ffi/c_api.h>
#include <tvm/runtime/c_backend_api.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

extern "C" {
extern decltype(&TVMBackendParallelLaunch) __TVMBackendParallelLaunch;
int __tvm_ffi_set_threads(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);
}

static std::atomic<int> errors_raised{0};
extern "C" void TVMFFIErrorSetRaisedFromCStr(const char*, const char*) { ++errors_raised; }

namespace {

void Require(bool condition, const char* what) {
  if (!condition) {
    std::fprintf(stderr, "%s\n", what);
    std::abort();
  }
}

struct Loop {
  int extent;
  int failing;                       // an iteration that fails, or -1
  std::vector<int> runs;             // of each iteration; plain, so that a sanitizer sees races
  const std::vector<int>* previous;  // what the loop before wrote
};

// A task runs its slice of the iterations, as kernels do.
int Task(int task, TVMParallelGroupEnv* environment, void* data) {
  Loop& loop = *static_cast<Loop*>(data);
  const int tasks = environment->num_task, step = (loop.extent + tasks - 1) / tasks;
  int result = 0;
  for (int i = std::min(task * step, loop.extent); i < std::min((task + 1) * step, loop.extent); ++i) {
    loop.runs[i] += 1;
    if (loop.previous) Require((*loop.previous)[i % loop.previous->size()] == 1, "the loop before has not ended");
    if (i == loop.failing) result = -1;
  }
  return result;
}

void Run(int loops, unsigned seed) {
  std::unique_ptr<Loop> before;
  for (int i = 0; i < loops; ++i) {
    seed = seed * 1664525u + 1013904223u;
    const int threads = 1 + static_cast<int>(seed >> 16) % 5, extent = static_cast<int>(seed >> 8) % 200;
    TVMFFIAny argument;
    std::memset(&argument, 0, sizeof(argument));
    argument.v_int64 = threads;
    __tvm_ffi_set_threads(nullptr, &argument, 1, nullptr);
    const bool fails = extent > 0 && seed % 97 == 0;
    const bool follows = before && !before->runs.empty();
    auto loop = std::make_unique<Loop>(
        Loop{extent, fails ? extent / 2 : -1, std::vector<int>(extent), follows ? &before->runs : nullptr});
    const int result = __TVMBackendParallelLaunch(Task, loop.get(), 0);
    Require(result == (fails ? -1 : 0), "a failure is not told, or there was none");
    Require(std::all_of(loop->runs.begin(), loop->runs.end(), [](int n) { return n == 1; }), "not each iteration ran once");
    before = std::move(loop);
    if (seed % 501 == 0) usleep(200);  // helpers fall asleep
  }
}

void RunInThreads(int loops) {
  std::vector<std::thread> callers;
  for (unsigned i = 0; i < 4; ++i) callers.emplace_back(Run, loops, i);
  for (std::thread& caller : callers) caller.join();
}

}  // namespace

int main(int, char** arguments) {
  const int loops = std::atoi(arguments[1]);
  RunInThreads(loops);
  if (arguments[2]) {
    // While other threads are within loops, as in a server.
    std::thread other(Run, loops, 7);
    const pid_t child = fork();
    if (child == 0) {
      Run(loops, 9);
      std::_Exit(0);
    }
    other.join();
    int status = -1;
    waitpid(child, &status, 0);
    Require(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child failed");
    Run(loops, 11);
  }
  return 0;  // with helpers that wait
}
