// masked_linear_network: a program of masked linears of which all features are known. A thread owns blocks of samples.
// masked_linear_weight_bwd: grad^T input where a mask lets it through. Inputs, sorted by who reads them, lie in the lanes, a thread owns
// groups of rows, and blocks of inputs that a group does not read are not computed. Rows are summed in that order, some samples at a time,
// and written in that of the weight.
// masked_linear_pack: numbers of a weight in another order, 0 where the order has none. That of a task, [known][units], is followed some
// lines at a time, since the lines of a transposed weight are its rows, which all tasks read.
#include "_masked_network.h"

#include <atomic>

#include "common/scratch.h"
#include "common/simd/gather.h"

namespace fastgen::masked_network {
namespace {

Tensor masked_linear_network(const Tensor& input, const Tensor& program, const Tensor& weights, const Tensor& parameters, OptionalTensor constants,
                             std::int64_t outputs) {
  const char* const op = "masked_linear_network";
  check_floating(op, "input", input);
  FASTGEN_CHECK(input.dim() == 2, op, ": input must be [N, D]");
  const std::int64_t samples = input.size(0);
  return dispatch(op, weights, [&]<class T>() {
    const Program p(op, program, weights, parameters, constants, samples);
    p.check_constants(op, constants, samples, weights.scalar_type());
    const Header& h = p.header;
    FASTGEN_CHECK(input.size(1) == h.features, op, ": input must be [N, ", h.features, "]");
    FASTGEN_CHECK(outputs == h.outputs, op, ": outputs must be the program's, ", h.outputs, ", got ", outputs);
    for (std::int64_t l = 0; l < h.levels; ++l) p.check(op, p.levels[l]);
    Tensor output = empty_contiguous({samples, outputs}, input.scalar_type());
    const Tensor x = h.features <= 1 || input.stride(1) == 1 ? input : copy_dense(input, false);
    const Blocks<T> blocks(samples, static_cast<std::int64_t>(torch::stable::get_num_threads()));
    dispatch_dtype(op, input.scalar_type(), [&]<class S>() {
      const S* const from = static_cast<const S*>(x.data_ptr());
      S* const to = static_cast<S*>(output.mutable_data_ptr());
      parallel(blocks.count, samples * weights.numel(), [&](std::int64_t begin, std::int64_t end) {
        const Scratch<T> values(h.rows * kMostVectors * kWidth<T>), made(h.outputs * kMostVectors * kWidth<T>);
        for (std::int64_t b = begin; b < end; ++b) {
          const auto block = blocks[b];
          const std::int64_t lanes = block.lanes;
          read_rows<T>(from + block.sample * x.stride(0), x.stride(0), block.samples, h.features, lanes,
                       [&](std::int64_t c) { return p.feature_places[static_cast<std::size_t>(c)]; }, values.get());
          if (h.constants > 0)
            read_rows<T>(static_cast<const T*>(p.constants) + block.sample * h.constants, h.constants, block.samples, h.constants, lanes,
                         [&](std::int64_t c) { return h.features + c; }, values.get());
          for (std::int64_t l = 0; l < h.levels; ++l) run<T>(p, p.levels[l], lanes, values.get(), made.get() + p.levels[l].output * lanes);
          write_rows<T>(made.get(), lanes, block.samples, outputs,
                        [&](std::int64_t c) { return p.output_places[static_cast<std::size_t>(c)]; }, to + block.sample * outputs, outputs);
        }
      });
    });
    return output;
  });
}

// ---- the gradient of a weight --------------------------------------------------------------------------------------------------

struct Index {
  const std::int64_t* data;

  // [count], each in [0, most].
  Index(const char* op, const char* name, const Tensor& t, std::int64_t count, std::int64_t most) : data(static_cast<const std::int64_t*>(t.data_ptr())) {
    FASTGEN_CHECK(t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.size(0) == count && t.is_contiguous(), op, ": ", name,
                  " must be contiguous int64 [", count, "]");
    for (std::int64_t i = 0; i < count; ++i)
      FASTGEN_CHECK(data[i] >= 0 && data[i] <= most, op, ": ", name, " must be in [0, ", most, "], got ", data[i]);
  }
  std::int64_t operator[](std::int64_t i) const { return data[i]; }
};

constexpr std::int64_t kSamples = 256;  // whose inputs, 512 KB of 512 in fp32, stay in the second-level cache

struct Matrix {
  const void* data;
  std::int64_t row, column;

