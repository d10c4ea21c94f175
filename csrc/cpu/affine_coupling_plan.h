// What a call of affine_coupling is asked, and the strips it is cut into: elements side by side that are transformed, or copied, of a sample
// or of one position of it (common/runs.h), the same for all.
#pragma once

#include <algorithm>

#include "common/runs.h"
#include "cpu/affine_coupling_scale.h"

namespace fastgen::affine_coupling {
namespace {

// In the orders of COUPLING_CENTERS, COUPLING_ORDERS, COUPLING_LAYOUTS, COUPLING_MASKS and COUPLING_CODES of fastgen/_schema.py.
enum class Center { kNone, kSample, kChannels };
enum class Order { kScaleShift, kShiftScale };
enum class Layout { kScaleFirst, kShiftFirst, kInterleaved, kInterleavedScaleFirst };
enum class Mask { kNone, kIndices, kFirstHalf, kSecondHalf, kCheckerboard, kCheckerboardInverse };
enum class Code { kScale, kCenter, kOrder, kLayout, kMask, kDivide, kInverse, kNumCodes };

constexpr std::int64_t kLongest = 1024;  // elements of a strip: 64 additions to each lane of a sum in fp32
constexpr std::int64_t kItem = 4096;     // elements that a thread takes at a time
constexpr std::int64_t kTile = 1024;     // elements of a tile, four operands of which fit the first-level cache
constexpr std::int64_t kShort = 128;     // elements that are copied without a call
constexpr int kWaiting = 16;             // strips whose sums are finished together
constexpr std::int64_t kWork = 4;        // an exponential and a logarithm are as much work as so many elements of a light operation

// Elements side by side: along the channels from `channel` on in rows, else along the positions from `position` on.
struct Strip {
  std::int64_t channel, position, count;
  std::int64_t raw;  // the channel in raw scale and shift
  bool copied;       // and not transformed
};

// What is transformed and in which strips.
struct Plan {
  const char* op;
  std::int64_t n, channels, positions, transformed;  // the latter: channels of raw scale and shift
  bool channels_last, rows;
  Mask mask;
  std::int64_t width = 1;                     // of the image under a checkerboard
  std::int64_t step = 1;                      // from an element of a strip of `input` to the next; 0 where `indices` say
  std::vector<std::int64_t> indices;          // of transformed channels
  std::vector<Strip> strips[2];               // of a position in rows, of a sample elsewhere; of positions that a checkerboard skips
  std::vector<std::int64_t> first;            // of the strips of each item of a sample, elsewhere
  std::int64_t block = 1, a_sample = 1;       // positions of an item in rows; items of a sample
  bool side_by_side = true;                   // the elements of a strip, in every tensor
  bool full = true;                           // strips fill their vectors

  Plan(const char* op, const Tensor& input, const OptionalTensor& given, std::int64_t code)
      : op(op), n(0), channels(0), positions(0), transformed(0), channels_last(is_channels_last(input)), rows(false), mask(static_cast<Mask>(code)) {
    check_floating(op, "input", input);
    FASTGEN_CHECK(input.dim() >= 2, op, ": input must be [N, C, *]");
    FASTGEN_CHECK(code >= 0 && code <= static_cast<int>(Mask::kCheckerboardInverse), op, ": mask must be in [0, 6), got ", code);
    n = input.size(0), channels = input.size(1), positions = SliceSizes(input, 1).count, rows = in_rows(input);
    FASTGEN_CHECK(given.has_value() == (mask == Mask::kIndices), op, ": indices go with the mask 'indices' alone");
    if (given.has_value()) read_indices(*given);
    if (checkerboard()) {
      FASTGEN_CHECK(input.dim() == 4, op, ": input must be [N, C, H, W] for a checkerboard");
      width = std::max<std::int64_t>(input.size(3), 1);
    }
    transformed = given.has_value() ? static_cast<std::int64_t>(indices.size())
                  : mask == Mask::kFirstHalf ? channels / 2
                  : mask == Mask::kSecondHalf ? channels - channels / 2 : channels;
    FASTGEN_CHECK(transformed >= 1, op, ": input must have a channel that the mask transforms");
    if (!given.has_value())
      for (std::int64_t c = 0; c < transformed; ++c) indices.push_back(c + (mask == Mask::kSecondHalf ? channels / 2 : 0));
  }

