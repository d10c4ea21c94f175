// group_norm, backward: one read of input and gradient for the sums, one more (and one write) for the input's gradient.
//
// With x^ the normalised input, z = u (1 + scale) + shift, u = x^ w + bias, dz = dy act'(z), k = w (1 + scale):
//
//   dx = rstd (k dz - mean(k dz) - x^ mean(k dz x^))        means over the group
//
// and every other gradient is made of three sums over the pixels of a channel: dz, dz x^ and x^. Sums are taken in fp32
// over pieces whose size depends on the shape alone, and added in fp64 in a fixed order. Where the gradient of the input is
// stored in opmath, dz waits there for its second use; otherwise it is computed twice.
#include "group_norm.h"

namespace fastgen::group_norm {
namespace {

constexpr std::int64_t kPiece = 256;   // elements of a row summed in fp32, 16 to a lane, before fp64 takes over
constexpr std::int64_t kSlab = 32768;   // elements of a channels-last slab, of at most 32 pixels: 32 additions to a lane

struct Sums {
  double dz = 0, dz_x = 0, x = 0;  // over the pixels of one (sample, channel); x is x^
};

// How a channel maps an element: x^ = (x - m) rstd + lost, z = (x - m) a + b.
template <class A>
struct Map {
  Affine<A> affine;
  A rstd, lost, k;
};

template <class A>
Map<A> map_of(const Channels<A>& channels, std::int64_t c, double mean, double rstd) {
  const Affine<A> affine = channels.affine(c, mean, rstd);
  const double lost = (static_cast<double>(affine.m) - (mean - channels.channel_bias[c])) * rstd;
  return {affine, static_cast<A>(rstd), static_cast<A>(lost), static_cast<A>(channels.weight[c] * (1.0 + channels.scale[c]))};
}

template <class T, bool kSilu>
Vec<opmath_t<T>> grad_before_activation(Vec<opmath_t<T>> dy, Vec<opmath_t<T>> centred, Vec<opmath_t<T>> a, Vec<opmath_t<T>> b) {
  using A = opmath_t<T>;
  if constexpr (!kSilu) return dy;
  return dy * silu_grad<A>(madd<A>(centred, a, b));
}

// The gradients are of all channels: those of the two inputs are slices of dx.
template <class T>
struct Pointers {
  Pieces<T> x;
  const T* dy;
  T* dx;
  Rows dy_rows;
};

// ---- contiguous ----------------------------------------------------------------------------------------------------------

template <class T, bool kSilu>
Sums row_sums(const T* x, const T* dy, T* dx, std::int64_t count, const Map<opmath_t<T>>& map) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  const V m(map.affine.m), a(map.affine.a), b(map.affine.b), r(map.rstd), lost(map.lost);
  Sums total;
  for (std::int64_t first = 0; first < count; first += kPiece) {
    V dz_sum(0), dz_x_sum(0), x_sum(0);
    for_vectors<A>(std::min(kPiece, count - first), [&](std::int64_t i, auto at) {
      const V centred = at.load(x + first + i) - m;
      const V dz = at.keep(grad_before_activation<T, kSilu>(at.load(dy + first + i), centred, a, b));
      const V x_hat = at.keep(madd<A>(centred, r, lost));
      if constexpr (std::is_same_v<T, A>) {
        at.store(dx + first + i, dz);
        prefetch_to_write(dx + first + i + 16 * kWidth<A>);
      }
      dz_sum += dz;
      dz_x_sum = madd<A>(dz, x_hat, dz_x_sum);
      x_sum += x_hat;
    });
    total.dz += sum_lanes<A>(dz_sum);
    total.dz_x += sum_lanes<A>(dz_x_sum);
    total.x += sum_lanes<A>(x_sum);
  }
  return total;
}

// dx = by_dz dz + by_x (x - m) + constant.
template <class A>
struct Combine {
  A by_dz, by_x, constant;
};

template <class A>
Combine<A> combine_of(const Map<A>& map, double rstd, double mean_dz, double mean_dz_x) {
  return {static_cast<A>(rstd * map.k), static_cast<A>(-rstd * rstd * mean_dz_x),
          static_cast<A>(-rstd * (mean_dz + map.lost * mean_dz_x))};
}

template <class T, bool kSilu>
void finish_row(const T* x, const T* dy, T* dx, std::int64_t count, const Map<opmath_t<T>>& map, Combine<opmath_t<T>> combine) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  const V m(map.affine.m), a(map.affine.a), b(map.affine.b);
  const V by_dz(combine.by_dz), by_x(combine.by_x), constant(combine.constant);
  for_vectors<A>(count, [&](std::int64_t i, auto at) {
    const V centred = at.load(x + i) - m;
    V dz;
    if constexpr (std::is_same_v<T, A>) dz = at.load(dx + i);
    else dz = grad_before_activation<T, kSilu>(at.load(dy + i), centred, a, b);
    at.store(dx + i, madd<A>(by_dz, dz, madd<A>(by_x, centred, constant)));
  });
}