  explicit Matrix(const Tensor& t) : data(t.data_ptr()), row(t.stride(0)), column(t.stride(1)) {}
  template <class S>
  auto at(std::int64_t i, std::int64_t j) const { return widen(static_cast<const S*>(data)[i * row + j * column]); }
};

Tensor masked_linear_weight_bwd(const Tensor& grad_output, const Tensor& input, const Tensor& mask, const Tensor& rows, const Tensor& columns,
                                const Tensor& known) {
  const char* const op = "masked_linear_weight_bwd";
  check_floating(op, "grad_output", grad_output), check_floating(op, "input", input);
  FASTGEN_CHECK(input.dim() == 2 && grad_output.dim() == 2 && grad_output.size(0) == input.size(0) &&
                    grad_output.scalar_type() == input.scalar_type(),
                op, ": grad_output must be [M, O] beside input [M, C], in its dtype");
  const std::int64_t samples = input.size(0), inputs = input.size(1), outputs = grad_output.size(1);
  FASTGEN_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 2 && mask.size(0) == outputs && mask.size(1) == inputs, op,
                ": mask must be boolean [", outputs, ", ", inputs, "]");
  const Index row(op, "rows", rows, outputs, outputs - 1), column(op, "columns", columns, inputs, inputs - 1), reads(op, "known", known, outputs, inputs);
  Tensor result = empty_contiguous({outputs, inputs}, opmath_type(input.scalar_type()));
  dispatch_dtype(op, input.scalar_type(), [&]<class S>() {
    using T = opmath_t<S>;
    T* const out = static_cast<T*>(result.mutable_data_ptr());
    const Blocks<T> blocks(inputs, 1);
    const Matrix x(input), g(grad_output);
    const auto* const lets = static_cast<const std::uint8_t*>(mask.data_ptr());
    const std::int64_t mask_row = mask.stride(0), mask_column = mask.stride(1), groups = (outputs + kMostUnits - 1) / kMostUnits;
    const std::int64_t width = kMostVectors * kWidth<T>;
    const Scratch<T> values(std::max<std::int64_t>(blocks.count, 1) * samples * width);  // of each block [samples][lanes]
    parallel(samples, samples * inputs, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t n = begin; n < end; ++n)
        for (std::int64_t b = 0; b < blocks.count; ++b) {
          const auto block = blocks[b];
          T* const to = values.get() + b * samples * width + n * block.lanes;
          for (std::int64_t i = 0; i < block.samples; ++i) to[i] = x.at<S>(n, column[block.sample + i]);
          std::fill(to + block.samples, to + block.lanes, T(0));
        }
    });
    const std::int64_t stride = blocks.vectors * kWidth<T>;
    // Some rows, of the first and the last groups in turn: the first read less than the last, and threads take what follows each other.
    struct Group {
      std::int64_t first, units;
    };
    const auto group_of = [&](std::int64_t i) {
      const std::int64_t group = i % 2 == 0 ? i / 2 : groups - 1 - i / 2, first = group * outputs / groups;
      return Group{first, (group + 1) * outputs / groups - first};
    };
    parallel(groups, samples * inputs * outputs, [&](std::int64_t begin, std::int64_t end) {
      const std::int64_t count = (end - begin) * kMostUnits;
      const Scratch<T> weights(kSamples * kMostUnits), rows(std::max<std::int64_t>(count * stride, 1));  // of the thread [count][stride]
      alignas(64) T sums[kMostUnits * kMostVectors * kWidth<T>];
      std::fill_n(rows.get(), count * stride, T(0));
      for (std::int64_t from = 0; from < samples; from += kSamples)
        for (std::int64_t i = begin; i < end; ++i) {
          const auto [first, units] = group_of(i);
          const std::int64_t taken = std::min(kSamples, samples - from);
          std::int64_t most = 0;
          for (std::int64_t u = 0; u < units; ++u) most = std::max(most, reads[first + u]);
          if (most == 0) continue;
          for (std::int64_t n = 0; n < taken; ++n)
            for (std::int64_t u = 0; u < units; ++u) weights[n * units + u] = g.at<S>(from + n, row[first + u]);
          for (std::int64_t b = 0; b < blocks.count && blocks[b].sample < most; ++b) {
            const auto block = blocks[b];
            multiply<T>(units, block.lanes, values.get() + b * samples * width + from * block.lanes, weights.get(), units, taken, sums);
            for (std::int64_t u = 0; u < units; ++u) {
              T* const to = rows.get() + ((i - begin) * kMostUnits + u) * stride + block.sample;
              for (std::int64_t k = 0; k < block.lanes; k += kWidth<T>) store(to + k, load(to + k) + load(sums + u * block.lanes + k));
            }
          }
        }
      for (std::int64_t i = begin; i < end; ++i) {
        const auto [first, units] = group_of(i);
        for (std::int64_t u = 0; u < units; ++u) {
          const std::int64_t o = row[first + u];
          const T* const from = rows.get() + ((i - begin) * kMostUnits + u) * stride;
          const std::uint8_t* const let = lets + o * mask_row;
          T* const to = out + o * inputs;
          std::fill_n(to, inputs, T(0));
          for (std::int64_t k = 0; k < reads[first + u]; ++k) {
            const std::int64_t c = column[k];
            to[c] = let[c * mask_column] ? from[k] : T(0);
          }
        }
      }
    });
  });
  return result;
}