  bool checkerboard() const { return mask == Mask::kCheckerboard || mask == Mask::kCheckerboardInverse; }
  std::int64_t items() const { return n * a_sample; }
  std::int64_t elements() const { return n * channels * positions; }
  // Elements of a sample that are transformed.
  std::int64_t of_sample() const {
    if (!checkerboard()) return transformed * positions;
    const std::int64_t even = (positions + 1) / 2;
    return channels * (mask == Mask::kCheckerboard ? even : positions - even);
  }
  // Whether a checkerboard transforms the position h * width + w.
  bool chosen(std::int64_t position) const {
    return ((position / width + position % width) % 2 == 1) == (mask == Mask::kCheckerboardInverse);
  }

  // Cuts everything into strips. `raw_step` is 2 where raw scale and shift alternate along a row. Neighbouring channels of an image are
  // one strip where they are `together`: of what is copied, of what is transformed.
  void cut(std::int64_t raw_step, bool copied_together, bool together) {
    if (rows) cut_rows(raw_step);
    else if (checkerboard()) cut_board();
    else cut_planes(copied_together, together);
    if (rows) {
      block = std::max<std::int64_t>(kTile / transformed, 1);
      a_sample = (positions + block - 1) / block;
    } else {
      std::int64_t size = kItem;
      for (std::size_t s = 0; s < strips[0].size(); ++s) {
        if (size + strips[0][s].count > kItem && !(s > 0 && step == 2 && strips[0][s - 1].copied)) first.push_back(s), size = 0;
        size += strips[0][s].count;
      }
      a_sample = static_cast<std::int64_t>(first.size());
      first.push_back(strips[0].size());
    }
    std::int64_t lanes = 0, filled = 0;
    for (const Strip& s : strips[0])
      if (!s.copied) lanes += (s.count + kLane - 1) / kLane * kLane, filled += s.count;
    side_by_side = step == 1 && raw_step == 1, full = filled * 4 >= lanes * 3;
  }

 private:
  static constexpr std::int64_t kLane = 16;  // of the widest vectors, so that all machines go the same way

  void read_indices(const Tensor& given) {
    FASTGEN_CHECK(given.scalar_type() == ScalarType::Long && given.dim() == 1, op, ": indices must be int64 [C']");
    FASTGEN_CHECK(given.size(0) >= 1 && given.size(0) <= channels, op, ": indices must be 1 to ", channels, ", got ", given.size(0));
    const auto* const p = static_cast<const std::int64_t*>(given.data_ptr());
    std::vector<bool> seen(channels);
    for (std::int64_t j = 0; j < given.size(0); ++j) {
      const std::int64_t c = p[j * given.stride(0)];
      FASTGEN_CHECK(c >= 0 && c < channels, op, ": indices must be in [0, ", channels, "), got ", c);
      FASTGEN_CHECK(!seen[c], op, ": indices must differ, got ", c, " twice");
      seen[c] = true;
      indices.push_back(c);
    }
  }

  // Raw channel of each channel, -1 where it is copied.
  std::vector<std::int64_t> raw_of_channel() const {
    std::vector<std::int64_t> raw(channels, -1);
    for (std::int64_t j = 0; j < transformed; ++j) raw[indices[j]] = j;
    return raw;
  }

  // Calls f(first channel, how many, the raw channel of the first) for runs of channels that follow one another in both.
  template <class F>
  void for_channels(const F& f) const {
    const auto raw = raw_of_channel();
    for (std::int64_t c = 0, end; c < channels; c = end) {
      for (end = c + 1; end < channels && (raw[c] < 0 ? raw[end] < 0 : raw[end] == raw[c] + end - c); ++end) {
      }
      f(c, end - c, raw[c]);
    }
  }

  void cut_rows(std::int64_t raw_step) {
    if (checkerboard()) {
      strips[0] = {{0, 0, channels, 0, false}};
      strips[1] = {{0, 0, channels, 0, true}};
      return;
    }
    std::int64_t runs = 0;
    for_channels([&](std::int64_t, std::int64_t, std::int64_t raw) { runs += raw >= 0; });
    if (runs == 1 || (raw_step == 1 && transformed >= runs * kLane)) {
      for_channels([&](std::int64_t c, std::int64_t count, std::int64_t raw) { strips[0].push_back({c, 0, count, raw, raw < 0}); });
      return;
    }
    bool alternate = true;
    for (std::int64_t j = 1; j < transformed; ++j) alternate = alternate && indices[j] == indices[0] + 2 * j;
    step = alternate ? 2 : 0;
    strips[0] = {{0, 0, channels, 0, true}, {alternate ? indices[0] : 0, 0, transformed, 0, false}};
  }

