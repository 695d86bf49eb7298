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

double peak_gflops(double seconds, int threads) {
  return 1e-9 * rate(seconds, threads, [] { return 0; }, [](int) {
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

}  // namespace fb
