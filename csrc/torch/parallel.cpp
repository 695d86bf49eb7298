// Gives the task runner torch's threads: at::parallel_for, through the stable ABI, so torch.set_num_threads rules and there is
// one OpenMP in the process.
//
// After a fork the child has none of the threads that the parent's OpenMP pool counts on, and a parallel region would wait for
// them for ever. A flag set in the child makes our kernels run on the calling thread there.
#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <exception>
#include <mutex>
#include <stdexcept>

#include "op.h"

namespace {

std::atomic<bool> forked{false};

struct Call {
  void (*body)(void*);
  void* context;
  std::mutex mutex;
  std::exception_ptr error;
};

void run_body(int64_t, int64_t, void* argument) {
  Call& call = *static_cast<Call*>(argument);
  try {
    call.body(call.context);
  } catch (...) {  // must not cross torch's C interface, which would replace its text
    const std::lock_guard<std::mutex> lock(call.mutex);
    if (!call.error) call.error = std::current_exception();
  }
}

int64_t torch_thread_count() {
  return forked.load(std::memory_order_relaxed) ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());
}

// at::parallel_for cuts [0, threads) into one chunk per participating thread: one call of the body each.
void torch_threads(int64_t n, void (*body)(void*), void* context) {
  const int64_t threads = n > 0 ? n : torch_thread_count();
  if (threads == 1 || forked.load(std::memory_order_relaxed)) {
    body(context);
    return;
  }
  Call call{body, context, {}, nullptr};
  const AOTITorchError status = torch_parallel_for(0, threads, 1, run_body, &call);
  if (call.error) std::rethrow_exception(call.error);
  if (status != AOTI_TORCH_SUCCESS) throw std::runtime_error("torch could not start a parallel region");
}

const bool installed = [] {
  fb::set_parallel(torch_threads, torch_thread_count);
  pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
  return true;
}();

}  // namespace
