#include "map_memory.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fb::map_memory {

#if defined(__linux__)

namespace {

constexpr size_t kGrain = 64;
constexpr size_t kStep = size_t{64} << 20;      // addresses become usable in such steps
constexpr size_t kMostRange = size_t{1} << 40;  // reserved addresses cost nothing; where a limit forbids so many, half, and so on
constexpr size_t kLeastRange = size_t{256} << 20;
constexpr size_t kHugePage = size_t{2} << 20;

size_t rounded_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

class Range {
 public:
  void* take(size_t bytes) {
    if (bytes > kMostRange || !reserve()) return nullptr;
    const size_t size = rounded_up(bytes == 0 ? 1 : bytes, kGrain);
    auto found = by_size_.lower_bound({size, 0});
    if (found == by_size_.end()) {
      if (!grow(size)) return nullptr;
      found = by_size_.lower_bound({size, 0});
    }
    const auto [room, offset] = *found;
    erase(offset, room);
    if (room > size) insert(offset + size, room - size);
    live_[offset] = size;
    live_bytes_ += size;
    if (offset + size > held_) held_ = offset + size;
    return base_ + offset;
  }

  bool give(void* data) {
    const auto found = live_.find(static_cast<size_t>(static_cast<char*>(data) - base_));
    if (found == live_.end()) return false;
    size_t offset = found->first, size = found->second;
    live_.erase(found);
    live_bytes_ -= size;
    auto next = free_.lower_bound(offset);
    if (next != free_.end() && next->first == offset + size) {
      const auto [at, more] = *next;
      erase(at, more);
      size += more;
    }
    next = free_.lower_bound(offset);
    if (next != free_.begin()) {
      const auto [at, before] = *std::prev(next);
      if (at + before == offset) {
        erase(at, before);
        offset = at;
        size += before;
      }
    }
    insert(offset, size);
    return true;
  }

  Usage usage() const { return {live_bytes_, held_}; }

  size_t release() {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_t total = 0, end = 0;
    for (const auto& [offset, size] : live_) end = offset + size > end ? offset + size : end;
    for (const auto& [offset, size] : free_) {
      const size_t from = rounded_up(offset, page),
                   to = (offset + size < held_ ? offset + size : rounded_up(held_, page)) / page * page;
      if (from >= to) continue;
      madvise(base_ + from, to - from, MADV_DONTNEED);
      total += to - from;
    }
    held_ = end;
    return total;
  }

 private:
  bool reserve() {
    for (size_t size = kMostRange; base_ == nullptr && size >= kLeastRange; size /= 2) {
      void* found = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (found == MAP_FAILED) continue;
      const auto address = reinterpret_cast<uintptr_t>(found);
      const size_t skip = rounded_up(address, kHugePage) - address;
      base_ = static_cast<char*>(found) + skip;
      size_ = size - skip;
    }
    return base_ != nullptr;
  }

  // Makes a free block of `size` bytes at the end of what is usable.
  bool grow(size_t size) {
    size_t room = 0;  // free already, right before the end
    if (!free_.empty()) {
      const auto& [offset, last] = *free_.rbegin();
      if (offset + last == usable_) room = last;
    }
    const size_t more = rounded_up(size - room, kStep);
    if (more > size_ || usable_ > size_ - more) return false;
    if (mprotect(base_ + usable_, more, PROT_READ | PROT_WRITE) != 0) return false;
    madvise(base_ + usable_, more, MADV_HUGEPAGE);  // a wish: where it is refused, small pages serve as well
    if (room > 0) erase(usable_ - room, room);
    insert(usable_ - room, room + more);
    usable_ += more;
    return true;
  }

  void insert(size_t offset, size_t size) {
    free_[offset] = size;
    by_size_.insert({size, offset});
  }

  void erase(size_t offset, size_t size) {
    free_.erase(offset);
    by_size_.erase({size, offset});
  }

  char* base_ = nullptr;
  size_t size_ = 0, usable_ = 0, held_ = 0, live_bytes_ = 0;
  std::map<size_t, size_t> free_;                // offset -> bytes; no two touch
  std::set<std::pair<size_t, size_t>> by_size_;  // the same, (bytes, offset)
  std::unordered_map<size_t, size_t> live_;
};

// Never destroyed: tensors may outlive everything else of the process.
struct Shared {
  std::mutex mutex;
  Range range;
};

Shared& shared() {
  static Shared* const one = [] {
    auto* made = new Shared;
    pthread_atfork([] { shared().mutex.lock(); }, [] { shared().mutex.unlock(); }, [] { shared().mutex.unlock(); });
    return made;
  }();
  return *one;
}

}  // namespace

void* take(size_t bytes) {
  const std::lock_guard<std::mutex> lock(shared().mutex);
  return shared().range.take(bytes);
}

void give(void* data) noexcept {
  const std::lock_guard<std::mutex> lock(shared().mutex);
  if (shared().range.give(data)) return;
  std::fputs("fast_backbones: a feature map was freed twice, or is not one\n", stderr);
  std::abort();
}

Usage usage() {
  const std::lock_guard<std::mutex> lock(shared().mutex);
  return shared().range.usage();
}

size_t release() {
  const std::lock_guard<std::mutex> lock(shared().mutex);
  return shared().range.release();
}

#else  // elsewhere malloc decides

void* take(size_t bytes) { return std::aligned_alloc(64, (bytes + 63) / 64 * 64); }
void give(void* data) noexcept { std::free(data); }
Usage usage() { return {0, 0}; }
size_t release() { return 0; }

#endif

}  // namespace fb::map_memory