  void cut_planes(bool copied_together, bool together) {
    const auto cut_plane = [&](std::int64_t c, std::int64_t count, std::int64_t raw) {
      for (std::int64_t p = 0; p < count; p += kLongest) strips[0].push_back({c, p, std::min(kLongest, count - p), raw, raw < 0});
    };
    for_channels([&](std::int64_t c, std::int64_t count, std::int64_t raw) {
      if (raw < 0 ? copied_together : together) return cut_plane(c, count * positions, raw);
      for (std::int64_t k = 0; k < count; ++k) cut_plane(c + k, positions, raw < 0 ? raw : raw + k);
    });
  }

  // Each line of the image is copied whole, and what is transformed put over it.
  void cut_board() {
    step = 2;
    for (std::int64_t c = 0; c < channels; ++c)
      for (std::int64_t p = 0; p < positions; p += width) {
        const std::int64_t start = chosen(p) ? 0 : 1, count = (width - start + 1) / 2;
        strips[0].push_back({c, p, width, c, true});
        if (count > 0) strips[0].push_back({c, p + start, count, c, false});
      }
  }
};

// The arguments that forward and backward share.
struct Problem {
  Plan plan;
  bool packed;
  Center center;
  Order order;
  Layout layout;
  bool inverse, shift_last, negative;  // whether the multiplier is 1 / s
  Scale scale;
  double bound, offset, eps, gain;
  Parameter weight;

  Problem(const char* op, const Tensor& input, const Tensor& raw, const OptionalTensor& shift, const OptionalTensor& scale_weight,
          const OptionalTensor& indices, const std::vector<std::int64_t>& codes, double bound, double offset, double eps, double gain)
      : plan(op, input, indices, checked(op, codes)[static_cast<int>(Code::kMask)]), packed(!shift.has_value()),
        center(static_cast<Center>(code(codes, Code::kCenter))), order(static_cast<Order>(code(codes, Code::kOrder))),
        layout(static_cast<Layout>(code(codes, Code::kLayout))), inverse(code(codes, Code::kInverse)),
        shift_last((order == Order::kScaleShift) != inverse), negative((code(codes, Code::kDivide) != 0) != inverse),
        scale(static_cast<Scale>(code(codes, Code::kScale))), bound(bound), offset(offset), eps(eps), gain(gain),
        weight(op, "scale_weight", scale_weight, false, plan.n, plan.transformed) {
    const auto beside = with_channels(input, plan.transformed);
    FASTGEN_CHECK(sizes_of(raw) == (packed ? with_channels(input, 2 * plan.transformed) : beside) && raw.scalar_type() == input.scalar_type(),
                  op, ": raw_scale must be [N, C', *], or [N, 2 C', *] without shift, with C' = ", plan.transformed, ", in the dtype of input");
    if (!packed)
      FASTGEN_CHECK(sizes_of(*shift) == beside && shift->scalar_type() == input.scalar_type(), op,
                    ": shift must be [N, C', *] with C' = ", plan.transformed, ", in the dtype of input");
    FASTGEN_CHECK(!weight.given() || scale == Scale::kTanh || scale == Scale::kSoftTanh, op, ": scale_weight goes with tanh and soft_tanh");
    FASTGEN_CHECK(center == Center::kNone || (scale != Scale::kSigmoid && scale != Scale::kSoftplus), op,
                  ": no center is taken from sigmoid and softplus");
  }

  bool interleaved() const { return packed && (layout == Layout::kInterleaved || layout == Layout::kInterleavedScaleFirst); }

  template <class A>
  Numbers<A> numbers() const {
    return {scale, static_cast<A>(bound), static_cast<A>(offset), static_cast<A>(eps), static_cast<A>(gain), A(negative ? -1 : 1), A(inverse ? -1 : 1), shift_last, weight.given()};
  }

 private:
  static std::int64_t code(const std::vector<std::int64_t>& codes, Code which) { return codes[static_cast<int>(which)]; }
  static const std::vector<std::int64_t>& checked(const char* op, const std::vector<std::int64_t>& codes) {
    constexpr std::int64_t counts[] = {8, 3, 2, 4, 6, 2, 2};
    static constexpr const char* names[] = {"scale", "center", "order", "layout", "mask", "divide", "inverse"};
    FASTGEN_CHECK(codes.size() == std::size(counts), op, ": codes must be ", std::size(counts), ", got ", codes.size());
    for (std::size_t i = 0; i < codes.size(); ++i)
      FASTGEN_CHECK(codes[i] >= 0 && codes[i] < counts[i], op, ": ", names[i], " must be in [0, ", counts[i], "), got ", codes[i]);
    return codes;
  }
};

}  // namespace
}  // namespace fastgen::affine_coupling
