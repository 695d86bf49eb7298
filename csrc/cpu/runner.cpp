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
std::atomic<ThreadCount> installed_count{nullptr};

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

// A step has two phases, the first one mostly empty; tasks of the second need the whole first one.
struct Phase {
  int64_t begin, count;  // tasks
};

Phase phase_of(const Op& op, int phase) {
  const int64_t first = op.first_phase_tasks();
  return phase == 0 ? Phase{0, first} : Phase{first, op.tasks() - first};
}

// Of the calling thread, for as long as it lives.
float* scratch(int64_t floats) {
  static thread_local AlignedFloats own;
  return own.reserve(floats + 16);
}

// What happens to one run of tasks in every step: written by its own thread and, now and then, by a helper. In memory of its own.
struct Lane {
  std::unique_ptr<std::atomic<uint8_t>[]> done;      // by ticket
  std::unique_ptr<std::atomic<uint64_t>[]> claimed;  // by phase of a step: low half, taken from the front; high half, from the back
  std::unique_ptr<std::atomic<int64_t>[]> left;      // by phase of a step: tasks not finished
};

class Run {
 public:
  Run(const std::vector<Step>& steps, const std::vector<Pointers>& pointers, int64_t tickets, int64_t threads, int64_t scratch_floats,
      const std::function<bool()>& check)
      : steps_(steps), pointers_(pointers), scratch_floats_(scratch_floats), check_(check), lanes_(static_cast<size_t>(threads)) {
    for (size_t i = 0; i < lanes_.size(); ++i) {
      Lane& lane = lanes_[i];
      lane.done.reset(new std::atomic<uint8_t>[static_cast<size_t>(tickets) + kApart]);
      lane.claimed.reset(new std::atomic<uint64_t>[2 * steps.size() + kApart / 8]);
      lane.left.reset(new std::atomic<int64_t>[2 * steps.size() + kApart / 8]);
      for (int64_t t = 0; t < tickets; ++t) lane.done[t].store(0, std::memory_order_relaxed);
      for (size_t p = 0; p < 2 * steps.size(); ++p) {
        lane.claimed[p].store(0, std::memory_order_relaxed);
        lane.left[p].store(run_of(phase_of(*steps[p / 2].op, p % 2), static_cast<int64_t>(i)).count, std::memory_order_relaxed);
      }
    }
  }

  // What each thread does. only >= 0: that step alone, which then waits for nobody.
  void work(int only) {
    const bool is_caller = std::this_thread::get_id() == caller_;
    const int64_t me = is_caller ? 0 : helpers_.fetch_add(1, std::memory_order_relaxed) % lanes();
    if (check_ && is_caller) {
      try {
        if (!check_()) failed_.store(true, std::memory_order_relaxed);
      } catch (...) {
        fail();
      }
    }
    std::vector<uint8_t> finished(steps_.size(), only >= 0);  // steps that this thread has seen finished
    const size_t first = only < 0 ? 0 : static_cast<size_t>(only), last = only < 0 ? steps_.size() : first + 1;
    for (size_t step = first; step < last; ++step)
      for (int phase = 0; phase < 2; ++phase) take_part(step, phase, me, finished);
  }

  std::exception_ptr error() const { return error_; }
  bool failed() const { return failed_.load(); }

 private:
  static constexpr size_t kApart = 128;  // bytes behind the arrays of a lane: no two lanes in one pair of cache lines

  int64_t lanes() const { return static_cast<int64_t>(lanes_.size()); }
  Phase run_of(Phase all, int64_t lane) const {
    const int64_t begin = all.count * lane / lanes(), end = all.count * (lane + 1) / lanes();
    return {all.begin + begin, end - begin};
  }
  const Lane& lane_of(const Op& op, int64_t task) const {
    const Phase all = phase_of(op, task < op.first_phase_tasks() ? 0 : 1);
    return lanes_[static_cast<size_t>(((task - all.begin + 1) * lanes() - 1) / all.count)];
  }

  void take_part(size_t step, int phase, int64_t me, std::vector<uint8_t>& finished) {
    const Phase all = phase_of(*steps_[step].op, phase);
    if (all.count == 0) return;
    if (phase == 1 && all.begin > 0) wait_for_phase(step, 0);
    Worker worker{scratch(scratch_floats_), me, lanes()};
    for (int64_t turn = 0; turn < lanes(); ++turn) {
      const int64_t owner = (me + turn) % lanes();
      const Phase run = run_of(all, owner);
      std::atomic<uint64_t>& claimed = lanes_[static_cast<size_t>(owner)].claimed[2 * step + static_cast<size_t>(phase)];
      for (int64_t i = claim(claimed, run.count, turn == 0); i >= 0; i = claim(claimed, run.count, turn == 0)) {
        worker.left = turn == 0 ? run.count - 1 - i : 0;
        execute(step, phase, run.begin + i, lanes_[static_cast<size_t>(owner)], worker, finished);
        worker.first = false;
      }
    }
  }

  // The next task of a run of `count`, or -1 when all are taken.
  static int64_t claim(std::atomic<uint64_t>& claimed, int64_t count, bool front) {
    constexpr uint64_t kBack = uint64_t{1} << 32;
    const auto taken = [](uint64_t both) { return static_cast<int64_t>(both % kBack + both / kBack); };
    if (taken(claimed.load(std::memory_order_relaxed)) >= count) return -1;
    const uint64_t before = claimed.fetch_add(front ? 1 : kBack, std::memory_order_relaxed);
    if (taken(before) >= count) return -1;
    return front ? static_cast<int64_t>(before % kBack) : count - 1 - static_cast<int64_t>(before / kBack);
  }

