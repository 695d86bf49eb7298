// The runner under stress, for ThreadSanitizer: chains of ops with every kind of wait, with more and fewer threads than runs of tasks,
// and with failures. Exit status 0: every result was right.
#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "runner.h"

namespace {

int failures = 0;

void expect(bool good, const std::string& text) {
  if (good) return;
  ++failures;
  std::printf("%s\n", text.c_str());
}

int64_t real_threads = 2;  // that join a parallel region, whatever was asked for

void on_threads(int64_t, void (*body)(void*), void* context) {
  std::vector<std::thread> crew;
  for (int64_t i = 1; i < real_threads; ++i) crew.emplace_back(body, context);
  body(context);
  for (std::thread& one : crew) one.join();
}

// y[i] = x[i - reach] + ... + x[i + reach] + residual[i] for `pixels` pixels of one float, some of them per task. With a first phase, x is
// copied to shared memory first.
class WindowSum final : public fb::Op {
 public:
  WindowSum(int64_t pixels, int64_t tasks, int64_t reach, int64_t first_phase, bool fails = false)
      : Op(fb::OpSpec()), pixels_(pixels), tasks_(tasks), reach_(reach), first_phase_(first_phase), fails_(fails) {}
  int64_t tasks() const override { return first_phase_ + tasks_; }
  int64_t first_phase_tasks() const override { return first_phase_; }
  void run(int64_t task, const fb::Pointers& p, const fb::Worker&) const override {
    if (fails_ && task == tasks_ / 2) throw std::runtime_error("no");
    if (task < first_phase_) {
      for (int64_t i = task * pixels_ / first_phase_; i < (task + 1) * pixels_ / first_phase_; ++i) p.shared[i] = p.x[i];
      return;
    }
    const float* x = first_phase_ > 0 ? p.shared : p.x;
    const fb::Range own = written(task);
    for (int64_t i = own.begin; i < own.end; ++i) {
      float sum = p.residual != nullptr ? p.residual[i] : 0;
      for (int64_t j = std::max<int64_t>(0, i - reach_); j < std::min(pixels_, i + reach_ + 1); ++j) sum += x[j];
      p.y[i] = sum;
    }
  }
  fb::Range input_pixels(int64_t task) const override {
    if (first_phase_ > 0) return task < first_phase_ ? fb::Range{task * pixels_ / first_phase_, (task + 1) * pixels_ / first_phase_} : fb::Range{0, 0};
    const fb::Range own = written(task);
    return {std::max<int64_t>(0, own.begin - reach_), std::min(pixels_, own.end + reach_)};
  }
  fb::Range residual_pixels(int64_t task) const override { return task < first_phase_ ? fb::Range{0, 0} : written(task); }
  fb::Range tasks_writing(fb::Range pixels) const override {
    int64_t begin = first_phase_, end = tasks();
    while (begin < end && written(begin).end <= pixels.begin) ++begin;
    while (end > begin && written(end - 1).begin >= pixels.end) --end;
    return {begin, end};
  }

 private:
  fb::Range written(int64_t task) const { return {(task - first_phase_) * pixels_ / tasks_, (task - first_phase_ + 1) * pixels_ / tasks_}; }
  int64_t pixels_, tasks_, reach_, first_phase_;
  bool fails_;
};

constexpr int64_t kPixels = 240;
constexpr int kSteps = 24;

struct Chain {
  fb::TaskList list;
  std::vector<std::vector<float>> values{kSteps + 1, std::vector<float>(kPixels)};
  std::vector<std::vector<float>> shared{kSteps, std::vector<float>(kPixels)};
  std::vector<fb::Pointers> pointers{kSteps};

  explicit Chain(int failing = -1) {
    const int64_t counts[] = {1, 2, 3, 5, 7, 16, 17, 40, 240};
    for (int64_t i = 0; i < kPixels; ++i) values[0][i] = static_cast<float>(i % 5);
    for (int step = 0; step < kSteps; ++step) {
      const int64_t first_phase = step % 5 == 3 ? 1 + step % 4 : 0;
      std::vector<fb::Dependency> waits;
      if (step > 0) waits.push_back({step - 1, step % 7 == 6 ? fb::Wait::whole : fb::Wait::input_rows});
      if (step > 2 && step % 3 == 0) waits.push_back({step - 3, fb::Wait::residual_rows});
      list.add(std::make_shared<WindowSum>(kPixels, counts[step % 9], step % 4 == 0, first_phase, step == failing), waits);
      fb::Pointers& p = pointers[static_cast<size_t>(step)];
      p.x = values[step].data();
      p.y = values[step + 1].data();
      p.shared = shared[step].data();
      p.residual = step > 2 && step % 3 == 0 ? values[step - 2].data() : nullptr;
    }
  }
};

}  // namespace

int main() {
  fb::set_parallel(on_threads, [] { return int64_t{3}; });
  Chain plain;
  real_threads = 1;
  expect(plain.list.run(plain.pointers, 1), "one thread: the run was left out");
  for (int round = 0; round < 60; ++round)
    for (int threads : {0, 2, 3, 8}) {
      real_threads = 1 + round % 4;  // fewer or more than asked for: only speed may depend on it
      Chain chain;
      expect(chain.list.run(chain.pointers, threads), "the run was left out");
      expect(chain.values == plain.values, std::to_string(threads) + " runs of tasks, " + std::to_string(real_threads) + " threads: wrong values");
    }
  real_threads = 3;
  for (const int threads : {1, 3})
    for (int failing = 0; failing < kSteps; ++failing) {
      Chain chain(failing);
      bool thrown = false;
      try {
        chain.list.run(chain.pointers, threads);
      } catch (const std::runtime_error&) {
        thrown = true;
      }
      expect(thrown, "a failing task was not reported");
    }
  for (int round = 0; round < 20; ++round) {
    Chain chain;
    expect(!chain.list.run(chain.pointers, round == 0 ? 1 : 3, -1, [] { return false; }), "a check that says no was not reported");
  }
  return failures == 0 ? 0 : 1;
}
