// The torch-free interface of the CPU kernels: what to compute (OpSpec), on which memory (Pointers), cut into tasks (Op).
//
// Everything is float32, but packed weights and copies of the input may be pairs of bfloat16 (conv2d/conv2d.h). A feature map is NHWC: a pixel is c contiguous floats, pixels lie ld floats apart, rows of pixels
// follow each other without gaps. P = (h + pad_h + pad_bottom - dilation_h (r - 1) - 1) / stride_h + 1, Q likewise.
//
// An Op is immutable after make_op. Its tasks write disjoint parts of y; the value of an output element never depends on how
// the work is cut, so results are the same bits for any number of threads and for a sample alone or in a batch.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "activation.h"

namespace fb {

struct OpSpec {
  std::string kind;
  int64_t n = 1, h = 1, w = 1, c = 1, k = 1;
  int64_t r = 1, s = 1, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1, groups = 1;
  int64_t pad_bottom = -1, pad_right = -1;  // padding behind the image; -1: as much as in front, pad_h and pad_w
  int64_t ldx = 0, ldy = 0, ldr = 0;  // pixel strides in floats of x, y, residual; 0 means dense
  int64_t gated = 0;                  // 1: there is a gate
  int64_t ldg = 0;                    // floats between the gates of two images; 0 means k
  int64_t activation = kNone;
  int64_t act_from = 0;               // output channels below this one get no activation
  int64_t pre = 0;                    // 1: x is scaled and shifted per channel before it is used; padding stays zero
  int64_t pre_activation = kNone;     // of what is read, after pre
  int64_t depth_activation = kNone;   // separable_conv2d: between the depthwise and the 1x1 convolution
  int64_t nchw_in = 0;                // x is planar, [n, c, h, w]
  int64_t ceil_mode = 0;              // pooling output size rounds up
  int64_t count_include_pad = 1;      // avg_pool2d divides by the whole window, else by its part inside the image
  int64_t divisor = 0;                // avg_pool2d divides by this when it is not 0
  int64_t out_h = 0, out_w = 0;       // avg_pool2d, adaptive when not 0, and upsample_nearest2d: the output size
  int64_t size = 0;                   // local_response_norm: channels in the window
  int64_t bf16 = 0;                   // 1: x and weight are rounded to bfloat16 and multiplied in pairs; sums, epilogue and y stay float32
  int64_t tile = 0;                   // winograd_conv2d, 3x3: outputs per side of a tile, 2 or 4; 0: what suits the layer, or another window's only size
  int64_t real_points = 0;            // winograd_conv2d: 1: tiles of 4 have fewer products and about 4 times the error
  double alpha = 0, beta = 0, offset = 0;  // local_response_norm; alpha: the slope of leaky_relu
  double border = 0;                  // pad2d: what stands in the padding
  double eps = 0;                     // l2_normalize: no length is taken to be less; norms: what the variance is added to

  int64_t p() const;
  int64_t q() const;
  int64_t bottom() const { return pad_bottom < 0 ? pad_h : pad_bottom; }
  int64_t right() const { return pad_right < 0 ? pad_w : pad_right; }
  int64_t padded_h() const { return h + pad_h + bottom(); }
  int64_t padded_w() const { return w + pad_w + right(); }
};

struct Pointers {
  const float* x = nullptr;
  const float* weight = nullptr;  // packed by pack_weight; squared_distances: the centres
  const float* scale = nullptr;   // [k]: multiplies the sums before the bias is added
  const float* bias = nullptr;
  const float* residual = nullptr;
  const float* gate = nullptr;          // [n, k]: multiplies (scale * convolution + bias) before the residual is added
  const float* pre_scale = nullptr;     // [c]
  const float* pre_shift = nullptr;     // [c]
  const float* depth_weight = nullptr;  // separable_conv2d: packed as for depthwise_conv2d
  const float* depth_bias = nullptr;    // [c]
  float* y = nullptr;
  float* shared = nullptr;  // Op::shared_floats() of memory that phases of one op pass to each other
  // Packed weights of the step that comes next: the last tasks of this one fetch their beginning from memory while they compute.
  const float* next_weight = nullptr;
  int64_t next_weight_floats = 0;
  bool next_weight_in_parts = false;  // each thread begins that step in another part of them, not all at the beginning
};

// A thread and where it stands in its part of a step: it runs consecutive tasks.
struct Worker {
  float* scratch;      // Op::scratch_floats(), private to the running task
  int64_t index = 0;   // which part of the step's tasks, of `team` parts
  int64_t team = 1;
  bool first = true;   // this thread's first task of the step
  int64_t left = 0;    // tasks that it probably still runs after this one
};

struct Range {
  int64_t begin, end;
};

class Op {
 public:
  explicit Op(const OpSpec& spec) : spec_(spec) {}
  virtual ~Op() = default;

  const OpSpec& spec() const { return spec_; }
  virtual int64_t tasks() const = 0;             // of all phases together
  virtual int64_t first_phase_tasks() const { return 0; }  // tasks that must all be done before the others start; 0: one phase
  virtual int64_t scratch_floats() const { return 0; }     // private memory of a running task
  virtual int64_t shared_floats() const { return 0; }
  virtual bool weights_in_parts() const { return false; }  // consecutive tasks read consecutive parts of the weights, all on the same pixels
  virtual void run(int64_t task, const Pointers& pointers, const Worker& worker) const = 0;

  // Pixels (n*h*w index) of x that a task reads, and the tasks that write given pixels of y. The defaults mean "everything".
  virtual Range input_pixels(int64_t task) const;
  virtual Range residual_pixels(int64_t task) const;
  virtual Range tasks_writing(Range pixels) const;

  double flops() const;  // 2 * multiply-adds of the plain algorithm
  double bytes() const;  // compulsory traffic: x, weight, residual read once, y written once
  virtual std::string detail() const { return ""; }

 protected:
  OpSpec spec_;
};

std::unique_ptr<Op> make_op(const OpSpec& spec);  // throws std::invalid_argument with a sentence when it cannot
std::string refusal(const OpSpec& spec);          // "" when make_op accepts

int64_t packed_floats(const OpSpec& spec);
void pack_weight(const OpSpec& spec, const float* weight, float* out);  // weight [k, c/groups, r, s] contiguous

// Runs one op now on up to `threads` threads; 0 means the host library's own number.
void run_op(const OpSpec& spec, const Pointers& pointers, int threads);

// The host library's parallel region: calls body(context) once on each of up to n threads (n <= 0: as many as it has) and waits.
// The default runs on the calling thread only. ThreadCount says how many n <= 0 means.
using ParallelFor = void (*)(int64_t n, void (*body)(void*), void* context);
using ThreadCount = int64_t (*)();
void set_parallel(ParallelFor parallel_for, ThreadCount thread_count);
ParallelFor parallel();
int64_t thread_count();

}  // namespace fb