// The group means of k dz and k dz x^ from the sums of its channels.
template <class A>
std::pair<double, double> group_means(const Problem& p, const Channels<A>& channels, std::int64_t first, const Sums* sums) {
  double dz = 0, dz_x = 0;
  for (std::int64_t c = 0; c < p.per_group; ++c) {
    const double k = channels.weight[first + c] * (1.0 + channels.scale[first + c]);
    dz += k * sums[c].dz, dz_x += k * sums[c].dz_x;
  }
  const auto size = static_cast<double>(p.group_size());
  return {dz / size, dz_x / size};
}

template <class T, bool kSilu>
void backward_contiguous(const Problem& p, const Pointers<T>& at, const opmath_t<T>* mean, const opmath_t<T>* rstd, Sums* sums) {
  using A = opmath_t<T>;
  parallel(p.n * p.groups, p.elements(), [&](std::int64_t begin, std::int64_t end) {
    Channels<A> channels(p.per_group);
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t n = item / p.groups, first = item % p.groups * p.per_group;
      channels.read(p, n, first, p.per_group);
      const Run<T> x = at.x.run(n, first, p.per_group);
      const T* dy = at.dy + n * at.dy_rows.batch_stride + first * p.pixels;
      T* dx = at.dx + item * p.group_size();
      Sums* group_sums = sums + n * p.channels + first;
      for (std::int64_t c = 0; c < p.per_group; ++c) {
        const std::int64_t row = c * p.pixels;
        group_sums[c] = row_sums<T, kSilu>(x.at(row), dy + row, dx + row, p.pixels, map_of(channels, c, mean[item], rstd[item]));
      }
      const auto [mean_dz, mean_dz_x] = group_means(p, channels, 0, group_sums);
      for (std::int64_t c = 0; c < p.per_group; ++c) {
        const Map<A> map = map_of(channels, c, mean[item], rstd[item]);
        const std::int64_t row = c * p.pixels;
        finish_row<T, kSilu>(x.at(row), dy + row, dx + row, p.pixels, map, combine_of(map, rstd[item], mean_dz, mean_dz_x));
      }
    }
  });
}

// ---- channels-last ---------------------------------------------------------------------------------------------------------

// The maps of all channels of a sample, one array a field, padded to whole vectors.
template <class A>
struct MapArrays {
  std::vector<A> m, a, b, rstd, lost, by_dz, by_x, constant;
  explicit MapArrays(std::int64_t c) : m(c), a(c), b(c), rstd(c), lost(c), by_dz(c), by_x(c), constant(c) {}
};

template <class A>
struct SlabSums {
  std::vector<A> dz, dz_x, x;
  explicit SlabSums(std::int64_t c) : dz(c), dz_x(c), x(c) {}
};

