// generator_normal: the normals that torch.randn draws from CPU generators, in parallel, and the states as it leaves them.
//
// torch draws a uniform for every element, then turns blocks of 16 into normals: elements j and j + 8 of a block are a pair of
// Box-Muller's. The words of MT19937 come one after another, but twisting them is an eighth of the work: so a thread owns a run of
// blocks, twists its way to the first of them, and tempers and transforms its own alone. Later runs are shorter by what the way
// there costs. A block depends on its words alone, so nothing of this changes a bit.
#include "cpu/generator_normal.h"

#include <cmath>
#include <numeric>
#include <tuple>

#include "common/simd/integer.h"
#include "common/tensor.h"

namespace fastgen {
namespace {

constexpr std::int64_t kBlock = 16;  // elements; half of them radii, half of them angles

// Words a uniform takes: torch fills 24 bits of a float from one, 53 of a double from two.
template <class T>
inline constexpr std::int64_t kWordsEach = std::is_same_v<T, double> ? 2 : 1;
template <class T>
inline constexpr std::int64_t kBlockWords = kBlock * kWordsEach<T>;

// The share of twisting in the work on a word, float32 on AVX2.
constexpr double kTwistShare = 0.15;

// The bits of a uniform as an integer, k 2^24 or 2^53 times it, of the words at p.
template <class A>
FASTGEN_INLINE Vec<A> scaled_uniform(VecU words) {
  const VecU y = tempered(words);
  if constexpr (std::is_same_v<A, float>) {
    return stdx::static_simd_cast<VecF>(bits_as<VecI>(VecU(y & 0x00ffffffu)));
  } else {
    // The first word of two is the high one. Under the exponents of 2^52 and 2^84 both parts are exact.
    const VecU64 pair = bits_as<VecU64>(y);
    const Vec<double> high = bits_as<Vec<double>>(VecU64((pair & 0x1fffffu) | 0x4530000000000000u)) - 0x1p84;
    return high + (bits_as<Vec<double>>(VecU64((pair >> 32) | 0x4330000000000000u)) - 0x1p52);
  }
}

// 2 pi times a uniform, rounded as torch rounds it: in vectors the product of floats; in scalar code, `wide`, that of doubles.
template <bool kWide, class A>
FASTGEN_INLINE Vec<A> angle_of(Vec<A> k) {
  constexpr double turn = 6.283185307179586;
  if constexpr (std::is_same_v<A, double>) {
    return k * (turn * 0x1p-53);
  } else if constexpr (kWide) {
    using Wide = stdx::rebind_simd_t<double, VecF>;
    return stdx::static_simd_cast<VecF>(stdx::static_simd_cast<Wide>(k) * (turn * 0x1p-24));
  } else {
    return k * (static_cast<float>(turn) * 0x1p-24f);
  }
}

// What is transformed at once: kVectors vectors of radii and as many of angles, which are kGroup blocks.
constexpr int kVectors = 4;
template <class A>
inline constexpr std::int64_t kGroup = kVectors * kWidth<A> / 8;

// sqrt(-2 ln(1 - u)) (cos, sin)(2 pi v) of the uniforms u and v.
template <class T, bool kWide>
FASTGEN_INLINE void transform_group(const std::uint32_t* words, T* out) {
  using A = opmath_t<T>;
  constexpr int width = kWidth<A>;
  constexpr A unit = std::is_same_v<A, double> ? static_cast<A>(0x1p-53) : static_cast<A>(0x1p-24);
  const auto load_words = [words](int element) { return VecU(words + element * kWordsEach<T>, stdx::element_aligned); };
  // The first element of vector i; a vector as wide as a block takes the halves of two.
  const auto place = [](int i) { return width == kBlock ? 2 * width * i : i * width / 8 * kBlock + i * width % 8; };
  Vec<A> radius[kVectors], angle[kVectors], sine[kVectors], cosine[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    VecU u = load_words(place(i)), v = load_words(place(i) + (width == kBlock ? width : 8));
    if constexpr (width == kBlock) std::tie(u, v) = std::make_tuple(low_halves(u, v), high_halves(u, v));
    radius[i] = madd<A>(scaled_uniform<A>(u), Vec<A>(-unit), Vec<A>(A(1)));
    angle[i] = angle_of<kWide, A>(scaled_uniform<A>(v));
  }
  log_scaled(radius, 0);
  for (int i = 0; i < kVectors; ++i) radius[i] = stdx::sqrt(radius[i] * A(-2));
  sincos<A>(angle, sine, cosine);
  for (int i = 0; i < kVectors; ++i) {
    // The zero makes a positive zero of a negative one, as torch's mean does.
    Vec<A> z0 = madd<A>(radius[i], cosine[i], Vec<A>(A(0))), z1 = madd<A>(radius[i], sine[i], Vec<A>(A(0)));
    if constexpr (width == kBlock) std::tie(z0, z1) = std::make_tuple(low_halves(z0, z1), high_halves(z0, z1));
    store(out + place(i), z0);
    store(out + place(i) + (width == kBlock ? width : 8), z1);
  }
}

// The next `blocks` blocks of the stream.
template <class T, bool kWide>
void draw_blocks(MersenneTwister& twister, T* out, std::int64_t blocks) {
  constexpr std::int64_t group = kGroup<opmath_t<T>>, words_each = kBlockWords<T>;
  while (blocks >= group) {
    const std::uint32_t* words = twister.peek(group * words_each);
    const std::int64_t count = std::min(blocks, twister.available() / words_each) / group * group;
    for (std::int64_t i = 0; i < count; i += group) transform_group<T, kWide>(words + i * words_each, out + i * kBlock);
    twister.skip(count * words_each);
    out += count * kBlock, blocks -= count;
  }
  if (blocks > 0) {
    alignas(64) std::uint32_t words[group * words_each] = {};
    alignas(64) T buffer[group * kBlock];
    std::memcpy(words, twister.peek(blocks * words_each), blocks * words_each * sizeof(words[0]));
    transform_group<T, kWide>(words, buffer);
    std::memcpy(out, buffer, blocks * kBlock * sizeof(T));
    twister.skip(blocks * words_each);
  }
}

// One draw of `count` normals.
template <class T, bool kWide>
struct Draw {
  const GeneratorState& before;
  GeneratorState& after;
  T* out;
  std::int64_t count;

