// Elements of a program's values: weights as they are stored.
#pragma once

#include "common/simd.h"
#include "incremental_program.h"

namespace fastgen::incremental {

// A vector of weights in the type of the arithmetic.
template <class T, class W>
FASTGEN_INLINE Vec<T> load_weights(const W* p) {
  if constexpr (std::is_same_v<T, opmath_t<W>>) return load(p);
  else return Vec<T>([p](auto i) { return static_cast<T>(widen(p[i])); });
}

}  // namespace fastgen::incremental
