#include "runner.h"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <limits>
#include <mutex>
#include <thread>

#include "memory.h"

namespace fb {

namespace {

std::atomic<ParallelFor> installed{nullptr};

void serial(int64_t, void (*body)(void*), void* context) { body(context); }

bool poison_wanted() {
  static const bool wanted = [] {
    const char* text = std::getenv("FB_POISON");
    return text != nullptr && *text != '\0' && *text != '0';
  }();
  return wanted;
}

inline void pause_thread() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

template <typename Ready>
void spin_until(const Ready& ready) {
  for (int spins = 0; !ready(); ++spins) {
    if (spins < 4000) {
      pause_thread();
    } else {
      std::this_thread::yield();  // the thread we wait for may need this core
    }
  }
}

struct Run {
  const std::vector<Step>& steps;
  const std::vector<Pointers>& pointers;
  int64_t first_ticket, last_ticket;
  int first_step;
  bool only_one;
  int64_t scratch_floats;
  std::unique_ptr<std::atomic<uint8_t>[]> done;        // per ticket
  std::unique_ptr<std::atomic<int64_t>[]> remaining;   // per step
  std::unique_ptr<std::atomic<int64_t>[]> remaining_first_phase;
  std::atomic<int64_t> next;
  std::atomic<int64_t> team{0};
  const std::function<bool()>& check;
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<bool> failed{false};  // an exception, or the check said no
  std::exception_ptr error;
  std::mutex error_mutex;

  Run(const std::vector<Step>& steps_, const std::vector<Pointers>& pointers_, int64_t first, int64_t last, int step, bool one, int64_t scratch,
      const std::function<bool()>& check_)
      : steps(steps_), pointers(pointers_), first_ticket(first), last_ticket(last), first_step(step), only_one(one), scratch_floats(scratch),
        done(new std::atomic<uint8_t>[static_cast<size_t>(last - first)]), remaining(new std::atomic<int64_t>[steps_.size()]),
        remaining_first_phase(new std::atomic<int64_t>[steps_.size()]), next(first), check(check_) {
    for (int64_t i = 0; i < last - first; ++i) done[i].store(0, std::memory_order_relaxed);
    for (size_t i = 0; i < steps.size(); ++i) {
      remaining[i].store(steps[i].op->tasks(), std::memory_order_relaxed);
      remaining_first_phase[i].store(steps[i].op->first_phase_tasks(), std::memory_order_relaxed);
    }
  }

  void fail() {
    const std::lock_guard<std::mutex> lock(error_mutex);
    if (!error) error = std::current_exception();
    failed.store(true, std::memory_order_relaxed);
  }

  void wait_for(const Step& step, int64_t task) {
    for (const Dependency& dependency : step.dependencies) {
      const auto& left = remaining[dependency.step];
      if (left.load(std::memory_order_acquire) == 0) continue;
      if (dependency.wait == Wait::whole) {
        spin_until([&] { return left.load(std::memory_order_acquire) == 0; });
        continue;
      }
      const Step& producer = steps[dependency.step];
      const Range pixels = dependency.wait == Wait::input_rows ? step.op->input_pixels(task) : step.op->residual_pixels(task);
      const Range writers = producer.op->tasks_writing(pixels);
      for (int64_t t = writers.begin; t < writers.end; ++t) {
        const auto& flag = done[producer.first_ticket - first_ticket + t];
        spin_until([&] { return flag.load(std::memory_order_acquire) != 0; });
      }
    }
  }

  void work() {
    static thread_local AlignedFloats memory;
    size_t step_index = static_cast<size_t>(first_step);
    team.fetch_add(1, std::memory_order_relaxed);
    if (check && std::this_thread::get_id() == caller) {
      try {
        if (!check()) failed.store(true, std::memory_order_relaxed);
      } catch (...) {
        fail();
      }
    }
    for (;;) {
      const int64_t ticket = next.fetch_add(1, std::memory_order_relaxed);
      if (ticket >= last_ticket) return;
      while (step_index + 1 < steps.size() && ticket >= steps[step_index + 1].first_ticket) ++step_index;
      const Step& step = steps[step_index];
      const int64_t task = ticket - step.first_ticket;
      const int64_t first_phase = step.op->first_phase_tasks();
      // After a failure the queue is drained without computing, so that nobody waits for ever.
      if (!failed.load(std::memory_order_relaxed)) {
        try {
          if (!only_one) wait_for(step, task);
          if (task >= first_phase && first_phase > 0) {
            spin_until([&] { return remaining_first_phase[step_index].load(std::memory_order_acquire) == 0; });
          }
          float* scratch = memory.reserve(scratch_floats + 16);
          poison(scratch, scratch_floats);
          step.op->run(task, pointers[step_index], {scratch, team.load(std::memory_order_relaxed)});
        } catch (...) {
          fail();
        }
      }
      done[ticket - first_ticket].store(1, std::memory_order_release);
      if (task < first_phase) remaining_first_phase[step_index].fetch_sub(1, std::memory_order_acq_rel);
      remaining[step_index].fetch_sub(1, std::memory_order_acq_rel);
    }
  }
};

}  // namespace

void poison(float* data, int64_t count) {
  if (poison_wanted()) std::fill(data, data + count, std::numeric_limits<float>::quiet_NaN());
}

void set_parallel(ParallelFor parallel_for) { installed.store(parallel_for); }

ParallelFor parallel() {
  const ParallelFor f = installed.load();
  return f != nullptr ? f : serial;
}

int TaskList::add(std::shared_ptr<const Op> op, std::vector<Dependency> dependencies) {
  scratch_floats_ = std::max(scratch_floats_, op->scratch_floats());
  Step step{std::move(op), std::move(dependencies), tickets_};
  tickets_ += step.op->tasks();
  steps_.push_back(std::move(step));
  return static_cast<int>(steps_.size()) - 1;
}

bool TaskList::run(const std::vector<Pointers>& pointers, int threads, int only, const std::function<bool()>& check) const {
  if (steps_.empty()) return !check || check();
  const int64_t first = only < 0 ? 0 : steps_[static_cast<size_t>(only)].first_ticket;
  const int64_t last = only < 0 ? tickets_ : first + steps_[static_cast<size_t>(only)].op->tasks();
  if (first == last) return !check || check();
  Run run(steps_, pointers, first, last, only < 0 ? 0 : only, only >= 0, scratch_floats_, check);
  if (threads == 1 || last - first == 1) {
    run.work();
  } else {
    parallel()(threads, [](void* context) { static_cast<Run*>(context)->work(); }, &run);
  }
  if (run.error) std::rethrow_exception(run.error);
  return !run.failed.load();
}

}  // namespace fb
