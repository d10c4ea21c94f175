// philox_normal: standard normals [N, *], every sample from its own seed.
//
// Work is cut into pieces of kPiece elements of one sample; a piece depends on (seed, step, first element) alone, so
// neither threads nor batch change a bit.
#include "common/philox.h"
#include "common/tensor.h"

namespace fastgen {
namespace {

constexpr std::int64_t kPiece = 8192;  // 32 KB: fits the first-level cache, and is some 5 us of work

Tensor philox_normal(const Tensor& seeds, std::vector<std::int64_t> shape, std::int64_t step) {
  FASTGEN_CHECK(seeds.dim() == 1 && seeds.scalar_type() == ScalarType::Long, "philox_normal: seeds must be int64 [N]");
  FASTGEN_CHECK(!shape.empty() && shape[0] == seeds.size(0), "philox_normal: shape must begin with the number of seeds");
  std::int64_t size = 1;
  for (std::size_t d = 0; d < shape.size(); ++d) {
    FASTGEN_CHECK(shape[d] >= 0, "philox_normal: shape must not be negative");
    FASTGEN_CHECK(d == 0 || !__builtin_mul_overflow(size, shape[d], &size), "philox_normal: shape has more than 2^63 elements");
  }
  Tensor out = empty_contiguous(shape, ScalarType::Float);
  float* data = static_cast<float*>(out.mutable_data_ptr());
  const auto* seed = static_cast<const std::int64_t*>(seeds.data_ptr());
  const std::int64_t stride = seeds.stride(0), pieces = (size + kPiece - 1) / kPiece;
  parallel(shape[0] * pieces, shape[0] * size * kNormalWork, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t n = item / pieces, first = item % pieces * kPiece;
      fill_normals(data + n * size + first, static_cast<std::uint64_t>(seed[n * stride]), static_cast<std::uint32_t>(step), first,
                   std::min(kPiece, size - first));
    }
  });
  return out;
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("philox_normal", TORCH_BOX(&fastgen::philox_normal)); }
