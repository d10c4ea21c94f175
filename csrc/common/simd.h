// SIMD for every kernel, by what it is for. These headers alone hold intrinsics, for what std::experimental::simd cannot say.
#pragma once

#include "common/simd/activations.h"     // tanh, sigmoid and ELU of any x
#include "common/simd/arithmetic.h"      // fused multiply-add, sums, rounding, reciprocal, clamp
#include "common/simd/integer.h"         // words of 32 bits, for Philox
#include "common/simd/load_store.h"      // any dtype to a vector and back; loops over a row
#include "common/simd/matrix_tiles.h"    // products of whole tiles of bfloat16 (AMX)
#include "common/simd/pairs.h"           // two bfloat16 a lane and their dot product
#include "common/simd/transcendental.h"  // exp, log, sigmoid, silu
#include "common/simd/transpose.h"       // a square of vectors turned over
#include "common/simd/vector.h"          // vectors, dtypes as they are stored, single elements
