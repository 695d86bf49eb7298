// Types of the values of feature maps. Kernels compute in float32 whatever a map holds: values are converted where they are loaded
// and rounded, to nearest even, where they are stored (simd/element.h).
#pragma once

#include <cstdint>

namespace fb {

struct Bfloat16 {  // the upper half of a float32
  uint16_t bits;
};

struct Float16 {  // IEEE binary16
  uint16_t bits;
};

// The kernels of an op for maps of each type.
template <template <typename> class Kernels>
struct ForElements {
  Kernels<float> of_float;
  Kernels<Bfloat16> of_bfloat16;
  Kernels<Float16> of_float16;

  template <typename T>
  const Kernels<T>& of() const {
    return pick(static_cast<const Kernels<T>*>(nullptr));
  }

 private:
  const Kernels<float>& pick(const Kernels<float>*) const { return of_float; }
  const Kernels<Bfloat16>& pick(const Kernels<Bfloat16>*) const { return of_bfloat16; }
  const Kernels<Float16>& pick(const Kernels<Float16>*) const { return of_float16; }
};

}  // namespace fb