Tensor masked_linear_pack(const Tensor& weight, const Tensor& gather, const Tensor& tasks, std::int64_t block) {
  const char* const op = "masked_linear_pack";
  check_floating(op, "weight", weight);
  FASTGEN_CHECK(weight.dim() == 2 && weight.is_contiguous(), op, ": weight must be contiguous [O, C]");
  FASTGEN_CHECK(gather.scalar_type() == ScalarType::Int && gather.dim() == 1 && gather.is_contiguous(), op, ": gather must be a contiguous int32 vector");
  const std::int64_t count = gather.numel(), most = weight.numel();
  FASTGEN_CHECK(most < std::numeric_limits<std::int32_t>::max(), op, ": weight must have fewer than 2^31 - 1 numbers");
  FASTGEN_CHECK(tasks.scalar_type() == ScalarType::Long && tasks.dim() == 2 && tasks.size(1) == 2 && tasks.is_contiguous(), op,
                ": tasks must be contiguous int64 [T, 2]");
  FASTGEN_CHECK(block >= 1, op, ": block must be positive, got ", block);
  const auto* const from = static_cast<const std::int32_t*>(gather.data_ptr());
  const auto* const sizes = static_cast<const std::int64_t*>(tasks.data_ptr());
  std::vector<std::int64_t> begins;  // of each task
  std::int64_t lines = 0, total = 0;
  for (std::int64_t t = 0; t < tasks.size(0); ++t) {
    const std::int64_t known = sizes[2 * t], units = sizes[2 * t + 1];
    FASTGEN_CHECK(known >= 0 && units >= 0 && units <= std::numeric_limits<std::int32_t>::max(), op, ": tasks must not have negative or immense numbers");
    begins.push_back(total);
    if (known == 0 || units == 0) continue;
    FASTGEN_CHECK(known <= count && units <= (count - total) / known, op, ": tasks must be as many numbers as gather has places");
    total += known * units, lines = std::max(lines, known);
  }
  FASTGEN_CHECK(total == count, op, ": tasks must be as many numbers as gather has places, ", count, ", got ", total);
  block = std::min(block, std::max<std::int64_t>(lines, 1));
  const std::int64_t parts = (lines + block - 1) / block;
  Tensor result = empty_contiguous({count}, opmath_type(weight.scalar_type()));
  dispatch_dtype(op, weight.scalar_type(), [&]<class S>() {
    using T = opmath_t<S>;
    const S* const w = static_cast<const S*>(weight.data_ptr());
    T* const out = static_cast<T*>(result.mutable_data_ptr());
    std::atomic<bool> inside{true};
    parallel(parts * tasks.size(0), count * 8, [&](std::int64_t begin, std::int64_t end) {
      bool fits = true;
      for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t task = item % tasks.size(0), line = item / tasks.size(0) * block, units = sizes[2 * task + 1];
        const std::int64_t last = begins[static_cast<std::size_t>(task)] + std::min(line + block, sizes[2 * task]) * units;
        std::int64_t i = begins[static_cast<std::size_t>(task)] + line * units;
        if constexpr (kGathers && std::is_same_v<S, float>)
          for (; i + kWidth<float> <= last; i += kWidth<float>) {
            VecI at(from + i, stdx::element_aligned);
            const auto past = at >= static_cast<std::int32_t>(most);
            fits = fits && stdx::all_of(at >= -1) && stdx::none_of(past);
            stdx::where(past, at) = -1;
            store(out + i, fastgen::gather(w, at));
          }
        for (; i < last; ++i) {
          const std::int32_t at = from[i];
          const bool there = at >= 0 && at < most;
          fits = fits && at >= -1 && at < most;
          const T value = static_cast<T>(widen(w[there ? at : 0]));
          out[i] = there ? value : T(0);
        }
      }
      if (!fits) inside = false;
    });
    FASTGEN_CHECK(inside, op, ": gather must be in [-1, ", most, ")");
  });
  return result;
}

}  // namespace
}  // namespace fastgen::masked_network

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("masked_linear_pack", TORCH_BOX(&fastgen::masked_network::masked_linear_pack));
  m.impl("masked_linear_weight_bwd", TORCH_BOX(&fastgen::masked_network::masked_linear_weight_bwd));
  m.impl("masked_linear_network", TORCH_BOX(&fastgen::masked_network::masked_linear_network));
}