// Of `channels` from `first` on, which x begins with; dy and dx begin with channel 0.
template <class T, bool kSilu>
void slab_sums(const Problem& p, const T* x, const T* dy, T* dx, std::int64_t x_stride, std::int64_t dy_stride, std::int64_t first,
               std::int64_t channels, std::int64_t pixels, const MapArrays<opmath_t<T>>& map, SlabSums<opmath_t<T>>& sums) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  x -= first;
  for_vectors<A>(channels, [&](std::int64_t i, auto at) {
    const std::int64_t c = first + i;
    const V m = at.load(map.m.data() + c), a = at.load(map.a.data() + c), b = at.load(map.b.data() + c);
    const V r = at.load(map.rstd.data() + c), lost = at.load(map.lost.data() + c);
    V dz_sum(0), dz_x_sum(0), x_sum(0);
    for (std::int64_t i = 0; i < pixels; ++i) {
      prefetch(x + (i + pixels) * x_stride + c);  // the next slab
      prefetch(dy + (i + pixels) * dy_stride + c);
      const V centred = at.load(x + i * x_stride + c) - m;
      const V dz = grad_before_activation<T, kSilu>(at.load(dy + i * dy_stride + c), centred, a, b);
      if constexpr (std::is_same_v<T, A>) {
        at.store(dx + i * p.channels + c, dz);
        prefetch_to_write(dx + (i + pixels) * p.channels + c);
      }
      const V x_hat = madd<A>(centred, r, lost);
      dz_sum += dz;
      dz_x_sum = madd<A>(dz, x_hat, dz_x_sum);
      x_sum += x_hat;
    }
    at.store(sums.dz.data() + c, dz_sum);
    at.store(sums.dz_x.data() + c, dz_x_sum);
    at.store(sums.x.data() + c, x_sum);
  });
}

template <class T, bool kSilu>
void finish_slab(const Problem& p, const T* x, const T* dy, T* dx, std::int64_t x_stride, std::int64_t dy_stride, std::int64_t first,
                 std::int64_t channels, std::int64_t pixels, const MapArrays<opmath_t<T>>& map) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  for (std::int64_t i = 0; i < pixels; ++i)
    for_vectors<A>(channels, [&](std::int64_t k, auto at) {
      const std::int64_t c = first + k;
      const V centred = at.load(x + i * x_stride + k) - at.load(map.m.data() + c);
      V dz;
      if constexpr (std::is_same_v<T, A>) dz = at.load(dx + i * p.channels + c);
      else dz = grad_before_activation<T, kSilu>(at.load(dy + i * dy_stride + c), centred, at.load(map.a.data() + c), at.load(map.b.data() + c));
      at.store(dx + i * p.channels + c, madd<A>(at.load(map.by_dz.data() + c), dz,
                                                madd<A>(at.load(map.by_x.data() + c), centred, at.load(map.constant.data() + c))));
    });
}