  // Piece `piece` of `pieces`, all the same work: kTwistShare for each block up to the piece's last, the rest for its own blocks.
  void run(std::int64_t piece, std::int64_t pieces) const {
    const std::int64_t blocks = count / kBlock;
    const auto bound = [&](std::int64_t i) {
      if (i == pieces) return blocks;
      const double share = (1 - std::pow(1 - kTwistShare, i)) / (1 - std::pow(1 - kTwistShare, pieces));
      return static_cast<std::int64_t>(static_cast<double>(blocks) * share);
    };
    const std::int64_t first = bound(piece), last = bound(piece + 1);
    MersenneTwister twister(before);
    twister.skip(first * kBlockWords<T>);
    draw_blocks<T, kWide>(twister, out + first * kBlock, last - first);
    if (piece + 1 < pieces) return;
    if (const std::int64_t rest = count % kBlock; rest != 0) {
      // torch draws the last 16 again; in the low-precision dtypes it has not drawn the rest before.
      if constexpr (std::is_same_v<T, opmath_t<T>>) twister.skip(rest * kWordsEach<T>);
      draw_blocks<T, kWide>(twister, out + count - kBlock, 1);
    }
    twister.save(before, after);
  }
};

// Of one generator for all, [5056], or of one a sample, [N, 5056]. Copies, so that they may begin at any byte.
std::vector<GeneratorState> read_states(const Tensor& states) {
  const std::int64_t dim = states.dim();
  FASTGEN_CHECK(states.scalar_type() == ScalarType::Byte && (dim == 1 || dim == 2) && states.size(dim - 1) == kStateBytes && states.stride(dim - 1) == 1,
                "generator_normal: states must be uint8 [", kStateBytes, "] or [N, ", kStateBytes, "] of whole rows");
  std::vector<GeneratorState> read(dim == 2 ? states.size(0) : 1);
  for (std::size_t g = 0; g < read.size(); ++g) {
    const std::int64_t row = dim == 2 ? static_cast<std::int64_t>(g) * states.stride(0) : 0;
    std::memcpy(&read[g], static_cast<const unsigned char*>(states.data_ptr()) + row, sizeof(GeneratorState));
    FASTGEN_CHECK(MersenneTwister::takes(read[g]), "generator_normal: states[", g, "] must be as torch leaves it: left = 1 or left + next = ",
                  kWords + 1, ", got left = ", read[g].left, ", next = ", read[g].next);
  }
  return read;
}

std::tuple<Tensor, Tensor> generator_normal(const Tensor& states, std::vector<std::int64_t> shape, ScalarType dtype, bool wide_angle) {
  const std::vector<GeneratorState> before = read_states(states);
  const auto draws = static_cast<std::int64_t>(before.size());
  const bool each = states.dim() == 2;
  FASTGEN_CHECK(!each || (!shape.empty() && shape[0] == draws), "generator_normal: states must be one or one a sample, got ", draws);
  std::int64_t size = 1, count = 1;  // of all, and of one draw
  for (std::size_t d = 0; d < shape.size(); ++d) {
    FASTGEN_CHECK(shape[d] >= 0, "generator_normal: shape must not be negative");
    FASTGEN_CHECK(!__builtin_mul_overflow(size, shape[d], &size), "generator_normal: shape has more than 2^63 elements");
    if (d > 0 || !each) count *= shape[d];
  }
  FASTGEN_CHECK(count >= kBlock, "generator_normal: a draw must be of ", kBlock, " normals or more, got ", count, ": torch makes fewer in another way");
  Tensor out = empty_contiguous(shape, dtype), after = empty_contiguous(sizes_of(states), ScalarType::Byte);
  auto* saved = static_cast<GeneratorState*>(after.mutable_data_ptr());

  // As few pieces of each draw as give every thread as many.
  const std::int64_t threads = size > kSerialElements ? torch::stable::get_num_threads() : 1;
  const std::int64_t pieces = threads / std::gcd(std::max<std::int64_t>(draws, 1), threads);
  const auto run = [&]<class T, bool kWide>() {
    T* data = static_cast<T*>(out.mutable_data_ptr());
    parallel(draws * pieces, size, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t g = item / pieces;
        Draw<T, kWide>{before[g], saved[g], data + g * count, count}.run(item % pieces, pieces);
      }
    });
  };
  dispatch_dtype("generator_normal", dtype, [&]<class T>() {
    if constexpr (std::is_same_v<T, double>) return run.template operator()<T, false>();
    wide_angle ? run.template operator()<T, true>() : run.template operator()<T, false>();
  });
  return {out, after};
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("generator_normal", TORCH_BOX(&fastgen::generator_normal)); }
