// What forward and backward of layer_norm share: sizes, and the small tensors [C] and [N, C].
#pragma once

#include <algorithm>

#include "common/moments.h"
#include "common/slices.h"

namespace fastgen::layer_norm {

struct Problem {
  SliceSizes sizes;
  Parameter gate;
  Modulation modulation;

  Problem(const Tensor& like, const OptionalTensor& gate, const OptionalTensor& weight, const OptionalTensor& bias,
          const OptionalTensor& scale, const OptionalTensor& shift)
      : sizes(rows_of(like)), gate("layer_norm", "gate", gate, true, sizes.n, sizes.size),
        modulation{Parameter("layer_norm", "weight", weight, false, sizes.n, sizes.size),
                   Parameter("layer_norm", "bias", bias, false, sizes.n, sizes.size),
                   Parameter("layer_norm", "scale", scale, true, sizes.n, sizes.size),
                   Parameter("layer_norm", "shift", shift, true, sizes.n, sizes.size)} {}

 private:
  static SliceSizes rows_of(const Tensor& t) {
    FASTGEN_CHECK(t.dim() >= 2, "layer_norm: what is normalised must be [N, *, C]");
    check_floating("layer_norm", "input", t);
    return {t, t.dim() - 1};
  }
};

// `t` has the sizes and the dtype of `like`.
inline void check_same(const char* name, const Tensor& t, const Tensor& like) {
  FASTGEN_CHECK(sizes_of(t) == sizes_of(like) && t.scalar_type() == like.scalar_type(), "layer_norm: ", name,
                " must have the shape and the dtype of what is normalised");
}

inline Tensor none(ScalarType dtype) { return empty_contiguous({0}, dtype); }

}  // namespace fastgen::layer_norm