template <class T, bool kSilu>
void backward_channels_last(const Problem& p, const Pointers<T>& at, const opmath_t<T>* mean, const opmath_t<T>* rstd, Sums* sums) {
  using A = opmath_t<T>;
  const std::int64_t slab = std::clamp<std::int64_t>(kSlab / p.channels, 1, 32), slabs = (p.pixels + slab - 1) / slab;
  std::vector<SlabSums<A>> parts(p.n * slabs, SlabSums<A>(0));
  std::vector<MapArrays<A>> maps(p.n, MapArrays<A>(p.channels));
  parallel(p.n, p.n * p.channels, [&](std::int64_t begin, std::int64_t end) {
    Channels<A> channels(p.channels);
    for (std::int64_t n = begin; n < end; ++n) {
      channels.read(p, n, 0, p.channels);
      for (std::int64_t c = 0; c < p.channels; ++c) {
        const std::int64_t group = n * p.groups + c / p.per_group;
        const Map<A> map = map_of(channels, c, mean[group], rstd[group]);
        MapArrays<A>& to = maps[n];
        to.m[c] = map.affine.m, to.a[c] = map.affine.a, to.b[c] = map.affine.b, to.rstd[c] = map.rstd, to.lost[c] = map.lost;
      }
    }
  });
  const auto each_slab = [&](auto&& work) {
    parallel(p.n * slabs, p.elements(), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t n = item / slabs, first = item % slabs * slab;
        at.x.each([&](const Piece<T>& of) {
          work(item, n, of, of.pixel(n, first), at.dy + n * at.dy_rows.batch_stride + first * at.dy_rows.row_stride,
               at.dx + (n * p.pixels + first) * p.channels, std::min(slab, p.pixels - first));
        });
      }
    });
  };
  each_slab([&](std::int64_t item, std::int64_t n, const Piece<T>& of, const T* x, const T* dy, T* dx, std::int64_t pixels) {
    if (of.first == 0) parts[item] = SlabSums<A>(p.channels);
    slab_sums<T, kSilu>(p, x, dy, dx, of.rows.row_stride, at.dy_rows.row_stride, of.first, of.channels(), pixels, maps[n], parts[item]);
  });
  parallel(p.n, p.n * p.channels * slabs, [&](std::int64_t begin, std::int64_t end) {
    Channels<A> channels(p.channels);
    for (std::int64_t n = begin; n < end; ++n) {
      channels.read(p, n, 0, p.channels);
      for (std::int64_t s = 0; s < slabs; ++s)
        for (std::int64_t c = 0; c < p.channels; ++c) {
          const SlabSums<A>& part = parts[n * slabs + s];
          Sums& sum = sums[n * p.channels + c];
          sum.dz += part.dz[c], sum.dz_x += part.dz_x[c], sum.x += part.x[c];
        }
      for (std::int64_t g = 0; g < p.groups; ++g) {
        const std::int64_t first = g * p.per_group, group = n * p.groups + g;
        const auto [mean_dz, mean_dz_x] = group_means(p, channels, first, sums + n * p.channels + first);
        for (std::int64_t c = first; c < first + p.per_group; ++c) {
          const Combine<A> combine = combine_of(map_of(channels, c, mean[group], rstd[group]), rstd[group], mean_dz, mean_dz_x);
          maps[n].by_dz[c] = combine.by_dz, maps[n].by_x[c] = combine.by_x, maps[n].constant[c] = combine.constant;
        }
      }
    }
  });
  each_slab([&](std::int64_t, std::int64_t n, const Piece<T>& of, const T* x, const T* dy, T* dx, std::int64_t pixels) {
    finish_slab<T, kSilu>(p, x, dy, dx, of.rows.row_stride, at.dy_rows.row_stride, of.first, of.channels(), pixels, maps[n]);
  });
}

