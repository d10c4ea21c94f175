// Read before a source whose object the variants avx512 and avx512_bf16 share (setup.py): a store of bfloat16, for which the latter has
// an instruction, does not compile there.
#pragma once

#include "common/simd.h"

namespace fastgen {

template <>
inline constexpr bool kMayBeStored<BFloat16> = false;

}  // namespace fastgen