  void execute(size_t step, int phase, int64_t task, Lane& lane, const Worker& worker, std::vector<uint8_t>& finished) {
    // After a failure the queue is drained without computing, so that nobody waits for ever.
    if (!failed_.load(std::memory_order_relaxed)) {
      try {
        for (const Dependency& dependency : steps_[step].dependencies) wait_for(dependency, *steps_[step].op, task, finished);
        poison(worker.scratch, scratch_floats_);
        steps_[step].op->run(task, pointers_[step], worker);
      } catch (...) {
        fail();
      }
    }
    lane.done[steps_[step].first_ticket + task].store(1, std::memory_order_release);
    lane.left[2 * step + static_cast<size_t>(phase)].fetch_sub(1, std::memory_order_acq_rel);
  }

  void wait_for(const Dependency& dependency, const Op& op, int64_t task, std::vector<uint8_t>& finished) const {
    const auto step = static_cast<size_t>(dependency.step);
    if (finished[step] != 0) return;
    if (dependency.wait == Wait::whole) {
      wait_for_phase(step, 0);
      wait_for_phase(step, 1);
      finished[step] = 1;
      return;
    }
    const Op& producer = *steps_[step].op;
    const Range pixels = dependency.wait == Wait::input_rows ? op.input_pixels(task) : op.residual_pixels(task);
    const Range writers = producer.tasks_writing(pixels);
    for (int64_t t = writers.begin; t < writers.end; ++t) {
      const std::atomic<uint8_t>& flag = lane_of(producer, t).done[steps_[step].first_ticket + t];
      spin_until([&] { return flag.load(std::memory_order_acquire) != 0; });
    }
  }

  void wait_for_phase(size_t step, size_t phase) const {
    for (const Lane& lane : lanes_) {
      const std::atomic<int64_t>& left = lane.left[2 * step + phase];
      spin_until([&] { return left.load(std::memory_order_acquire) == 0; });
    }
  }

  void fail() {
    const std::lock_guard<std::mutex> lock(error_mutex_);
    if (!error_) error_ = std::current_exception();
    failed_.store(true, std::memory_order_relaxed);
  }

  const std::vector<Step>& steps_;
  const std::vector<Pointers>& pointers_;
  const int64_t scratch_floats_;
  const std::function<bool()>& check_;
  const std::thread::id caller_ = std::this_thread::get_id();
  std::vector<Lane> lanes_;
  std::atomic<int64_t> helpers_{1};
  std::atomic<bool> failed_{false};  // an exception, or the check said no
  std::exception_ptr error_;
  std::mutex error_mutex_;
};

// All steps, or the step `only`, on the calling thread: one task after the other, and nobody to wait for.
void run_alone(const std::vector<Step>& steps, const std::vector<Pointers>& pointers, int64_t scratch_floats, int only) {
  const size_t first = only < 0 ? 0 : static_cast<size_t>(only), last = only < 0 ? steps.size() : first + 1;
  for (size_t step = first; step < last; ++step) {
    for (int phase = 0; phase < 2; ++phase) {
      const Phase all = phase_of(*steps[step].op, phase);
      Worker worker{scratch(scratch_floats), 0, 1};
      for (int64_t i = 0; i < all.count; ++i) {
        worker.left = all.count - 1 - i;
        poison(worker.scratch, scratch_floats);
        steps[step].op->run(all.begin + i, pointers[step], worker);
        worker.first = false;
      }
    }
  }
}

}  // namespace

void poison(float* data, int64_t count) {
  if (poison_wanted()) std::fill(data, data + count, std::numeric_limits<float>::quiet_NaN());
}

void set_parallel(ParallelFor parallel_for, ThreadCount count) {
  installed.store(parallel_for);
  installed_count.store(count);
}

ParallelFor parallel() {
  const ParallelFor f = installed.load();
  return f != nullptr ? f : serial;
}

int64_t thread_count() {
  const ThreadCount count = installed_count.load();
  return count != nullptr ? std::max<int64_t>(1, count()) : 1;
}

int TaskList::add(std::shared_ptr<const Op> op, std::vector<Dependency> dependencies) {
  scratch_floats_ = std::max(scratch_floats_, op->scratch_floats());
  Step step{std::move(op), std::move(dependencies), tickets_};
  tickets_ += step.op->tasks();
  most_tasks_ = std::max(most_tasks_, step.op->tasks());
  steps_.push_back(std::move(step));
  return static_cast<int>(steps_.size()) - 1;
}

// Steps of one task each are not worth waking a second thread.
int64_t TaskList::team(int threads, int only) const {
  const int64_t tasks = only < 0 ? most_tasks_ : steps_[static_cast<size_t>(only)].op->tasks();
  return std::min(tasks, threads > 0 ? threads : thread_count());
}

bool TaskList::run(const std::vector<Pointers>& pointers, int threads, int only, const std::function<bool()>& check) const {
  const int64_t team = this->team(threads, only);
  if (team <= 1) {
    if (check && !check()) return false;
    run_alone(steps_, pointers, scratch_floats_, only);
    return true;
  }
  Run run(steps_, pointers, tickets_, team, scratch_floats_, check);
  struct Call {
    Run& run;
    int only;
  } call{run, only};
  parallel()(
      team, [](void* context) { static_cast<Call*>(context)->run.work(static_cast<Call*>(context)->only); }, &call);
  if (run.error()) std::rethrow_exception(run.error());
  return !run.failed();
}

}  // namespace fb