// The parameters' gradients from the channel sums.
template <class A>
void parameter_gradients(const Problem& p, const A* rstd, const Sums* sums, A* d_weight, A* d_bias, A* d_channel_bias,
                         A* d_scale, A* d_shift) {
  std::vector<double> weight_sum(p.channels), bias_sum(p.channels);
  Channels<A> channels(p.channels);
  for (std::int64_t n = 0; n < p.n; ++n) {
    channels.read(p, n, 0, p.channels);
    for (std::int64_t g = 0; g < p.groups; ++g) {
      const std::int64_t first = g * p.per_group;
      const auto [mean_dz, mean_dz_x] = group_means(p, channels, first, sums + n * p.channels + first);
      const double r = rstd[n * p.groups + g];
      for (std::int64_t c = first; c < first + p.per_group; ++c) {
        const std::int64_t i = n * p.channels + c;
        const double modulation = 1.0 + channels.scale[c];
        weight_sum[c] += modulation * sums[i].dz_x;
        bias_sum[c] += modulation * sums[i].dz;
        d_scale[i] = static_cast<A>(channels.weight[c] * sums[i].dz_x + channels.bias[c] * sums[i].dz);
        d_shift[i] = static_cast<A>(sums[i].dz);
        // The sum of dx over the pixels of the channel.
        d_channel_bias[i] = static_cast<A>(r * (channels.weight[c] * modulation * sums[i].dz -
                                                static_cast<double>(p.pixels) * mean_dz - sums[i].x * mean_dz_x));
      }
    }
  }
  for (std::int64_t c = 0; c < p.channels; ++c) d_weight[c] = static_cast<A>(weight_sum[c]), d_bias[c] = static_cast<A>(bias_sum[c]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_bwd(
    const Tensor& grad_output, const Tensor& input, OptionalTensor skip, const Tensor& mean, const Tensor& rstd, std::int64_t num_groups,
    OptionalTensor weight, OptionalTensor bias, OptionalTensor channel_bias, OptionalTensor scale, OptionalTensor shift,
    std::int64_t activation) {
  const Problem p = make_problem("group_norm_bwd", input, skip, num_groups, weight, bias, channel_bias, scale, shift, 0.0, activation);
  const ScalarType dtype = input.scalar_type(), opmath = opmath_type(dtype);
  check_floating("group_norm_bwd", "grad_output", grad_output);
  FASTGEN_CHECK(sizes_of(grad_output) == sizes_with_channels(input, p.channels), "group_norm_bwd: grad_output must have the shape of the output");
  if (grad_output.scalar_type() != dtype) {  // that of group_norm_wide_fwd
    const auto widened = [&](const Tensor& t) {
      Tensor copy = empty_dense(t, is_channels_last(input), opmath);
      torch::stable::copy_(copy, t);
      return copy;
    };
    Tensor narrow = empty_output(p, input, dtype);
    const OptionalTensor wide_skip = skip.has_value() ? OptionalTensor(widened(*skip)) : std::nullopt;
    auto grads = group_norm_bwd(widened(grad_output), widened(input), wide_skip, mean, rstd, num_groups, weight, bias, channel_bias, scale,
                                shift, activation);
    torch::stable::copy_(narrow, std::get<0>(grads));
    std::get<0>(grads) = narrow;
    return grads;
  }
  const std::vector<std::int64_t> group_sizes{p.n, p.groups};
  FASTGEN_CHECK(sizes_of(mean) == group_sizes && sizes_of(rstd) == group_sizes && mean.scalar_type() == opmath &&
                    rstd.scalar_type() == opmath,
                "group_norm_bwd: mean and rstd must be [N, num_groups] in the dtype of the statistics");
  Tensor d_input = empty_output(p, input, dtype);
  Tensor d_weight = empty_contiguous({p.channels}, opmath), d_bias = empty_contiguous({p.channels}, opmath);
  const auto per_sample = [&] { return empty_contiguous({p.n, p.channels}, opmath); };
  Tensor d_channel_bias = per_sample(), d_scale = per_sample(), d_shift = per_sample();
  Tensor dy = grad_output;
  const Inputs inputs(p, input, skip);
  const Rows dy_rows = as_rows(dy, p.channels_last);
  const Tensor mean_dense = as_dense(mean, false), rstd_dense = as_dense(rstd, false);
  std::vector<Sums> sums(p.n * p.channels);
  dispatch_dtype("group_norm_bwd", dtype, [&]<class T>() {
    using A = opmath_t<T>;
    const auto* m = static_cast<const A*>(mean_dense.data_ptr());
    const auto* r = static_cast<const A*>(rstd_dense.data_ptr());
    if (p.elements() > 0) {
      const Pointers<T> at{inputs.pieces<T>(), static_cast<const T*>(dy.data_ptr()), static_cast<T*>(d_input.mutable_data_ptr()), dy_rows};
      if (p.channels_last && p.silu) backward_channels_last<T, true>(p, at, m, r, sums.data());
      if (p.channels_last && !p.silu) backward_channels_last<T, false>(p, at, m, r, sums.data());
      if (!p.channels_last && p.silu) backward_contiguous<T, true>(p, at, m, r, sums.data());
      if (!p.channels_last && !p.silu) backward_contiguous<T, false>(p, at, m, r, sums.data());
    }
    const auto data = [](Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); };
    if (p.elements() > 0) {
      parameter_gradients<A>(p, r, sums.data(), data(d_weight), data(d_bias), data(d_channel_bias), data(d_scale), data(d_shift));
    } else {
      for (Tensor* t : {&d_weight, &d_bias, &d_channel_bias, &d_scale, &d_shift}) std::fill_n(data(*t), t->numel(), A(0));
    }
  });
  return {d_input, d_weight, d_bias, d_channel_bias, d_scale, d_shift};
}

}  // namespace
}  // namespace fastgen::group_norm

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("group_norm_bwd", TORCH_BOX(&fastgen::group_norm::group_norm_bwd)); }
