// Cuts the work so that a task takes about 10 us and its weights stay in L2 while its pixels pass. Weights that do not fit are cut
// into panels across tasks; a copy of the input is then made once, in a first phase, for all of them.
#include "cut.h"

#include <algorithm>

#include "../ops.h"

namespace fb::conv2d {

namespace {

constexpr int64_t kAllWeightBytesInL2 = 384 * 1024;  // weights up to this are walked whole by every task
constexpr int64_t kWeightBytesInL2 = 256 * 1024;     // larger ones in parts of about this
constexpr int64_t kInputBytesInL2 = 400 * 1024;
// A pixel of more floats counts as one of these, where it is read in place: to cut pixels apart reads all the weights again, from memory where
// they are many. VGG's first linear layer (25088 to 4096) took 34.9 ms for 16 images in four blocks of pixels, and takes 18 in one.
constexpr int64_t kDeepInput = 1024;
constexpr int64_t kTaskProducts = 3 << 20;   // multiply-adds of a task: about 10 us
constexpr int64_t kFewestTasks = 4;          // of a step worth sharing: the next step often waits for all of it
constexpr int64_t kSharedProducts = 1 << 20;
constexpr int64_t kCopyFloats = 64 * 1024;   // of a first-phase task
constexpr int64_t kFetchingTasks = 4;        // of the next step's weights: the last tasks of a step fetch this much
constexpr int64_t kFetchedFloats = 64 * 1024;

}  // namespace

int64_t panels_in_l2(int64_t panel_floats, int64_t panels) {
  const int64_t panel_bytes = panel_floats * 4;
  return panels * panel_bytes <= kAllWeightBytesInL2 ? panels : std::clamp<int64_t>(kWeightBytesInL2 / panel_bytes, 1, panels);
}

Cut::Cut(const Kernels& kernels, Form form, const Product& product)
    : product_(product), panels_(ceil_div(product.channels, kernels.panel)), panel_floats_(product.depth * kernels.panel) {
  panel_blocks_ = product.whole_panels ? 1 : ceil_div(panels_, panels_in_l2(panel_floats_, panels_));
  by_pixel_ = form == Form::flat || (form == Form::gathered && split() > 1);
  const int64_t unit = by_pixel_ ? 1 : product.columns;  // a block is a number of units: pixels, or rows of one image
  const int64_t units = by_pixel_ ? product.images * product.rows * product.columns : product.rows;
  const int64_t floats = form == Form::flat ? std::min(product.unit_floats, kDeepInput) : product.unit_floats;
  const int64_t unit_bytes = (form == Form::rows ? floats : unit * floats) * 4;
  const int64_t in_cache = std::max<int64_t>(1, kInputBytesInL2 / std::max<int64_t>(1, unit_bytes));
  const int64_t products = unit * product.depth * ceil_div(product.channels, panel_blocks_);  // of a unit in one task
  const int64_t wanted = std::max(ceil_div(kTaskProducts, products), ceil_div(4 * kernels.max_rows, unit));
  int64_t blocks = ceil_div(units, std::clamp<int64_t>(std::min(wanted, in_cache), 1, units));
  const int64_t apart = (by_pixel_ ? 1 : product.images) * split();  // tasks for each block
  if (apart * blocks < kFewestTasks && apart * units * products >= kSharedProducts) {
    const int64_t finest = ceil_div(units, ceil_div(kernels.max_rows, unit));  // a tile each
    blocks = std::max(blocks, std::min(ceil_div(kFewestTasks, apart), finest));
  }
  units_per_block_ = ceil_div(units, blocks);
  blocks_per_image_ = ceil_div(units, units_per_block_);
  pixel_blocks_ = by_pixel_ ? blocks_per_image_ : product.images * blocks_per_image_;
  if (form != Form::flat && split() > 1) {
    rows_per_first_task_ = std::clamp<int64_t>(kCopyFloats / product.made_floats, 1, ceil_div(product.made_rows, 4));
    first_phase_ = ceil_div(product.made_rows, rows_per_first_task_);
  }
}

Cut::Part Cut::part(int64_t task) const {
  task -= first_phase_;
  Part part;
  part.pixel_block = task / split();
  part.pixels = block_pixels(part.pixel_block);
  part.group = task % split() / panel_blocks_;
  part.panel_block = task % panel_blocks_;
  part.panels = {panels_before(part.panel_block), panels_before(part.panel_block + 1)};
  return part;
}

Range Cut::made_rows(int64_t task) const {
  return {task * rows_per_first_task_, std::min((task + 1) * rows_per_first_task_, product_.made_rows)};
}

Range Cut::tasks_writing(Range pixels) const {
  if (pixels.begin >= pixels.end) return {0, 0};
  return {first_phase_ + block_of(pixels.begin) * split(), first_phase_ + (block_of(pixels.end - 1) + 1) * split()};
}

Range Cut::block_pixels(int64_t block) const {
  const int64_t rows = product_.rows, columns = product_.columns;
  if (by_pixel_) return {block * units_per_block_, std::min((block + 1) * units_per_block_, product_.images * rows * columns)};
  const int64_t image = block / blocks_per_image_, row = block % blocks_per_image_ * units_per_block_;
  return {(image * rows + row) * columns, (image * rows + std::min(row + units_per_block_, rows)) * columns};
}

int64_t Cut::block_of(int64_t pixel) const {
  if (by_pixel_) return pixel / units_per_block_;
  const int64_t row = pixel / product_.columns;
  return row / product_.rows * blocks_per_image_ + row % product_.rows / units_per_block_;
}

// Later panels of this step, at its end the beginning of the next step's.
// (Every task fetching a share of up to 8 MB of the next step's weights gained nothing: 14.2 against 14.2 ms.)
Ahead Cut::next_weights(const Pointers& x, const Part& part, const Worker& worker) const {
  const int64_t panels = part.panels.end - part.panels.begin;
  if (split() > 1 && worker.left > 0) {
    const int64_t next = (part.group * panel_blocks_ + part.panel_block + 1) % split();
    const float* weights = x.weight + (next / panel_blocks_ * panels_ + panels_before(next % panel_blocks_)) * panel_floats_;
    return {weights, weights + panels * panel_floats_, nullptr, nullptr};
  }
  if (split() > 1) return first_of_next_step(x, worker, 0, panels * panel_floats_);
  if (worker.left >= kFetchingTasks) return {};
  const int64_t share = kFetchedFloats / kFetchingTasks;
  return first_of_next_step(x, worker, (kFetchingTasks - 1 - worker.left) * share, share);
}

std::string Cut::tasks_text() const {
  return (first_phase_ > 0 ? std::to_string(first_phase_) + "+" : "") + std::to_string(pixel_blocks_) + "x" + std::to_string(split()) + " tasks";
}

}  // namespace fb::conv2d
