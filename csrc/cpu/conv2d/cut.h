// How a product, [output pixels] x [panels of output channels], is cut into tasks, and how its input is read.
#pragma once

#include "../op.h"
#include "conv2d.h"

namespace fb::conv2d {

// flat: the input is read in place, all images one row of pixels. gathered: the input of every output pixel is made next to each other
// and is one row, too. rows: row by row from a zero-padded copy of the input.
enum class Form { flat, gathered, rows };

// Panels whose weights are walked together, again and again, by the tiles of a task.
int64_t panels_in_l2(int64_t panel_floats, int64_t panels);

class Cut {
 public:
  struct Product {
    int64_t images, rows, columns;  // of output
    int64_t groups, depth, channels;  // products per output, output channels of a group
    int64_t unit_floats;              // of input that an output row reads first, in one group (rows), or an output pixel (else)
    int64_t made_rows, made_floats;   // rows of input, over all images, that are copied or made, and the floats of each, in all groups
    bool whole_panels;                // a task computes all panels of its pixels, however large the weights are
  };

  Cut(const Kernels& kernels, Form form, const Product& product);

  int64_t split() const { return product_.groups * panel_blocks_; }  // tasks of a block of pixels
  int64_t first_phase() const { return first_phase_; }               // tasks that make the input for all others; 0: each makes its own
  int64_t tasks() const { return first_phase_ + pixel_blocks_ * split(); }
  int64_t largest_block() const { return units_per_block_ * (by_pixel_ ? 1 : product_.columns); }  // output pixels of a task, at most

  // What a task of the second phase computes.
  struct Part {
    Range pixels;  // of output
    int64_t pixel_block, group, panel_block;
    Range panels;  // of the group
  };
  Part part(int64_t task) const;
  Range pixels(int64_t task) const { return block_pixels((task - first_phase_) / split()); }
  Range made_rows(int64_t task) const;                                                       // by a task of the first phase
  Range tasks_writing(Range pixels) const;

  // Weights of the task that this thread probably takes next.
  Ahead next_weights(const Pointers& x, const Part& part, const Worker& worker) const;
  bool weights_in_parts() const { return pixel_blocks_ == 1 && split() > 1; }

  std::string tasks_text() const;  // "4+3x2 tasks"

 private:
  Range block_pixels(int64_t block) const;
  int64_t block_of(int64_t pixel) const;
  int64_t panels_before(int64_t panel_block) const { return panel_block * panels_ / panel_blocks_; }

  Product product_;
  int64_t panels_, panel_floats_;
  bool by_pixel_ = false;  // a block is a run of pixels over all images, else rows of one image
  int64_t units_per_block_ = 1, blocks_per_image_ = 1, pixel_blocks_ = 1, panel_blocks_ = 1, rows_per_first_task_ = 1, first_phase_ = 0;
};

}  // namespace fb::conv2d
