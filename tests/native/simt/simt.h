// Runs CUDA kernels on the CPU: each thread of a block is a fiber, and fibers change places at barriers.
//
//   for each block of the grid            one after the other: __shared__ is static memory
//     for each fiber that is not done     first to last, or last to first (simt::backwards)
//       run until its next barrier        __syncthreads, or a warp's exchange: shuffles, ldmatrix, mma
//
// What it finds: wrong indices, wrong fragments, barriers that not all threads reach, copies that nobody waited for
// (cp.async happens at its wait), and, by running in both orders, most reads that no barrier protects. What it cannot
// find: everything about time.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 {
  uint32_t x, y;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

inline bool backwards = false;
inline const char* error = nullptr;

constexpr int kLanes = 32;
constexpr size_t kStack = 128 << 10;

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;  // of 16; the rest becomes zero
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 thread;
  int number = 0;
  bool done = false;
  std::vector<Copy> copies;  // asked for and not yet waited for
};

// What the lanes of a warp show each other.
struct Warp {
  Barrier barrier;
  const void* pointers[kLanes];
  uint32_t words[kLanes][6];
  float sums[kLanes];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  std::function<void()> body;
  Fiber* running = nullptr;
  ucontext_t scheduler;
  bool progress = false;
};

inline Block* block = nullptr;

inline int lane() { return block->running->number % kLanes; }
inline Warp& warp() { return block->warps[block->running->number / kLanes]; }
inline int threads() { return static_cast<int>(block->fibers.size()); }

inline void yield() {
  Fiber* self = block->running;
  swapcontext(&self->context, &block->scheduler);
}

inline void wait(Barrier& barrier, int members) {
  const unsigned before = barrier.generation;
  if (++barrier.arrived == members) {
    barrier.arrived = 0, ++barrier.generation, block->progress = true;
  } else {
    while (barrier.generation == before) yield();
  }
}

inline void meet() { wait(warp().barrier, kLanes); }

inline void enter() {
  block->body();
  block->running->done = block->progress = true;
  swapcontext(&block->running->context, &block->scheduler);
}

// Runs one block to its end; false when its threads wait for one another for ever.
inline bool run(Block& all) {
  block = &all;
  const int count = threads();
  for (int left = count; left > 0;) {
    all.progress = false, left = 0;
    for (int i = 0; i < count; ++i) {
      Fiber& fiber = all.fibers[backwards ? count - 1 - i : i];
      if (fiber.done) continue;
      all.running = &fiber, threadIdx = fiber.thread;
      swapcontext(&all.scheduler, &fiber.context);
      left += !fiber.done;
    }
    if (left > 0 && !all.progress) return false;
  }
  return true;
}

template <typename Kernel, typename... Args>
void launch(Kernel kernel, dim3 grid, dim3 size, Args... args) {
  gridDim = grid, blockDim = size;
  const int count = static_cast<int>(size.x * size.y * size.z);
  if (count % kLanes != 0) {
    error = "a block is not whole warps";
    return;
  }
  Block all;
  all.fibers = std::vector<Fiber>(count);
  all.body = [=] { kernel(args...); };
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        all.warps.assign(count / kLanes, Warp());
        all.barrier = Barrier();
        for (int i = 0; i < count; ++i) {
          Fiber& fiber = all.fibers[i];
          fiber.done = false, fiber.number = i, fiber.copies.clear();
          fiber.thread = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
          getcontext(&fiber.context);
          fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = kStack;
          fiber.context.uc_link = nullptr;
          makecontext(&fiber.context, enter, 0);
        }
        if (!run(all)) {
          error = "a barrier that not all threads reach";
          return;
        }
      }
    }
  }
}

inline float shuffle_down(float value, int distance) {
  Warp& mine = warp();
  mine.sums[lane()] = value;
  meet();
  const int from = lane() + distance;
  const float found = from < kLanes ? mine.sums[from] : value;
  meet();
  return found;
}

// ldmatrix.x4: lane i points at row i % 8 of matrix i / 8, 16 bytes; lane l gets word l % 4 of row l / 4 of each.
inline void load_matrices(uint32_t (&to)[4], const void* row) {
  Warp& mine = warp();
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) error = "ldmatrix: a row is not aligned";
  mine.pointers[lane()] = row;
  meet();
  for (int m = 0; m < 4; ++m) {
    std::memcpy(&to[m], static_cast<const char*>(mine.pointers[m * 8 + lane() / 4]) + lane() % 4 * 4, 4);
  }
  meet();
}

// mma.m16n8k16: sums += a b. Lane l = 4 g + t has of a: rows g, g + 8 of columns 2t, 2t + 1 (words 0, 1) and of columns
// 2t + 8, 2t + 9 (words 2, 3); of b: rows 2t, 2t + 1 and 2t + 8, 2t + 9 of column g; of the sums: columns 2t, 2t + 1
// of row g, then of row g + 8.
template <typename T>
void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Warp& mine = warp();
  std::memcpy(mine.words[lane()], a, sizeof a);
  std::memcpy(mine.words[lane()] + 4, b, sizeof b);
  meet();
  const int g = lane() / 4, t = lane() % 4;
  const auto half = [&](int of, int word, int k) {
    T pair[2];
    std::memcpy(pair, &mine.words[of][word], 4);
    return static_cast<float>(pair[k % 2]);
  };
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float left = half(4 * g + k % 8 / 2, k / 8 * 2 + i / 2, k);
      const float right = half(4 * column + k % 8 / 2, 4 + k / 8, k);
      sums[i] = std::fmaf(left, right, sums[i]);
    }
  }
  meet();
}

inline void copy_later(void* to, const void* from, int bytes) { block->running->copies.push_back({to, from, bytes}); }

inline void wait_for_copies() {
  for (const Copy& copy : block->running->copies) {
    std::memset(copy.to, 0, 16);
    if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
  }
  block->running->copies.clear();
}

}  // namespace simt
