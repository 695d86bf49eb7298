#include "peaks.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <mutex>

#include "../memory.h"
#include "../plan.h"

namespace fb {

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Runs `body` (returns work done) on all threads until `seconds` have passed; work per second, summed over threads.
template <typename Body>
double rate(double seconds, int threads, const Body& body) {
  struct Context {
    const Body& body;
    double seconds;
    double total = 0;
    std::mutex mutex;
  } context{body, seconds, 0, {}};
  const auto measure = [](void* pointer) {
    Context& c = *static_cast<Context*>(pointer);
    double work = 0;
    const double start = now();
    double elapsed = 0;
    do {
      work += c.body();
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

double peak_gflops(double seconds, int threads) {
  return 1e-9 * rate(seconds, threads, [] {
           constexpr int64_t kRounds = 200000;
#if defined(__x86_64__)
           if (isa() == Isa::avx512) return peaks::fma_avx512(kRounds);
           if (isa() == Isa::avx2) return peaks::fma_avx2(kRounds);
#endif
           return peaks::fma_portable(kRounds);
         });
}

// Bytes read plus bytes written by memcpy between blocks too large for the caches.
double copy_gbps(double seconds, int threads) {
  constexpr int64_t kFloats = 16 << 20;  // 64 MiB
  return 1e-9 * rate(seconds, threads, [] {
           static thread_local AlignedFloats from, to;
           float* source = from.reserve(kFloats);
           float* target = to.reserve(kFloats);
           static thread_local bool touched = false;
           if (!touched) {
             std::memset(source, 0, kFloats * 4);
             std::memset(target, 0, kFloats * 4);
             touched = true;
             return 0.0;
           }
           std::memcpy(target, source, kFloats * 4);
           return 2.0 * kFloats * 4;
         });
}

}  // namespace fb
