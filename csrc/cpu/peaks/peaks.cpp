#include "peaks.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "../memory.h"
#include "../plan.h"

namespace fb {

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// On every thread: state = prepare(), then body(state), which returns the work it did, until `seconds` have passed. Work per second,
// summed over threads.
template <typename Prepare, typename Body>
double rate(double seconds, int threads, const Prepare& prepare, const Body& body) {
  struct Context {
    const Prepare& prepare;
    const Body& body;
    double seconds;
    double total = 0;
    std::mutex mutex;
  } context{prepare, body, seconds, 0, {}};
  const auto measure = [](void* pointer) {
    Context& c = *static_cast<Context*>(pointer);
    auto state = c.prepare();
    double work = 0;
    const double start = now();
    double elapsed = 0;
    do {
      work += c.body(state);
      elapsed = now() - start;
    } while (elapsed < c.seconds);
    const std::lock_guard<std::mutex> lock(c.mutex);
    c.total += work / elapsed;
  };
  if (threads == 1) {
    measure(&context);
  } else {
    parallel()(threads, measure, &context);
  }
  return context.total;
}

}  // namespace

double peak_gflops(double seconds, int threads, bool bf16) {
  if (bf16 && !has_bf16()) throw std::invalid_argument("peak_gflops: no AVX512-BF16 here");
  return 1e-9 * rate(seconds, threads, [] { return 0; }, [bf16](int) {
           constexpr int64_t kRounds = 200000;
#if defined(__x86_64__)
           if (bf16) return peaks::bf16_avx512(kRounds);
           if (isa() == Isa::avx512) return peaks::fma_avx512(kRounds);
           if (isa() == Isa::avx2) return peaks::fma_avx2(kRounds);
#endif
           return peaks::fma_portable(kRounds);
         });
}

// Bytes read plus bytes written by memcpy between blocks too large for the caches.
double copy_gbps(double seconds, int threads) {
  constexpr int64_t kFloats = 16 << 20;  // 64 MiB
  struct Blocks {
    AlignedFloats from, to;
    Blocks() {
      std::memset(from.reserve(kFloats), 0, kFloats * 4);
      std::memset(to.reserve(kFloats), 0, kFloats * 4);
    }
  };
  return 1e-9 * rate(seconds, threads, [] { return Blocks(); }, [](Blocks& blocks) {
           std::memcpy(blocks.to.reserve(kFloats), blocks.from.reserve(kFloats), kFloats * 4);
           return 2.0 * kFloats * 4;
         });
}

// Nanoseconds for a cache line to go from one thread to another and back; 0 where there is only one thread. About 100 between cores
// that share a cache, several times that between cores that do not.
double round_trip_ns(double seconds) {
  struct Game {
    double seconds;
    std::atomic<int> players{0};
    alignas(128) std::atomic<int64_t> ball{0};  // odd: the second player's; negative: over
    alignas(128) double nanoseconds = 0;
  } game{seconds};
  if (thread_count() < 2) return 0;
  parallel()(2, [](void* pointer) {
    Game& g = *static_cast<Game*>(pointer);
    const int me = g.players.fetch_add(1);
    if (me > 1) return;
    if (me == 1) {
      for (int64_t ball = g.ball.load(std::memory_order_acquire); ball >= 0; ball = g.ball.load(std::memory_order_acquire))
        if (ball % 2 == 1) g.ball.store(ball + 1, std::memory_order_release);
      return;
    }
    const double start = now();
    while (g.players.load() < 2 && now() - start < 0.1) {
    }
    if (g.players.load() < 2) {  // nobody else came: whoever comes late finds the game over
      g.ball.store(-1);
      return;
    }
    constexpr int kTrips = 100;
    int64_t trips = 0;
    g.nanoseconds = 1e30;
    for (const double begin = now(); now() - begin < g.seconds;) {
      const double from = now();
      for (int i = 0; i < kTrips; ++i, ++trips) {
        g.ball.store(2 * trips + 1, std::memory_order_release);
        while (g.ball.load(std::memory_order_acquire) != 2 * trips + 2) {
        }
      }
      g.nanoseconds = std::min(g.nanoseconds, 1e9 * (now() - from) / kTrips);  // the best: in others a thread had lost its core
    }
    g.ball.store(-1, std::memory_order_release);
  }, &game);
  return game.nanoseconds;
}

}  // namespace fb
